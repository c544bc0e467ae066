"""Tiny random language models of real classes, saved as their library saves them, with a byte-level
tokenizer and a chat template of our own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from unigrpo_models.causal.loading import quiet
from unigrpo_models.causal.policy import CausalPolicy, load_causal
from unigrpo_models.causal.tokens import Style

from unigrpo_core.plugin import Placement

START, END, PAD, THOUGHT = "<|start|>", "<|end|>", "<|pad|>", "</think>"
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}-{% endif %}{% endif %}"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS = ("qwen2", "qwen3", "llama", "gemma2", "granite")


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; three more are special, and one more is not."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([START, END, PAD])
    core.add_tokens([AddedToken(THOUGHT, special=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    made.chat_template = TEMPLATE
    return made


def write(folder: Path, kind: str = "qwen2", seed: int = 0, **changes: object) -> Path:
    """A checkpoint whose weights are large enough to matter."""
    words = tokenizer()
    special = words.convert_tokens_to_ids([END, PAD])
    sizes = {
        "vocab_size": len(words) + 4,  # rows of the head without a word, as published
        "eos_token_id": special[0],
        "pad_token_id": special[1],
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    tied = {"tie_word_embeddings": kind != "llama"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(kind, {**SMALL, **sizes, **tied, **changes})
    with quiet():
        model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


def _model(kind: str, sizes: dict[str, object]) -> PreTrainedModel:
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=12, **sizes))
    if kind == "bert":
        sizes.pop("num_key_value_heads")
        return BertForMaskedLM(BertConfig(**sizes))
    if kind == "gemma2":  # layers with and without a window, and a capped head
        return Gemma2ForCausalLM(
            Gemma2Config(head_dim=8, sliding_window=5, final_logit_softcapping=5.0, **sizes)
        )
    if kind == "granite":  # a scaled head
        return GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def policy(
    folder: Path,
    *,
    compute: torch.dtype = torch.float32,
    train: frozenset[str] = frozenset({"text"}),
    lora: object = None,
    style: Style | None = None,
    name: str = "",
    **place: object,
) -> CausalPolicy:
    where = Placement(torch.device("cpu"), compute, train, **place)
    return load_causal(folder, style or Style(), where, lora=lora, name=name)


def change(folder: Path, name: str, **values: object) -> None:
    """Changes a JSON file of a checkpoint; None takes a key away."""
    file = folder / name
    content = {**json.loads(file.read_text()), **values}
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))
