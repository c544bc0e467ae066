"""The sizes of a BAGEL model, read from its folder.

``llm_config.json`` has the Qwen2 fields. What the official loader hard-codes (qk-norm, untied
head, latent patch 2, table of 64 x 64, FLUX autoencoder) are the defaults of ``Latent``; a folder
whose ``config.json`` has a table "latent" says otherwise, as the embedded model's does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unigrpo_core.errors import UserError


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


class BagelConfig(BaseModel):
    model_config = ConfigDict(frozen=True)

    llm: LanguageConfig
    latent: Latent = Latent()

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
            )
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
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is no BAGEL checkpoint: it has no llm_config.json"
            ) from error
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or error.title}: {item['msg']}"
                for item in error.errors(include_url=False)
            )
            raise UserError(f"{folder} is no BAGEL checkpoint: {problems}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder} is no BAGEL checkpoint: {error}") from error
        return cls(llm=llm, latent=extra.latent)


class _Extra(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    latent: Latent = Latent()
