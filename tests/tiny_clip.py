"""A tiny CLIP of transformers' own classes, in the published layout; random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

PUBLISHED = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
}  # as published but for the side, 224


def write(folder: Path) -> None:
    """Model, tokenizer (letters; 16 tokens at most) and preprocessor_config.json."""
    from transformers import CLIPConfig, CLIPModel

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "projection_dim": 24}
    # Of the text's end token the published configuration says 2, and CLIP takes the highest id.
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=size | text | {"bos_token_id": 0, "pad_token_id": 1},
        vision_config=size | {"image_size": 28, "patch_size": 14},
        projection_dim=24,
        logit_scale_init_value=4.6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
