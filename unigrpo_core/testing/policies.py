"""What every policy keeps: see ``Policy`` and ``History`` in :mod:`unigrpo_core.interfaces`.

What a policy that writes adds is in :mod:`unigrpo_core.testing.text_policies`, and what one that
draws adds in :mod:`unigrpo_core.testing.image_policies`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import History, ImageFlowPolicy, Policy, TextPolicy
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Placement
from unigrpo_core.recipe.slots import PolicySlot
from unigrpo_core.records import Prompt, Replay, ReplayBatch, Sampling, TextSegment
from unigrpo_core.testing.base import Conformance, installed
from unigrpo_core.testing.samples import keys, normal
from unigrpo_core.testing.watch import equal, no_global_draws

EXPERTS = frozenset({"text", "image"})
POINTS = 2  # K of the checks


@dataclass(frozen=True, eq=False)
class Context:
    """What images are drawn under: prompts, and thoughts if the policy writes."""

    prompts: tuple[Prompt, ...]
    history: History
    written: TextSegment | None

    @property
    def tokens(self) -> Tensor:
        nothing = torch.zeros(len(self.prompts), 0, dtype=torch.int64)
        return nothing if self.written is None else self.written.tokens

    @property
    def mask(self) -> Tensor:
        return self.tokens.bool() if self.written is None else self.written.mask

    @property
    def thoughts(self) -> tuple[str, ...]:
        return () if self.written is None else self.written.texts


def part_of(table: Mapping[str, Any]) -> PolicySlot:
    """A part of a policy, as a recipe would state it."""
    component = installed().find("policy", table["use"])
    options = {key: value for key, value in table.items() if key != "use"}
    stated = component.provider.options.model_validate_json(json.dumps(options))
    return PolicySlot.model_construct(use=component.name, component=component, options=stated)


class PolicyConformance(Conformance):
    """Checks of any policy, in float32 on the CPU. It is built anew for every check, so give it
    small weights, and what it trains is moved a little, as by an update: adapters that still change
    nothing would hide who forgets them. A policy that writes and draws takes both classes derived
    from this::

        class TestMine(TextPolicyConformance, ImageFlowPolicyConformance):
            use = "mine"

    Facts:
        prompts: at least 3 prompts that it can read, of different lengths.
        max_tokens: the longest thought.
        size: (height, width) of the images.
        tolerance: how far rounding may move a log-prob or a velocity.

    A policy of parts states them among its options, as a recipe does below it: tables "text" and
    "image" with a ``use`` each.
    """

    slot = PolicySlot
    prompts: ClassVar[Sequence[Prompt]] = tuple(
        Prompt(f"prompt-{row}", text)
        for row, text in enumerate(("a red square", "two green circles on a mat", "a cat"))
    )
    max_tokens: ClassVar[int] = 8
    size: ClassVar[tuple[int, int]] = (24, 24)
    tolerance: ClassVar[float] = 1e-5

    def stated(self, given: Mapping[str, Any]) -> Any:
        """The options; the tables "text" and "image", if they are given, are the policy's parts."""
        self.parts = {name: part_of(given[name]) for name in ("text", "image") if name in given}
        return super().stated({k: v for k, v in given.items() if k not in self.parts})

    def slot_of(self, options: Any) -> PolicySlot:
        component = self.listed()
        return PolicySlot.model_construct(
            use=component.name, component=component, options=options, **getattr(self, "parts", {})
        )

    def build(self, given: Mapping[str, Any]) -> Any:
        policy = super().build(given)
        shake(policy)
        return policy

    def built(self, options: Any, *arguments: Any) -> Any:
        return self.trained(options, self.experts())

    def trained(self, options: Any, train: frozenset[str]) -> Policy:
        """The policy built to train these experts."""
        place = Placement(torch.device("cpu"), torch.float32, train)
        policy: Policy = self.slot_of(options).build(place)
        return policy

    def experts(self) -> frozenset[str]:
        return EXPERTS & self.slot_of(None).provides

    def branch_names(self) -> tuple[str, ...]:
        parts = self.slot_of(None).parts.values()
        said = [self.found(), *(part.component.provider for part in parts)]
        found = [word.partition("branch:") for each in said for word in each.provides]
        return tuple(name for _, branch, name in found if branch)

    # --- what checks do with it ---------------------------------------------------------------

    def write(
        self, policy: TextPolicy, history: History, names: Sequence[Key], temperature: float = 1.0
    ) -> tuple[TextSegment, History]:
        return policy.write(history, Sampling(self.max_tokens, temperature), names)

    def context(self, policy: Policy, rows: Sequence[int] | None = None) -> Context:
        """The prompts at these places, opened, and a thought written for each."""
        places = range(len(self.prompts)) if rows is None else rows
        prompts = tuple(self.prompts[row] for row in places)
        history, written = policy.open(prompts), None
        if isinstance(policy, TextPolicy):
            names = keys(len(self.prompts))
            written, history = self.write(policy, history, [names[row] for row in places])
        return Context(prompts, history, written)

    def noisy(self, policy: ImageFlowPolicy) -> tuple[Tensor, Tensor]:
        """x_t [B, K, *] and t [B, K] for all prompts, the times different in every row."""
        rows = len(self.prompts)
        t = torch.linspace(0.95, 0.1, rows * POINTS).reshape(rows, POINTS)
        return normal("x_t", rows, POINTS, *policy.latent_shape(self.size)), t

    def batch(self, policy: Policy, context: Context, **changes: Any) -> ReplayBatch:
        """What the root is asked for; images only if the policy draws."""
        x_t, t = self.noisy(policy) if isinstance(policy, ImageFlowPolicy) else (None, None)
        wanted: dict[str, Any] = {
            "prompts": context.prompts,
            "tokens": context.tokens,
            "mask": context.mask,
            "temperature": 1.0,
            "want_logps": isinstance(policy, TextPolicy),
            "x_t": x_t,
            "t": t,
            "branches": (),
            "context_gradient": True,
            "thoughts": context.thoughts,
        }
        return ReplayBatch(**{**wanted, **changes})

    def replay(self, policy: Policy, context: Context, **changes: Any) -> Replay:
        found = policy.root(self.batch(policy, context, **changes))
        assert isinstance(found, Replay), f"the root returned {type(found).__name__}, no Replay"
        return found

    def close(self, got: Tensor, expected: Tensor, said: str) -> None:
        torch.testing.assert_close(
            got,
            expected,
            atol=self.tolerance,
            rtol=self.tolerance,
            msg=lambda text: f"{said}\n{text}",
        )

    # --- histories ----------------------------------------------------------------------------

    def test_histories_have_rows(self, component: Policy) -> None:
        """One row per prompt; ``rows`` takes any of them, repeats too, and leaves them there."""
        history = component.open(self.prompts)
        assert isinstance(history, History), f"open returned {type(history).__name__}"
        assert len(history) == len(self.prompts), f"{len(history)} rows"
        assert len(history.rows(torch.tensor([2, 0, 2, 1]))) == 4
        assert len(history) == len(self.prompts), "rows changed the history it was asked of"

    def test_prompt_tokens_are_counted(self, component: Policy) -> None:
        """An int >= 1, the same when asked again."""
        for prompt in self.prompts:
            count = component.prompt_tokens(prompt)
            assert isinstance(count, int), f"{count!r}"
            assert count >= 1, f"{prompt.text!r} takes {count} tokens"
            assert component.prompt_tokens(prompt) == count

    # --- parameters ---------------------------------------------------------------------------

    def test_it_is_what_its_provider_says(self, component: Policy) -> None:
        """``provides`` says "text" of a TextPolicy and "image" of an ImageFlowPolicy."""
        known = {"text": TextPolicy, "image": ImageFlowPolicy}
        is_a = {name for name, interface in known.items() if isinstance(component, interface)}
        assert is_a == self.experts(), f"provides {sorted(self.experts())}, and is {sorted(is_a)}"
        rest = set(self.found().provides) - EXPERTS - {f"branch:{b}" for b in self.branch_names()}
        assert not rest, f"provides {sorted(rest)}, which means nothing"

    def test_every_parameter_has_one_owner(self, component: Policy) -> None:
        """Experts own float32 parameters of the root, by their names in it, none of them twice."""
        named = dict(component.root.named_parameters())
        owned = component.parameters()
        assert set(owned) <= EXPERTS, f"experts {sorted(owned)}"
        seen: dict[int, str] = {}
        for expert in sorted(self.experts()):
            assert owned.get(expert), f"the {expert} expert owns nothing"
        for expert, parameters in owned.items():
            for name, parameter in parameters.items():
                assert named.get(name) is parameter, f"{name} is not that parameter of the root"
                assert id(parameter) not in seen, f"{expert} and {seen.get(id(parameter))}: {name}"
                assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
                seen[id(parameter)] = expert

    def test_only_what_is_trained_takes_gradients(self, given: Mapping[str, Any]) -> None:
        """The placement's experts are trainable; the others, and what nobody owns, are frozen."""
        for train in (*({name} for name in sorted(self.experts())), self.experts(), set()):
            policy = self.trained(self.stated(given), frozenset(train))
            owner = {name: who for who, owned in policy.parameters().items() for name in owned}
            open_ = {name for name, p in policy.root.named_parameters() if p.requires_grad}
            stray = sorted(name for name in open_ if owner.get(name) not in train)
            assert not stray, f"to train {sorted(train)}, and {stray[:3]} are trainable"
            idle = set(train) - {owner[name] for name in open_}
            assert not idle, f"to train {sorted(train)}, and {sorted(idle)} have nothing to train"

    def test_wrap_units_are_modules_of_the_root(self, component: Policy) -> None:
        """A tuple of module classes, each of which the root has."""
        units = component.wrap_units()
        assert isinstance(units, tuple), f"{units!r}"
        for unit in units:
            assert issubclass(unit, nn.Module), f"{unit} is no module class"
            found = any(isinstance(module, unit) for module in component.root.modules())
            assert found, f"the root has no {unit.__name__}"

    # --- weights ------------------------------------------------------------------------------

    def test_kept_weights_compute_the_past(self, given: Mapping[str, Any]) -> None:
        """Under ``weights`` it computes what it did when they were kept, before any update, without
        gradient; after it the current weights are back bit for bit, also after an error."""
        component = self.trained(self.stated(given), self.experts())
        context = self.context(component)
        component.keep("reference")
        with torch.no_grad():
            past = self.replay(component, context)
        shake(component)
        now = copies(component)
        with torch.no_grad():
            present = self.replay(component, context)
        assert not equal(past, present), "the weights changed, and the replay did not"
        with component.weights("reference"):
            found = self.replay(component, context)
        assert not found.logps.requires_grad, "it computes with gradient under kept weights"
        assert equal(found, past), "under kept weights it does not compute what it did"
        assert equal(copies(component), now), "the current weights are not back bit for bit"
        with pytest.raises(_OnTheWayError), component.weights("reference"):
            raise _OnTheWayError
        assert equal(copies(component), now), "after an error the current weights are not back"

    def test_keeping_again_replaces(self, component: Policy) -> None:
        """``keep`` forgets what it kept under that name before."""
        context = self.context(component)
        component.keep("reference")
        shake(component)
        component.keep("reference")
        with torch.no_grad():
            second = self.replay(component, context)
        shake(component)
        with component.weights("reference"):
            assert equal(self.replay(component, context), second), "it kept the first weights"

    def test_averages_move_by_their_decay(self, component: Policy) -> None:
        """``keep`` with a decay keeps decay x kept + (1 - decay) x current: a copy at first."""
        context = self.context(component)
        first = copies(component)
        component.keep("ema", 0.5)
        shake(component)
        second = copies(component)
        component.keep("ema", 0.75)
        shake(component)
        owned = {
            name: parameter
            for expert in component.parameters().values()
            for name, parameter in expert.items()
            if parameter.requires_grad
        }
        for name, parameter in owned.items():
            parameter.data = first[name].lerp(second[name], 0.25)
        with torch.no_grad():
            mean = self.replay(component, context)
        for name, parameter in owned.items():
            parameter.data = second[name].clone()
        with component.weights("ema"):
            found = self.replay(component, context)
        assert equal(found, mean), "under the average it does not compute what the average does"

    def test_saved_weights_load(
        self, component: Policy, given: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """What ``save`` wrote is taken over bit for bit by another policy."""
        shake(component)
        component.save(tmp_path / "saved")
        another = self.build(given)
        assert not equal(copies(another), copies(component))
        another.load(tmp_path / "saved")
        assert equal(copies(another), copies(component)), "the weights loaded are not those saved"

    def test_nothing_to_load_is_an_error(self, component: Policy, tmp_path: Path) -> None:
        """``load`` of an empty folder raises UserError, and changes no weight."""
        before = copies(component)
        with pytest.raises(UserError):
            component.load(tmp_path)
        assert equal(copies(component), before), "it failed to load, and weights changed"

    # --- replay -------------------------------------------------------------------------------

    def test_replay_is_repeatable(self, component: Policy) -> None:
        """Two replays of one batch are the same: no dropout, no draw."""
        context = self.context(component)
        with torch.no_grad():
            first, again = (self.replay(component, context) for _ in range(2))
        assert equal(first, again), "two replays of one batch differ"

    def test_nothing_global_is_drawn(self, component: Policy) -> None:
        """Opening, sampling and replay leave the global generators alone."""
        with no_global_draws():
            context = self.context(component)
            if isinstance(component, ImageFlowPolicy):
                x_t, t = self.noisy(component)
                component.velocity(context.history, x_t[:, 0], t[:, 0])
            self.replay(component, context)


class _OnTheWayError(Exception):
    """Raised under kept weights."""


def copies(policy: Policy) -> dict[str, Tensor]:
    """The current weights, by name."""
    return {name: p.detach().clone() for name, p in policy.root.named_parameters()}


def shake(policy: Policy) -> None:
    """Moves every owned weight that is trained a little, as an update would; under adapters the
    others stay as they are."""
    with torch.no_grad():
        for owned in policy.parameters().values():
            for name, parameter in owned.items():
                if parameter.requires_grad:
                    parameter.add_(0.02 * normal(name, *parameter.shape))


def gradients(policy: Policy, expert: str, value: Tensor) -> list[Tensor]:
    """The gradients of a sum by an expert's parameters, where there are any."""
    owned = [p for p in policy.parameters()[expert].values() if p.requires_grad]
    found = torch.autograd.grad(value.sum(), owned, allow_unused=True, retain_graph=True)
    return [gradient for gradient in found if gradient is not None]
