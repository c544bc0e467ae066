"""The package as a plugin: complete providers, described options, and no torch until used."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from unigrpo_methods import hooks

from unigrpo_core.plugin import KINDS, Provider

FOLDER = Path(hooks.__file__).parent
PROVIDERS = [provider for hook in KINDS.values() for provider in getattr(hooks, hook, lambda: ())()]


def test_every_method_is_yielded_once() -> None:
    """A file that ends in a PROVIDER has a line in hooks.py."""
    names = (f"unigrpo_methods.{path.parent.name}.{path.stem}" for path in FOLDER.glob("*/*.py"))
    stated = [
        vars(module)["PROVIDER"]
        for module in map(import_module, names)
        if "PROVIDER" in vars(module)
    ]
    assert Counter(map(id, PROVIDERS)) == Counter(map(id, stated)), (
        f"yielded {sorted(p.name for p in PROVIDERS)}, in files {sorted(p.name for p in stated)}"
    )


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_providers_are_complete(provider: Provider) -> None:
    assert provider.summary
    assert provider.cite
    assert all(field.description for field in provider.options.model_fields.values())


LISTING = """
import sys
from pydantic import ValidationError
from unigrpo_core.plugin import KINDS
from unigrpo_methods import hooks

required = {
    "flow_grpo": {"clip_range": 1e-6},
    "tempflow": {"clip_range": 1e-6},
    "fixed": {"steps": (0, 1)},
    "dr_grpo": {"max_tokens": 8},
}
built = {}
for hook in KINDS.values():
    for provider in getattr(hooks, hook, lambda: ())():
        try:
            options = provider.options(**required.get(provider.name, {}))
        except ValidationError:  # it has no default
            continue
        built[provider.name] = provider.build(options)
assert required.keys() <= built.keys()
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
