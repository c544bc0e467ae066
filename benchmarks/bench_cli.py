"""What starting the command costs. Run with ``make bench``."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("argv", [["--help"], ["plugins"], ["check", "no_cfg_mse"]], ids=" ".join)
def bench_start(benchmark, argv):
    command = [sys.executable, "-m", "unigrpo_core", *argv]
    benchmark(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
