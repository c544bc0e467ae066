"""Stands in for ``python -m unigrpo_core.ablation.child run``: as quick to start as a verb without
torch. The title of the recipe says how it goes; what it does is a line in the file ``events``."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from unigrpo_core.ablation.child import end_with_input
from unigrpo_core.catalog import load_catalog
from unigrpo_core.recipe import load_recipe


def main(verb, recipe, flag, folder, *sets):
    threading.Thread(target=end_with_input, daemon=True).start()
    resolved = load_recipe(recipe, load_catalog(), sets[1::2])
    name, title, folder = Path(folder).parent.name, resolved.recipe.title, Path(folder)
    event(f"start {name}")
    folder.mkdir()
    (folder / "sheets").mkdir()
    if title == "waits early":
        wait()
    data = {"values": resolved.values, "plugin_file": None}
    (folder / "run.json").write_text(json.dumps(data))
    if title == "waits":
        wait()
    if title == "fails":
        print("a line before\n\n  the judge \n is down", file=sys.stderr)
        sys.exit(3)
    if title == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    (folder / "final").mkdir()
    event(f"end {name}")
    if title != "forgets":
        figures = {"before": {"gold": 0.25}, "after": {"gold": 0.5}, "cpu_s": 30.0}
        (folder / "summary.json").write_text(json.dumps(figures))


def event(line):
    with open("events", "a") as file:
        file.write(f"{line}\n")


def wait():
    while not Path("go").exists():
        time.sleep(0.01)


main(*sys.argv[1:])
