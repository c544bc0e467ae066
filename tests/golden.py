"""A folder in the published layout with the golden weights (``data/bagel_golden/README.md``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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


def as_published(folder: Path) -> Path:
    """Writes the folder with a ``config.json`` that is only a name, and a tokenizer in the files
    that Qwen2's has."""
    golden_folder(folder)
    (folder / "config.json").write_text('{"name": ["BAGEL-tiny"]}')
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    write_byte_tokenizer(folder, list(SPECIAL))
    return folder


def write_byte_tokenizer(folder: Path, special: list[str], size: int = 300) -> None:
    """A byte-level BPE with 34 merges, then the special tokens: ids 290 and on."""
    merges = [(a, b) for a in "aeiou" for b in "lmnrstd"][:34]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    fillers = [f"<|extra_{number}|>" for number in range(size - len(words) - len(special) - 1)]
    added = [*special, *fillers, "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": special,
        "added_tokens_decoder": {
            str(len(words) + number): {"content": word, "special": True}
            for number, word in enumerate(added)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
