"""The conformance kit's checks of policies: each catches a fault of a real one."""

from __future__ import annotations

import pytest
from kit_faults import checks, run_check, subject
from kit_faults.policies import ADAPTED, BAGEL, IMAGE, POLICY, TEXT
from tiny import SIZE, prompts

from unigrpo_core.testing import ImageFlowPolicyConformance, TextPolicyConformance
from unigrpo_core.testing.base import Conformance
from unigrpo_core.testing.policies import PolicyConformance

FACTS = {"prompts": prompts(3), "size": SIZE, "max_tokens": 6}


class Unified(TextPolicyConformance, ImageFlowPolicyConformance):
    """What writes and draws."""


@pytest.mark.parametrize("fault", [*POLICY, *TEXT, *IMAGE], ids=str)
def test_a_fault_is_caught(fault, checkpoint, tmp_path):
    facts = {**FACTS, "options": {"checkpoint": str(checkpoint)}}
    kit = subject(Unified, fault.provider, **facts)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s){fault.says}"):
        run_check(kit, fault.check, tmp_path)


@pytest.mark.parametrize("fault", ADAPTED, ids=str)
def test_a_fault_of_one_with_adapters_is_caught(fault, checkpoint, tmp_path):
    options = {"checkpoint": str(checkpoint), "lora_rank": 2}
    kit = subject(Unified, fault.provider, **FACTS, options=options)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s){fault.says}"):
        run_check(kit, fault.check, tmp_path)


def test_every_check_has_a_fault_that_it_catches():
    for kit, base, faults in (
        (PolicyConformance, Conformance, POLICY),
        (TextPolicyConformance, PolicyConformance, TEXT),
        (ImageFlowPolicyConformance, PolicyConformance, IMAGE),
    ):
        assert set(checks(kit)) - set(checks(base)) == {fault.check for fault in faults}


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2}], ids=["whole", "adapters"])
def test_what_is_right_passes(adapters, checkpoint, tmp_path):
    kit = subject(Unified, BAGEL, **FACTS, options={"checkpoint": str(checkpoint), **adapters})
    for check in set(checks(Unified)) - set(checks(Conformance)):
        run_check(kit, check, tmp_path)
