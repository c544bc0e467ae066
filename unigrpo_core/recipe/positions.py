"""The line of every key of a TOML text, which ``tomllib`` does not tell.

The text must be one that ``tomllib`` accepts: nothing is checked here, and values are skipped,
not read.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN = re.compile(r"[^,\]}#\n]+")  # a number, boolean or date
_STRINGS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r'"""(?:[^\\]|\\.)*?"{3,5}(?!")',
        r"'''.*?'{3,5}(?!')",
        r'"(?:[^"\\]|\\.)*"',
        r"'[^']*'",
    )
)


def positions(text: str) -> dict[KeyPath, int]:
    """The 1-based line where each key is stated; elements of arrays have number keys.

    A table that several headers or dotted keys make up has the line of its own header if it has
    one, else of the first of them.
    """
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.sizes: dict[KeyPath, int] = {}  # of the arrays of tables so far

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.skip_blank():
            if self.take("[["):
                table = self.header(array=True)
            elif self.take("["):
                table = self.header(array=False)
            else:
                self.pair(table)
        return self.lines

    def header(self, array: bool) -> KeyPath:
        line = self.line()
        *parents, last = self.key()
        path: KeyPath = ()
        for part in parents:
            path = self.entered((*path, part))
            self.lines.setdefault(path, line)
        path = (*path, last)
        if array:
            self.lines.setdefault(path, line)
            self.sizes[path] = self.sizes.get(path, 0) + 1
            path = self.entered(path)
        self.lines[path] = line
        self.take("]]" if array else "]")
        return path

    def entered(self, path: KeyPath) -> KeyPath:
        """The table that a header means by that path: of an array, the last one."""
        return (*path, self.sizes[path] - 1) if path in self.sizes else path

    def pair(self, table: KeyPath) -> None:
        line = self.line()
        path = table
        for part in self.key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self.take("=")
        self.value(path)

    def value(self, path: KeyPath) -> None:
        self.skip_blank()
        if self.take("["):
            count = 0
            while not self.take("]"):
                self.lines[(*path, count)] = self.line()
                self.value((*path, count))
                count += 1
                self.take(",")
        elif self.take("{"):
            while not self.take("}"):
                self.pair(path)
                self.take(",")
        elif self.string() is None:
            self.match(_PLAIN)

    def key(self) -> list[str]:
        parts = [self.key_part()]
        while self.take("."):
            parts.append(self.key_part())
        return parts

    def key_part(self) -> str:
        self.skip_blank()
        quoted = self.string()
        if quoted is None:
            return self.match(_BARE) or ""
        part: str = tomllib.loads(f"key = {quoted}")["key"]
        return part

    def string(self) -> str | None:
        for pattern in _STRINGS:
            found = self.match(pattern)
            if found is not None:
                return found
        return None

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def take(self, token: str) -> bool:
        """Steps over the token if, after blanks, it comes next."""
        self.skip_blank()
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def skip_blank(self) -> bool:
        """Steps over blanks, line ends and comments; False at the end of the text."""
        self.match(_BLANK)
        return self.at < len(self.text)

    def line(self) -> int:
        self.skip_blank()
        return self.text.count("\n", 0, self.at) + 1
