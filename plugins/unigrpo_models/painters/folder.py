"""A pipeline's folder in diffusers' layout: what it has, known without torch and before a load.

Source
    diffusers 0.42: ``model_index.json`` names the pipeline's class, and of each component library
    and class, or nulls; a component's files stand in a folder of its name.

Convention
    Time runs from t = 1 (noise) to 0, so a flow-match scheduler's sigma is t, and its ``shift`` is
    the engine's. A dynamic shift depends on the number of image tokens: with mu on the line through
    (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), the shift is exp(mu)
    ("exponential") or mu ("linear"). Other schedulers are flow-match if they predict a flow on flow
    sigmas; their shift is ``flow_shift``.

Deviations and readings
    1. The grid is the recipe's, so a scheduler that bends it in a way that no grid follows (Karras,
       exponential or beta sigmas; inversion) is refused, not ignored.
    2. A terminal that its times are stretched to (``shift_terminal``) is an option of the recipe's
       schedulers; ``unigrpo check`` says that the model has one.
    3. Its stochastic sampling is ignored: noise is the recipe's scheduler's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Files

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
FLOW_MATCH = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
BENDS = (
    *("invert_sigmas", "use_karras_sigmas"),
    *("use_exponential_sigmas", "use_beta_sigmas"),
)
FILES = Files(
    needed=(INDEX,),
    published=(SCHEDULER, "transformer/config.json", "vae/config.json"),
    optional=(
        *("*/config.json", "tokenizer*/*"),
        *("transformer/diffusion_pytorch_model*.index.json", "text_encoder*/model*.index.json"),
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model-*-of-*.safetensors",
        *("text_encoder*/model.safetensors", "text_encoder*/model-*-of-*.safetensors"),
    ),
)
"""What is read of a repository: no variants in other types, no single-file copies, no pickles."""


def weights_of(path: Path) -> tuple[str, ...]:
    """The files of weights that the components of a folder need, as far as what is there of them
    says: a download that was cut off has the small files first."""
    found: list[str] = []
    for config in sorted(path.glob("*/config.json")):
        part = config.parent
        stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
        if stem != "model" and part.name not in ("transformer", "vae"):
            continue
        index = part / f"{stem}.safetensors.index.json"
        names = {f"{stem}.safetensors"}
        if index.is_file():
            names = {*read_json(index, "is not there").get("weight_map", {}).values()}
        found += [f"{part.name}/{name}" for name in sorted(names)]
    return tuple(found)


def grid_notes(path: Path) -> tuple[str, ...]:
    """What a user should know of the times that a folder's scheduler has, if it is there."""
    try:
        terminal = read_json(path / SCHEDULER, "is not there").get("shift_terminal")
    except UserError:
        return ()
    if not terminal:
        return ()
    return (
        f"the model's own times are stretched to end at {terminal} before 0: the recipe's "
        f"schedulers do so with shift_terminal = {terminal}, and only with it",
    )


@dataclass(frozen=True)
class Shift:
    """The timestep shift of a scheduler's configuration."""

    config: Mapping[str, Any]

    def __call__(self, tokens: int) -> float:
        """For an image of so many tokens."""
        config = self.config
        if config.get("use_flow_sigmas"):
            return float(config.get("flow_shift", 1.0))
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = float(base + (most - base) * (tokens - low) / (high - low))
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that has what was asked for."""

    path: Path
    shift: Shift
    components: frozenset[str]


def open_pipeline(
    path: Path, pipeline: str, transformer: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> PipelineFolder:
    """Reads the folder's index and its scheduler's configuration.

    Args:
        pipeline, transformer: the classes that it must name.
        needed, optional: components that it must have, and that are taken if it has them.

    Raises:
        UserError: it is no such pipeline, lacks a component, or is no flow-match one.
    """
    index = read_json(path / INDEX, f"is no folder of a {pipeline}: it has no {INDEX}")
    found = index.get("_class_name")
    if found != pipeline:
        raise UserError(f"{path} is a {found}, which this policy is not for: it takes {pipeline}")
    named = {name: entry[1] for name, entry in index.items() if _is_component(entry)}
    missing = [name for name in needed if name not in named or not (path / name).is_dir()]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; a {pipeline} needs {', '.join(needed)}: download "
            "or save the pipeline again"
        )
    if named["transformer"] != transformer:
        raise UserError(
            f"{path}: its transformer is a {named['transformer']}; this policy takes {transformer}"
        )
    scheduler = read_json(path / SCHEDULER, f"lacks {SCHEDULER}")
    _check_flow(path, scheduler)
    there = {*needed, *(n for n in optional if n in named and (path / n).is_dir())}
    return PipelineFolder(path, Shift(scheduler), frozenset(there))


def grid_of(size: tuple[int, int], stride: int, limit: int | None = None) -> tuple[int, int]:
    """The rows and columns of tokens of ``stride`` pixels in an image of (height, width).

    Raises:
        UserError: a side is no multiple of the stride, or has more than ``limit`` tokens.
    """
    for name, side in zip(("height", "width"), size, strict=True):
        if side % stride or side < stride or (limit is not None and side > limit * stride):
            most = "" if limit is None else f" up to {limit * stride}"
            raise UserError(
                f"image {name} {side}: this model draws multiples of {stride} pixels{most}"
            )
    return size[0] // stride, size[1] // stride


def stride_of(autoencoder: Mapping[str, Any]) -> int:
    """Pixels of a latent's side, by the autoencoder's configuration."""
    names = "block_out_channels", "encoder_block_out_channels", "dim_mult"
    stages = next(autoencoder[name] for name in names if autoencoder.get(name))
    return int(2 ** (len(stages) - 1))


def _check_flow(path: Path, scheduler: Mapping[str, Any]) -> None:
    found = scheduler.get("_class_name")
    flow = scheduler.get("use_flow_sigmas"), scheduler.get("prediction_type")
    if found not in FLOW_MATCH and flow != (True, "flow_prediction"):
        raise UserError(
            f"{path}: its scheduler is a {found}, which is not flow-match; the model must predict "
            f"the velocity noise - data of a flow, with {' or '.join(FLOW_MATCH)}"
        )
    bent = [name for name in BENDS if scheduler.get(name)]
    if bent:
        raise UserError(
            f"{path}: its scheduler has {', '.join(bent)}, which no grid of a recipe follows; "
            f"where images are right without, take it out of {SCHEDULER}"
        )


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def read_json(path: Path, without: str) -> dict[str, Any]:
    """The object in a file; ``without`` says what is wrong where it is missing.

    Raises:
        UserError: it is missing, cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent if path.name == INDEX else path} {without}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found
