"""What a model that is trained holds in memory, by the number of its weights. No torch.

AdamW keeps two float32 moments of everything that is trained. What is trained whole is float32, and
a pass in bfloat16 casts it; what is not trained is in the type of computing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from unigrpo_core.workload import Held, Memory, Workload
from unigrpo_models.targets import bind

FLOAT32 = 4
ASSUMED = (
    "activations are an estimate: with checkpointing 'none' a sixth more or less",
    "not counted: what adapters multiply, rewards, fragmentation, the CUDA context, evaluation",
)
OPTIMIZER_BYTES = 34
"""Bytes that a step of AdamW moves per trained weight: the weight and two moments read and written
(24), the gradient read twice (8), and a bfloat16 copy of the weight written (2)."""

PerNumber = Mapping[tuple[int, bool], float]
"""Bytes kept for the backward pass for every number that goes into a block's matrix or comes out of
it, by the bytes of a number as it is computed and whether adapters are trained."""


def bytes_of(load: Workload) -> int:
    """Of a number as the model computes."""
    return FLOAT32 if load.precision == "float32" else 2


@dataclass(frozen=True)
class Trained:
    """A model of ``size`` weights, of which ``whole`` are trained, or ``adapters`` beside them."""

    size: int
    whole: int
    adapters: int
    load: Workload

    @property
    def moved(self) -> int:
        """Weights that the optimizer moves."""
        return self.whole + self.adapters

    def parts(self) -> list[Memory]:
        load, itemsize = self.load, bytes_of(self.load)
        weights = FLOAT32 * self.moved + itemsize * (self.size - self.whole)
        cast = itemsize * self.whole if itemsize < FLOAT32 else 0
        copy = FLOAT32 * self.whole if load.reference else 0
        average = FLOAT32 * self.moved if load.averaged else 0
        held: Held = "always" if load.reference_on == "device" else "host"
        gradients = FLOAT32 * self.moved * (1 + load.signal)
        return [
            Memory("weights", weights, note="float32 where trained"),
            Memory("cast weights", cast, note="of what is trained, while a pass computes in bf16"),
            Memory("reference", copy, held, note="a copy of what is trained"),
            Memory("moving average", average, held, note="of what is trained"),
            Memory("optimizer", 2 * FLOAT32 * self.moved, note="two moments in float32"),
            Memory("gradients", gradients, "update", note="float32"),
        ]


def adapted(
    expert: str, shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], rank: int
) -> int:
    """Weights of adapters of a rank on the linear layers that the targets name.

    Raises:
        UserError: a target names none.
    """
    linear = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed_tokens" not in name
    ]
    return rank * sum(sum(shapes[f"{name}.weight"]) for name in bind(expert, targets, linear))


def activations(
    load: Workload,
    each: float,
    kept: Collection[float],
    outputs: float,
    inputs: float,
) -> float:
    """Bytes that blocks keep for a backward pass, ``each`` of the numbers that go in and come out
    of matrices: so many a block (``kept``), of which so many come out in all (``outputs``).
    ``inputs`` are the blocks' own. While a block is computed again it is there whole."""
    if load.checkpointing == "none":
        return each * sum(kept)
    products = bytes_of(load) * outputs if load.checkpointing == "selective" else 0
    return min(each * sum(kept), FLOAT32 * inputs + products + each * max(kept))
