"""From a file to a typed recipe, and every mistake on the way."""

import os

import pytest
from fake_plugin import RECIPE, fake_catalog

from unigrpo_core.catalog import Catalog
from unigrpo_core.errors import PluginError
from unigrpo_core.recipe import (
    RecipeError,
    difference,
    find_recipe,
    load_recipe,
    shipped,
    shipped_titles,
    slots,
)


@pytest.fixture
def load(tmp_path):
    """Loads a recipe that extends the base one."""
    (tmp_path / "_base").mkdir()
    (tmp_path / "_base" / "base.toml").write_text(RECIPE)

    def load(text="", *overrides):
        (tmp_path / "child.toml").write_text(f'extends = ["_base/base.toml"]\n{text}')
        return load_recipe(tmp_path / "child.toml", fake_catalog(), overrides)

    return load


@pytest.fixture
def mistakes(load):
    """All that is said of such a recipe: (line, path, message), and the exit code."""

    def mistakes(text="", *overrides):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        error = caught.value
        return [(p.line, p.path, p.message) for p in error.problems], error.exit_code

    return mistakes


def test_the_fakes_are_a_working_plugin():
    assert not fake_catalog().broken


def test_a_typed_recipe(load):
    recipe = load("seed = 3").recipe
    assert recipe.seed == 3
    assert recipe.train == ("text", "image")
    assert recipe.group.fan_out == (12, 1)
    assert recipe.image.size == (36, 36)
    assert recipe.image.scheduler.use == "sde"
    assert (recipe.image.scheduler.steps, recipe.image.scheduler.noise_level) == (8, 0.8)
    assert recipe.image.scheduler.shift is None
    assert recipe.image.window.options.range == (0, 5)
    assert recipe.rewards[1].weight == -0.5
    assert recipe.rewards[0].options.mode == "strict"
    assert recipe.image.regularizers[0].anchor == "reference"
    assert recipe.image.window.build().count(8) == 3
    assert isinstance(recipe.image.guidance.options.scale, float)  # an integer will do for one
    assert [path for path, _ in slots(recipe)][:4] == ["policy", "source", "rewards.0", "rewards.1"]


def test_origins_and_values(load):
    resolved = load("[text]\nlr = 1e-5", "image.guidance.scale=2")
    values, origins = resolved.values, resolved.origins
    assert values["text"]["lr"] == 1e-5
    assert (origins["text.lr"].file.name, origins["text.lr"].line) == ("child.toml", 3)
    assert origins["image.guidance.scale"] == "--set"
    assert values["image"]["guidance"] == {"use": "cfg", "scale": 2.0}
    assert origins["text.max_tokens"] == "default"
    assert origins["policy.width"] == "default"
    assert origins["rewards.0.mode"].line == 5
    assert origins["image.regularizers.0.weight"].line == 24
    assert "shift" not in values["image"]["scheduler"]
    assert "extends" not in values


def test_defaults_are_origins_of_what_no_file_states(load):
    stated = {path for path, origin in load().origins.items() if origin != "default"}
    assert "group.fan_out" not in stated
    assert "evaluation.scheduler.steps" in stated
    assert "evaluation.scheduler.noise_level" not in stated


# --- the hash, and recipes that stand alone ---------------------------------------------------


def test_the_hash_ignores_titles_and_names_and_form(load, tmp_path):
    one = load()
    (tmp_path / "flat.toml").write_text(RECIPE.replace("the base", "another title"))
    assert one.hash != load("seed = 1").hash
    # the same values from another folder, but a relative path counts from its own file
    other = load_recipe(
        tmp_path / "flat.toml", fake_catalog(), [f"policy.weights={tmp_path}/_base/w"]
    )
    assert other.hash == one.hash
    assert difference(one, other) == []
    assert (one.name, other.name) == ("child", "flat")


@pytest.mark.parametrize(
    "text",
    [
        "",
        'title = "tab\\t, \\"quotes\\", \\\\, \\u007f, ünï"',
        "[image]\nregularizers = []\nguidance = { use = 'none' }",
        "[image.scheduler]\nshift = 1e22\nnoise_level = 1e-9",
        'episode = ["think"]\ntrain = []\nsteps = 0\ngroup = { fan_out = [3] }',
    ],
)
def test_a_recipe_that_stands_alone_has_the_same_hash(load, tmp_path, text):
    resolved = load(text)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "recipe.toml").write_text(resolved.to_toml())
    again = load_recipe(folder / "recipe.toml", fake_catalog())
    assert again.values == resolved.values
    assert again.hash == resolved.hash
    assert again.to_toml() == resolved.to_toml()


def test_difference(load):
    changes = difference(load(), load("seed = 1\n[image]\nguidance = { use = 'none' }"))
    assert changes == [
        ("seed", 0, 1),
        ("image.guidance.use", "cfg", "none"),
        ("image.guidance.scale", 3.0, None),
    ]


def test_components(load):
    names = [(item.kind, item.name) for item in load().components]
    assert len(names) == len(set(names))
    assert ("scheduler", "ode") in names
    assert ("regularizer", "mse") in names
    assert ("reward", "exact") in names


def test_notes_come_from_the_providers(load):
    assert load().notes() == []
    assert load('[policy]\nweights = ""').notes() == ["policy unified: weights are not there yet"]


# --- relative paths ---------------------------------------------------------------------------


def test_paths_count_from_the_file_that_states_them(load, tmp_path, monkeypatch):
    assert load().recipe.policy.options.weights == str(tmp_path / "_base" / "w")
    child = load('[policy]\nweights = "../w"').recipe
    assert os.path.normpath(child.policy.options.weights) == str(tmp_path.parent / "w")
    assert load('[policy]\nweights = "/w"').recipe.policy.options.weights == "/w"
    assert load('[policy]\nweights = ""').recipe.policy.options.weights == ""
    monkeypatch.chdir(tmp_path.parent)
    recipe = load("", "policy.weights=here/w").recipe
    assert recipe.policy.options.weights == str(tmp_path.parent / "here" / "w")
    (tmp_path / "old" / "final").mkdir(parents=True)
    assert load('start = "old"').recipe.start == str(tmp_path / "old")


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seeed = 1", (2, "seeed", "unknown key; did you mean 'seed'?")),
        ("[image]\nszie = 3", (3, "image.szie", "unknown key; did you mean 'size'?")),
        ("[opt]\nx = 1", (2, "opt", "unknown key")),
        (
            "[image]\nscheduler = { nois_level = 1 }",
            (3, "image.scheduler.nois_level", "unknown key; did you mean 'noise_level'?"),
        ),
        (
            "[image]\nguidance = { scael = 1 }",
            (3, "image.guidance.scael", "unknown key; did you mean 'scale'?"),
        ),
        ("seed = -1", (2, "seed", "should be greater than or equal to 0, got -1 (seed")),
        ('seed = "3"', (2, "seed", 'should be a valid integer, got "3"')),
        ("seed = 3.0", (2, "seed", "should be a valid integer, got 3.0")),
        ("seed = true", (2, "seed", "should be a valid integer, got true")),
        (
            '[image]\ncontext_gradient = "yes"',
            (3, "image.context_gradient", 'should be a valid boolean, got "yes"'),
        ),
        ("[text]\nlr = nan", (3, "text.lr", "should be a finite number, got nan")),
        ("[text]\nweight = inf", (3, "text.weight", "should be a finite number, got inf")),
        ('[image]\nsize = [1, "2"]', (3, "image.size.1", "should be a valid integer")),
        ("[image]\nsize = 36", (3, "image.size", "should be a valid array, got 36")),
        ("[image]\nsize = [36]", (3, "image.size.1", "required")),
        ("[group]\nfan_out = [0, 1]", (3, "group.fan_out.0", "should be greater than or equal")),
        ('[updates]\ndata = "other"', (3, "updates.data", "should be 'disjoint' or 'repeat'")),
        ("image = 3", (2, "image", "should be a table, got 3")),
        ("rewards = []", (2, "rewards", "Array should have at least 1 item")),
        ("rewards = 3", (2, "rewards", "should be an array of tables, got 3")),
        ('rewards = [\n"x"]', (3, "rewards.0", "should be a table such as { use")),
        ('[compute]\ndevice = "gpu"', (3, "compute.device", "should be auto, cpu, cuda or cuda:N")),
        ("[text]\ngroup_by = 'siblings'", (3, "text.group_by", "should be 'prompt', got")),
        (
            "[[text.regularizers]]\nuse = 'text_kl'\nweight = 1\non = 'conditional'",
            (5, "text.regularizers.0.on", "unknown key"),
        ),
        (
            "[image]\nregularizers = [{ use = 'mse' }]",
            (3, "image.regularizers.0.weight", "required: its factor in the total loss"),
        ),
        (
            "[image]\nobjective = { clip_range = 1.0 }",
            (3, "image.objective", "say clip_range or clip_radius, not both"),
        ),
        (
            '[image.window]\nrange = [0,\n"5"]',
            (4, "image.window.range.1", 'should be a valid integer, got "5"; write it'),
        ),
        ("[image.window]\nsize = 0", (3, "image.window.size", "should be greater than or equal")),
        (
            "rewards = [{ weight = 1.0 }]",
            (2, "rewards.0.use", "should name a reward; there are: exact, other"),
        ),
        ("policy = { use = 3 }", (2, "policy.use", "should name a policy, got 3; there are")),
    ],
)
def test_a_mistake_is_told_at_its_line(mistakes, text, expected):
    [(line, path, message)], code = mistakes(text)
    assert (line, path) == expected[:2]
    assert message.startswith(expected[2])
    assert code == 2


def test_required_tables(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "a.toml", fake_catalog())
    assert [p.path for p in caught.value.problems] == ["policy", "source", "rewards"]


def test_a_key_of_the_slots_of_a_plugin_that_is_missing_hides_nothing(mistakes):
    told, code = mistakes("[image]\nscheduler = { use = 'sdee', steps = 0, whatever = 1 }")
    assert told == [
        (3, "image.scheduler.use", "no scheduler called 'sdee'; did you mean 'sde'?"),
        (
            3,
            "image.scheduler.steps",
            "should be greater than or equal to 1, got 0 (denoising steps)",
        ),
    ]
    assert code == 2


def test_all_problems_at_once_each_on_its_line(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load("stepz = 4\nseed = -1\n[policy]\nuse = 'unifed'\n", "text.lr=x")
    assert str(caught.value).split("\n") == [
        "child.toml:2: stepz: unknown key; did you mean 'steps'?",
        "child.toml:3: seed: should be greater than or equal to 0, got -1 (seed of every draw)",
        "child.toml:5: policy.use: no policy called 'unifed'; did you mean 'unified'?",
        '--set: text.lr: should be a valid number, got "x" (learning rate of the text expert)',
    ]


def test_a_mistake_is_told_in_the_file_that_makes_it(tmp_path):
    (tmp_path / "base.toml").write_text(RECIPE.replace("size = 3", "size = 0"))
    (tmp_path / "a.toml").write_text('extends = ["base.toml"]\n[image.window]\nrange = [0, 4]')
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "a.toml", fake_catalog())
    [problem] = caught.value.problems
    assert (problem.file.name, problem.line) == ("base.toml", 19)


def test_an_index_into_an_array_that_no_file_states(mistakes):
    [(_, path, message)], _ = mistakes("", "group.fan_out.0=6")
    assert path == "group.fan_out"
    assert "state none whose elements could be set" in message


# --- plugins at fault -------------------------------------------------------------------------


def test_only_plugins_at_fault_is_exit_code_3(mistakes):
    told, code = mistakes("rewards = [{ use = 'exakt' }]")
    assert told == [(2, "rewards.0.use", "no reward called 'exakt'; did you mean 'exact'?")]
    assert code == PluginError.exit_code == 3


def test_an_ambiguous_name_is_told_and_an_exact_one_is_not(tmp_path):
    one = fake_catalog()
    import dataclasses

    twin = dataclasses.replace(one.find("reward", "exact"), distribution="twins")
    catalog = Catalog((*one.components, twin))
    (tmp_path / "a.toml").write_text(RECIPE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "a.toml", catalog)
    assert '"fakes:exact" or "twins:exact"' in str(caught.value)
    assert caught.value.exit_code == 3
    resolved = load_recipe(tmp_path / "a.toml", catalog, ["rewards.0.use=twins:exact"])
    assert resolved.recipe.rewards[0].component is twin
    assert resolved.values["rewards"][0]["use"] == "twins:exact"


def test_broken_plugins_are_named_with_a_missing_one(tmp_path):
    (tmp_path / "a.toml").write_text(RECIPE.replace('"group"', '"grooup"'))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "a.toml", fake_catalog("no_such_module"))
    assert "broken: plugin 'no_such_module' of fakes 1.2: ModuleNotFoundError" in str(caught.value)


# --- where recipes are found ------------------------------------------------------------------


@pytest.fixture
def shipped_folder(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    (folder / "_base").mkdir(parents=True)
    (folder / "sub").mkdir()
    for name in ("no_cfg_mse", "with.dots", "sub/other", "_base/board"):
        (folder / f"{name}.toml").write_text(f'title = "about {name}"')
    (folder / "bad.toml").write_text("x = ")
    monkeypatch.setattr(shipped, "shipped_recipes", lambda: folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


@pytest.mark.parametrize("word", ["no_cfg_mse", "sub/other", "_base/board", "with.dots"])
def test_shipped_recipes_by_name(shipped_folder, word):
    file = shipped_folder / f"{word}.toml"
    for spelled in (word, f"{word}.toml", f"recipes/{word}", f"recipes/{word}.toml"):
        assert find_recipe(spelled) == file


def test_an_existing_file_comes_first(shipped_folder, tmp_path):
    own = tmp_path / "elsewhere" / "no_cfg_mse"
    own.write_text("seed = 1")
    assert find_recipe("no_cfg_mse").read_text() == "seed = 1"


def test_an_unknown_recipe(shipped_folder):
    with pytest.raises(RecipeError, match="did you mean 'no_cfg_mse'") as caught:
        find_recipe("recipes/no_cfg_msee.toml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("word", ["recipes", "recipes/", "nothing/like/it", "_base"])
def test_a_word_that_names_no_file(shipped_folder, word):
    with pytest.raises(RecipeError, match="no such file, and no shipped recipe"):
        find_recipe(word)


def test_the_listing(shipped_folder):
    titles = shipped_titles()
    assert list(titles) == ["bad", "no_cfg_mse", "sub/other", "with.dots"]
    assert titles["sub/other"] == "about sub/other"
    assert titles["bad"].startswith("broken: ")
