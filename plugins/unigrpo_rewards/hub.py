"""Where an option of a pretrained model points to: a folder, or a repository of the hub.

Convention
    ``owner/name`` is a hub id, always; anything else is a folder, relative ones counted from the
    recipe file that states it. A folder of two parts is therefore written ``./models/pickscore``.
    What the hub's cache on this machine has is taken from there, without asking the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import beside_the_recipe

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _locate(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or is_hub_id(value):
        return value
    path = beside_the_recipe(value, info)
    return f"./{path}" if is_hub_id(path) else path


Location = Annotated[str, BeforeValidator(_locate)]
"""The type of an option that is a folder or a hub id."""


def is_hub_id(location: str) -> bool:
    return _HUB_ID.fullmatch(location) is not None


@dataclass(frozen=True)
class Files:
    """The files that make a folder usable: all of ``needed``, and all of one of ``either``;
    ``optional`` ones are downloaded too. ``needed[0]`` is in every repository of the kind."""

    needed: Sequence[str]
    either: Sequence[Sequence[str]] = ((),)
    optional: Sequence[str] = ()

    def missing_in(self, folder: Path) -> list[str]:
        """The files that are not there; of the alternatives the first's."""
        gone = [name for name in self.needed if not (folder / name).is_file()]
        if not any(all((folder / name).is_file() for name in names) for names in self.either):
            gone += [" and ".join(names) for names in self.either][:1]
        return gone

    @property
    def all(self) -> list[str]:
        return [*self.needed, *(name for names in self.either for name in names), *self.optional]


def note(option: str, location: str, files: Files) -> str | None:
    """What ``unigrpo check`` says of a model that is not there yet; asks no network."""
    if is_hub_id(location):
        if _cached(location, files) is not None:
            return None
        return f"{option}: {location} is not in the hub's cache yet; building downloads it"
    return _fault_of(Path(location), files, option)


def folder_of(option: str, location: str, files: Files) -> Path:
    """The folder with the files, downloaded if it is a hub id that the cache lacks.

    Raises:
        UserError: the folder or a file is not there, or the download fails.
    """
    if is_hub_id(location):
        return _cached(location, files) or _downloaded(option, location, files)
    folder = Path(location)
    fault = _fault_of(folder, files, option)
    if fault:
        raise UserError(f"{fault}; give a folder in the published layout, or a hub id owner/name")
    return folder


def _fault_of(folder: Path, files: Files, option: str) -> str | None:
    if not folder.is_dir():
        return f"{option}: there is no folder {folder}"
    gone = files.missing_in(folder)
    return f"{option}: the folder {folder} has no {', no '.join(gone)}" if gone else None


def _cached(hub_id: str, files: Files) -> Path | None:
    """The hub's snapshot on this machine, if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, files.needed[0])
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return None if files.missing_in(folder) else folder


def _downloaded(option: str, hub_id: str, files: Files) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=files.all))
        gone = files.missing_in(folder)
        if gone:  # without network the client returns what its cache has
            raise FileNotFoundError(f"it, or its part in the cache, has no {', no '.join(gone)}")
    except Exception as error:  # the client's own errors, its HTTP library's, the disk's
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise UserError(
            f"{option}: {hub_id} is not in the hub's cache and cannot be downloaded: "
            f"{type(error).__name__}: {said}; look at the network and at the id, or download it "
            f"elsewhere (`hf download {hub_id}`) and give the folder (./ before a relative one)"
        ) from error
    return folder
