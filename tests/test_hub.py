"""Options that are a folder or a model on the hub: one rule, whatever the plugin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unigrpo_core import hub
from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Files, HubPath, Options, fetched_folder, local_folder

CLIP = Files(
    ("config.json",),
    either=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    published=("weights",),
    optional=("extra.json", "config.json"),
)


class Stated(Options):
    model: HubPath = ""


def stated(value, beside):
    return Stated.model_validate({"model": value}, context={"folders": {"model": beside}}).model


def refused(path, files=CLIP):
    with pytest.raises(UserError) as caught:
        local_folder("model", path, files)
    return str(caught.value)


@pytest.mark.parametrize("name", ["owner/name", "owner/name@v1.0", "owner/name@refs/pr/3"])
def test_a_folder_beside_the_recipe_comes_before_an_id(tmp_path, name):
    assert stated(name, str(tmp_path)) == name
    (tmp_path / name).mkdir(parents=True)
    assert stated(name, str(tmp_path)) == str(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("pkg:some/folder", "pkg:some/folder"),
        ("", ""),
        ("./owner/name", "/recipes/owner/name"),
        ("name", "/recipes/name"),
        ("a/b/c", "/recipes/a/b/c"),
        ("owner/name@../up", "/recipes/owner/name@../up"),
        ("owner/name@/etc", "/recipes/owner/name@/etc"),
        ("/models/name", "/models/name"),
        ("~/name", os.path.expanduser("~/name")),
    ],
)
def test_what_is_no_id_is_a_folder(value, meant):
    assert stated(value, "/recipes") == meant


def test_a_folder_beside_a_recipe_that_is_named_relatively_is_no_id():
    assert stated("name", "recipes") == os.path.abspath("recipes/name")


def test_alternatives_are_told_and_a_folder_may_lack_what_is_only_published(tmp_path):
    path = str(tmp_path)
    lacks = "the folder lacks config.json, tokenizer.json (or vocab.json and merges.txt); give one"
    assert refused(path).startswith(f"model {path!r}: {lacks}")
    for name in ("config.json", "vocab.json"):
        (tmp_path / name).touch()
    assert "lacks tokenizer.json (or" in refused(path)
    (tmp_path / "merges.txt").touch()
    assert local_folder("model", path, CLIP) == fetched_folder("model", path, CLIP) == tmp_path


def test_all_files_are_downloaded_each_once():
    names = ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "weights", "extra.json"]
    assert CLIP.all == names


def test_a_cached_model_is_whole_with_all_that_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert f"cache {tmp_path} lacks config.json, weights, tokenizer.json (or" in refused("o/n")
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).touch()
    assert "'o/n' is not there yet" in refused("o/n")  # no reference to the commit
    assert f"is not whole yet ({snapshot}): there" in refused("o/n@0123abc")
    assert "lacks weights. A run downloads it" in refused("o/n@0123abc")
    assert "`hf download o/n --revision 0123abc`" in refused("o/n@0123abc")
    (snapshot / "weights").touch()
    assert local_folder("model", "o/n@0123abc", CLIP) == snapshot


def test_folders_of_packages():
    assert local_folder("model", "pkg:unigrpo_board/checkpoint", Files(("config.json",))).is_dir()
    assert refused("pkg:no_such/x") == "model 'pkg:no_such/x': no package 'no_such' is installed"
    assert "there is no folder" in refused("pkg:unigrpo_board/nowhere")


def test_the_cache_is_where_the_hub_s_own_library_has_it(monkeypatch, tmp_path):
    """By any of its variables."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    cases = [{}, {"HF_HOME": "$HOME/a"}, {"HF_HUB_CACHE": "~/b"}]
    cases += [{name: f"{tmp_path}/{name}" for name in names[from_:]} for from_ in range(4)]
    script = (
        "import importlib, json, os, sys\n"
        "from huggingface_hub import constants\n"
        "for case in json.loads(sys.argv[1]):\n"
        "    os.environ.update(case)\n"
        "    print(importlib.reload(constants).HF_HUB_CACHE)\n"
        "    [os.environ.pop(name) for name in case]\n"
    )
    for name in names:
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(cases)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for case, theirs in zip(cases, done.stdout.splitlines(), strict=True):
        with monkeypatch.context() as within:
            for name, value in case.items():
                within.setenv(name, value)
            assert hub._cache() == Path(theirs)
