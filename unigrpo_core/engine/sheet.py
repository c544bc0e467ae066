"""Sample sheets: prompt, thought, image and scores, as a picture a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unigrpo_core.engine.evaluate import Evaluated
from unigrpo_core.engine.folder import whole, writing

INK, FAINT, PAPER, RULE = (25, 25, 30), (105, 105, 115), (255, 255, 255), (222, 222, 228)
PICTURE = 144
TEXT_WIDTH = 330
MARGIN = 14
SIZE = 15
LINE = SIZE + 8  # from one line of a prompt to the next

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Card:
    """One episode on a sheet."""

    prompt: str
    thought: str | None  # None: the episode does not think
    image: np.ndarray | None  # uint8 [H, W, 3]
    scores: tuple[tuple[str, float], ...]


def cards(evaluated: Evaluated, count: int) -> list[Card]:
    """The first ``count`` episodes."""
    batch, scores = evaluated.batch, evaluated.scores
    names = [name for name in scores.details if "/" in name]
    found = []
    for row in range(min(count, len(batch))):
        shown = [(n, float(scores.values[row, i])) for i, n in enumerate(scores.names)]
        shown += [(name.partition("/")[2], float(scores.details[name][row])) for name in names]
        image = None if batch.images is None else pixels(batch.images[row])
        thought = None if batch.thoughts is None else batch.thoughts[row]
        found.append(Card(batch.prompts[row].text, thought, image, tuple(shown)))
    return found


def pixels(image: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of an image [3, H, W] in [0, 1]."""
    scaled = (image.float().clamp(0, 1) * 255).round().byte()
    return scaled.permute(1, 2, 0).cpu().numpy()


def write_sheet(path: Path, title: str, columns: Sequence[tuple[str, Sequence[Card]]]) -> None:
    """Writes a sheet: a row per prompt, and a column per (heading, cards), such as before, during
    and after; every column has the same prompts, or the first of them.

    Raises:
        UserError: the file cannot be written.
    """
    sheet = _sheet(title, columns)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        sheet.save(partial)


def _sheet(title: str, columns: Sequence[tuple[str, Sequence[Card]]]) -> Image.Image:
    font, bold = ImageFont.load_default(SIZE), ImageFont.load_default(SIZE + 3)
    width = MARGIN + len(columns) * (PICTURE + TEXT_WIDTH + 2 * MARGIN)
    longest = max((shown for _, shown in columns), key=len)
    prompts = [wrap(card.prompt, bold, width - 2 * MARGIN) for card in longest]
    heights = [PICTURE + 2 * MARGIN + 2 + len(lines) * LINE for lines in prompts]
    sheet = Image.new("RGB", (width, 74 + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 12), title, INK, bold)
    for number, (heading, _) in enumerate(columns):
        pen.text((_left(number), 44), heading, FAINT, font)
    top = 74
    for row, lines in enumerate(prompts):
        pen.line((MARGIN, top - 6, width - MARGIN, top - 6), RULE)
        for place, line in enumerate(lines):
            pen.text((MARGIN, top + place * LINE), line, INK, bold)
        for number, (_, shown) in enumerate(columns):
            if row < len(shown):
                _card(sheet, pen, shown[row], _left(number), top + 4 + len(lines) * LINE, font)
        top += heights[row]
    return sheet


def _left(column: int) -> int:
    return MARGIN + column * (PICTURE + TEXT_WIDTH + 2 * MARGIN)


def _card(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    card: Card,
    left: int,
    top: int,
    font: Font,
) -> None:
    if card.image is not None:
        picture = Image.fromarray(card.image)
        scale = PICTURE / max(picture.size)
        enlarged = (round(picture.width * scale), round(picture.height * scale))
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        sheet.paste(picture.resize(enlarged, method), (left, top))
    x = left + PICTURE + MARGIN
    if card.thought is None:
        thought = "draws without thinking"
    else:
        lines = wrap(card.thought or "(an empty thought)", font, TEXT_WIDTH - MARGIN)
        thought = "\n".join(["thinks:", *lines[:4]]) + (" ..." if len(lines) > 4 else "")
    pen.multiline_text((x, top), thought, INK, font, spacing=4)
    scores = [f"{name} {value:.2f}" for name, value in card.scores]
    pen.multiline_text((x, top + 96), "\n".join(_pairs(scores)), FAINT, font, spacing=4)


def _pairs(words: Sequence[str]) -> list[str]:
    return ["   ".join(words[i : i + 2]) for i in range(0, len(words), 2)]


def wrap(text: str, font: Font, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels; a longer word is broken."""
    lines = [""]
    for word in text.split():
        if font.getlength(longer := f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
