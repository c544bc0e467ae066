"""A folder in the published layout with the golden weights (``data/bagel_golden/README.md``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data" / "bagel_golden"
META = json.loads((DATA / "tiny_meta.json").read_text())
SPECIAL = {
    "<|im_start|>": META["special_tokens"]["bos_token_id"],
    "<|im_end|>": META["special_tokens"]["eos_token_id"],
    "<|vision_start|>": META["special_tokens"]["start_of_image"],
    "<|vision_end|>": META["special_tokens"]["end_of_image"],
}


def golden_folder(folder: Path) -> Path:
    """Writes the folder. What the official loader hard-codes for the released sizes, and is smaller
    here, stands in ``config.json``; the tokenizer has a word ``w7`` for id 7."""
    folder.mkdir(parents=True)
    for name in ("llm_config.json", "vit_config.json", "ae.safetensors"):
        shutil.copyfile(DATA / name, folder / name)
    shutil.copyfile(DATA / "weights.safetensors", folder / "ema.safetensors")
    latent = {"max_size": META["max_latent_size"], "patch": META["latent_patch_size"]}
    (folder / "config.json").write_text(json.dumps({"name": ["tiny"], "latent": latent}))
    size = json.loads((DATA / "llm_config.json").read_text())["vocab_size"]
    names = {number: word for word, number in SPECIAL.items()}
    vocab = {names.get(number, f"w{number}"): number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|vision_start|>", "<|vision_end|>"],
    ).save_pretrained(folder)
    return folder


def words(ids) -> str:
    """The text whose ids these are."""
    return " ".join(f"w{number}" for number in ids.tolist())
