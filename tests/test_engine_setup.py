"""What is refused before a run folder exists: devices, sources, rewards, prompts."""

import json
from pathlib import Path

import pytest
import torch
from tiny import Silent, recipe
from unigrpo_board.prompts import BoardPrompts
from unigrpo_models.bagel.policy import BagelPolicy

from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.rollout import sample
from unigrpo_core.engine.setup import choose_device
from unigrpo_core.errors import PluginError, UserError


@pytest.fixture
def refused(tmp_path, checkpoint):
    """The message with which a run is refused; nothing is left."""

    def refused(*overrides, error=UserError):
        out = tmp_path / "out"
        with pytest.raises(UserError) as caught:
            Run(recipe(tmp_path, checkpoint, *overrides), out, Silent())
        assert type(caught.value) is error
        assert not out.exists()
        return str(caught.value)

    return refused


# --- devices ----------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """Pretends that there are so many CUDA devices."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return pretend


class FakeAccelerator:
    num_processes = gradient_accumulation_steps = 1

    def __init__(self, cpu, **_):
        self.device = torch.device("cpu" if cpu else "cuda")


@pytest.mark.parametrize(
    ("wanted", "count", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_the_device_is_resolved_once(wanted, count, device, cuda, monkeypatch):
    cuda(count)
    monkeypatch.setattr("unigrpo_core.engine.setup.Accelerator", FakeAccelerator)
    accelerator, found = choose_device(wanted, None)
    assert found == torch.device(device)
    assert accelerator.device.type == found.type


def test_auto_without_cuda_is_the_cpu_whatever_else_there_is(cuda, monkeypatch):
    cuda(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    accelerator, device = choose_device("auto", None)
    assert device == accelerator.device == torch.device("cpu")


def test_a_device_that_is_not_here(cuda):
    cuda(0)
    with pytest.raises(UserError, match="'cuda', but torch finds none here"):
        choose_device("cuda", None)
    cuda(2)
    with pytest.raises(UserError, match="'cuda:2', but the last one here is 'cuda:1'"):
        choose_device("cuda:2", None)


def test_mps_says_why_not(tmp_path, checkpoint):
    with pytest.raises(UserError, match=r"auto, cpu, cuda or cuda:N.*mps lacks the float64"):
        recipe(tmp_path, checkpoint, "compute.device='mps'")


def test_a_second_run_on_another_device_type(cuda):
    choose_device("cpu", None)  # accelerate keeps it for the process
    cuda(1)
    with pytest.raises(UserError, match="'cuda', but accelerate keeps this process on cpu"):
        choose_device("cuda", None)


def test_gradient_accumulation_is_refused(refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "by 4 accumulation steps" in refused()


def test_the_policy_is_on_the_setups_device(setup):
    built = setup()
    assert built.device == torch.device("cpu")
    assert {p.device for p in built.policy.root.parameters()} == {built.device}


# --- sources, rewards, prompts ----------------------------------------------------------------


def of_file(path: Path, *prompts: str, more: str = "") -> str:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return f"source={{use='file', path={json.dumps(str(path))}{more}}}"


def test_no_held_out_prompt(refused, tmp_path):
    source = of_file(tmp_path / "p.txt", "red circle", more=", held_out_fraction=0.0")
    message = refused(source)
    assert "source 'file' holds no prompt out" in message
    assert "source.held_out_fraction" in message


@pytest.mark.parametrize(
    ("reward", "episode", "reads", "lacks"),
    [
        ("brightness", "think", "image", "draw"),
        ("first_pixel", "think", "image", "draw"),
        ("word", "draw", "thought", "think"),
    ],
)
def test_a_reward_that_reads_what_the_episode_does_not_have(
    refused, monkeypatch, reward, episode, reads, lacks
):
    monkeypatch.setattr(BagelPolicy, "__init__", None)  # it is not even loaded
    train = "text" if episode == "think" else "image"
    message = refused(
        f"rewards=[{{use='{reward}'}}]",
        f"episode=['{episode}']",
        f"train=['{train}']",
        "group.fan_out=[3]",
    )
    assert f"reward {reward!r} of " in message
    assert f"reads the {reads}, but the episode ['{episode}'] has no {lacks!r} segment" in message


@pytest.mark.parametrize("given", [3, 5])
def test_a_source_that_gives_another_number_of_prompts(refused, monkeypatch, given):
    honest = BoardPrompts.train
    monkeypatch.setattr(BoardPrompts, "train", lambda self, s, at, n: honest(self, s, at, given))
    message = refused(error=PluginError)
    assert message.startswith("prompts 'board' of unigrpo ")
    assert f"returned {given} prompts for step 1, expected 4" in message


def test_the_board_verifier_says_which_size_it_reads(train):
    with pytest.raises(UserError, match=r"24 x 24 pixels, but image.size is \[8, 12\]") as caught:
        train("run", "rewards=[{use='board_verifier'}]")
    assert caught.value.exit_code == 1


# --- a run that goes wrong --------------------------------------------------------------------


def diverging(name):
    def spoiled(*arguments):
        rollout = sample(*arguments)
        if arguments[2].denoising is not None:
            for segment in rollout.segments:
                if hasattr(segment, name):
                    getattr(segment, name)[0].fill_(float("nan"))
        return rollout

    return spoiled


@pytest.mark.parametrize("name", ["latents", "logps"])
@pytest.mark.parametrize("where", ["experience", "evaluate"], ids=["step", "eval"])
def test_a_model_that_diverges_is_not_the_rewards_fault(train, monkeypatch, name, where):
    monkeypatch.setattr(f"unigrpo_core.engine.{where}.sample", diverging(name))
    with pytest.raises(UserError, match="the model has diverged") as caught:
        train("run", "rewards=[{use='faulty', fault='nan'}]" if where == "evaluate" else "seed=1")
    assert caught.value.exit_code == 1


def test_thoughts_that_become_empty_do_not_end_the_run(train, monkeypatch):
    """Rewards' details belong to the episode, whatever the policy wrote."""
    import unigrpo_core.engine.evaluate as module

    honest, calls = module.episodes, []

    def emptied(rollout, label):
        from dataclasses import replace

        batch = honest(rollout, label)
        calls.append(label)
        return batch if len(calls) == 1 else replace(batch, thoughts=("",) * len(batch))

    monkeypatch.setattr(module, "episodes", emptied)
    run = train(
        "run", "rewards=[{use='board_verifier'}]", "image.size=[24, 24]", "evaluation.sheet=2"
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys() == summary["gain"].keys()
    assert summary["after"]["board_verifier/thought"] == 0


def test_a_detail_that_is_gone_at_the_end_is_left_out_of_the_gain(train, monkeypatch):
    from unigrpo_board.rewards import BoardVerifier

    honest, calls = BoardVerifier.details, []

    def fewer(self, batch):
        calls.append(1)
        found = dict(honest(self, batch))
        return found if len(calls) == 1 else {"quality": found["quality"]}

    monkeypatch.setattr(BoardVerifier, "details", fewer)
    run = train("run", "rewards=[{use='board_verifier'}]", "image.size=[24, 24]", "steps=1")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["gain"].keys() == {"board_verifier", "board_verifier/quality"}
