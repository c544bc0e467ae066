"""``benchmarks/gpu_check.py``: what its rows say, what it drops, and that all of it runs."""

import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from unigrpo_models.bagel.accounting import Work

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Its modules stand beside the script, which is not installed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def bench(tmp_path):
    from gpu_checks.harness import Bench, Pace

    return Bench(CPU, tmp_path / "rows.jsonl", Pace(1, 4, 0.0))


def rows(bench):
    return [json.loads(line) for line in bench.out.read_text().splitlines()]


@pytest.fixture(scope="module")
def miniature(modules, tmp_path_factory):
    """The exit code of a run of all cases, its rows, and what it printed."""
    from gpu_checks.main import main

    out, printed = tmp_path_factory.mktemp("gpu") / "rows.jsonl", io.StringIO()
    threads = torch.get_num_threads()
    try:
        with redirect_stdout(printed):
            code = main(
                ["--model", "mini", "--device", "cpu", "--budget", "120", "--out", str(out)]
            )
    finally:
        torch.set_num_threads(threads)
    return code, [json.loads(line) for line in out.read_text().splitlines()], printed.getvalue()


def test_the_miniature_passes_every_case(miniature):
    from gpu_checks.main import cases
    from gpu_checks.rows import PLAIN
    from gpu_checks.scales import mini

    code, (head, *found), printed = miniature
    assert (head["case"], head["model"], head["device"]) == ("header", "mini", "cpu")
    assert head["torch"] == torch.__version__
    assert {"git", "driver", "python"} <= head.keys()
    assert [row for row in found if row["status"] == "error"] == []
    assert code == 0
    assert {row["case"] for row in found} == {case.name for case in cases(mini())} | {"projection"}
    measured = [row for row in found if row["status"] == "ok"]
    assert len(measured) > 20
    for row in measured:
        assert row.keys() >= PLAIN
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        if row["floor_ms"]:
            assert row["share_burst"] == pytest.approx(row["floor_ms"] / row["ms"], rel=1e-4)
    assert all(row["reason"] for row in found if row["status"] == "skipped")
    assert all(f"{row['case']} | {row['config'] or '-'} | " in printed for row in found)


def test_a_painter_is_measured_by_its_own_calls_and_steps(miniature):
    from gpu_checks.painting import GUIDANCE

    found = {row["config"]: row for row in miniature[1] if row["case"] == "12 sd3"}
    assert [row for row in found.values() if row["status"] != "ok"] == []
    one, more = found["velocity, B 1"], found["velocity, B 4"]
    assert one["flop"] == more["flop"] > 0
    assert one["gb"] == pytest.approx(4 * more["gb"])  # weights are read once a call
    updates = {name.split()[-1]: row for name, row in found.items() if "update" in name}
    assert updates["none"]["flop"] == updates["full"]["flop"] < updates["full"]["flop_done"]
    steps = {name: row for name, row in found.items() if name.endswith("step 2")}
    assert len(steps) == len(GUIDANCE)
    for row in steps.values():
        assert row["images_per_s"] > row["samples_per_s"] < row["updated_per_s"]
        assert {"denoise", "pixels", "replay forward"} <= row["network_s"].keys()


def test_without_diffusers_the_painter_is_skipped(tmp_path, monkeypatch):
    from gpu_checks import painting
    from gpu_checks.main import main

    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(painting, "find_spec", lambda name: None)
    assert main(["--model", "mini", "--device", "cpu", "--cases", "8,12", "--out", str(out)]) == 0
    found = {row["case"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert found["8 optimizer"]["status"] == "ok"
    assert found["12 sd3"]["status"] == "skipped"
    assert 'pip install "unigrpo[diffusers]"' in found["12 sd3"]["reason"]


def test_a_row_stands_beside_the_floor_of_its_work(bench):
    """100 FLOP/s in a burst, 50 sustained, 10 B/s: 400 FLOP and 20 B take 4 s or 8 s."""
    from gpu_checks.harness import Entry
    from gpu_checks.rows import Peaks

    bench.peaks = Peaks(burst=100.0, sustained=50.0, bandwidth=10.0)
    entry = Entry("pair", lambda: None, Work(800.0, 40.0), per=2, phase="both")
    bench.measured(entry, [20_000.0, 30_000.0, 10_000.0], 1.0)
    [row] = rows(bench)
    assert (row["ms"], row["calls"], row["peak_gb"]) == (10_000.0, 3, 1.0)
    assert (row["p10"], row["p90"]) == (6_000.0, 14_000.0)
    assert (row["flop"], row["gb"]) == (400.0, 20e-9)
    assert (row["tflop_s"], row["gb_s"]) == (40e-12, 2e-9)
    assert (row["floor_ms"], row["share_burst"], row["share_sustained"]) == (4_000.0, 0.4, 0.8)
    assert bench.phases == {"both": {"pair": 10_000.0}}


def test_entries_take_turns_and_one_that_fails_harms_no_other(bench):
    from gpu_checks.harness import Entry, UnavailableError

    called = []

    def fail():
        if called.count("a") == 3:
            raise ValueError("first line\nsecond line")

    def unavailable():
        raise UnavailableError("not here")

    def full():
        raise torch.OutOfMemoryError("needs more")

    bench.race(
        Entry("a", lambda: called.append("a")),
        Entry("b", lambda: called.append("b")),
        Entry("fails", fail),
        Entry("unavailable", unavailable),
        Entry("full", full),
    )
    assert called == ["a", "b", *"abababab"]  # warm-up, then turns
    found = {row["config"]: row for row in rows(bench)}
    assert [name for name, row in found.items() if row["status"] == "ok"] == ["a", "b"]
    assert found["fails"]["reason"] == "ValueError: first line"
    assert found["fails"]["status"] == "error"
    assert found["unavailable"]["reason"] == "not here"
    assert found["full"]["reason"] == "out of memory: needs more"
    assert {found[name]["status"] for name in ("unavailable", "full")} == {"skipped"}
    assert bench.failed == 1


def test_the_least_important_case_is_dropped_where_time_is_short(bench):
    from gpu_checks.harness import Case

    ran = []

    def case(name, priority, seconds):
        return Case(name, lambda bench: ran.append(name), priority, seconds)

    bench.run([case("one", 0, 4), case("two", 2, 4), case("three", 1, 4)], budget=9.0)
    assert ran == ["one", "three"]
    [row] = rows(bench)
    assert (row["case"], row["status"]) == ("two", "skipped")
    assert row["reason"].startswith("budget: about 4 s")


def test_a_case_that_takes_too_long_is_stopped_and_keeps_its_rows(bench):
    from gpu_checks.harness import Case, Entry, Pace

    def slow(bench):
        bench.race(Entry("quick", lambda: None))
        bench.race(Entry("slow", lambda: time.sleep(0.02)), pace=Pace(0, 10_000, 0.0))

    bench.run([Case("slow", slow, 0, 0.1), Case("after", slow, 1, 0.1)], budget=0.3)
    found = [(row["case"], row["config"], row["status"]) for row in rows(bench)]
    kept = [("slow", "quick", "ok"), ("slow", "slow", "ok")]
    assert found == [*kept, ("slow", "", "skipped"), ("after", "", "skipped")]
    assert [row["reason"].partition(":")[0] for row in rows(bench)[2:]] == ["time limit", "budget"]


def test_a_projection_is_the_sum_of_its_phases_and_names_what_is_missing(bench):
    """By hand: 4 prompts x 2 chains, 16 tokens, 8 denoising steps, half of the old values."""
    from gpu_checks.projection import project
    from gpu_checks.scales import mini

    bench.phases = {
        "prefill": {"a": 3.0},
        "decode/8/short": {"a": 4.0},
        "decode/8/long": {"a": 6.0},
        "denoise/small": {"eager": 2.0, "compiled": 1.0},
        "forward/small": {"a": 5.0},
        "update/small": {"a": 11.0},
    }
    project(bench, mini())
    [row] = rows(bench)
    seconds = {name: phase["seconds"] for name, phase in row["phases"].items()}
    expected = {
        "prefill": 4 * 3e-3,
        "decode": 16 * 5e-3,
        "denoise": 8 * 8 * 1e-3,
        "old values": 4 * 5e-3,
        "update": 8 * 11e-3,
    }
    assert {name: seconds[name] for name in expected} == pytest.approx(expected)
    assert row["missing"] == ["autoencoder", "reference", "optimizer"]
    assert row["seconds"] == pytest.approx(sum(expected.values()))
    assert row["phases"]["denoise"]["by"] == "compiled"
    assert row["floor_s"] is None  # no peaks were measured


def test_floors_of_the_published_model_are_those_of_the_plan():
    """8 x 4 chains of small images at 790 TFLOP/s and 4.3 TB/s, with whole experts: seconds of
    each phase as counted by hand from the published sizes."""
    from dataclasses import replace

    from gpu_checks.projection import phases_of
    from gpu_checks.rows import Peaks
    from gpu_checks.scales import published

    scale = replace(published(), lora_rank=0)
    floors = {
        phase.name: phase.floor_s
        for phase in phases_of(scale, scale.projected[0], {}, Peaks(790e12, 790e12, 4.3e12))
    }
    expected = {
        "prefill": 0.012,
        "decode": 1.76,
        "denoise": 13.67,
        "old values": 1.03,
        "reference": 2.03,
        "update": 6.20,
        "optimizer": 0.22,
    }
    for name, seconds in expected.items():
        assert floors[name] == pytest.approx(seconds, rel=0.07), name
    assert floors["autoencoder"] is None


def test_cuda_is_refused_where_there_is_none(capsys):
    from gpu_checks.main import main

    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(SystemExit) as caught:
        main(["--device", "cuda"])
    assert caught.value.code == 2
    assert "torch finds no CUDA here" in capsys.readouterr().err
