"""Last rows: the time of a whole UniGRPO step, as the sum of measured phases, beside its floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unigrpo_models.bagel.accounting import (
    Work,
    decode_step,
    optimizer,
    prefill,
    trained_parameters,
    velocity,
)

from gpu_checks.harness import Bench
from gpu_checks.models import EXPERTS
from gpu_checks.rows import Peaks
from gpu_checks.scales import Scale, Step
from gpu_checks.training import work_of

UPDATES = 2  # per step, on disjoint halves of the prompts


@dataclass(frozen=True)
class Phase:
    """``times`` units of a measured phase (milliseconds each; None: not measured), and their
    floor."""

    name: str
    times: float
    measured: float | None
    used: str
    floor_s: float | None

    @property
    def seconds(self) -> float | None:
        return None if self.measured is None else self.times * self.measured / 1e3


def project(bench: Bench, scale: Scale) -> None:
    """A row per step. Every phase counts at its best measured configuration among those that the
    package offers; what was not measured is named and left out of both sums."""
    for step in scale.projected:
        phases = phases_of(scale, step, bench.phases, bench.peaks)
        known = [phase for phase in phases if phase.seconds is not None]
        measured = sum(phase.seconds or 0.0 for phase in known)
        floors = [phase.floor_s for phase in known]
        bench.write(
            config=step.name,
            status="projection",
            trained="adapters" if scale.lora_rank else "both experts",
            seconds=measured,
            floor_s=sum(floor or 0.0 for floor in floors) if any(floors) else None,
            floor_all_s=sum(phase.floor_s or 0.0 for phase in phases) if any(floors) else None,
            missing=[phase.name for phase in phases if phase.seconds is None],
            samples_per_device_s=(
                step.prompts * step.chains / step.devices / measured if measured else None
            ),
            phases={
                phase.name: {
                    "seconds": phase.seconds,
                    "floor_s": phase.floor_s,
                    "units": phase.times,
                    "by": phase.used,
                }
                for phase in phases
            },
        )


def phases_of(
    scale: Scale, step: Step, measured: Mapping[str, Mapping[str, float]], peaks: Peaks | None
) -> list[Phase]:
    """The phases of one device's share of a step; samples are spread evenly over the devices."""
    prompts, rows = step.prompts / step.devices, step.prompts * step.chains / step.devices
    config, size, itemsize = scale.config, step.size, scale.compute.itemsize
    tokens = scale.latent_tokens(size)
    trained = {"train": EXPERTS, "lora": EXPERTS if scale.lora_rank else frozenset()}
    decoding = _decode_row(scale, rows)
    cache = scale.prompt + scale.thought / 2

    def phase(name: str, times: float, known: Mapping[str, float], floor: Work | None) -> Phase:
        used = min(known, key=lambda config: known[config]) if known else ""
        floor_s = None
        if floor is not None and peaks is not None:
            floor_s = times * floor.seconds(peaks.burst, peaks.bandwidth)
        return Phase(name, times, known.get(used), used, floor_s)

    def seen(name: str) -> Mapping[str, float]:
        return measured.get(name, {})

    most = max(scale.images[size])
    image = velocity(config, most, tokens, scale.context, itemsize=itemsize) * (1 / most)
    forward, together = work_of(scale, 1, size), max(1, round(prompts))
    return [
        phase(
            "prefill",
            prompts,
            seen("prefill"),
            prefill(config, together, scale.prompt, itemsize=itemsize) * (1 / together),
        ),
        phase(
            "decode",
            scale.thought * -(-rows // decoding),
            _mean(seen(f"decode/{decoding}/short"), seen(f"decode/{decoding}/long")),
            decode_step(config, decoding, cache, itemsize=itemsize),
        ),
        phase("denoise", scale.steps * rows, seen(f"denoise/{size}"), image),
        phase("autoencoder", rows, seen(f"autoencoder/{size}"), None),
        phase("old values", rows * (1 - 1 / UPDATES), seen(f"forward/{size}"), forward),
        phase("reference", rows, seen(f"reference/{size}"), work_of(scale, 1, size, scored=False)),
        phase("update", rows, seen(f"update/{size}"), work_of(scale, 1, size, **trained)),
        _optimizer(scale, step, seen("optimizer"), peaks),
    ]


def _decode_row(scale: Scale, rows: float) -> int:
    """The measured number of rows that decoding so many is told by: the next one, or the most."""
    return min((n for n in scale.decode_rows if n >= rows), default=max(scale.decode_rows))


def _mean(short: Mapping[str, float], long: Mapping[str, float]) -> dict[str, float]:
    """The cost of a step over a cache that grows from short to long."""
    if not short or not long:
        return {}
    return {"mean of short and long cache": (min(short.values()) + min(long.values())) / 2}


def _optimizer(scale: Scale, step: Step, known: Mapping[str, float], peaks: Peaks | None) -> Phase:
    """Its time goes by the parameters, whole experts' spread over the devices."""
    lora = EXPERTS if scale.lora_rank else frozenset()
    count = trained_parameters(scale.config, EXPERTS, lora, rank=scale.lora_rank)
    work = optimizer(scale.config, EXPERTS, lora, rank=scale.lora_rank) * (1 / step.devices)
    used = min(known, key=lambda config: known[config]) if known else ""
    times = UPDATES * count / step.devices / scale.moved
    floor = None if peaks is None else UPDATES * work.seconds(peaks.burst, peaks.bandwidth)
    return Phase("optimizer", times, known.get(used), used, floor)
