"""bf16: sampler and trainer agree within law 3's limits, because they compute the same shapes."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    "overrides",
    [
        ("episode=['draw']", "train=['image']", "group.fan_out=[3]"),
        ("group.fan_out=[3, 1]",),
        ("group.fan_out=[3, 2]", "compute.rollout_rows=2", "compute.replay_tokens=60"),
        ("group.fan_out=[3, 1]", "image.guidance={use='cfg', scale=2.0}"),
        ("group.fan_out=[3, 1]", "image.context_gradient=false"),
    ],
)
def test_bf16_trains_within_the_limits(train, overrides):
    run = train("run", "steps=2", "compute.precision='bf16'", *overrides)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["gap/image_radius_share"] <= 0.25
        assert step.get("gap/text_mean", 0.0) <= 0.02
