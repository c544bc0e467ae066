"""Training: what is byte-identical, what moves, and how losses are accounted for."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import final_weights, is_image, lines, train_set

from unigrpo_core.engine.update import Updater
from unigrpo_core.errors import PluginError, UserError

RESULTS = ("metrics.jsonl", "evaluation.jsonl", "final/ema.safetensors", "final/llm_config.json")


def digests(run):
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in RESULTS}


def moved(run, checkpoint):
    """Names of the weights that a run has changed."""
    start = load_file(checkpoint / "ema.safetensors")
    return {n for n, x in final_weights(run).items() if not torch.equal(x, start[n])}


def change(run, checkpoint, expert):
    """All changes of one expert's weights, as one vector."""
    start, end = load_file(checkpoint / "ema.safetensors"), final_weights(run)
    names = [n for n in sorted(end) if is_image(n) == (expert == "image")]
    return torch.cat([(end[n] - start[n]).double().flatten() for n in names])


@pytest.fixture
def train(tmp_path, checkpoint):
    def run(name, *overrides):
        return tiny.run(tmp_path, checkpoint, *overrides, name=name)

    run.folder = tmp_path
    return run


# --- determinism ------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(train):
    bright = "rewards=[{use='brightness'}]"
    first, again = train("first", bright), train("again", bright)
    assert digests(first) == digests(again)
    other = train("other", bright, "seed=1")
    differing = {n for n in RESULTS if digests(first)[n] != digests(other)[n]}
    assert differing == {*RESULTS} - {"final/llm_config.json"}


def test_a_failed_run_leaves_nothing_behind_in_the_process(train, checkpoint, tmp_path):
    """State outside of a run (torch's generator, another run that broke) changes nothing."""
    first = train("first")
    torch.manual_seed(123)
    with pytest.raises(PluginError):
        train("broken", "rewards=[{use='faulty', fault='raise'}]")
    assert digests(train("again")) == digests(first)


def test_evaluation_draws_do_not_depend_on_the_seed(train):
    """Before anything is trained, runs of any seed score the same."""
    for name in ("0", "1"):
        train(name, f"seed={name}", "steps=1", "rewards=[{use='brightness'}, {use='word'}]")
    one, other = (lines(Path(train.folder) / n, "evaluation.jsonl")[0] for n in ("0", "1"))
    assert one == other


def test_the_final_folder_reproduces_the_last_evaluation(train, tmp_path):
    rewards = "rewards=[{use='brightness'}, {use='word', weight=0.5}]"
    run = train("run", rewards)
    again = train("again", rewards, f"start='{run}'", "steps=0", "train=[]")
    last, found = lines(run, "evaluation.jsonl")[-1], lines(again, "evaluation.jsonl")[0]
    assert last["step"] == 2
    assert found == {**last, "step": 0}
    first = lines(run, "evaluation.jsonl")[0]
    assert first["brightness"] != last["brightness"]
    start, end = final_weights(run), final_weights(again)
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_start_continues_from_another_runs_weights(train):
    run = train("run", "steps=1")
    more = train("more", "steps=1", f"start='{run}'", "seed=5")
    one, other = lines(run, "evaluation.jsonl")[-1], lines(more, "evaluation.jsonl")[0]
    assert {**one, "step": 0} == other


# --- what is trained --------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [("text",), ("image",), ("text", "image")])
def test_frozen_experts_do_not_change(train, checkpoint, experts):
    run = train("run", f"train={json.dumps(list(experts))}")
    changed = moved(run, checkpoint)
    assert {"image" if is_image(name) else "text" for name in changed} == set(experts)
    assert "latent_pos_embed.pos_embed" not in changed
    figures = lines(run)[-1]
    for expert in ("text", "image"):
        assert (f"{expert}/loss" in figures) == (expert in experts)
        assert (f"{expert}/grad_norm" in figures) == (expert in experts)


def test_every_weight_of_an_expert_can_move(train, checkpoint):
    """Except what no image or thought can reach."""
    untouched = set(final_weights(train("run"))) - moved(train.folder / "run", checkpoint)
    last = "language_model.model.layers.1"
    # Of the last layer's boundary tokens only keys and values are read; text uses all of it.
    assert untouched <= {"latent_pos_embed.pos_embed"}, sorted(untouched)
    assert f"{last}.mlp_moe_gen.down_proj.weight" not in untouched


def test_frozen_experts_get_no_gradient(setup):
    built = setup("train=['image']")
    data = train_set(built)
    updater = Updater(built)
    seen = {}
    for name, parameter in built.policy.root.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g, name=name: seen.__setitem__(name, g))
    updater(data)
    assert seen
    assert all(is_image(name) for name in seen)
    assert all(p.grad is None for n, p in built.policy.root.named_parameters() if not is_image(n))


def test_an_episode_that_only_draws(train, checkpoint):
    run = train(
        "run",
        "episode=['draw']",
        "train=['image']",
        "group.fan_out=[4]",
        "rewards=[{use='brightness'}]",
        "image.regularizers=[{use='velocity_mse', weight=0.01}]",
    )
    assert all(map(is_image, moved(run, checkpoint)))
    figures = lines(run)
    assert len(figures) == 2
    assert figures[0]["images"] == 16
    assert "tokens" not in figures[0]
    assert not any(name.startswith(("text/", "gap/text")) for name in figures[0])


def test_an_episode_that_only_thinks_learns_to_say_a_word(train, checkpoint):
    run = train(
        "run",
        "episode=['think']",
        "train=['text']",
        "group.fan_out=[16]",
        "rewards=[{use='word', word='red'}]",
        "steps=12",
        "text.lr=5e-3",
        "evaluation.every=0",
    )
    assert not any(map(is_image, moved(run, checkpoint)))
    figures = lines(run)
    assert not any("image" in name for name in figures[0])
    assert figures[-1]["reward"] > figures[0]["reward"] + 0.15


def test_drawing_learns_to_be_bright(train):
    run = train(
        "run",
        "episode=['draw']",
        "train=['image']",
        "group.fan_out=[16]",
        "rewards=[{use='brightness'}]",
        "steps=12",
        "image.lr=3e-3",
        "image.objective={use='flow_grpo', ratio_norm=true, clip_radius=5e-2}",
        "evaluation.every=0",
    )
    figures = lines(run)
    assert figures[-1]["reward"] > figures[0]["reward"] + 0.02


def test_context_gradient_off_leaves_text_to_its_own_loss(train, checkpoint):
    """With the text loss at weight 0 the text expert moves only through the context."""
    alone = ("text.weight=0.0", "steps=1")
    with_context = train("with", *alone)
    without = train("without", *alone, "image.context_gradient=false")
    assert any(not is_image(name) for name in moved(with_context, checkpoint))
    assert all(map(is_image, moved(without, checkpoint)))
    assert lines(without)[0]["text/grad_norm"] == 0
    assert lines(without)[0]["image/grad_norm"] > 0


# --- updates ----------------------------------------------------------------------------------


def test_one_update_has_nothing_to_clip(train):
    figures = lines(train("run", "updates.count=1", "steps=1"))[0]
    for expert in ("text", "image"):
        assert figures[f"{expert}/clip_fraction"] == 0
        # The first forward gives the old values itself, so every ratio is exactly 1.
        assert figures[f"{expert}/ratio_deviation"] == 0


def test_repeat_trains_twice_on_everything(train, checkpoint):
    repeat = train("repeat", "updates.data='repeat'", "steps=1", "prompts=3")
    once = train("once", "updates.count=1", "steps=1", "prompts=3")
    figures = lines(repeat)[0]
    assert figures["image/ratio_deviation"] > 0
    assert figures["text/ratio_deviation"] > 0
    gaps = [{k: v for k, v in lines(r)[0].items() if k.startswith("gap/")} for r in (repeat, once)]
    assert gaps[0] == gaps[1]
    assert digests(repeat)["final/ema.safetensors"] != digests(once)["final/ema.safetensors"]


def test_disjoint_updates_each_take_their_share_of_the_prompts(setup):
    """The second update's prompts get no gradient in the first, and the old values of all are
    from before it."""
    built = setup("updates.count=2", "prompts=4")
    data = train_set(built)
    rows = []
    built.policy.root.register_forward_hook(
        lambda m, arguments, replay: rows.append(
            (replay.logps.requires_grad, [p.id for p in arguments[0].prompts])
        )
    )
    Updater(built)(data)
    trained = [set(ids) for gradient, ids in rows if gradient]
    names = list(dict.fromkeys(prompt.id for prompt in data.prompts))
    assert trained == [set(names[:2]), set(names[2:])]
    first = next(i for i, (gradient, _) in enumerate(rows) if gradient)
    before = {name for gradient, ids in rows[:first] for name in ids if not gradient}
    assert set(names[2:]) <= before


# --- losses -----------------------------------------------------------------------------------


def test_regularizers_are_not_scaled_by_lambda(setup):
    """With both losses at weight 0 the gradient is the penalties' own, times their weight."""
    norms = []
    for weight in (0.1, 0.2):
        built = setup(
            "updates.count=1",
            "image.weight=0.0",
            "text.weight=0.0",
            f"image.regularizers=[{{use='velocity_mse', weight={weight}}}]",
            f"text.regularizers=[{{use='text_kl', weight={weight}}}]",
        )
        updater = Updater(built)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from the reference, where penalties have no gradient
            for owned in built.policy.parameters().values():
                for parameter in owned.values():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        norms.append(updater(train_set(built)))
    for expert, name in (("image", "velocity_mse"), ("text", "text_kl")):
        one, two = (figures[f"{expert}/{name}"] for figures in norms)
        assert one == pytest.approx(two)
        assert one > 0
        one, two = (figures[f"{expert}/grad_norm"] for figures in norms)
        assert two == pytest.approx(2 * one, rel=1e-3)
        assert one > 0


def test_penalties_start_at_exactly_zero(train):
    figures = lines(
        train(
            "run",
            "steps=1",
            "updates.count=1",
            "image.regularizers=[{use='velocity_mse', weight=0.1}, {use='latent_kl', weight=0.1}]",
            "text.regularizers=[{use='text_kl', weight=0.1}]",
        )
    )[0]
    for name in ("image/velocity_mse", "image/latent_kl", "text/text_kl"):
        assert figures[name] == 0


def test_a_strong_penalty_holds_the_image_expert(train, checkpoint):
    """The reference is what the run started from, at every step."""
    shape = ("steps=6", "rewards=[{use='brightness'}]", "train=['image']", "evaluation.every=0")
    free = train("free", *shape)
    held = train("held", *shape, "image.regularizers=[{use='velocity_mse', weight=1000.0}]")
    lengths = [float(change(run, checkpoint, "image").norm()) for run in (free, held)]
    assert lengths[1] < 0.8 * lengths[0]


# --- the optimizer ----------------------------------------------------------------------------

LINEAR = (
    "steps=1", "updates.count=1", "optimizer.eps=1.0", "text.lr=1.0", "image.lr=1.0",
    "image.weight=1e4", "text.weight=1e2", "image.context_gradient=false",
)  # fmt: skip


def test_each_expert_is_clipped_on_its_own(train, checkpoint):
    """With eps = 1 a first Adam step on a gradient g is g / (|g| + 1), so about g when small."""
    bound = 1e-2
    run = train("run", *LINEAR, f"optimizer.max_grad_norm={bound}")
    figures = lines(run)[0]
    for expert in ("text", "image"):
        assert figures[f"{expert}/grad_norm"] > 10 * bound
        length = float(change(run, checkpoint, expert).norm())
        assert length == pytest.approx(bound, rel=2e-2)
    alone = train("alone", *LINEAR, f"optimizer.max_grad_norm={bound}", "text.weight=1e-6")
    torch.testing.assert_close(
        change(alone, checkpoint, "image"), change(run, checkpoint, "image"), atol=1e-7, rtol=1e-3
    )


def test_learning_rates_are_per_expert(train, checkpoint):
    base = ("steps=1", "updates.count=1")
    run = train("run", *base, "text.lr=1e-3", "image.lr=1e-5")
    # Adam's first step has the size of the learning rate, element by element.
    assert float(change(run, checkpoint, "text").abs().max()) == pytest.approx(1e-3, rel=1e-2)
    assert float(change(run, checkpoint, "image").abs().max()) == pytest.approx(1e-5, rel=1e-1)


def test_warm_up_raises_the_rate_by_updates(train, checkpoint):
    base = ("steps=1", "updates.count=1")
    full = train("full", *base)
    first = train("first", *base, "optimizer.warmup_updates=4")
    for expert in ("text", "image"):
        a, b = change(full, checkpoint, expert), change(first, checkpoint, expert)
        torch.testing.assert_close(b, a / 4, atol=3e-8, rtol=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run(train, tmp_path):
    with pytest.raises(UserError, match="is not finite"):
        train("run", "text.weight=1e38", "text.lr=1e-3", "image.weight=1e38")


# --- the run folder ---------------------------------------------------------------------------


def test_run_json_says_what_ran(train):
    run = train("run", "steps=0", "train=[]")
    record = json.loads((run / "run.json").read_text())
    assert record["values"]["seed"] == 0
    assert len(record["hash"]) == 64
    assert record["plugins"]["unigrpo"]
    assert record["environment"]["libraries"]["torch"].startswith(torch.__version__[:3])
    assert not (run / "metrics.jsonl").exists()


def test_metrics_hold_no_times(train):
    run = train("run", "steps=1")
    assert not any(name.endswith("_s") or "time" in name for name in lines(run)[0])
    assert {"text_s", "image_s", "reward_s", "update_s"} <= lines(run, "timing.jsonl")[0].keys()


# --- CUDA -------------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path

import tiny
from safetensors.torch import save_file

from unigrpo_core.engine import experience, loop

folder, checkpoint, out = (Path(sys.argv[number]) for number in (1, 2, 4))
device = sys.argv[3]
found, original = [], experience.sample


def sample(*arguments):
    found.append(original(*arguments))
    return found[-1]


experience.sample = sample
resolved = tiny.recipe(folder, checkpoint, f"compute.device='{device}'", "evaluation.every=0")
run = loop.Run(resolved, folder / device, tiny.Silent())
assert all(p.device.type == device for p in run.setup.policy.root.parameters())
run()
assert len(found) == 2
for number, (text, image) in enumerate((tiny.text_of(r), tiny.image_of(r)) for r in found):
    stored = {
        "tokens": text.tokens, "mask": text.mask, "logps": text.logps,
        "x_t": image.x_t, "x_next": image.x_next, "mean": image.old_mean,
        "t": image.t, "t_next": image.t_next, "level": image.noise_level,
        "latents": image.latents,
    }
    stored = {name: x.cpu().contiguous() for name, x in stored.items()}
    save_file(stored, out / f"{number}.safetensors")
"""


@pytest.mark.gpu
def test_two_steps_on_cuda_draw_what_the_cpu_draws(tmp_path, checkpoint):
    """Draws are the same to the bit; what is computed from them agrees to rounding. Each device
    in a process of its own, since accelerate settles on one."""
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"of-{device}"
        out.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        arguments = [str(tmp_path), str(checkpoint), device, str(out)]
        subprocess.run(
            [sys.executable, "-c", DRIVER, *arguments], check=True, env=environment, timeout=600
        )
        found[device] = [load_file(out / f"{number}.safetensors") for number in range(2)]
        assert len(lines(tmp_path / device)) == 2
    scheduler = tiny.setup(tmp_path, checkpoint).training.scheduler
    for step, (cpu, cuda) in enumerate(zip(found["cpu"], found["cuda"], strict=True)):
        for name in ("t", "t_next", "level"):
            assert torch.equal(cpu[name], cuda[name]), name
        for one in (cpu, cuda):
            transition = scheduler.transition(
                torch.zeros_like(one["x_t"]), one["x_t"], one["t"], one["t_next"], one["level"]
            )
            one["noise"] = (one["x_next"] - one["mean"]) / transition.std
        # The noise of every stochastic step, recovered from what is stored.
        torch.testing.assert_close(cuda["noise"], cpu["noise"], atol=1e-5, rtol=1e-4)
        if cpu["t"][0, 0] == 1:
            assert torch.equal(cuda["x_t"][:, 0], cpu["x_t"][:, 0])
        if step == 0:  # the same weights: all the same but for rounding
            width = min(cpu["tokens"].shape[1], cuda["tokens"].shape[1])
            assert torch.equal(cuda["mask"][:, :width], cpu["mask"][:, :width])
            mask = cpu["mask"]
            assert torch.equal(cuda["tokens"][mask], cpu["tokens"][mask])
            torch.testing.assert_close(cuda["logps"][mask], cpu["logps"][mask], atol=1e-3, rtol=0)
            torch.testing.assert_close(cuda["latents"], cpu["latents"], atol=1e-2, rtol=1e-2)
    cpu, cuda = (lines(tmp_path / device)[0] for device in ("cpu", "cuda"))
    assert cuda["reward"] == pytest.approx(cpu["reward"], abs=1e-6)
    assert cuda["text/loss"] == pytest.approx(cpu["text/loss"], abs=1e-3)
