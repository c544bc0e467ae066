"""The wheel and the editable install: what is inside, and that both find recipes and plugins."""

import json
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

import pytest
from environments import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [
    ROOT / name for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, wheel_of, environment):
    """An environment with that wheel installed; ``source`` and ``recipes`` are where it should
    find itself."""
    fresh = environment(wheel_of(ROOT, request.param))
    wheel = request.param == "wheel"
    fresh.source = fresh.packages if wheel else ROOT
    fresh.recipes = fresh.packages / "unigrpo_recipes" if wheel else ROOT / "recipes"
    return fresh


@pytest.fixture(scope="module")
def contents(wheel_of):
    with zipfile.ZipFile(wheel_of(ROOT)) as wheel:
        yield {name: wheel.read(name) for name in wheel.namelist()}


def test_top_level(contents):
    found = {PurePosixPath(name).parts[0] for name in contents}
    metadata = f"unigrpo-{PROJECT['project']['version']}.dist-info"
    assert found == {*(package.name for package in PACKAGES), "unigrpo_recipes", metadata}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_file_of_a_package(contents, package):
    sources = {
        file.relative_to(package.parent).as_posix(): file
        for file in package.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    inside = {name for name in contents if name.startswith(f"{package.name}/")}
    assert inside == set(sources)
    assert all(contents[name] == file.read_bytes() for name, file in sources.items())


def test_every_recipe(contents):
    sources = {
        f"unigrpo_recipes/{file.relative_to(ROOT / 'recipes').as_posix()}": file.read_bytes()
        for file in (ROOT / "recipes").rglob("*")
        if file.is_file()
    }
    inside = {name: data for name, data in contents.items() if name.startswith("unigrpo_recipes/")}
    assert inside == sources


def test_the_checkpoint(contents):
    files = ("ema.safetensors", "config.json", "llm_config.json", "tokenizer.json")
    assert all(f"unigrpo_board/checkpoint/{name}" in contents for name in files)
    for name in ("scorer.safetensors", "config.json", "made.json"):
        assert f"unigrpo_board/scorer/{name}" in contents


def test_metadata(contents):
    [metadata] = [name.removesuffix("/METADATA") for name in contents if name.endswith("/METADATA")]
    entries = ConfigParser()
    entries.read_string(contents[f"{metadata}/entry_points.txt"].decode())
    assert dict(entries["console_scripts"]) == PROJECT["project"]["scripts"]
    assert dict(entries["unigrpo"]) == PROJECT["project"]["entry-points"]["unigrpo"]
    licence = contents[f"{metadata}/licenses/LICENSE"]
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert b"END OF TERMS AND CONDITIONS" in licence
    described = contents[f"{metadata}/METADATA"].decode()
    assert "\nLicense-Expression: Apache-2.0\n" in described
    assert "\nRequires-Python: >=3.11\n" in described


def test_plugins_are_found(installed):
    done = installed("unigrpo", "plugins", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["broken"] == []
    origins = {(item["distribution"], item["version"]) for item in found["components"]}
    assert origins == {("unigrpo", PROJECT["project"]["version"])}
    assert all(Path(item["file"]).is_relative_to(installed.source) for item in found["components"])
    names = {(item["kind"], item["name"]) for item in found["components"]}
    assert {("policy", "bagel"), ("reward", "board_verifier")} <= names


def test_recipes_are_found(installed):
    done = installed("unigrpo", "show", "no_cfg_mse", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    origins = json.loads(done.stdout)["origins"]
    assert Path(origins["updates.count"].rpartition(":")[0]).parent == installed.recipes


def test_a_recipe_and_its_checkpoint_are_right(installed):
    done = installed("unigrpo", "check", "no_cfg_mse", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    [report] = json.loads(done.stdout)
    assert (report["ok"], report["notes"]) == (True, [])


def test_the_packages_come_from_this_install(installed):
    code = "import unigrpo_board, unigrpo_core as c; print(c.__file__, unigrpo_board.__file__)"
    files = [Path(word) for word in installed("python", "-c", code).stdout.split()]
    assert len(files) == 2
    assert all(file.is_relative_to(installed.source) for file in files)


def test_the_command(installed):
    done = installed("unigrpo", "--version")
    assert done.stdout == f"unigrpo {PROJECT['project']['version']}\n"


@pytest.mark.parametrize("name", ["plugins", "recipes", "tests", "benchmarks", "docs"])
def test_nothing_else_becomes_importable(installed, name):
    done = installed("python", "-c", f"import {name}")
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr
