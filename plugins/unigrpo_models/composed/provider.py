"""The policy ``composed`` as a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_core.plugin import Field, Options, Placement, Provider

if TYPE_CHECKING:
    from unigrpo_core.interfaces import ImageFlowPolicy, TextPolicy
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.composed.account import PartAccount
    from unigrpo_models.composed.policy import ComposedPolicy


class ComposedOptions(Options):
    template: str = Field(
        "{prompt}\n{thought}",
        description="what the painter is told; {prompt} and {thought} stand for these, and blanks "
        "around it are cut off",
    )


def build(
    options: ComposedOptions, place: Placement, text: TextPolicy, image: ImageFlowPolicy
) -> ComposedPolicy:
    from unigrpo_models.composed.policy import ComposedPolicy

    return ComposedPolicy(text, image, options.template)


def account(
    options: ComposedOptions, load: Workload, text: PartAccount, image: PartAccount
) -> Account | str:
    from unigrpo_models.composed.account import joined

    return joined(load, text, image)


PROVIDER = Provider(
    name="composed",
    build=build,
    options=ComposedOptions,
    summary="any policy that writes (policy.text) with any that draws (policy.image)",
    cite="DualGRPO, arXiv 2601.10332; PromptRL, arXiv 2602.01382",
    account=account,
    parts=("text", "image"),
)
