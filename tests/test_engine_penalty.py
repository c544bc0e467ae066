"""Regularizers that break their interface."""

import pytest
import torch

from unigrpo_core.engine.penalty import checked
from unigrpo_core.errors import PluginError
from unigrpo_core.records import FlowStep, TokenStep

ROWS = torch.zeros(2, 3)
FLOW = FlowStep(ROWS, ROWS, ROWS, ROWS, ROWS, None, None)
TOKENS = TokenStep(ROWS, ROWS, ROWS.bool())


@pytest.mark.parametrize("expert", ["image", "text"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "failed: RuntimeError: not today"),
        ("mean", "returned torch.float32 (3,), expected floats (2, 3)"),
        ("int", "returned torch.int32 (2, 3), expected floats (2, 3)"),
        ("list", "returned [0.0], expected floats (2, 3)"),
    ],
)
def test_a_faulty_penalty_is_named_with_its_distribution(setup, expert, fault, message):
    slot = f"{{use='faulty_penalty', weight=0.1, fault='{fault}'}}"
    built = setup(f"{expert}.regularizers=[{slot}]")
    [item] = built.image_regularizers if expert == "image" else built.text_regularizers
    with pytest.raises(PluginError) as caught:
        item.penalty(FLOW if expert == "image" else TOKENS)
    assert str(caught.value) == f"regularizer 'faulty_penalty' of tiny-tests 0.1 {message}"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("none left"), MemoryError(), RuntimeError("can't allocate memory: 9")],
)
def test_too_little_memory_is_no_fault_of_the_regularizer(error):
    def penalty(step):
        raise error

    with pytest.raises(type(error)) as caught:
        checked("regularizer 'x'", penalty)(FLOW)
    assert caught.value is error


def test_it_stops_the_run(train):
    with pytest.raises(PluginError, match=r"'faulty_penalty' of tiny-tests 0\.1 failed"):
        train("run", "image.regularizers=[{use='faulty_penalty', weight=0.1, fault='raise'}]")
