"""Prompts from a file of one's own.

Format
    ``.txt``: one prompt per line. ``.jsonl``: one object per line with "prompt" (text), optionally
    "id" (text, unique in the file), and whatever else: that is metadata for rewards. Blank lines
    are skipped; both are UTF-8.

Convention
    Training and held-out prompts are disjoint by text. Without a held-out file a hash of the text
    alone puts a fraction of the texts aside: the split depends neither on the seed nor on the
    other lines, save that if no text falls to that side the one of the lowest hash does. The
    training stream is a fresh permutation of all training lines per epoch, keyed by (seed, epoch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider, RecipePath
from unigrpo_core.records import Prompt

DEFAULT_FRACTION = 0.125


class FilePromptsOptions(Options):
    path: RecipePath = Field(description="the file, .txt or .jsonl, relative to the recipe")
    held_out_path: RecipePath | None = Field(
        None, description="a second such file of held-out prompts, sharing no text with the first"
    )
    held_out_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="without held_out_path: fraction of the texts held out, in [0, 1); "
        f"{DEFAULT_FRACTION} if neither is given",
    )

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        if self.held_out_path is not None and self.held_out_fraction is not None:
            raise ValueError("held_out_path and held_out_fraction exclude each other; give one")
        return self


@dataclass(frozen=True)
class Line:
    """A prompt and the line it stands on."""

    number: int
    prompt: Prompt


@dataclass(frozen=True)
class FilePrompts(PromptSource):
    """Prompts of two disjoint lists."""

    training: tuple[Prompt, ...]
    kept_aside: tuple[Prompt, ...]

    def train(self, seed: int, start: int, count: int) -> tuple[Prompt, ...]:
        prompts: list[Prompt] = []
        epoch, position = divmod(start, len(self.training))
        while len(prompts) < count:
            rows = self._order(seed, epoch)[position : position + count - len(prompts)]
            for prompt in (self.training[row] for row in rows):
                prompts.append(Prompt(f"{prompt.id}@{epoch}", prompt.text, prompt.metadata))
            epoch, position = epoch + 1, 0
        return tuple(prompts)

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        return self.kept_aside[:count]

    def _order(self, seed: int, epoch: int) -> Sequence[int]:
        generator = Key((seed, "file prompts", epoch)).generator()
        return [int(row) for row in generator.permutation(len(self.training))]


def read(path: Path) -> tuple[Line, ...]:
    """The prompts of a file.

    Raises:
        UserError: it cannot be read, has a bad line (named), or has no prompt.
    """
    if path.suffix not in {".txt", ".jsonl"}:
        raise UserError(f"{path}: a prompt file ends in .txt or .jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    parse = _json_line if path.suffix == ".jsonl" else _text_line
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, content in _numbered(text):
        prompt = parse(f"{path}:{number}", f"file-{number}", content)
        if prompt.id in seen:
            raise UserError(
                f"{path}:{number}: the id {prompt.id!r} is that of line {seen[prompt.id]} already"
            )
        seen[prompt.id] = number
        lines.append(Line(number, prompt))
    if not lines:
        raise UserError(f"{path}: no prompt in it; one stands on each line")
    return tuple(lines)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a JSON string may contain the other characters that it splits on.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if line.strip():
            yield number, line.strip()


def _text_line(place: str, name: str, content: str) -> Prompt:
    return Prompt(name, content)


def _json_line(place: str, name: str, content: str) -> Prompt:
    try:
        record: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not JSON: {error.msg} (column {error.colno}); "
            'a line is one object like {"prompt": "..."}'
        ) from error
    if not isinstance(record, dict):
        raise UserError(f'{place}: expected an object like {{"prompt": "..."}}, got {content[:60]}')
    text, name = record.pop("prompt", None), record.pop("id", name)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{place}: "prompt" must be a text that is not empty, got {text!r}')
    if not isinstance(name, str) or not name:
        raise UserError(f'{place}: "id" must be a text that is not empty, got {name!r}')
    return Prompt(name, text.strip(), record)


def split(lines: Sequence[Line], fraction: float) -> tuple[list[Line], list[Line]]:
    """Training and held-out lines; by text, so equal texts are on one side."""
    ranks = {line.prompt.text: _rank(line.prompt.text) for line in lines}
    bound = max(fraction, min(ranks.values())) if fraction else -1.0
    held = [line for line in lines if ranks[line.prompt.text] <= bound]
    return [line for line in lines if ranks[line.prompt.text] > bound], held


def _rank(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    digest = blake2b(text.encode(), digest_size=6, person=b"held out").digest()
    return int.from_bytes(digest, "big") / 2**48


def build(options: FilePromptsOptions) -> FilePrompts:
    """Reads the files.

    Raises:
        UserError: a file is at fault, or nothing is left to train on.
    """
    path = Path(options.path)
    lines: Sequence[Line] = read(path)
    held: Sequence[Line]
    if options.held_out_path is not None:
        held_path = Path(options.held_out_path)
        held = read(held_path)
        first = {line.prompt.text: line.number for line in reversed(lines)}
        for line in held:
            if line.prompt.text in first:
                raise UserError(
                    f"{held_path}:{line.number}: this held-out prompt is also a training prompt "
                    f"({path}:{first[line.prompt.text]}): {line.prompt.text[:60]!r}"
                )
    else:
        fraction = options.held_out_fraction
        lines, held = split(lines, DEFAULT_FRACTION if fraction is None else fraction)
        if not lines:
            raise UserError(
                f"{path}: all its texts were held out, none is left to train on; add prompts, "
                "lower held_out_fraction (0: none held out), or give a held_out_path"
            )
    return FilePrompts(tuple(line.prompt for line in lines), tuple(line.prompt for line in held))


def notes(options: FilePromptsOptions) -> Sequence[str]:
    paths = filter(None, (options.path, options.held_out_path))
    gone = [f"the prompts are not there yet: {path}" for path in paths if not Path(path).exists()]
    if gone:
        return gone
    try:
        build(options)
    except UserError as error:
        return [str(error)]
    return []


PROVIDER = Provider(
    name="file",
    options=FilePromptsOptions,
    build=build,
    notes=notes,
    summary="prompts of a .txt or .jsonl file, shuffled anew each epoch; some held out",
)
