"""Mistakes in recipes and in what they name, as ``unigrpo check`` tells a newcomer: one case each,
with the plugins and the recipes that come with the package."""

import json
import shutil

import pytest

from unigrpo_core import cli
from unigrpo_core.recipe import shipped_recipes

PARENT = 'extends = ["no_cfg_mse.toml"]\n'  # so the first line of a case is line 2


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with the shipped recipes in it."""
    shutil.copytree(shipped_recipes(), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unigrpo(capsys):
    def run(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "a bug" not in out + err
        return code, out, err

    return run


def case(name, text, *lines, code=2):
    """A recipe and all that is printed of it, up to the last word given of each line."""
    return pytest.param(text, lines, code, id=name)


def tells(unigrpo, lines, code, *argv):
    """Whether ``check`` prints so many lines, which begin so."""
    got, out, err = unigrpo("check", "mine.toml", *argv)
    said = out.splitlines()
    assert (got, err, len(said)) == (code, "", len(lines)), out
    for line, beginning in zip(said, lines, strict=True):
        assert line.startswith(beginning), line


# --- keys and values --------------------------------------------------------------------------

KEYS = [
    case("unknown", "stepz = 3", "mine.toml:2: stepz: unknown key; did you mean 'steps'?"),
    case("unknown-case", "STEPS = 3", "mine.toml:2: STEPS: unknown key; did you mean 'steps'?"),
    case(
        "unknown-far",
        "[image]\nbrightness = 3",
        "mine.toml:3: image.brightness: unknown key; there are: weight, lr, size, noise_scope,",
    ),
    case(
        "of-another-table",
        "lr = 1e-3",
        "mine.toml:2: lr: unknown key here; did you mean 'text.lr' or 'image.lr'?",
    ),
    case(
        "of-the-top",
        "[text]\nprompts = 4",
        "mine.toml:3: text.prompts: unknown key here; did you mean 'prompts' at the top, before "
        "the first [table] or 'evaluation.prompts'?",
    ),
    case(
        "extends-in-a-table",
        '[text]\nextends = ["fast.toml"]',
        "mine.toml:3: text.extends: unknown key here; did you mean 'extends' at the top, before",
    ),
    case(
        "text-for-int",
        'steps = "3"',
        'mine.toml:2: steps: should be a valid integer, got "3"; write it without the quotes',
    ),
    case(
        "word-for-int",
        'steps = "three"',
        'mine.toml:2: steps: should be a valid integer, got "three" (training steps;',
    ),
    case("float-for-int", "steps = 3.0", "mine.toml:2: steps: should be a valid integer, got 3.0"),
    case("bool-for-int", "steps = true", "mine.toml:2: steps: should be a valid integer, got true"),
    case(
        "text-for-float",
        '[text]\nlr = "1e-3"',
        'mine.toml:3: text.lr: should be a valid number, got "1e-3"; write it without the quotes',
    ),
    case(
        "text-for-bool",
        '[image]\ncontext_gradient = "false"',
        'mine.toml:3: image.context_gradient: should be a valid boolean, got "false"; write it',
    ),
    case(
        "yes-as-text",
        '[image]\ncontext_gradient = "yes"',
        'mine.toml:3: image.context_gradient: should be a valid boolean, got "yes" (whether',
    ),
    case(
        "number-for-bool",
        "[image]\ncontext_gradient = 1",
        "mine.toml:3: image.context_gradient: should be a valid boolean, got 1",
    ),
    case(
        "number-for-text",
        "title = 3",
        "mine.toml:2: title: should be a valid string, got 3",
    ),
    case(
        "number-for-table",
        "image = 3",
        "mine.toml:2: image: should be a table, got 3",
    ),
    case(
        "text-for-component",
        '[image]\nguidance = "none"',
        'mine.toml:3: image.guidance: should be a table such as { use = "..." }, got "none"',
    ),
    case(
        "one-for-many",
        'rewards = { use = "brightness" }',
        "mine.toml:2: rewards: should be an array of tables, got { use",
    ),
    case(
        "too-many",
        "[image]\nsize = [24, 24, 3]",
        "mine.toml:3: image.size: Array should have at most 2 items, not 3, got [24, 24, 3]",
    ),
    case("below", "seed = -1", "mine.toml:2: seed: should be greater than or equal to 0, got -1"),
    case("at-the-bound", "[text]\nlr = 0", "mine.toml:3: text.lr: should be greater than 0, got 0"),
    case(
        "above",
        "[optimizer]\nbetas = [0.9, 1.0]",
        "mine.toml:3: optimizer.betas.1: should be less than 1, got 1.0",
    ),
    case(
        "not-finite", "[text]\nlr = inf", "mine.toml:3: text.lr: should be a finite number, got inf"
    ),
    case(
        "no-such-choice",
        '[updates]\ndata = "all"',
        "mine.toml:3: updates.data: should be 'disjoint' or 'repeat', got \"all\"",
    ),
    case("date", "seed = 2024-01-01", "mine.toml:2: seed: a date means nothing here; quote it"),
]


@pytest.mark.parametrize(("text", "lines", "code"), KEYS)
def test_keys_and_values(unigrpo, folder, text, lines, code):
    (folder / "mine.toml").write_text(PARENT + text)
    tells(unigrpo, lines, code)


# --- components -------------------------------------------------------------------------------

COMPONENTS = [
    case(
        "unknown-plugin",
        '[image]\nscheduler = { use = "flow_sed", steps = 8 }',
        "mine.toml:3: image.scheduler.use: no scheduler called 'flow_sed'; did you mean 'flow_sde'",
        code=3,
    ),
    case(
        "unknown-distribution",
        '[image]\nguidance = { use = "nowhere:cfg" }',
        "mine.toml:3: image.guidance.use: no guidance called 'nowhere:cfg'; did you mean 'cfg'?",
        code=3,
    ),
    case(
        "of-another-kind",
        '[image]\nguidance = { use = "flow_sde" }',
        "mine.toml:3: image.guidance.use: no guidance called 'flow_sde'; there are: cfg, none",
        code=3,
    ),
    case(
        "without-use",
        "rewards = [{ weight = 1.0 }]",
        "mine.toml:2: rewards.0.use: should name a reward; there are: board_scorer, board_verifier",
    ),
    case(
        "unknown-option",
        '[image]\nguidance = { use = "cfg", scael = 3 }',
        "mine.toml:3: image.guidance.scael: unknown key; did you mean 'scale'?",
    ),
    case(
        "option-out-of-range",
        '[image]\nguidance = { use = "cfg", scale = -3 }',
        "mine.toml:3: image.guidance.scale: should be greater than or equal to 0, got -3",
    ),
    case(
        "option-of-what-was-replaced",
        '[image]\nwindow = { use = "fixed", steps = [0], range = [0, 5] }',
        "mine.toml:3: image.window.range: unknown key: an option of 'random' and 'scattered', "
        "not of 'fixed'; there are: use, steps",
    ),
    case(
        "needed-again-after-another-use",
        '[image]\nscheduler = { use = "ode" }',
        "mine.toml:3: image.scheduler.steps: required: denoising steps; the 8 of "
        'no_cfg_mse.toml:37 was for { use = "flow_sde" }, and a table that states another use',
    ),
    case(
        "options-that-exclude-each-other",
        "[image.objective]\nclip_range = 0.1",
        "mine.toml:2: image.objective: clip_range and clip_radius are two ways to say one bound",
    ),
    case(
        "recipe-and-plugin-at-fault",
        'seed = -1\nadvantage = { use = "grp" }',
        "mine.toml:2: seed: should be greater than or equal to 0",
        "mine.toml:3: advantage.use: no advantage called 'grp'; ",
    ),
]


@pytest.mark.parametrize(("text", "lines", "code"), COMPONENTS)
def test_components(unigrpo, folder, text, lines, code):
    (folder / "mine.toml").write_text(PARENT + text)
    tells(unigrpo, lines, code)


def test_a_grandchild_is_told_what_its_grandparent_replaced(unigrpo, folder):
    (folder / "middle.toml").write_text(
        PARENT + '[image.window]\nuse = "fixed"\n[image.scheduler]\nuse = "ode"'
    )
    (folder / "mine.toml").write_text(
        'extends = ["middle.toml"]\n[image.window]\nrange = [0, 5]\n[image.scheduler]\nshift = 2'
    )
    tells(
        unigrpo,
        (
            "mine.toml:2: image.window.steps: required: numbers of the stochastic steps, rising",
            "mine.toml:3: image.window.range: unknown key: an option of 'random' and 'scattered', "
            "not of 'fixed'",
            "mine.toml:4: image.scheduler.steps: required: denoising steps; the 8 of no_cfg_mse.to",
        ),
        2,
    )


# --- rules that cross keys --------------------------------------------------------------------

RULES = [
    case(
        "batch-by-prompts",
        "prompts = 13",
        "mine.toml:2: prompts: prompts = 13 cannot be split into updates.count = 2 equal parts; "
        "nearest are prompts = 12 or 14, or updates.count = 1 (or updates.data",
    ),
    case(
        "batch-by-updates",
        "[updates]\ncount = 5",
        "mine.toml:3: updates.count: prompts = 12 cannot be split into updates.count = 5 equal "
        "parts; nearest are prompts = 10 or 15, or updates.count = 4",
    ),
    case(
        "batch-beyond-measure",
        "prompts = 999999999999999999999",
        "mine.toml:2: prompts: prompts = 999999999999999999999 cannot be split into updates.count "
        "= 2 equal parts; nearest are prompts = 999999999999999999998 or 1000000000000000000000, "
        "or updates.count = 1",
    ),
    case(
        "group-of-one",
        "group = { fan_out = [1, 1] }",
        "mine.toml:2: group.fan_out: makes text groups of 1, whose advantages are all 0; 2 are",
        "mine.toml:2: group.fan_out: makes image groups of 1, whose advantages are all 0; 2 are",
    ),
    case(
        "window-beyond-the-steps",
        "[image.scheduler]\nsteps = 4",
        "no_cfg_mse.toml:38: image.window: the window's range [0, 5) does not fit: a rollout has 4",
    ),
    case(
        "nothing-trained",
        "train = []",
        "mine.toml:2: train: names no expert, so the 48 steps would train nothing (steps = 0?)",
    ),
    case(
        "start-without-weights",
        'start = "runs/gone"',
        "mine.toml:2: start: should be the folder of a finished run, but ",
    ),
]


@pytest.mark.parametrize(("text", "lines", "code"), RULES)
def test_rules_that_cross_keys(unigrpo, folder, text, lines, code):
    (folder / "mine.toml").write_text(PARENT + text)
    tells(unigrpo, lines, code)


def test_an_override_is_told_rather_than_the_file(unigrpo, folder):
    (folder / "mine.toml").write_text(PARENT + "updates = { count = 3 }")
    told = "--set: prompts: prompts = 7 cannot be split into updates.count = 3 equal parts; nearest"
    tells(unigrpo, [told], 2, "--set", "prompts=7")


# --- text that is no TOML ---------------------------------------------------------------------

BOOLEANS, QUOTES = "the booleans are true and false", "text stands in quotes"
PAIR, TABLE = "write key = value", "a table begins with [name] on a line of its own"
SYNTAX = {  # text: line, what is wrong, the line as shown, what to do
    "a = yes": (2, "Invalid value", "a = yes", BOOLEANS),
    "a = True": (2, "Invalid value", "a = True", BOOLEANS),
    "a = None": (2, "Invalid value", "a = None", "for no value, leave the key out"),
    "a = hello world": (2, "Invalid value", "a = hello world", QUOTES),
    "a = runs/x-1": (2, "Invalid value", "a = runs/x-1", QUOTES),
    "a = \u201cx\u201d": (2, "Invalid value", "a = \u201cx\u201d", "the quotes should be straight"),
    "a =": (2, "Invalid value", "a =", "the value is missing"),
    "a = # 3\nb = 1": (2, "Invalid value", "a = # 3", "the value is missing"),
    "a == 3": (2, "Invalid value", "a == 3", PAIR),
    "a = .5": (2, "Invalid value", "a = .5", "write a digit before the point"),
    "a = 5.": (2, "Expected newline", "a = 5.", "write a digit after the point"),
    "a = 007": (2, "Expected newline", "a = 007", "a number begins with no 0"),
    "a = 3\nb = 10 %": (3, "Expected newline", "b = 10 %", "a line states one key = value"),
    "a: 3": (2, "Expected '=' after a key", "a: 3", PAIR),
    "= 3": (2, "Invalid statement", "= 3", PAIR),
    "[text\na = 1": (2, "Expected ']'", "[text", TABLE),
    "text]\na = 1": (2, "Expected '=' after a key", "text]", TABLE),
    "[text]]": (2, "Expected newline", "[text]]", TABLE),
    'a = "x\nb = 1': (2, "Illegal character", 'a = "x', "the quote is not closed on its line"),
    "a = '''x\nb = 1": (3, "Expected \"'''\"", "", "an open [, { or quote is not closed"),
    "a = [1,\n\n": (2, "Invalid value", "", "an open [, { or quote is not closed"),
    "a = [1 2]": (2, "Unclosed array", "a = [1 2]", "a comma or a ] is missing before this"),
    "a = { x = 1,\n}": (2, "Invalid initial", "a = { x = 1,", "{ ... } stands on one line"),
    "a = { x = 1\n}": (2, "Unclosed inline table", "a = { x = 1", "{ ... } stands on one line"),
    "a = { x = 1, }": (2, "Invalid initial", "a = { x = 1, }", "{ ... } has no comma before its"),
    'a = "C:\\Users"': (2, "Invalid hex", 'a = "C:\\Users"', "write \\ in paths as / or the text"),
    "a = 1\na = 2": (3, "Cannot overwrite", "a = 2", "it is stated above already"),
    "[a]\n[b]\n[a]": (4, "Cannot declare", "[a]", "the table is opened above already"),
    "a = [{}]\n[[a]]": (3, "Cannot mutate", "[[a]]", "it is stated above already"),
}


@pytest.mark.parametrize(("text", "told"), SYNTAX.items(), ids=map(repr, SYNTAX))
def test_text_that_is_no_toml(unigrpo, folder, text, told):
    line, wrong, shown, hint = told
    (folder / "mine.toml").write_text(PARENT + text)
    tells(unigrpo, [f"mine.toml:{line}: not valid TOML: {wrong}"], 2)
    assert f"{shown and f' in `{shown}`'}; {hint}" in unigrpo("check", "mine.toml")[1]


@pytest.mark.parametrize(
    "text", ["a = [1 2]\n" + "# x\n" * 9, "a = " + "x" * 500], ids=["long-file", "long-line"]
)
def test_what_is_shown_of_a_bad_line_is_short(unigrpo, folder, text):
    (folder / "mine.toml").write_text(PARENT + text)
    _, out, _ = unigrpo("check", "mine.toml")
    assert len(out.splitlines()) == 1
    assert len(out) < 160


# --- files ------------------------------------------------------------------------------------

NOTHING = 'the file states nothing; begin with extends = ["..."], or see `unigrpo show`'
FILES = [
    case("empty", b"", f"mine.toml: {NOTHING}"),
    case("only-comments", b"# steps = 3\n", f"mine.toml: {NOTHING}"),
    case("latin", PARENT.encode() + b"title = 'caf\xe9'", "mine.toml:2: not UTF-8 text; save the"),
    case("utf-16", "seed = 1".encode("utf-16"), "mine.toml:1: not UTF-8 text; save the file as"),
    case("binary", bytes(range(256)), "mine.toml:"),
    case(
        "stands-on-nothing",
        b"seed = 1",
        "mine.toml: policy: required: the model",
        "mine.toml: source: required: where prompts come from",
        "mine.toml: rewards: required: what episodes are scored by",
    ),
    case(
        "extends-nowhere",
        b'extends = ["gone.toml"]',
        "mine.toml:1: extends.0: gone.toml: no such file; a path counts from the file that states",
    ),
    case(
        "extends-a-folder",
        b'extends = ["_base"]',
        "mine.toml:1: extends.0: _base: is a folder, not a recipe file; did you mean _base/board",
    ),
    case(
        "extends-a-text",
        b'extends = "fast.toml"',
        'mine.toml:1: extends: expected an array of file names such as ["_base/board.toml"]',
    ),
    case(
        "extends-itself",
        b'extends = ["mine.toml"]',
        "mine.toml:1: extends.0: the recipes extend each other in a circle: mine.toml -> mine.toml",
    ),
    case(
        "extend",
        b'extend = ["fast.toml"]',
        "mine.toml: policy: required: the model",
        "mine.toml: source: required: where prompts come from",
        "mine.toml: rewards: required: what episodes are scored by",
        "mine.toml:1: extend: unknown key; did you mean 'extends'?",
    ),
]


@pytest.mark.parametrize(("text", "lines", "code"), FILES)
def test_files(unigrpo, folder, text, lines, code):
    (folder / "mine.toml").write_bytes(text)
    tells(unigrpo, lines, code)


def test_a_circle_is_shown_whole(unigrpo, folder):
    (folder / "sub").mkdir()
    (folder / "mine.toml").write_text('extends = ["sub/a.toml"]')
    (folder / "sub/a.toml").write_text('seed = 1\nextends = ["../b.toml"]')
    (folder / "b.toml").write_text('extends = ["sub/a.toml"]')
    code, out, _ = unigrpo("check", "mine.toml")
    assert code == 2
    assert out == (
        "b.toml:1: extends.0: the recipes extend each other in a circle: "
        "sub/a.toml -> b.toml -> sub/a.toml\n"
    )


def test_a_shipped_recipe_is_extended_from_anywhere_by_its_own_path(unigrpo, folder):
    (folder / "sub").mkdir()
    (folder / "sub/mine.toml").write_text(PARENT)
    code, out, _ = unigrpo("check", "sub/mine.toml")
    assert (code, out) == (0, "ok mine  (UniGRPO: joint, no guidance in training, velocity MSE)\n")
    (folder / "sub/mine.toml").write_text(PARENT.replace("no_cfg_mse", "recipes/no_cfg_mse"))
    code, out, _ = unigrpo("check", "sub/mine.toml")
    assert code == 2
    assert f"; the shipped one is {shipped_recipes() / 'no_cfg_mse.toml'}\n" in out


@pytest.mark.parametrize(
    ("word", "told"),
    [
        pytest.param("no_cfg_msee", "did you mean 'no_cfg_mse'?", id="misspelled"),
        pytest.param("zzz.toml", "no such file, and no shipped recipe; there are: ", id="gone"),
        pytest.param("_base", "_base: is a folder, not a recipe file; did you", id="folder"),
        pytest.param("runs/one", "did you mean runs/one/recipe.toml?", id="run-folder"),
        pytest.param("runs", "runs: is a folder, not a recipe file\n", id="folder-of-none"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "show", "run"])
def test_words_that_name_no_recipe(unigrpo, folder, verb, word, told):
    (folder / "runs/one").mkdir(parents=True)
    (folder / "runs/one/recipe.toml").write_text("")
    code, out, err = unigrpo(verb, word)
    assert code == 2
    assert told in (out if verb == "check" else err)


def test_a_recipe_that_may_not_be_read(unigrpo, folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (folder / "mine.toml").write_text(PARENT)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    tells(unigrpo, ["mine.toml: cannot be read: Permission denied"], 2)


# --- all at once ------------------------------------------------------------------------------


def test_all_mistakes_of_all_files_at_once(unigrpo, folder):
    (folder / "middle.toml").write_text(PARENT + "[text]\nlr = -1\n")
    (folder / "mine.toml").write_text(
        'extends = ["middle.toml"]\nsteps = "3"\n[image]\nszie = 3\nguidance = { use = "gcf" }\n'
    )
    tells(
        unigrpo,
        (
            "middle.toml:3: text.lr: should be greater than 0, got -1",
            'mine.toml:2: steps: should be a valid integer, got "3"',
            "mine.toml:4: image.szie: unknown key; did you mean 'size'?",
            "mine.toml:5: image.guidance.use: no guidance called 'gcf'; did you mean 'cfg'?",
            '--set: seed: should be a valid integer, got "x"',
        ),
        2,
        *("--set", "seed=x"),
    )


def test_run_and_show_say_what_check_says(unigrpo, folder):
    (folder / "mine.toml").write_text(PARENT + "stepz = 3\nseed = -1\nprompts = 'x'")
    code, said, _ = unigrpo("check", "mine.toml")
    for verb in ("run", "show"):
        assert unigrpo(verb, "mine.toml") == (code, "", said)
    assert not (folder / "runs").exists()


# --- prompt files and weights: notes ----------------------------------------------------------


def of_file(folder, name, text):
    (folder / name).write_text(text)
    return f'{PARENT}source = {{ use = "file", path = "{name}" }}'


PROMPTS = [
    ("gone", "gone.txt", None, "the prompts are not there yet: "),
    ("empty", "p.txt", "\n \n", "p.txt: no prompt in it; one stands on each line"),
    ("extension", "p.csv", "red circle\n", "p.csv: a prompt file ends in .txt or .jsonl"),
    ("no-json", "p.jsonl", '{"prompt": "a"}\n\n{prompt: b}\n', "p.jsonl:3: not JSON: Expecting"),
    ("no-object", "p.jsonl", '"red circle"\n', 'p.jsonl:1: expected an object like {"prompt": '),
    ("no-prompt", "p.jsonl", '{"text": "a"}\n', 'p.jsonl:1: "prompt" must be a text that is not'),
    ("all-held-out", "p.txt", "red\n", "p.txt: all its texts were held out, none is left to train"),
]


@pytest.mark.parametrize(
    ("name", "text", "told"), [row[1:] for row in PROMPTS], ids=[row[0] for row in PROMPTS]
)
def test_a_prompt_file_is_a_note_of_check(unigrpo, folder, name, text, told):
    recipe = of_file(folder, name, text or "")
    if text is None:
        (folder / name).unlink()
    (folder / "mine.toml").write_text(recipe)
    code, out, err = unigrpo("check", "mine.toml")
    first, note = out.splitlines()
    assert (code, err) == (0, "")
    assert first.startswith("ok mine")
    assert note.startswith("  note: source file: ")
    assert told in note


def test_weights_that_are_not_there_are_a_note_of_check(unigrpo, folder):
    (folder / "mine.toml").write_text(PARENT + '[policy]\ncheckpoint = "weights"')
    there = str(folder / "weights")
    told = f"  note: policy bagel: checkpoint '{there}': there is no folder {there}"
    tells(unigrpo, ("ok mine", told), 0)
    (folder / "weights").mkdir()
    told = (
        f"  note: policy bagel: {there} is no BAGEL checkpoint: it has no llm_config.json; a BAGEL"
    )
    tells(unigrpo, ("ok mine", told), 0)


# --- JSON -------------------------------------------------------------------------------------


def test_check_as_json_has_one_shape(unigrpo, folder):
    (folder / "mine.toml").write_text(PARENT + "stepz = 3\n")
    (folder / "empty.toml").write_text("")
    argv = ("no_cfg_mse.toml", "mine.toml", "empty.toml", "gone", "--set", "policy.checkpoint=x")
    code, out, err = unigrpo("check", *argv, "--json")
    assert (code, err) == (unigrpo("check", *argv)[0], "")
    good, bad, empty, gone = found = json.loads(out)
    assert len({tuple(report) for report in found}) == 1
    assert [report["ok"] for report in found] == [True, False, False, False]
    assert [report["recipe"] for report in found] == list(argv[:4])
    assert good["file"] == str(folder / "no_cfg_mse.toml")
    assert (good["name"], len(good["hash"]), good["problems"]) == ("no_cfg_mse", 64, [])
    assert good["notes"] == [
        f"policy bagel: checkpoint '{folder}/x': there is no folder {folder}/x; give a folder, or "
        "OWNER/NAME of a model on the Hugging Face hub"
    ]
    assert (bad["name"], bad["title"], bad["hash"], bad["notes"]) == (None, None, None, [])
    assert bad["problems"] == [
        {
            "file": str(folder / "mine.toml"),
            "line": 2,
            "path": "stepz",
            "message": "unknown key; did you mean 'steps'?",
        }
    ]
    assert empty["problems"][0] | {"message": ""} == {
        "file": str(folder / "empty.toml"),
        "line": None,
        "path": "",
        "message": "",
    }
    assert (gone["file"], len(gone["problems"])) == (None, 1)


def test_check_as_json_of_an_override(unigrpo):
    code, out, _ = unigrpo("check", "fast", "--set", "seed=x", "--json")
    [problem] = json.loads(out)[0]["problems"]
    assert (code, problem["file"], problem["line"], problem["path"]) == (2, None, None, "seed")


@pytest.mark.parametrize("argv", [("gone",), ("fast", "--set", "seed=x"), ("fast", "gone")])
def test_show_as_json_of_a_mistake_prints_none(unigrpo, argv):
    code, out, err = unigrpo("show", *argv, "--json")
    assert (code, out) == (2, "")
    assert err
