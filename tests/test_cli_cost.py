"""What the verbs that load no model cost. That they import no torch: test_recipe_shipped.py.

A second of CPU time is worth more or less from machine to machine and from minute to minute, so the
limit is a ratio: to a process that only imports pydantic and makes one model, taken in turns with
the verb. That process took .25 CPU-seconds where the verbs took .35 to .5; importing torch takes 1.
"""

import resource
import subprocess
import sys

import pytest

LIMIT = 2.5  # times the yardstick
TURNS, MOST = 6, 20
YARDSTICK = "import pydantic\nclass Model(pydantic.BaseModel):\n    a: int\nModel(a=1)"


@pytest.mark.parametrize(
    "argv", [["--help"], ["plugins"], ["show", "no_cfg_mse"], ["check", "no_cfg_mse"]]
)
def test_cpu_time(argv):
    verbs, yardsticks = [], []
    for turn in range(MOST):
        verbs.append(_cpu_seconds(["-m", "unigrpo_core", *argv]))
        yardsticks.append(_cpu_seconds(["-c", YARDSTICK]))
        # Other work on the machine only ever adds: the least of many turns is the cost.
        if turn + 1 >= TURNS and min(verbs) <= LIMIT * min(yardsticks):
            break
    assert min(verbs) <= LIMIT * min(yardsticks)


def _cpu_seconds(arguments):
    """User and system time of Python with `arguments`, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
