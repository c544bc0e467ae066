"""Where a checkpoint option points to: a folder, or one that a package ships."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import beside_the_recipe

PACKAGE = "pkg:"


def _locate(value: Any, info: ValidationInfo) -> Any:
    shipped = isinstance(value, str) and value.startswith(PACKAGE)
    return value if shipped else beside_the_recipe(value, info)


CheckpointPath = Annotated[str, BeforeValidator(_locate)]
"""A folder (relative ones count from the recipe file that states it), or ``pkg:PACKAGE/FOLDER``: a
folder inside an installed package, which is not imported."""


def checkpoint_folder(checkpoint: str) -> Path:
    """The folder meant.

    Raises:
        UserError: it is not there.
    """
    if checkpoint.startswith(PACKAGE):
        package, _, inside = checkpoint.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"checkpoint {checkpoint!r}: no package {package!r} is installed")
        folder = Path(next(iter(spec.submodule_search_locations))) / inside
    else:
        folder = Path(checkpoint)
    if not folder.is_dir():
        raise UserError(f"checkpoint {checkpoint!r}: there is no folder {folder}")
    return folder
