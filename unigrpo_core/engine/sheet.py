"""Sample sheets: prompt, thought, image and scores, as a picture a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unigrpo_core.engine.evaluate import Evaluated

INK, FAINT, PAPER, RULE = (25, 25, 30), (105, 105, 115), (255, 255, 255), (222, 222, 228)
PICTURE = 144
TEXT_WIDTH = 330
MARGIN = 14
SIZE = 15


@dataclass(frozen=True)
class Card:
    """One episode on a sheet."""

    prompt: str
    thought: str
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
        found.append(Card(batch.prompts[row].text, batch.thoughts[row], image, tuple(shown)))
    return found


def pixels(image: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of an image [3, H, W] in [0, 1]."""
    scaled = (image.float().clamp(0, 1) * 255).round().byte()
    return scaled.permute(1, 2, 0).cpu().numpy()


def write_sheet(path: Path, title: str, columns: Sequence[tuple[str, Sequence[Card]]]) -> None:
    """Writes a sheet: a row per prompt, and a column per (heading, cards), such as before, during
    and after; every column has the same prompts."""
    font, bold = ImageFont.load_default(SIZE), ImageFont.load_default(SIZE + 3)
    count = len(columns[0][1])
    width = MARGIN + len(columns) * (PICTURE + TEXT_WIDTH + 2 * MARGIN)
    row_height = PICTURE + 2 * MARGIN + SIZE + 10
    sheet = Image.new("RGB", (width, 74 + count * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 12), title, INK, bold)
    for number, (heading, shown) in enumerate(columns):
        left = MARGIN + number * (PICTURE + TEXT_WIDTH + 2 * MARGIN)
        pen.text((left, 44), heading, FAINT, font)
        for row, card in enumerate(shown):
            top = 74 + row * row_height
            if number == 0:
                pen.line((MARGIN, top - 6, width - MARGIN, top - 6), RULE)
                pen.text((left, top), card.prompt, INK, bold)
            _card(sheet, pen, card, left, top + SIZE + 12, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _card(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    card: Card,
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    if card.image is not None:
        picture = Image.fromarray(card.image)
        scale = PICTURE / max(picture.size)
        enlarged = (round(picture.width * scale), round(picture.height * scale))
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        sheet.paste(picture.resize(enlarged, method), (left, top))
    x = left + PICTURE + MARGIN
    if card.thought:
        lines = _wrap(pen, card.thought, font)
        thought = "\n".join(lines[:4]) + (" ..." if len(lines) > 4 else "")
    else:
        thought = "(no thought)"
    pen.multiline_text((x, top), f"thinks:\n{thought}", INK, font, spacing=4)
    scores = [f"{name} {value:.2f}" for name, value in card.scores]
    pen.multiline_text((x, top + 96), "\n".join(_pairs(scores)), FAINT, font, spacing=4)


def _pairs(words: Sequence[str]) -> list[str]:
    return ["   ".join(words[i : i + 2]) for i in range(0, len(words), 2)]


def _wrap(pen: ImageDraw.ImageDraw, text: str, font: object) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) > TEXT_WIDTH - MARGIN and lines[-1]:  # type: ignore[arg-type]
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
