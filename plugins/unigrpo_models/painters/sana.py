"""Sana.

Sources
    Xie et al. 2024, arXiv 2410.10629; diffusers 0.42, SanaPipeline and SanaTransformer2DModel.

Conventions
    Latents ``*`` are (32, h, w) at a 32nd of the image's side, in the network's scale: the
    autoencoder's are x / scaling_factor. The network takes time as 1000 t timestep_scale, and its
    output is v = noise - data, in the first channels where it also has a variance. A text is
    ``max_text_tokens`` of Gemma 2, lower-case and without blanks around it; padding is masked.
    Instruction: before every text but the negative one stands the pipeline's request to enhance
    the prompt; of what Gemma makes of both, the first position and the last ones are read.
    Shift: the scheduler's, 3 in the published ones. Those have DPM-Solver++ with flow sigmas; with
    flow-match Euler the pipeline's own grid is ``grid = "diffusers"`` of the schedulers here.

Deviations and readings
    1. A text that would be cut is refused by default (``overlong``); the pipeline cuts.
    2. A prompt that is the negative text, word for word, is read without the instruction too.
    3. No binning of sizes: the image has the size that is asked for, or it is refused.
    4. Distilled models with an embedded guidance (Sana-Sprint) are refused: they are no flow.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement
from unigrpo_models.painters.counted import SANA
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
    from unigrpo_models.painters.options import SanaOptions


class SanaPainter(Painter):
    """See the module's docstring.

    Args:
        tokenizer: Gemma's.
        gemma: Gemma2Model.
        instruction: what stands before a prompt; may be empty.
    """

    targets: ClassVar[tuple[str, ...]] = SANA.targets
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)

    def __init__(
        self,
        folder: PipelineFolder,
        place: Placement,
        network: nn.Module,
        tokenizer: Any,
        gemma: Any,
        autoencoder: Any,
        instruction: str,
        options: SanaOptions,
    ) -> None:
        super().__init__(
            folder.path, place, network, (gemma,), options.text_encoders, options.kept_texts
        )
        self._gemma, self._autoencoder, self._shift = gemma, autoencoder, folder.shift
        self._negative, self._instruction = options.negative, instruction
        self._tokens = options.max_text_tokens
        tokenizer.padding_side = "right"
        long = (
            len(tokenizer.encode(instruction)) + self._tokens - 2 if instruction else self._tokens
        )
        self._short = Tokenizer("tokenizer", tokenizer, self._tokens, options.overlong)
        self._long = Tokenizer("tokenizer", tokenizer, long, options.overlong)
        self._config: Any = network.config

    def readers(self, text: str) -> Sequence[tuple[Tokenizer, str]]:
        return [self._told(text)]

    def read(self, text: str) -> Condition:
        words, told = self._told(text)
        ids, mask = words.padded(told, self.place.device)
        states = self._gemma(ids, attention_mask=mask)[0].to(self.place.compute)
        read = [0, *range(words.limit - self._tokens + 1, words.limit)]
        return {"text": states[:, read], "mask": mask[:, read]}

    def _told(self, text: str) -> tuple[Tokenizer, str]:
        """What is read of a text, and by which tokenizer."""
        plain = text.lower().strip()
        if text == self._negative or not self._instruction:
            return self._short, plain
        return self._long, self._instruction + plain

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        height, width = self._grid(size)
        patch = self._config.patch_size
        return self._config.in_channels, height * patch, width * patch

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width = self._grid(size)
        return height * width + self._tokens

    def time_shift(self, size: tuple[int, int]) -> float:
        height, width = self._grid(size)
        return self._shift(height * width)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        v: Tensor = network(
            hidden_states=x_t,
            timestep=t * 1000 * self._config.timestep_scale,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            return_dict=False,
        )[0]
        return v[:, : x_t.shape[1]]

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return decode_images(self._autoencoder, latents)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(size, self._config.patch_size * vae_stride(self._autoencoder))


def load_sana(
    options: SanaOptions, path: Path, place: Placement, weights: torch.dtype
) -> SanaPainter:
    """The painter of a pipeline's folder, its network in the type ``weights``.

    Raises:
        UserError: diffusers is missing, or the folder does not fit.
    """
    need_diffusers("sana")
    folder = open_pipeline(
        path,
        "SanaPipeline",
        "SanaTransformer2DModel",
        ("scheduler", "transformer", "vae", "tokenizer", "text_encoder"),
    )
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from transformers import AutoTokenizer, Gemma2Model

    tokenizer = load_tokenizer(AutoTokenizer, path / "tokenizer")
    gemma = load_model(Gemma2Model, path / "text_encoder", place.compute, place.device)
    network = load_model(SanaTransformer2DModel, path / "transformer", weights, place.device)
    if network.config.guidance_embeds:
        raise UserError(
            f"{path}: its transformer takes a guidance as an input, as distilled models do; "
            "this policy takes Sana itself"
        )
    autoencoder = load_model(AutoencoderDC, path / "vae", torch.float32, place.device)
    instruction = ""
    if options.instruction:
        asked = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
        instruction = "\n".join(asked.default)
    return SanaPainter(folder, place, network, tokenizer, gemma, autoencoder, instruction, options)
