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
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

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
    except SafetensorError as error:  # its own name for what the system did not let it write
        raise UserError(f"{path} cannot be written: {error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Around whatever writes the file or folder ``path``, which it does at the place given: it
    becomes ``path`` at the end, so that it is there whole or not at all.

    Raises:
        UserError: as :func:`writing`.
    """
    partial = path.with_name(f".part-{path.name}")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


class RunFolder:
    """Fills one run's folder. Whatever of it writes raises a UserError when that fails, and leaves
    what was written before.

    Raises:
        UserError: the folder is not empty, cannot be read, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if not free:
            raise UserError(f"{path} is not an empty folder; choose another with --out")
        check_place(path)

    def create(self, resolved: Resolved) -> None:
        """Makes the folder and writes what will run, before it runs."""
        file = resolved.file
        with writing(self.path):
            (self.path / "sheets").mkdir(parents=True)
        with whole(self.path / "recipe.toml") as partial:
            partial.write_text(resolved.to_toml(), encoding="utf-8")
        if file is not None:
            with whole(self.path / PLUGIN_FILE) as partial:
                partial.write_bytes(file.source)
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
        with whole(self.path / name) as partial:
            partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def append(self, name: str, data: Mapping[str, Any]) -> None:
        """Appends one line of JSON, whole or not at all; it is written when this returns."""
        target = self.path / name
        with writing(target):
            size = target.stat().st_size if target.exists() else 0
            try:
                with target.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(data) + "\n")
            except BaseException:
                with suppress(OSError):
                    os.truncate(target, size)
                raise


def check_place(path: Path) -> None:
    """Whether a file or folder can be written there, found out without leaving anything behind.

    Raises:
        UserError: it cannot.
    """
    places = path.absolute().parents if not path.is_dir() else (path,)
    above = next(place for place in places if place.exists())
    if not above.is_dir():
        why = f"{above} is no folder"
    elif not os.access(
        above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        why = f"no right to write in {above}"
    else:
        return
    raise UserError(f"{path} cannot be written: {why}; choose another place with --out")


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
