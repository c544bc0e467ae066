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
