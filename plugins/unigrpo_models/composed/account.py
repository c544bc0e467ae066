"""The account of a policy of two parts: theirs, one after the other. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unigrpo_core.workload import Account, Memory, Workload

PartAccount = Callable[[Workload], Account | str]


def joined(load: Workload, text: PartAccount, image: PartAccount) -> Account | str:
    """What a training step takes; a text if a part has no account. Each part is asked for its own
    share of the workload. Replays are cut for both together, so the part that writes is told how
    many contexts there are in one.

    Raises:
        UserError: a part's sizes do not fit.
    """
    drawn = image(replace(load, train=load.train & {"image"}))
    if isinstance(drawn, str):
        return f"policy.image: {drawn}"
    share = load.rows // (load.updates if load.disjoint else 1)
    rows = max(batch.rows for batch in load.micro_batches(share, drawn.image_tokens))
    said = text(
        replace(
            load,
            images=0,
            points=0,
            windows=(),
            train=load.train & {"text"},
            replay_tokens=rows * load.context,
        )
    )
    if isinstance(said, str):
        return f"policy.text: {said}"
    parts = {"text": said, "image": drawn}
    return Account(
        model=" and ".join(part.model for part in parts.values()),
        memory=tuple(_of(name, held) for name, part in parts.items() for held in part.memory),
        work={
            f"{name}: {phase}": work
            for name, part in parts.items()
            for phase, work in part.work.items()
        },
        calls=drawn.calls,
        images=drawn.images,
        assumptions=tuple(dict.fromkeys((*said.assumptions, *drawn.assumptions))),
        image_tokens=drawn.image_tokens,
    )


def _of(part: str, held: Memory) -> Memory:
    return replace(held, name=f"{part}: {held.name}")
