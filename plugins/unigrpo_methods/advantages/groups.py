"""Arithmetic of groups of rows, shared by the advantages.

Convention
    Values are float64 [E]; groups are numbered from 0, int64 [E]; what is at rows that are not
    valid enters nothing and comes out as 0. Where all values of a group are equal their centred
    values are exactly 0, because values are taken relative to the smallest of their group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def numbered(group: Tensor) -> Tensor:
    """int64 [E]: the groups numbered from 0, whatever numbers they had."""
    import torch

    numbers: Tensor = torch.unique(group, return_inverse=True)[1]
    return numbers


def known(rewards: Tensor, valid: Tensor) -> Tensor:
    """float64 [E, R]: the rewards, 0 at invalid rows, where they may be anything."""
    return rewards.double().masked_fill(~valid[:, None], 0)


def combined(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """[E]: the weighted sum of the rewards [E, R]."""
    return (known(rewards, valid) * weights.double()).sum(1)


def centred(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """[E]: values less the mean of their group."""
    infinite = values.masked_fill(~valid, float("inf"))
    smallest = infinite.scatter_reduce(0, group, infinite, "amin", include_self=False)
    above = (values - smallest[group]).masked_fill(~valid, 0)  # exactly 0 among equal values
    return (above - mean(above, group, valid)).masked_fill(~valid, 0)


def scaled(values: Tensor, spread: Tensor, group: Tensor, valid: Tensor, floor: float) -> Tensor:
    """[E]: values over the population's standard deviation, plus ``floor``, that ``spread`` [E] has
    in each row's group; values are 0 wherever the spread is."""
    variance = mean(centred(spread, group, valid).square(), group, valid)
    # Where the std is 0 so is the numerator: any divisor gives the 0 wanted.
    return values / (variance.sqrt() + floor).where(variance > 0, 1)


def mean(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """[E]: the mean over the valid rows of each row's group; values are 0 at the invalid ones."""
    zeros = values.new_zeros(values.shape)
    total = zeros.index_add(0, group, values)
    return (total / size(group, valid).to(values.dtype).clamp(min=1))[group]


def size(group: Tensor, valid: Tensor) -> Tensor:
    """int64 [E]: how many valid rows the group of that number has; 0 beyond the last number."""
    return group.new_zeros(group.shape).index_add(0, group, valid.to(group.dtype))


def held(values: Tensor, group: Tensor, valid: Tensor, percentiles: tuple[float, float]) -> Tensor:
    """[E]: values limited to two percentiles, 0 to 100, of the valid rows of their group, with
    linear interpolation between rows."""
    import torch

    limited = values.clone()
    ranks = torch.tensor(percentiles, dtype=values.dtype) / 100
    for number in torch.unique(group[valid]):
        here = valid & (group == number)
        low, high = torch.quantile(values[here], ranks)
        limited[here] = values[here].clamp(low, high)
    return limited
