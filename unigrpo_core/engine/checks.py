"""What is checked beside the work itself: prompts before a run folder exists, and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from unigrpo_core.engine.cuts import cut_prompts
from unigrpo_core.engine.faults import blamed
from unigrpo_core.engine.gap import finite
from unigrpo_core.engine.setup import Setup
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.recipe.schema import Expert
from unigrpo_core.records import ImageSegment, Prompt, Rollout, TextSegment

LOOKED_AT = 4096  # prompts of the stream that are looked at before a run begins


def check_prompts(setup: Setup) -> list[str]:
    """Whether the policy takes the prompts to be used: the held-out ones, and those of the rollouts
    as far as ``LOOKED_AT``. Returns what the user should know of them, such as how many the policy
    cuts.

    Raises:
        UserError: it does not take some; the message counts them and says why of the first.
        PluginError: the source fails.
    """
    recipe, options = setup.recipe, setup.recipe.evaluation
    during = options.prompts if options.every and options.every < recipe.steps else 0
    wanted = max(options.final_prompts, during)
    prompts = list(_asked(setup, lambda s: s.held_out(wanted)))
    fewer = len(prompts) if len(prompts) < wanted else None
    for step in range(1, 1 + min(recipe.steps, -(-LOOKED_AT // recipe.prompts))):
        prompts += training_prompts(setup, step)
        if recipe.group.equal == "resample":
            for further in range(1, recipe.group.resample_rounds + 1):
                prompts += training_prompts(setup, step, further)
    different = {prompt.text: prompt for prompt in reversed(prompts)}
    thinks = any(
        "think" in episode for episode in (recipe.episode, *(view.episode for view in setup.views))
    )
    thought = recipe.text.max_tokens if thinks else 0
    refused: list[UserError] = []
    for prompt in reversed(different.values()):
        try:
            setup.policy.prompt_tokens(prompt, thought)
        except UserError as error:
            refused.append(error)
    if len(refused) > 1:
        many = (
            f"{len(refused)} of the {len(different)} different prompts cannot be used; the first: "
        )
        raise UserError(f"{many}{refused[0]}") from refused[0]
    if refused:
        raise refused[0]
    notes = cut_prompts(setup, tuple(different.values()))
    if fewer is None:
        return notes
    only = "1 prompt" if fewer == 1 else f"{fewer} prompts"
    key = "final_prompts" if options.final_prompts == wanted else "prompts"
    return [f"{recipe.source.who} holds {only} out, and evaluation.{key} asks for {wanted}", *notes]


def training_prompts(setup: Setup, step: int, further: int = 0) -> tuple[Prompt, ...]:
    """The prompts of a step's rollout, or of its further rollout of that number, from 1: those come
    from beyond the prompts of all steps.

    Raises:
        PluginError: the source fails, or gave another number than it was asked for.
    """
    recipe = setup.recipe
    number = step - 1
    if further:
        number = recipe.steps + (step - 1) * recipe.group.resample_rounds + further - 1
    start = number * recipe.prompts
    prompts = _asked(setup, lambda s: s.train(recipe.seed, start, recipe.prompts))
    twice = [ident for ident, count in Counter(p.id for p in prompts).items() if count > 1]
    if twice:
        raise PluginError(
            f"{recipe.source.who} returned the prompt id {twice[0]!r} more than once for step "
            f"{step}; ids are what draws are keyed by, so each must be unique in the stream"
        )
    if len(prompts) != recipe.prompts:
        raise PluginError(
            f"{recipe.source.who} returned {len(prompts)} prompts for step {step}, "
            f"expected {recipe.prompts}"
        )
    return prompts


def _asked(
    setup: Setup, question: Callable[[PromptSource], tuple[Prompt, ...]]
) -> tuple[Prompt, ...]:
    """What the source answers; a failure is its plugin's."""
    with blamed(setup.recipe.source.who):
        return question(setup.source)


def check_steps(setup: Setup, found: Sequence[int], total: int) -> None:
    """Whether the window chose as many of the steps as it says.

    Raises:
        PluginError: it did not, or not in order, or some that there are not.
    """
    slot = setup.recipe.image.window
    assert slot is not None
    assert setup.window is not None
    count = setup.window.count(total)
    if len(found) != count or list(found) != sorted({*found} & {*range(total)}):
        raise PluginError(
            f"{slot.who} returned {found} of {total} steps, expected {count} rising number"
            f"{'s' * (count > 1)} from 0 to {total - 1}"
        )


def check_finite(rollout: Rollout) -> None:
    """Whether the model still samples numbers, before a reward sees what it sampled.

    Raises:
        UserError: it has diverged.
    """
    for segment in rollout.segments:
        if isinstance(segment, TextSegment):
            finite("the model has diverged: a sampled log-prob", segment.logps[segment.mask])
        elif isinstance(segment, ImageSegment):
            finite("the model has diverged: a sampled latent", segment.latents)
            finite("the model has diverged: a decoded image", segment.images)


SAME = 1e-3  # relative distance of two noises that are one up to rounding
CHANCE = -30.0  # log of the probability that thoughts are alike by chance
NOISES = 4096  # elements that are compared


def check_draws(rollout: Rollout) -> None:
    """Whether different episodes were drawn by different keys.

    Raises:
        UserError: two images have the same noise at one step, or all thoughts of every prompt are
            alike though that is next to impossible.
    """
    for level, segment in enumerate(rollout.segments):
        if isinstance(segment, ImageSegment):
            for step in range(segment.x_t.shape[1]):
                noise = (segment.x_next - segment.old_mean)[:, step].flatten(1)[:, :NOISES].double()
                noise = noise / noise.norm(dim=1, keepdim=True)
                same = (torch.cdist(noise, noise) < SAME).triu(1).nonzero().tolist()
                if same:
                    one, other = same[0]
                    raise UserError(_shared(f"images {one} and {other} got the same noise"))
        elif isinstance(segment, TextSegment):
            _check_thoughts(segment, rollout.parents[level].tolist())


def _check_thoughts(segment: TextSegment, parents: list[int]) -> None:
    written = [
        tuple(tokens[mask].tolist())
        for tokens, mask in zip(segment.tokens, segment.mask, strict=True)
    ]
    families: dict[int, list[int]] = {}
    for row, parent in enumerate(parents):
        families.setdefault(parent, []).append(row)
    if any(len({written[row] for row in rows}) > 1 for rows in families.values()):
        return
    sums = (segment.logps * segment.mask).sum(1)
    chance = sum(float(sums[row]) for rows in families.values() for row in rows[1:])
    if chance < CHANCE:
        odds = f"by chance 1 time in e^{-chance:.0f}"
        raise UserError(_shared(f"all thoughts of a prompt are alike, {odds}"))


def _shared(what: str) -> str:
    return (
        f"the draws of different episodes are the same: {what}; the policy, or whoever makes its "
        "keys, must draw from a key per row"
    )


def check_reached(
    experts: Mapping[Expert, Sequence[nn.Parameter]], pull: Mapping[str, Tensor]
) -> None:
    """Whether every expert that its advantages pull has a gradient, in an update in which no ratio
    can be clipped; ``pull``: the advantages times the weight of the expert's loss.

    Raises:
        UserError: one has none.
    """
    for expert, parameters in experts.items():
        reached = any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        if bool(pull[expert].any()) and not reached:
            raise UserError(
                f"no gradient reaches the {expert} expert, though its advantages are not all 0: "
                f"its {len(parameters)} trainable tensors have no part in what the trainer "
                "computes (an adapter that binds no module, a detached output?), or it is so sure "
                "that every probability is 1"
            )


UNMOVED = {"float32": 1e-5, "bf16": 1e-2}  # relative rms by which two replays may differ


def check_unmoved(was: Tensor, became: Tensor, precision: str) -> None:
    """Whether the reference computes after an update what it did before.

    Raises:
        UserError: it does not.
    """
    if not was.numel():  # an episode without a thought has no log-probs
        return
    floor = 1e-3 * was.numel() ** 0.5  # of values that are all near 0, differences are rounding
    moved = float((became - was).norm() / was.norm().clamp(min=floor))
    if not moved <= UNMOVED[precision]:
        raise UserError(
            f"the reference moved with the first update, by {moved:.1e} of what it computes: it "
            'shares weights with what is trained; what keep("reference") keeps must be a copy, or '
            "what no optimizer touches"
        )
