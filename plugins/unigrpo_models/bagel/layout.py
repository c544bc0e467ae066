"""The published layout: which files a BAGEL folder has, and which of them are there."""

from __future__ import annotations

from pathlib import Path

from unigrpo_core.plugin import Files

CONFIG = "llm_config.json"
WEIGHTS = "ema.safetensors"
AUTOENCODER = "ae.safetensors"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
COMPANIONS = (
    *(CONFIG, "vit_config.json", "config.json", "generation_config.json"),
    *("preprocessor_config.json", *TOKENIZER, AUTOENCODER),
)
"""What stands beside the weights."""
MAIN = (CONFIG, "vit_config.json", WEIGHTS, AUTOENCODER, "tokenizer_config.json")
"""What every published folder has: without one of them a download was cut off."""
FILES = Files(published=MAIN, optional=COMPANIONS)
"""What a run reads. What a folder must have depends on its configuration; see :func:`inventory`."""

SPECIAL = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "image_start": "<|vision_start|>",
    "image_end": "<|vision_end|>",
}
"""The control tokens by their words; there is no chat template."""

EYES = ("vit_model.", "connector.", "vit_pos_embed.")
"""How the names of the tensors begin that are only for looking at images."""

FROZEN = ("_pos_embed", "vit_model.", "connector.")
"""What no expert owns: the position tables, and what only reads images."""
IMAGE = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae")


def expert_of(name: str) -> str | None:
    """The expert that owns a parameter or a module, by its path; None for what no one trains."""
    if any(part in name for part in FROZEN):
        return None
    return "image" if any(part in name for part in IMAGE) else "text"


def inventory(folder: Path) -> str:
    """For a message: what of the layout a folder has, and what it has not."""
    there = [name for name in MAIN if (folder / name).exists()]
    missing = [name for name in MAIN if name not in there]
    return (
        f"a BAGEL folder has {', '.join(MAIN)}; of these there "
        f"{'is' if len(there) == 1 else 'are'} {', '.join(there) or 'none'}"
        + (f"; missing: {', '.join(missing)}" if there and missing else "")
    )
