"""What passes through the engine when a plugin's code fails, and is not that plugin's fault."""

from __future__ import annotations

import torch

from unigrpo_core.errors import UserError

PASSED = (UserError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or here."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
