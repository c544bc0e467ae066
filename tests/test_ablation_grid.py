"""The grid of `unigrpo ablate`: axes, names, seeds, stages and all that is refused before a run;
what stands in a folder already. No run is made."""

import argparse
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import tiny

from unigrpo_core import cli
from unigrpo_core.ablation.axes import parse_axis, tails
from unigrpo_core.ablation.grid import grid, parse_seeds
from unigrpo_core.ablation.jobs import Job
from unigrpo_core.ablation.places import clear, locked, state
from unigrpo_core.errors import PluginError, UsageError, UserError
from unigrpo_core.recipe import load_recipe, parse_value


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint):
    """The working directory, with the recipes tiny and, after it, second."""
    monkeypatch.chdir(tmp_path)
    tiny.recipe_file(tmp_path, checkpoint)
    write("second", "after = 'tiny.toml'\ntrain = ['image']")
    return tmp_path


def write(name, text, base="tiny.toml"):
    Path(f"{name}.toml").write_text(f"extends = ['{base}']\n{text}")


def cells(recipes="tiny.toml", axes=(), overrides=()):
    return grid(recipes.split(), axes, overrides, lambda file: tiny.catalog())


def refused(*arguments, **options):
    with pytest.raises(UsageError) as caught:
        cells(*arguments, **options)
    return str(caught.value)


# --- values and axes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (".005", 0.005),
        ("-.5e-3", -0.0005),
        ("[.1, -.2,.3]", [0.1, -0.2, 0.3]),
        ('{use="a.5, .5", weight=.5}', {"use": "a.5, .5", "weight": 0.5}),
        ("1.5", 1.5),
        ("v1.5", "v1.5"),
        ("../.5x", "../.5x"),
        (".hidden", ".hidden"),
        ("'.5'", ".5"),
    ],
)
def test_a_number_may_begin_with_its_point(text, value):
    found = parse_value(text)
    assert (found, type(found)) == (value, type(value))


def test_set_takes_it(folder):
    resolved = load_recipe("tiny.toml", tiny.catalog(), ["image.weight=.005"])
    assert resolved.recipe.image.weight == 0.005


@pytest.mark.parametrize(
    ("word", "texts", "names"),
    [
        ("a.b=0,.005,.01", ("0", ".005", ".01"), ("0", "0.005", "0.01")),
        ("a=[4,1], [12, 1]", ("[4,1]", "[12, 1]"), ("4-1", "12-1")),
        ("a=true,false", ("true", "false"), ("true", "false")),
        (
            'a=[],[{use="x,y",weight=.01}]',
            ("[]", '[{use="x,y",weight=.01}]'),
            ("empty", "use=x-y-weight=0.01"),
        ),
        ("a = cfg,none", ("cfg", "none"), ("cfg", "none")),
        ("a=1.0,1e-2", ("1.0", "1e-2"), ("1", "0.01")),
        ("a=-1,1", ("-1", "1"), ("-1", "1")),
        ("a=../x/y", ("../x/y",), ("..-x-y",)),
    ],
)
def test_an_axis(word, texts, names):
    axis = parse_axis(word)
    assert (axis.texts, axis.names) == (texts, names)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("image.weight", "expected KEY=V,V,..."),
        ("=1,2", "expected KEY=V,V,..."),
        ("a b=1", "expected KEY=V,V,..."),
        ("a=", "a value is empty"),
        ("a=1,,2", "a value is empty"),
        ("a=.01,0.010", ".01 and 0.010 are the same value"),
        ("a=1,1.0", "1 and 1.0 are the same value"),
        ("a=[1,2", "'[1,2' is neither a TOML value nor a plain word"),
    ],
)
def test_no_axis(word, told):
    with pytest.raises(ValueError, match="--axis") as caught:
        parse_axis(word)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "short"),
    [
        (["image.regularizers.0.weight"], ["weight"]),
        (["image.lr", "text.lr", "steps"], ["image.lr", "text.lr", "steps"]),
        (["a.regularizers.0.weight", "a.regularizers.1.weight"], ["0.weight", "1.weight"]),
        (["group.fan_out.0", "seeds"], ["fan_out.0", "seeds"]),
        (["steps", "image.scheduler.steps"], ["steps", "scheduler.steps"]),
    ],
)
def test_tails(keys, short):
    if short[0].startswith("0."):
        short = [f"regularizers.{tail}" for tail in short]
    assert list(tails(keys)) == short
    assert list(tails(keys[::-1])) == short[::-1]


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "1.5", "1,2,1", "1,01", "0,²"])
def test_no_seeds(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


def test_seeds():
    assert parse_seeds("2, 0,10") == (2, 0, 10)


# --- cells ------------------------------------------------------------------------------------


def test_cells_are_recipes_by_values(folder):
    found = cells("tiny.toml second.toml", ["image.weight=.5,1", "group.fan_out=[3,1],[3,2]"])
    assert [cell.name for cell in found] == [
        f"{stem},weight={weight},fan_out={fan_out}"
        for stem in ("tiny", "second")
        for weight in ("0.5", "1")
        for fan_out in ("3-1", "3-2")
    ]
    assert [cell.values["image"]["weight"] for cell in found] == [0.5, 0.5, 1.0, 1.0] * 2
    assert [cell.values["group"]["fan_out"] for cell in found] == [[3, 1], [3, 2]] * 4
    assert [cell.first for cell in found] == [None] * 4 + list(found[:4])


def test_what_a_run_is_given_makes_its_values(folder):
    [first, cell] = cells("tiny.toml second.toml", ["image.weight=.5"], ["image.lr=.5"])
    job = Job(cell, 3, Path("out"))
    assert (job.folder, job.log) == (
        Path("out/second,weight=0.5/seed-3"),
        Path("out/second,weight=0.5/seed-3.log"),
    )
    verb, recipe, flag, out, *sets = job.words()
    assert (verb, flag, out) == ("run", "--out", str(job.folder))
    before = Job(first, 3, Path("out")).folder.absolute()
    (before / "final").mkdir(parents=True)
    resolved = load_recipe(recipe, tiny.catalog(), sets[1::2])
    assert resolved.values == {**job.values, "start": str(before)}
    assert (job.values["image"]["lr"], job.values["seed"]) == (0.5, 3)


def test_a_start_that_is_stated_needs_no_first_stage(folder):
    (folder / "run" / "final").mkdir(parents=True)
    [cell] = cells("second.toml", overrides=["start=run"])
    assert cell.first is None


def test_long_names_are_cut(folder):
    values = ",".join(f"{'x' * 300}{i}" for i in range(2))
    names = [cell.name for cell in cells(axes=[f"policy.checkpoint={values}"])]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 200


# --- refused ----------------------------------------------------------------------------------


def test_every_problem_is_told_at_once(folder):
    write("other", "prompts = 0")
    told = refused(
        "tiny.toml other.toml",
        ["image.lerning_rate=1,2", "image.regularizers.0.weight=1,2"],
        ["text.lr=fast"],
    ).splitlines()
    for recipe in ("tiny.toml", "other.toml"):
        mine = [line for line in told if line.startswith(f"{recipe}: --")]
        assert f"{recipe}: --axis image.lerning_rate: unknown key; " in "\n".join(mine)
        assert f"{recipe}: --axis image.regularizers: should be an array" in "\n".join(mine)
        assert f"{recipe}: --set text.lr: should be a valid number" in "\n".join(mine)
    assert any(line.startswith("other.toml:2: prompts: should be greater") for line in told)
    assert len(told) == len(set(told))


def test_an_element_that_is_not_there(folder):
    write("bare", "[image]\nregularizers = []")
    told = refused("bare.toml", ["image.regularizers.0.weight=1,2"])
    assert told.startswith("bare.toml: --axis image.regularizers: '0' is no element: the array has")
    assert "did you mean 'weight'?" in refused(axes=["image.weigth=1,2"])


@pytest.mark.parametrize(
    ("recipes", "axes", "overrides", "told"),
    [
        ("tiny.toml tiny.toml", [], [], "tiny.toml is given twice"),
        ("tiny.toml a/tiny.toml", [], [], "tiny.toml and a/tiny.toml have one name"),
        ("tiny.toml a/Tiny.toml", [], [], "tiny.toml and a/Tiny.toml have one name"),
        ("tini.toml", [], [], "tini.toml: no such file"),
        ("tiny.toml", ["seed=1,2"], [], "--axis seed: the seeds of an ablation are those of"),
        ("tiny.toml", [], ["seed=1"], "--set seed: the seeds of an ablation are those of"),
        ("tiny.toml", ["steps=1", "steps=2"], [], "--axis steps stands twice"),
        ("tiny.toml", ["steps=1,2"], ["steps=3"], "--axis steps would undo --set steps"),
        ("tiny.toml", ["image={lr=1}"], ["image.lr=3"], "--axis image would undo --set image.lr"),
        ("tiny.toml", ["title=a,b"], [], "tiny,title=a and tiny,title=b are the same run"),
        ("tiny.toml", ["title='a b','a,b'"], [], "two cells would be called tiny,title=a-b: "),
        ("second.toml", [], [], "second.toml: after: its first stage is not among the recipes; "),
        ("second.toml", [], [], "add tiny.toml"),
        ("lost.toml", [], [], "lost.toml:2: after: should be a recipe's file, but there is no "),
        ("b.toml c.toml", [], [], "come after each other in a circle: b.toml -> c.toml -> b.toml"),
        ("c.toml b.toml", [], [], "come after each other in a circle: b.toml -> c.toml -> b.toml"),
    ],
)
def test_refused(folder, recipes, axes, overrides, told):
    Path("a").mkdir()
    write("a/tiny", "steps = 1", "../tiny.toml")
    write("a/Tiny", "steps = 1", "../tiny.toml")
    write("lost", "after = 'nowhere.toml'")
    write("b", "after = 'c.toml'")
    write("c", "after = 'b.toml'")
    found = refused(recipes, axes, overrides)
    assert told in found
    assert len(found.splitlines()) == 1


def test_a_plugin_that_is_not_there(folder):
    with pytest.raises(PluginError, match=r"^tiny.toml: --axis policy.use: no policy called 'x'"):
        cells(axes=["policy.use=x"])


@pytest.mark.parametrize("jobs", ["0", "-1", "x", ""])
def test_no_number_of_jobs(folder, jobs, capsys):
    assert cli.main(["ablate", "tiny.toml", f"--jobs={jobs}"]) == 2
    assert f"--jobs {jobs}: expected how many" in capsys.readouterr().err


# --- what is there already --------------------------------------------------------------------


@pytest.fixture
def job(folder):
    return Job(cells()[0], 0, Path("out"))


def put(job, *names, **changes):
    """Files in the job's folder; the values of its run.json, if any, are changed."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (job.folder / name).write_text("{}")
    if "run.json" in names:
        data = {"values": {**job.values, **changes}, "plugin_file": None}
        (job.folder / "run.json").write_text(json.dumps(data))


def test_states(job):
    assert state(job) == "new"
    put(job)
    assert state(job) == "new"
    job.mark.touch()
    put(job, "run.json", "metrics.jsonl", ".part-summary.json")
    assert state(job) == "unfinished"
    put(job, "summary.json", "notes.txt")
    assert state(job) == "finished"


@pytest.fixture
def stages(folder):
    """A first stage that is finished, and the run after it, which has not begun."""
    first, second = (Job(cell, 0, Path("out")) for cell in cells("tiny.toml second.toml"))
    put(first, "run.json", "summary.json")
    return first, second


def finish(second, start="out/tiny/seed-0", **summary):
    put(second, "run.json", title="another", after="x", start=str(Path(start).absolute()))
    (second.folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("summary", [{}, {"start_hash": "abc"}])
def test_a_second_stage_is_finished_beside_the_run_that_it_started_from(stages, summary):
    first, second = stages
    about = json.loads((first.folder / "run.json").read_text())
    (first.folder / "run.json").write_text(json.dumps({**about, "hash": "abc"}))
    finish(second, **summary)
    assert state(second) == "finished"
    Path("out").rename("moved")
    moved = Job(second.cell, 0, Path("moved"))
    assert state(moved) == "finished"
    Path("moved").rename("elsewhere")
    Path("moved").symlink_to("elsewhere")
    assert state(moved) == "finished"


@pytest.mark.parametrize("found", [None, "other", "abcd"])
def test_a_second_stage_of_another_run_of_its_first(stages, found):
    first, second = stages
    about = json.loads((first.folder / "run.json").read_text())
    (first.folder / "run.json").write_text(json.dumps({**about, "hash": "abc"}))
    finish(second, start_hash=found)
    with pytest.raises(UserError) as caught:
        state(second)
    assert str(caught.value) == (
        "out/second/seed-0 is in the way: it started from another run of tiny than the one that is "
        "there; move it, or choose another --out"
    )
    assert (second.folder / "summary.json").exists()


@pytest.mark.parametrize("start", ["out/tiny/seed-1", "out/other/seed-0", "mine"])
def test_a_second_stage_of_another_folder(stages, start):
    finish(stages[1], start)
    told = f'its run is another: start is "{Path(start).absolute()}" there and "'
    with pytest.raises(UserError, match=re.escape(told)):
        state(stages[1])


@pytest.mark.parametrize("left", ["nothing", "unfinished"])
def test_a_second_stage_whose_first_is_not_there(stages, left):
    first, second = stages
    finish(second)
    (first.folder / "summary.json").unlink()
    first.mark.touch()
    if left == "nothing":
        clear(first)
    with pytest.raises(UserError, match="it started from a run of tiny that is not there any more"):
        state(second)


def test_a_second_stage_whose_first_is_another(stages, capsys):
    first, second = stages
    finish(second)
    put(first, "run.json", steps=7)
    words = ("ablate", "tiny.toml", "second.toml", "--out", "out")
    assert cli.main([*words]) == 1
    [told] = capsys.readouterr().err.splitlines()[-1:]
    assert told.startswith("out/tiny/seed-0 is in the way: its run is another: steps is 7 there")


def test_what_a_recipe_comes_after_makes_no_other_run_of_one_start(folder):
    (folder / "run" / "final").mkdir(parents=True)
    write("other", "steps = 5")
    told = refused("tiny.toml", ["after=second.toml,other.toml"], ["start=run"])
    assert "are the same run; drop one of the values" in told


@pytest.mark.parametrize("names", [[], ["recipe.toml", ".part-run.json", "metrics.jsonl"]])
def test_what_a_kill_leaves_before_run_json(job, names):
    put(job, *names)
    (job.folder / "sheets").mkdir()
    with pytest.raises(UserError, match="in the way: it is no run's folder"):
        state(job)
    job.mark.touch()
    assert state(job) == "unfinished"
    clear(job)
    assert (state(job), job.folder.exists(), job.mark.exists()) == ("new", False, True)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", ".part-notes.txt", "sheets/favourite.png", "final/notes.txt", "sheets/a/b"),
        *("tensorboard/mine", ".part-final/notes.txt", "metrics.jsonl/mine"),
    ],
)
def test_what_is_not_ours_stays(job, name, whole):
    put(job, *(["run.json"] if whole else []))
    mine = job.folder / name
    mine.parent.mkdir(exist_ok=True, parents=True)
    mine.write_text("mine")
    job.mark.touch()
    for look in (state, clear):
        with pytest.raises(UserError) as caught:
            look(job)
        told = "out/tiny/seed-0 is in the way: its run is unfinished, and no run has written its "
        assert str(caught.value).startswith(told)
    assert mine.read_text() == "mine"


def test_a_run_that_no_call_has_begun_stays(job):
    put(job, "run.json", "metrics.jsonl")
    for look in (state, clear):
        with pytest.raises(UserError, match=r"out/tiny/seed-0 is in the way: .* not begun by"):
            look(job)
    assert (job.folder / "metrics.jsonl").exists()


def test_all_that_a_run_writes_is_known_as_its_own(job):
    put(job, "run.json", "recipe.toml", "unigrpo_plugins.py", ".part-run.json", "evaluation.jsonl")
    for name in (
        *("sheets/step-00020.png", "sheets/before-after.png", "sheets/.part-step-00000.png"),
        *("tensorboard/events.out.tfevents.1.host.2.0", "final/config.json", "final/merges.txt"),
        *(".part-final/ema.safetensors", ".part-final/adapter/weights.safetensors"),
    ):
        (job.folder / name).parent.mkdir(exist_ok=True, parents=True)
        (job.folder / name).touch()
    job.mark.touch()
    clear(job)
    assert not job.folder.exists()


def test_other_things_in_the_way(job):
    Path("out").mkdir()
    Path("out/tiny").write_text("")
    with pytest.raises(UserError, match="out/tiny is in the way: it is no folder"):
        state(job)
    Path("out/tiny").unlink()
    put(job)
    job.folder.rmdir()
    job.folder.write_text("")
    with pytest.raises(UserError, match="out/tiny/seed-0 is in the way: it is no folder"):
        state(job)
    job.folder.unlink()
    other = Path("elsewhere")
    other.mkdir()
    job.folder.symlink_to(other.absolute())
    put(job, "run.json")
    with pytest.raises(UserError, match="it is a link"):
        state(job)
    put(job, "run.json", "summary.json")
    (job.folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is damaged: "):
        state(job)
    (job.folder / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run.json is damaged: expected a JSON obj"):
        state(job)


@pytest.mark.parametrize("names", [["run.json"], ["run.json", "summary.json"]])
def test_a_run_of_something_else(job, names):
    put(job, *names, steps=7, start="x", prompts=4)
    told = "out/tiny/seed-0 is in the way: its run is another: "
    with pytest.raises(UserError) as caught:
        state(job)
    assert str(caught.value) == (
        f'{told}steps is 7 there and 2 here, start is "x" there and "" here; '
        "move it, or choose another --out"
    )
    put(job, *names, steps=7, seed=5, prompts=1, updates={})
    with pytest.raises(UserError, match=r"seed is 5 there and 0 here, steps .* and 2 more; move"):
        state(job)


def test_another_plugin_file(job):
    put(job, "run.json", "summary.json")
    data = json.loads((job.folder / "run.json").read_text())
    data["plugin_file"] = {"file": "x", "sha256": "0123456789abcdef"}
    (job.folder / "run.json").write_text(json.dumps(data))
    told = 'unigrpo_plugins.py is "0123456789ab" there and "" here'
    with pytest.raises(UserError, match=told):
        state(job)


def test_the_call_tells_all_that_is_in_the_way(folder, capsys):
    for name in ("tiny", "second"):
        Path("runs/ablate", name, "seed-1", "x").mkdir(parents=True)
    for extra in ([], ["--dry-run"]):
        code = cli.main(["ablate", "tiny.toml", "second.toml", "--seeds", "0,1", *extra])
        told = capsys.readouterr().err.splitlines()
        assert (code, len(told)) == (1, 2)
        assert told[1].startswith("runs/ablate/second/seed-1 is in the way: it is no run's")
    assert not Path("runs/ablate/tiny/seed-0").exists()


def test_the_folder_cannot_be_made(folder, capsys):
    Path("out").write_text("")
    assert cli.main(["ablate", "tiny.toml", "--out", "out"]) == 1
    assert capsys.readouterr().err == "out cannot be written: File exists; choose another --out\n"


def test_a_dry_run_lists_and_makes_nothing(folder, capsys):
    argv = ["ablate", "second.toml", "tiny.toml", "--seeds", "0,1", "--out", "out"]
    finished, left = (Job(cells()[0], seed, Path("out")) for seed in (0, 1))
    put(finished, "run.json", "summary.json")
    put(left, "run.json")
    left.mark.touch()
    before = {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")}
    assert cli.main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2 cells x 2 seeds = 4 runs in out",
        "second seed 0: to run, after tiny seed 0",
        "tiny seed 0: finished",
        "second seed 1: to run, after tiny seed 1",
        "tiny seed 1: to run again: it is unfinished",
    ]
    assert {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")} == before


def said_first(capsys, *words):
    """The notes of a dry run."""
    assert cli.main(["ablate", *words, "--dry-run"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["--axis", "text.temperature=1,.9"], "text.temperature"),
        (["--axis", "image.size=[8,8],[8,12]"], "image.size"),
        (["--axis", "evaluation.final_prompts=2,3"], "evaluation.final_prompts"),
        (["--axis", "evaluation.every=0,1", "--axis", "image.lr=.1,.2"], None),
        (["bare.toml"], "evaluation.episode"),
        (["bare.toml", "--set", "evaluation.episode=['draw']"], None),
        (
            ["--axis", "text.temperature=1,.9", "--axis", "text.max_tokens=2,3"],
            "text.max_tokens and text.temperature",
        ),
    ],
)
def test_cells_that_compare_will_refuse_are_told(folder, capsys, words, keys):
    write("bare", "episode = ['draw']\ntrain = ['image']\ngroup = { fan_out = [4] }")
    told = said_first(capsys, "tiny.toml", *words)
    apart = f"note: these cells differ in {keys}, so compare will not put them into one table"
    assert told == ([apart] if keys else [])


def test_more_threads_than_one_are_told(folder, capsys):
    write("other", "compute = { threads = 4 }")
    assert said_first(capsys, "tiny.toml", "other.toml") == [
        "note: other uses compute.threads = 4; runs side by side then compete"
    ]
    many = said_first(capsys, "tiny.toml", "--axis", "image.lr=1,2,3,4", "--set=compute.threads=2")
    assert many == [
        "note: tiny,lr=1, tiny,lr=2, tiny,lr=3 and 1 more use compute.threads = 2; "
        "runs side by side then compete"
    ]


def test_only_one_call_holds_a_folder(folder, monkeypatch):
    monkeypatch.setattr("unigrpo_core.ablation.places.PATIENCE", 0.1)
    with (
        locked(Path("out")),
        pytest.raises(UserError, match="another `unigrpo ablate` works in out"),
        locked(Path("out")),
    ):
        pass
    with locked(Path("out")):
        pass


# --- the page ---------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "ablate.md"


def test_the_page_shows_what_is_printed(folder, capsys):
    blocks = re.findall(
        r"```sh dry-run\nunigrpo ([^\n]*)\n```\n\n```text\n(.*?)```", PAGE.read_text(), re.S
    )
    assert len(blocks) == 2
    for command, shown in blocks:
        assert cli.main(shlex.split(command)) == 0
        assert capsys.readouterr().out == shown


def test_the_page_calls_the_verb_as_it_is_called(folder):
    cells_of = {}
    for line in re.findall(r"^unigrpo (ablate (?!RECIPE).*)$", PAGE.read_text(), re.M):
        arguments = cli._parser().parse_args(shlex.split(line))
        recipes = [word for word in arguments.recipe if "*" not in word]
        found = grid(recipes, arguments.axis, arguments.set, lambda file: tiny.catalog())
        cells_of[line] = len(found)
    assert list(cells_of.values()) == [0, 4, 2, 2, 2, 1, 4, 2]


def test_the_page_has_every_option():
    subparsers = argparse.ArgumentParser().add_subparsers()
    cli.ablate.register(subparsers)
    options = {
        flag for flag in subparsers.choices["ablate"]._option_string_actions if flag[1] == "-"
    }
    described = re.findall(r"^\| `(--[\w-]+)", PAGE.read_text(), re.M)
    assert set(described) == options - {"--help"}
