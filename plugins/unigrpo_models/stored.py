"""A file of weights in the safetensors format, tensor by tensor.

The format: 8 bytes with the length of a JSON header, the header, and the tensors' bytes, little
endian (https://github.com/huggingface/safetensors#format). The header is read here in plain Python,
so that what a file holds is known without torch and before any data is read. The data are plain
reads, not a memory map: a mapped file's pages would count as this process's memory, twice the
weights at the end of a load.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unigrpo_core.errors import UserError

_KINDS = {
    1: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("C64", "F64", "I64", "U64"),
}
BYTES = {name: size for size, names in _KINDS.items() for name in names}
"""Bytes of a number; in the order of the format's own library, which writes the last first."""
LONGEST_HEADER = 100_000_000
POINTER = b"version https://git-lfs"
CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: ``start`` counts bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Stored:
    """An open file of weights. It stays open, so that what was loaded can be written again although
    the file has been moved, replaced or removed since.

    Raises:
        UserError: the file is missing, cut off, or not in this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            raise UserError(f"{path.parent} has no {path.name}") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        try:
            self.entries: Mapping[str, Entry] = self._header()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):  # a folder, for one
                raise UserError(f"{path} cannot be read: {error}") from error
            raise

    def _header(self) -> dict[str, Entry]:
        size = os.fstat(self._file.fileno()).st_size
        first = self._file.read(len(POINTER))
        if first == POINTER:
            raise UserError(
                f"{self.path} is damaged: it is a Git-LFS pointer, not the weights; fetch them by "
                "`git lfs pull` in its repository, or by `hf download`"
            )
        length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise self._damaged(
                f"it has {size} bytes, and no whole header of the safetensors format"
            )
        self._file.seek(8)
        try:
            header = json.loads(bytes(self._read(bytearray(length))))
            header.pop("__metadata__", None)
            entries = {name: _entry(value, 8 + length) for name, value in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged("its header is not that of the safetensors format") from error
        end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
        if end != size:
            raise self._damaged(f"it has {size} bytes, where its header promises {end}")
        return entries

    def close(self) -> None:
        self._file.close()

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path} is damaged: {why}; download or copy it again")

    def _read(self, buffer: Any) -> Any:
        """Fills a buffer from where the file stands."""
        view, done = memoryview(buffer), 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise self._damaged("it has become shorter since it was opened")
            done += count
        return buffer

    def read_into(self, name: str, buffer: Any, begin: int = 0) -> None:
        """Fills a writable buffer with the tensor's bytes, from its byte ``begin`` on."""
        self._file.seek(self.entries[name].start + begin)
        self._read(buffer)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The tensor's bytes, piece by piece."""
        entry = self.entries[name]
        for done in range(0, entry.size, CHUNK):
            piece = bytearray(min(CHUNK, entry.size - done))
            self.read_into(name, piece, done)
            yield piece


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in files, by name; none of the data is read.

    Raises:
        UserError: as :class:`Stored`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored = Stored(file)
        stored.close()
        found |= {name: entry.shape for name, entry in stored.entries.items()}
    return found


def _entry(value: Mapping[str, Any], data: int) -> Entry:
    shape = tuple(int(side) for side in value["shape"])
    begin, end = value["data_offsets"]
    if end - begin != math.prod(shape) * BYTES[value["dtype"]] or begin < 0:
        raise ValueError
    return Entry(value["dtype"], shape, data + begin, end - begin)


def write_header(out: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Writes the header of a file with tensors of these types and shapes; returns their names in
    the order in which their bytes must follow. It is that of the format's library, so that a file
    is what that would write, byte for byte."""
    rank = list(BYTES)
    order = sorted(tensors, key=lambda name: (-rank.index(tensors[name][0]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        dtype, shape = tensors[name]
        end = begin + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    return order
