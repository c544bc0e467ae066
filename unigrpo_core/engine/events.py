"""TensorBoard's copy of the metrics, written through accelerate."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from unigrpo_core.engine.folder import writing


class Log(Protocol):
    """Writes values at a step."""

    def __call__(self, values: Mapping[str, float], step: int) -> None: ...


@contextmanager
def events(accelerator: Accelerator, folder: Path) -> Iterator[Log]:
    """Opens the event file below ``folder``, and closes it whatever happens.

    Raises:
        UserError: the system does not let it be written, there or in :class:`Log`.
    """
    path = folder / "tensorboard"

    def log(values: Mapping[str, float], step: int) -> None:
        with writing(path):
            accelerator.log(dict(values), step=step)

    with _told_once():
        with writing(path):
            accelerator.init_trackers("tensorboard")
        try:
            yield log
        except BaseException:
            with suppress(OSError):  # what went wrong first is what is told
                accelerator.end_training()
            raise
        with writing(path):
            accelerator.end_training()


@contextmanager
def _told_once() -> Iterator[None]:
    """TensorBoard writes in a thread. What the system refuses there is raised again to whoever logs
    next, so the thread itself need not print it."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        name = "" if arguments.thread is None else type(arguments.thread).__module__
        if not (issubclass(arguments.exc_type, OSError) and name.startswith("tensorboard")):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
