"""What every prompt source keeps: see ``PromptSource`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from unigrpo_core.interfaces import PromptSource
from unigrpo_core.recipe.slots import PromptsSlot
from unigrpo_core.records import Prompt
from unigrpo_core.testing.base import Conformance
from unigrpo_core.testing.watch import no_global_draws


class PromptSourceConformance(Conformance):
    """Checks of a prompt source.

    Facts:
        count: how many training prompts, and how many held-out ones, the checks look at.
    """

    slot = PromptsSlot
    count: ClassVar[int] = 64

    def test_prompts_are_texts_with_an_id(self, component: PromptSource) -> None:
        """As many training prompts as asked for, each with an id, a text and JSON-like
        metadata."""
        trained = component.train(0, 0, self.count)
        assert len(trained) == self.count, f"{len(trained)} prompts, asked for {self.count}"
        assert component.train(0, 0, 0) == (), "asked for 0 prompts it gives some"
        for prompts in (trained, component.held_out(self.count)):
            assert isinstance(prompts, tuple), f"{type(prompts).__name__}, expected a tuple"
            for prompt in prompts:
                assert isinstance(prompt, Prompt), f"{prompt!r} is no Prompt"
                assert isinstance(prompt.id, str), f"{prompt!r}: the id is no text"
                assert prompt.id, f"{prompt!r}: the id is empty"
                assert isinstance(prompt.text, str), f"{prompt!r}: the text is none"
                assert prompt.text.strip(), f"{prompt!r}: the text is empty"
                same = json.loads(json.dumps(dict(prompt.metadata)))
                assert same == _plain(prompt.metadata), f"{prompt!r}: the metadata are not JSON"

    def test_training_resumes_anywhere(self, component: PromptSource) -> None:
        """``train(seed, start, count)`` is that slice of one stream, whatever was asked before."""
        half = self.count // 2
        for seed in (0, 3):
            whole = component.train(seed, 0, self.count)
            assert component.train(seed, half, self.count - half) == whole[half:]
            assert component.train(seed, half - 1, 1) == whole[half - 1 : half]
            assert component.train(seed, 0, half) == whole[:half]

    def test_training_is_the_same_in_every_run(
        self, component: PromptSource, given: Mapping[str, Any]
    ) -> None:
        """A source built anew gives the same prompts, training and held-out."""
        another = self.build(given)
        another.held_out(3)
        another.train(5, 7, 3)
        assert another.train(0, 0, self.count) == component.train(0, 0, self.count)
        assert another.held_out(self.count) == component.held_out(self.count)

    def test_the_seed_decides(self, component: PromptSource) -> None:
        """Another seed gives another stream."""
        texts = [[p.text for p in component.train(seed, 0, self.count)] for seed in (0, 1)]
        assert texts[0] != texts[1], "seeds 0 and 1 give the same prompts in the same order"

    def test_the_stream_is_endless(self, component: PromptSource) -> None:
        """Prompt number 1,000,000 exists."""
        assert len(component.train(0, 1_000_000, 3)) == 3

    def test_ids_are_unique(self, component: PromptSource) -> None:
        """Within the training stream, over many epochs of a short list, and among held-out ones:
        draws are keyed by them."""
        for prompts in (component.train(0, 0, 20 * self.count), component.held_out(self.count)):
            ids = Counter(prompt.id for prompt in prompts)
            twice = sorted(name for name, count in ids.items() if count > 1)[:3]
            assert not twice, f"several prompts have the id {twice}"

    def test_held_out_prompts_begin_alike(self, component: PromptSource) -> None:
        """There is at least one, at most as many as asked for, and fewer are the first of more."""
        many = component.held_out(self.count)
        assert many, "no prompt is held out, so nothing could be evaluated"
        for count in (0, 1, self.count // 2, self.count):
            assert component.held_out(count) == many[:count], f"held_out({count})"

    def test_held_out_texts_are_never_trained(self, component: PromptSource) -> None:
        """No text is on both sides, for any seed."""
        held = {prompt.text for prompt in component.held_out(self.count)}
        for seed in range(3):
            trained = {prompt.text for prompt in component.train(seed, 0, 20 * self.count)}
            both = sorted(held & trained)[:3]
            assert not both, f"held out, and trained with seed {seed}: {both}"

    def test_nothing_global_is_drawn(self, component: PromptSource) -> None:
        """Draws come from the seed and the number."""
        with no_global_draws():
            component.train(0, 0, self.count)
            component.held_out(self.count)


def _plain(value: Any) -> Any:
    """Metadata as JSON would give them back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
