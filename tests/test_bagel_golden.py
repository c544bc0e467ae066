"""BAGEL's network against outputs of the official code (``data/bagel_golden/README.md``)."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from unigrpo_methods.guidance.cfg import CFG, CFGOptions
from unigrpo_methods.schedulers.ode import ODE, ODEOptions
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent, VitConfig
from unigrpo_models.bagel.latents import latent_shape, patchify, unpatchify
from unigrpo_models.bagel.network import BagelNetwork, PositionTable, sinusoid

DATA = Path(__file__).parent / "data" / "bagel_golden"
META = json.loads((DATA / "tiny_meta.json").read_text())
SPECIAL = META["special_tokens"]
BOS, EOS = SPECIAL["bos_token_id"], SPECIAL["eos_token_id"]
BOUNDARY = torch.tensor([[SPECIAL["start_of_image"], SPECIAL["end_of_image"]]])
CONFIG = BagelConfig(
    llm=LanguageConfig.model_validate_json((DATA / "llm_config.json").read_text()),
    latent=Latent(patch=META["latent_patch_size"], max_size=META["max_latent_size"]),
    vit=VitConfig.model_validate_json((DATA / "vit_config.json").read_text()),
)
CASES, SIZES, TIMES = ("a", "b"), ("s0", "s1"), (0, 1, 2)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="module")
def network():
    """The official weights under their published names, none missing and none left over."""
    built = BagelNetwork(CONFIG)
    weights = {name: x.float() for name, x in load_file(DATA / "weights.safetensors").items()}
    built.load_state_dict(weights, strict=True)
    return built.requires_grad_(False)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def wrap(ids):
    return [BOS, *ids.tolist(), EOS]


def text_ids(golden, case, context):
    """The ids of a context: "system", "prompt" (with the system prompt), "full", or "empty"."""
    system, prompt = wrap(golden["system_ids"]), wrap(golden[f"{case}.prompt_ids"])
    thought = wrap(golden[f"{case}.thought_ids"])
    return {
        "empty": [],
        "system": system,
        "prompt": system + prompt,
        "full": system + prompt + thought,
    }[context]


def grid(golden, size):
    height, width, _ = latent_shape(CONFIG.latent, tuple(golden[f"{size}.image_hw"].tolist()))
    return height, width


def caches_of(network, ids):
    if ids:
        return network.text(torch.tensor([ids]))[1]
    nothing = torch.zeros(1, CONFIG.llm.num_key_value_heads, 0, CONFIG.llm.head_dim)
    return [(nothing, nothing)] * CONFIG.llm.num_hidden_layers


def velocity(network, golden, ids, size, x_t, t):
    return network.velocity(
        x_t[None],
        torch.as_tensor(t).view(1).float(),
        network.table_rows(*grid(golden, size)),
        BOUNDARY,
        torch.tensor([len(ids)]),
        caches_of(network, ids),
        None,
    )[0]


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_text_hidden_states_logits_and_cache(network, golden, case):
    ids = text_ids(golden, case, "full")
    assert ids == golden[f"{case}.text_ids"].tolist()
    assert golden[f"{case}.text_positions"].tolist() == [*range(len(ids))]
    hidden, caches = network.text(torch.tensor([ids]))
    close(hidden[0], golden[f"{case}.text_hidden"])
    close(network.language_model.lm_head(hidden[0]), golden[f"{case}.text_logits"])
    for layer, (k, v) in enumerate(caches):
        close(k[0].transpose(0, 1), golden[f"{case}.kv_k"][layer])
        close(v[0].transpose(0, 1), golden[f"{case}.kv_v"][layer])


def test_padding_on_the_right_changes_nothing(network, golden):
    rows = [text_ids(golden, case, "full") for case in CASES]
    width = max(map(len, rows))
    padded = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    hidden, _ = network.text(padded)
    for case, row, got in zip(CASES, rows, hidden, strict=True):
        close(got[: len(row)], golden[f"{case}.text_hidden"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding(network, golden, case):
    """Token by token into preallocated slots, from a cache with more slots than are used."""
    expected = golden[f"{case}.greedy_ids"].tolist()
    context = text_ids(golden, case, "prompt")
    slots = len(context) + len(expected) + 3
    caches = []
    for k, v in caches_of(network, context):
        grown = [x.new_full((*x.shape[:2], slots, x.shape[3]), 7.0) for x in (k, v)]
        for new, old in zip(grown, (k, v), strict=True):
            new[:, :, : len(context)] = old
        caches.append(tuple(grown))
    fed, logits = [BOS], []
    for turn in range(len(expected)):
        place = len(context) + turn
        padding = torch.zeros(1, 1, 1, slots)
        padding[..., place + 1 :] = float("-inf")
        hidden = network.step(torch.tensor([fed[-1]]), torch.tensor([place]), caches, padding)
        logits.append(network.language_model.lm_head(hidden)[0])
        fed.append(int(logits[-1].argmax()))
    assert fed[: len(expected)] == expected
    close(torch.stack(logits), golden[f"{case}.greedy_logits"])
    if case == "b":
        stop = fed.index(int(golden["b.stop_token"]))
        assert fed[:stop] == golden["b.stop_greedy_ids"].tolist()


# --- images -----------------------------------------------------------------------------------


def test_position_table(network, golden):
    table = PositionTable(META["max_latent_size"], CONFIG.llm.hidden_size).pos_embed
    close(table, network.latent_pos_embed.pos_embed)
    for size in SIZES:
        rows = network.table_rows(*grid(golden, size))
        assert rows.tolist() == golden[f"{size}.latent_pos_ids"].tolist()
        close(table[rows], golden[f"{size}.latent_pos_emb"])


def test_time_embedding(network, golden):
    times = torch.tensor([0.9, 0.55, 0.15, 0.0, 1.0])
    close(sinusoid(times), golden["time_embed_sinusoid"])
    close(network.time_embedder(times), golden["time_embed"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("context", "name"),
    [
        ("full", "{case}.{size}.t{k}.v_cond"),
        ("prompt", "{case}.{size}.t{k}.v_prompt_only"),
        ("system", "{size}.t{k}.v_uncond_sys"),
        ("empty", "{size}.t{k}.v_uncond_empty"),
    ],
)
def test_velocity(network, golden, context, name, case, size):
    ids = text_ids(golden, case, context)
    for k in TIMES:
        got = velocity(network, golden, ids, size, golden[f"{size}.x_t{k}"], golden["timesteps"][k])
        close(got, golden[name.format(case=case, size=size, k=k)])


def test_velocity_of_both_cases_in_one_batch(network, golden):
    """Texts of different lengths: what is beyond a row's length is hidden, whatever it holds."""
    rows = [text_ids(golden, case, "full") for case in CASES]
    lengths, width = [len(row) for row in rows], max(map(len, rows))
    assert lengths[0] != lengths[1]
    caches = network.text(torch.tensor([r + [EOS] * (width - len(r)) for r in rows]))[1]
    x_t = golden["s1.x_t1"].expand(2, -1, -1)
    hidden = torch.arange(width) >= torch.tensor(lengths)[:, None]
    padding = torch.zeros(2, 1, 1, width + x_t.shape[1] + 2)
    padding[:, 0, 0, :width].masked_fill_(hidden, float("-inf"))
    got = network.velocity(
        x_t,
        golden["timesteps"][1].expand(2).float(),
        network.table_rows(*grid(golden, "s1")),
        BOUNDARY,
        torch.tensor(lengths),
        caches,
        padding,
    )
    for row, case in enumerate(CASES):
        close(got[row], golden[f"{case}.s1.t1.v_cond"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_guidance(golden, case, size):
    guided = CFG(CFGOptions(scale=4.0)).combine(
        golden[f"{case}.{size}.t0.v_cond"][None, None],
        {"text": golden[f"{size}.t0.v_uncond_sys"][None, None]},
        torch.tensor([[0.9]]),
    )
    close(guided[0, 0], golden[f"{case}.{size}.t0.v_cfg_global_min1"])


@pytest.mark.parametrize(
    ("steps", "shift", "name"),
    [(4, 3.0, "n5_shift3"), (5, 3.0, "n6_shift3"), (49, 3.0, "n50_shift3"), (9, 1.0, "n10_shift1")],
)
def test_the_official_schedule_counts_grid_points(golden, steps, shift, name):
    times = ODE(ODEOptions()).times(steps, shift)
    close(times.float(), golden[f"schedule.{name}"].float())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_sampling_without_guidance(network, golden, case, size):
    scheduler = ODE(ODEOptions())
    times = scheduler.times(5, 3.0).float()
    ids, x = text_ids(golden, case, "full"), golden[f"{size}.noise"]
    recorded = case == "a" and size == "s0"
    for step in range(5):
        if recorded:
            close(x, golden["a.s0.traj_x_nocfg"][step])
        now, then = times[step].view(1, 1), times[step + 1].view(1, 1)
        v = velocity(network, golden, ids, size, x, now)
        if recorded:
            close(v, golden["a.s0.traj_v_nocfg"][step])
        level = torch.zeros(1, 1)
        x = scheduler.transition(v[None, None], x[None, None], now, then, level).mean[0, 0]
    close(x, golden[f"{case}.{size}.sample_nocfg"])


@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_latents(golden, size):
    height, width = grid(golden, size)
    tokens = golden[f"a.{size}.sample_cfg_global"].view(1, height, width, -1)
    latents = unpatchify(CONFIG.latent, tokens)
    close(latents, golden[f"ae.{size}.latent"])
    assert torch.equal(patchify(CONFIG.latent, latents), tokens)


# --- training ---------------------------------------------------------------------------------


def test_packed_training_forward(network, golden):
    """Two samples of the official packed pass: our text stream, then one block per image."""
    indexes = golden["train.text_indexes"].tolist()
    latents = golden["train.vae_indexes"].tolist()
    raw = golden["train.raw_timesteps"]
    place = start = total = 0
    for case, size, length in zip(CASES, SIZES, golden["train.sample_lens"].tolist(), strict=True):
        ids = wrap(golden[f"{case}.prompt_ids"]) + wrap(golden[f"{case}.thought_ids"])
        hidden, _ = network.text(torch.tensor([ids]))
        assert golden["train.position_ids"][place : place + len(ids)].tolist() == [*range(len(ids))]
        assert indexes[: len(ids)] == [*range(place, place + len(ids))]
        close(hidden[0], golden["train.hidden"][place : place + len(ids)])

        height, width = grid(golden, size)
        count = height * width
        inside = latents[start : start + count]
        assert inside == [*range(place + len(ids) + 1, place + len(ids) + 1 + count)]
        s = 1 / (1 + math.exp(-raw[start].item()))
        t = 3 * s / (1 + 2 * s)
        x_t = (1 - t) * golden[f"{size}.x0"] + t * golden[f"{size}.noise"]
        v = velocity(network, golden, ids, size, x_t, t)
        close(v, golden["train.v_pred"][start : start + count])
        mse = (v - (golden[f"{size}.noise"] - golden[f"{size}.x0"])).square()
        torch.testing.assert_close(
            mse, golden["train.mse"][start : start + count], atol=1e-3, rtol=0
        )
        indexes = indexes[len(ids) + 2 :]
        place, start = place + length, start + count
        within = golden["train.ce_indexes"] - (place - length)
        scored = (within >= 0) & (within < length)
        within = within[scored]
        logits = network.language_model.lm_head(hidden[0, within])
        losses = F.cross_entropy(logits, golden["train.ce_labels"][scored], reduction="none")
        close(losses, golden["train.ce"][scored])
        total += len(losses)
    assert total == len(golden["train.ce"])
    assert place == len(golden["train.hidden"])
    assert start == len(golden["train.v_pred"])
