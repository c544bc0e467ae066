"""One step of a tiny model with each method."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file

TEXT = (
    ('text.objective={use="dr_grpo",max_tokens=6}', 'advantage={use="leave_one_out"}'),
    ('text.objective={use="dapo"}', 'advantage={use="gdpo"}'),
    ('text.objective={use="gspo"}', 'advantage={use="group_norm",percentiles=[10,90]}'),
    ('text.objective={use="cispo"}', 'text.regularizers=[{use="entropy",weight=0.01}]'),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("overrides", TEXT, ids=lambda overrides: overrides[0].split('"')[1])
def test_one_step_of_text(checkpoint, tmp_path, overrides):
    run = tiny.run(tmp_path, checkpoint, "steps=1", "train=['text']", *overrides)
    (figures,) = (line for line in tiny.lines(run) if "text/loss" in line)
    assert all(math.isfinite(figure) for figure in figures.values())
    assert figures["text/grad_norm"] > 0
    if "entropy" in overrides[1]:
        assert figures["text/entropy"] < 0
    before, after = load_file(checkpoint / "ema.safetensors"), tiny.final_weights(run)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
