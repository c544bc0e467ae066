"""Every component of this distribution keeps the promises of its interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import tiny_clip
import tiny_lm
import tiny_painters
from unigrpo_board.prompts import BoardPrompts
from unigrpo_methods.schedulers import cps

from unigrpo_core.catalog import load_catalog
from unigrpo_core.interfaces import Scheduler
from unigrpo_core.records import Prompt
from unigrpo_core.testing import (
    AdvantageConformance,
    FlowRegularizerConformance,
    GuidanceConformance,
    ImageFlowPolicyConformance,
    ImageObjectiveConformance,
    PromptSourceConformance,
    RewardConformance,
    SchedulerConformance,
    TextObjectiveConformance,
    TextPolicyConformance,
    TokenRegularizerConformance,
    WindowConformance,
)
from unigrpo_core.testing.base import Conformance

BOARD = BoardPrompts().train(0, 0, 5)
THOUGHTS = ("red circle top", "blue square left green triangle center", "", "not a thought")


# --- rewards and prompts ----------------------------------------------------------------------


class TestBrightness(RewardConformance):
    use = "brightness"


class TestRandomReward(RewardConformance):
    use = "random"


class TestPattern(RewardConformance):
    use = "pattern"
    options: ClassVar = {"pattern": r"\d"}
    thoughts = ("3 of 4", "none", "", "12")


class TestPatternOfWords(RewardConformance):
    use = "pattern"
    options: ClassVar = {"pattern": r"[a-z]+,?", "per": "word"}


class TestBoardVerifier(RewardConformance):
    use = "board_verifier"
    prompts = BOARD
    thoughts = THOUGHTS


class TestBoardScorer(RewardConformance):
    use = "board_scorer"
    prompts = BOARD


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-clip")
    tiny_clip.write(folder)
    return str(folder)


class TestPickScore(RewardConformance):
    use = "pickscore"

    @pytest.fixture
    def given(self, clip_folder):
        return {"checkpoint": clip_folder, "processor": clip_folder, "device": "cpu"}


class TestPickScoreInLowPrecision(TestPickScore):
    tolerance = 2e-2

    @pytest.fixture
    def given(self, clip_folder):
        where = {"checkpoint": clip_folder, "processor": clip_folder, "device": "cpu"}
        return where | {"precision": "bf16", "batch_size": 3, "scale": 1.0}


class TestBoardPrompts(PromptSourceConformance):
    use = "board"


class TestFilePrompts(PromptSourceConformance):
    use = "file"

    @pytest.fixture
    def given(self, tmp_path):
        lines = [f'{{"prompt": "{number} apples", "number": {number}}}' for number in range(40)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        return {"path": str(tmp_path / "prompts.jsonl")}


# --- methods ----------------------------------------------------------------------------------


class TestFlowSDE(SchedulerConformance):
    use = "flow_sde"


class TestFlowSDEOnTheGridOfDiffusers(SchedulerConformance):
    use = "flow_sde"
    options: ClassVar = {"grid": "diffusers"}


class TestDanceSDE(SchedulerConformance):
    use = "dance_sde"


class TestCPS(SchedulerConformance):
    use = "cps"


class TestODE(SchedulerConformance):
    use = "ode"


class TestRandomWindow(WindowConformance):
    use = "random"


class TestFixedWindow(WindowConformance):
    use = "fixed"
    options: ClassVar = {"steps": [0, 2, 7]}


class TestSlidingWindow(WindowConformance):
    use = "sliding"


class TestSlidingWindowInsideAPart(WindowConformance):
    use = "sliding"
    options: ClassVar = {"size": 3, "begin": 1, "end": 7, "stride": 2, "every": 1}


class TestScatteredWindow(WindowConformance):
    use = "scattered"


class TestWholeWindow(WindowConformance):
    use = "all"


class TestWholeWindowWithoutTheLastStep(WindowConformance):
    use = "all"
    options: ClassVar = {"last": False}


class TestNoGuidance(GuidanceConformance):
    use = "none"


class TestCFG(GuidanceConformance):
    use = "cfg"


class TestCFGOnAnInterval(GuidanceConformance):
    use = "cfg"
    options: ClassVar = {"scale": 2.5, "interval": [0.2, 0.8]}


class TestCFGAsInBAGEL(GuidanceConformance):
    use = "cfg"
    options: ClassVar = {"interval": [0.4, 1.0], "image_scale": 1.5, "renorm": "global"}


class TestCFGAsInBAGELsEditing(GuidanceConformance):
    use = "cfg"
    options: ClassVar = {"image_scale": 2.0, "renorm": "text_channel", "renorm_min": 0.1}


class TestCFGAsInQwenImage(GuidanceConformance):
    use = "cfg"
    options: ClassVar = {"renorm": "channel_exact"}


class TestGRPO(TextObjectiveConformance):
    use = "grpo"


class TestDrGRPO(TextObjectiveConformance):
    use = "dr_grpo"
    options: ClassVar = {"max_tokens": 6}


class TestDAPO(TextObjectiveConformance):
    use = "dapo"


class TestGSPO(TextObjectiveConformance):
    use = "gspo"


class TestCISPO(TextObjectiveConformance):
    use = "cispo"
    expected_failures: ClassVar = {
        "test_gradient_is_that_of_the_values": "its weight is held constant, by definition"
    }


class TestFlowGRPO(ImageObjectiveConformance):
    use = "flow_grpo"
    options: ClassVar = {"clip_range": 1e-4}


class TestFlowGRPOWithRatioNorm(ImageObjectiveConformance):
    use = "flow_grpo"
    options: ClassVar = {"ratio_norm": True}


class TestDiffusionNFT(ImageObjectiveConformance):
    use = "diffusion_nft"


class TestDiffusionNFTSelfNormalised(ImageObjectiveConformance):
    use = "diffusion_nft"
    options: ClassVar = {"weighting": "self_normalised", "beta": 1.0, "density": "logit_normal"}


class TestAWM(ImageObjectiveConformance):
    use = "awm"


class TestAWMWithGeneralHuber(ImageObjectiveConformance):
    use = "awm"
    options: ClassVar = {"weighting": "t", "power": 0.25, "shift": 3.0}


class TestFPO(ImageObjectiveConformance):
    use = "fpo"


class TestFPOOfTheNoise(ImageObjectiveConformance):
    use = "fpo"
    options: ClassVar = {"error": "noise", "times": 4}


class TestReFL(ImageObjectiveConformance):
    use = "refl"
    expected_failures: ClassVar = {
        "test_gradient_follows_the_advantage": "it follows the score's gradient, not the advantage"
    }


class UnderCPS:
    """Points that CPS sampled."""

    def scheduler(self) -> Scheduler:
        return cps.build(cps.CPSOptions())


class TestFlowGRPOUnderCPS(UnderCPS, ImageObjectiveConformance):
    use = "flow_grpo"
    options: ClassVar = {"clip_range": 1e-4, "clip_unit": "latent^2"}


class TestFlowGRPOWithRatioNormUnderCPS(UnderCPS, ImageObjectiveConformance):
    use = "flow_grpo"
    options: ClassVar = {"ratio_norm": True}


class TestGRPOGuard(ImageObjectiveConformance):
    use = "grpo_guard"


class TestTempFlow(ImageObjectiveConformance):
    use = "tempflow"
    options: ClassVar = {"clip_range": 1e-4, "scale": 1.73}


class TestTempFlowWithRatioNorm(ImageObjectiveConformance):
    use = "tempflow"
    options: ClassVar = {"ratio_norm": True}


class TestFlowDPPO(ImageObjectiveConformance):
    use = "flow_dppo"


class TestFlowDPPOUnderCPS(UnderCPS, ImageObjectiveConformance):
    use = "flow_dppo"
    options: ClassVar = {"threshold": 1e-7}


class TestVelocityMSE(FlowRegularizerConformance):
    use = "velocity_mse"


class TestLatentKL(FlowRegularizerConformance):
    use = "latent_kl"


class TestLatentKLWithoutDt(FlowRegularizerConformance):
    use = "latent_kl"
    options: ClassVar = {"form": "without_dt"}


class TestTextKL(TokenRegularizerConformance):
    use = "text_kl"


class TestEntropy(TokenRegularizerConformance):
    use = "entropy"
    expected_failures: ClassVar = {
        "test_gradient_is_that_of_the_values": "it is the score function's, of an expectation"
    }


class TestGroupNorm(AdvantageConformance):
    use = "group_norm"


class TestGroupNormByAllRows(AdvantageConformance):
    use = "group_norm"
    options: ClassVar = {"std": "global"}


class TestGroupNormWithoutStd(AdvantageConformance):
    use = "group_norm"
    options: ClassVar = {"std": "none"}


class TestGroupNormOfPercentiles(AdvantageConformance):
    use = "group_norm"
    options: ClassVar = {"percentiles": [10, 90]}


class TestLeaveOneOut(AdvantageConformance):
    use = "leave_one_out"


class TestGDPO(AdvantageConformance):
    use = "gdpo"


# --- policies ---------------------------------------------------------------------------------


class TestBagel(TextPolicyConformance, ImageFlowPolicyConformance):
    use = "bagel"
    options: ClassVar = {"checkpoint": "pkg:unigrpo_board/checkpoint"}
    prompts = BOARD


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return str(tiny_lm.write(tmp_path_factory.mktemp("tiny-lm")))


class TestCausalLM(TextPolicyConformance):
    use = "hf_causal_lm"

    @pytest.fixture
    def given(self, language_model):
        return {"checkpoint": language_model, "system_prompt": "Count.", "open": "<think>"}


class TestCausalLMWithAdapters(TestCausalLM):
    @pytest.fixture
    def given(self, language_model):
        return {"checkpoint": language_model, "lora_rank": 2}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-painters")
    tiny_painters.write_sd3(folder / "sd3")
    tiny_painters.write_flux(folder / "flux")
    tiny_painters.write_sana(folder / "sana")
    tiny_painters.write_qwen_image(folder / "qwen_image")
    return folder


class TestSD3(ImageFlowPolicyConformance):
    use = "sd3"
    prompts = tuple(Prompt(text, text) for text in ("a red cat", "red", "two pears"))

    @pytest.fixture
    def given(self, pipelines):
        return {"checkpoint": str(pipelines / self.use), "max_text_tokens": 12}


class TestSD3WithAdapters(TestSD3):
    @pytest.fixture
    def given(self, pipelines):
        return {"checkpoint": str(pipelines / "sd3"), "max_text_tokens": 12, "lora_rank": 2}


class TestFlux(TestSD3):
    use = "flux"


class TestSana(TestSD3):
    use = "sana"

    @pytest.fixture
    def given(self, pipelines):
        where = {"checkpoint": str(pipelines / "sana"), "max_text_tokens": 12}
        return where | {"instruction": False}


class TestQwenImage(TestSD3):
    use = "qwen_image"

    @pytest.fixture
    def given(self, pipelines):
        return {"checkpoint": str(pipelines / "qwen_image"), "max_text_tokens": 16}


@pytest.fixture
def pair(language_model, pipelines):
    """The options of a thinker with a painter."""

    def pair(painter, **options):
        draws = {"use": painter, "checkpoint": str(pipelines / painter), "max_text_tokens": 12}
        return {
            "text": {"use": "hf_causal_lm", "checkpoint": language_model},
            "image": {**draws, "overlong": "cut", **options},
        }

    return pair


class TestComposed(TextPolicyConformance, ImageFlowPolicyConformance):
    use = "composed"

    @pytest.fixture
    def given(self, pair):
        return pair("sd3")


DRAWING = (
    "test_velocity_rows_are_independent",
    "test_replay_gives_the_samplers_velocities",
    "test_branches_are_unconditional",
    "test_replay_gives_the_branches_velocities",
    "test_image_gradient_reaches_the_image_expert",
    "test_context_gradient_can_be_stopped",
    "test_replay_is_repeatable",
)


@pytest.mark.parametrize(
    ("painter", "options"), [("flux", {}), ("sana", {"instruction": False, "lora_rank": 2})]
)
def test_a_pair_with_another_painter_draws_as_it_should(pair, tmp_path, painter, options):
    """The checks that the painter decides; the others are those of the pair above."""
    kit, given = TestComposed(), pair(painter, **options)
    component = kit.build(given)
    for check in DRAWING:
        getattr(kit, check)(component)
    kit.test_saved_weights_load(component, given, tmp_path)


# --- nothing is left out ----------------------------------------------------------------------


def subclasses(cls: type[Conformance]) -> Iterator[type[Conformance]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_component_of_this_distribution_is_checked() -> None:
    ours = {(c.kind, c.name) for c in load_catalog().components if c.distribution == "unigrpo"}
    here = [cls for cls in subclasses(Conformance) if cls.__module__ == __name__]
    assert {(cls.slot.kind, cls.use) for cls in here} == ours
    assert {cls.__name__ for cls in here} <= set(globals()), "pytest would not collect it"
