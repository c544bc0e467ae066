"""Text that is no TOML: where ``tomllib`` stops, the line as it stands there, and what is meant by
those who write such a line."""

from __future__ import annotations

import re
import tomllib

_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_SHOWN = 60  # characters of the line
_HINTS = tuple(
    (re.compile(message), re.compile(rest, re.IGNORECASE), hint)
    for message, rest, hint in (
        ("Invalid value", r"(yes|no|on|off|true|false)\b", "the booleans are true and false"),
        ("Invalid value", r"(none|null|nil)\b", "for no value, leave the key out"),
        ("Invalid value", r"[\u2018-\u201f\u00ab\u00bb]", "the quotes should be straight: \" or '"),
        ("Invalid value", r"\s*(#|$)", "the value is missing"),
        ("Invalid value", r"[+-]?\.\d", "write a digit before the point"),
        ("Invalid value", r"[^\W\d]|[~/.]", "text stands in quotes"),
        ("Invalid value", "=", "write key = value"),
        ("Invalid statement", "", "write key = value"),
        ("Expected '='", ":", "write key = value"),
        ("Expected (newline|'=')", r"\]", "a table begins with [name] on a line of its own"),
        ("Expected '\\]+'", "", "a table begins with [name] on a line of its own"),
        ("Expected newline", r"\.", "write a digit after the point"),
        ("Expected newline", r"\d", "a number begins with no 0"),
        ("Expected newline", "", "a line states one key = value"),
        ("Illegal character '\\\\[nr]'", "", "the quote is not closed on its line"),
        ("Unclosed inline table", "", "{ ... } stands on one line"),
        ("Invalid initial character", r"$", "{ ... } stands on one line"),
        ("Invalid initial character", r"\}", "{ ... } has no comma before its end"),
        ("Unclosed array", "", "a comma or a ] is missing before this"),
        ("(Invalid hex|Unescaped)", "", r"write \ in paths as / or the text in 'single quotes'"),
        ("Cannot (overwrite|mutate|redefine)", "", "it is stated above already"),
        ("Cannot declare", "", "the table is opened above already: its keys go there"),
    )
)


def explain(error: tomllib.TOMLDecodeError, text: str) -> tuple[int, str]:
    """The 1-based line of a mistake, and a sentence about it."""
    rows = text.replace("\r\n", "\n").split("\n")
    found = _PLACE.search(str(error))
    message = str(error)[: found.start()] if found else str(error)
    if found is None or found[1] is None:
        line = text.rstrip().count("\n") + 1
        return line, f"not valid TOML: {message}; an open [, {{ or quote is not closed"
    line, column = int(found[1]), int(found[2])
    row = rows[line - 1]
    rest = row[column - 1 :]
    hints = (say for said, at, say in _HINTS if said.match(message) and at.match(rest))
    shown = row.strip() if len(row.strip()) <= _SHOWN else f"{row.strip()[:_SHOWN]} ..."
    return line, "; ".join((f"not valid TOML: {message} in `{shown}`", *list(hints)[:1]))
