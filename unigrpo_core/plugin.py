"""All that a plugin author imports: ``Provider``, ``Options``, ``Field``, ``hookimpl``; and for
options that are paths or models on the Hugging Face hub, what :mod:`unigrpo_core.hub` has of them.

A plugin is a module named in the entry-point group ``unigrpo``. It implements any of the hooks
below, each a generator of providers::

    @hookimpl
    def unigrpo_regularizers():
        yield Provider(name="huber_velocity", options=HuberVelocityOptions, build=build)

Keep that module light: torch and models are imported inside ``build`` and what it returns, so
that listing and checking stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pluggy
from pydantic import BaseModel, ConfigDict, Field

from unigrpo_core.hub import Files, HubPath, RecipePath, fetched_folder, local_folder

if TYPE_CHECKING:
    from torch import device, dtype

    from unigrpo_core.workload import Account

__all__ = [
    "Checkpointing",
    "Field",
    "Files",
    "HubPath",
    "Options",
    "Placement",
    "Provider",
    "Providers",
    "RecipePath",
    "fetched_folder",
    "hookimpl",
    "hookspec",
    "local_folder",
]

PROJECT = "unigrpo"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Options(BaseModel):
    """Base of a component's options: frozen, strict, no key beyond those declared. Describe every
    field with its unit and range: ``Field(0.1, gt=0, description="...")``."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True
    )


Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Placement:
    """Where a policy puts its weights, and how it computes. Trainable weights are float32 whatever
    the compute type.

    Args:
        train: the experts that will be trained.
        checkpointing: which activations the backward computes again: "none", "selective" (all but
            the outputs of products and attention) or "full" (all but the input of each of the
            policy's :meth:`~unigrpo_core.interfaces.Policy.wrap_units`).
        compile: whether these units are compiled, for sampling and training alike.
        cuda_graphs: whether a GPU replays the decoding of text as CUDA graphs.
        reference: where kept weights wait: on the "device", or in the memory of its "host".
    """

    device: device
    compute: dtype
    train: frozenset[str]
    checkpointing: Checkpointing = "none"
    compile: bool = False
    cuda_graphs: bool = False
    reference: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class Provider:
    """A named component.

    Args:
        name: the word in recipes, unique within its kind and distribution.
        build: a plain function ``build(options)`` returning what the kind's interface says; for
            policies ``build(options, placement)``.
        options: the class of its options.
        summary: one line for listings.
        needs: "std" if it divides by a transition's std; for regularizers, also the fields of
            FlowStep or TokenStep that it reads beside the plain ones ("v_anchor",
            "transition_anchor", "logps_anchor").
        cite: paper and equation.
        kind: for regularizers, "distance" (>= 0, 0 at the anchor) or "bonus".
        reads, range: for rewards that are functions, what they read of an episode ("prompt",
            "metadata", "thought", "image"; nothing by default), and the lowest and highest score.
        differentiable: for rewards, whether scores have a gradient to the images.
        provides: for policies, what they can do: "text", "image", and "branch:NAME" for each
            unconditional context: by convention "text" without the prompt, "image" without the
            thought and what was looked at. What the parts of a policy provide is added.
        parts: for policies that are made of others, which: of "text" and "image". They are stated
            below this one in the recipe, and ``build(options, placement, *parts)`` gets them built,
            in this order.
        notes: for ``unigrpo check``: told about the options without loading anything, returns what
            the user should know, such as weights that are not there yet.
        account: for policies, what ``unigrpo check --memory`` prints: from the options and a
            Workload (see :mod:`unigrpo_core.workload`), without loading anything; a text says why
            there is none. One of parts is given, after these two and in the order of ``parts``,
            what makes the account of each from a Workload.
    """

    name: str
    build: Callable[..., Any]
    options: type[Options] = Options
    summary: str = ""
    needs: Sequence[str] = ()
    cite: str = ""
    kind: Literal["distance", "bonus"] = "distance"
    reads: Sequence[str] = ()
    range: tuple[float, float] | None = None
    differentiable: bool = False
    provides: Sequence[str] = ()
    notes: Callable[[Any], Sequence[str]] | None = None
    account: Callable[..., Account | str] | None = None
    parts: Sequence[str] = ()


Providers = Iterator[Provider]


class Hooks:
    """The hooks, one per kind of component. The interface each provider must build is in
    :mod:`unigrpo_core.interfaces`."""

    @hookspec
    def unigrpo_policies(self) -> Providers:  # type: ignore[empty-body]
        """Policy: TextPolicy, ImageFlowPolicy or both."""

    @hookspec
    def unigrpo_prompts(self) -> Providers:  # type: ignore[empty-body]
        """PromptSource."""

    @hookspec
    def unigrpo_rewards(self) -> Providers:  # type: ignore[empty-body]
        """A function from a RewardBatch to scores, or a Reward."""

    @hookspec
    def unigrpo_text_objectives(self) -> Providers:  # type: ignore[empty-body]
        """TextObjective."""

    @hookspec
    def unigrpo_image_objectives(self) -> Providers:  # type: ignore[empty-body]
        """ImageObjective."""

    @hookspec
    def unigrpo_schedulers(self) -> Providers:  # type: ignore[empty-body]
        """Scheduler."""

    @hookspec
    def unigrpo_windows(self) -> Providers:  # type: ignore[empty-body]
        """Window."""

    @hookspec
    def unigrpo_guidance(self) -> Providers:  # type: ignore[empty-body]
        """Guidance."""

    @hookspec
    def unigrpo_regularizers(self) -> Providers:  # type: ignore[empty-body]
        """FlowRegularizer or TokenRegularizer."""

    @hookspec
    def unigrpo_advantages(self) -> Providers:  # type: ignore[empty-body]
        """Advantage."""


KINDS: dict[str, str] = {
    "policy": "unigrpo_policies",
    "prompts": "unigrpo_prompts",
    "reward": "unigrpo_rewards",
    "text_objective": "unigrpo_text_objectives",
    "image_objective": "unigrpo_image_objectives",
    "scheduler": "unigrpo_schedulers",
    "window": "unigrpo_windows",
    "guidance": "unigrpo_guidance",
    "regularizer": "unigrpo_regularizers",
    "advantage": "unigrpo_advantages",
}
