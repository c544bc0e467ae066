"""Faults planted in sampler, trainer and model: each is caught, and its likely cause is named."""

import json
from dataclasses import replace

import pytest
import torch
import unigrpo_models.bagel.policy as bagel
from tiny import Silent, image_of, recipe, recipe_file, text_of, with_segment
from unigrpo_board.prompts import BoardPrompts
from unigrpo_models.weights import WeightSets

from unigrpo_core import cli
from unigrpo_core.engine import experience, loop, rollout
from unigrpo_core.engine.diagnosis import NETWORK
from unigrpo_core.engine.selfcheck import self_check
from unigrpo_core.errors import PluginError, UserError

ALONE = ("train=['image']", "episode=['draw']", "group.fan_out=[3]")


@pytest.fixture
def stopped(monkeypatch, tmp_path, checkpoint):
    """The message that stops a run of one step in which ``sampled`` changes what was sampled for
    training, or ``broken`` the parts. Nothing may have been trained, unless it had to be."""

    def stopped(*overrides, sampled=None, broken=None, trained=False):
        original = experience.sample

        def sample(setup, prompts, plan, key, *more):
            found = original(setup, prompts, plan, key, *more)
            return sampled(found, setup) if sampled else found

        monkeypatch.setattr(experience, "sample", sample)
        run = loop.Run(
            recipe(tmp_path, checkpoint, "steps=1", *overrides), tmp_path / "run", Silent()
        )
        if broken:
            broken(run.setup)
        before = {name: p.clone() for name, p in run.setup.policy.root.named_parameters()}
        with pytest.raises(UserError) as caught:
            run()
        after = run.setup.policy.root.named_parameters()
        assert all(torch.equal(p, before[name]) for name, p in after) is not trained
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return str(caught.value)

    return stopped


# --- sampler against trainer ------------------------------------------------------------------


def asked_at(time):
    """A trainer that takes other times than it is given."""

    def broken(setup):
        def change(module, arguments):
            (batch,) = arguments
            return (replace(batch, t=time(batch.t)),)

        setup.policy.root.register_forward_pre_hook(change)

    return broken


def answering(change):
    """A trainer whose answer is changed."""

    def broken(setup):
        def answer(module, arguments, replay):
            return replace(replay, **change(replay))

        setup.policy.root.register_forward_hook(answer)

    return broken


def one_step_late(found, setup):
    """A rollout that stores the times of the step after the one it took."""
    image, grid = image_of(found), torch.tensor(setup.training.times)
    step = (image.t[..., None] - grid).abs().argmin(-1) + 1
    return with_segment(found, t=grid[step], t_next=grid[step + 1])


def one_step_early(found, setup):
    image, grid = image_of(found), torch.tensor(setup.training.times)
    step = (image.t[..., None] - grid).abs().argmin(-1) - 1
    return with_segment(found, t=grid[step], t_next=grid[step + 1])


def another_noise_level(found, setup):
    return with_segment(found, noise_level=image_of(found).noise_level * 1.05)


def another_sde(found, setup):
    """A rollout whose drift has another factor, as SDEs with other noise have."""
    image = image_of(found)
    moved = image.x_t + 1.02 * (image.old_mean - image.x_t)
    return with_segment(found, old_mean=moved, x_next=image.x_next + moved - image.old_mean)


def special_token(found, setup):
    tokens = text_of(found).tokens.clone()
    tokens[-1, 0] = 3
    return with_segment(found, tokens=tokens)


def padding_counted(found, setup):
    assert not text_of(found).mask.all()
    return with_segment(found, mask=torch.ones_like(text_of(found).mask))


def other_rows(found, setup):
    text = text_of(found)
    return with_segment(found, tokens=text.tokens.roll(3, 0), mask=text.mask.roll(3, 0))


def other_later(found, setup):
    """As if the cache had gone wrong after the first token."""
    logps = text_of(found).logps.clone()
    logps[:, 1:] *= 1.01
    return with_segment(found, logps=logps)


def network_differs(replay):
    return {"velocities": replay.velocities * torch.linspace(0.99, 1.01, 48)}


def shifted_mean(found, setup):
    return with_segment(found, old_mean=image_of(found).old_mean + 1e-3)


def other_time(found, setup):
    return with_segment(found, t=image_of(found).t * 0.99)


def other_temperature(found, setup):
    return with_segment(found, logps=text_of(found).logps * 1.001)


OF_TEXT = (special_token, padding_counted, other_rows, other_later, other_temperature)
STORED = {
    "mean": (shifted_mean, NETWORK),
    "time": (other_time, NETWORK),
    "temperature": (other_temperature, "thoughts differ from their first token on"),
    "late": (one_step_late, "off by one: at the previous step", "image.window.range=[0, 2]"),
    "early": (one_step_early, "off by one: at the next step", "image.window.range=[1, 3]"),
    "noise level": (another_noise_level, "the velocities agree, but not what is made of them"),
    "SDE": (another_sde, "the velocities agree, but not what is made of them"),
    "special token": (special_token, "1 thoughts hold a token that the trainer gives no prob"),
    "padding": (padding_counted, "a stored log-prob of exactly 0: padding was counted"),
    "rows": (other_rows, "thoughts differ from their first token on"),
    "later": (other_later, "thoughts differ, but not from their first token on"),
}


@pytest.mark.parametrize("fault", STORED)
@pytest.mark.parametrize("updates", [1, 2])
def test_what_was_stored_wrongly_is_told(stopped, fault, updates):
    sampled, cause, *overrides = STORED[fault]
    said = stopped(f"updates.count={updates}", *overrides, sampled=sampled)
    assert "sampler and trainer disagree" in said
    assert ("delta log p" in said) is (sampled in OF_TEXT)
    assert said.count("likely cause: ") == 1
    assert cause in said.partition("likely cause: ")[2]


def test_the_message_has_the_figures_by_time(stopped):
    said = stopped(sampled=shifted_mean)
    assert "max |log-ratio| of images is" in said
    assert "allowed" in said
    assert said.count("\n  t = ") == 2


COMPUTED = {
    "time": (asked_at(lambda t: 1 - t), "time is flipped"),
    "sign": (answering(lambda r: {"velocities": -r.velocities}), "the sign of the velocity"),
    "network": (answering(network_differs), NETWORK),
}


@pytest.mark.parametrize("fault", COMPUTED)
@pytest.mark.parametrize("guidance", ["none", "cfg"])
def test_what_the_trainer_computes_otherwise_is_told(stopped, fault, guidance):
    broken, cause = COMPUTED[fault]
    said = stopped(f"image.guidance={{use='{guidance}'}}", *ALONE, broken=broken)
    if guidance == "cfg" and fault != "time":
        cause = NETWORK  # only the conditional velocity was spoiled
    assert f"likely cause: {cause}" in said


def test_a_trainer_that_does_not_agree_with_itself(stopped):
    """As with dropout: no two replays are alike."""

    def noisy(replay):
        return {"velocities": replay.velocities + 1e-3 * torch.randn_like(replay.velocities)}

    assert "the trainer's own image log-ratio, twice, is" in stopped(broken=answering(noisy))


def test_a_clip_below_the_noise_floor_is_told(stopped):
    said = stopped("image.objective.clip_radius=1e-9")
    assert "likely cause: everything agrees up to rounding, so the clip range is below" in said


def test_a_model_that_has_diverged_is_told(stopped):
    def broken(found, setup):
        x_next = image_of(found).x_next.clone()
        x_next[-1, -1, 0, 0, 0] = float("nan")
        return with_segment(found, x_next=x_next)

    assert "likely cause: a stored latent, mean or velocity is not" in stopped(sampled=broken)


# --- draws, weights, gradients ----------------------------------------------------------------


def test_noise_shared_across_episodes(stopped, monkeypatch):
    original = rollout.normals
    monkeypatch.setattr(
        rollout, "normals", lambda keys, *rest: original([keys[0]] * len(keys), *rest)
    )
    said = stopped(*ALONE)
    assert "the draws of different episodes are the same: images 0 and 1 got the same noise" in said


def test_a_source_that_repeats_an_id(tmp_path, checkpoint, monkeypatch):
    original = BoardPrompts.train

    def train(self, seed, start, count):
        return tuple(replace(prompt, id="same") for prompt in original(self, seed, start, count))

    monkeypatch.setattr(BoardPrompts, "train", train)
    with pytest.raises(PluginError, match="returned the prompt id 'same' more than once for step"):
        loop.Run(recipe(tmp_path, checkpoint), tmp_path / "run", Silent())


def test_uniforms_shared_across_episodes(stopped, monkeypatch):
    original = bagel.uniforms
    monkeypatch.setattr(
        bagel, "uniforms", lambda keys, *rest: original([keys[0]] * len(keys), *rest)
    )
    assert "all thoughts of a prompt are alike, by chance 1 time in e^" in stopped()


@pytest.mark.parametrize("rate", ["1e-6", "1e-2"])
def test_weights_too_coarse_for_their_learning_rate(monkeypatch, tmp_path, checkpoint, rate):
    original = bagel.read_tensors
    monkeypatch.setattr(
        bagel,
        "read_tensors",
        lambda *arguments: {name: x.bfloat16() for name, x in original(*arguments).items()},
    )
    resolved = recipe(tmp_path, checkpoint, f"text.lr={rate}", "train=['text']")
    with pytest.raises(UserError, match=r"would train \S+ in torch.bfloat16, whose") as caught:
        loop.Run(resolved, tmp_path / "run", Silent())
    verb = "gets lost" if rate == "1e-6" else "can get lost"
    assert f"a step of the learning rate {float(rate):.0e} {verb} between them" in str(caught.value)


@pytest.mark.parametrize(
    ("expert", "change", "overrides"),
    [
        ("image", lambda r: {"velocities": r.velocities.detach()}, ALONE),
        ("text", lambda r: {"logps": r.logps.detach()}, ("train=['text']",)),
        ("text", lambda r: {"logps": r.logps.detach()}, ("image.context_gradient=false",)),
    ],
)
def test_an_expert_that_trains_nothing(stopped, expert, change, overrides):
    said = stopped(*overrides, broken=answering(change))
    assert f"no gradient reaches the {expert} expert, though its advantages are not all 0" in said


def test_a_reference_that_is_trained_along(stopped, monkeypatch):
    def keep(self, name, decay=None):
        self._kept[name] = {key: p.data for key, p in self._parameters.items()}

    monkeypatch.setattr(WeightSets, "keep", keep)
    said = stopped("image.regularizers=[{use='velocity_mse', weight=1.0}]", trained=True)
    assert "the reference moved with the first update" in said


# --- the self-check ---------------------------------------------------------------------------


def findings(tmp_path, checkpoint, *overrides):
    return {item.name: item for item in self_check(recipe(tmp_path, checkpoint, *overrides))}


def test_a_healthy_recipe_is_fine(tmp_path, checkpoint):
    found = findings(tmp_path, checkpoint, "image.regularizers=[{use='velocity_mse', weight=1.0}]")
    assert all(item.ok for item in found.values())
    assert {
        *("model", "prompts", "samples", "reward random", "text groups", "image groups"),
        *("text, sampler against trainer", "images, sampler against trainer", "the trainer, twice"),
        *("text gradient", "text step", "image gradient", "image step", "reference"),
    } == found.keys()


def test_a_constant_reward_is_wrong(tmp_path, checkpoint):
    found = findings(tmp_path, checkpoint, "rewards=[{use='fixed', values=[0.5]}]")
    for expert in ("text", "image"):
        item = found[f"{expert} groups"]
        assert not item.ok
        assert item.figures.startswith("100% have one and the same reward")
        assert item.change.startswith("rewards")


def test_a_step_that_changes_next_to_nothing_is_wrong(tmp_path, checkpoint):
    found = findings(tmp_path, checkpoint, "image.lr=1e-12")
    assert found["text step"].ok
    assert not found["image step"].ok
    assert found["image step"].change.startswith("image.lr")


def test_a_recipe_that_trains_nothing_is_said_to(tmp_path, checkpoint):
    found = findings(tmp_path, checkpoint, "steps=0", "train=[]")
    assert found["training"].figures == "the recipe trains nothing"


def test_what_stops_a_run_ends_the_check(tmp_path, checkpoint):
    *_, last = self_check(recipe(tmp_path, checkpoint, "image.objective.clip_radius=1e-9"))
    assert (last.name, last.ok, last.code) == ("stopped", False, 1)
    assert "likely cause: " in last.figures
    *_, last = self_check(recipe(tmp_path, checkpoint, "rewards=[{use='faulty', fault='nan'}]"))
    assert (last.name, last.ok, last.code) == ("stopped", False, 3)


@pytest.mark.parametrize(
    ("overrides", "code", "line"),
    [
        ((), 0, "  fine  images, sampler against trainer: log-ratio "),
        (("image.lr=1e-12",), 1, "        change image.lr"),
        (("policy.checkpoint='/nowhere'",), 1, "  WRONG stopped: checkpoint '/nowhere'"),
        (("steps=-1",), 2, None),
    ],
)
def test_check_run(tmp_path, checkpoint, capsys, overrides, code, line):
    file = recipe_file(tmp_path, checkpoint)
    words = [word for override in overrides for word in ("--set", override)]
    assert cli.main(["check", str(file), "--run", *words]) == code
    printed = capsys.readouterr().out
    assert line is None or line in printed
    assert cli.main(["check", str(file), "--run", "--json", *words]) == code
    (report,) = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    assert all(item.keys() == {"name", "ok", "figures", "change"} for item in report["found"])
    assert bool(report["found"]) is (code != 2)
    assert not [path for path in tmp_path.iterdir() if path != file]
