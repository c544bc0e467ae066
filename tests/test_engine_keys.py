"""Keyed draws: pure functions of their path."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from unigrpo_core.keys import Key, normals, uniforms

KEY = Key((3, "train", 7, "prompt"))


def test_a_draw_is_the_same_every_time_and_leaves_no_trace():
    first = KEY.normal((4, 5))
    KEY.uniform(100)
    np.random.default_rng(0).random(3)
    torch.manual_seed(0)
    assert np.array_equal(KEY.normal((4, 5)), first)
    assert first.dtype == np.float32
    assert KEY.uniform(3).dtype == np.float64


def test_a_shorter_draw_is_a_prefix_of_a_longer_one():
    long = KEY.uniform(1000)
    for count in (0, 1, 7, 999):
        assert np.array_equal(KEY.uniform(count), long[:count])
    assert ((long >= 0) & (long < 1)).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab",)),
        (("a", "b"), ("a/b",)),
        ((1, 23), (12, 3)),
        ((1,), ("1",)),
        (("a",), ("a", 0)),
        (("', '",), ("", "")),
        ((0, "train"), (1, "train")),
        (("x", 1, 2), ("x", 2, 1)),
    ],
)
def test_distinct_paths_draw_distinct_numbers(one, other):
    assert not np.array_equal(Key(one).uniform(4), Key(other).uniform(4))


def test_children_are_places_below():
    assert KEY.child("noise", 2) == KEY.child("noise").child(2) == Key((*KEY.path, "noise", 2))
    assert not np.array_equal(KEY.child("noise").uniform(2), KEY.child("token").uniform(2))


def test_many_paths_do_not_collide():
    seen = {Key((seed, "train", step, i)).uniform(1)[0] for seed in range(5)
            for step in range(20) for i in range(50)}  # fmt: skip
    assert len(seen) == 5000


def test_rows_do_not_depend_on_the_batch():
    keys = [KEY.child(i) for i in range(5)]
    together = normals(keys, (2, 3), "cpu")
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([normals([key], (2, 3), "cpu") for key in keys]))
    assert torch.equal(normals(keys[::-1], (2, 3), "cpu"), together.flip(0))
    flat = uniforms(keys, 4, "cpu")
    assert flat.dtype == torch.float64
    assert torch.equal(flat[:, :2], uniforms(keys, 2, "cpu"))
    assert normals([], (2,), "cpu").shape == (0, 2)
    assert uniforms([], 2, "cpu").shape == (0, 2)


def test_normals_are_normal():
    drawn = KEY.normal((200_000,)).astype(np.float64)
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.1


def test_integers_cover_their_range():
    seen = [KEY.child(i).integer(3) for i in range(300)]
    assert set(seen) == {0, 1, 2}
    assert min(seen.count(n) for n in range(3)) > 60
    assert KEY.integer(1) == 0


def test_draws_are_the_same_in_another_process():
    """Not salted by the interpreter, as Python's own hash is."""
    driver = (
        "import json; from unigrpo_core.keys import Key; "
        "print(json.dumps(Key((3, 'train', 7, 'prompt')).uniform(5).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == KEY.uniform(5).tolist()


def test_the_stream_is_pinned():
    """Published seeds must go on meaning what they meant."""
    pinned = [0.703431928503911, 0.169018351361526]
    assert Key((0, "train", 1, "p", "noise")).uniform(2).tolist() == pinned
