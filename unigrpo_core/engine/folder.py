"""The run folder: what is written, and when.

``run.json`` (recipe, hash, plugins, environment), ``recipe.toml`` and a copy of the plugin file
beside the recipe, if any, stand before the first step; ``metrics.jsonl`` and ``evaluation.jsonl``
hold only what the recipe determines, so two runs can be compared byte for byte; times are in
``timing.jsonl``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unigrpo_core.errors import UserError
from unigrpo_core.loading import PLUGIN_FILE
from unigrpo_core.recipe import Resolved

LIBRARIES = ("torch", "transformers", "accelerate", "diffusers", "numpy", "pluggy", "pydantic")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes ``path``.

    Raises:
        UserError: the system does not let it be written: a full disk, a missing right.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


class RunFolder:
    """Fills one run's folder. Whatever of it writes raises a UserError when that fails.

    Raises:
        UserError: the folder is not empty, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if not free:
            raise UserError(f"{path} is not an empty folder; choose another with --out")

    def create(self, resolved: Resolved) -> None:
        """Makes the folder and writes what will run, before it runs."""
        file = resolved.file
        with writing(self.path):
            (self.path / "sheets").mkdir(parents=True)
            (self.path / "recipe.toml").write_text(resolved.to_toml(), encoding="utf-8")
            if file is not None:
                (self.path / PLUGIN_FILE).write_bytes(file.source)
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
                "disabled": [asdict(item) for item in resolved.disabled],
                "plugin_file": file and {"file": str(file.path), "sha256": file.sha256},
                "environment": _environment(),
            },
        )

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes a JSON file whole or not at all."""
        target = self.path / name
        partial = target.with_name(f".{name}.part")
        with writing(target):
            partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, target)

    def append(self, name: str, data: Mapping[str, Any]) -> None:
        """Appends one line of JSON; it is on disk when this returns."""
        target = self.path / name
        with writing(target), target.open("a", encoding="utf-8") as file:
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
