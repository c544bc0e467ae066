"""The wheel and the editable install: what is inside, and that both find recipes and plugins."""

import json
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [
    ROOT / name for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
]
BUILD = "import sys; from hatchling import build; getattr(build, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel and the editable one, built by this environment's own hatchling."""
    built = {}
    for kind in ("wheel", "editable"):
        folder = tmp_path_factory.mktemp(kind)
        command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        [built[kind]] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, wheels, tmp_path_factory):
    """An environment with that wheel installed; its requirements are those of this environment."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    wheel = str(wheels[request.param])
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    [packages] = home.glob("lib/*/site-packages")
    # Read first. A plain line adds a folder but runs none of its .pth files: so this environment's
    # own unigrpo, if editable, stays out of reach.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "0_borrowed.pth").write_text("".join(f"{line}\n" for line in sorted(borrowed)))
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*argv):
        command = [str(python), *argv]
        return subprocess.run(command, cwd=elsewhere, env={}, capture_output=True, text=True)

    run.source = packages if request.param == "wheel" else ROOT
    run.recipes = packages / "unigrpo_recipes" if request.param == "wheel" else ROOT / "recipes"
    run.script = home / "bin" / "unigrpo"
    return run


@pytest.fixture(scope="module")
def contents(wheels):
    with zipfile.ZipFile(wheels["wheel"]) as wheel:
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
        for file in (ROOT / "recipes").rglob("*.toml")
    }
    inside = {name: data for name, data in contents.items() if name.startswith("unigrpo_recipes/")}
    assert inside == sources


def test_the_checkpoint(contents):
    files = ("ema.safetensors", "config.json", "llm_config.json", "tokenizer.json")
    assert all(f"unigrpo_board/checkpoint/{name}" in contents for name in files)


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
    done = installed("-m", "unigrpo_core", "plugins", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["broken"] == []
    origins = {(item["distribution"], item["version"]) for item in found["components"]}
    assert origins == {("unigrpo", PROJECT["project"]["version"])}
    assert all(Path(item["file"]).is_relative_to(installed.source) for item in found["components"])
    names = {(item["kind"], item["name"]) for item in found["components"]}
    assert {("policy", "bagel"), ("reward", "board_verifier")} <= names


def test_recipes_are_found(installed):
    done = installed("-m", "unigrpo_core", "show", "no_cfg_mse", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    origins = json.loads(done.stdout)["origins"]
    assert Path(origins["updates.count"].rpartition(":")[0]).parent == installed.recipes


def test_a_recipe_and_its_checkpoint_are_right(installed):
    done = installed("-m", "unigrpo_core", "check", "no_cfg_mse", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    [report] = json.loads(done.stdout)
    assert (report["ok"], report["notes"]) == (True, [])


def test_the_packages_come_from_this_install(installed):
    code = "import unigrpo_board, unigrpo_core as c; print(c.__file__, unigrpo_board.__file__)"
    files = [Path(word) for word in installed("-c", code).stdout.split()]
    assert len(files) == 2
    assert all(file.is_relative_to(installed.source) for file in files)


def test_the_command(installed):
    done = installed(str(installed.script), "--version")
    assert done.stdout == f"unigrpo {PROJECT['project']['version']}\n"


@pytest.mark.parametrize("name", ["plugins", "recipes", "tests", "benchmarks", "docs"])
def test_nothing_else_becomes_importable(installed, name):
    done = installed("-c", f"import {name}")
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr
