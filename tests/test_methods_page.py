"""``benchmarks/methods.py`` and the page that it makes."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from unigrpo_core.catalog import load_catalog
from unigrpo_core.plugin import Hooks
from unigrpo_core.recipe import toml_value

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "methods.py"
PAGE = ROOT / "docs" / "reference" / "methods.md"
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "neighbours").glob("*.toml"))
METHODS = "unigrpo_methods"


def cells(table):
    """A Markdown table as dictionaries by column."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.fixture(scope="module")
def printed():
    code = (
        "import runpy, sys; del sys.argv[0]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- by property ------------------------------------------------------------------------------


def test_every_recipe_has_a_row_in_both_tables(printed):
    for table in printed.strip().split("\n\n"):
        assert [re.match(r"\[(\w+)\]", row["recipe"])[1] for row in cells(table)] == RECIPES


def test_rows_say_what_makes_a_method_and_what_it_takes(printed):
    made, taken = (
        {re.match(r"\[(\w+)\]", row["recipe"])[1]: row for row in cells(table)}
        for table in printed.strip().split("\n\n")
    )
    assert made["mix_grpo"]["what makes it"] == (
        "image.objective flow_grpo (clip_range 0.0006); image.scheduler flow_sde "
        "(noise_level 0.7); image.window sliding (size 2, every 6)"
    )
    assert made["mix_grpo"]["paper"] == "[2507.21802](https://arxiv.org/abs/2507.21802)"
    assert made["sep_grpo"]["paper"] == "-"
    plain = {"sampling": "1,152", "old": "216", "anchors": "0", "update": "432", "all": "1,800"}
    ours = plain | {"anchors": "432", "all": "2,232", "reads": "old, reference"}
    for name, others in {
        "grpo_guard": {"clip of text": "a token's ratio", "clip of images": "latent, of drifts"},
        "unigrpo": ours,
        "cispo": ours | {"clip of text": "a token's weight"},
        "gspo": ours | {"clip of text": "a thought's ratio"},
        "diffusion_nft": {
            "old": "432",
            "all": "2,016",
            "reads": "old, moving average",
            "off-policy by": "the average",
            "clip of images": "-",
        },
        "refl": {"old": "72", "update": "144", "all": "1,368", "reads": "gradient of the reward"},
        "cps": {"clip of images": "latent^2, of ratios"},
        "dapo": {key: f"{value}*" for key, value in ours.items() if key != "reads"},
    }.items():
        assert taken[name].items() >= (plain | others).items(), name


def test_the_page_has_the_tables_as_they_are_printed(printed):
    assert f"<!-- printed -->\n\n{printed.strip()}\n\n<!-- end -->" in PAGE.read_text()


# --- leaderboard ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one recipe, and another; what they gained is given to them."""
    folder = tmp_path_factory.mktemp("leaderboard")
    checkpoint = tiny.tiny_checkpoint(folder / "tiny")
    short = (
        *("steps=1", "prompts=2", "image.size=[24, 24]", "evaluation.every=0"),
        *("rewards=[{use='board_verifier'}]", "budget='cpu:600s'", "group.fan_out=[2, 1]"),
        *("evaluation.final_prompts=2", "evaluation.scheduler.steps=1"),
    )
    fpo = ("image.objective={use='fpo'}", "image.scheduler={use='ode', steps=4}", "image.lr=1e-4")
    for name, gain, more in (
        ("unigrpo/seed-0", 0.125, ()),
        ("unigrpo/seed-1", 0.25, ("seed=1",)),
        ("unifpo/seed-0", 0.5, fpo),
    ):
        run = tiny.run(folder, checkpoint, *short, *more, name=f"runs/{name}")
        first, last = tiny.lines(run, "evaluation.jsonl")
        rows = (first | {"board_verifier": 0.25}, last | {"board_verifier": 0.25 + gain})
        (run / "evaluation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        about = json.loads((run / "run.json").read_text())
        about["recipe"] = name.partition("/")[0]
        (run / "run.json").write_text(json.dumps(about))
    return folder / "runs"


@pytest.fixture
def script(capsys, monkeypatch):
    def script(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return script


def test_a_leaderboard_of_finished_runs(runs, script):
    code, out, _ = script(runs)
    assert code == 0
    first, second = cells(out)  # by gain
    assert first["method"] == "[unifpo](../../recipes/neighbours/unifpo.toml)"
    assert (first["seeds"], first["gain"]) == ("1", "+0.500")
    assert first["gap of images"] == first["t 95 %"] == "-"
    assert (second["seeds"], second["gain"]) == ("2", "+0.188 ± 0.062")
    assert second["t 95 %"] == "[-0.607, +0.982]"  # .1875 -+ 12.706 x .0625
    [one], [two] = (tiny.lines(runs / "unigrpo" / f"seed-{seed}") for seed in (0, 1))
    assert second["gap of text"] == f"{max(one['gap/text_max'], two['gap/text_max']):.1e}"
    assert second["network calls"] == f"{one['network_calls']:,.0f} ± 0"
    assert second["steps"] == "1 ± 0"


def test_gains_by_the_values_of_a_key(runs, script):
    code, out, _ = script(runs, "--by", "image.lr")
    fpo, ours = cells(out)
    assert code == 0
    assert fpo["gain by image.lr"] == "[unifpo](../../recipes/neighbours/unifpo.toml)"
    assert (fpo["0.0001"], fpo["0.001"]) == ("**+0.500**", "-")
    assert (ours["0.0001"], ours["0.001"]) == ("-", "**+0.188 ± 0.062**")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("runs", "--by", "image.rate"), 1, "has no image.rate"),
        (("tiny",), 1, "holds no run"),
        (("--by", "image.lr"), 2, "--by needs a folder"),
    ],
    ids=["no key", "no run", "no folder"],
)
def test_mistakes_are_told(runs, script, words, code, said):
    folders = [runs.parent / word if word in ("runs", "tiny") else word for word in words]
    found, _, err = script(*folders)
    assert (found, said in err) == (code, True)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_lists_every_method_once():
    """Each in a section named after its kind, with its options' defaults and its paper."""
    sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=\n## |\Z)", PAGE.read_text(), re.M | re.S))
    kinds = {
        "Schedulers": "scheduler",
        "Windows": "window",
        "Image objectives": "image_objective",
        "Text objectives": "text_objective",
        "Advantages": "advantage",
        "Regularizers": "regularizer",
    }
    catalog = load_catalog()
    for section, kind in kinds.items():
        intro, *items = re.split(r"^- (?=\[`)", sections[section], flags=re.M)
        ours = {
            c.name: c.provider
            for c in catalog.of(kind)
            if c.provider.build.__module__.startswith(METHODS)
        }
        listed = dict(re.match(r"\[`(\w+)`\]\(\S+/(\w+)\.py\)", item).groups() for item in items)
        assert set(listed) == set(ours), section
        assert len(listed) == len(items), section
        for (name, file), item in zip(listed.items(), items, strict=True):
            assert ours[name].build.__module__.endswith(f".{file}"), name
            for paper in re.findall(r"\d{4}\.\d{5}", ours[name].cite):
                assert paper in item, (name, paper)
            for option, field in ours[name].options.model_fields.items():
                plain = field.is_required() or field.default is None
                stated = f"`{option}`" if plain else f"`{option} = {default(field.default)}`"
                assert stated in item + intro, (name, stated)


def test_the_seams_of_the_other_page_are_the_hooks():
    page = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text()
    named = set(re.findall(r"\| `(unigrpo_\w+)` \|", page))
    hooks = {name for name in vars(Hooks) if name.startswith("unigrpo_")}
    assert named == hooks - {"unigrpo_policies", "unigrpo_prompts", "unigrpo_rewards"}


def default(value):
    return toml_value(list(value) if isinstance(value, tuple) else value)
