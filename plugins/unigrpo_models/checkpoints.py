"""Where a checkpoint option points to: a folder, one that a package ships, or one on the Hugging
Face hub.

What is on the hub is looked for in the local cache first. There a repository is a folder
``models--OWNER--NAME`` with ``refs/REVISION``, a file that holds a commit, and
``snapshots/COMMIT``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import beside_the_recipe

PACKAGE = "pkg:"
HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def _locate(value: Any, info: ValidationInfo) -> Any:
    shipped = isinstance(value, str) and value.startswith(PACKAGE)
    return value if shipped else beside_the_recipe(value, info)


def _locate_or_hub(value: Any, info: ValidationInfo) -> Any:
    located = _locate(value, info)
    if not isinstance(located, str) or not located or located.startswith(PACKAGE):
        return located
    if HUB.fullmatch(value) and not Path(located).is_dir():
        return value
    return os.path.abspath(located) if HUB.fullmatch(located) else located  # no folder for an id


CheckpointPath = Annotated[str, BeforeValidator(_locate)]
"""A folder (relative ones count from the recipe file that states it), or ``pkg:PACKAGE/FOLDER``: a
folder inside an installed package, which is not imported."""

HubCheckpoint = Annotated[str, BeforeValidator(_locate_or_hub)]
"""The same, or ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` on the Hugging Face hub. A text of this
form is a folder if there is one beside the recipe, and an id of the hub otherwise."""


def checkpoint_folder(checkpoint: str) -> Path:
    """The folder meant by a ``CheckpointPath``.

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


def local_folder(checkpoint: str, needed: Sequence[str]) -> Path:
    """The folder meant by a ``HubCheckpoint``, without a download; of the hub one in the cache that
    has all files ``needed``.

    Raises:
        UserError: it is not there; the message says how to get it.
    """
    match = HUB.fullmatch(checkpoint)
    if match is None:
        return checkpoint_folder(checkpoint)
    folder = _cached(match["id"], match["revision"] or "main")
    missing = needed if folder is None else [n for n in needed if not (folder / n).exists()]
    if folder is not None and not missing:
        return folder
    what = "is not there yet" if folder is None else f"is not whole yet ({folder})"
    raise UserError(
        f"checkpoint {checkpoint!r} {what}: there is no such folder beside the recipe, and the "
        f"Hugging Face cache {_cache()} lacks {', '.join(missing)}. A run downloads it at its "
        f"start; `{_command(match)}` does it now"
    )


def fetched_folder(checkpoint: str, needed: Sequence[str], patterns: Sequence[str]) -> Path:
    """The folder meant by a ``HubCheckpoint``. Of what is on the hub, and not in the cache with all
    files ``needed``, the files that match ``patterns`` are downloaded; whoever reads them says what
    is missing then.

    Raises:
        UserError: it is not there, or cannot be downloaded; the message says what to do.
    """
    try:
        return local_folder(checkpoint, needed)
    except UserError:
        match = HUB.fullmatch(checkpoint)
        if match is None:
            raise
    _download(match, patterns)
    return local_folder(checkpoint, ())


def _download(match: re.Match[str], patterns: Sequence[str]) -> None:
    from huggingface_hub import errors, snapshot_download

    name, revision = match["id"], match["revision"]
    try:
        snapshot_download(
            name, revision=revision, cache_dir=_cache(), allow_patterns=list(patterns)
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"checkpoint {name!r} is gated: accept its terms on https://huggingface.co/{name} and "
            "log in by `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"checkpoint {name!r} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"checkpoint {name!r} is neither a folder beside the recipe nor a model on the hub "
            "that may be read; if it is private, log in by `hf auth login`"
        ) from error
    except Exception as error:  # the network's own errors are of many kinds
        raise UserError(
            f"checkpoint {name!r} could not be downloaded ({type(error).__name__}: {error}); where "
            f"there is no network, get it elsewhere by `{_command(match)} --local-dir FOLDER` and "
            "state that folder"
        ) from error


def _command(match: re.Match[str]) -> str:
    revision = f" --revision {match['revision']}" if match["revision"] else ""
    return f"hf download {match['id']}{revision}"


def _cache() -> Path:
    """Where the hub's own library keeps what it downloads, by the same variables."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{home}/huggingface")
    named = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(named)).expanduser()


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot of a revision (a branch, a tag or a commit) in the cache."""
    repository = _cache() / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if commit and folder.is_dir() else None
