"""RMSNorm, with a gradient of its own where the plain formula's would be slow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXACT = (torch.float32, torch.float64)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis of x [..., width], computed in float32 and returned in
    x's type; ``frozen``: without a gradient to the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        weight = self.weight.detach() if frozen else self.weight
        if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in EXACT:
            y: Tensor = _OnCPU.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * weight.to(x.dtype)


class _OnCPU(torch.autograd.Function):
    """torch has no kernel of RMSNorm for a CPU, and its chain of small ones has a gradient about
    twice as slow as this, which keeps x and 1 / rms(x) only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        y: Tensor = (x * scale).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normed = x * scale
        each = grad * normed
        d_weight = each.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (each @ weight).unsqueeze(-1).div_(x.shape[-1])
        d_x = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
        return d_x, d_weight, None
