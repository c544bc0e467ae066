"""From an open file of weights to tensors: all that are wanted, straight to place and type."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_models.stored import Stored

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
BUFFER = 1 << 24  # bytes

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(x.shape) for name, x in state.items()}


def check_fit(stored: Stored, wanted: Shapes, what: str, spare: tuple[str, ...] = ()) -> None:
    """Whether a file has the tensors that are wanted and no other, save those whose names begin
    with one of ``spare``; ``what`` says what it is not if it does not. No data is read.

    Raises:
        UserError: tensors are missing, unexpected, misshapen or of whole numbers.
    """
    found = stored.entries
    problems = [f"missing {name} {wanted[name]}" for name in sorted(wanted.keys() - found.keys())]
    problems += [
        f"unexpected {name}"
        for name in sorted(found.keys() - wanted.keys())
        if not name.startswith(spare)
    ]
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].shape != wanted[name]:
            problems.append(f"{name} is {found[name].shape}, expected {wanted[name]}")
        elif found[name].dtype not in TYPES:
            problems.append(f"{name} is of type {found[name].dtype}, expected {' or '.join(TYPES)}")
    if problems:
        listed = "\n  ".join(problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{stored.path} {what}:\n  {listed}{more}")


def read(
    stored: Stored, wanted: Shapes, device: torch.device, type_of: Callable[[str], torch.dtype]
) -> dict[str, Tensor]:
    """New tensors of a file that fits."""
    reader, state = _Reader(stored, device), {}
    for name, shape in wanted.items():
        state[name] = torch.empty(shape, dtype=type_of(name), device=device)
        reader.fill(name, state[name])
    return state


def read_over(stored: Stored, state: Mapping[str, Tensor]) -> None:
    """Fills tensors of one device from a file that fits, so that there are never two of them."""
    reader = _Reader(stored, next(iter(state.values())).device)
    with torch.no_grad():
        for name, x in state.items():
            reader.fill(name, x)


class _Reader:
    """Fills tensors from a file. Into the CPU's memory, in the file's own type, the data are read
    where they stay; everything else goes through one buffer, so that the host holds no second
    copy of a large tensor."""

    def __init__(self, stored: Stored, device: torch.device) -> None:
        self.stored = stored
        pinned = device.type == "cuda"
        self.buffer = torch.empty(BUFFER, dtype=torch.uint8, pin_memory=pinned)

    def fill(self, name: str, x: Tensor) -> None:
        """Fills a contiguous tensor of the right shape, of any type and place."""
        kind = TYPES[self.stored.entries[name].dtype]
        flat = x.view(-1)
        if x.device.type == "cpu" and x.dtype == kind:
            self.stored.read_into(name, flat.view(torch.uint8).numpy().data)
            return
        room = self.buffer.view(kind)
        for start in range(0, len(flat), len(room)):
            part = room[: len(flat) - start]
            data = part.view(torch.uint8).numpy().data
            self.stored.read_into(name, data, start * kind.itemsize)
            flat[start : start + len(part)].copy_(part)
