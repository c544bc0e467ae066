"""Prompts from files: the formats, the split, the stream, and what is wrong with a line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from unigrpo_rewards import file_prompts

from unigrpo_core.errors import UserError


def write(folder: Path, name: str, *lines: str) -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def source(path: str, **options: object) -> file_prompts.FilePrompts:
    return file_prompts.build(
        file_prompts.FilePromptsOptions.model_validate({"path": path, **options})
    )


def test_text_lines_are_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "a cat", "", "  two dogs  ", "   ", "\u4e00\u53ea\u732b")
    prompts = source(path, held_out_fraction=0.0).train(0, 0, 3)
    assert {(prompt.id, prompt.text) for prompt in prompts} == {
        ("file-1@0", "a cat"),
        ("file-3@0", "two dogs"),
        ("file-5@0", "\u4e00\u53ea\u732b"),
    }


def test_json_lines_carry_ids_and_metadata(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        '{"prompt": "a cat", "id": "cat", "count": 1, "tags": ["x"]}',
        "",
        '{"prompt": "two\u2028dogs"}',
    )
    prompts = {prompt.id: prompt for prompt in source(path, held_out_fraction=0.0).train(1, 0, 2)}
    assert prompts["cat@0"].metadata == {"count": 1, "tags": ["x"]}
    assert prompts["file-3@0"].text == "two\u2028dogs"
    assert prompts["file-3@0"].metadata == {}


def test_the_stream_is_endless_seeded_and_resumable(tmp_path: Path) -> None:
    prompts = source(write(tmp_path, "a.txt", *(f"prompt {row}" for row in range(40))))
    size = len(prompts.training)
    stream = prompts.train(3, 0, 3 * size)
    assert len({prompt.id for prompt in stream}) == 3 * size
    epochs = [[prompt.text for prompt in stream[at : at + size]] for at in (0, size, 2 * size)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    pieces = [prompts.train(3, start, 7) for start in range(0, 3 * size - 7, 7)]
    assert [prompt for piece in pieces for prompt in piece] == list(stream[: 7 * len(pieces)])
    assert prompts.train(3, size + 5, 2 * size - 5) == stream[size + 5 :]
    assert prompts.train(4, 0, size) != stream[:size]
    assert prompts.train(3, 5, 0) == ()


def test_the_split_is_by_text_and_about_an_eighth(tmp_path: Path) -> None:
    texts = [f"prompt number {row}" for row in range(2000)]
    prompts = source(write(tmp_path, "a.txt", *texts, *texts[:500]))
    held = {prompt.text for prompt in prompts.held_out(10_000)}
    train = {prompt.text for prompt in prompts.training}
    assert not held & train
    assert held | train == set(texts)
    assert 200 < len(held) < 300
    assert prompts.held_out(5) == prompts.held_out(10_000)[:5]
    count = Counter(prompt.text for prompt in prompts.training)
    assert sum(count.values()) + len(prompts.held_out(10_000)) == 2500
    shuffled = source(write(tmp_path, "b.txt", *reversed(texts)))
    assert {prompt.text for prompt in shuffled.held_out(10_000)} == held


def test_a_small_file_holds_out_one_text_unless_told_not_to(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one", "two", "two", "three")
    prompts = source(path, held_out_fraction=1e-9)
    assert len({prompt.text for prompt in prompts.held_out(9)}) == 1
    assert len({prompt.text for prompt in prompts.training}) == 2
    assert source(path, held_out_fraction=0.0).held_out(9) == ()
    with pytest.raises(UserError, match="none is left to train on"):
        source(write(tmp_path, "b.txt", "only", "only"))


def test_an_explicit_held_out_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one", "two")
    held = write(tmp_path, "held.jsonl", '{"prompt": "three"}', '{"prompt": "four", "id": "x"}')
    prompts = source(path, held_out_path=held)
    assert len(prompts.training) == 2
    assert [(p.id, p.text) for p in prompts.held_out(9)] == [("file-1", "three"), ("x", "four")]


def test_an_overlapping_held_out_file_is_an_error_naming_the_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "zero", "two", "one", "two")
    held = write(tmp_path, "held.txt", "three", "", "two", "one")
    with pytest.raises(UserError, match=r"held\.txt:3: .*a\.txt:2\): 'two'"):
        source(path, held_out_path=held)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', r"a\.jsonl:2: not JSON"),
        ('"a cat"', r"a\.jsonl:2: expected an object"),
        ('{"text": "a cat"}', r'a\.jsonl:2: "prompt" must be'),
        ('{"prompt": "  "}', r'a\.jsonl:2: "prompt" must be'),
        ('{"prompt": 3}', r'a\.jsonl:2: "prompt" must be'),
        ('{"prompt": "a cat", "id": 3}', r'a\.jsonl:2: "id" must be'),
        ('{"prompt": "a cat", "id": "x"}', r"a\.jsonl:2: the id 'x' is that of line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, "a.jsonl", '{"prompt": "first", "id": "x"}', line)
    with pytest.raises(UserError, match=message):
        source(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty\.txt: no prompt"):
        source(write(tmp_path, "empty.txt", "", "  "))
    with pytest.raises(UserError, match=r"missing\.txt: cannot be read"):
        source(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match=r"\.txt or \.jsonl"):
        source(write(tmp_path, "a.csv", "one"))
    (tmp_path / "latin.txt").write_bytes(b"tea\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt:2: not UTF-8 text"):
        source(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "path"),
        ({"path": "a.txt", "held_out_fraction": 1.0}, "held_out_fraction"),
        ({"path": "a.txt", "held_out_fraction": -0.1}, "held_out_fraction"),
        ({"path": "a.txt", "held_out_path": "b.txt", "held_out_fraction": 0.1}, "exclude each"),
        ({"path": "a.txt", "shuffle": False}, "shuffle"),
    ],
)
def test_wrong_options(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        file_prompts.FilePromptsOptions.model_validate(given)


def test_carriage_returns_end_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\rfour\n")
    lines = file_prompts.read(tmp_path / "a.txt")
    assert [(line.number, line.prompt.text) for line in lines] == [
        (1, "one"),
        (2, "two"),
        (4, "four"),
    ]


def test_check_says_which_file_is_missing(tmp_path: Path) -> None:
    there = write(tmp_path, "a.txt", "one", "two")

    def notes(**given: str) -> list[str]:
        options = file_prompts.FilePromptsOptions.model_validate(given)
        assert file_prompts.PROVIDER.notes is not None
        return list(file_prompts.PROVIDER.notes(options))

    gone = str(tmp_path / "gone.txt")
    assert notes(path=there) == []
    assert notes(path=gone) == [f"the prompts are not there yet: {gone}"]
    assert notes(path=there, held_out_path=gone) == [f"the prompts are not there yet: {gone}"]


def test_a_relative_path_counts_from_the_recipe() -> None:
    options = file_prompts.FilePromptsOptions.model_validate(
        {"path": "p.txt", "held_out_path": "h.txt"},
        context={"folders": {"path": "/recipes", "held_out_path": "/other"}},
    )
    assert (options.path, options.held_out_path) == ("/recipes/p.txt", "/other/h.txt")
