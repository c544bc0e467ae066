"""What a policy that writes keeps: see ``TextPolicy`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unigrpo_core.interfaces import TextPolicy
from unigrpo_core.records import TextSegment
from unigrpo_core.testing.policies import PolicyConformance, gradients
from unigrpo_core.testing.samples import keys
from unigrpo_core.testing.watch import equal, unchanged


class TextPolicyConformance(PolicyConformance):
    """Checks of a policy that writes; its facts are those of every policy."""

    def test_texts_are_padded_on_the_right(self, component: TextPolicy) -> None:
        """tokens int64, mask bool, logps float32 [B, L], L <= max_tokens, a string per row; in
        every row at least one token, then only padding."""
        context = self.context(component)
        written, rows = context.written, len(self.prompts)
        assert isinstance(written, TextSegment)
        types = {"tokens": torch.int64, "mask": torch.bool, "logps": torch.float32}
        for name, dtype in types.items():
            value: Tensor = getattr(written, name)
            assert value.dtype == dtype, f"{name}: {value.dtype}, expected {dtype}"
            assert value.shape == written.mask.shape, f"{name}: {tuple(value.shape)}"
        assert written.mask.shape[0] == rows, f"{written.mask.shape[0]} rows for {rows} prompts"
        assert len(written.texts) == rows, f"{len(written.texts)} texts for {rows} prompts"
        assert len(context.history) == rows, f"{len(context.history)} rows of history"
        assert written.mask.shape[1] <= self.max_tokens, f"{written.mask.shape[1]} tokens"
        assert written.mask[:, 0].all(), "a row has no token"
        falls = written.mask[:, 1:] <= written.mask[:, :-1]
        assert falls.all(), "the padding is not on the right"
        logps = written.logps[written.mask]
        assert torch.isfinite(logps).all(), "a log-prob is not finite"
        assert (logps <= 1e-6).all(), f"a log-prob is {logps.max().item()}"
        assert not written.logps.requires_grad, "sampling carries gradient"
        assert all(isinstance(text, str) for text in written.texts), written.texts

    def test_writing_leaves_the_history_alone(self, component: TextPolicy) -> None:
        """A history can be continued twice, and neither changes the other."""
        history = component.open(self.prompts)
        names, others = keys(len(self.prompts)), keys(len(self.prompts), "other")
        first, longer = self.write(component, history, names)
        second, _ = self.write(component, longer, others)
        with unchanged(first=first, second=second):
            again, _ = self.write(component, history, names)
            further, _ = self.write(component, longer, others)
        assert same_tokens(again, first), "continued again, a history says something else"
        assert same_tokens(further, second), "a longer history was changed by its parent's"

    def test_a_given_text_is_as_if_written(self, component: TextPolicy) -> None:
        """``append`` of a written text leaves the history that ``write`` left: it continues with
        the same tokens, with log-probs equal to rounding, and leaves the one it is given alone."""
        history = component.open(self.prompts)
        written, longer = self.write(component, history, keys(len(self.prompts)))
        with unchanged(written=written):
            given = component.append(history, written)
        again, _ = self.write(component, history, keys(len(self.prompts)))
        assert same_tokens(again, written), "appending to a history changed it"
        others = keys(len(self.prompts), "after")
        expected, _ = self.write(component, longer, others)
        got, _ = self.write(component, given, others)
        assert same_tokens(got, expected), "after a given text it does not go on as after its own"
        self.close(got.logps, expected.logps, "after a given text:")

    def test_rows_continue_as_their_own(self, component: TextPolicy) -> None:
        """``history.rows(index)`` continues like the rows at ``index``, in any order."""
        history, names = component.open(self.prompts), keys(len(self.prompts))
        all_rows, _ = self.write(component, history, names)
        index = torch.tensor([2, 0, 2, 1])
        some, _ = self.write(component, history.rows(index), [names[row] for row in index.tolist()])
        assert same_tokens(some, all_rows.rows(index)), "rows do not continue as they were"

    def test_batching_changes_no_token(self, component: TextPolicy) -> None:
        """Alone every prompt gets the tokens that it gets among others, and log-probs equal to
        rounding."""
        together = self.context(component).written
        assert together is not None
        for row in range(len(self.prompts)):
            alone = self.context(component, [row]).written
            assert alone is not None
            here = together.rows(torch.tensor([row]))
            assert same_tokens(alone, here), f"alone prompt {row} gets other tokens"
            self.close(alone.logps[alone.mask], here.logps[here.mask], f"prompt {row} alone:")

    def test_draws_come_from_the_keys(self, component: TextPolicy) -> None:
        """The same keys draw the same tokens, others in time draw others."""
        history, rows = component.open(self.prompts), len(self.prompts)
        texts = {
            self.write(component, history, keys(rows, f"draw {turn}"))[0].texts for turn in range(8)
        }
        assert len(texts) > 1, "eight keys draw the same texts: are they read?"
        same = [self.write(component, history, keys(rows))[0] for _ in range(2)]
        assert same_tokens(*same), "one key draws different tokens"

    def test_replay_gives_the_samplers_logps(self, component: TextPolicy) -> None:
        """The trainer's log-probs are the sampler's, on average to 1e-5 and at most to 1e-4, at
        temperatures 1 and 0.7."""
        for temperature in (1.0, 0.7):
            context = self.context(component)
            written, _ = self.write(
                component, component.open(self.prompts), keys(len(self.prompts)), temperature
            )
            context = replace(context, written=written)
            with torch.no_grad():
                found = self.replay(component, context, temperature=temperature).logps
            assert found.dtype == torch.float32, f"{found.dtype}"
            assert found.shape == written.logps.shape, f"{tuple(found.shape)}"
            gap = (found - written.logps).abs()[written.mask]
            assert gap.mean() <= 1e-5, f"sampler and trainer differ by {gap.mean().item():.2e}"
            assert gap.max() <= 1e-4, f"sampler and trainer differ by {gap.max().item():.2e}"

    def test_masked_tokens_count_for_nothing(self, component: TextPolicy) -> None:
        """In the replay log-probs are 0 where the mask is False, and nothing depends on the tokens
        that stand there."""
        context = self.context(component)
        written = context.written
        assert written is not None
        cut = written.mask.clone()
        cut[0, max(1, int(cut[0].sum()) // 2) :] = False
        assert not cut.all()
        with torch.no_grad():
            before = self.replay(component, context, mask=cut)
            odd = written.tokens.where(cut, written.tokens[0, 0])
            after = self.replay(component, context, mask=cut, tokens=odd)
        assert not before.logps[~cut].any(), "log-probs where masked are not 0"
        assert equal(before, after), "tokens that are masked change the replay"

    def test_logps_are_left_out_if_not_wanted(self, component: TextPolicy) -> None:
        """With ``want_logps`` False they are zeros of the same shape."""
        context = self.context(component)
        found = self.replay(component, context, want_logps=False).logps
        assert found.shape == context.mask.shape, f"{tuple(found.shape)}"
        assert not found.any(), "not wanted, and not 0"

    def test_text_gradient_reaches_the_text_expert(self, component: TextPolicy) -> None:
        """Finite, and not 0 everywhere."""
        found = gradients(component, "text", self.replay(component, self.context(component)).logps)
        assert any(gradient.any() for gradient in found), "no gradient reaches the text expert"
        assert all(torch.isfinite(gradient).all() for gradient in found), "not finite"


def same_tokens(one: TextSegment, two: TextSegment) -> bool:
    """Whether the sampled tokens and the texts are the same, whatever the padding."""
    rows = zip(one.tokens, one.mask, two.tokens, two.mask, strict=True)
    return one.texts == two.texts and all(torch.equal(a[m], b[n]) for a, m, b, n in rows)
