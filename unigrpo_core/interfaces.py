"""The seams. Everything here is abstract; whoever implements one implements all of it.

Methods (scheduler, window, guidance, objective, regularizer, advantage) are pure functions of
tensors: none sees a model, an engine or a recipe. Shapes use the letters of
:mod:`unigrpo_core.records`. Unless said otherwise tensors are float32, and draws come only from
the keys that are passed in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, final

from unigrpo_core.keys import Key
from unigrpo_core.records import (
    FlowStep,
    ImageSegment,
    Points,
    Prompt,
    RewardBatch,
    Sampling,
    TextSegment,
    TokenStep,
    Transition,
    Unit,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


# --- policies ---------------------------------------------------------------------------------


class History(ABC):
    """What has been said and drawn so far, B rows, in a form the policy can continue from.

    A persistent value: continuing it never changes it.
    """

    @abstractmethod
    def __len__(self) -> int:
        """B, the number of rows."""

    @abstractmethod
    def rows(self, index: Tensor) -> Self:
        """The rows at ``index`` (int64 [B']), repeats allowed."""


class Policy(ABC):
    """A model that continues histories, and the one module through which it is trained."""

    @property
    @abstractmethod
    def root(self) -> nn.Module:
        """The trainable module; ``root(ReplayBatch) -> Replay`` is the only path of gradients.
        This is what DDP and FSDP wrap."""

    @abstractmethod
    def open(self, prompts: Sequence[Prompt]) -> History:
        """Encodes prompts, one row each, without gradient."""

    @abstractmethod
    def branches(self, history: History, names: Sequence[str]) -> Mapping[str, History]:
        """The unconditional contexts of ``history`` that guidance asks for, by name."""

    @abstractmethod
    def prompt_tokens(self, prompt: Prompt, thought: int = 0) -> int:
        """How many tokens the prompt's context takes.

        Raises:
            UserError: the policy cannot take it, or not with a thought of ``thought`` tokens after
                it; the message says why and counts.
        """

    @abstractmethod
    def parameters(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """The parameters each expert owns, by their name in the root: keys "text" and "image".
        Whatever no expert owns stays frozen."""

    @abstractmethod
    def keep(self, name: str, decay: float | None = None) -> None:
        """Remembers the current trainable weights under ``name`` ("reference", "ema"), replacing
        what was kept; with a decay in [0, 1) as decay x kept + (1 - decay) x current, once there
        is something kept."""

    @abstractmethod
    def weights(self, name: str) -> AbstractContextManager[None]:
        """Inside the context the policy computes with the weights kept under ``name``, without
        gradient; on leaving it the current ones are back, bit for bit."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the current weights and all that loading needs, in the policy's own layout."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Takes over the weights that :meth:`save` wrote.

        Raises:
            UserError: they are not there, damaged, or of another model.
        """

    @abstractmethod
    def wrap_units(self) -> tuple[type[nn.Module], ...]:
        """The module classes that sharding and activation checkpointing may wrap."""


class TextPolicy(Policy):
    """A policy that writes."""

    @abstractmethod
    def write(
        self, history: History, sampling: Sampling, keys: Sequence[Key]
    ) -> tuple[TextSegment, History]:
        """Samples one text per row, without gradient.

        Token j of row b takes draw j of ``keys[b].child("token")`` (inverse CDF in float64 over the
        tokens that may be sampled). The returned history has the texts appended.
        """

    @abstractmethod
    def append(self, history: History, written: TextSegment) -> History:
        """The history with a given text appended to each row, as :meth:`write` would have left it
        had it sampled these tokens, without gradient.

        Raises:
            UserError: a row would be longer than the policy takes.
        """


class ImageFlowPolicy(Policy):
    """A policy that draws, by the velocity field of a flow-matching model."""

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The latent axes ``*`` of an image of (height, width) pixels.

        Raises:
            UserError: the size is not one the model can draw.
        """

    @abstractmethod
    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens the network processes for one image at one time."""

    @abstractmethod
    def time_shift(self, size: tuple[int, int]) -> float:
        """The model's own timestep shift at that size (1: none)."""

    @abstractmethod
    def velocity(self, history: History, x_t: Tensor, t: Tensor) -> Tensor:
        """v = noise - data, float32 [B, *], without gradient, for x_t [B, *] and t [B]; reads the
        history, never appends to it."""

    @abstractmethod
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of final latents [B, *]; the latents' gradient passes."""

    def cut_tokens(self, prompt: Prompt, thought: str = "") -> Mapping[str, int]:
        """How many tokens at the end of what is drawn, made of prompt and thought, are left out, by
        the name of what reads it (a text encoder); 0: none. The names are those of every text;
        without any the policy cuts no text, but refuses it."""
        return {}


class ImageReader(Policy):
    """A policy that looks at images: for editing, and for several rounds. What it is shown and told
    stands in the order of the calls; none of them has a gradient."""

    @abstractmethod
    def start(self, rows: int) -> History:
        """Histories in which nothing was told yet: ``tell`` after it is ``open``."""

    @abstractmethod
    def tell(self, history: History, prompts: Sequence[Prompt]) -> History:
        """Appends a prompt to each row.

        Raises:
            UserError: a row would be longer than the policy takes.
        """

    @abstractmethod
    def look(self, history: History, images: Tensor, keys: Sequence[Key]) -> History:
        """Appends an image to each row: [B, 3, H, W] in [0, 1], which the policy may resize. A
        stochastic encoder's draw for row b is ``keys[b].child("encode")``.

        Raises:
            UserError: the policy has no eyes, or a row would be longer than it takes.
        """


# --- methods ----------------------------------------------------------------------------------


class Scheduler(ABC):
    """The time grid and the kernel of a step. Nothing else derives a mean or a std."""

    stochastic: ClassVar[bool]  # False: std is 0 at every noise level
    unit: ClassVar[Unit] = "nats"  # of its log-ratios: of densities, or of squared distances alone
    last_step: ClassVar[bool] = True  # False: the step to t = 0 has std 0 at every noise level
    most_noise: ClassVar[float] = inf  # the highest noise level that it takes

    @abstractmethod
    def times(self, steps: int, shift: float) -> Tensor:
        """float64 [steps + 1], falling from 1 to 0."""

    def plain_times(self, steps: int, shift: float) -> Sequence[float] | None:
        """The same times without torch, for ``unigrpo check --memory``; None if that is not
        written, and then every step is counted as guided."""
        return None

    @abstractmethod
    def transition(
        self, v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor
    ) -> Transition:
        """The step from t to t_next: v and x_t are [B, K, *]; t, t_next and noise_level [B, K].
        At noise level 0 it is the Euler step of the ODE, with std 0."""


class Window(ABC):
    """Which steps of a rollout are stochastic, and so trained."""

    @abstractmethod
    def steps(self, total: int, key: Key, rollout: int) -> tuple[int, ...]:
        """Rising step numbers in 0 .. total - 1 of the rollout of that number, which is that of
        its training step, from 1; one draw per rollout."""

    @abstractmethod
    def count(self, total: int) -> int:
        """How many steps that will be.

        Raises:
            ValueError: the window does not fit into ``total`` steps.
        """


class Guidance(ABC):
    """Combines conditional and unconditional velocities."""

    branches: tuple[str, ...]  # the unconditional contexts it needs, with its options

    @abstractmethod
    def active(self, t: Tensor) -> Tensor:
        """bool, of t's shape: where the branches are needed. Elsewhere they are not computed."""

    def guides(self, t: float) -> bool:
        """The same of one time without torch, for ``unigrpo check --memory``; by default it is
        guided wherever there are branches."""
        return bool(self.branches)

    @abstractmethod
    def combine(self, v: Tensor, branches: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """The guided velocity [B, K, *] at times t [B, K]; called only with every branch at hand.
        Where ``active`` is False it returns v unchanged."""


class TextObjective(ABC):
    """A loss on the log-probs of sampled tokens."""

    clips: str = ""
    """What its clip bounds, in words for tables of methods ("a token's ratio"); empty without."""

    @abstractmethod
    def loss(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B, L] to minimise, and metrics of the same shape without gradient, for
        logps, old_logps, mask [B, L] and advantages [B]. Where the mask is False all are 0."""

    @abstractmethod
    def weights(self, mask: Tensor) -> Tensor:
        """[B, L] from stored data only; the loss is sum(values * weights) / total over the whole
        update and all processes."""

    def total(self, mask: Tensor) -> Tensor:
        """The share of these rows in the total, a scalar from stored data only: the sum of their
        weights, or for losses that divide by a constant what that is for so many rows."""
        return self.weights(mask).sum()


class ImageObjective(ABC):
    """A loss on velocities at points along (or beside) the sampled trajectories.

    Of an objective with fresh points the step of a point leads to the data in one: t_next and the
    noise level are 0, x_next is what was sampled, and the transition's mean the data as a velocity
    predicts it, x_t - t v.
    """

    needs: ClassVar[frozenset[str]]
    """What it reads beside the current velocity: those of the weights that sampled ("old"), of the
    start ("reference"), of the moving average ("ema"), and "score", the differentiable score in the
    points."""
    fresh: ClassVar[bool] = False
    """Whether its points are its own, not steps that the sampler stored: the window then chooses no
    points, and the sampler's gap is not measured there."""
    unit: Unit | None = None
    """The unit of its clip range, where that depends on the scheduler's."""
    clips: str = ""
    """Unit and object of its clip range, in words for tables of methods ("latent^2, of errors");
    empty without clipping."""

    @abstractmethod
    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        """The points [E, K] to train on; ``keys``, one per row, for objectives that draw."""

    def count(self, stored: int) -> int:
        """K, how many points an image has of which the window chose ``stored`` steps."""
        return stored

    @abstractmethod
    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        """[B, K]: what the clip range bounds; 0 in exact arithmetic when v is the sampler's, by
        which ``points.old_mean`` was reached."""

    @abstractmethod
    def clip_range(self, latent_elements: int) -> float:
        """The bound on |log_ratio| for that many elements; infinite without clipping."""

    @abstractmethod
    def trust_radius(self, points: Points) -> Tensor:
        """[B, K]: the root-mean-square shift of the transition mean at which log_ratio's standard
        deviation reaches the clip range; infinite without clipping."""

    @abstractmethod
    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B, K] to minimise, and metrics of the same shape without gradient, for
        velocities["current"] (and those it ``needs``) [B, K, *], advantages and rewards [B, K]
        (one value per point, equal along an image)."""

    @abstractmethod
    def weights(self, mask: Tensor) -> Tensor:
        """[B, K] from stored data only, as for text."""


class FlowRegularizer(Protocol):
    """Any callable; [B, K], float32: a mean over latent elements. Kind "distance": >= 0 and
    exactly 0 at the anchor."""

    def __call__(self, step: FlowStep, /) -> Tensor: ...


class TokenRegularizer(Protocol):
    """Any callable; [B, L], float32."""

    def __call__(self, step: TokenStep, /) -> Tensor: ...


class Advantage(ABC):
    """From rewards to group-relative advantages."""

    @abstractmethod
    def __call__(self, rewards: Tensor, weights: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        """float32 [E] for rewards float32 [E, R], weights [R], group int64 [E] (rows of one group
        share a number) and valid bool [E]; invalid rows get 0 and count for nothing. All of them
        are on the CPU."""


class ScoreFunction(Protocol):
    """Any callable; float32 [B], finite, within the range that its provider declares. It must not
    depend on the other rows."""

    def __call__(self, batch: RewardBatch, /) -> Tensor: ...


class Reward(ABC):
    """A score of finished episodes, for what a function does not say: further scores, a
    direction."""

    reads: ClassVar[frozenset[str]]  # of "prompt", "metadata", "thought", "image"
    range: ClassVar[tuple[float, float]]
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def score(self, batch: RewardBatch) -> Tensor:
        """float32 [B], finite, within ``range``; must not depend on the other rows."""

    @abstractmethod
    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        """Further scores [B] by name, shown at evaluation and never trained on (may be empty)."""


@final
class FunctionReward(Reward):
    """The reward that is a function and no more."""

    def __init__(
        self, function: ScoreFunction, reads: frozenset[str], range: tuple[float, float]
    ) -> None:
        self.function = function
        self.reads = reads  # type: ignore[misc]
        self.range = range  # type: ignore[misc]

    def score(self, batch: RewardBatch) -> Tensor:
        return self.function(batch)

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        return {}


class PromptSource(ABC):
    """Where prompts come from; the held-out ones are disjoint from the training ones."""

    @abstractmethod
    def train(self, seed: int, start: int, count: int) -> tuple[Prompt, ...]:
        """Prompts number start .. start + count - 1 of an endless stream: a pure function of its
        arguments, so a run resumes anywhere. Ids are unique within the stream."""

    @abstractmethod
    def held_out(self, count: int) -> tuple[Prompt, ...]:
        """The first ``count`` held-out prompts (fewer if there are fewer), alike in every run."""
