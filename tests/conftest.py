"""Fixtures; torch is imported only by the tests that ask for them."""

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny BAGEL with random weights."""
    from tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def setup(tmp_path, checkpoint):
    """Builds the tiny recipe with overrides: ``setup("train=['text']")``."""
    import tiny

    return lambda *overrides: tiny.setup(tmp_path, checkpoint, *overrides)


@pytest.fixture
def train(tmp_path, checkpoint):
    """Trains the tiny recipe with overrides; returns the run folder. Each needs its own name."""
    import tiny

    return lambda name, *overrides: tiny.run(tmp_path, checkpoint, *overrides, name=name)


@pytest.fixture(scope="session")
def wheel_of(tmp_path_factory):
    """The wheel of a project's folder, or with ``kind="editable"`` its editable one; each is built
    once."""
    from environments import build

    built = {}

    def wheel_of(source, kind="wheel"):
        if (source, kind) not in built:
            built[source, kind] = build(source, tmp_path_factory.mktemp(kind), kind)
        return built[source, kind]

    return wheel_of


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Makes a fresh environment with wheels installed."""
    from environments import Environment

    def environment(*wheels):
        fresh = Environment(tmp_path_factory.mktemp("environment"))
        fresh.install(*wheels)
        return fresh

    return environment


@pytest.fixture
def in_float64():
    """Whatever asks for float32 gets float64, so that what differs is not rounding."""
    import torch
    from tiny import Float64

    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items):
    """What is marked ``gpu`` is skipped where there is none; torch is asked only if there is
    something to skip."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
