"""The slots of a recipe, and what all of its tables are.

A *slot* is a table that chooses a component by ``use``. It has keys of its own (a weight, a number
of steps); all others are the options of the component, which its provider's class checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from unigrpo_core.catalog import Component
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.loading import said
from unigrpo_core.plugin import Options


class Table(BaseModel):
    """Base of a recipe's tables: frozen, strict, no key beyond those declared."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True
    )

    @classmethod
    def defaults(cls) -> Self:
        """The table of which nothing is stated."""
        return cls.model_validate({})


class Slot(Table):
    """A choice of component with its options. Subclasses add the slot's own keys."""

    kind: ClassVar[str]
    interface: ClassVar[str]  # in unigrpo_core.interfaces; "" where any callable will do

    use: str = Field(description="name of the component, or distribution:name")
    component: InstanceOf[Component] = Field(exclude=True)
    options: InstanceOf[Options] = Field(exclude=True)

    @classmethod
    def own_keys(cls) -> tuple[str, ...]:
        """The keys of the table that belong to the slot, not to the component's options."""
        return tuple(key for key in cls.model_fields if key not in ("component", "options"))

    @model_serializer(mode="wrap")
    def _one_table(self, own: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**own(self), **self.options.model_dump(mode="json", exclude_none=True)}

    @property
    def who(self) -> str:
        """The component as messages name it."""
        return f"{self.kind.replace('_', ' ')} {self.component.name!r} of {self.component.origin}"

    def notes(self) -> tuple[str, ...]:
        """What the provider would have the user know about these options."""
        notes = self.component.provider.notes
        try:
            return tuple(notes(self.options)) if notes else ()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(f"{self.who} cannot say its notes: {said(error)}") from error

    def build(self, *arguments: Any) -> Any:
        """What the provider builds from the options; a policy's slot also takes its placement.

        Raises:
            UserError: as the provider raised it.
            PluginError: the provider failed otherwise, or built something of another interface.
        """
        from unigrpo_core import interfaces

        build: Callable[..., Any] = self.component.provider.build
        try:
            built = build(self.options, *arguments)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise PluginError(f"{self.who} cannot be built: {said(error)}") from error
        built = self.adapted(built)
        fits = (
            isinstance(built, getattr(interfaces, self.interface))
            if self.interface
            else callable(built)
        )
        if not fits:
            raise PluginError(f"{self.who} built {built!r}, not a {self.interface or 'callable'}")
        return built

    def adapted(self, built: Any) -> Any:
        """What was built, in the form of the interface."""
        return built


class PolicySlot(Slot):
    """The parts of a policy that is made of others are slots of the same kind."""

    kind = "policy"
    interface = "Policy"

    text: PolicySlot | None = Field(None, description="the part that writes, of a policy of parts")
    image: PolicySlot | None = Field(None, description="the part that draws, of a policy of parts")

    @property
    def parts(self) -> dict[str, PolicySlot]:
        """The parts that are stated, by name."""
        stated = {"text": self.text, "image": self.image}
        return {name: part for name, part in stated.items() if part is not None}

    @property
    def provides(self) -> frozenset[str]:
        """What the policy can do; of one of parts, what these do: the one that writes writes, the
        one that draws draws, and guidance has its branches."""
        found = set(self.component.provider.provides)
        for name, part in self.parts.items():
            found |= part.provides & {name}
            if name == "image":
                found |= {what for what in part.provides if what.startswith("branch:")}
        return frozenset(found)

    def build(self, *arguments: Any) -> Any:
        """The policy, of its parts, each of which is placed to train its own expert alone."""
        names = self.component.provider.parts
        built = [
            self.parts[name].build(replace(place, train=place.train & {name}))
            for name in names
            for place in arguments
        ]
        return super().build(*arguments, *built)


class PromptsSlot(Slot):
    kind = "prompts"
    interface = "PromptSource"


class MonitorSlot(Slot):
    kind = "reward"
    interface = "Reward"

    def adapted(self, built: Any) -> Any:
        """A function as the Reward that its provider describes."""
        from unigrpo_core.interfaces import FunctionReward, Reward

        provider = self.component.provider
        if isinstance(built, Reward) or not callable(built):
            return built
        if provider.range is None:
            raise PluginError(
                f"{self.who} is a function, so its provider should say its range, such as "
                'range=(0.0, 1.0), and what it reads, such as reads=("image",)'
            )
        return FunctionReward(built, frozenset(provider.reads), provider.range)


class RewardSlot(MonitorSlot):
    weight: float = Field(1.0, description="its share in the advantage; negative to punish")


class AdvantageSlot(Slot):
    kind = "advantage"
    interface = "Advantage"

    descendants: Literal["mean_then_normalize", "normalize_then_mean"] = Field(
        "mean_then_normalize",
        description="how a segment that several episodes share is scored: normalize the mean of "
        "their rewards, or take the mean of their normalized rewards",
    )


class TextObjectiveSlot(Slot):
    kind = "text_objective"
    interface = "TextObjective"


class ImageObjectiveSlot(Slot):
    kind = "image_objective"
    interface = "ImageObjective"


class SchedulerSlot(Slot):
    kind = "scheduler"
    interface = "Scheduler"

    steps: int = Field(ge=1, description="denoising steps")
    noise_level: float = Field(
        0.0, ge=0, description="noise of the stochastic steps, in the scheduler's unit; 0: an ODE"
    )
    shift: float | None = Field(
        None, gt=0, description="timestep shift (1: none); the model's own when absent"
    )


class WindowSlot(Slot):
    kind = "window"
    interface = "Window"


class GuidanceSlot(Slot):
    kind = "guidance"
    interface = "Guidance"


class RegularizerSlot(Slot):
    kind = "regularizer"
    interface = ""

    weight: float = Field(ge=0, description="its factor in the total loss")
    anchor: Literal["reference", "old", "ema"] = Field(
        "reference",
        description="the weights it holds on to: those of the start, those that sampled, or the "
        "moving average",
    )

    @property
    def compares_with(self) -> str:
        """The anchor, if the penalty reads one; else "old", whose values there are anyway."""
        reads = any(need.endswith("_anchor") for need in self.component.provider.needs)
        return self.anchor if reads else "old"


class FlowRegularizerSlot(RegularizerSlot):
    on: Literal["transition", "conditional"] = Field(
        "transition",
        description="the velocity it reads: after guidance, or the conditional one",
    )
