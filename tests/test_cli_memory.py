"""``check --memory``: its counts are those of a real run, its bytes those of real tensors."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fake_plugin import RECIPE, fake_catalog

from unigrpo_core import cli
from unigrpo_core.catalog import Catalog
from unigrpo_core.cli import memory
from unigrpo_core.engine.update import Updater
from unigrpo_core.recipe.workload import workload

PROMPT = 9  # tokens; of no matter where a micro-batch holds everything, or one point

GUIDED = "image.guidance={use='cfg', scale=2.0, interval=[0.4, 0.9]}"
ANCHORED = "image.regularizers=[{use='velocity_mse', weight=0.1}]"
AVERAGE = "image.regularizers=[{use='velocity_mse', weight=0.1, anchor='ema'}]"
FRESH = "image.objective={use='awm', times=5}"
AVERAGED = ANCHORED.replace("weight", "anchor='ema', weight")
ODE, SAMPLES = "image.scheduler={use='ode', steps=4}", "ema={decay=0.5, slope=0.1, sample=true}"
NFT, FPO = "image.objective={use='diffusion_nft', times=2}", "image.objective={use='fpo'}"
REFL = "image.objective={use='refl'}"
TURNS = "updates.turns={text=1, image=1}"
WHOLE, SPLIT = "compute.replay_tokens=100000", "compute.replay_tokens=1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def account(tmp_path, checkpoint):
    def account(*overrides):
        return memory.take(tiny.recipe(tmp_path, checkpoint, *overrides), PROMPT)

    return account


# --- network calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (WHOLE, "steps=2"),
        (WHOLE, GUIDED, ANCHORED, "steps=2"),
        (SPLIT, GUIDED, ANCHORED, "prompts=2"),
        (SPLIT, GUIDED, "prompts=2", "updates={count=2, data='repeat'}", "text.regularizers=[]"),
        (
            WHOLE,
            GUIDED,
            "group.fan_out=[2, 3]",
            "image.noise_scope='thought'",
            "compute.rollout_images=4",
        ),
        (WHOLE, ANCHORED, "episode=['draw']", "train=['image']", "group.fan_out=[3]"),
        (WHOLE, "train=['text']"),
        (SPLIT, "ema={decay=0.5, sample=true}", "prompts=2", AVERAGE),
        (WHOLE, FRESH, "image.scheduler={use='ode', steps=3}"),
        (WHOLE, "updates.turns={text=1, image=1}", "steps=2"),
        (WHOLE, NFT, ODE, SAMPLES, "steps=2"),
        (SPLIT, NFT, ODE, SAMPLES, "prompts=2", "updates={count=2, data='repeat'}"),
        (WHOLE, FPO, ODE, GUIDED, ANCHORED, "steps=2"),
        (WHOLE, AVERAGED, "ema.decay=0.5", "steps=2"),
        (WHOLE, ANCHORED, TURNS, "steps=3"),
        (WHOLE, REFL, ODE, "rewards=[{use='brightness'}]"),
    ],
    ids=[
        *("plain", "anchored", "split", "repeat", "branching", "draw", "text"),
        *("split average", "more fresh", "two turns"),
        *("sampled by the average", "repeat by the average", "fresh", "average", "turns", "score"),
    ],
)
def test_network_calls_are_those_of_a_run(tmp_path, checkpoint, account, overrides):
    quiet = ("evaluation.final_prompts=1", "evaluation.every=0", "evaluation.scheduler.steps=1")
    once = () if {"steps=2", "steps=3"} & {*overrides} else ("steps=1",)
    options = (*overrides, *once, *quiet)
    rows = tiny.lines(tiny.run(tmp_path, checkpoint, *options))
    found = account(*options)
    expected = [one.total for one in found.calls]
    looks = [place for place, one in enumerate(found.calls) if one.first_step]
    if looks:  # at the reference, in the first step that trains images
        expected[looks[0]] += found.calls[looks[0]].first_step
    assert expected == [row["network_calls"] for row in rows]
    assert [one.sampling / found.images for one in found.calls] == [
        row["calls_per_image"] for row in rows
    ]


@pytest.mark.parametrize("budget", [1, 20, 60, 61, 200, 10**6])
def test_micro_batches_are_the_engine_s(tmp_path, checkpoint, budget):
    options = ("group.fan_out=[2, 3]", f"compute.replay_tokens={budget}")
    setup = tiny.setup(tmp_path, checkpoint, *options)
    load = workload(setup.recipe, PROMPT)
    data = replace(tiny.train_set(setup), sizes=(load.context,) * load.rows)
    theirs = data.micro_batches(torch.arange(load.rows), budget)
    assert [(b.rows, b.columns.start, b.columns.stop) for b in load.micro_batches(8, 8)] == [
        (len(b.rows), b.columns.start, b.columns.stop) for b in theirs
    ]


@pytest.mark.parametrize("name", ["flow_sde", "ode"])
@pytest.mark.parametrize("grid", ["linear", "diffusers"])
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 2.0), (24, 3.0)])
def test_times_without_torch_are_the_times(name, grid, terminal, steps, shift):
    provider = tiny.catalog().find("scheduler", name).provider
    scheduler = provider.build(provider.options(grid=grid, shift_terminal=terminal))
    plain = scheduler.plain_times(steps, shift)
    np.testing.assert_allclose(plain, scheduler.times(steps, shift), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_cfg_says_without_torch_where_it_guides(scale):
    provider = tiny.catalog().find("guidance", "cfg").provider
    guidance = provider.build(provider.options(scale=scale, interval=(0.1, 0.7)))
    times = [0.0, 0.1, 0.1000001, 0.3, 0.7, 0.7000001, 1.0]
    active = guidance.active(torch.tensor(times, dtype=torch.float64).float()).tolist()
    assert [guidance.guides(time) for time in times] == active


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["['text', 'image']", "['image']"])
def test_weights_gradients_and_moments_are_as_large_as_the_tensors(tmp_path, checkpoint, train):
    options = (f"train={train}", ANCHORED, "ema={decay=0.5, sample=true}", "steps=1")
    setup = tiny.setup(tmp_path, checkpoint, *options)
    updater, gradients = Updater(setup), []
    trained = [p for parameters in updater.experts.values() for p in parameters]
    updater.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(p.grad.nbytes for p in trained if p.grad is not None))
    )
    updater(tiny.train_set(setup))
    moments = [
        value.nbytes
        for state in updater.optimizer.state.values()
        for key, value in state.items()
        if key.startswith("exp_avg")
    ]
    everything = list(setup.policy.root.parameters())
    now = {p.data_ptr() for p in everything}
    copied = {}
    for kept in ("reference", "ema"):
        with setup.policy.weights(kept):
            copied[kept] = sum(p.nbytes for p in everything if p.data_ptr() not in now)
    real = {
        "weights": sum(p.nbytes for p in everything),
        "reference": copied["reference"],
        "moving average": copied["ema"],
        "gradients": gradients[0],
        "optimizer": sum(moments),
    }
    found = memory.take(tiny.recipe(tmp_path, checkpoint, *options), PROMPT)
    assert {part.name: part.bytes for part in found.memory if part.name in real} == real


def test_what_takes_more_and_what_less(account):
    def bytes_of(*overrides):
        return {part.name: part.bytes for part in account(*overrides).memory}

    plain = bytes_of()
    assert "reference" not in plain
    assert bytes_of("optimizer.signal_every=1")["gradients"] == 2 * plain["gradients"]
    assert bytes_of(SPLIT)["activations"] < plain["activations"]
    coarse = bytes_of("compute.precision='bf16'", "train=['image']")
    assert coarse["weights"] < plain["weights"]
    assert coarse["cast weights"] > 0


def test_old_values_and_anchors_of_an_average(account):
    def work(*overrides):
        return {name: work.flops for name, work in account(*overrides).work.items()}

    plain = work()
    assert work(SAMPLES)["old values"] == 2 * plain["old values"]
    averaged = AVERAGED, "ema.decay=0.5"
    assert work(*averaged)["moving average"] == work(ANCHORED)["reference"] > 0
    assert {"moving average", "reference"}.isdisjoint(plain)


def test_what_cannot_be_known_before(account):
    assert not [line for line in account().assumptions if "group.equal" in line]
    *_, dropped = account("group.equal='resample'").assumptions
    assert dropped.endswith('as group.equal = "resample" will')
    *_, turned = account(TURNS).assumptions
    assert "both experts" in turned


def test_the_device_holds_the_larger_of_rollout_and_update(account):
    found = account()
    rollout, update = found.peak("rollout"), found.peak("update")
    assert found.total == max(rollout, update)
    held = [part.bytes for part in found.memory if part.held == "always"]
    assert sum(held) < min(rollout, update)


# --- placement that a recipe may state --------------------------------------------------------


class Options:
    """Policy options with adapters."""

    def __init__(self, checkpoint, **more):
        self.checkpoint = str(checkpoint)
        self.__dict__.update(more)


def test_adapters_checkpointing_and_a_reference_on_the_host(tmp_path, checkpoint):
    from unigrpo_models.bagel.account import account

    recipe = tiny.recipe(tmp_path, checkpoint, ANCHORED).recipe
    load = workload(recipe, PROMPT)
    full = account(Options(checkpoint), load)
    hosted = account(Options(checkpoint), replace(load, reference_on="host"))
    copy = next(part.bytes for part in full.memory if part.name == "reference")
    assert (hosted.host, full.peak("update") - hosted.peak("update")) == (copy, copy)
    adapters = {"lora_rank": 2, "lora_text": ("q_proj",), "lora_image": ("q_proj_moe_gen",)}
    light = account(Options(checkpoint, **adapters), load)
    parts = {part.name: part.bytes for part in light.memory}
    trained = 2 * 2 * 2 * (32 + 32)  # experts x layers x rank x (in + out)
    assert (parts["gradients"], parts["optimizer"]) == (4 * trained, 8 * trained)
    assert "reference" not in parts  # it is the model without them
    assert parts["weights"] == 4 * trained + next(p.bytes for p in full.memory)
    kept = {
        mode: next(
            part.bytes
            for part in account(Options(checkpoint), replace(load, checkpointing=mode)).memory
            if part.name == "activations"
        )
        for mode in ("none", "selective", "full")
    }
    assert kept["full"] < min(kept["selective"], kept["none"])
    assert kept["selective"] != kept["none"]


# --- the published model, and the step that was planned for it --------------------------------


def test_the_floors_of_a_planned_step(tmp_path):
    """8 prompts x 4 thoughts x 512 tokens, 512 px, 24 steps, window 3, 2 disjoint updates on one
    H200, in seconds; the plan counts no padding of the text to a multiple of 128."""
    recipe = tiny.recipe(
        tmp_path,
        tmp_path / "nowhere",
        *("prompts=8", "group.fan_out=[4, 1]", "text.max_tokens=512", "image.size=[512, 512]"),
        *("image.scheduler.steps=24", "image.window={use='random', size=3, range=[0, 5]}"),
        *("compute.precision='bf16'", "text.regularizers=[]", ANCHORED),
    )
    found = memory.as_json(memory.take(recipe, 88))
    floors = {name: work["h200_seconds"] for name, work in found["work"].items()}
    plan = {
        "writing": 1.76,
        "denoising": 13.67,
        "reference": 2.03,
        "old values": 1.03,
        "forward and backward": 6.20,
        "optimizer": 0.22,
    }
    assert {name: floors[name] for name in plan} == pytest.approx(plan, rel=0.02)
    assert found["model"] == "BAGEL-7B-MoT"
    assert "nowhere is not there yet" in found["assumptions"][0]
    weights = {part["name"]: part["bytes"] for part in found["memory"]}
    assert weights["optimizer"] == pytest.approx(113.2e9, rel=1e-3)


def test_the_account_that_the_docs_show(tmp_path, checkpoint):
    page = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    [block] = [b for b in page.split("```") if b.startswith("python\n") and "def account" in b]
    (tmp_path / "shown.py").write_text(block.removeprefix("python\n"))
    names = runpy.run_path(str(tmp_path / "shown.py"))
    found = names["account"](None, workload(tiny.recipe(tmp_path, checkpoint).recipe, PROMPT))
    assert found.total == 16 * names["PARAMETERS"]
    assert found.work["denoising"].flops == 48 * 2 * names["PARAMETERS"] * names["LATENTS"]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(cli.check, "load_catalog", tiny.catalog)

    def run(*argv):
        code = cli.main(argv)
        return code, *capsys.readouterr()

    return run


def test_the_table(run, tmp_path, checkpoint):
    file = tiny.recipe_file(tmp_path, checkpoint)
    code, out, err = run("check", str(file), "--memory", "--prompt-tokens", "9")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:2] == ["ok", "tiny"]
    assert ["sampling", "48"] in lines
    assert ["sampling", "an", "image", "4.0"] in lines
    for word in ("weights", "optimizer", "gradients", "activations", "cache", "device"):
        assert any(line[:1] == [word] and line[2][-1:] == "B" for line in lines), word
    assert "a prompt takes 9;" in out
    assert "every thought has 6 tokens" in out


def test_json(run, tmp_path, checkpoint):
    file = tiny.recipe_file(tmp_path, checkpoint)
    code, out, _ = run("check", str(file), str(tmp_path / "gone.toml"), "--memory", "--json")
    good, bad = json.loads(out)
    assert (code, "memory" in bad) == (2, False)
    found = good["memory"]
    assert found["total_bytes"] == max(found["rollout_bytes"], found["update_bytes"])
    assert found["network_calls"]["per_image"] == 4
    assert {"name", "bytes", "held", "note"} == set(found["memory"][0])
    plain = json.loads(run("check", str(file), "--json")[1])
    assert "memory" not in plain[0]


def test_a_policy_without_an_account_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.check, "load_catalog", fake_catalog)
    (tmp_path / "fake.toml").write_text(RECIPE)
    code, out, _ = run("check", str(tmp_path / "fake.toml"), "--memory")
    assert code == 0
    assert "policy 'unified' of fakes 1.2 has no account of what it takes" in out


@pytest.mark.parametrize("account", [lambda options, load: 1 / 0, lambda options, load: 7])
def test_a_policy_whose_account_fails_is_named(run, tmp_path, monkeypatch, account):
    catalog = tiny.catalog()
    old = catalog.find("policy", "bagel")
    provider = replace(old.provider, account=account)
    items = [i if i is not old else replace(old, provider=provider) for i in catalog.components]
    monkeypatch.setattr(cli.check, "load_catalog", lambda: Catalog(tuple(items)))
    file = tiny.recipe_file(tmp_path, tmp_path)
    code, out, _ = run("check", str(file), "--memory")
    assert code == 3
    assert "policy 'bagel' of unigrpo 0.1.0" in out.splitlines()[-1]


def test_an_image_that_the_model_does_not_draw(run, tmp_path, checkpoint):
    file = tiny.recipe_file(tmp_path, checkpoint)
    code, out, _ = run("check", str(file), "--memory", "--set", "image.size=[8, 13]")
    assert (code, "an image side of 13" in out) == (1, True)


@pytest.mark.parametrize("wrong", ["0", "-1", "many"])
def test_a_wrong_number_of_tokens(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "no_cfg_mse", "--memory", "--prompt-tokens", wrong])
    assert stop.value.code == 2
    assert "should be a number of tokens" in capsys.readouterr().err


def test_no_torch_even_under_guidance():
    code = (
        "import sys; from unigrpo_core.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    argv = [sys.executable, "-c", code, "check", "cfg_mse", "--memory"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "network calls" in done.stdout
