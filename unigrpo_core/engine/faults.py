"""What passes through the engine when a plugin's code fails, and is not that plugin's fault."""

from __future__ import annotations

import torch

from unigrpo_core.errors import UserError


def passes(error: BaseException) -> bool:
    """Whether an error of a plugin's code is said as it is: it is told already, the user's own
    Ctrl-C, or a lack of memory. Any other is named as that plugin's."""
    return isinstance(error, UserError | KeyboardInterrupt) or no_memory(error)


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or here."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
