"""Where an option points to: a path beside the recipe, a folder that a package ships, or a model on
the Hugging Face hub. A plugin imports it from :mod:`unigrpo_core.plugin`.

What is on the hub is looked for in the local cache first, without a network and without the hub's
own library. There a repository is a folder ``models--OWNER--NAME`` with ``refs/REVISION``, a file
that holds a commit, and ``snapshots/COMMIT``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from unigrpo_core.errors import UserError

PACKAGE = "pkg:"
HUB = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?"
)


def beside_the_recipe(value: Any, info: ValidationInfo) -> Any:
    """A relative path counts from the file that states it (given as validation context); an empty
    one stays empty."""
    folders = (info.context or {}).get("folders", {})
    if isinstance(value, str) and value and info.field_name in folders:
        return str(Path(folders[info.field_name]) / Path(value).expanduser())
    return value


def _locate(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or not value or value.startswith(PACKAGE):
        return value
    located = beside_the_recipe(value, info)
    if HUB.fullmatch(value) and not Path(located).is_dir():
        return value
    return os.path.abspath(located) if HUB.fullmatch(located) else located  # no folder for an id


RecipePath = Annotated[str, BeforeValidator(beside_the_recipe)]
"""The type of an option that is a path; a relative one counts from the file that states it."""

HubPath = Annotated[str, BeforeValidator(_locate)]
"""The type of an option that is a folder or a model on the Hugging Face hub:

- ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` is a folder if there is one beside the recipe, and an
  id of the hub otherwise;
- ``pkg:PACKAGE/FOLDER`` is a folder inside an installed package, which is not imported;
- anything else is a folder; a relative one counts from the file that states it.
"""


@dataclass(frozen=True)
class Files:
    """The files of a model, by their paths in its folder.

    Args:
        needed: what every folder must have.
        either: alternatives; every folder must have all files of one of them.
        published: what every repository on the hub has beside; without one of them a download was
            cut off. A folder may lack them.
        optional: what is downloaded too if it is there.
    """

    needed: Sequence[str] = ()
    either: Sequence[Sequence[str]] = ((),)
    published: Sequence[str] = ()
    optional: Sequence[str] = ()

    def missing_in(self, folder: Path | None, published: bool = False) -> list[str]:
        """What a folder lacks, as words for a message; of no folder: all."""
        asked = [*self.needed, *(self.published if published else ())]
        gone = [name for name in asked if not _has(folder, name)]
        if not any(all(_has(folder, name) for name in names) for names in self.either):
            first, *others = (" and ".join(names) for names in self.either)
            gone.append(f"{first} (or {', or '.join(others)})" if others else first)
        return gone

    @property
    def all(self) -> list[str]:
        """What is downloaded."""
        either = (name for names in self.either for name in names)
        return list(dict.fromkeys((*self.needed, *either, *self.published, *self.optional)))


def local_folder(option: str, path: str, files: Files) -> Path:
    """The folder meant by a ``HubPath``, without a download: of the hub one in the cache that is
    whole. ``option`` is the option's name, for messages.

    Raises:
        UserError: the folder or a file is not there; the message says how to get it.
    """
    match = HUB.fullmatch(path)
    if match is None:
        return _folder(option, path, files)
    folder = _cached(match)
    missing = files.missing_in(folder, published=True)
    if folder is not None and not missing:
        return folder
    what = "is not there yet" if folder is None else f"is not whole yet ({folder})"
    lacks = f"lacks {', '.join(missing)}" if missing else "has nothing of it"
    raise UserError(
        f"{option} {path!r} {what}: there is no such folder beside the recipe, and the Hugging "
        f"Face cache {_cache()} {lacks}. A run downloads it at its start; `{_command(match)}` does "
        "it now"
    )


def fetched_folder(option: str, path: str, files: Files) -> Path:
    """The folder meant by a ``HubPath``. What is on the hub, and not whole in the cache, is
    downloaded; whoever reads the ``published`` files says what is missing then.

    Raises:
        UserError: it is not there, or cannot be downloaded; the message says what to do.
    """
    match = HUB.fullmatch(path)
    try:
        return local_folder(option, path, files)
    except UserError:
        if match is None:
            raise
    folder = _downloaded(option, match, files)
    missing = files.missing_in(folder)
    if missing:  # without a network the hub's library returns what the cache has
        raise UserError(
            f"{option} {path!r} lacks {', '.join(missing)} on the hub or, without a network, in "
            f"the cache ({folder}); look at the network and at the id, or {_elsewhere(match)}"
        )
    return folder


def _has(folder: Path | None, name: str) -> bool:
    return folder is not None and (folder / name).is_file()


def _folder(option: str, path: str, files: Files) -> Path:
    if path.startswith(PACKAGE):
        package, _, inside = path.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{option} {path!r}: no package {package!r} is installed")
        folder = Path(next(iter(spec.submodule_search_locations))) / inside
    else:
        folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{option} {path!r}: there is no folder {folder}; give a folder, or OWNER/NAME of a "
            "model on the Hugging Face hub"
        )
    missing = files.missing_in(folder)
    if missing:
        raise UserError(
            f"{option} {path!r}: the folder lacks {', '.join(missing)}; give one in the published "
            "layout, or OWNER/NAME of a model on the Hugging Face hub"
        )
    return folder


def _downloaded(option: str, match: re.Match[str], files: Files) -> Path:
    from huggingface_hub import errors, snapshot_download

    name, revision = match["id"], match["revision"]
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=_cache(), allow_patterns=files.all
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{option} {name!r} is gated: accept its terms on https://huggingface.co/{name} and "
            "log in by `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{option} {name!r} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{option} {name!r} is neither a folder beside the recipe nor a model on the hub "
            "that may be read; if it is private, log in by `hf auth login`"
        ) from error
    except Exception as error:  # the network's own errors are of many kinds
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise UserError(
            f"{option} {name!r} could not be downloaded ({type(error).__name__}: {said}); where "
            f"there is no network, {_elsewhere(match)}"
        ) from error
    return Path(folder)


def _command(match: re.Match[str]) -> str:
    revision = f" --revision {match['revision']}" if match["revision"] else ""
    return f"hf download {match['id']}{revision}"


def _elsewhere(match: re.Match[str]) -> str:
    return f"get it elsewhere by `{_command(match)} --local-dir FOLDER` and state that folder"


def _cache() -> Path:
    """Where the hub's own library keeps what it downloads, by the same variables."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{home}/huggingface")
    named = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(named)).expanduser()


def _cached(match: re.Match[str]) -> Path | None:
    """The snapshot of a revision (a branch, a tag or a commit) in the cache."""
    revision = match["revision"] or "main"
    repository = _cache() / f"models--{match['id'].replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if commit and folder.is_dir() else None
