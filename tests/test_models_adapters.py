"""Adapters: what they bind, that only they are trained, and PEFT's files."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from unigrpo_models.adapters import Lora
from unigrpo_models.bagel.policy import load_bagel

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement

BOTH = frozenset({"text", "image"})
RANK = "policy.lora_rank=2"
MSE = 'image.regularizers=[{use="velocity_mse",weight=0.1}]'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def policy(checkpoint, lora=None, train=BOTH):
    place = Placement(torch.device("cpu"), torch.float32, train)
    return load_bagel(checkpoint, "", place, lora=lora)


def trained(policy, expert):
    return {n for n, p in policy.parameters()[expert].items() if p.requires_grad}


def randomise(policy):
    """Adapters that change something."""
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))


def test_targets_bind_layers_of_their_expert_only(checkpoint):
    lora = Lora(
        2, 4, {"text": ("q_proj",), "image": ("mlp.down_proj", "vae2llm", "time_embedder.mlp.0")}
    )
    built = policy(checkpoint, lora)
    text = {n.split(".lora_")[0].split("layers.")[1] for n in trained(built, "text")}
    assert text == {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    image = {n.split(".lora_")[0].removeprefix("network.") for n in trained(built, "image")}
    layers = {f"language_model.model.layers.{i}.mlp_moe_gen.down_proj" for i in range(2)}
    assert image == {*layers, "vae2llm", "time_embedder.mlp.0"}
    built.velocity(built.open(tiny.prompts(1)), torch.zeros(1, 2, 3, 48), torch.tensor([0.5]))


def test_an_expert_without_targets_is_trained_whole_and_an_untrained_one_not_at_all(checkpoint):
    mixed = policy(checkpoint, Lora(2, 4, {"text": ("q_proj",)}))
    assert all(".lora_" in name for name in trained(mixed, "text"))
    assert trained(mixed, "image") == {*policy(checkpoint).parameters()["image"]}
    alone = policy(
        checkpoint,
        Lora(
            2,
            4,
            {"image": ("q_proj",), "text": ("?",)},
        ),
        {"image"},
    )
    assert not trained(alone, "text")


def test_a_policy_that_only_samples_takes_the_adapters_it_finds(checkpoint, tmp_path):
    run = tiny.run(tmp_path, checkpoint, RANK)
    start = f"start={json.dumps(str(run))}"
    trained = tiny.setup(tmp_path, checkpoint, RANK, start).policy
    for rank in (RANK, "policy.lora_rank=0"):
        sampler = tiny.setup(tmp_path, checkpoint, rank, start, "train=[]", "steps=0").policy
        ids = torch.tensor([[3, 5, 7, 9]])
        assert torch.equal(sampler.network.text(ids)[0], trained.network.text(ids)[0])
        assert not any(p.requires_grad for p in sampler.root.parameters())
    (run / "final" / "adapter_config.json").write_text('{"r": 2}')
    with pytest.raises(UserError, match=r"adapter_config\.json does not fit this model"):
        tiny.setup(tmp_path, checkpoint, start, "train=[]", "steps=0")


@pytest.mark.parametrize("target", ["qproj", "proj", "embed_tokens", "norm", "vae2llm"])
def test_a_target_that_binds_nothing_is_told_before_training(checkpoint, target):
    with pytest.raises(UserError, match=f"lora_text names '{target}'.*q_proj"):
        policy(checkpoint, Lora(2, 4, {"text": ("q_proj", target)}))


def test_building_draws_nothing_from_the_global_generator(checkpoint):
    torch.manual_seed(3)
    policy(checkpoint, Lora(2, 4, {"text": ("q_proj",)}))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_fresh_adapters_change_nothing_and_off_is_the_base(checkpoint):
    plain, adapted = policy(checkpoint), policy(checkpoint, Lora(2, 4, {"text": ("q_proj",)}))
    ids = torch.tensor([[3, 5, 7, 9]])
    base = plain.network.text(ids)[0]
    assert torch.equal(adapted.network.text(ids)[0], base)
    assert adapted._weights.adapters.fresh
    randomise(adapted)
    assert not adapted._weights.adapters.fresh
    assert not torch.allclose(adapted.network.text(ids)[0], base)
    with adapted._weights.adapters.off():
        assert torch.equal(adapted.network.text(ids)[0], base)
    assert all(".lora_" in name for name in trained(adapted, "text"))


def test_adapters_compute_what_they_say(checkpoint):
    """W + alpha / rank * B A, merged by hand into a policy without adapters."""
    adapted = policy(checkpoint, Lora(2, 6, {"text": ("o_proj",), "image": ("gate_proj",)}))
    randomise(adapted)
    merged = policy(checkpoint)
    with torch.no_grad():
        for name in adapted._weights.adapters.layers:
            layer = adapted.network.get_submodule(name)
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            merged.network.get_submodule(name).weight += 6 / 2 * product
    ids = torch.tensor([[3, 5, 7, 9]])
    hidden, caches = adapted.network.text(ids)
    torch.testing.assert_close(hidden, merged.network.text(ids)[0], atol=1e-5, rtol=0)
    x_t, t = torch.randn(1, 2, 3, 48), torch.tensor([0.5])
    prompts = tiny.prompts(1)
    v = [p.velocity(p.open(prompts), x_t, t) for p in (adapted, merged)]
    torch.testing.assert_close(*v, atol=1e-5, rtol=0)
    assert len(caches) == 2


@pytest.mark.parametrize("context_gradient", ["true", "false"])
def test_a_run_moves_the_adapters_only_and_saves_what_peft_reads(
    checkpoint, tmp_path, context_gradient
):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    run = tiny.run(tmp_path, checkpoint, RANK, MSE, f"image.context_gradient={context_gradient}")
    assert {p.name for p in (run / "final").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    state = load_file(run / "final" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in state)
    assert all(bool(x.any()) for name, x in state.items() if "lora_B" in name and "0.mlp" in name)
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["base_model_name_or_path"] == str(checkpoint)
    loaded = get_peft_model(
        policy(checkpoint).network, LoraConfig.from_pretrained(str(run / "final"))
    )
    told = set_peft_model_state_dict(loaded, state)
    assert not told.unexpected_keys
    again = tiny.setup(tmp_path, checkpoint, RANK, f"start={json.dumps(str(run))}").policy
    ids = torch.tensor([[3, 5, 7, 9]])
    mine = again.network.text(ids)[0]
    assert torch.equal(mine, loaded.base_model.model.text(ids)[0])
    assert not torch.equal(mine, policy(checkpoint).network.text(ids)[0])


def test_the_reference_of_adapters_costs_no_copy_and_gives_the_base(checkpoint):
    built, plain = (
        policy(checkpoint, Lora(2, 4, {"text": ("q_proj",)}), {"text"}),
        policy(checkpoint),
    )
    built.keep("reference")
    randomise(built)
    ids = torch.tensor([[3, 5, 7, 9]])
    moved = built.network.text(ids)[0]
    with built.weights("reference"):
        assert torch.equal(built.network.text(ids)[0], plain.network.text(ids)[0])
    assert torch.equal(built.network.text(ids)[0], moved)
    assert not built._weights._sets._kept
    built.keep("reference")  # adapters that have learned something are kept themselves
    with torch.no_grad():
        for name, parameter in built.network.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    with built.weights("reference"):
        assert torch.equal(built.network.text(ids)[0], moved)


def test_one_expert_adapted_and_the_other_whole_are_both_saved(checkpoint, tmp_path):
    mixed = (RANK, "policy.lora_image=[]", "steps=1")
    run = tiny.run(tmp_path, checkpoint, *mixed)
    names = {p.name for p in (run / "final").iterdir()}
    assert {"adapter_model.safetensors", "ema.safetensors"} <= names
    before, after = load_file(checkpoint / "ema.safetensors"), tiny.final_weights(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(map(tiny.is_image, moved))
    again = tiny.setup(tmp_path, checkpoint, *mixed, f"start={json.dumps(str(run))}").policy
    for name, weight in again.network.published().items():
        assert torch.equal(weight, after[name])


def test_a_start_of_another_kind_is_told(checkpoint, tmp_path):
    adapted = tiny.run(tmp_path, checkpoint, RANK, "steps=0", name="adapted")
    whole = tiny.run(tmp_path, checkpoint, "steps=0", name="whole")
    for start, overrides, match in (
        (whole, (RANK,), "trained without adapters"),
        (adapted, ("policy.lora_rank=3",), "another rank.*lora_rank"),
        (adapted, (RANK, 'policy.lora_text=["q_proj"]'), "other layers"),
        (adapted, (), "holds adapters.*lora_rank"),
    ):
        with pytest.raises(UserError, match=match):
            tiny.setup(tmp_path, checkpoint, *overrides, f"start={json.dumps(str(start))}")
