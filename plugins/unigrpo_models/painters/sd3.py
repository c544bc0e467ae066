"""Stable Diffusion 3 and 3.5.

Sources
    Esser et al. 2024, arXiv 2403.03206; diffusers 0.42, StableDiffusion3Pipeline and
    SD3Transformer2DModel.

Conventions
    Latents ``*`` are (16, h, w) at an eighth of the image's side, in the network's scale: the
    autoencoder's are x / scaling_factor + shift_factor. The network takes time as 1000 t, and its
    output is v = noise - data. A text is 77 tokens of both CLIPs, side by side in width, followed
    by ``max_text_tokens`` of T5; the pooled outputs of the CLIPs go with the time.
    Shift: the scheduler's, 3 in the published ones. The pipeline's own grid is ``grid =
    "diffusers"`` of the schedulers here.

Deviations and readings
    1. A text that an encoder would cut is refused by default (``overlong``); the pipeline cuts.
    2. Without T5 its part is zeros, as in the pipeline, of the same length.
    3. Flow-GRPO reads 128 tokens of T5; the default is the pipeline's 256.
    4. The pipeline computes both branches of guidance in one call; here they are two calls of the
       same network. Guidance that skips layers is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from unigrpo_core.plugin import Placement
from unigrpo_models.painters.counted import SD3
from unigrpo_models.painters.folder import PipelineFolder, grid_of, open_pipeline
from unigrpo_models.painters.painter import Condition, Painter
from unigrpo_models.painters.parts import (
    Tokenizer,
    decode_images,
    load_model,
    load_tokenizer,
    need_diffusers,
    vae_stride,
)

if TYPE_CHECKING:
    from unigrpo_models.painters.options import SD3Options

CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
T5 = ("tokenizer_3", "text_encoder_3")


class SD3Painter(Painter):
    """See the module's docstring.

    Args:
        words: the tokenizers of the encoders, T5's last.
        clips: CLIPTextModelWithProjection, two.
        t5: T5EncoderModel or None.
    """

    targets: ClassVar[tuple[str, ...]] = SD3.targets
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)

    def __init__(
        self,
        folder: PipelineFolder,
        place: Placement,
        network: nn.Module,
        words: Sequence[Tokenizer],
        clips: Sequence[Any],
        t5: Any,
        autoencoder: Any,
        options: SD3Options,
    ) -> None:
        encoders = [*clips, t5] if t5 is not None else clips
        super().__init__(
            folder.path, place, network, encoders, options.text_encoders, options.kept_texts
        )
        self._words, self._clips, self._t5 = tuple(words), tuple(clips), t5
        self._autoencoder, self._shift = autoencoder, folder.shift
        self._t5_tokens = options.max_text_tokens
        self._config: Any = network.config

    def readers(self, text: str) -> Sequence[tuple[Tokenizer, str]]:
        return [(words, text) for words in self._words]

    def read(self, text: str) -> Condition:
        device, dtype = self.place.device, self.place.compute
        states, pooled = [], []
        for words, clip in zip(self._words, self._clips, strict=False):
            found = clip(words.ids(text, device), output_hidden_states=True)
            states.append(found.hidden_states[-2].to(dtype))
            pooled.append(found[0].to(dtype))
        width = self._config.joint_attention_dim
        if self._t5 is None:
            long = torch.zeros(1, self._t5_tokens, width, device=device, dtype=dtype)
        else:
            long = self._t5(self._words[-1].ids(text, device))[0].to(dtype)
        short = torch.cat(states, 2)
        short = nn.functional.pad(short, (0, width - short.shape[2]))
        return {"text": torch.cat((short, long), 1), "pooled": torch.cat(pooled, 1)}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        patch = self._config.patch_size
        height, width = self._grid(size)
        return self._config.in_channels, height * patch, width * patch

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width = self._grid(size)
        return height * width + self._words[0].limit + self._t5_tokens

    def time_shift(self, size: tuple[int, int]) -> float:
        height, width = self._grid(size)
        return self._shift(height * width)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        v: Tensor = network(
            hidden_states=x_t,
            timestep=t * 1000,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return v

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return decode_images(self._autoencoder, latents)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches."""
        stride = self._config.patch_size * vae_stride(self._autoencoder)
        return grid_of(size, stride, self._config.pos_embed_max_size)


def load_sd3(options: SD3Options, path: Path, place: Placement, weights: torch.dtype) -> SD3Painter:
    """The painter of a pipeline's folder, its network in the type ``weights``.

    Raises:
        UserError: diffusers is missing, or the folder does not fit.
    """
    need_diffusers("sd3")
    clips = [name for pair in CLIPS for name in pair]
    folder = open_pipeline(
        path,
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        ("scheduler", "transformer", "vae", *clips, *(T5 if options.text_encoder_3 else ())),
    )
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import (  # type: ignore[attr-defined]
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5EncoderModel,
        T5TokenizerFast,
    )

    words: list[Tokenizer] = []
    encoders, t5 = [], None
    for name, encoder in CLIPS:
        tokenizer = load_tokenizer(CLIPTokenizer, path / name)
        limit = words[0].limit if words else tokenizer.model_max_length
        words.append(Tokenizer(name, tokenizer, limit, options.overlong))
        kind = CLIPTextModelWithProjection
        encoders.append(load_model(kind, path / encoder, place.compute, place.device))
    if options.text_encoder_3:
        tokenizer = load_tokenizer(T5TokenizerFast, path / T5[0])
        words.append(Tokenizer(T5[0], tokenizer, options.max_text_tokens, options.overlong))
        t5 = load_model(T5EncoderModel, path / T5[1], place.compute, place.device)
    network = load_model(SD3Transformer2DModel, path / "transformer", weights, place.device)
    autoencoder = load_model(AutoencoderKL, path / "vae", torch.float32, place.device)
    return SD3Painter(folder, place, network, words, encoders, t5, autoencoder, options)
