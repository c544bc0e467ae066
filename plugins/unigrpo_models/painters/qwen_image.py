"""Qwen-Image.

Sources
    Wu et al. 2025, arXiv 2508.02324; diffusers 0.42, QwenImagePipeline and
    QwenImageTransformer2DModel.

Conventions
    Latents ``*`` are (h, w, 64): tokens of 2 x 2 latents of 16 channels, each (channel, row in
    patch, column), so the pipeline's packed latents are ``x.flatten(1, 2)``. The autoencoder is one
    of videos, and an image its only frame: it takes x * latents_std + latents_mean by channel. The
    network takes time as t and its output is v = noise - data. A text is told to Qwen2.5-VL in the
    pipeline's template; of the last states the ``max_text_tokens`` behind the template's beginning
    are read, padding masked.
    Shift: dynamic, by the number of image tokens. The pipeline's own grid is ``grid = "linear"``
    of the schedulers here, in the published ones with ``shift_terminal = 0.02``.
    Guidance: the pipeline's is ``{ use = "cfg", renorm = "channel_exact" }``: a token is the last
    axis here as there.

Deviations and readings
    1. A text that would be cut is refused by default (``overlong``). The pipeline cuts, what closes
       the template first.
    2. The pipeline pads to the longest text of a call and leaves out a mask that hides nothing;
       here every text has one length and its mask.
    3. Distilled models with an embedded guidance are refused: the network of diffusers 0.42 has
       the flag and takes no such input.
    4. In bfloat16 the network itself rounds t to 8 bits, as in the pipeline; sampler and trainer
       alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement
from unigrpo_models.painters.folder import PipelineFolder, grid_of, open_pipeline
from unigrpo_models.painters.painter import Condition, Painter
from unigrpo_models.painters.parts import (
    Tokenizer,
    decode_images,
    load_model,
    load_tokenizer,
    need_diffusers,
    unpacked,
    vae_stride,
)

if TYPE_CHECKING:
    from unigrpo_models.painters.options import QwenImageOptions


class QwenImagePainter(Painter):
    """See the module's docstring.

    Args:
        words: Qwen2Tokenizer, which pads on the right.
        qwen: Qwen2_5_VLForConditionalGeneration.
    """

    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Those of diffusers' own training script."""
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)

    def __init__(
        self,
        folder: PipelineFolder,
        place: Placement,
        network: nn.Module,
        words: Tokenizer,
        qwen: Any,
        autoencoder: Any,
        options: QwenImageOptions,
    ) -> None:
        super().__init__(
            folder.path, place, network, (qwen,), options.text_encoders, options.kept_texts
        )
        self._words, self._qwen = words, qwen
        self._autoencoder, self._shift = autoencoder, folder.shift
        self._config: Any = network.config

    def readers(self, text: str) -> Sequence[tuple[Tokenizer, str]]:
        return [(self._words, text)]

    def read(self, text: str) -> Condition:
        ids, mask = self._words.padded(text, self.place.device)
        states = self._qwen.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        behind = slice(self._words.dropped, None)
        return {"text": states[:, behind].to(self.place.compute), "mask": mask[:, behind]}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return *self._grid(size), self._config.in_channels

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width = self._grid(size)
        return height * width + self._words.limit

    def time_shift(self, size: tuple[int, int]) -> float:
        height, width = self._grid(size)
        return self._shift(height * width)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows, height, width = x_t.shape[:3]
        v: Tensor = network(
            hidden_states=x_t.flatten(1, 2),
            timestep=t,
            encoder_hidden_states=condition["text"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, height, width)]] * rows,
            return_dict=False,
        )[0]
        return v.view(x_t.shape)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        frames = unpacked(latents, self._config.patch_size).unsqueeze(2)
        return decode_images(self._autoencoder, frames)[:, :, 0]

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return grid_of(size, self._config.patch_size * vae_stride(self._autoencoder))


def load_qwen_image(
    options: QwenImageOptions, path: Path, place: Placement, weights: torch.dtype
) -> QwenImagePainter:
    """The painter of a pipeline's folder, its network in the type ``weights``.

    Raises:
        UserError: diffusers is missing or too old, or the folder does not fit.
    """
    need_diffusers("qwen_image", 37)  # before, the network took no mask of a text
    folder = open_pipeline(
        path,
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        ("scheduler", "transformer", "vae", "tokenizer", "text_encoder"),
    )
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    pipeline: Any = QwenImagePipeline
    empty = pipeline(None, None, None, None, None)
    tokenizer = load_tokenizer(Qwen2Tokenizer, path / "tokenizer")
    tokenizer.padding_side = "right"
    words = Tokenizer(
        "tokenizer",
        tokenizer,
        options.max_text_tokens,
        options.overlong,
        template=empty.prompt_template_encode,
        dropped=empty.prompt_template_encode_start_idx,
    )
    kind = Qwen2_5_VLForConditionalGeneration
    qwen = load_model(kind, path / "text_encoder", place.compute, place.device)
    network = load_model(QwenImageTransformer2DModel, path / "transformer", weights, place.device)
    if network.config.guidance_embeds:
        raise UserError(
            f"{path}: its transformer takes a guidance as an input, as distilled models do; "
            "this policy takes Qwen-Image itself"
        )
    autoencoder = load_model(AutoencoderKLQwenImage, path / "vae", torch.float32, place.device)
    return QwenImagePainter(folder, place, network, words, qwen, autoencoder, options)
