"""The tiny BAGEL with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unigrpo_core.catalog import load_catalog
from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Policy
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Provider

BAGEL = load_catalog().find("policy", "bagel").provider


@dataclass(frozen=True)
class PolicyFault:
    """A change of the policy that breaks the promise of one check, and what the check says."""

    check: str
    says: str
    spoil: Callable[[Any], None]
    provides: tuple[str, ...] = tuple(BAGEL.provides)

    def __str__(self) -> str:
        return self.check

    @property
    def provider(self) -> Provider:
        def build(options: Any, place: Any) -> Policy:
            policy: Policy = BAGEL.build(options, place)
            self.spoil(policy)
            return policy

        return replace(BAGEL, build=build, provides=self.provides)


def instead(name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """Puts ``change(policy, real, *arguments)`` in the place of a method."""

    def spoil(policy: Any) -> None:
        real = getattr(policy, name)
        setattr(policy, name, lambda *given: change(policy, real, *given))

    return spoil


def result(name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """Changes what a method returns."""
    return instead(name, lambda policy, real, *given: change(real(*given)))


def replayed(change: Callable[..., Any]) -> Callable[[Any], None]:
    """Changes what the root returns: ``change(replay, batch)``."""

    def spoil(policy: Any) -> None:
        real = policy.root.forward
        policy.root.forward = lambda batch: change(real(batch), batch)

    return spoil


def asked(change: Callable[..., Any]) -> Callable[[Any], None]:
    """Changes what the root is asked for."""

    def spoil(policy: Any) -> None:
        real = policy.root.forward
        policy.root.forward = lambda batch: real(change(batch))

    return spoil


# --- of any policy ----------------------------------------------------------------------------


def all_trainable(policy: Any) -> None:
    policy.root.requires_grad_(True)


def none_trainable(policy: Any) -> None:
    policy.root.requires_grad_(False)


def keeps_the_first(policy: Any) -> None:
    real, kept = policy.keep, set()
    policy.keep = lambda name, decay=None: name in kept or (kept.add(name), real(name, decay))


def in_bf16(policy: Any) -> None:
    parameters = policy.parameters()
    first = next(iter(parameters["text"].values()))
    first.data = first.data.bfloat16()


def both_own_all(policy: Any) -> None:
    real = policy.parameters()
    everything = {**real["text"], **real["image"]}
    policy.parameters = lambda: {"text": everything, "image": everything}


def comes_back_rounded(policy: Any, real: Any, name: str) -> Any:
    class Rounded(nullcontext):
        def __enter__(self) -> None:
            self.inner = real(name)
            self.inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)
            with torch.no_grad():
                for parameter in policy.root.parameters():
                    parameter.mul_(1 + 1e-6)

    return Rounded()


def with_gradient(policy: Any, real: Any, name: str) -> Any:
    class Open(nullcontext):
        def __enter__(self) -> None:
            self.inner = real(name)
            self.inner.__enter__()
            torch.set_grad_enabled(True)

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

    return Open()


def draws(policy: Any, real: Any, *given: Any) -> Any:
    torch.rand(())
    return real(*given)


def misowned(owned: Any) -> Any:
    return {"text": {f"my.{name}": p for name, p in owned["text"].items()}, "image": owned["image"]}


def drop_out(replay: Any, batch: Any) -> Any:
    return replace(replay, logps=replay.logps * (1 + 1e-3 * torch.rand(())))


def all_rows(history: Any) -> Any:
    object.__setattr__(history, "rows", lambda index: history)
    return history


class Growing:
    """Adds one more with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: int) -> int:
        self.calls += 1
        return value + self.calls


def forgets_after_an_error(policy: Any) -> None:
    real = policy.weights

    class Careless(nullcontext):
        def __init__(self, name: str) -> None:
            self.inner = real(name)
            policy.contexts = [self.inner]  # else its end would put the weights back

        def __enter__(self) -> None:
            self.inner.__enter__()

        def __exit__(self, kind: Any, *error: Any) -> None:
            if kind is None:
                self.inner.__exit__(None, None, None)
            torch.set_grad_enabled(True)

    policy.weights = Careless


def spoils_and_fails(policy: Any, real: Any, folder: Any) -> None:
    with torch.no_grad():
        next(policy.root.parameters()).zero_()
    raise UserError("nothing there")


POLICY = [
    PolicyFault(
        "test_averages_move_by_their_decay",
        "under the average",
        instead("keep", lambda policy, real, name, decay: real(name)),
    ),
    PolicyFault(
        "test_histories_have_rows",
        "1 rows",
        instead("open", lambda policy, real, prompts: real(prompts[:1])),
    ),
    PolicyFault("test_prompt_tokens_are_counted", "takes 0", result("prompt_tokens", lambda n: 0)),
    PolicyFault(
        "test_it_is_what_its_provider_says",
        r"provides \['text'\], and is \['image', 'text'\]",
        lambda policy: None,
        ("text",),
    ),
    PolicyFault(
        "test_it_is_what_its_provider_says",
        "'sound'",
        lambda policy: None,
        ("text", "image", "sound"),
    ),
    PolicyFault("test_every_parameter_has_one_owner", "image and text", both_own_all),
    PolicyFault("test_every_parameter_has_one_owner", "bfloat16", in_bf16),
    PolicyFault(
        "test_every_parameter_has_one_owner", "my.* is not", result("parameters", misowned)
    ),
    PolicyFault(
        "test_every_parameter_has_one_owner",
        "the image expert owns nothing",
        result("parameters", lambda owned: {"text": owned["text"]}),
    ),
    PolicyFault("test_only_what_is_trained_takes_gradients", "are trainable", all_trainable),
    PolicyFault("test_only_what_is_trained_takes_gradients", "nothing to train", none_trainable),
    PolicyFault(
        "test_wrap_units_are_modules_of_the_root",
        "no LSTM",
        result("wrap_units", lambda units: (nn.LSTM,)),
    ),
    PolicyFault(
        "test_kept_weights_compute_the_past",
        "with gradient",
        instead("weights", with_gradient),
    ),
    PolicyFault(
        "test_kept_weights_compute_the_past",
        "does not compute what it did",
        instead("weights", lambda policy, real, name: torch.no_grad()),
    ),
    PolicyFault(
        "test_kept_weights_compute_the_past",
        "not back bit for bit",
        instead("weights", comes_back_rounded),
    ),
    PolicyFault("test_keeping_again_replaces", "the first weights", keeps_the_first),
    PolicyFault(
        "test_saved_weights_load",
        "not those saved",
        instead("load", lambda policy, real, folder: None),
    ),
    PolicyFault(
        "test_nothing_to_load_is_an_error",
        "DID NOT RAISE",
        instead("load", lambda policy, real, folder: None),
    ),
    PolicyFault("test_replay_is_repeatable", "two replays", replayed(drop_out)),
    PolicyFault("test_nothing_global_is_drawn", "of torch;", instead("open", draws)),
    PolicyFault("test_nothing_global_is_drawn", "of torch;", instead("velocity", draws)),
    PolicyFault("test_nothing_global_is_drawn", "of torch;", replayed(drop_out)),
    PolicyFault(
        "test_histories_have_rows", "returned tuple", instead("open", lambda p, real, *given: given)
    ),
    PolicyFault("test_histories_have_rows", "", result("open", all_rows)),
    PolicyFault("test_prompt_tokens_are_counted", r"3\.0", result("prompt_tokens", lambda n: 3.0)),
    PolicyFault("test_prompt_tokens_are_counted", "", result("prompt_tokens", Growing())),
    PolicyFault(
        "test_every_parameter_has_one_owner",
        "experts .*'sound'",
        result("parameters", lambda owned: {**owned, "sound": {}}),
    ),
    PolicyFault(
        "test_wrap_units_are_modules_of_the_root", "Layer", result("wrap_units", lambda u: [*u])
    ),
    PolicyFault(
        "test_wrap_units_are_modules_of_the_root",
        "no module class",
        result("wrap_units", lambda units: (dict,)),
    ),
    PolicyFault(
        "test_kept_weights_compute_the_past",
        "no Replay",
        replayed(lambda replay, batch: replay.logps),
    ),
    PolicyFault(
        "test_kept_weights_compute_the_past",
        "and the replay did not",
        replayed(
            lambda replay, batch: replace(
                replay, logps=0 * replay.logps, velocities=0 * replay.velocities
            )
        ),
    ),
    PolicyFault("test_kept_weights_compute_the_past", "after an error", forgets_after_an_error),
    PolicyFault(
        "test_nothing_to_load_is_an_error", "weights changed", instead("load", spoils_and_fails)
    ),
]


# --- of one with adapters ---------------------------------------------------------------------


def without(policy: Any, real: Any, *given: Any) -> Any:
    with policy._weights.adapters.off():
        return real(*given)


ADAPTED = [
    PolicyFault(
        "test_keeping_again_replaces",
        "the first weights",
        instead("weights", lambda policy, real, name: policy._weights.adapters.off()),
    ),
    PolicyFault(
        "test_kept_weights_compute_the_past",
        "not compute what it did",
        instead("weights", lambda policy, real, name: torch.no_grad()),
    ),
    PolicyFault(
        "test_saved_weights_load",
        "not those saved",
        instead("load", lambda policy, real, folder: None),
    ),
    PolicyFault("test_only_what_is_trained_takes_gradients", "are trainable", all_trainable),
    PolicyFault("test_replay_gives_the_samplers_logps", "differ by", instead("write", without)),
    PolicyFault(
        "test_replay_gives_the_samplers_velocities",
        "trainer, sampler",
        instead("velocity", without),
    ),
]


# --- of one that writes -----------------------------------------------------------------------


def written(change: Callable[..., Any]) -> Callable[[Any], None]:
    """Changes the text segment."""
    return result("write", lambda found: (change(found[0]), found[1]))


@torch.inference_mode()
def spends_its_parent(policy: Any, real: Any, history: Any, *given: Any) -> Any:
    found = real(history, *given)
    for keys, values in history.caches:
        keys.zero_()
        values.zero_()
    return found


def reversed_rows(history: Any) -> Any:
    real = history.rows
    object.__setattr__(history, "rows", lambda index: real(index.flip(0)))
    return history


def other_keys(change: Callable[..., Any]) -> Callable[[Any], None]:
    return instead(
        "write",
        lambda policy, real, history, sampling, keys: real(
            history, sampling, [change(key, len(history)) for key in keys]
        ),
    )


CALLS: list[int] = []


def rising(key: Key, rows: int) -> Key:
    CALLS.append(rows)
    return key.child(len(CALLS))


def one_off(logps: torch.Tensor) -> torch.Tensor:
    """One log-prob of about 14 moved by so much that their mean stays below 1e-5."""
    moved = logps.clone()
    moved[0, 0] -= 1.2e-4
    return moved


TEXT = [
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "not on the right",
        written(
            lambda s: replace(s, mask=torch.arange(s.mask.shape[1]) != s.mask.sum(1)[:, None] - 2)
        ),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "a log-prob is 0",
        written(lambda s: replace(s, logps=s.logps.exp())),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "tokens: torch.int32",
        written(lambda s: replace(s, tokens=s.tokens.int())),
    ),
    PolicyFault(
        "test_a_given_text_is_as_if_written",
        "does not go on as after its own",
        instead("append", lambda policy, real, history, written: history),
    ),
    PolicyFault(
        "test_writing_leaves_the_history_alone",
        "continued again",
        instead("write", spends_its_parent),
    ),
    PolicyFault(
        "test_rows_continue_as_their_own", "do not continue", result("open", reversed_rows)
    ),
    PolicyFault(
        "test_batching_changes_no_token",
        "alone prompt",
        other_keys(lambda key, rows: key.child(rows)),
    ),
    PolicyFault(
        "test_batching_changes_no_token",
        "prompt 0 alone",
        written(lambda s: replace(s, logps=s.logps * (1 + 0.01 * len(s.texts)))),
    ),
    PolicyFault(
        "test_draws_come_from_the_keys", "the same texts", other_keys(lambda key, rows: Key((0,)))
    ),
    PolicyFault("test_draws_come_from_the_keys", "different tokens", other_keys(rising)),
    PolicyFault(
        "test_replay_gives_the_samplers_logps",
        "differ by (1.00e-04|9.9.e-05)",
        replayed(lambda replay, batch: replace(replay, logps=replay.logps - 1e-4)),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_logps",
        "differ by",
        asked(lambda batch: replace(batch, temperature=1.0)),
    ),
    PolicyFault(
        "test_masked_tokens_count_for_nothing",
        "are not 0",
        replayed(lambda replay, batch: replace(replay, logps=replay.logps - 1.0)),
    ),
    PolicyFault(
        "test_masked_tokens_count_for_nothing",
        "change the replay",
        replayed(
            lambda replay, batch: replace(
                replay, logps=replay.logps - 1e-3 * batch.tokens.sum(1, True) * batch.mask
            )
        ),
    ),
    PolicyFault(
        "test_logps_are_left_out_if_not_wanted",
        "not wanted",
        asked(lambda batch: replace(batch, want_logps=True)),
    ),
    PolicyFault(
        "test_text_gradient_reaches_the_text_expert",
        "no gradient",
        replayed(
            lambda replay, batch: replace(
                replay, logps=replay.logps.detach() + 0 * replay.velocities.sum()
            )
        ),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "logps: .3, ",
        written(lambda s: replace(s, logps=s.logps[:, 1:])),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "2 texts",
        written(lambda s: replace(s, texts=s.texts[1:])),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "7 tokens",
        instead(
            "write",
            lambda policy, real, history, sampling, keys: real(
                history, replace(sampling, max_tokens=7), keys
            ),
        ),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "no token",
        written(lambda s: replace(s, mask=s.mask & (torch.arange(len(s.mask)) > 0)[:, None])),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "not finite",
        written(lambda s: replace(s, logps=s.logps - float("inf"))),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "carries gradient",
        written(lambda s: replace(s, logps=s.logps.clone().requires_grad_())),
    ),
    PolicyFault(
        "test_texts_are_padded_on_the_right",
        "None",
        written(lambda s: replace(s, texts=(None,) * len(s.texts))),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_logps",
        "float64",
        replayed(lambda replay, batch: replace(replay, logps=replay.logps.double())),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_logps",
        r"\(3,\)",
        replayed(lambda replay, batch: replace(replay, logps=replay.logps.sum(1))),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_logps",
        "differ by 1.[12].e-04",
        replayed(lambda replay, batch: replace(replay, logps=one_off(replay.logps))),
    ),
    PolicyFault(
        "test_logps_are_left_out_if_not_wanted",
        r"\(3, 0\)",
        replayed(
            lambda replay, batch: (
                replay if batch.want_logps else replace(replay, logps=replay.logps[:, :0])
            )
        ),
    ),
    PolicyFault(
        "test_text_gradient_reaches_the_text_expert",
        "not finite",
        replayed(
            lambda replay, batch: replace(
                replay, logps=replay.logps * (replay.logps - replay.logps.detach()).sqrt()
            )
        ),
    ),
]


# --- of one that draws ------------------------------------------------------------------------


def drifting(policy: Any) -> None:
    real, calls = policy.velocity, []

    def velocity(*given: Any) -> Any:
        calls.append(1)
        return real(*given) * (1 + 1e-6 * len(calls))

    policy.velocity = velocity


def always_drawing(policy: Any) -> None:
    shape = policy.latent_shape((8, 12))
    asked(
        lambda batch: (
            replace(
                batch,
                x_t=torch.zeros(len(batch.prompts), 1, *shape),
                t=torch.ones(len(batch.prompts), 1),
            )
            if batch.x_t is None
            else batch
        )
    )(policy)


def reads_two_words(policy: Any, real: Any, prompts: Any) -> Any:
    return real([replace(prompt, text=" ".join(prompt.text.split()[:2])) for prompt in prompts])


def cuts(change: Callable[[str], dict[str, int]]) -> Callable[[Any], None]:
    return instead("cut_tokens", lambda policy, real, prompt: change(prompt.text))


def rising_cuts(policy: Any) -> None:
    more = Growing()
    cuts(lambda text: {"words": more(0)})(policy)


IMAGE = [
    PolicyFault(
        "test_sizes_are_numbers",
        "DID NOT RAISE",
        instead("latent_shape", lambda policy, real, size: (2, 3, 48)),
    ),
    PolicyFault("test_sizes_are_numbers", "", result("time_shift", lambda shift: 0.0)),
    PolicyFault(
        "test_images_are_in_range", r"not in \[0, 1\]", result("decode", lambda x: 2 * x - 0.5)
    ),
    PolicyFault(
        "test_images_are_in_range",
        "alone",
        result("decode", lambda x: x * len(x) / 3),
    ),
    PolicyFault("test_images_are_in_range", "float64", result("decode", lambda x: x.double())),
    PolicyFault("test_what_is_cut_is_counted", "and is silent", instead("open", reads_two_words)),
    PolicyFault("test_what_is_cut_is_counted", "of another text", cuts(lambda text: {text: 0})),
    PolicyFault("test_what_is_cut_is_counted", "-1", cuts(lambda text: {"words": -1})),
    PolicyFault("test_what_is_cut_is_counted", "not alike", rising_cuts),
    PolicyFault(
        "test_velocities_are_float32_of_the_latents_shape",
        "float64",
        result("velocity", lambda v: v.double()),
    ),
    PolicyFault(
        "test_velocities_are_float32_of_the_latents_shape",
        r"\(3, 6, 48\)",
        result("velocity", lambda v: v.flatten(1, 2)),
    ),
    PolicyFault("test_drawing_leaves_the_history_alone", "", drifting),
    PolicyFault(
        "test_velocity_rows_are_independent",
        "rows",
        result("velocity", lambda v: v + 1e-3 * v.mean(0)),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_velocities",
        "trainer, sampler",
        result("velocity", lambda v: v + 1e-4),
    ),
    PolicyFault("test_velocities_are_left_out_if_not_wanted", "not asked for", always_drawing),
    PolicyFault(
        "test_branches_are_unconditional",
        "branch 'text'",
        instead("branches", lambda policy, real, history, names: dict.fromkeys(names, history)),
    ),
    PolicyFault(
        "test_branches_are_unconditional",
        "branch 'image'",
        instead(
            "branches",
            lambda policy, real, history, names: {**real(history, names), "image": history},
        ),
    ),
    PolicyFault(
        "test_branches_are_unconditional",
        r"got \[\]",
        result("branches", lambda found: {}),
    ),
    PolicyFault(
        "test_replay_gives_the_branches_velocities",
        "branch 'text'",
        replayed(
            lambda replay, batch: replace(
                replay, branches=dict.fromkeys(replay.branches, replay.velocities)
            )
        ),
    ),
    PolicyFault(
        "test_replay_gives_the_branches_velocities",
        "not asked for",
        asked(lambda batch: replace(batch, branches=("text",))),
    ),
    PolicyFault(
        "test_image_gradient_reaches_the_image_expert",
        "no gradient",
        replayed(
            lambda replay, batch: replace(
                replay, velocities=replay.velocities.detach() + 0 * replay.logps.sum()
            )
        ),
    ),
    PolicyFault(
        "test_context_gradient_can_be_stopped",
        "reaches the text expert",
        asked(lambda batch: replace(batch, context_gradient=True)),
    ),
    PolicyFault(
        "test_context_gradient_can_be_stopped",
        "without context gradient",
        replayed(
            lambda replay, batch: replace(
                replay, velocities=replay.velocities * (1 + 0.01 * batch.context_gradient)
            )
        ),
    ),
    PolicyFault(
        "test_sizes_are_numbers", "2.0", result("latent_shape", lambda shape: (2.0, *shape))
    ),
    PolicyFault(
        "test_sizes_are_numbers", r"\[2, 3, 48\]", result("latent_shape", lambda shape: [*shape])
    ),
    PolicyFault("test_sizes_are_numbers", "", result("image_tokens", lambda count: 0)),
    PolicyFault(
        "test_images_are_in_range", r"\(3, 8, 12\)", result("decode", lambda images: images[:, 0])
    ),
    PolicyFault(
        "test_decoding_passes_the_gradient",
        "stops the gradient",
        result("decode", lambda images: images.detach()),
    ),
    PolicyFault(
        "test_decoding_passes_the_gradient",
        "of another",
        result("decode", lambda images: images * images.mean()),
    ),
    PolicyFault(
        "test_images_are_in_range",
        "carries gradient",
        result("decode", lambda images: images.clone().requires_grad_()),
    ),
    PolicyFault(
        "test_velocities_are_float32_of_the_latents_shape",
        "not finite",
        result("velocity", lambda v: v / 0),
    ),
    PolicyFault(
        "test_velocities_are_float32_of_the_latents_shape",
        "carries gradient",
        result("velocity", lambda v: v.clone().requires_grad_()),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_velocities",
        "gives none",
        replayed(lambda replay, batch: replace(replay, velocities=None)),
    ),
    PolicyFault(
        "test_replay_gives_the_samplers_velocities",
        "float64",
        replayed(lambda replay, batch: replace(replay, velocities=replay.velocities.double())),
    ),
    PolicyFault(
        "test_branches_are_unconditional",
        "2 rows",
        result("branches", lambda found: {n: h.rows(torch.arange(2)) for n, h in found.items()}),
    ),
    PolicyFault(
        "test_replay_gives_the_branches_velocities",
        r"got \[\]",
        asked(lambda batch: replace(batch, branches=())),
    ),
    PolicyFault(
        "test_image_gradient_reaches_the_image_expert",
        "not finite",
        replayed(
            lambda replay, batch: replace(
                replay,
                velocities=replay.velocities
                * (replay.velocities - replay.velocities.detach()).sqrt(),
            )
        ),
    ),
]
