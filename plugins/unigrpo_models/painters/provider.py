"""The image flow policies as plugins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Files, Placement, Provider, fetched_folder, local_folder
from unigrpo_models.painters.counted import FLUX, SANA, SD3, Transformer
from unigrpo_models.painters.folder import FILES, grid_notes, weights_of
from unigrpo_models.painters.options import (
    DrawingOptions,
    FluxOptions,
    PainterOptions,
    QwenImageOptions,
    SanaOptions,
    SD3Options,
)

if TYPE_CHECKING:
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.adapters import Lora
    from unigrpo_models.painters.painter import Painter
    from unigrpo_models.painters.policy import PainterPolicy


@dataclass(frozen=True)
class Kind:
    """A painter by name: ``load(options, folder, placement, type of the network's weights)``.
    ``counted`` is what its account is made by; None: it has none."""

    name: str
    options: type[DrawingOptions]
    load: Callable[..., Painter]
    summary: str
    cite: str
    counted: Transformer | None = None


def _load_sd3(*arguments: Any) -> Painter:
    from unigrpo_models.painters.sd3 import load_sd3

    return load_sd3(*arguments)


def _load_flux(*arguments: Any) -> Painter:
    from unigrpo_models.painters.flux import load_flux

    return load_flux(*arguments)


def _load_sana(*arguments: Any) -> Painter:
    from unigrpo_models.painters.sana import load_sana

    return load_sana(*arguments)


def _load_qwen_image(*arguments: Any) -> Painter:
    from unigrpo_models.painters.qwen_image import load_qwen_image

    return load_qwen_image(*arguments)


KINDS = (
    Kind(
        "sd3",
        SD3Options,
        _load_sd3,
        "Stable Diffusion 3 and 3.5: draws prompts",
        "Esser et al. 2024, arXiv 2403.03206",
        SD3,
    ),
    Kind(
        "flux",
        FluxOptions,
        _load_flux,
        "FLUX.1: draws prompts",
        "Black Forest Labs 2024, https://github.com/black-forest-labs/flux",
        FLUX,
    ),
    Kind(
        "sana",
        SanaOptions,
        _load_sana,
        "Sana: draws prompts",
        "Xie et al. 2024, arXiv 2410.10629",
        SANA,
    ),
    Kind(
        "qwen_image",
        QwenImageOptions,
        _load_qwen_image,
        "Qwen-Image: draws prompts",
        "Wu et al. 2025, arXiv 2508.02324",
    ),
)


def paint(kind: Kind, options: PainterOptions, place: Placement) -> Painter:
    """The painter of a checkpoint; its network is float32 where all of it is trained.

    Raises:
        UserError: diffusers is missing, or the checkpoint does not fit or is not there.
    """
    import torch

    whole = "image" in place.train and not options.lora_rank
    path = fetched_folder("checkpoint", options.checkpoint, _files(options.checkpoint))
    return kind.load(options, path, place, torch.float32 if whole else place.compute)


def adapters_of(options: PainterOptions, painter: Painter) -> Lora | None:
    """The adapters that the options ask for."""
    from unigrpo_models.adapters import Lora

    rank, targets = options.lora_rank, options.lora_image or painter.targets
    return Lora(rank, options.lora_alpha or 2 * rank, {"image": targets}) if rank else None


def _files(checkpoint: str) -> Files:
    """What a run reads; without the weights that a folder's configurations name a download is not
    whole."""
    try:
        there = local_folder("checkpoint", checkpoint, FILES)
    except UserError:
        return FILES
    return replace(FILES, published=(*FILES.published, *weights_of(there)))


def notes(options: PainterOptions) -> Sequence[str]:
    try:
        files = _files(options.checkpoint)
        folder = local_folder("checkpoint", options.checkpoint, files)
    except UserError as error:
        return (str(error),)
    missing = [name for name in files.published if not (folder / name).exists()]
    return (*(f"not there yet: {folder / name}" for name in missing), *grid_notes(folder))


def provider_of(kind: Kind) -> Provider:
    def build(options: DrawingOptions, place: Placement) -> PainterPolicy:
        from unigrpo_models.painters.policy import PainterPolicy

        painter = paint(kind, options, place)
        return PainterPolicy(
            painter,
            place,
            template=options.template,
            negative=options.negative,
            lora=adapters_of(options, painter),
        )

    def account(options: DrawingOptions, load: Workload) -> Account | str:
        from unigrpo_models.painters.account import account

        assert kind.counted is not None
        return account(kind.counted, options, load)

    return Provider(
        name=kind.name,
        build=build,
        options=kind.options,
        summary=kind.summary,
        cite=kind.cite,
        provides=("image", "branch:text"),
        notes=notes,
        account=account if kind.counted else None,
    )


PROVIDERS = tuple(provider_of(kind) for kind in KINDS)
