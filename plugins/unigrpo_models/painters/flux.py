"""FLUX.1.

Sources
    Black Forest Labs 2024 (https://github.com/black-forest-labs/flux); diffusers 0.42, FluxPipeline
    and FluxTransformer2DModel.

Conventions
    Latents ``*`` are (h, w, 64): tokens of 2 x 2 latents of 16 channels, each (channel, row in
    patch, column), so the pipeline's packed latents are ``x.flatten(1, 2)``. The network takes time
    as t and its output is v = noise - data. A text is ``max_text_tokens`` of T5; CLIP's pooled
    output goes with the time. Image tokens stand at (0, row, column), those of the text at 0.
    Shift: dynamic in FLUX.1-dev, by the number of image tokens; none in schnell. The pipeline's
    own grid is ``grid = "linear"`` of the schedulers here.
    Embedded guidance: what was distilled into the model takes a scale as an input, at every time
    and in every branch alike. The guidance of a recipe (``image.guidance``) is the other kind, and
    costs a second call: the pipeline's ``true_cfg_scale``.

Deviations and readings
    1. A text that an encoder would cut is refused by default (``overlong``). The pipeline cuts:
       CLIP reads 77 tokens.
    2. In bfloat16 the network itself rounds t to 8 bits, as in the pipeline; sampler and trainer
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
from unigrpo_models.painters.counted import FLUX
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
    from unigrpo_models.painters.options import FluxOptions

PATCH = 2
GUIDANCE = 3.5
"""The pipeline's default for the embedded guidance."""


class FluxPainter(Painter):
    """See the module's docstring.

    Args:
        words: CLIP's tokenizer and T5's.
        clip, t5: CLIPTextModel and T5EncoderModel.

    Raises:
        UserError: a guidance is stated that the network does not take.
    """

    targets: ClassVar[tuple[str, ...]] = FLUX.targets
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")

    def __init__(
        self,
        folder: PipelineFolder,
        place: Placement,
        network: nn.Module,
        words: Sequence[Tokenizer],
        clip: Any,
        t5: Any,
        autoencoder: Any,
        options: FluxOptions,
    ) -> None:
        super().__init__(
            folder.path, place, network, (clip, t5), options.text_encoders, options.kept_texts
        )
        self._words, self._clip, self._t5 = tuple(words), clip, t5
        self._autoencoder, self._shift = autoencoder, folder.shift
        config: Any = network.config
        self._channels: int = config.in_channels
        self._guidance = options.embedded_guidance
        if config.guidance_embeds:
            self._guidance = GUIDANCE if self._guidance is None else self._guidance
        elif self._guidance is not None:
            raise UserError(
                f"policy.embedded_guidance is {self._guidance}, but the transformer of "
                f"{folder.path} takes none (guidance_embeds is false): leave it out, and guide by "
                "image.guidance"
            )

    def readers(self, text: str) -> Sequence[tuple[Tokenizer, str]]:
        return [(words, text) for words in self._words]

    def read(self, text: str) -> Condition:
        device, dtype = self.place.device, self.place.compute
        short, long = (words.ids(text, device) for words in self._words)
        return {
            "text": self._t5(long)[0].to(dtype),
            "pooled": self._clip(short).pooler_output.to(dtype),
        }

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return *self._grid(size), self._channels

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width = self._grid(size)
        return height * width + self._words[1].limit

    def time_shift(self, size: tuple[int, int]) -> float:
        height, width = self._grid(size)
        return self._shift(height * width)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = x_t.shape[1:3]
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack((torch.zeros_like(row), row, column), 2).flatten(0, 1)
        scale = None if self._guidance is None else torch.full_like(t, self._guidance)
        v: Tensor = network(
            hidden_states=x_t.flatten(1, 2),
            timestep=t,
            guidance=scale,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            txt_ids=torch.zeros(condition["text"].shape[1], 3, device=x_t.device),
            img_ids=places.to(x_t),
            return_dict=False,
        )[0]
        return v.view(x_t.shape)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return decode_images(self._autoencoder, unpacked(latents, PATCH))

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return grid_of(size, PATCH * vae_stride(self._autoencoder))


def load_flux(
    options: FluxOptions, path: Path, place: Placement, weights: torch.dtype
) -> FluxPainter:
    """The painter of a pipeline's folder, its network in the type ``weights``.

    Raises:
        UserError: diffusers is missing, or the folder does not fit.
    """
    need_diffusers("flux")
    texts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    folder = open_pipeline(
        path,
        "FluxPipeline",
        "FluxTransformer2DModel",
        ("scheduler", "transformer", "vae", *texts),
    )
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import (  # type: ignore[attr-defined]
        CLIPTextModel,
        CLIPTokenizer,
        T5EncoderModel,
        T5TokenizerFast,
    )

    short = load_tokenizer(CLIPTokenizer, path / texts[0])
    long = load_tokenizer(T5TokenizerFast, path / texts[2])
    words = (
        Tokenizer(texts[0], short, short.model_max_length, options.overlong),
        Tokenizer(texts[2], long, options.max_text_tokens, options.overlong),
    )
    clip = load_model(CLIPTextModel, path / texts[1], place.compute, place.device)
    t5 = load_model(T5EncoderModel, path / texts[3], place.compute, place.device)
    network = load_model(FluxTransformer2DModel, path / "transformer", weights, place.device)
    autoencoder = load_model(AutoencoderKL, path / "vae", torch.float32, place.device)
    return FluxPainter(folder, place, network, words, clip, t5, autoencoder, options)
