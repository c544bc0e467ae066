"""The verbs that load no model: what they print, their exit codes, and what they never import."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_plugin import RECIPE, fake_catalog

from unigrpo_core import cli
from unigrpo_core.catalog import Catalog
from unigrpo_core.errors import UserError
from unigrpo_core.recipe import shipped

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """The fakes as what is installed, two recipes as what is shipped, and two at hand."""
    for verb in (cli.check, cli.show, cli.plugins):
        monkeypatch.setattr(verb, "load_catalog", fake_catalog)
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "base.toml").write_text(RECIPE)
    (folder / "plain.toml").write_text('extends = ["base.toml"]\ntitle = "no guidance"')
    monkeypatch.setattr(shipped, "shipped_recipes", lambda: folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.toml").write_text(
        'extends = ["shipped/base.toml"]\nseed = 5\n[policy]\nweights = ""'
    )
    (tmp_path / "bad.toml").write_text("seed = -1\n" + RECIPE)
    (tmp_path / "gone.toml").write_text(RECIPE.replace('"words"', '"wordz"'))


@pytest.fixture
def run(capsys):
    def run(*argv):
        code = cli.main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


# --- check ------------------------------------------------------------------------------------


def test_check(run):
    code, out, err = run("check", "good.toml", "base")
    assert (code, err) == (0, "")
    assert out.split("\n") == [
        "ok good  (the base)",
        "  note: policy unified: weights are not there yet",
        "ok base  (the base)",
        "",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bad.toml"], 2),
        (["gone.toml"], 3),
        (["good.toml", "gone.toml"], 3),
        (["gone.toml", "bad.toml"], 2),
        (["nowhere"], 2),
        (["good.toml", "--set", "seed=x"], 2),
    ],
)
def test_check_exit_codes(run, words, expected):
    assert run("check", *words)[0] == expected


def test_check_prints_problems_with_their_place(run):
    _, out, _ = run("check", "bad.toml", "base", "basee")
    lines = out.splitlines()
    assert lines[0].startswith("bad.toml:1: seed: should be greater than or equal to 0, got -1")
    assert lines[1] == "ok base  (the base)"
    assert lines[2] == "basee: no such file, and no shipped recipe; did you mean 'base'?"


def test_check_json(run):
    code, out, _ = run("check", "good.toml", "bad.toml", "--json")
    good, bad = json.loads(out)
    assert code == 2
    assert good["ok"]
    assert good["notes"] == ["policy unified: weights are not there yet"]
    assert not bad["ok"]
    assert (bad["problems"][0]["line"], bad["problems"][0]["path"]) == (1, "seed")


def test_check_of_a_plugin_that_cannot_say_its_notes_tells_the_other_recipes_too(run, monkeypatch):
    catalog = fake_catalog()
    old = catalog.find("policy", "unified")
    provider = replace(old.provider, notes=lambda options: 1 / 0)
    items = [i if i is not old else replace(old, provider=provider) for i in catalog.components]
    monkeypatch.setattr(cli.check, "load_catalog", lambda: Catalog(tuple(items)))
    code, out, err = run("check", "good.toml", "bad.toml")
    assert (code, err) == (2, "")
    told = "good.toml: policy 'unified' of fakes 1.2 cannot say its notes: ZeroDivisionError: "
    assert out.splitlines()[0].startswith(told)
    assert out.splitlines()[1].startswith("bad.toml:1: seed:")
    code, out, _ = run("check", "good.toml", "--json")
    assert (code, json.loads(out)[0]["ok"]) == (3, False)


# --- show -------------------------------------------------------------------------------------


def test_show_lists_what_is_shipped(run):
    assert run("show")[1].splitlines() == [
        "recipe  title",
        "base    the base",
        "plain   no guidance",
    ]
    assert json.loads(run("show", "--json")[1])[1] == {"name": "plain", "title": "no guidance"}


def test_show_one_is_a_recipe_with_origins(run, tmp_path):
    code, out, _ = run("show", "good.toml", "--set", "text.lr=1e-5")
    assert code == 0
    comments = {
        line.partition(" = ")[0]: line.rpartition("# ")[2]
        for line in out.splitlines()
        if "=" in line
    }
    assert comments["seed"] == "good.toml:2"
    assert comments["lr"] == "default"  # the last one, of the image expert
    assert "--set" in out.partition("[text]")[2].splitlines()[2]
    assert comments["prompts"] == "default"
    assert comments["mode"] == "shipped/base.toml:5"
    assert len({line.rindex("# ") for line in out.splitlines() if " = " in line}) == 1
    (tmp_path / "again.toml").write_text(out)
    again = json.loads(run("show", "again.toml", "--json")[1])
    assert again["hash"] in out.splitlines()[0]


def test_show_two_compares_and_sets_the_second(run):
    _, out, _ = run("show", "base", "good.toml", "--set", "image.guidance.use=none")
    assert [line.split() for line in out.splitlines()] == [
        ["path", "base", "good"],
        ["seed", "0", "5"],
        ["policy.weights", *out.splitlines()[2].split()[1:2], '""'],
        ["image.guidance.use", '"cfg"', '"none"'],
        ["image.guidance.scale", "3.0", "-"],
    ]
    assert run("show", "base", "plain")[1].startswith("no difference")
    found = json.loads(run("show", "base", "plain", "--set", "seed=1", "--json")[1])
    assert found == {"a": "base", "b": "plain", "differences": [{"path": "seed", "a": 0, "b": 1}]}


def test_show_of_a_broken_recipe(run):
    code, out, err = run("show", "bad.toml")
    assert (code, out) == (2, "")
    assert err.startswith("bad.toml:1: seed:")


def test_show_usage(run):
    assert run("show", "base", "plain", "good.toml")[0] == 2
    assert run("show", "--set", "seed=1")[0] == 2


# --- plugins ----------------------------------------------------------------------------------


def test_plugins(run, monkeypatch):
    monkeypatch.setattr(cli.plugins, "load_catalog", lambda: fake_catalog("no_such_module"))
    code, out, _ = run("plugins")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["kind", "name", "from", "summary", "source"]
    assert lines[1].split() == ["policy", "unified", "fakes", "1.2", "thinks", "and", "draws"]
    assert lines[-1].startswith("broken: plugin 'no_such_module' of fakes 1.2: ModuleNotFound")


def test_plugins_of_a_kind(run):
    _, out, _ = run("plugins", "scheduler")
    assert [line.split()[1] for line in out.splitlines()] == [
        "name",
        "ends",
        "ode",
        "sde",
        "squares",
    ]
    _, out, _ = run("plugins", "objective")
    kinds = [line.split()[0] for line in out.splitlines()]
    assert set(kinds) == {"kind", "text_objective", "image_objective"}
    code, _, err = run("plugins", "objective", "flow_grpo")
    assert (code, "say which of them 'flow_grpo' is" in err) == (2, True)
    code, _, err = run("plugins", "schedulr")
    assert (code, "did you mean 'scheduler'?" in err) == (2, True)


def test_one_plugin_with_its_options(run):
    _, out, _ = run("plugins", "policy", "unified")
    rows = [line.split() for line in out.splitlines()]
    assert ["provides", "text,", "image,", "branch:blank"] in rows
    assert ["width", "int", "8", ">=", "1", "channels"] in rows
    _, out, _ = run("plugins", "reward", "fakes:exact")
    assert ["cite", "Doe", "2025,", "eq.", "3"] in [line.split() for line in out.splitlines()]
    assert '"strict" | "soft"' in out
    _, out, _ = run("plugins", "text_objective", "grpo")
    [row] = [line.split() for line in out.splitlines() if line.startswith("clip_range")]
    assert row[:7] == ["clip_range", "float", "|", "None", "absent", ">", "0"]
    assert run("plugins", "guidance", "none")[1].endswith("no options\n")
    assert run("plugins", "reward", "exakt")[0] == 3


def test_plugins_json(run):
    found = json.loads(run("plugins", "window", "random", "--json")[1])
    [item] = found["components"]
    assert item["options"][0] == {
        "name": "size",
        "type": "int",
        "required": False,
        "default": 1,
        "range": ">= 1",
        "description": "steps",
    }


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("mend this"), 1, "mend this\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ZeroDivisionError("1/0"),
            1,
            "a bug, please report it: ZeroDivisionError: 1/0 (--debug shows the traceback)\n",
        ),
    ],
)
def test_errors(run, monkeypatch, error, code, said):
    def fail():
        raise error

    monkeypatch.setattr(cli.plugins, "load_catalog", fail)
    assert run("plugins") == (code, "", said)


@pytest.mark.parametrize("argv", [("--debug", "plugins"), ("plugins", "--debug")])
@pytest.mark.parametrize("error", [UserError("mend this"), ValueError("a bug")])
def test_debug_shows_the_traceback_before_or_after_the_verb(run, monkeypatch, argv, error):
    def fail():
        raise error

    monkeypatch.setattr(cli.plugins, "load_catalog", fail)
    code, _, err = run(*argv)
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert str(error) in err


@pytest.mark.parametrize(
    ("argv", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["nonsense"], 2)]
)
def test_usage(argv, code, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == code


# --- in a process of its own ------------------------------------------------------------------

DRIVER = """
import sys
import unigrpo_core.catalog
from fake_plugin import fake_catalog
unigrpo_core.catalog.load_catalog = fake_catalog
from unigrpo_core.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "transformers", "diffusers", "accelerate"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else code)
"""


def process(*argv, **options):
    path = f"{TESTS}:{TESTS.parent}"
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *argv],
        env={"PYTHONPATH": path, "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    "argv",
    [
        ("--help",),
        ("run", "--help"),
        ("sample", "--help"),
        ("plugins",),
        ("plugins", "scheduler", "sde"),
        ("show", "good.toml"),
        ("show", "good.toml", "good.toml"),
        ("check", "good.toml"),
    ],
)
def test_light_verbs_load_nothing_heavy(argv):
    one = process(*argv)
    _, err = one.communicate()
    assert (one.returncode, err) == (0, "")


def test_a_reader_that_has_had_enough_is_no_error():
    one = process("show", "good.toml")
    one.stdout.close()
    assert one.stderr.read() == ""
    assert one.wait() == 141


def test_python_dash_m():
    command = [sys.executable, "-m", "unigrpo_core", "--help"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: unigrpo")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("argv", [["plugins"], ["show", "no_cfg_mse"], ["check", "no_cfg_mse"]])
def test_output_that_cannot_be_written_is_no_bug(argv):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "unigrpo_core", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "what is printed cannot be written: No space left on device\n"
