"""A plugin of fake components, one or two per kind, for tests of recipes and the command line."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Literal

from pydantic import model_validator

from unigrpo_core import interfaces
from unigrpo_core.catalog import Catalog, collect
from unigrpo_core.plugin import Field, Options, Provider, RecipePath, hookimpl


def fake_catalog(*modules: str) -> Catalog:
    """The catalog of this module, and of others, as if installed by distribution ``fakes``."""
    names = ("fake_plugin", *modules)
    return collect((EntryPoint(name, name, "unigrpo"), "fakes", "1.2") for name in names)


def concrete(interface: type, **members: object) -> type:
    """A subclass that leaves nothing abstract: what the test does not give fails when called."""

    def unused(*_: object, **__: object) -> None:
        raise AssertionError("not for tests of recipes")

    body = dict.fromkeys(interface.__abstractmethods__, unused)  # type: ignore[attr-defined]
    return type(interface.__name__, (interface,), body | members)


class PolicyOptions(Options):
    weights: RecipePath = Field("", description="folder of the weights")
    width: int = Field(8, ge=1, description="channels")


class RewardOptions(Options):
    mode: Literal["strict", "soft"] = Field("soft", description="how it counts")


class ObjectiveOptions(Options):
    clip_range: float | None = Field(None, gt=0, description="bound of the ratio")
    clip_radius: float | None = Field(None, gt=0, description="bound of the mean's rms")

    @model_validator(mode="after")
    def _one(self) -> ObjectiveOptions:
        if self.clip_range is not None and self.clip_radius is not None:
            raise ValueError("say clip_range or clip_radius, not both")
        return self


class WindowOptions(Options):
    size: int = Field(1, ge=1, description="steps")
    range: tuple[int, int] = Field((0, 1), description="lo and hi of the steps, hi excluded")


class ScaleOptions(Options):
    scale: float = Field(4.0, gt=0, description="guidance scale")


def window(options: WindowOptions) -> interfaces.Window:
    def count(self: object, total: int) -> int:
        if options.range[1] > total:
            raise ValueError(f"range {list(options.range)} does not fit into {total} steps")
        return options.size

    def steps(self: object, total: int, key: object, rollout: int) -> tuple[int, ...]:
        return tuple(range(*options.range))[: options.size]

    return concrete(interfaces.Window, count=count, steps=steps)()


def scheduler(stochastic: bool, **facts: object):
    return lambda options: concrete(interfaces.Scheduler, stochastic=stochastic, **facts)()


def objective(needs: frozenset[str] = frozenset(), **facts: object):
    return lambda options: concrete(interfaces.ImageObjective, needs=needs, **facts)()


def guidance(*branches: str):
    return lambda options: concrete(interfaces.Guidance, branches=branches)()


def regularizer(options: Options):
    return lambda step: step


def never(*_: object) -> None:
    raise AssertionError("a check must not build this")


@hookimpl
def unigrpo_policies():
    yield Provider(
        "unified",
        never,
        PolicyOptions,
        summary="thinks and draws",
        provides=("text", "image", "branch:blank"),
        notes=lambda options: () if options.weights else ("weights are not there yet",),
    )
    yield Provider("writer", never, provides=("text",))


@hookimpl
def unigrpo_prompts():
    yield Provider("words", never)


@hookimpl
def unigrpo_rewards():
    yield Provider("exact", never, RewardOptions, cite="Doe 2025, eq. 3")
    yield Provider("other", never)
    yield Provider("smooth", never, differentiable=True)


@hookimpl
def unigrpo_advantages():
    yield Provider("group", never)


@hookimpl
def unigrpo_text_objectives():
    yield Provider("grpo", never, ObjectiveOptions)


@hookimpl
def unigrpo_image_objectives():
    yield Provider("flow_grpo", objective(), ObjectiveOptions, needs=("std",))
    yield Provider("forward", objective(fresh=True))
    yield Provider("plain", objective())
    yield Provider("by_score", objective(needs=frozenset({"score"})))
    yield Provider("by_average", objective(needs=frozenset({"ema"})))
    yield Provider("in_nats", objective(unit="nats"))


@hookimpl
def unigrpo_schedulers():
    yield Provider("sde", scheduler(True))
    yield Provider("ode", scheduler(False))
    yield Provider("squares", scheduler(True, unit="latent^2"))
    yield Provider("ends", scheduler(True, last_step=False, most_noise=1.0))


@hookimpl
def unigrpo_windows():
    yield Provider("random", window, WindowOptions)


@hookimpl
def unigrpo_guidance():
    yield Provider("none", guidance())
    yield Provider("cfg", guidance("blank"), ScaleOptions)
    yield Provider("cfg_negative", guidance("negative"), ScaleOptions)


@hookimpl
def unigrpo_regularizers():
    yield Provider("mse", regularizer, needs=("v_anchor",))
    yield Provider("kl", regularizer, needs=("transition_anchor", "std"))
    yield Provider("text_kl", regularizer, needs=("logps_anchor",))
    yield Provider("odd", regularizer, needs=("moon",))


RECIPE = """\
title = "the base"
policy = { use = "unified", weights = "w" }
source.use = "words"
rewards = [
  { use = "exact", mode = "strict" },
  { use = "other", weight = -0.5 },
]

[advantage]
use = "group"

[text]
objective = { use = "grpo", clip_range = 0.2 }

[image]
size = [36, 36]
objective = { use = "flow_grpo", clip_radius = 5.1e-4 }
scheduler = { use = "sde", steps = 8, noise_level = 0.8 }
window = { use = "random", size = 3, range = [0, 5] }
guidance = { use = "cfg", scale = 3 }

[[image.regularizers]]
use = "mse"
weight = 0.003

[evaluation]
scheduler = { use = "ode", steps = 8 }
guidance = { use = "none" }
"""
