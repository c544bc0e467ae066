"""The records that travel between the parts: frozen, typed, shapes stated.

Shape letters: P prompts, E rows of one segment kind in a rollout, B rows of a batch, L tokens,
K trained denoising points, T steps, R rewards, ``*`` the policy's own latent axes. Time runs
from t=1 (noise) to t=0 (data); the velocity is v = noise - data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """What an episode starts from. ``metadata`` is JSON-like and read by rewards only."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How text is sampled: at most ``max_tokens`` tokens (the end token counted), at a
    temperature > 0 that also scales the distribution whose log-probs are returned."""

    max_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class TextSegment:
    """Sampled reasoning. Row e of ``tokens`` is padded on the right where ``mask`` is False."""

    tokens: Tensor  # int64 [E, L], as sampled, the end-of-sequence token included
    mask: Tensor  # bool [E, L], True where a token was sampled
    logps: Tensor  # float32 [E, L], log-prob of each token under the distribution sampled from
    texts: tuple[str, ...]  # E strings, for rewards and people

    def rows(self, index: Tensor) -> TextSegment:
        """The texts at ``index`` (int64 [E'] on the CPU), repeats allowed."""
        texts = tuple(self.texts[row] for row in index.tolist())
        index = index.to(self.tokens.device)
        return TextSegment(self.tokens[index], self.mask[index], self.logps[index], texts)


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """A denoising trajectory: what is stored at the K trained (SDE) steps, and its end."""

    x_t: Tensor  # float32 [E, K, *], latents before each trained step
    x_next: Tensor  # float32 [E, K, *], latents after it
    old_mean: Tensor  # float32 [E, K, *], the transition mean at sampling
    t: Tensor  # float32 [E, K]
    t_next: Tensor  # float32 [E, K]
    noise_level: Tensor  # float32 [E, K]
    latents: Tensor  # float32 [E, *], the final latents (t = 0)
    images: Tensor  # float32 [E, 3, H, W] in [0, 1]


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, eq=False)
class Rollout:
    """A forest of segments. ``parents[i]`` (int64 [E_i]) is the row that each row of
    ``segments[i]`` continues: a row of ``segments[i - 1]``, or of ``prompts`` for i = 0.
    The rows of the last segment are the leaves: one per episode."""

    prompts: tuple[Prompt, ...]
    segments: tuple[Segment, ...]
    parents: tuple[Tensor, ...]

    def ancestors(self, index: int, level: int) -> Tensor:
        """int64 [E_index]: for each row of segment ``index`` its ancestor's row in segment
        ``level``; level -1 is the prompts."""
        import torch

        rows = torch.arange(len(self.parents[index]))
        for step in range(index, level, -1):
            rows = self.parents[step][rows]
        return rows


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """What a reward sees: B episodes. ``thoughts`` and ``images`` are None where the episode has no
    such segment; a thought of an episode that thinks may be empty. ``keys`` are unique per episode
    (seed, step, prompt, path)."""

    prompts: tuple[Prompt, ...]
    thoughts: tuple[str, ...] | None
    images: Tensor | None  # float32 [B, 3, H, W] in [0, 1]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


Unit = Literal["nats", "latent^2"]
"""What a log-ratio is counted in: log p of a density, or -(x - mean)^2 without its variance."""


class Transition(ABC):
    """The distribution of x_next given x_t; Gaussian, a point mass where ``std`` is 0."""

    mean: Tensor  # float32 [B, K, *]
    std: Tensor  # float32, broadcastable to mean: [B, K, 1, ...]

    @abstractmethod
    def log_ratio(self, x_next: Tensor, old_mean: Tensor) -> Tensor:
        """[B, K]: log p(x_next | mean) - log p(x_next | old_mean), mean over latent elements,
        computed without subtracting two log-probs. Requires std > 0."""

    @property
    @abstractmethod
    def unit_shift(self) -> Tensor:
        """As ``std``: the shift of an element's mean by which its log-ratio varies by 1, in
        standard deviations over the noise; std itself in nats, 1 / (2 std) in latent^2."""


@dataclass(frozen=True, eq=False)
class Points:
    """The points at which an image objective asks the trainer for velocities."""

    x_t: Tensor  # float32 [B, K, *]
    t: Tensor  # float32 [B, K]
    t_next: Tensor  # float32 [B, K]
    noise_level: Tensor  # float32 [B, K]
    x_next: Tensor  # float32 [B, K, *]
    old_mean: Tensor  # float32 [B, K, *], at sampling; the trainer's own once the gap is checked
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Transition]
    score: Callable[[Tensor], Tensor] | None = None
    """For objectives that need it: the rewards of the images of latents [B, K, *], weighted and
    summed, [B, K] with gradient."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Points:
        """The points with every tensor changed alike."""
        return Points(
            x_t=change(self.x_t),
            t=change(self.t),
            t_next=change(self.t_next),
            noise_level=change(self.noise_level),
            x_next=change(self.x_next),
            old_mean=change(self.old_mean),
            kernel=self.kernel,
            score=self.score,
        )

    def transition(self, v: Tensor) -> Transition:
        """The scheduler's transition at these points for velocities v [B, K, *]."""
        return self.kernel(v, self.x_t, self.t, self.t_next, self.noise_level)


@dataclass(frozen=True, eq=False)
class FlowStep:
    """What a regularizer of the image policy sees; the anchor's values carry no gradient."""

    v: Tensor  # float32 [B, K, *], after guidance or conditional, as the recipe's slot says
    v_anchor: Tensor  # float32 [B, K, *]
    x_t: Tensor  # float32 [B, K, *]
    t: Tensor  # float32 [B, K]
    t_next: Tensor  # float32 [B, K]
    transition: Transition
    transition_anchor: Transition


@dataclass(frozen=True, eq=False)
class TokenStep:
    """What a regularizer of the text policy sees; the anchor's log-probs carry no gradient."""

    logps: Tensor  # float32 [B, L]
    logps_anchor: Tensor  # float32 [B, L]
    mask: Tensor  # bool [B, L]


@dataclass(frozen=True, eq=False)
class ReplayBatch:
    """B text contexts (a prompt and, unless L = 0, its thought) and K points of the images
    drawn under each. One call of the policy's root on it is the only path of gradients."""

    prompts: tuple[Prompt, ...]
    tokens: Tensor  # int64 [B, L]
    mask: Tensor  # bool [B, L]
    temperature: float
    want_logps: bool  # False: the log-probs are not computed (zeros)
    x_t: Tensor | None  # float32 [B, K, *]; None: no velocities wanted
    t: Tensor | None  # float32 [B, K]
    branches: tuple[str, ...]  # unconditional contexts whose velocities guidance needs
    context_gradient: bool  # False: image gradients stop before the text policy
    thoughts: tuple[str, ...] = ()  # the thoughts in words, B of them; none: there are none


@dataclass(frozen=True, eq=False)
class Replay:
    """The trainer's values, with gradient unless called without."""

    logps: Tensor  # float32 [B, L], 0 where the mask is False
    velocities: Tensor | None  # float32 [B, K, *], conditional
    branches: Mapping[str, Tensor]  # float32 [B, K, *] per unconditional context asked for
