"""What stays light: importing a plugin, and building what ``unigrpo check`` builds. Each is asked
once, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.metadata import distribution

from unigrpo_core.catalog import GROUP

HEAVY = ("torch", "transformers", "diffusers", "accelerate")


@cache
def light_to_import(name: str) -> None:
    """Fails if the plugins of a distribution import anything heavy."""
    modules = [entry.module for entry in distribution(name).entry_points if entry.group == GROUP]
    heavy = _heavy_after("\n".join(f"import {module}" for module in modules))
    assert not heavy, f"importing {', '.join(modules)} imports {heavy}; do it inside build"


@cache
def light_to_build(kind: str, name: str, options: str) -> None:
    """Fails if building a component of JSON options imports anything heavy."""
    heavy = _heavy_after(
        "from unigrpo_core.catalog import load_catalog\n"
        f"found = load_catalog().find({kind!r}, {name!r}).provider\n"
        f"found.build(found.options.model_validate_json({options!r}))"
    )
    assert not heavy, f"building {name!r} imports {heavy}; do it inside what build returns"


def _heavy_after(code: str) -> str:
    """The heavy packages that a process has imported after running the code."""
    before = f"import sys\nsys.path[:] = {sys.path!r}\n"
    after = f"\nprint(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", before + code + after], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()
