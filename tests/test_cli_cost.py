"""What the verbs that load no model cost. That they import no torch: test_recipe_shipped.py.

A second of CPU time is worth more or less from machine to machine and from minute to minute, so the
limit is a ratio: to a process that only imports pydantic and makes one model, taken in turns with
the verb. That process took .25 CPU-seconds where the verbs took .35 to .5; importing torch takes 1.
"""

import resource
import subprocess
import sys

import pytest

LIMIT = 3  # times the yardstick
TURNS = 6
YARDSTICK = "import pydantic\nclass Model(pydantic.BaseModel):\n    a: int\nModel(a=1)"


@pytest.mark.parametrize(
    "argv", [["--help"], ["plugins"], ["show", "no_cfg_mse"], ["check", "no_cfg_mse"]]
)
def test_cpu_time(argv):
    turns = [
        (_cpu_seconds(["-m", "unigrpo_core", *argv]), _cpu_seconds(["-c", YARDSTICK]))
        for _ in range(TURNS)
    ]
    verb, yardstick = (min(side) for side in zip(*turns, strict=True))
    assert verb <= LIMIT * yardstick


def _cpu_seconds(arguments):
    """User and system time of Python with `arguments`, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
