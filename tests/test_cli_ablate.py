"""``unigrpo ablate`` with processes: order, failures, kills, resumption. The last tests make real
runs; the others have tests/stand_in_run.py in their place, so that they are quick."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from unigrpo_core import cli
from unigrpo_core.ablation import places, schedule
from unigrpo_core.ablation.written import foreign

TESTS = Path(__file__).parent
STAND_IN = (sys.executable, "-P", str(TESTS / "stand_in_run.py"))
DRIVER = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from unigrpo_core.ablation import schedule
from unigrpo_core.cli import main
schedule.CHILD = {STAND_IN!r}
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint):
    """The working directory, with the recipe tiny, and second after it."""
    monkeypatch.chdir(tmp_path)
    tiny.recipe_file(tmp_path, checkpoint)
    text = (tmp_path / "tiny.toml").read_text()
    text = text.replace("steps = 2", "steps = 1").replace("every = 1", "every = 0")
    (tmp_path / "tiny.toml").write_text(text)
    write("second", "after = 'tiny.toml'\ntrain = ['image']")
    return tmp_path


@pytest.fixture
def ablate(folder, monkeypatch, capsys):
    """The verb with the stand-in for runs: exit code, lines printed, what was said of errors."""
    monkeypatch.setattr(schedule, "CHILD", STAND_IN)
    monkeypatch.setattr(places, "PATIENCE", 0.2)

    def ablate(*words):
        code = cli.main(["ablate", *words, "--out", "out"])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return ablate


def write(name, text, base="tiny.toml"):
    Path(f"{name}.toml").write_text(f"extends = ['{base}']\n{text}")


def title(name, text):
    """Replaces the title of a recipe, which changes nothing of its run."""
    file = Path(f"{name}.toml")
    file.write_text(re.sub("^title.*\n", "", file.read_text(), flags=re.M))
    top = f'title = "{text}"\n'
    file.write_text(top + file.read_text())


def began(*words, stdout=subprocess.PIPE):
    """The verb with the stand-in, begun in a process of its own."""
    command = [sys.executable, "-P", "-c", DRIVER, "ablate", *words, "--out", "out"]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def wait_for(*files, process=None):
    until = time.monotonic() + 120
    while not all(Path(file).exists() for file in files):
        assert time.monotonic() < until, files
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def events():
    return Path("events").read_text().splitlines()


def timeless(lines):
    return [re.sub(r"in \d+ s", "in _ s", line) for line in lines]


def ends(lines):
    """The lines without those that say that a run has started."""
    return [line for line in timeless(lines) if ": started, log " not in line]


def standing(folder):
    """Every file below with its bytes and the time it was changed."""
    return {
        path: (os.stat(path).st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(Path(folder).rglob("*"))
    }


# --- order ------------------------------------------------------------------------------------


def test_stages_and_places(ablate):
    write("other", "steps = 5")
    words = ("second.toml", "tiny.toml", "other.toml", "--jobs", "2")
    code, out, err = ablate(*words)
    assert (code, err) == (0, "")
    assert out[:3] == [
        "3 cells x 1 seed = 3 runs, 2 at a time",
        "[0/3] tiny seed 0: started, log out/tiny/seed-0.log",
        "[0/3] other seed 0: started, log out/other/seed-0.log",
    ]
    assert any(
        line.endswith("/3] second seed 0: started, log out/second/seed-0.log") for line in out
    )
    out = ends(out)
    assert sorted(line.partition(" seed")[0].partition("] ")[2] for line in out[1:4]) == [
        "other",
        "second",
        "tiny",
    ]
    assert out[3] == "[3/3] second seed 0: done in _ s, gold 0.250 > 0.500"
    assert out[4:] == [
        "3 of 3 runs finished; CPU time of these runs, evaluation included: 1.5 min",
        "results: out; compare them with: unigrpo compare out",
    ]
    happened = events()
    assert {"start tiny", "start other"} <= {*happened}
    assert happened.index("end tiny") < happened.index("start second")
    start = json.loads(Path("out/second/seed-0/run.json").read_text())["values"]["start"]
    assert start == str(Path("out/tiny/seed-0").absolute())
    before = standing("out")
    code, out, _ = ablate(*words)
    assert (code, out[0]) == (0, "3 cells x 1 seed = 3 runs, 3 finished already, 2 at a time")
    assert (standing("out"), events()) == (before, happened)


def test_more_seeds_leave_what_is_finished(ablate):
    assert ablate("tiny.toml")[0] == 0
    before = standing("out/tiny")
    code, out, _ = ablate("tiny.toml", "--seeds", "0,1")
    assert (code, out[0]) == (0, "1 cell x 2 seeds = 2 runs, 1 finished already, 1 at a time")
    assert ends(out)[1] == "[2/2] tiny seed 1: done in _ s, gold 0.250 > 0.500"
    after = standing("out/tiny")
    assert {path: after[path] for path in before} == before


# --- failures ---------------------------------------------------------------------------------


def test_a_failing_stage(ablate):
    title("tiny", "fails")
    write("other", "title = ''\nsteps = 5")
    write("third", "after = 'second.toml'")
    code, out, _ = ablate("third.toml", "second.toml", "tiny.toml", "other.toml")
    failed = "failed with exit code 3: the judge | is down; see out/tiny/seed-0.log"
    skipped = "skipped: its first stage, {} seed 0, is not there"
    assert code == 1
    assert ends(out) == [
        "4 cells x 1 seed = 4 runs, 1 at a time",
        f"[1/4] tiny seed 0: {failed}",
        f"[2/4] second seed 0: {skipped.format('tiny')}",
        f"[3/4] third seed 0: {skipped.format('second')}",
        "[4/4] other seed 0: done in _ s, gold 0.250 > 0.500",
        "1 of 4 runs finished; CPU time of these runs, evaluation included: 0.5 min",
        f"  tiny seed 0: {failed}",
        f"  second seed 0: {skipped.format('tiny')}",
        f"  third seed 0: {skipped.format('second')}",
        "the same command tries these again",
        "results: out; compare them with: unigrpo compare out",
    ]
    assert events() == ["start tiny", "start other", "end other"]
    title("tiny", "is mended")
    code, out, _ = ablate("third.toml", "second.toml", "tiny.toml", "other.toml")
    assert (code, out[0]) == (0, "4 cells x 1 seed = 4 runs, 1 finished already, 1 at a time")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("is killed", "failed with SIGKILL (out of memory?): it has said nothing; see out/tiny/"),
        ("forgets", "failed: it has left no summary.json; see out/tiny/seed-0.log"),
    ],
)
def test_other_ways_to_fail(ablate, how, told):
    title("tiny", how)
    code, out, _ = ablate("tiny.toml")
    assert code == 1
    assert ends(out)[1].startswith(f"[1/1] tiny seed 0: {told}")


def test_a_run_that_cannot_be_started(ablate):
    Path("out/tiny/seed-0.log").mkdir(parents=True)
    code, out, _ = ablate("tiny.toml", "--seeds", "0,1")
    assert code == 1
    assert out[1].startswith("[1/2] tiny seed 0: failed: it cannot be started: ")
    assert "Is a directory" in out[1]
    assert ends(out)[2].startswith("[2/2] tiny seed 1: done")


def test_a_changed_recipe(ablate):
    assert ablate("tiny.toml")[0] == 0
    before = standing("out")
    code, out, err = ablate("tiny.toml", "--seeds", "0,1", "--set", "prompts=6")
    assert (code, out) == (1, [])
    assert err == (
        "out/tiny/seed-0 is in the way: its run is another: prompts is 4 there and 6 here; "
        "move it, or choose another --out\n"
    )
    assert standing("out") == before


def test_a_recipe_that_is_edited_meanwhile(ablate):
    write("other", "title = 'waits'")
    one = began("other.toml", "tiny.toml", "second.toml")
    wait_for("out/other/seed-0/run.json", process=one)
    tiny_file = Path("tiny.toml")
    tiny_file.write_text(tiny_file.read_text().replace("steps = 1\n", "steps = 3\n", 1))
    Path("go").touch()
    out = ends(one.communicate()[0].splitlines())
    why = "failed: the recipe was changed meanwhile: steps is 3 there and 1 here; see"
    assert one.returncode == 1
    assert out[2:4] == [
        f"[2/3] tiny seed 0: {why} out/tiny/seed-0.log",
        "[3/3] second seed 0: skipped: its first stage, tiny seed 0, is not there",
    ]
    assert Path("out/tiny/seed-0/summary.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_the_output_stops_no_run(ablate):
    with open("/dev/full", "w") as full:
        one = began("tiny.toml", "second.toml", stdout=full)
        err = one.communicate()[1]
    assert events() == ["start tiny", "end tiny", "start second", "end second"]
    assert one.returncode == 1
    assert "No space left" in err
    assert "that stopped no run: 2 of 2 runs finished; out keeps them and their logs" in err
    assert "a bug" not in err


def test_a_closed_pipe_stops_no_run(ablate):
    title("tiny", "waits")
    one = began("tiny.toml", "second.toml")
    wait_for("out/tiny/seed-0/run.json", process=one)
    one.stdout.close()
    Path("go").touch()
    assert (one.wait(), one.stderr.read()) == (141, "")
    assert Path("out/second/seed-0/summary.json").exists()


# --- ended before -----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waits", "waits early"])
def test_killed(ablate, when):
    write("other", f"title = '{when}'\nsteps = 5")
    one = began("tiny.toml", "other.toml")
    wait_for("out/other/seed-0/sheets" if "early" in when else "out/other/seed-0/run.json")
    before = standing("out/tiny")
    one.kill()
    one.wait()
    Path("go").touch()
    code, out, _ = ablate("tiny.toml", "other.toml")
    assert (code, out[0]) == (0, "2 cells x 1 seed = 2 runs, 1 finished already, 1 at a time")
    assert events() == ["start tiny", "end tiny", "start other", "start other", "end other"]
    assert standing("out/tiny") == before
    assert sorted(path.name for path in Path("out/other").iterdir()) == ["seed-0", "seed-0.log"]


def test_interrupted(ablate):
    title("tiny", "waits")
    one = began("tiny.toml", "second.toml", "--seeds", "0,1", "--jobs", "2")
    wait_for("out/tiny/seed-0/run.json", "out/tiny/seed-1/run.json")
    one.send_signal(signal.SIGINT)
    _, err = one.communicate()
    assert one.returncode == 130
    assert err == "interrupted\nout keeps 0 of 4 runs; the same command goes on from there\n"
    with places.locked(Path("out")):  # nothing runs there any more
        pass
    _, out, _ = ablate("tiny.toml", "second.toml", "--seeds", "0,1", "--dry-run")
    assert out[1] == "tiny seed 0: to run again: it is unfinished"


def test_two_calls_at_once(ablate):
    title("tiny", "waits")
    one = began("tiny.toml")
    wait_for("out/tiny/seed-0/run.json")
    code, out, err = ablate("tiny.toml")
    assert (code, out) == (1, [])
    assert err.startswith("another `unigrpo ablate` works in out; wait for its end")
    Path("go").touch()
    assert "1 of 1 run finished" in one.communicate()[0]
    assert one.returncode == 0


# --- real runs --------------------------------------------------------------------------------

PLUGIN = """
from unigrpo_core.plugin import Provider, hookimpl

def build(options):
    raise RuntimeError("the judge is down")

@hookimpl
def unigrpo_rewards():
    yield Provider("judge", build, reads=("image",), range=(0.0, 1.0))
"""


@pytest.mark.slow
def test_real_runs_killed_resumed_and_failing(folder, capfd):
    words = ("tiny.toml", "second.toml", "--axis", "image.weight=.5", "--out", "out")
    one = subprocess.Popen([sys.executable, "-P", "-m", "unigrpo_core", "ablate", *words])
    tiny_run, second_run = (folder / f"out/{name},weight=0.5/seed-0" for name in ("tiny", "second"))
    wait_for(tiny_run / "run.json", process=one)
    one.kill()
    one.wait()
    with places.locked(Path("out")):  # it is free only when its runs have ended
        assert not (tiny_run / "summary.json").exists()
    (folder / "mine").mkdir()
    write("mine/faulty", "rewards = [{ use = 'judge' }]", "../tiny.toml")
    (folder / "mine" / "unigrpo_plugins.py").write_text(PLUGIN)
    capfd.readouterr()
    assert cli.main(["ablate", "mine/faulty.toml", *words, "--jobs", "2"]) == 1
    out = capfd.readouterr().out
    assert out.startswith("3 cells x 1 seed = 3 runs, 2 at a time\n")
    for name in ("tiny", "second"):
        told = rf"/3\] {name},weight=0.5 seed 0: done in \d+ s, random 0\.\d+ > 0\.\d+\n"
        assert re.search(told, out)
    told = r"faulty,weight=0.5 seed 0: failed with exit code 3: .*reward 'judge' of mine/unigrpo_"
    assert re.search(told, out)
    values = json.loads((second_run / "run.json").read_text())["values"]
    assert (values["image"]["weight"], values["train"]) == (0.5, ["image"])
    assert values["start"] == str(tiny_run)
    (second_run / "summary.json").unlink()
    assert foreign(second_run) is None
    first, second = tiny.final_weights(tiny_run), tiny.final_weights(second_run)
    assert all(second[name].equal(first[name]) != tiny.is_image(name) for name in first)
