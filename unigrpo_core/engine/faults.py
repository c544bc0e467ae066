"""Whose fault it is when something fails: a plugin's, which is named, or a lack of memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import torch
from torch import Tensor

from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.loading import file_of, said
from unigrpo_core.plugin import Provider
from unigrpo_core.recipe import Recipe
from unigrpo_core.recipe.schema import slots

OURS = "unigrpo"
"""The distribution whose failures are bugs of ours, to be reported, and no plugin's."""


@contextmanager
def blamed(who: str) -> Iterator[None]:
    """Around a call into a plugin's code.

    Raises:
        PluginError: it failed; the message begins with ``who``. What is told already, the user's
            own Ctrl-C and a lack of memory pass as they are.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError | KeyboardInterrupt) or no_memory(error):
            raise
        raise PluginError(f"{who} failed: {said(error)}") from error


@contextmanager
def told(recipe: Recipe) -> Iterator[None]:
    """Around the work of a recipe, in which its components are called from many places.

    Raises:
        UserError: there is too little memory, on the device or here.
        PluginError: a component of somebody else failed, which is the one whose file, or package,
            the error came through last.
    """
    try:
        yield
    except Exception as error:
        if no_memory(error):
            raise UserError(
                f"out of memory: lower compute.rollout_rows (now {recipe.compute.rollout_rows}), "
                "compute.rollout_images or "
                f"compute.replay_tokens (now {recipe.compute.replay_tokens}), which change no "
                f"draw; {' '.join(str(error).split())[:200]}"
            ) from error
        who = "" if isinstance(error, UserError) else _whose(recipe, error)
        if not who:
            raise
        raise PluginError(f"{who} failed: {said(error)}") from error


def floats(who: str, values: object, shape: Sequence[int], what: str = "") -> Tensor:
    """The values that a component returned; ``what`` says as what ("as loss").

    Raises:
        PluginError: they are no float tensor of that shape. Another would be broadcast to a
            meaningless loss.
    """
    if isinstance(values, Tensor):
        if values.is_floating_point() and values.shape == tuple(shape):
            return values
        values = f"{values.dtype} {tuple(values.shape)}"
    got = f"{values} {what}".rstrip()
    raise PluginError(f"{who} returned {got}, expected floats {tuple(shape)}")


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or here."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _whose(recipe: Recipe, error: BaseException) -> str:
    """The component that a file belongs to, or those that it may belong to; empty if it is none of
    somebody else."""
    theirs = [slot for _, slot in slots(recipe) if slot.component.distribution != OURS]
    files = [(slot.who, file_of(slot.component.provider)) for slot in theirs]
    folders = [(slot.who, _package(slot.component.provider)) for slot in theirs]
    through = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    for file in reversed(through):
        exact = [who for who, own in files if own == file]
        near = [who for who, folder in folders if folder and Path(file).is_relative_to(folder)]
        if exact or near:
            return " or ".join(dict.fromkeys(exact or near))
    return ""


def _package(provider: Provider) -> Path | None:
    """The folder of the package that ``build`` stands in, if it is one."""
    top = sys.modules.get(provider.build.__module__.partition(".")[0])
    file = Path(getattr(top, "__file__", None) or "")
    return file.parent if file.name == "__init__.py" else None
