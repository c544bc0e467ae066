"""The package as a plugin: complete providers, described options, and no torch until used."""

from __future__ import annotations

import subprocess
import sys

import pytest
from unigrpo_methods import hooks

from unigrpo_core.plugin import KINDS, Provider

EXPECTED = {
    "unigrpo_text_objectives": {"grpo", "dr_grpo", "dapo", "gspo", "cispo"},
    "unigrpo_image_objectives": {
        "flow_grpo",
        "grpo_guard",
        "tempflow",
        "flow_dppo",
        "diffusion_nft",
        "awm",
        "fpo",
        "refl",
    },
    "unigrpo_schedulers": {"flow_sde", "dance_sde", "cps", "ode"},
    "unigrpo_windows": {"fixed", "random", "sliding", "scattered", "all"},
    "unigrpo_guidance": {"none", "cfg"},
    "unigrpo_regularizers": {"velocity_mse", "latent_kl", "text_kl", "entropy"},
    "unigrpo_advantages": {"group_norm", "leave_one_out", "gdpo"},
}
PROVIDERS = [provider for hook in EXPECTED for provider in getattr(hooks, hook)()]


def test_every_hook_yields_its_methods() -> None:
    assert set(EXPECTED) <= set(KINDS.values())
    found = {hook: {provider.name for provider in getattr(hooks, hook)()} for hook in EXPECTED}
    assert found == EXPECTED


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_providers_are_complete(provider: Provider) -> None:
    assert provider.summary
    assert provider.cite
    assert all(field.description for field in provider.options.model_fields.values())


LISTING = """
import sys
from unigrpo_core.plugin import KINDS
from unigrpo_methods import hooks

valid = {
    "flow_grpo": {"clip_range": 1e-6},
    "tempflow": {"clip_range": 1e-6},
    "fixed": {"steps": (0, 1)},
    "dr_grpo": {"max_tokens": 8},
}
built = {}
for hook in KINDS.values():
    for provider in getattr(hooks, hook, lambda: ())():
        built[provider.name] = provider.build(provider.options(**valid.get(provider.name, {})))
assert len(built) == 31, sorted(built)
assert built["flow_sde"].stochastic and not built["ode"].stochastic
assert built["random"].count(8) == 3 and built["fixed"].count(8) == 2
assert built["cfg"].branches == ("text",) and built["none"].branches == ()
assert built["flow_grpo"].needs == frozenset()
heavy = {"torch", "transformers", "diffusers", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_listing_and_building_import_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
