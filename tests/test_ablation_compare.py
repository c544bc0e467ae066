"""``unigrpo compare``: on real tiny runs, and on folders by hand whose numbers are known."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from copy import deepcopy
from hashlib import sha256
from io import StringIO
from math import sqrt

import pytest

from unigrpo_core import cli

VALUES = {
    "title": "by hand",
    "seed": 0,
    "steps": 4,
    "episode": ["think", "draw"],
    "train": ["text", "image"],
    "start": "",
    "policy": {"use": "bagel", "checkpoint": "/somewhere"},
    "source": {"use": "board"},
    "rewards": [{"use": "learned", "weight": 1.0}, {"use": "other", "weight": 0.0}],
    "monitors": [{"use": "gold"}],
    "text": {"lr": 1e-3, "max_tokens": 6, "temperature": 1.0},
    "image": {
        "lr": 1e-3,
        "size": [8, 12],
        "regularizers": [{"use": "velocity_mse", "weight": 0.003}],
    },
    "evaluation": {"every": 2, "prompts": 8, "final_prompts": 8, "sheet": 0},
    "compute": {"device": "cpu", "precision": "float32"},
}
GOLD = {0: (0.5, 0.6, 0.8), 1: (0.5, 0.7, 0.7), 2: (0.5, 0.8, 0.6)}  # joint, by seed


@pytest.fixture
def compare(capsys):
    def run(*words):
        code = cli.main(["compare", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def found(compare):
    """The comparison as data."""

    def run(*words):
        code, out, err = compare(*words, "--format", "json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


def changed(values, **changes):
    """The values with others at dotted paths, written a__b."""
    values = deepcopy(values)
    for path, value in changes.items():
        *above, key = path.split("__")
        table = values
        for part in above:
            table = table[int(part)] if part.isdecimal() else table[part]
        table[key] = value
    return values


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_hand(
    folder, gold, proxy=(0.4, 0.5, 0.6), *, cpu=2.0, cuda=None, earlier=None, clip=0.1, name="hand",
    **changes,
):  # fmt: skip
    """A finished run of 4 steps evaluated at 0, 2 and 4; each step takes ``cpu`` seconds."""
    folder.mkdir(parents=True)
    values = changed(VALUES, **changes)
    about = {"recipe": name, "values": values, "environment": {"cuda": cuda}}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "summary.json").write_text(json.dumps({"earlier": earlier}))
    evaluations = [
        {"step": step, "prompts": 8, "learned": p, "gold": g, "gold/part": g / 2}
        for step, g, p in zip((0, 2, 4), gold, proxy, strict=True)
    ]
    for at in (0, -1):
        evaluations[at]["swapped:gold"] = evaluations[at]["gold"] - 0.25
    steps = range(1, values["steps"] + 1)
    write_lines(folder / "evaluation.jsonl", evaluations if values["steps"] else evaluations[:1])
    write_lines(
        folder / "metrics.jsonl",
        [
            {"step": step, "network_calls": 100, "calls_per_image": 8.0, "tokens": 10 * step,
             "text/clip_fraction": 0.5, "image/clip_fraction": clip,
             **({"image/grad_cosine": 0.1 * step} if step % 2 else {})}
            for step in steps
        ],
    )  # fmt: skip
    timing = [
        {"step": s, "text_s": 0.5, "update_s": 1.0, "wall_s": 1.75, "cpu_s": cpu} for s in steps
    ]
    write_lines(folder / "timing.jsonl", timing)
    return folder


@pytest.fixture
def grid(tmp_path):
    """joint with three seeds; plain with two, twice as slow, whose image clip never acted."""
    for seed, gold in GOLD.items():
        by_hand(tmp_path / f"joint/seed-{seed}", gold, seed=seed)
    for seed in (0, 2):
        by_hand(
            tmp_path / f"a_plain/seed-{seed}", (0.5, 0.5, 0.4), (0.4, 0.6, 0.8), seed=seed,
            cpu=4.0, clip=0.0, image__regularizers=[],
        )  # fmt: skip
    return tmp_path


def cell(data, name):
    return next(cell for cell in data["cells"] if cell["cell"] == name)


# --- figures ----------------------------------------------------------------------------------


def test_what_is_chosen(found, grid):
    data = found(grid)
    assert (data["metric"], data["proxy"], data["against"]) == ("gold", "learned", "joint")
    assert data["at"] == {"kind": "final", "where": None}
    assert [(c["cell"], c["seeds"]) for c in data["cells"]] == [
        ("a_plain", [0, 2]),
        ("joint", [0, 1, 2]),
    ]


def test_the_monitor_of_most_cells_is_the_gold(found, compare, grid):
    """Also where the first cell, a control, is trained on the gold and monitors the proxy."""
    by_hand(
        grid / "a_control/seed-0", GOLD[0], rewards=[{"use": "gold", "weight": 1.0}],
        monitors=[{"use": "learned"}],
    )  # fmt: skip
    data = found(grid)
    assert (data["cells"][0]["cell"], data["metric"], data["proxy"]) == (
        "a_control",
        "gold",
        "learned",
    )
    by_hand(grid / "z/seed-0", GOLD[0], rewards=[{"use": "gold/part"}, {"use": "learned"}])
    data = found(grid)
    assert "the proxy is learned; also trained on: gold/part (--proxy NAME)" in data["notes"]
    assert found(grid, "--proxy", "gold/part")["proxy"] == "gold/part"


def test_start_final_best_and_gain(found, grid):
    gold = cell(found(grid), "joint")["metrics"]["gold"]
    assert gold["start"]["mean"] == 0.5
    assert gold["final"]["values"] == [0.8, 0.7, 0.6]
    assert gold["final"]["mean"] == pytest.approx(0.7)
    assert gold["final"]["se"] == pytest.approx(0.1 / sqrt(3))
    assert gold["final"]["bootstrap"] == pytest.approx([0.6, 0.8])
    assert gold["gain"]["mean"] == pytest.approx(0.2)
    plain = cell(found(grid), "a_plain")["metrics"]["gold"]
    assert (plain["best"]["step"], plain["best"]["mean"]) == (0, 0.5)
    assert plain["gain"]["mean"] == pytest.approx(-0.1)


def test_differences_are_paired_by_the_seeds_that_both_have(found, grid):
    data = found(grid)
    difference = cell(data, "a_plain")["metrics"]["gold"]["difference"]
    assert difference["seeds"] == [0, 2]
    assert difference["values"] == pytest.approx([-0.4, -0.2])
    assert difference["mean"] == pytest.approx(-0.3)
    assert difference["se"] == pytest.approx(0.1)
    assert difference["t"] == pytest.approx([-0.3 - 1.2706205, -0.3 + 1.2706205], abs=1e-5)
    assert cell(data, "joint")["metrics"]["gold"]["difference"] is None
    assert any("paired by the seeds that both have: 0, 2 only" in note for note in data["notes"])
    other = found(grid, "--against", "a_plain")
    assert cell(other, "joint")["metrics"]["gold"]["difference"]["mean"] == pytest.approx(0.3)


def test_at_a_step_between_evaluations(found, grid):
    gold = cell(found(grid, "--at", "step:3"), "joint")["metrics"]["gold"]
    assert gold["at"]["values"] == pytest.approx([0.7, 0.7, 0.7])
    assert gold["gain"]["mean"] == pytest.approx(0.2)


def test_at_equal_seconds(found, grid):
    """joint ends after 8 s, a_plain after 16 s: at 8 s it is at step 2."""
    data = found(grid, "--at", "cpu:min")
    assert data == found(grid, "--at", "seconds:min")
    assert data["at"] == {"kind": "seconds", "where": 8.0}
    assert cell(data, "joint")["metrics"]["gold"]["at"]["values"] == [0.8, 0.7, 0.6]
    assert cell(data, "a_plain")["metrics"]["gold"]["at"]["values"] == [0.5, 0.5]
    learned = cell(found(grid, "--at", "cpu:6"), "a_plain")["metrics"]["learned"]
    assert learned["at"]["values"] == pytest.approx([0.55, 0.55])  # at step 1.5


def test_a_cell_that_never_gets_there(found, compare, grid):
    data = found(grid, "--at", "cpu:12")
    joint = cell(data, "joint")["metrics"]["gold"]
    assert (joint["at"], joint["gain"]) == (None, None)
    assert "joint: no gold at 12.0 s: seed 0 ends at 8.0 s" in data["notes"]
    _, out, _ = compare(grid, "--at", "step:5")
    assert "note: joint: no gold at step 5: it ends at step 4" in out
    assert next(line for line in out.splitlines() if line.startswith("joint")).split()[-1] == "-"


def test_at_the_best_step_of_each_cell(found, grid):
    data = found(grid, "--at", "best")
    assert cell(data, "a_plain")["metrics"]["gold"]["at"]["mean"] == 0.5
    best = cell(data, "joint")["metrics"]["gold"]
    assert (best["best"]["step"], best["at"]) == (2, {k: best["best"][k] for k in best["at"]})


def test_an_untrained_cell_stands_still(found, grid):
    by_hand(grid / "none/seed-0", (0.5, 0.5, 0.5), steps=0, train=[])
    data = found(grid, "--at", "cpu:min")
    assert data["at"]["where"] == 8.0
    none = cell(data, "none")
    assert none["metrics"]["gold"]["at"]["mean"] == 0.5
    assert (none["cost"]["seconds"]["mean"], none["cost"]["tokens"]["mean"]) == (0.0, 0.0)
    assert none["clip"] == {}


def test_cost_signal_and_clip(found, compare, grid):
    data = found(grid)
    joint, plain = cell(data, "joint"), cell(data, "a_plain")
    assert joint["cost"]["unit"] == "cpu"
    assert (joint["cost"]["seconds"]["mean"], plain["cost"]["seconds"]["mean"]) == (8.0, 16.0)
    assert joint["cost"]["network_calls"]["mean"] == 400
    assert joint["cost"]["calls_per_image"]["mean"] == 8
    assert joint["cost"]["tokens"]["mean"] == 100
    assert joint["signal"]["image"]["mean"] == pytest.approx(0.2)  # of steps 1 and 3
    assert "text" not in joint["signal"]
    assert (joint["unclipped"], plain["unclipped"]) == ([], ["image"])
    assert "! the image clip never acted, in no step of any seed: a_plain" in data["notes"]
    assert "\na_plain !  " in compare(grid)[1]


def test_stages_before_are_added(found, compare, grid):
    before = {"steps": 4, "train_cpu_s": 5.0, "network_calls": 50, "tokens": 7}
    for seed in (0, 1):
        by_hand(
            grid / f"second/seed-{seed}", (0.9, 0.9, 0.9), seed=seed, earlier=before,
            start=f"/first/seed-{seed}",
        )  # fmt: skip
    data = found(grid)
    cost = cell(data, "second")["cost"]
    assert (cost["seconds"]["mean"], cost["network_calls"]["mean"]) == (13.0, 450)
    assert (cost["tokens"]["mean"], cost["staged"]) == (107, True)
    assert "13.0+" in compare(grid)[1]
    data = found(grid, "--at", "cpu:4")
    assert cell(data, "second")["metrics"]["gold"]["at"] is None
    assert "second: no gold at 4.0 s: the stages before took 5.0 s" in data["notes"]


def test_on_a_gpu_seconds_are_those_of_the_wall(found, compare, tmp_path):
    before = {"train_cpu_s": 1.0, "train_wall_s": 3.0, "network_calls": 0, "tokens": 0}
    by_hand(
        tmp_path / "run", GOLD[0], cuda="H100", compute__device="auto", earlier=before, start="/x"
    )
    cost = found(tmp_path)["cells"][0]["cost"]
    assert (cost["unit"], cost["seconds"]["mean"]) == ("gpu", 10.0)
    assert " 10.0+ (GPU) " in compare(tmp_path)[1]


def test_stages_that_are_not_on_record_are_told(found, compare, tmp_path):
    by_hand(tmp_path / "run", GOLD[0], start="/gone")
    data = found(tmp_path)
    assert data["notes"] == [
        "hand: what the stages before took is not on record (train s, network calls, tokens): the "
        "files of its runs cover the last stage only"
    ]
    [only] = data["cells"]
    assert (only["cost"]["seconds"], only["cost"]["tokens"]) == (None, None)
    assert only["runs"][0]["seconds"] is None
    _, out, _ = compare(tmp_path, "--at", "seconds:4", "--figure", tmp_path / "a.svg")
    cost = out[out.index("cost per run") :].splitlines()[2]
    assert cost.split() == ["hand", "-", "8", "-", "-", "-", "+0.20"]
    assert "no gold at 4.0 s: the seconds of the stages before are not on record" in out


def test_a_cost_that_one_stage_lacks_is_not_zero(found, tmp_path):
    before = {"train_cpu_s": 5.0, "network_calls": None, "tokens": 7}
    by_hand(tmp_path / "run", GOLD[0], start="/first", earlier=before)
    data = found(tmp_path)
    cost = data["cells"][0]["cost"]
    assert (cost["network_calls"], cost["tokens"]["mean"]) == (None, 107)
    assert "not on record (network calls)" in data["notes"][0]


def test_views_have_a_table_of_their_own(found, compare, grid):
    data = found(grid)
    assert data["views"] == ["swapped"]
    assert cell(data, "a_plain")["metrics"]["swapped:gold"]["final"]["mean"] == pytest.approx(0.15)
    lines = compare(grid)[1].splitlines()
    at = lines.index("final gold by view")
    assert lines[at + 1].split() == ["cell", "evaluation", "swapped"]
    assert lines[at + 2].split()[:5] == ["a_plain", "!", "0.400", "±", "0.000"]
    data = found(grid, "--metric", "swapped:gold", "--at", "step:2")
    assert cell(data, "joint")["metrics"]["swapped:gold"]["at"] is None
    assert any("evaluated at the start and the end only" in note for note in data["notes"])
    data = found(grid, "--metric", "swapped:gold", "--at", "step:4")  # which needs no line
    assert cell(data, "joint")["metrics"]["swapped:gold"]["at"]["mean"] == pytest.approx(0.45)


# --- cells ------------------------------------------------------------------------------------


def test_cells_of_one_name_bear_what_they_differ_in(found, tmp_path):
    for number, weight in enumerate((0.003, 0.01)):
        by_hand(tmp_path / f"hand-{number}", GOLD[0], image__regularizers__0__weight=weight)
    by_hand(tmp_path / "hand-2", GOLD[0], image__regularizers=[])
    by_hand(tmp_path / "hand-3", GOLD[0], image__lr=1e-4, name="else")
    assert [c["cell"] for c in found(tmp_path)["cells"]] == [
        'hand use="velocity_mse" weight=0.003 regularizers=-',
        'hand use="velocity_mse" weight=0.01 regularizers=-',
        "hand use=- weight=- regularizers=[]",
        "else",
    ]


def test_tails_are_as_long_as_they_must_be(found, tmp_path):
    by_hand(tmp_path / "hand-1", GOLD[0])
    by_hand(tmp_path / "hand-2", GOLD[0], image__lr=1e-4, text__lr=1e-5)
    labels = [c["cell"] for c in found(tmp_path)["cells"]]
    assert labels == ["hand text.lr=0.001 image.lr=0.001", "hand text.lr=1e-05 image.lr=0.0001"]


def test_another_plugin_file_makes_another_cell(found, tmp_path):
    for number, sha in enumerate(("a1b2c3d4e5", "ffffffff00")):
        file = by_hand(tmp_path / f"hand-{number}", GOLD[number]) / "run.json"
        about = json.loads(file.read_text()) | {"plugin_file": {"file": "p.py", "sha256": sha}}
        file.write_text(json.dumps(about))
    labels = [c["cell"] for c in found(tmp_path)["cells"]]
    assert labels == ['hand plugin_file="a1b2c3d4"', 'hand plugin_file="ffffffff"']


def test_other_first_stages_make_other_cells(found, tmp_path):
    for stage in ("image", "text"):
        for seed in (0, 1):
            by_hand(
                tmp_path / f"{stage}_first/second/seed-{seed}", GOLD[seed], seed=seed,
                start=f"/runs/{stage}/seed-{seed}",
            )  # fmt: skip
    by_hand(
        tmp_path / "z/second/seed-7", GOLD[0], seed=7, start="/other/seed-7",
        after="recipes/image.toml",
    )  # fmt: skip
    by_hand(tmp_path / "z/second/seed-8", GOLD[0], seed=8, start="/b", after="elsewhere/image.toml")
    assert [(c["cell"], c["seeds"]) for c in found(tmp_path)["cells"]] == [
        ('second start="/runs/image"', [0, 1]),
        ('second start="/runs/text"', [0, 1]),
        ('second start="image"', [7, 8]),
    ]


def test_rows_of_a_swept_axis_are_in_the_order_of_numbers(found, tmp_path):
    for text in ("10", ".5", "2", "1e-05", "-1"):
        by_hand(tmp_path / f"a,lr={text}/seed-0", GOLD[0], image__lr=float(text))
    for seed in (10, 9):
        by_hand(tmp_path / f"b/seed-{seed}", GOLD[0], seed=seed)
    labels = [c["cell"] for c in found(tmp_path)["cells"]]
    assert labels == ["a,lr=-1", "a,lr=1e-05", "a,lr=.5", "a,lr=2", "a,lr=10", "b"]


def test_linked_folders_are_followed(found, tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        by_hand(tmp_path / f"disk/{seed}", GOLD[seed], seed=seed)
    (runs / "joint").mkdir(parents=True)
    for seed in (0, 1):
        (runs / f"joint/seed-{seed}").symlink_to(tmp_path / f"disk/{seed}")
    (runs / "joint/round").symlink_to(runs)
    assert [(c["cell"], c["seeds"]) for c in found(runs)["cells"]] == [("joint", [0, 1])]


def test_the_same_run_twice_is_counted_once(found, grid):
    by_hand(grid / "again/seed-1", GOLD[1], seed=1, title="another title")
    data = found(grid, grid / "joint")
    joint = cell(data, "joint")
    assert joint["seeds"] == [0, 1, 2]
    told = [note for note in data["notes"] if "counted once" in note]
    assert len(told) == 1
    assert "again/seed-1 and " in told[0]
    assert "again and joint have the same values: they are one cell, joint" in data["notes"]


# --- metrics ----------------------------------------------------------------------------------


def evaluated(folder, **metrics):
    """Adds metrics to a run, each with one value for the three evaluations."""
    file = folder / "evaluation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row.update(metrics)
    write_lines(file, rows)


def test_a_monitor_called_like_a_reward(found, tmp_path):
    """Its metric is learned#2, and that is the gold, not what was trained on."""
    folder = by_hand(
        tmp_path / "run", GOLD[0], rewards=[{"use": "learned", "weight": 1.0, "checkpoint": "a"}],
        monitors=[{"use": "learned", "checkpoint": "b"}],
    )  # fmt: skip
    evaluated(folder, **{"learned#2": 0.125})
    data = found(tmp_path)
    assert (data["metric"], data["proxy"]) == ("learned#2", "learned")
    assert data["cells"][0]["metrics"]["learned#2"]["final"]["mean"] == 0.125


def test_a_monitor_that_is_a_reward_too_is_the_gold(found, tmp_path):
    gold = {"use": "gold", "checkpoint": "a"}
    by_hand(
        tmp_path / "run", GOLD[0], monitors=[gold],
        rewards=[{"use": "learned", "weight": 1.0}, gold | {"weight": 0.5}],
    )  # fmt: skip
    assert (found(tmp_path)["metric"], found(tmp_path)["proxy"]) == ("gold", "learned")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"monitors": [{"use": "gold", "model": {"size": 2}}]}, "model.size of gold is absent in "),
        ({"rewards": [{"use": "learned", "strict": True}]}, "strict of learned is absent in "),
    ],
)
def test_another_reward_behind_the_same_name(compare, grid, change, told):
    by_hand(grid / "z/seed-0", GOLD[0], **change)
    err = refused(compare, grid)
    assert f"these runs cannot be compared: {told}" in err
    assert "a_plain/seed-0, but " in err
    assert err.rstrip().endswith("z/seed-0")


def test_options_of_what_is_not_shown_may_differ(found, grid):
    by_hand(
        grid / "z/seed-0", GOLD[0], rewards=[*VALUES["rewards"][:1], {"use": "other", "strict": 1}]
    )
    assert len(found(grid)["cells"]) == 3


def with_plugins(folder, source, version="1"):
    about = json.loads((folder / "run.json").read_text())
    about["plugins"] = {"unigrpo": version, "unigrpo_plugins.py": "-"}
    about["plugin_file"] = {"file": "p.py", "sha256": sha256(source.encode()).hexdigest()}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "unigrpo_plugins.py").write_text(source)


def test_a_metric_of_another_plugin_file(compare, found, tmp_path):
    for number, version in enumerate(("1", "2")):
        folder = by_hand(tmp_path / f"{number}/seed-0", GOLD[0], image__lr=float(number + 1))
        with_plugins(folder, f"Provider('gold', {version})", version)
    err = refused(compare, tmp_path)
    assert "cannot be compared: the plugin file unigrpo_plugins.py of gold is " in err
    data = found(tmp_path, "--metric", "learned")  # which is of no plugin file
    notes = "\n".join(data["notes"])
    assert f"unigrpo differs between runs: 1 in {tmp_path}/0/seed-0, 2 in {tmp_path}/1" in notes
    assert "unigrpo_plugins.py differs between runs: " in notes
    (tmp_path / "1/seed-0/unigrpo_plugins.py").write_text("(")  # nothing can be known of it
    assert "unigrpo_plugins.py of learned is absent in " in refused(
        compare, tmp_path, "--metric", "learned"
    )


def test_first_evaluations_differ_by_the_size_of_the_metric(compare, found, tmp_path):
    for number, value in enumerate((500.0, 504.0, 506.0)):
        folder = by_hand(tmp_path / f"{number}/seed-0", GOLD[0], image__lr=float(number + 1))
        evaluated(folder, big=value, small=value / 1e6)
    err = refused(compare, tmp_path, "--metric", "big")
    assert "first evaluation's big is 500.0 in " in err
    assert "2/seed-0. The first evaluations differ: other weights behind the same name" in err
    assert len(found(tmp_path / "0", tmp_path / "1", "--metric", "big")["cells"]) == 2
    data = found(tmp_path)
    assert any("first evaluations also differ in big: " in note for note in data["notes"])


# --- refusals ---------------------------------------------------------------------------------


def refused(compare, *words, code=1):
    got, out, err = compare(*words)
    assert (got, out) == (code, "")
    assert "Traceback" not in err
    return err


def test_one_seed_with_two_results(compare, grid):
    by_hand(grid / "again/seed-1", GOLD[2], seed=1)
    err = refused(compare, grid)
    assert "again/seed-1 and " in err
    assert "joint/seed-1 have the same values and seed 1, but different results" in err


@pytest.mark.parametrize(
    ("key", "change", "one", "two"),
    [
        ("policy.checkpoint", {"policy__checkpoint": "/else"}, '"/somewhere"', '"/else"'),
        ("source.path", {"source__path": "p.txt"}, "absent", '"p.txt"'),
        ("evaluation.prompts", {"evaluation__prompts": 9}, "8", "9"),
        ("evaluation.scheduler.steps", {"evaluation__scheduler": {"steps": 3}}, "absent", "3"),
        ("image.size", {"image__size": [8, 8]}, "[8, 12]", "[8, 8]"),
        ("text.max_tokens", {"text__max_tokens": 7}, "6", "7"),
        ("text.temperature", {"text__temperature": 0.5}, "1.0", "0.5"),
        ("compute.precision", {"compute__precision": "bf16"}, '"float32"', '"bf16"'),
        ("evaluation.episode", {"episode": ["draw"]}, '["think", "draw"]', '["draw"]'),
    ],
)
def test_runs_of_another_world(compare, grid, key, change, one, two):
    by_hand(grid / "z/seed-0", GOLD[0], **change)
    err = refused(compare, grid)
    assert f"these runs cannot be compared: {key} is {one} in " in err
    assert f"a_plain/seed-0, but {two} in " in err
    assert err.rstrip().endswith("z/seed-0")


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation__sheet": 6},
        {"evaluation__every": 4},
        {"episode": ["draw"], "evaluation__episode": ["think", "draw"]},
    ],
)
def test_what_may_differ(found, grid, change):
    by_hand(grid / "z/seed-0", GOLD[0], **change)
    assert len(found(grid)["cells"]) == 3


def test_another_model_behind_the_same_name(compare, found, grid):
    other = by_hand(grid / "z/seed-0", (0.52, 0.6, 0.7), image__lr=1.0)
    err = refused(compare, grid)
    assert "the first evaluation's gold is 0.5 in " in err
    assert "other weights behind the same name, or a metric that is not deterministic" in err
    run = json.loads((other / "run.json").read_text())
    run["values"]["start"] = "/first"
    (other / "run.json").write_text(json.dumps(run))
    assert len(found(grid)["cells"]) == 3


def test_another_number_of_prompts(compare, grid):
    folder = by_hand(grid / "z/seed-0", GOLD[0])
    file = folder / "evaluation.jsonl"
    file.write_text(file.read_text().replace('"prompts": 8', '"prompts": 7'))
    assert "prompts evaluated is [8, 8] in " in refused(compare, grid)


def test_folders_without_a_run(compare, tmp_path):
    assert "holds no run: expected a run folder" in refused(compare, tmp_path)
    assert "no such folder" in refused(compare, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is no folder" in refused(compare, tmp_path / "file")


def test_unfinished_runs(compare, found, grid):
    (grid / "joint/seed-1/summary.json").unlink()
    err = refused(compare, grid)
    assert "joint/seed-1 is not finished (it has no summary.json)" in err
    assert "--skip-unfinished" in err
    data = found(grid, "--skip-unfinished")
    assert cell(data, "joint")["seeds"] == [0, 2]
    assert any("joint/seed-1 is not finished and left out" in note for note in data["notes"])
    assert "no run is finished" in refused(compare, grid / "joint/seed-1", "--skip-unfinished")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.json", "{", "run.json is damaged: "),
        ("run.json", "[]", "run.json is damaged: expected a JSON object"),
        ("run.json", '{"recipe": "x"}', "run.json is damaged: it lacks 'values'"),
        ("run.json", json.dumps({"recipe": "x", "values": {}}), "run.json is damaged: it lacks "),
        ("summary.json", '{"earlier": 3}', "summary.json is damaged: "),
        ("timing.jsonl", '{"step": 1}\n', "timing.jsonl:1 is damaged: it lacks 'cpu_s'"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl is damaged: its rows are not those of 4"),
        ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl:2 is damaged: "),
        ("metrics.jsonl", '{"step": 1, "tokens": "x"}', "metrics.jsonl:1 is damaged: 'tokens' is"),
        ("evaluation.jsonl", '{"step": 0, "gold": NaN}', "evaluation.jsonl:1 is damaged: NaN is"),
        ("evaluation.jsonl", '{"step": 0, "prompts": 8}', "evaluation.jsonl is damaged: its rows"),
        ("evaluation.jsonl", "", "evaluation.jsonl is damaged: its rows are not those of 4 steps"),
    ],
)
def test_damaged_files(compare, grid, name, text, told):
    (grid / "joint/seed-1" / name).write_text(text)
    assert told in refused(compare, grid)


def test_a_file_that_is_gone(compare, grid):
    (grid / "joint/seed-1/metrics.jsonl").unlink()
    assert "metrics.jsonl cannot be read: No such file" in refused(compare, grid)


def test_seeds_of_one_cell_evaluated_at_different_steps(compare, grid):
    file = grid / "joint/seed-1/evaluation.jsonl"
    first, _, last = file.read_text().splitlines(keepends=True)
    file.write_text(first + last)
    assert "was evaluated at different steps" in refused(compare, grid)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--metric", "gould"), "--metric gould: no run has this metric; did you mean 'gold'?"),
        (("--proxy", "lerned"), "--proxy lerned: no run has this metric; did you mean 'learned'?"),
        (("--against", "joynt"), "--against joynt: no such cell; did you mean 'joint'?"),
        (
            ("--at", "step:x"),
            "--at step:x: expected final, best, step:N, seconds:N, seconds:min, cpu:N or cpu:min",
        ),
        (("--at", "cpu:-1"), "--at cpu:-1: expected"),
        (("--at", "cpu:nan"), "--at cpu:nan: expected"),
        (("--at", "cpu:inf"), "--at cpu:inf: expected"),
        (("--figure", "a.pdf"), "--figure a.pdf: expected a name that ends in .svg or .png"),
        (("--figure", "nowhere/a.svg"), "--figure nowhere/a.svg: nowhere is no folder"),
    ],
)
def test_words_that_mean_nothing(compare, grid, words, told):
    assert told in refused(compare, grid, *words, code=2)


def test_seconds_of_a_cpu_and_a_gpu_are_not_compared(compare, found, grid):
    by_hand(grid / "z/seed-0", GOLD[0], cuda="H100", compute__device="auto")
    for at in ("cpu:2", "seconds:min"):
        assert "some runs were on a CPU" in refused(compare, grid, "--at", at, code=2)
    assert any("their seconds cannot be compared" in note for note in found(grid)["notes"])


def test_seconds_of_a_gpu_are_asked_for_by_their_general_name(compare, found, tmp_path):
    by_hand(tmp_path / "run", GOLD[0], cuda="H100", compute__device="auto")
    err = refused(compare, tmp_path, "--at", "cpu:min", code=2)
    assert "on a GPU, where the seconds that count are those of the wall; take --at seconds" in err
    assert found(tmp_path, "--at", "seconds:min")["at"] == {"kind": "seconds", "where": 7.0}


# --- formats ----------------------------------------------------------------------------------


def test_csv_has_every_figure_with_its_values(compare, grid):
    code, out, err = compare(grid, "--format", "csv")
    assert (code, "note: ! the image clip" in err) == (0, True)
    rows = list(csv.DictReader(StringIO(out)))
    assert {row["figure"] for row in rows} == {
        "start", "final", "best", "at", "gain", "difference", "cpu_seconds", "network_calls",
        "calls_per_image", "tokens", "signal_image", "largest_clip_text", "largest_clip_image",
    }  # fmt: skip
    [final] = [
        row
        for row in rows
        if (row["cell"], row["figure"], row["metric"]) == ("joint", "final", "gold")
    ]
    assert (final["step"], final["n"], final["seeds"]) == ("4", "3", "0 1 2")
    assert [float(value) for value in final["values"].split()] == [0.8, 0.7, 0.6]
    assert float(final["bootstrap_low"]) == pytest.approx(0.6)


def test_json_has_the_runs_themselves(found, grid):
    joint = cell(found(grid), "joint")
    run = joint["runs"][2]
    assert (run["seed"], run["seconds"], run["earlier"]) == (2, 8.0, None)
    assert run["evaluations"][1]["gold"] == 0.8
    assert joint["values"]["image"]["lr"] == 1e-3


def test_markdown(compare, grid):
    lines = compare(grid, "--format", "markdown")[1].splitlines()
    assert lines[0] == "**gold on 8 held-out prompts**"
    assert lines[2].startswith(
        "| cell | seeds | steps | start | final | bootstrap | t 95 % | best | of step |"
    )
    assert lines[3] == "| --- |" + " --: |" * 9
    assert lines[5] == (
        "| joint | 3 | 4 | 0.500 | 0.700 ± 0.058 | [0.600, 0.800] | [0.452, 0.948] "
        "| 0.700 ± 0.058 | 2 "
        "| +0.200 ± 0.058 |"
    )
    at = lines.index("**proxy learned against gold gold, start > final**")
    assert lines[at + 5].startswith("| joint | 0.400 > 0.600 ± 0.000 | +0.200 ± 0.000 | 0.500 > ")


def test_intervals_say_what_they_are_over(compare, found, grid):
    _, out, _ = compare(grid)
    assert "note: intervals are over the seeds alone" in out
    assert "95 %" not in out.replace("t 95 %", "")
    _, out, _ = compare(grid, "--at", "step:3", "--format", "markdown")
    assert "| best | of step | step 3 | bootstrap | t 95 % | gain at step 3 |" in out
    assert "**gold at step 3, minus that of joint, by seed**" in out
    one = grid / "joint/seed-0"
    _, out, _ = compare(one)
    assert "intervals" not in out
    assert "bootstrap" not in out


def test_an_output_of_other_letters(grid):
    by_hand(grid / "größe/seed-0", GOLD[0], image__lr=0.5)
    for shape in ("table", "markdown", "csv", "json"):
        done = subprocess.run(
            [sys.executable, "-m", "unigrpo_core", "compare", str(grid), "--format", shape],
            env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, "a bug" in done.stderr) == (0, False)
        if shape == "json":
            assert cell(json.loads(done.stdout), "größe")
        else:
            assert "gr\\xf6\\xdfe" in done.stdout
        if shape in ("table", "markdown"):
            assert "0.700 +- 0.058" in done.stdout


# --- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["gold", "learned"])
def test_figures_are_the_same_every_time(compare, grid, metric):
    names = ("a.svg", "b.svg", "a.png", "b.png")
    options = [word for name in names for word in ("--figure", grid / name)]
    assert compare(grid, "--metric", metric, *options)[0] == 0
    one, two, three, four = ((grid / name).read_bytes() for name in names)
    assert one == two
    assert three == four
    assert three.startswith(b"\x89PNG")
    assert b">joint<" in one  # text is text
    assert b"<dc:date>" not in one
    assert (b">start<" in one) == (metric == "gold")
    assert not list(grid.glob(".part*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--at", "step:2"), (b">at step 2; bars: standard error<",)),
        (
            ("--at", "step:2", "--metric", "learned"),
            (b">at step 2; bars: bootstrap over seeds<", b">learned at step 2<"),
        ),
        (("--metric", "learned"), (b">final; bars: bootstrap over seeds<", b">final learned<")),
    ],
)
def test_figures_are_of_the_place_asked_for(compare, grid, words, told):
    assert compare(grid, *words, "--figure", grid / "a.svg")[0] == 0
    drawn = (grid / "a.svg").read_bytes()
    assert all(text in drawn for text in told)


def test_the_right_panel_shows_the_values_of_that_place(found, grid):
    """joint: gold 0.7 at steps 2 and 4, so only its spread tells them apart."""
    from matplotlib.figure import Figure

    from unigrpo_core.ablation import comparison, figure
    from unigrpo_core.ablation.cells import to_cells
    from unigrpo_core.ablation.choice import At
    from unigrpo_core.ablation.reading import read_runs

    cells, _ = to_cells(read_runs([grid], skip_unfinished=False)[0])
    compared = comparison.compare(cells, at=At("step", 2))
    axes = Figure().subplots()
    figure._frontier(axes, compared, "learned")
    drawn = [tuple(bar[0].get_xydata()[0]) for bar in axes.containers]
    assert drawn == [pytest.approx((0.6, 0.5)), pytest.approx((0.5, 0.7))]
    axes = Figure().subplots()
    figure._finals(axes, compared)
    assert axes.containers[0][0].get_xdata() == pytest.approx([0.5])


def test_without_matplotlib(compare, grid, monkeypatch):
    from unigrpo_core.ablation import figure

    there = importlib.util.find_spec
    monkeypatch.setattr(
        figure, "find_spec", lambda name: None if name == "matplotlib" else there(name)
    )
    err = refused(compare, grid, "--figure", grid / "a.svg")
    assert err == "--figure needs matplotlib: pip install 'unigrpo[figures]'\n"
    assert compare(grid)[0] == 0


def test_nothing_heavy_is_loaded(grid):
    driver = (
        "import sys; from unigrpo_core.cli import main; heavy = set(sys.argv[1].split(','));"
        "\ntry: code = main(sys.argv[2:])\nexcept SystemExit as done: code = done.code\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else code)"
    )
    for heavy, words in (
        ("torch,numpy,matplotlib", ["compare", "--help"]),
        ("torch,transformers,matplotlib", ["compare", str(grid)]),
        ("torch,transformers,matplotlib.pyplot", ["compare", str(grid), "--figure", "a.png"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", driver, heavy, *words], cwd=grid, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


# --- real runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory, checkpoint):
    """Two cells with two seeds each."""
    import tiny

    folder = tmp_path_factory.mktemp("real")
    for name, override in (("joint", "image.lr=1e-3"), ("text", "train=['text']")):
        for seed in (0, 1):
            tiny.run(folder, checkpoint, f"seed={seed}", override, name=f"{name}/seed-{seed}")
    return folder


def test_real_runs(found, real):
    data = found(real)
    assert [(c["cell"], c["seeds"]) for c in data["cells"]] == [("joint", [0, 1]), ("text", [0, 1])]
    assert (data["metric"], data["proxy"]) == ("random", None)
    for item in data["cells"]:
        for place, run in enumerate(item["runs"]):
            folder = real / item["cell"] / f"seed-{run['seed']}"
            summary = json.loads((folder / "summary.json").read_text())
            random = item["metrics"]["random"]
            assert random["start"]["values"][place] == summary["before"]["random"]
            assert random["final"]["values"][place] == summary["after"]["random"]
            assert run["seconds"] == pytest.approx(summary["train_cpu_s"], abs=0.01)
    assert set(cell(data, "text")["clip"]) == {"text"}


def test_every_shape_of_real_runs(compare, real):
    for shape in ("table", "markdown", "csv", "json"):
        for at in ("final", "best", "step:1", "cpu:min"):
            code, out, _ = compare(real, "--format", shape, "--at", at)
            assert code == 0
            assert "joint" in out
    single = real / "joint" / "seed-0"
    code, out, err = compare(single)
    assert (code, err) == (0, "")
    assert "minus" not in out
