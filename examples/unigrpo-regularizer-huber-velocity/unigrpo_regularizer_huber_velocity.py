"""Huber velocity: the Huber distance of the velocity from an anchor's.

Mathematics
    mean over latent elements of h(|v - v_anchor|), h(g) = g^2 / 2 below delta and
    delta (g - delta / 2) above: half the velocity MSE for small gaps, and no steeper than delta.
"""

from functools import partial

from unigrpo_core.plugin import Field, Options, Provider, hookimpl


class HuberVelocityOptions(Options):
    delta: float = Field(0.1, gt=0, description="velocity gap where the penalty turns linear")


def huber(step, delta):  # v, v_anchor: [B, K, *] -> float32 [B, K]
    gap = (step.v - step.v_anchor).abs().float()
    near = gap.clamp(max=delta)
    return (near * (gap - 0.5 * near)).flatten(2).mean(2)


@hookimpl
def unigrpo_regularizers():
    yield Provider(
        name="huber_velocity",
        options=HuberVelocityOptions,
        build=lambda options: partial(huber, delta=options.delta),
        needs=("v_anchor",),
        summary="Huber distance of the velocity from the anchor's",
    )
