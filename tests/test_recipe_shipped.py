"""The shipped recipes, with the plugins of this distribution; needs it installed."""

import subprocess
import sys

import pytest

from unigrpo_core.catalog import load_catalog
from unigrpo_core.recipe import RecipeError, find_recipe, load_recipe, shipped_titles


@pytest.fixture(scope="module")
def catalog():
    return load_catalog()


@pytest.mark.parametrize("name", list(shipped_titles()))
def test_every_shipped_recipe_is_right_and_has_a_title(catalog, name):
    resolved = load_recipe(find_recipe(name), catalog)
    assert resolved.recipe.title


@pytest.mark.parametrize("name", list(shipped_titles()))
def test_every_shipped_recipe_stands_alone(catalog, name, tmp_path):
    resolved = load_recipe(find_recipe(name), catalog)
    (tmp_path / "alone.toml").write_text(resolved.to_toml())
    assert load_recipe(tmp_path / "alone.toml", catalog).hash == resolved.hash


@pytest.mark.parametrize(
    "path", ["image.scheduler.noise_level=0", "image.scheduler={use='ode', steps=8}"]
)
def test_flow_grpo_needs_noise(catalog, path):
    with pytest.raises(RecipeError, match="nothing would be stochastic"):
        load_recipe(find_recipe("no_cfg_mse"), catalog, [path])


@pytest.mark.parametrize(
    "argv", [["plugins"], ["check", *shipped_titles()], ["show"], ["show", "no_cfg_mse"]]
)
def test_light_verbs_load_nothing_heavy(argv):
    driver = (
        "import sys; from unigrpo_core.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", driver, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
