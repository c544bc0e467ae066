"""The sizes of a BAGEL model, read from its folder.

``llm_config.json`` has the Qwen2 fields. What the official loader hard-codes is not read from the
files here either: ``qk_norm``, ``tie_word_embeddings`` and ``layer_module`` are ignored (there is
qk-norm, an untied head, and the mixture of transformers), and latent patch 2 and the FLUX
autoencoder are the defaults of ``Latent``. The side of the position table, hard-coded as 64 there,
is that of the stored table. A folder whose ``config.json`` has a table "latent" says otherwise, as
the embedded model's does. A field that asks for what is not built here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unigrpo_core.errors import UserError
from unigrpo_models.bagel.layout import WEIGHTS, inventory
from unigrpo_models.stored import Stored

TABLE = "latent_pos_embed.pos_embed"


class LanguageConfig(BaseModel):
    """The fields of ``llm_config.json`` that matter; others are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Latent(BaseModel):
    """How images become latent tokens: ``patch`` x ``patch`` positions of a grid with ``channels``
    numbers each. ``space`` "pixels": the grid is the image itself, scaled to [-1, 1]; "flux": the
    FLUX autoencoder's, 8 times smaller than the image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Literal["pixels", "flux"] = "flux"
    patch: int = Field(2, gt=0)
    channels: int = Field(16, gt=0)
    max_size: int = Field(64, gt=0, description="side of the position table, in tokens")
    time_shift: float = Field(3.0, gt=0, description="timestep shift in sampling")

    @property
    def token_width(self) -> int:
        return self.patch**2 * self.channels

    @property
    def stride(self) -> int:
        """Pixels per token along a side."""
        return self.patch * (1 if self.space == "pixels" else 8)


class VitConfig(BaseModel):
    """The fields of ``vit_config.json`` that matter; others are kept as they are. The last of the
    layers it counts is not used, and is in no file."""

    model_config = ConfigDict(extra="allow", frozen=True)

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=1)
    patch_size: int = Field(14, gt=0)
    image_size: int = Field(980, gt=0, description="longest side of an image, in pixels")
    layer_norm_eps: float = 1e-6

    @property
    def layers(self) -> int:
        return self.num_hidden_layers - 1

    @property
    def side(self) -> int:
        """Patches along the longest side: the side of both position tables."""
        return self.image_size // self.patch_size


class BagelConfig(BaseModel):
    model_config = ConfigDict(frozen=True)

    llm: LanguageConfig
    latent: Latent = Latent()
    vit: VitConfig | None = None  # None: a model that does not look at images

    @classmethod
    def published(cls) -> BagelConfig:
        """The sizes of BAGEL-7B-MoT, for what is asked before its checkpoint is there."""
        return cls(
            llm=LanguageConfig(
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                rope_theta=1e6,
            ),
            vit=VitConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_attention_heads=16,
                num_hidden_layers=27,
            ),
        )

    @classmethod
    def read(cls, folder: Path) -> BagelConfig:
        """The configuration of a checkpoint folder.

        Raises:
            UserError: a file is missing or does not fit.
        """
        try:
            llm = LanguageConfig.model_validate_json((folder / "llm_config.json").read_text())
            name = folder / "config.json"
            extra = _Extra.model_validate_json(name.read_text()) if name.exists() else _Extra()
            eye = folder / "vit_config.json"
            vit = VitConfig.model_validate_json(eye.read_text()) if eye.exists() else None
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is no BAGEL checkpoint: it has no llm_config.json; {inventory(folder)}"
            ) from error
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or error.title}: {item['msg']}"
                for item in error.errors(include_url=False)
            )
            raise UserError(f"{folder} is no BAGEL checkpoint: {problems}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder} is no BAGEL checkpoint: {error}") from error
        if problems := "; ".join(_unsupported(llm)):
            raise UserError(f"{folder / 'llm_config.json'} asks for what is not built: {problems}")
        latent = extra.latent
        if "max_size" not in latent.model_fields_set:
            latent = latent.model_copy(update={"max_size": _table_side(folder, latent.max_size)})
        return cls(llm=llm, latent=latent, vit=vit)


ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "interpolate_pos": (False,),
}
"""Fields of ``llm_config.json`` with the values that can be computed; absent is one of them."""


def _unsupported(llm: LanguageConfig) -> Iterator[str]:
    """What cannot be computed, each with its field's name."""
    for name, values in ONLY.items():
        got = (llm.model_extra or {}).get(name, values[0])
        if got not in values:
            yield f"{name} is {got!r}, only {values[0]!r} is"
    width, heads, kv = llm.hidden_size, llm.num_attention_heads, llm.num_key_value_heads
    if width % (2 * heads):
        yield f"hidden_size {width} is not an even multiple of num_attention_heads {heads}"
    if width % 4:
        yield f"hidden_size {width} is not a multiple of 4, as the position table needs"
    if heads % kv:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}"
    stated = (llm.model_extra or {}).get("head_dim", llm.head_dim)
    if stated != llm.head_dim:
        yield f"head_dim is {stated!r}, only hidden_size / num_attention_heads is"


def _table_side(folder: Path, default: int) -> int:
    """S of the stored table [S * S, D]; the default where there are no weights yet."""
    if not (folder / WEIGHTS).exists():
        return default
    stored = Stored(folder / WEIGHTS)
    stored.close()
    table = stored.entries.get(TABLE)
    return math.isqrt(table.shape[0]) if table and table.shape and table.shape[0] else default


class _Extra(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    latent: Latent = Latent()
