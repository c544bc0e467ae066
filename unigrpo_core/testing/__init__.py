"""The conformance kit: what a plugin's author runs to know that a component keeps the promises of
its interface.

Subclass the class of the kind, state the facts, and run pytest::

    from unigrpo_core.testing import RewardConformance

    class TestColourfulness(RewardConformance):
        use = "colourfulness"

Every promise is one test method. It needs pytest, which unigrpo itself does not require.
"""

from __future__ import annotations

from pkgutil import iter_modules

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "unigrpo_core.testing needs pytest, which is not installed: pip install pytest"
    ) from error

for module in iter_modules(__path__, f"{__name__}."):
    pytest.register_assert_rewrite(module.name)  # so that a failed check shows its values

from unigrpo_core.testing.advantages import AdvantageConformance  # noqa: E402
from unigrpo_core.testing.guidance import GuidanceConformance  # noqa: E402
from unigrpo_core.testing.image_objectives import ImageObjectiveConformance  # noqa: E402
from unigrpo_core.testing.image_policies import ImageFlowPolicyConformance  # noqa: E402
from unigrpo_core.testing.prompts import PromptSourceConformance  # noqa: E402
from unigrpo_core.testing.regularizers import (  # noqa: E402
    FlowRegularizerConformance,
    TokenRegularizerConformance,
)
from unigrpo_core.testing.rewards import RewardConformance  # noqa: E402
from unigrpo_core.testing.schedulers import SchedulerConformance  # noqa: E402
from unigrpo_core.testing.text_objectives import TextObjectiveConformance  # noqa: E402
from unigrpo_core.testing.text_policies import TextPolicyConformance  # noqa: E402
from unigrpo_core.testing.windows import WindowConformance  # noqa: E402

__all__ = [
    "AdvantageConformance",
    "FlowRegularizerConformance",
    "GuidanceConformance",
    "ImageFlowPolicyConformance",
    "ImageObjectiveConformance",
    "PromptSourceConformance",
    "RewardConformance",
    "SchedulerConformance",
    "TextObjectiveConformance",
    "TextPolicyConformance",
    "TokenRegularizerConformance",
    "WindowConformance",
]
