"""Mistakes that only ``unigrpo run`` can find, and what goes wrong while it runs: what is printed,
the exit code, and what the run folder keeps."""

import errno
import json
import os
import resource
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from unigrpo_models.bagel.policy import BagelPolicy

from unigrpo_core import cli
from unigrpo_core.engine.folder import RunFolder, whole
from unigrpo_core.engine.loop import Run
from unigrpo_core.errors import UserError

CATALOG = tiny.catalog()


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The components of the tests, as if installed."""
    for verb in (cli.run, cli.check):
        monkeypatch.setattr(verb, "load_catalog", lambda: CATALOG)


@pytest.fixture
def unigrpo(capsys):
    def run(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(unigrpo, tmp_path, checkpoint, out):
    """Runs the tiny recipe with overrides: exit code, what is printed on stderr."""
    file = tiny.recipe_file(tmp_path, checkpoint)

    def run(*overrides):
        sets = [word for text in overrides for word in ("--set", text)]
        code, _, err = unigrpo("run", file, "--out", out, *sets)
        return code, err

    return run


def kept(out):
    """The lines of what a run folder keeps, each file read to the end: name to number of lines."""
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    for file in out.glob("*.json"):
        json.loads(file.read_text())
    counts = {}
    for file in out.glob("*.jsonl"):
        text = file.read_text()
        assert text == "" or text.endswith("\n")
        counts[file.stem] = len([json.loads(line) for line in text.splitlines()])
    return counts


# --- where a run cannot begin -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "told"),
    [
        pytest.param("full", "full is not an empty folder; choose another with --out", id="taken"),
        pytest.param("file", "file is not an empty folder; choose another with --out", id="file"),
        pytest.param("file/run", "file is no folder; choose another place", id="below-a-file"),
        pytest.param("file/a/b", "file is no folder; choose another place", id="deep-below"),
    ],
)
def test_a_place_that_is_no_empty_folder(unigrpo, tmp_path, checkpoint, monkeypatch, place, told):
    monkeypatch.setattr(BagelPolicy, "__init__", None)  # it is not even loaded
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    file = tiny.recipe_file(tmp_path, checkpoint)
    before = sorted(tmp_path.rglob("*"))
    code, said, err = unigrpo("run", file, "--out", tmp_path / place)
    assert (code, said) == (1, "")
    assert err.startswith(str(tmp_path / place))
    assert told in err
    assert sorted(tmp_path.rglob("*")) == before


@contextmanager
def without_rights(folder):
    """Nobody in particular, in a folder that only its owner may write to."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("below", "told"),
    [
        pytest.param("run", "no right to write in", id="no-right-to-write"),
        pytest.param("hidden/run", "cannot be read: Permission denied", id="no-right-to-look"),
    ],
)
def test_a_place_without_rights(unigrpo, checkpoint, below, told):
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-"))
    try:
        file = tiny.recipe_file(folder, checkpoint)
        (folder / "hidden").mkdir()
        (folder / "hidden").chmod(0)
        with without_rights(folder):
            code, said, err = unigrpo("run", file, "--out", folder / below)
        assert (code, said) == (1, "")
        assert err.startswith(str(folder / below))
        assert told in err
    finally:
        (folder / "hidden").chmod(0o755)
        shutil.rmtree(folder)


# --- weights ----------------------------------------------------------------------------------


def truncated(folder):
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def emptied(folder):
    (folder / "ema.safetensors").write_bytes(b"")


def of_text(folder):
    (folder / "ema.safetensors").write_text("these are no weights, whatever their name says")


def foreign(folder):
    state = load_file(folder / "ema.safetensors")
    state["transformer.wte"] = state.pop("language_model.model.embed_tokens.weight")
    save_file(state, folder / "ema.safetensors")


def misshapen(folder):
    state = load_file(folder / "ema.safetensors")
    state["time_embedder.mlp.0.bias"] = torch.zeros(3)
    save_file(state, folder / "ema.safetensors")


def without(name):
    return lambda folder: (folder / name).unlink()


def no_json(name):
    return lambda folder: (folder / name).write_text("{ no json")


DAMAGE = [
    pytest.param(truncated, ("ema.safetensors is damaged: ",), id="truncated"),
    pytest.param(emptied, ("ema.safetensors is damaged: ",), id="empty"),
    pytest.param(of_text, ("ema.safetensors is damaged: ",), id="no-safetensors"),
    pytest.param(without("ema.safetensors"), ("has no ema.safetensors",), id="missing"),
    pytest.param(
        foreign,
        (
            "does not fit its llm_config.json",
            "missing language_model.model.embed_tokens.weight (44, 32)",
            "unexpected transformer.wte",
        ),
        id="of-another-model",
    ),
    pytest.param(misshapen, ("time_embedder.mlp.0.bias is (3,), expected (32,)",), id="misshapen"),
]
CONFIGURATION = [
    pytest.param(no_json("config.json"), ("is no BAGEL checkpoint",), id="config-is-no-json"),
    pytest.param(
        lambda folder: (folder / "llm_config.json").write_bytes(b"\xff\xfe{"),
        ("is no BAGEL checkpoint: 'utf-8' codec can't decode",),
        id="llm_config-no-utf-8",
    ),
    pytest.param(no_json("llm_config.json"), ("is no BAGEL checkpoint",), id="llm_config-no-json"),
    pytest.param(without("llm_config.json"), ("has no llm_config.json",), id="no-llm_config"),
    pytest.param(no_json("tokenizer.json"), ("has no tokenizer that loads",), id="tokenizer-no-js"),
]


@pytest.mark.parametrize(("damage", "told"), [*DAMAGE, *CONFIGURATION])
def test_a_damaged_checkpoint(run, tmp_path, checkpoint, out, damage, told):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    code, err = run(f"policy.checkpoint={tmp_path}/damaged")
    assert code == 1
    assert str(tmp_path / "damaged") in err
    assert all(words in err for words in told), err
    assert not out.exists()


@pytest.mark.parametrize(("damage", "told"), DAMAGE)
def test_a_damaged_start(run, tmp_path, checkpoint, out, damage, told):
    shutil.copytree(checkpoint, tmp_path / "first/final")
    damage(tmp_path / "first/final")
    code, err = run(f"start={tmp_path}/first")
    assert code == 1
    assert str(tmp_path / "first/final") in err
    assert all(words in err for words in told), err
    assert not out.exists()


def test_a_start_that_cannot_be_read(run, tmp_path, out):
    (tmp_path / "first/final/ema.safetensors").mkdir(parents=True)
    code, err = run(f"start={tmp_path}/first")
    assert code == 1
    assert err.startswith(f"{tmp_path}/first/final/ema.safetensors cannot be read: ")
    assert not out.exists()


def test_weights_that_are_not_there_are_an_error_of_run(run, unigrpo, tmp_path, checkpoint, out):
    gone = f"policy.checkpoint={tmp_path}/gone"
    assert run(gone)[0] == 1
    assert run(gone)[1].startswith(f"checkpoint '{tmp_path}/gone': there is no folder")
    assert not out.exists()
    code, said, _ = unigrpo("check", tiny.recipe_file(tmp_path, checkpoint), "--set", gone)
    assert code == 0
    assert f"note: policy bagel: checkpoint '{tmp_path}/gone': there is no folder" in said


# --- prompts ----------------------------------------------------------------------------------


def prompts_of(file, *lines, held=("blue square",)):
    file.write_text("".join(f"{line}\n" for line in lines))
    other = file.with_name("held.txt")
    other.write_text("".join(f"{line}\n" for line in held))
    return f"source={{use='file', path='{file}', held_out_path='{other}'}}"


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        pytest.param("p.txt", (), "p.txt: no prompt in it; one stands on each line", id="empty"),
        pytest.param("p.txt", ("", "  "), "p.txt: no prompt in it", id="blank"),
        pytest.param(
            "p.jsonl", ('{"prompt": "red circle"}', "red"), "p.jsonl:2: not JSON", id="js"
        ),
        pytest.param("p.md", ("red circle",), "p.md: a prompt file ends in .txt or", id="suffix"),
        pytest.param("p.txt", ("blue square",), "is also a training prompt (", id="held-out-too"),
    ],
)
def test_a_prompt_file_that_cannot_be_used(run, tmp_path, out, name, lines, told):
    code, err = run(prompts_of(tmp_path / name, *lines))
    assert code == 1
    assert told in err
    assert not out.exists()


LONG = "red " * 70


@pytest.mark.parametrize(
    ("training", "held", "told"),
    [
        pytest.param(
            (LONG,), ("blue",), "prompt 'file-2@0' takes 72 tokens, but the model's", id="1"
        ),
        pytest.param(
            (LONG, f"{LONG} blue", "zebra"),
            ("blue",),
            "3 of the 8 different prompts cannot be used; the first: ",
            id="3",
        ),
        pytest.param(
            ("green",), (LONG,), "prompt 'file-1' takes 72 tokens, but the", id="held-out"
        ),
        pytest.param(
            ("zebra",), ("blue",), "the model does not know 'zebra'; its words are: ", id="words"
        ),
    ],
)
def test_prompts_that_the_model_does_not_take_are_counted(run, tmp_path, out, training, held, told):
    """Also those of a later rollout: six prompts are drawn, of up to seven."""
    others = ["one red circle", "two red circle", "four red circle"]
    source = prompts_of(tmp_path / "p.txt", "red", *training, *others, held=held)
    code, err = run(source, "prompts=2", "steps=4")
    assert code == 1
    assert told in err
    assert not out.exists()


def test_fewer_prompts_held_out_than_asked_for_is_a_note(unigrpo, tmp_path, checkpoint, out):
    source = prompts_of(tmp_path / "p.txt", "red circle", held=("blue square", "red square"))
    argv = ("run", tiny.recipe_file(tmp_path, checkpoint), "--out", out, "--set", source)
    code, said, err = unigrpo(*argv, "--set", "steps=0", "--set", "train=[]")
    assert (code, err) == (0, "")
    note = "note: prompts 'file' of unigrpo 0.1.0 holds 2 prompts out, and evaluation.final_prompts"
    assert said.splitlines()[0] == f"{note} asks for 4"


def test_a_thought_that_does_not_fit_behind_its_prompt(run, out):
    code, err = run("text.max_tokens=100")
    assert code == 1
    assert "and a thought of 100 take a context of 1" in err
    assert "the model's ends at 64: lower text.max_tokens" in err
    assert not out.exists()


def test_a_source_that_fails_is_named(run, out, monkeypatch):
    from unigrpo_board.prompts import BoardPrompts

    def fail(*_):
        raise ZeroDivisionError("no boards left")

    monkeypatch.setattr(BoardPrompts, "train", fail)
    code, err = run()
    assert code == 3
    assert err == "prompts 'board' of unigrpo 0.1.0 failed: ZeroDivisionError: no boards left\n"
    assert not out.exists()


# --- rewards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise", "failed: RuntimeError: the judge is down"),
        ("nan", "returned nan for 1 of 12 episodes, first for prompt "),
        ("length", "returned (11,), expected a float tensor of (12,)"),
        ("list", "returned list, expected a float tensor of (12,)"),
        ("range", "returned 1.5, outside of its range [0.0, 1.0]"),
    ],
)
def test_a_reward_at_fault_ends_the_run_and_what_was_measured_stays(run, out, fault, told):
    """Its fourth call is the second step's, after an evaluation, a step and an evaluation."""
    code, err = run(f"rewards=[{{use='faulty', fault='{fault}', after=3}}]")
    assert code == 3
    first, note = err.splitlines()
    assert first.startswith(f"reward 'faulty' of tiny-tests 0.1 {told}")
    assert note == f"{out} keeps what was measured up to step 1 of 2"
    assert kept(out) == {"metrics": 1, "timing": 1, "evaluation": 2}
    assert json.loads((out / "run.json").read_text())["plugins"]["tiny-tests"] == "0.1"
    assert not (out / "final").exists()
    assert not (out / "summary.json").exists()


def test_a_reward_at_fault_at_once(run, out):
    code, err = run("rewards=[{use='faulty', fault='raise'}]")
    assert code == 3
    assert err.splitlines()[1] == f"{out} keeps what was measured (nothing)"
    assert kept(out) == {}


# --- a full disk ------------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """The system refuses to let a file grow beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory, checkpoint):
    """The sizes of the files of a run."""
    folder = tiny.run(tmp_path_factory.mktemp("sizes"), checkpoint, "evaluation.sheet=1")
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@pytest.mark.parametrize(
    ("file", "sheet", "measured"),
    [
        pytest.param("recipe.toml", 0, {}, id="recipe"),
        pytest.param("run.json", 0, {}, id="run.json"),
        pytest.param("sheets/step-00000.png", 1, {"evaluation": 1}, id="sheet"),
        pytest.param(
            "final/ema.safetensors", 0, {"evaluation": 3, "metrics": 2, "timing": 2}, id="weights"
        ),
    ],
)
def test_a_full_disk(run, out, sizes, file, sheet, measured):
    with largest_file(sizes[file] - 1):
        code, err = run(f"evaluation.sheet={sheet}")
    assert code == 1
    first, *note = err.splitlines()
    whose = "final" if file.startswith("final") else file
    assert first.startswith(f"{out / whose} cannot be written: ")
    assert os.strerror(errno.EFBIG) in first
    assert note == ([f"{out} keeps what was measured up to step {measured.get('metrics', 0)} of 2"]
                    if measured else [])  # fmt: skip
    assert kept(out) == measured
    assert not (out / file).exists()
    assert not (out / "final").exists()


def test_a_disk_that_is_full_for_tensorboard(run, out, sizes, monkeypatch):
    """It writes in a thread of its own, which would print a traceback of its own."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    limit = sizes["run.json"] + 1
    with largest_file(limit):
        code, err = run("steps=40", "evaluation.every=0", "prompts=2", "group.fan_out=[2, 1]")
    assert code == 1
    first, note = err.splitlines()
    assert first == f"{out / 'tensorboard'} cannot be written: {os.strerror(errno.EFBIG)}"
    steps = kept(out)["metrics"]
    assert 0 < steps < 40
    assert printed == []
    assert threading.excepthook == printed.append
    assert note == f"{out} keeps what was measured up to step {steps} of 40"


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    folder = RunFolder(tmp_path)
    line = len(json.dumps({"step": 1}) + "\n")
    with largest_file(2 * line + 5):
        for _ in range(2):
            folder.append("metrics.jsonl", {"step": 1})
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: "):
            folder.append("metrics.jsonl", {"step": 1})
    assert kept(tmp_path) == {"metrics": 2}


def test_a_file_that_is_there_survives_one_that_cannot_be_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("summary.json", {"step": 1})
    with largest_file(10), pytest.raises(UserError, match=r"summary\.json cannot be written: "):
        folder.write("summary.json", {"step": 2, "why": "x" * 100})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"step": 1}
    assert kept(tmp_path) == {}


def test_a_failure_that_is_not_the_disks_leaves_nothing_half_written_either(tmp_path):

    def fail(make):
        with whole(tmp_path / "made") as partial:
            make(partial)
            raise KeyError("half")

    for make in (Path.touch, Path.mkdir):
        with pytest.raises(KeyError):
            fail(make)
        assert list(tmp_path.iterdir()) == []


# --- interrupted, and bugs --------------------------------------------------------------------


def test_interrupted_while_weights_are_saved(run, out, monkeypatch):
    """Ctrl-C at any other time: see test_cli_run.py, in a process of its own."""

    def save(self, folder):
        folder.mkdir()
        (folder / "ema.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(BagelPolicy, "save", save)
    code, err = run()
    assert (code, err) == (130, f"interrupted\n{out} keeps what was measured up to step 2 of 2\n")
    assert kept(out) == {"metrics": 2, "timing": 2, "evaluation": 3}
    assert not (out / "final").exists()


def test_a_bug_is_one_line_and_where_the_folder_is(run, out, monkeypatch, capsys):
    def fail(self, step):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(Run, "_step", fail)
    assert run() == (
        1,
        "a bug, please report it: ZeroDivisionError: division by zero (--debug shows the "
        f"traceback)\n{out} keeps what was measured up to step 0 of 2\n",
    )
    assert kept(out) == {"evaluation": 1}


def test_too_little_memory_names_the_keys_that_lower_the_need(run, out, monkeypatch):
    monkeypatch.setattr(Run, "_step", lambda self, step: torch.empty(1 << 60))
    code, err = run("compute.rollout_rows=77")
    assert code == 1
    first, note = err.splitlines()
    assert first.startswith("out of memory: lower compute.rollout_rows (now 77), compute.rollout_")
    assert "can't allocate memory" in first
    assert note == f"{out} keeps what was measured up to step 0 of 2"


def test_debug_shows_the_traceback_of_a_run(run, out, tmp_path, checkpoint, capsys):
    file = tiny.recipe_file(tmp_path, checkpoint)
    argv = ("run", str(file), "--out", str(out), "--set")
    assert cli.main(["--debug", *argv, "rewards=[{use='faulty', fault='raise'}]"]) == 3
    _, err = capsys.readouterr()
    assert err.startswith("Traceback (most recent call last)")
    assert "RuntimeError: the judge is down" in err
    assert err.endswith(f"{out} keeps what was measured (nothing)\n")
