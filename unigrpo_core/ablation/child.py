"""``python -m unigrpo_core.ablation.child VERB ...`` is ``unigrpo VERB ...`` for as long as its
standard input stays open: it ends when the process at the other end does, however that ends."""

from __future__ import annotations

import io
import os
import runpy
import sys
import threading


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    runpy.run_module("unigrpo_core", run_name="__main__", alter_sys=True)
