"""Wheels built by this environment's own hatchling, and fresh environments to install them into."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BUILD = "import sys; from hatchling import build; getattr(build, sys.argv[1])(sys.argv[2])"


def build(source: Path, folder: Path, kind: str = "wheel") -> Path:
    """The wheel of a project, or its editable one, built into an empty folder."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment. What unigrpo requires, pip and hatchling included, is borrowed from
    this environment; unigrpo itself is not. ``work`` is the folder that commands run in."""

    def __init__(self, home: Path) -> None:
        self.home = home
        venv = [sys.executable, "-m", "venv", "--without-pip", str(home)]
        subprocess.run(venv, check=True)
        [self.packages] = home.glob("lib/*/site-packages")
        # Read first: .pth files of editables need it. A plain line adds a folder but runs none of
        # its .pth files: so this environment's own unigrpo, if editable, stays out of reach.
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = "".join(f"{folder}\n" for folder in sorted(borrowed))
        (self.packages / "0_borrowed.pth").write_text(lines)
        self.bin = home / "bin"
        pip = self.bin / "pip"
        pip.write_text(f'#!/bin/sh\nexec "{self.bin / "python"}" -m pip "$@"\n')
        pip.chmod(0o755)
        self.work = home / "work"
        self.work.mkdir()

    def install(self, *wheels: Path) -> None:
        """Installs wheels, whatever of the same name is borrowed."""
        words = ["-q", "--no-deps", "--ignore-installed", *map(str, wheels)]
        done = self("pip", "install", *words)
        assert done.returncode == 0, done.stderr

    def __call__(
        self, *argv: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment; it sees no network and no other variables."""
        variables = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # in pip's words: no isolation
            **variables,
        }
        command = shutil.which(argv[0], path=variables["PATH"])
        assert command is not None, argv[0]
        return subprocess.run(
            [command, *argv[1:]],
            cwd=cwd or self.work,
            env=variables,
            capture_output=True,
            text=True,
        )
