"""From prompts to the ids that a model reads, and from sampled ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from unigrpo_core.errors import UserError
from unigrpo_core.loading import said
from unigrpo_core.records import Prompt
from unigrpo_models.causal.files import check_chat, check_tokenizer

Ids = tuple[int, ...]
CACHED = 4096  # prompts whose ids are remembered


@dataclass(frozen=True)
class Style:
    """How a prompt is put to the model; see the options of the same names."""

    system_prompt: str = ""
    chat: bool = True
    open: str = ""
    close: str = ""
    enable_thinking: bool | None = None


class Codec:
    """Text to ids and back.

    Args:
        width: V, the rows of the model's head.
        max_length: the longest context in tokens; None: without a bound.
        ends: the ids that end a text, beside that of ``style.close``.

    Raises:
        UserError: no tokenizer, one of another model, one without what the style asks for, or no
            end.
    """

    def __init__(
        self, folder: Path, style: Style, width: int, max_length: int | None, ends: Sequence[int]
    ) -> None:
        self.folder, self.style, self.width, self.max_length = folder, style, width, max_length
        self.tokenizer = _tokenizer(folder)
        top = max(self.tokenizer.get_vocab().values())
        if top >= width:
            raise UserError(
                f"the tokenizer in {folder} has ids up to {top}, but the model's head has {width} "
                "rows: they do not belong together"
            )
        known = self.tokenizer.eos_token_id
        own = tuple(ends) or (() if known is None else (known,))
        self.ends: Ids = tuple(dict.fromkeys((*own, *self._close())))
        if not self.ends or not all(0 <= end < width for end in self.ends):
            raise UserError(
                f"{folder} names no token that ends a text (eos_token_id in generation_config.json "
                f"or config.json; got {list(self.ends)}), so none would end before its limit: set "
                "it there, or policy.close"
            )
        if style.chat:
            self._check_chat()
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {number: str(token) for number, token in added if token.special}
        self._encoded = lru_cache(CACHED)(self._encode)

    def _close(self) -> Ids:
        if not self.style.close:
            return ()
        ids = self.tokenizer.encode(self.style.close, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(
                f"policy.close is {self.style.close!r}, which is {len(ids)} tokens of the "
                f"tokenizer in {self.folder}; it must be one, such as '</think>' of a model that "
                "has this token"
            )
        return tuple(ids)

    def _check_chat(self) -> None:
        check_chat(self.folder)
        template = self.tokenizer.chat_template
        if self.style.enable_thinking is not None and "enable_thinking" not in str(template):
            raise UserError(
                f"policy.enable_thinking is stated, but the chat template in {self.folder} knows "
                "no such word; leave it out"
            )
        try:
            self._chat("a prompt")
        except Exception as error:  # a template raises what it likes
            raise UserError(
                f"the chat template in {self.folder} refuses a user's turn"
                f"{' after policy.system_prompt' if self.style.system_prompt else ''}: "
                f"{said(error)}; change the template, policy.system_prompt, or set policy.chat = "
                "false"
            ) from error

    def _chat(self, text: str) -> str:
        style = self.style
        system = [{"role": "system", "content": style.system_prompt}] if style.system_prompt else []
        thinking = (
            {} if style.enable_thinking is None else {"enable_thinking": style.enable_thinking}
        )
        return str(
            self.tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                **thinking,
            )
        )

    def _encode(self, text: str) -> Ids:
        if self.style.chat:  # the template writes the special tokens itself
            said = self._chat(text) + self.style.open
            return tuple(self.tokenizer.encode(said, add_special_tokens=False))
        said = self.style.system_prompt + text + self.style.open
        return tuple(self.tokenizer.encode(said))

    def context(self, prompt: Prompt) -> Ids:
        """What the model reads before it writes.

        Raises:
            UserError: nothing, more than it takes, or a prompt with a control token in it.
        """
        if control := [word for word in self._special.values() if word in prompt.text]:
            raise UserError(
                f"prompt {prompt.id!r} has {', '.join(control)} in it, which would steer the "
                f"model; take it out: {prompt.text[:80]!r}"
            )
        ids = self._encoded(prompt.text)
        if not ids:
            raise UserError(f"prompt {prompt.id!r} has no token: {prompt.text[:80]!r}")
        if self.max_length is not None and len(ids) >= self.max_length:
            raise UserError(
                f"prompt {prompt.id!r} takes {len(ids)} tokens, but the model's context ends at "
                f"{self.max_length}: {prompt.text[:80]!r}"
            )
        return ids

    def check_room(self, tokens: int, thought: int) -> None:
        """Whether there is room for so many tokens after a context of so many.

        Raises:
            UserError: there is not.
        """
        if self.max_length is not None and tokens + thought > self.max_length:
            raise UserError(
                f"a context of {tokens} tokens and a thought of {thought} take "
                f"{tokens + thought}; the model's context ends at {self.max_length}: lower "
                "text.max_tokens"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a thought, without its end."""
        said = [i for i in ids if i not in self.ends]
        return str(self.tokenizer.decode(said, clean_up_tokenization_spaces=False))

    def allowed(self, device: torch.device) -> Tensor:
        """bool [V]: what may be sampled: every ordinary token, and what ends a text."""
        mask = torch.zeros(self.width, dtype=torch.bool)
        mask[list(self.tokenizer.get_vocab().values())] = True
        mask[[*self._special, *self.tokenizer.all_special_ids]] = False
        mask[list(self.ends)] = True
        return mask.to(device)


def _tokenizer(folder: Path) -> Any:
    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain ones
        raise UserError(f"{folder} has no tokenizer that loads: {said(error)}") from error


def pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> Tensor:
    """int64 [B, L], padded with 0."""
    width = max(len(row) for row in rows)
    gaps = [[0] * (width - len(row)) for row in rows]
    padded = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(padded, dtype=torch.int64, device=device)
