"""The Gaussian transition of a denoising step, shared by the schedulers.

Mathematics
    x_next ~ N(mu, std^2 I). With delta = mu - mu_old and eps = x_next - mu_old, the per-element
    log-ratio of two such distributions of equal std is

        log p(x_next | mu) - log p(x_next | mu_old)
            = (mu - mu_old)(2 x_next - mu - mu_old) / (2 std^2) = delta (2 eps - delta) / (2 std^2),

    and ``log_ratio`` is its mean over the latent elements.

Convention
    The product is evaluated as it stands: two float32 log-probs of 262,144 elements differ by
    rounding as much as the paper's clip range of 1e-6, so they are never subtracted. The result is
    exactly 0 where mu equals mu_old.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.records import Transition

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class GaussianTransition(Transition):
    """N(mean, std^2 I); a point mass where std is 0, and then without a log-ratio (NaN)."""

    mean: Tensor  # float32 [B, K, *]
    std: Tensor  # float32 [B, K, 1, ...]

    def log_ratio(self, x_next: Tensor, old_mean: Tensor) -> Tensor:
        delta = self.mean - old_mean
        terms = delta * (2 * (x_next - old_mean) - delta) / (2 * self.std.square())
        return terms.flatten(2).mean(2)

    @property
    def unit_shift(self) -> Tensor:
        return self.std
