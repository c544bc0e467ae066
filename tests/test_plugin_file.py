"""A plugin file beside a recipe: unigrpo_plugins.py."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from unigrpo_core import cli
from unigrpo_core.catalog import load_catalog
from unigrpo_core.engine.folder import RunFolder
from unigrpo_core.engine.scoring import score
from unigrpo_core.engine.setup import NamedReward
from unigrpo_core.errors import PluginError
from unigrpo_core.recipe import find_recipe, load_recipe, shipped, shipped_recipes, with_plugin_file
from unigrpo_core.records import Prompt, RewardBatch

FILE = """\
from __future__ import annotations

from dataclasses import dataclass

from unigrpo_core.plugin import Field, Options, Provider, hookimpl

@dataclass
class Weight:
    value: float = 1.0

class MineOptions(Options):
    power: float = Field(2.0, gt=0, description="exponent")

def build(options):
    def mine(batch):
        return batch.images.mean((1, 2, 3)) ** options.power
    return mine

@hookimpl
def unigrpo_rewards():
    yield Provider("mine", build, MineOptions, reads=("image",), range=(0.0, 1.0))
    yield Provider("brightness", build, MineOptions, reads=("image",), range=(0.0, 1.0))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a recipe that uses the plugin file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unigrpo_plugins.py").write_text(FILE)
    extends = f"extends = ['{shipped_recipes()}/no_cfg_mse.toml']\n"
    (tmp_path / "a.toml").write_text(extends + "rewards = [{ use = 'mine' }]")
    return tmp_path


@pytest.fixture
def unigrpo(capsys):
    def run(*argv):
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def resolve(file="a.toml", *overrides):
    return load_recipe(file, with_plugin_file(load_catalog(), find_recipe(file)), overrides)


SAID = "uses unigrpo_plugins.py, which provides reward 'mine', reward 'brightness'\n"


def test_it_registers_and_is_said(folder, unigrpo):
    code, out, err = unigrpo("check", "a.toml", "a.toml", "--json")
    assert (code, err) == (0, SAID)
    assert [report["ok"] for report in json.loads(out)] == [True, True]
    assert unigrpo("show", "a.toml", "a.toml")[2] == SAID


def test_it_counts_from_wherever_the_recipe_is_named(folder, unigrpo, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, _, err = unigrpo("check", "../a.toml")
    assert (code, err) == (0, SAID.replace("unigrpo", f"{folder}/unigrpo", 1))


def test_only_the_folder_of_the_named_recipe_counts(folder, unigrpo):
    (folder / "sub").mkdir()
    (folder / "sub" / "b.toml").write_text("extends = ['../a.toml']")
    code, out, err = unigrpo("check", "sub/b.toml")
    assert (code, err) == (3, "")
    assert "no reward called 'mine'" in out
    (folder / "sub" / "unigrpo_plugins.py").write_text(FILE.replace('"mine"', '"sub"'))
    code, out, err = unigrpo("check", "sub/b.toml", "a.toml")
    assert err.splitlines()[0].startswith("uses sub/unigrpo_plugins.py, which provides reward 'sub")
    assert "no reward called 'mine'" in out
    assert out.splitlines()[-1].startswith("ok a")


@pytest.mark.parametrize("word", ["a", "shipped/a.toml"])
def test_folders_of_shipped_recipes_have_none(folder, unigrpo, monkeypatch, word):
    root = folder / "shipped"
    root.mkdir()
    for name in ("a.toml", "unigrpo_plugins.py"):
        (folder / name).rename(root / name)
    monkeypatch.setattr(shipped, "shipped_recipes", lambda: root)
    code, _, err = unigrpo("check", word)
    assert (code, err) == (3, "")


def test_a_name_that_is_installed_too(folder, unigrpo):
    code, out, _ = unigrpo("check", "a.toml", "--set", "rewards=[{use='brightness'}]")
    assert code == 3
    assert 'say "unigrpo:brightness" or "unigrpo_plugins.py:brightness"' in out
    for name, origin in (("unigrpo_plugins.py", "unigrpo_plugins.py -"), ("unigrpo", "unigrpo 0")):
        resolved = resolve("a.toml", f"rewards=[{{use='{name}:brightness'}}]")
        assert resolved.recipe.rewards[0].component.origin.startswith(origin)


def test_run_json_says_what_ran(folder):
    resolved = resolve()
    (folder / "unigrpo_plugins.py").write_text("1 / 0")  # after it was read
    RunFolder(folder / "run").create(resolved)
    about = json.loads((folder / "run" / "run.json").read_text())
    assert about["plugin_file"] == {
        "file": str(folder / "unigrpo_plugins.py"),
        "sha256": sha256(FILE.encode()).hexdigest(),
    }
    assert about["plugins"]["unigrpo_plugins.py"] == "-"
    assert (folder / "run" / "unigrpo_plugins.py").read_text() == FILE
    again = resolve(folder / "run" / "recipe.toml")
    assert again.hash == resolved.hash


def test_run_json_without_one_and_with_something_disabled(folder):
    (folder / "unigrpo_plugins.py").unlink()
    RunFolder(folder / "plain").create(resolve("a.toml", "rewards=[{use='random'}]"))
    about = json.loads((folder / "plain" / "run.json").read_text())
    assert (about["plugin_file"], about["disabled"]) == (None, [])
    extra = replace(load_catalog().find("reward", "random"), distribution="extra", version="2")
    catalog = replace(load_catalog(), components=(*load_catalog().components, extra))
    overrides = ["rewards=[{use='unigrpo:random'}]", "plugins.disable=['extra']"]
    resolved = load_recipe("a.toml", catalog, overrides)
    RunFolder(folder / "less").create(resolved)
    about = json.loads((folder / "less" / "run.json").read_text())
    assert about["disabled"] == [{"distribution": "extra", "version": "2", "by": "--set"}]


FAULTS = {
    "import no_such_library": "1: ModuleNotFoundError: No module named 'no_such_library'",
    "\n\nx = (": "3: SyntaxError: '(' was never closed (unigrpo_plugins.py, line 3)",
    "def f():\n    g()\ndef g():\n    1 / 0\nf()": "4: ZeroDivisionError: division by zero",
    FILE.replace("yield", "len(3)\n    yield", 1): "21: TypeError: object of type 'int' has",
    FILE.replace('"brightness"', '"mine"'): "19: unigrpo_rewards() yielded 'mine' twice",
    FILE.replace("@hookimpl", ""): "20: unigrpo_rewards() is not marked with",
}


@pytest.mark.parametrize("source", FAULTS)
def test_a_fault_names_file_and_line_and_harms_only_who_needs_it(folder, unigrpo, source):
    (folder / "unigrpo_plugins.py").write_text(source)
    code, out, err = unigrpo("check", "a.toml")
    reason = f"unigrpo_plugins.py:{FAULTS[source]}"
    assert code == 3
    assert err.startswith(f"uses unigrpo_plugins.py, which is broken: {reason}")
    assert f"\n  broken: plugin 'unigrpo_plugins' of unigrpo_plugins.py -: {reason}" in out
    assert unigrpo("check", "a.toml", "--set", "rewards=[{use='random'}]")[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("def mine", "1 / 0\n    def mine", 15), ("return batch", "1 / 0\n        return batch", 16)],
)
def test_what_fails_later_names_file_and_line(folder, old, new, line):
    (folder / "unigrpo_plugins.py").write_text(FILE.replace(old, new))
    slot = resolve().recipe.rewards[0]

    def use():
        named = NamedReward("mine", 1.0, slot.build(), slot.component.origin)
        score((named,), RewardBatch((Prompt("a", "b"),), None, None, ("k",)), details=False)

    with pytest.raises(PluginError) as caught:
        use()
    assert str(caught.value).startswith("reward 'mine' of unigrpo_plugins.py -")
    assert f"unigrpo_plugins.py:{line}: ZeroDivisionError: division by zero" in str(caught.value)


def test_a_file_that_cannot_be_read(folder, unigrpo, monkeypatch):
    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    code, _, err = unigrpo("show", "a.toml")
    assert (code, err) == (3, f"{folder}/unigrpo_plugins.py cannot be read: Permission denied\n")


def test_an_edit_within_the_same_second_counts(folder):
    assert resolve().recipe.rewards[0].options.power == 2.0
    (folder / "unigrpo_plugins.py").write_text(FILE.replace("2.0", "3.0"))
    assert resolve().recipe.rewards[0].options.power == 3.0
    assert not list(folder.rglob("*.pyc"))


def test_sampling_runs_no_code_of_a_run_folder(folder, unigrpo):
    RunFolder(folder / "run").create(resolve())
    (folder / "run" / "final").mkdir()
    said = "does not use run/unigrpo_plugins.py: sampling runs no code of a run folder"
    code, _, err = unigrpo("sample", "run", "a red circle")
    assert code == 3
    assert err.startswith(said)
    assert "no reward called 'mine'" in err
    # the reward is not asked, so any will do; then there are no weights
    code, _, err = unigrpo("sample", "run", "a red circle", "--set", 'rewards=[{use="random"}]')
    assert code == 1
    assert err.startswith(said)
    assert "reward" not in err.replace("rewards=[", "")
