"""Sample sheets: text stays on the picture, and every card has room."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from unigrpo_core.engine.sheet import Card, wrap, write_sheet
from unigrpo_core.errors import UserError

LONG = "five minus two mix yellow and blue triangle opposite of left of half of four orange square"
FONT = ImageFont.load_default(18)


def written(path, *prompts, columns=1):
    image = np.zeros((24, 24, 3), np.uint8)
    shown = [Card(prompt, "red circle", image, (("score", 0.5),)) for prompt in prompts]
    write_sheet(path, "title", [(f"step {i}", shown) for i in range(columns)])
    with Image.open(path) as sheet:
        return np.asarray(sheet.convert("L"))


@pytest.mark.parametrize("text", [LONG, f"{LONG} {LONG}", "x" * 300, "a " + "y" * 90 + " b"])
def test_wrapped_lines_fit_and_nothing_is_lost(text):
    lines = wrap(text, FONT, 400)
    assert len(lines) > 1
    assert all(FONT.getlength(line) <= 400 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_long_prompt_stays_on_a_sheet_of_one_column(tmp_path):
    assert FONT.getlength(LONG) > 516
    sheet = written(tmp_path / "long.png", LONG, "red circle")
    short = written(tmp_path / "short.png", "red circle", "red circle")
    assert sheet.shape[1] == short.shape[1] == 516
    assert sheet.shape[0] - short.shape[0] == (len(wrap(LONG, FONT, 488)) - 1) * 23
    assert sheet[74:100, :502].min() < 60
    assert (sheet[:, 503:] == 255).all()  # the margin is free


def test_the_prompt_uses_the_width_of_all_columns(tmp_path):
    one, three = (written(tmp_path / f"{n}.png", LONG, columns=n) for n in (1, 3))
    assert three.shape[0] < one.shape[0]


def test_long_prompts_do_not_run_into_their_cards(tmp_path):
    sheet = written(tmp_path / "a.png", f"{LONG} {LONG}", "red circle")
    rows = (sheet[:, 20:150] == 0).all(1)  # the black pictures
    edges = np.flatnonzero(np.diff(rows.astype(int)))
    assert len(edges) == 4
    assert edges[1] - edges[0] == edges[3] - edges[2] == 144


@pytest.mark.parametrize("counts", [(3, 1), (1, 3)])
def test_a_column_may_have_fewer_cards(tmp_path, counts):
    """Evaluations during a run use fewer prompts than the first and the last."""
    shown = [Card(f"red {n}", None, np.zeros((8, 8, 3), np.uint8), ()) for n in range(3)]
    columns = [(str(count), shown[:count]) for count in counts]
    write_sheet(tmp_path / "a.png", "title", columns)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (14 + 2 * 502, 74 + 3 * 197)
        pixels = np.asarray(sheet.convert("L"))
    for count, left in zip(counts, (20, 522), strict=True):
        assert (pixels[:, left : left + 130] == 0).all(1).sum() == 144 * count


def test_a_sheet_that_cannot_be_written_is_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.png cannot be written"):
        written(tmp_path / "file" / "a.png", "red circle")
