"""BAGEL's text conventions: no chat template; every piece of text is ``[bos] ids [eos]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from unigrpo_core.errors import UserError
from unigrpo_core.records import Prompt
from unigrpo_models.bagel.layout import SPECIAL, TOKENIZER, inventory

SHOWN = 100  # words of a vocabulary in a message


@dataclass(frozen=True)
class Codec:
    """Text to ids and back, with the special tokens looked up by name."""

    tokenizer: Any
    vocab_size: int
    max_length: int
    system: tuple[int, ...]
    bos: int
    eos: int
    image_start: int
    image_end: int
    blank: bool = False  # the branch "text" is nothing at all, not even the system prompt

    @classmethod
    def read(
        cls,
        folder: Path,
        vocab_size: int,
        max_length: int,
        system_prompt: str,
        *,
        blank: bool = False,
    ) -> Codec:
        """The codec of a checkpoint folder.

        Raises:
            UserError: no tokenizer, one without the special tokens, or one with more words than
                the model has rows.
        """
        if not any((folder / name).exists() for name in TOKENIZER):
            raise UserError(f"{folder} has no tokenizer: {inventory(folder)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain ones
            raise UserError(f"{folder} has no tokenizer that loads: {error}") from error
        vocab = tokenizer.get_vocab()
        missing = [word for word in SPECIAL.values() if word not in vocab]
        if missing:
            raise UserError(
                f"the tokenizer in {folder} lacks {', '.join(missing)}, which BAGEL's has: is it "
                "another model's?"
            )
        top = max(vocab.values())
        if top >= vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has ids up to {top}, but vocab_size in its "
                f"llm_config.json is {vocab_size}: they do not belong together"
            )
        special = {name: vocab[word] for name, word in SPECIAL.items()}
        codec = cls(tokenizer, vocab_size, max_length, (), **special, blank=blank)
        if not system_prompt:
            return codec
        return replace(codec, system=tuple(codec.wrap(system_prompt)))

    def wrap(self, text: str) -> list[int]:
        """``[bos] ids [eos]``.

        Raises:
            UserError: the text has words that the tokenizer does not know, or a control token.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if control := [word for word in SPECIAL.values() if word in text]:
            raise UserError(
                f"{', '.join(control)} in a text would steer the model; take it out: {text[:80]!r}"
            )
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and self.tokenizer.unk_token not in text:
            words = [w for w in text.split() if self.tokenizer.convert_tokens_to_ids(w) == unknown]
            known = sorted(w for w in self.tokenizer.get_vocab() if not w.startswith("<"))
            more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            raise UserError(
                f"the model does not know {', '.join(map(repr, words)) or repr(text)}; "
                f"its words are: {' '.join(known[:SHOWN])}{more}"
            )
        return [self.bos, *ids, self.eos]

    @property
    def unconditional(self) -> tuple[int, ...]:
        """What the branch "text" says to a prompt alone."""
        return () if self.blank else self.system

    def context(self, prompt: Prompt) -> list[int]:
        """System prompt and prompt.

        Raises:
            UserError: unknown words, or longer than the model's context.
        """
        ids = [*self.system, *self.wrap(prompt.text)]
        if len(ids) >= self.max_length:
            raise UserError(
                f"prompt {prompt.id!r} takes {len(ids)} tokens, but the model's context ends at "
                f"{self.max_length}: {prompt.text[:80]!r}"
            )
        return ids

    def thoughts(
        self, tokens: Sequence[Sequence[int]], mask: Sequence[Sequence[bool]]
    ) -> list[list[int]]:
        """Sampled thoughts as they stand in the text: begun, and closed if they were cut off; empty
        where there is no room for one."""
        closed = []
        for row, kept in zip(tokens, mask, strict=True):
            ids = [token for token, sampled in zip(row, kept, strict=True) if sampled]
            if kept:
                ids = [self.bos, *ids]
                ids += [] if ids[-1] == self.eos else [self.eos]
            closed.append(ids)
        return closed

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([i for i in ids if i != self.eos])).strip()

    def allowed(self, device: torch.device) -> Tensor:
        """bool [V]: what may be sampled: every ordinary token, and the end of the text."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[: len(self.tokenizer)] = True
        added = self.tokenizer.added_tokens_decoder.items()
        special = [number for number, token in added if token.special]
        special += [*self.tokenizer.all_special_ids, self.bos, self.image_start, self.image_end]
        mask[special] = False
        mask[self.eos] = True
        return mask.to(device)


COMMON = 128


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """int64 [B, L], padded on the right.

    Under autocast L is the next multiple of 128 above the longest row: how a row is rounded depends
    on its width and on whether anything is masked, and in a coarse type sampler and trainer agree
    only where they share both.
    """
    width = max((len(row) for row in rows), default=0)
    if torch.is_autocast_enabled(device.type):
        width += COMMON - width % COMMON
    padded = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)


def empty_slots(lengths: Sequence[int], width: int) -> Tensor:
    """bool [B, width] on the CPU: the slots from each length on, which hold nothing."""
    return torch.arange(width)[None] >= torch.tensor(lengths)[:, None]


def padding_mask(hidden: Tensor, extra: int, device: torch.device) -> Tensor | None:
    """Additive float32 [B, 1, 1, L + extra] that hides slots (bool [B, L], on the CPU) and none of
    the ``extra`` ones after them; None if nothing is hidden."""
    if not bool(hidden.any()):
        return None
    rows, width = hidden.shape
    mask = torch.zeros(rows, 1, 1, width + extra)
    mask[:, 0, 0, :width].masked_fill_(hidden, float("-inf"))
    return mask.to(device)
