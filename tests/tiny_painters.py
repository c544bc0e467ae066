"""Tiny pipelines of diffusers' own classes with random weights, saved in the published layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLIP_LENGTH, T5_LENGTH = 16, 12
CLIP = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 4, "projection_dim": 32}
CLIP |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # 2: the end is the highest id
T5 = {"d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(letter, -3.0 - number / 10) for number, letter in enumerate(LETTERS)]
    words += [("▁red", -2.5), ("▁a", -2.5)]
    fast = Tokenizer(models.Unigram(words, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return T5TokenizerFast.from_pretrained(folder)


def _random(model: Any) -> Any:
    """Weights large enough for texts and times to matter."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model.eval()


def _autoencoder(channels: int) -> AutoencoderKL:
    """A latent is two pixels wide."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        sample_size=32,
    ).eval()


def _clip(kind: Any, words: CLIPTokenizer) -> Any:
    return _random(
        kind(CLIPTextConfig(vocab_size=len(words), max_position_embeddings=CLIP_LENGTH, **CLIP))
    )


def _t5(words: T5TokenizerFast, width: int) -> T5EncoderModel:
    return _random(T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, **T5)))


def write_sd3(folder: Path) -> Path:
    """A StableDiffusion3Pipeline; tokens of 4 pixels, and at most 16 of them a side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = clip_tokenizer(folder / "clip-words")
        long = t5_tokenizer(folder / "t5-words")
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        StableDiffusion3Pipeline(
            transformer=_random(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(16),
            text_encoder=_clip(CLIPTextModelWithProjection, words),
            tokenizer=words,
            text_encoder_2=_clip(CLIPTextModelWithProjection, words),
            tokenizer_2=words,
            text_encoder_3=_t5(long, 64),
            tokenizer_3=long,
        ).save_pretrained(folder)
    return folder


def write_flux(folder: Path, *, guidance: bool = True) -> Path:
    """A FluxPipeline; tokens of 4 pixels, of 4 channels of latents."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        words, long = clip_tokenizer(folder / "clip-words"), t5_tokenizer(folder / "t5-words")
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 8),
        )
        FluxPipeline(
            transformer=_random(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
            vae=_autoencoder(4),
            text_encoder=_clip(CLIPTextModel, words),
            tokenizer=words,
            text_encoder_2=_t5(long, 32),
            tokenizer_2=long,
        ).save_pretrained(folder)
    return folder


def write_sana(folder: Path) -> Path:
    """A SanaPipeline; tokens of 4 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        words = [(token, 0.0) for token in ("<pad>", "<eos>", "<unk>", "<bos>")]
        words += [("▁", -2.0), *((letter, -3.0 - n / 10) for n, letter in enumerate(LETTERS))]
        fast = Tokenizer(models.Unigram(words, unk_id=2))
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
        fast.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 3)]
        )
        special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk", "bos")}
        gemma = Gemma2Config(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
        )
        transformer = SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=32,
        )
        autoencoder = AutoencoderDC(
            latent_channels=8,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3,
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.41407,
        )
        SanaPipeline(
            transformer=_random(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder.eval(),
            text_encoder=_random(Gemma2Model(gemma)),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=fast, **special),
        ).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Every word of the pipeline's template is one token, as in the published one, so its beginning
    takes 34; other words are letters."""
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    ends = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end")]
    split = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word for part in re.split(r"<\|\w+\|>", template) for word, _ in split(part)]
    merges = dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word)))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [*sorted(alphabet), *(a + b for a, b in merges), *ends]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocabulary, [*merges], additional_special_tokens=ends)


def write_qwen_image(folder: Path, **config: Any) -> Path:
    """A QwenImagePipeline; tokens of 4 pixels, of 4 channels of latents. ``config`` is of the
    transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        words = qwen_tokenizer()
        text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 37}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
        text |= {"bos_token_id": None, "eos_token_id": None}
        eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 17, "num_heads": 2}
        eyes |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
        qwen = Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            **config,
        )
        autoencoder = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.76, -0.71, 0.11, 1.55],
            latents_std=[2.8, 1.5, 2.3, 1.1],
        )
        QwenImagePipeline(
            transformer=_random(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                max_image_seq_len=8192,
                max_shift=0.9,
                shift_terminal=0.02,
            ),
            vae=autoencoder.eval(),
            text_encoder=_random(Qwen2_5_VLForConditionalGeneration(qwen)),
            tokenizer=words,
        ).save_pretrained(folder)
    return folder
