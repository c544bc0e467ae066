"""The example distributions, installed as wheels beside the wheel of unigrpo in a fresh
environment: what a stranger's plugin can do, and cannot do."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from environments import EXAMPLES, ROOT

NAMES = sorted(folder.name for folder in EXAMPLES.iterdir())
WORKING = [name for name in NAMES if "broken" not in name]
COLORFULNESS, HUBER = "unigrpo-reward-colorfulness", "unigrpo-regularizer-huber-velocity"
BROKEN = (
    "plugin 'broken' of unigrpo-plugin-broken 0.1.0: ModuleNotFoundError: "
    "No module named 'a_library_that_is_not_there'"
)
DISABLE = "UNIGRPO_DISABLE_PLUGINS"

RECIPE = """\
extends = ["{recipes}/no_cfg_mse.toml"]
steps = 1
prompts = 2
group = {{ fan_out = [3, 1] }}
rewards = [{{ use = "board_verifier" }}, {{ use = "colorfulness", weight = 0.2 }}]

[image]
regularizers = [{{ use = "huber_velocity", weight = 0.003, delta = 0.05 }}]

[evaluation]
every = 0
prompts = 2
final_prompts = 2
sheet = 0

[plugins]
require = ["unigrpo-reward-colorfulness>=0.1", "unigrpo-regularizer-huber-velocity>=0.1,<1"]
disable = ["unigrpo-plugin-broken"]
"""


@pytest.mark.parametrize("name", WORKING)
def test_an_example_is_short(name):
    """At most fifteen lines, without blank ones, comments, docstrings and imports."""
    source = (EXAMPLES / name / f"{name.replace('-', '_')}.py").read_text()
    tree = ast.parse(source)
    left_out = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    counted = [
        text
        for number, text in lines
        if number not in left_out and text.strip() and not text.strip().startswith("#")
    ]
    assert 10 <= len(counted) <= 15


@pytest.fixture(scope="module")
def fresh(wheel_of, environment):
    """An environment with unigrpo and all examples."""
    made = environment(wheel_of(ROOT), *(wheel_of(EXAMPLES / name) for name in NAMES))
    recipes = made.packages / "unigrpo_recipes"
    (made.work / "both.toml").write_text(RECIPE.format(recipes=recipes))
    return made


@pytest.fixture(scope="module")
def twin(wheel_of, fresh, tmp_path_factory):
    """A folder for the path with another distribution that has a reward ``colorfulness``."""
    source = tmp_path_factory.mktemp("twin")
    shutil.copytree(EXAMPLES / COLORFULNESS, source, dirs_exist_ok=True)
    (source / "unigrpo_reward_colorfulness.py").rename(source / "unigrpo_reward_twin.py")
    about = source / "pyproject.toml"
    text = about.read_text().replace(COLORFULNESS, "unigrpo-reward-twin")
    about.write_text(text.replace("unigrpo_reward_colorfulness", "unigrpo_reward_twin"))
    target = str(tmp_path_factory.mktemp("target"))
    done = fresh("pip", "install", "-q", "--no-deps", "--target", target, str(wheel_of(source)))
    assert done.returncode == 0, done.stderr
    return target


def check(fresh, *words, **variables):
    """Exit code and the told problems of ``both.toml``, or of overrides of it."""
    done = fresh("unigrpo", "check", "both.toml", *words, **variables)
    return done.returncode, done.stdout + done.stderr


# --- in the environment -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_examples_pass_their_own_tests(fresh):
    for name in WORKING:
        shutil.copytree(EXAMPLES / name / "tests", fresh.work / name)
    done = fresh("python", "-m", "pytest", "-v", "-p", "no:cacheprovider", *WORKING)
    assert done.returncode == 0, done.stdout
    assert all(f"{name}/test_" in done.stdout for name in WORKING)
    assert done.stdout.count("::TestConformance::test_") > 20


@pytest.mark.slow
def test_a_recipe_that_names_both_runs(fresh):
    done = fresh("unigrpo", "run", "both.toml", "--out", "run")
    assert done.returncode == 0, done.stderr
    run = fresh.work / "run"
    about = json.loads((run / "run.json").read_text())
    assert about["plugins"] == {"unigrpo": "0.1.0", COLORFULNESS: "0.1.0", HUBER: "0.1.0"}
    [disabled] = about["disabled"]
    assert disabled["distribution"] == "unigrpo-plugin-broken"
    assert disabled["by"].startswith("both.toml:")
    [figures] = map(json.loads, (run / "metrics.jsonl").open())
    assert 0 < figures["reward/colorfulness"] < 1
    assert figures["image/huber_velocity"] >= 0
    shown = fresh("unigrpo", "show", "run/recipe.toml")
    assert 'require = ["unigrpo-reward-colorfulness>=0.1"' in shown.stdout
    assert json.loads((run / "summary.json").read_text())["hash"] in shown.stdout


@pytest.mark.slow
def test_the_listing_says_where_each_is_from(fresh):
    found = json.loads(fresh("unigrpo", "plugins", "--json").stdout)
    files = {
        (item["distribution"], item["name"]): Path(item["file"]) for item in found["components"]
    }
    assert files[COLORFULNESS, "colorfulness"].name == "unigrpo_reward_colorfulness.py"
    assert {origin for origin, _ in files} == {"unigrpo", COLORFULNESS, HUBER}
    assert all(file.is_relative_to(fresh.packages) for file in files.values())
    text = fresh("unigrpo", "plugins", "regularizer", "huber_velocity").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["distribution", HUBER] in rows
    assert ["version", "0.1.0"] in rows
    assert ["file", str(fresh.packages / "unigrpo_regularizer_huber_velocity.py")] in rows
    assert ["delta", "float", "0.1", ">", "0", "velocity"] in [row[:6] for row in rows]


@pytest.mark.slow
def test_the_broken_one_is_listed_and_harms_nobody(fresh):
    found = json.loads(fresh("unigrpo", "plugins", "--json").stdout)
    [broken] = found["broken"]
    said = "plugin {entry!r} of {distribution} {version}: {reason}"
    assert said.format(**broken) == BROKEN
    assert fresh("unigrpo", "plugins").stdout.endswith(f"broken: {BROKEN}\n")
    assert f"broken: {BROKEN}\n" in (EXAMPLES / "unigrpo-plugin-broken/README.md").read_text()
    assert check(fresh, "--set", "plugins.disable=[]")[0] == 0
    code, told = check(fresh, "--set", "plugins.disable=[]", "--set", "rewards.1.use=never")
    assert code == 3
    assert "no reward called 'never'" in told
    assert f"broken: {BROKEN}" in told


@pytest.mark.slow
def test_two_of_one_name_are_ambiguous_until_qualified(fresh, twin):
    code, told = check(fresh, PYTHONPATH=twin)
    assert code == 3
    assert (
        "both.toml:5: rewards.1.use: several plugins have a reward called 'colorfulness'; say "
        f'"{COLORFULNESS}:colorfulness" or "unigrpo-reward-twin:colorfulness"'
    ) in told
    for exact in (COLORFULNESS, "Unigrpo_Reward_Twin"):
        override = f"rewards.1.use='{exact}:colorfulness'"
        assert check(fresh, "--set", override, PYTHONPATH=twin)[0] == 0
    for disabled, code in (("unigrpo-reward-twin", 0), (COLORFULNESS, 3)):  # 3: it is required
        override = f"plugins.disable=['{disabled}']"
        assert check(fresh, "--set", override, PYTHONPATH=twin)[0] == code
    assert check(fresh, PYTHONPATH=twin, **{DISABLE: "unigrpo-reward-twin"})[0] == 0


@pytest.mark.slow
def test_disabled_by_its_distribution(fresh):
    line = RECIPE[: RECIPE.index("disable")].count("\n") + 1
    without = ("--set", "plugins.require=[]")
    text = (fresh.work / "both.toml").read_text()
    (fresh.work / "less.toml").write_text(text.replace("plugin-broken", "reward-colorfulness"))
    done = fresh("unigrpo", "check", "less.toml", *without)
    assert done.returncode == 3
    assert "less.toml:5: rewards.1.use: no reward called 'colorfulness'" in done.stdout
    assert f"disabled: {COLORFULNESS} 0.1.0, by less.toml:{line}" in done.stdout
    code, told = check(fresh, *without, **{DISABLE: f"{HUBER},unigrpo-reward-colourfulness"})
    assert code == 3
    assert "both.toml:8: image.regularizers.0.use: no regularizer called 'huber_velocity'" in told
    assert (
        f"warning: {DISABLE} names 'unigrpo-reward-colourfulness', which is no installed "
        f"distribution of plugins; did you mean '{COLORFULNESS}'?\n"
    ) in told
    listed = fresh("unigrpo", "plugins", **{DISABLE: HUBER})
    assert f"disabled: {HUBER} 0.1.0, by {DISABLE}\n" in listed.stdout


@pytest.mark.slow
def test_a_required_version_is_enforced(fresh):
    (fresh.work / "newer.toml").write_text(
        (fresh.work / "both.toml").read_text().replace("colorfulness>=0.1", "colorfulness>=0.2")
    )
    done = fresh("unigrpo", "run", "newer.toml", "--out", "newer")
    assert done.returncode == 3
    line = RECIPE[: RECIPE.index("require")].count("\n") + 1
    assert done.stderr == (
        f"newer.toml:{line}: plugins.require.0: needs {COLORFULNESS}>=0.2, and {COLORFULNESS} "
        "0.1.0 is installed\n"
    )
    assert not (fresh.work / "newer").exists()
