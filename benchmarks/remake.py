"""Makes a page of the docs again: runs its commands and puts what they print below them.

    python benchmarks/remake.py docs/explanation/ablation.md
    python benchmarks/remake.py docs/reference/methods.md --only "python benchmarks/methods.py"

Every block of the page that begins with ```sh remake is run, in order, from the current folder; the
``unigrpo`` that it finds first is the one beside this interpreter. Where the block is followed by
the line ``<!-- printed -->``, all up to ``<!-- end -->`` becomes what it prints. A command that
fails ends it, and leaves the page as it was. ``--only`` takes the blocks of exactly these commands,
and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

BLOCK = re.compile(
    r"^```sh remake\n(?P<commands>.*?)^```\n"
    r"(?:(?P<gap>\n*)<!-- printed -->\n(?P<printed>.*?)^<!-- end -->\n)?",
    re.MULTILINE | re.DOTALL,
)


def remade(page: str, only: Collection[str] = ()) -> str:
    """The page with every block run and its print renewed; with ``only`` those of these commands.

    Raises:
        subprocess.CalledProcessError: a command failed; what it said is on the standard error.
    """

    def renewed(found: re.Match[str]) -> str:
        if only and found["commands"].strip() not in only:
            return found[0]
        keeps = found["printed"] is not None
        print(f"$ {found['commands'].strip()}", file=sys.stderr, flush=True)
        done = subprocess.run(
            ["sh", "-ec", found["commands"]],
            check=True,
            stdout=subprocess.PIPE if keeps else sys.stderr,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            text=True,
        )
        block = f"```sh remake\n{found['commands']}```\n"
        if not keeps:
            return block
        return f"{block}{found['gap']}<!-- printed -->\n\n{done.stdout.strip()}\n\n<!-- end -->\n"

    return BLOCK.sub(renewed, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="a Markdown file")
    parser.add_argument(
        "--only",
        metavar="COMMAND",
        action="append",
        default=[],
        help="run the blocks of this alone",
    )
    arguments = parser.parse_args()
    page: Path = arguments.page
    before = page.read_text(encoding="utf-8")
    commands = [found["commands"].strip() for found in BLOCK.finditer(before)]
    if not commands:
        print(f"{page} has no block that begins with ```sh remake", file=sys.stderr)
        return 2
    for command in arguments.only:
        if command not in commands:
            print(f"{page} has no block of {command!r}; it has {commands}", file=sys.stderr)
            return 2
    try:
        text = remade(before, arguments.only)
    except subprocess.CalledProcessError as error:
        print(f"{page} is as it was: a command ended with {error.returncode}", file=sys.stderr)
        return 1
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
