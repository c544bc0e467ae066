"""The run folder: what is written, and when.

``run.json`` (recipe, hash, plugins, environment) and ``recipe.toml`` stand before the first step;
``metrics.jsonl`` and ``evaluation.jsonl`` hold only what the recipe determines, so two runs can be
compared byte for byte; times are in ``timing.jsonl``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unigrpo_core.errors import UserError
from unigrpo_core.recipe import Resolved

LIBRARIES = ("torch", "transformers", "accelerate", "diffusers", "numpy", "pluggy", "pydantic")


class RunFolder:
    """Fills one run's folder.

    Raises:
        UserError: the folder is not empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is not an empty folder; choose another with --out")

    def create(self, resolved: Resolved) -> None:
        """Makes the folder and writes what will run, before it runs.

        Raises:
            UserError: it cannot be written.
        """
        try:
            (self.path / "sheets").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        (self.path / "recipe.toml").write_text(resolved.to_toml(), encoding="utf-8")
        plugins = {
            item.distribution: item.version
            for item in sorted(resolved.components, key=lambda item: item.distribution)
        }
        self.write(
            "run.json",
            {
                "recipe": resolved.name,
                "hash": resolved.hash,
                "values": resolved.values,
                "plugins": plugins,
                "environment": _environment(),
            },
        )

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes a JSON file whole or not at all."""
        target = self.path / name
        partial = target.with_name(f".{name}.part")
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)

    def append(self, name: str, data: Mapping[str, Any]) -> None:
        """Appends one line of JSON; it is on disk when this returns."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


def next_folder(base: Path, name: str) -> Path:
    """``base/name-1``, or the next number that is free."""
    number = 1
    while (base / f"{name}-{number}").exists():
        number += 1
    return base / f"{name}-{number}"


def _environment() -> dict[str, Any]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "libraries": found,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
