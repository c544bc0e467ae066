"""The text that an image model is conditioned on, made from a prompt and a thought."""

from __future__ import annotations

import re

PROMPT, THOUGHT = "{prompt}", "{thought}"
_FIELD = re.compile(f"{re.escape(PROMPT)}|{re.escape(THOUGHT)}")


def conditioning_text(template: str, prompt: str, thought: str = "") -> str:
    """``template`` with every ``{prompt}`` and ``{thought}`` replaced, once and as they stand: what
    a prompt or a thought says is not read as a template, and other braces mean themselves."""
    words = {PROMPT: prompt, THOUGHT: thought}
    return _FIELD.sub(lambda field: words[field[0]], template)
