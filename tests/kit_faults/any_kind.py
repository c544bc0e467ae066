"""Providers and options with one fault each."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from kit_faults import Fault, drawing, provider
from kit_faults.rewards import GoodReward
from unigrpo_core import testing
from unigrpo_core.plugin import Field, Options


class Bare(Options):
    scale: float = 1.0


class Loose(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    scale: float = Field(1.0, description="a factor")


class Shadowing(Options):
    weight: float = Field(1.0, description="a factor")


class Doubling(Options):
    scale: float = Field(1.0, description="a factor", validate_default=True)

    @field_validator("scale")
    @classmethod
    def _twice(cls, scale: float) -> float:
        return 2 * scale


class Fussy(Options):
    scale: float = Field(1.0, description="a factor", gt=2, validate_default=True)


found: list[Fault] = []


def any_kind(check: str, says: str, build: Any = GoodReward, **facts: Any) -> None:
    made = provider(lambda options: build(), **facts)
    found.append(Fault(testing.RewardConformance, check, says, made))


any_kind("test_provider_is_described", "no colon", name="mine: best")
any_kind("test_provider_is_described", "one line", summary="first\nsecond")
any_kind("test_provider_is_described", "needs is a sequence", needs="std")
any_kind(
    "test_built_is_of_its_interface", "built 'a reward', not a Reward", build=lambda: "a reward"
)
any_kind("test_building_draws_nothing", "of random;", build=drawing(GoodReward))
any_kind("test_options_are_described", "without a description: scale", options=Bare)
any_kind("test_options_are_frozen", "Loose is not frozen", options=Loose)
any_kind("test_options_forbid_unknown_keys", "DID NOT RAISE", options=Loose)
any_kind("test_options_leave_the_slot_its_keys", "weight", options=Shadowing)
any_kind("test_options_survive_a_recipe", "", options=Doubling)
any_kind("test_defaults_build", "greater_than", options=Fussy)
any_kind("test_provider_is_described", "has no name", name="")
any_kind("test_provider_is_described", "std", needs=("std", ""))
