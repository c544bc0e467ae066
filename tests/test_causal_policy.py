"""Causal language models: what they sample, what they train on, what they save."""

import json
import warnings

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from unigrpo_models.adapters import Lora
from unigrpo_models.causal import replay
from unigrpo_models.causal.tokens import Style

from unigrpo_core.engine.gap import TEXT_MAX, TEXT_MEAN
from unigrpo_core.keys import Key
from unigrpo_core.records import Prompt, ReplayBatch, Sampling

PROMPTS = tuple(
    Prompt(f"p{row}", text)
    for row, text in enumerate(("one", "a much longer prompt, of many words", "x", "two words"))
)
KEYS = [Key((row,)) for row in range(len(PROMPTS))]
LORA = Lora(2, 4, {"text": ("q_proj", "mlp.down_proj")})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_lm.write(root / kind, kind) for kind in tiny_lm.KINDS}


@pytest.fixture(scope="module")
def folder(models):
    return models["qwen2"]


def wrote(policy, temperature=1.0, limit=12, prompts=PROMPTS, keys=KEYS):
    return policy.write(policy.open(prompts), Sampling(limit, temperature), keys)[0]


def batch(written, temperature=1.0, prompts=PROMPTS):
    tokens, mask = written.tokens, written.mask
    return ReplayBatch(prompts, tokens, mask, temperature, True, None, None, (), True)


def ids(written):
    return [t[m].tolist() for t, m in zip(written.tokens, written.mask, strict=True)]


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_lm.KINDS)
def test_greedy_ids_are_those_of_generate(models, kind):
    policy = tiny_lm.policy(models[kind])
    model = AutoModelForCausalLM.from_pretrained(models[kind])
    never = (~policy.codec.allowed(torch.device("cpu"))).nonzero()[:, 0].tolist()
    expected = []
    for prompt in PROMPTS:
        context = torch.tensor([policy.codec.context(prompt)])
        found = model.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=never,
        )
        expected.append(found[0, context.shape[1] :].tolist())
    assert ids(wrote(policy, temperature=1e-4)) == expected


@pytest.mark.parametrize("kind", tiny_lm.KINDS)
def test_the_trainer_computes_what_was_sampled_from(models, kind):
    policy = tiny_lm.policy(models[kind])
    for temperature in (1.0, 0.6):
        written = wrote(policy, temperature)
        with torch.no_grad():
            found = policy.root(batch(written, temperature)).logps
        gap = (found - written.logps).abs()[written.mask]
        assert gap.mean() <= TEXT_MEAN["float32"]
        assert gap.max() <= TEXT_MAX["float32"]


@pytest.mark.parametrize("lora", [None, LORA])
def test_in_bf16_the_trainer_is_close_and_trained_weights_are_float32(folder, lora):
    policy = tiny_lm.policy(folder, compute=torch.bfloat16, lora=lora)
    written = wrote(policy)
    with torch.no_grad():
        found = policy.root(batch(written)).logps
    assert found.dtype == torch.float32
    assert (found - written.logps).abs()[written.mask].mean() <= TEXT_MEAN["bf16"]
    types = {(p.requires_grad, p.dtype) for p in policy.root.parameters()}
    held = {(True, torch.float32)}
    assert types == (held | {(False, torch.bfloat16)} if lora else held)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_ids_do_not_depend_on_the_batch(models, kind):
    policy = tiny_lm.policy(models[kind])
    prompts, keys = PROMPTS * 3, [Key(("row", row)) for row in range(12)]
    together = ids(wrote(policy, prompts=prompts, keys=keys))
    assert len({tuple(row) for row in together}) == 12
    for size in (1, 5):
        apart = []
        for start in range(0, 12, size):
            rows = slice(start, start + size)
            apart += ids(wrote(policy, prompts=prompts[rows], keys=keys[rows]))
        assert apart == together


def test_draws_are_the_inverse_cdf_of_the_model_s_own_logits(folder):
    policy = tiny_lm.policy(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    allowed = policy.codec.allowed(torch.device("cpu"))
    written = wrote(policy, limit=6, temperature=0.8)
    for row, (prompt, key) in enumerate(zip(PROMPTS, KEYS, strict=True)):
        said = list(policy.codec.context(prompt))
        for place, uniform in enumerate(key.child("token").uniform(len(ids(written)[row]))):
            with torch.no_grad():
                logits = model(torch.tensor([said])).logits[0, -1].double() / 0.8
            logits[~allowed] = -torch.inf
            drawn = int((logits.softmax(0).cumsum(0) <= uniform).sum())
            assert drawn == written.tokens[row, place]
            assert float(logits.log_softmax(0)[drawn]) == pytest.approx(
                written.logps[row, place].item(), abs=1e-4
            )
            said.append(drawn)


def test_a_prompt_of_a_group_is_read_once(folder, monkeypatch):
    policy = tiny_lm.policy(folder)
    passes, hidden = [], policy.network.hidden
    monkeypatch.setattr(
        policy.network, "hidden", lambda i, *rest: passes.append(tuple(i.shape)) or hidden(i, *rest)
    )
    group, keys = PROMPTS[:2] * 4, [Key(("row", row)) for row in range(8)]
    wrote(policy, limit=3, prompts=group, keys=keys)
    longest = policy.prompt_tokens(PROMPTS[1])
    assert passes == [(2, longest), (8, 1), (8, 1)]


def test_all_ends_end_and_other_special_tokens_are_never_said(tmp_path):
    folder = tiny_lm.write(tmp_path / "model")
    words = tiny_lm.tokenizer()
    ends = words.convert_tokens_to_ids([tiny_lm.END, tiny_lm.START, "."])
    tiny_lm.change(folder, "generation_config.json", eos_token_id=ends, temperature=3.0)
    policy = tiny_lm.policy(folder, style=Style(close=tiny_lm.THOUGHT))
    closing = words.convert_tokens_to_ids(tiny_lm.THOUGHT)
    assert policy.codec.ends == (*ends, closing)
    keys = [Key(("row", row)) for row in range(400)]
    written = wrote(policy, temperature=100.0, limit=16, prompts=PROMPTS[:1] * 400, keys=keys)
    said = ids(written)
    never = words.convert_tokens_to_ids(tiny_lm.PAD)
    assert not any(never in row for row in said)
    assert max(token for row in said for token in row) < len(words)
    ended = [row for row in said if row[-1] in policy.codec.ends]
    assert {row[-1] for row in ended} == set(policy.codec.ends)
    assert all(len(row) == 16 for row in said if row not in ended)
    assert not any(set(row[:-1]) & set(policy.codec.ends) for row in said)
    assert not any("." in text or tiny_lm.THOUGHT in text for text in written.texts)


# --- prompts ----------------------------------------------------------------------------------


def test_a_prompt_is_put_as_the_style_says(folder):
    def said(**style):
        policy = tiny_lm.policy(folder, style=Style(**style))
        return policy.codec.tokenizer.decode(policy.codec.context(Prompt("p", "Hi")))

    turn = "<|start|>user\nHi<|end|><|start|>assistant\n"
    assert said() == turn
    assert said(system_prompt="Be.") == f"<|start|>system\nBe.<|end|>{turn}"
    assert said(open="<think>\n") == f"{turn}<think>\n"
    assert said(enable_thinking=False) == f"{turn}-"
    assert said(enable_thinking=True) == turn
    assert said(chat=False) == "Hi"
    assert said(chat=False, system_prompt="Say: ", open=" -> ") == "Say: Hi -> "


# --- training ---------------------------------------------------------------------------------


def gradients(policy, written):
    loss = policy.root(batch(written)).logps.square().sum()
    owned = [p for p in policy.parameters()["text"].values() if p.requires_grad]
    return loss, torch.autograd.grad(loss, owned)


@pytest.mark.parametrize("how", ["selective", "full", "parts"])
def test_what_is_computed_again_gives_the_same_gradients(folder, how, monkeypatch):
    plain = tiny_lm.policy(folder)
    written = wrote(plain)
    expected = gradients(plain, written)
    if how == "parts":
        monkeypatch.setattr(replay, "LOGITS", 5 * plain.codec.width)
        other = plain
    else:
        other = tiny_lm.policy(folder, checkpointing=how)
    assert ids(wrote(other)) == ids(written)
    torch.testing.assert_close(gradients(other, written), expected, atol=1e-5, rtol=1e-4)


def test_what_is_checkpointed_is_not_kept(folder):
    def kept(**place):
        policy, count = tiny_lm.policy(folder, **place), 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        written = wrote(policy)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            policy.root(batch(written))
        return count

    none, selective, full = (kept(checkpointing=m) for m in ("none", "selective", "full"))
    assert full < 0.5 * none
    assert full <= selective <= none


def test_tied_embeddings_count_once(models):
    for kind, tied in (("qwen2", True), ("llama", False)):
        owned = tiny_lm.policy(models[kind]).parameters()["text"]
        heads = [name for name in owned if "lm_head" in name]
        assert bool(heads) != tied
        assert len({id(p) for p in owned.values()}) == len(owned)


# --- weights ----------------------------------------------------------------------------------


def move(policy):
    with torch.no_grad():
        for name, p in policy.parameters()["text"].items():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 9)


def test_a_trained_model_is_saved_as_its_library_loads_it(folder, tmp_path):
    policy = tiny_lm.policy(folder)
    move(policy)
    policy.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, policy.network.model.state_dict()[name])
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    another = tiny_lm.policy(tmp_path / "saved")
    assert ids(wrote(another)) == ids(wrote(policy))
    assert ids(wrote(another)) != ids(wrote(tiny_lm.policy(folder)))


def test_an_untrained_model_keeps_its_files(folder, tmp_path):
    frozen = tiny_lm.policy(folder, compute=torch.bfloat16, train=frozenset())
    frozen.save(tmp_path / "saved")
    name = "model.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_in_several_files(folder, tmp_path):
    whole, parts = tiny_lm.policy(folder), tmp_path / "parts"
    whole.network.model.save_pretrained(str(parts), max_shard_size="40KB")
    tiny_lm.tokenizer().save_pretrained(str(parts))
    assert len(sorted(parts.glob("model-*.safetensors"))) > 1
    assert ids(wrote(tiny_lm.policy(parts))) == ids(wrote(whole))
    tiny_lm.policy(parts, train=frozenset()).save(tmp_path / "saved")
    assert ids(wrote(tiny_lm.policy(tmp_path / "saved"))) == ids(wrote(whole))


def test_adapters_train_alone_and_are_peft_s(folder, tmp_path):
    from peft import PeftModel

    policy = tiny_lm.policy(folder, lora=LORA, name="owner/model")
    before = ids(wrote(policy))
    assert before == ids(wrote(tiny_lm.policy(folder)))
    open_ = {n for n, p in policy.parameters()["text"].items() if p.requires_grad}
    layers = {n.split(".lora_")[0].split("layers.")[1] for n in open_}
    assert layers == {f"{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")}
    policy.keep("reference")
    move(policy)
    after = ids(wrote(policy))
    assert after != before
    with policy.weights("reference"):
        assert ids(wrote(policy)) == before
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Could not find a config")  # PEFT asked the network
        policy.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, "owner/model")
    again = tiny_lm.policy(folder, lora=LORA)
    again.load(tmp_path)
    sampler = tiny_lm.policy(folder, train=frozenset())
    sampler.load(tmp_path)
    assert ids(wrote(again)) == ids(wrote(sampler)) == after
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    context = torch.tensor([policy.codec.context(PROMPTS[0])])
    with torch.no_grad():
        mine = policy.network.logits(policy.network.hidden(context))
        torch.testing.assert_close(loaded(context).logits, mine)
    assert all(bool(x.any()) for n, x in load_file(tmp_path / "adapter_model.safetensors").items())
