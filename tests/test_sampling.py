"""Drawing tokens: the inverse CDF in float64, and what may be sampled at all."""

import numpy as np
import pytest
import torch
from tiny import prompts
from unigrpo_models.sampling import draw_tokens

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key
from unigrpo_core.records import ReplayBatch, Sampling

LAST = 1 - 2**-53  # the largest uniform draw


def inverse_cdf(logits, uniform):
    """The first token at which the cumulative probability exceeds the draw, in float64."""
    found = []
    for row, u in zip(logits.double().numpy(), uniform.numpy(), strict=True):
        p = np.exp(row - row.max())
        cdf = np.cumsum(p) / p.sum()
        found.append(int(np.argmax((cdf > u) & (p > 0))))
    return torch.tensor(found)


@pytest.mark.parametrize("width", [1, 2, 41, 255, 256, 257, 1000])
def test_draws_are_the_inverse_cdf(width):
    rng = Key(("cdf", width)).generator()
    logits = torch.from_numpy(rng.standard_normal((200, width), dtype=np.float32)) * 3
    logits[rng.random((200, width)) < 0.3] = float("-inf")
    logits[:, rng.integers(width)] = 0.5
    uniform = torch.from_numpy(rng.random(200))
    assert torch.equal(draw_tokens(logits, uniform), inverse_cdf(logits, uniform))


@pytest.mark.parametrize("width", [3, 256, 300, 1030])
def test_the_ends_of_the_unit_interval(width):
    """0 gives the first possible token and the largest draw the last, never an impossible one."""
    logits = torch.full((4, width), float("-inf"))
    first, last = width // 3, width - 2
    logits[:, first : last + 1] = torch.linspace(-2, 2, last + 1 - first)
    got = draw_tokens(logits, torch.tensor([0.0, LAST, 0.0, LAST], dtype=torch.float64))
    assert got.tolist() == [first, last, first, last]


def test_a_token_without_probability_is_never_drawn():
    """Draws that fall exactly on steps of the CDF, with impossible tokens everywhere between."""
    logits = torch.full((5, 700), float("-inf"))
    possible = torch.tensor([3, 255, 256, 511, 640])
    logits[:, possible] = 0.0
    uniform = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    assert set(draw_tokens(logits, uniform).tolist()) <= set(possible.tolist())
    # A weight so small that it underflows next to the largest is impossible as well.
    logits = torch.tensor([[-2000.0, 0.0, -2000.0]]).expand(2, 3)
    assert draw_tokens(logits, torch.tensor([0.0, LAST], dtype=torch.float64)).tolist() == [1, 1]


def test_one_certain_token():
    logits = torch.full((3, 600), float("-inf"))
    logits[:, 300] = -50.0
    uniform = torch.tensor([0.0, 0.5, LAST], dtype=torch.float64)
    assert draw_tokens(logits, uniform).tolist() == [300] * 3


def test_the_distribution():
    """Chi-square over 20,000 keyed draws; the limit is the .999999 quantile for 11 degrees."""
    count = 20000
    logits = torch.linspace(-2, 1.5, 12)
    uniform = torch.from_numpy(Key(("chi-square",)).uniform(count))
    seen = torch.bincount(draw_tokens(logits.expand(count, -1), uniform), minlength=12).double()
    expected = logits.double().softmax(0) * count
    assert float(((seen - expected).square() / expected).sum()) < 50


# --- what the policy makes of it --------------------------------------------------------------


def keys(count, name="write"):
    return [Key((name, row)) for row in range(count)]


@pytest.fixture
def policy(setup):
    return setup().policy


def head(policy):
    return policy.network.language_model.lm_head.weight.data


def lean(policy, token, by):
    """Makes the model more (or less) inclined to say a token."""

    def change(module, arguments, logits):
        bias = torch.zeros(logits.shape[-1])
        bias[token] = by
        return logits + bias

    policy.network.language_model.lm_head.register_forward_hook(change)


def vocabulary(policy):
    return policy.codec.tokenizer.get_vocab()


def test_only_words_and_the_end_are_sampled(policy):
    """Even where the model would rather say something else: specials and rows without a word."""
    known = vocabulary(policy)
    words = {i for word, i in known.items() if not word.startswith("<|")}
    end = known["<|im_end|>"]
    others = [i for i in range(len(head(policy))) if i not in words and i != end]
    assert len(others) > 5
    head(policy)[others] *= 50
    segment, _ = policy.write(
        policy.open(prompts(4)), Sampling(max_tokens=20, temperature=2.0), keys(4)
    )
    sampled = segment.tokens[segment.mask]
    assert not set(sampled.tolist()) & set(others)
    assert torch.isfinite(segment.logps).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logps_normalise_over_what_may_be_sampled(policy, temperature):
    """The probabilities of all possible first tokens sum to 1, in the replay and the sampler."""
    known = vocabulary(policy)
    may = [i for word, i in known.items() if not word.startswith("<|")] + [known["<|im_end|>"]]
    start = prompts(1) * len(may)
    tokens = torch.tensor(may)[:, None]
    replay = policy.root(
        ReplayBatch(
            prompts=start,
            tokens=tokens,
            mask=torch.ones_like(tokens).bool(),
            temperature=temperature,
            want_logps=True,
            x_t=None,
            t=None,
            branches=(),
            context_gradient=True,
        )
    )
    table = replay.logps[:, 0].detach()
    assert float(table.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    segment, _ = policy.write(policy.open(start), Sampling(1, temperature), keys(len(may)))
    places = [may.index(token) for token in segment.tokens[:, 0].tolist()]
    torch.testing.assert_close(segment.logps[:, 0], table[places], atol=1e-5, rtol=0)


def test_temperature_sharpens(policy):
    def entropy(temperature):
        start = prompts(1) * 64
        segment, _ = policy.write(policy.open(start), Sampling(1, temperature), keys(64))
        return -float(segment.logps.mean())

    assert entropy(0.2) < entropy(1.0) < entropy(5.0)


def test_near_temperature_0_every_row_says_the_same(policy):
    start = prompts(1) * 8
    segment, _ = policy.write(policy.open(start), Sampling(6, 1e-4), keys(8))
    assert len(set(segment.texts)) == 1


def test_token_j_takes_draw_j_of_its_rows_key(policy):
    start, sampling = prompts(3), Sampling(6)
    segment, _ = policy.write(policy.open(start), sampling, keys(3))
    for row, key in enumerate(keys(3)):
        uniform = key.child("token").uniform(6)
        said = segment.tokens[row][segment.mask[row]].tolist()
        for place, token in enumerate(said):
            # The distribution at this place, from the replay of every possible continuation.
            known = vocabulary(policy)
            may = sorted(
                [i for w, i in known.items() if not w.startswith("<|")] + [known["<|im_end|>"]]
            )
            tokens = torch.tensor([[*said[:place], i] for i in may])
            replay = policy.root(
                ReplayBatch(
                    prompts=(start[row],) * len(may),
                    tokens=tokens,
                    mask=torch.ones_like(tokens).bool(),
                    temperature=1.0,
                    want_logps=True,
                    x_t=None,
                    t=None,
                    branches=(),
                    context_gradient=True,
                )
            )
            cdf = replay.logps[:, place].detach().double().exp().cumsum(0)
            index = may.index(token)
            below = float(cdf[index - 1]) if index else 0.0
            assert below - 1e-5 <= uniform[place] <= float(cdf[index]) + 1e-5


def test_a_truncated_thought_is_closed_by_an_end_that_is_not_scored(policy):
    """The history goes on as if the thought had ended; the end has no log-prob and no mask."""
    end = vocabulary(policy)["<|im_end|>"]
    lean(policy, end, -5.0)
    start = prompts(4)
    segment, history = policy.write(policy.open(start), Sampling(3), keys(4))
    cut = ~(segment.tokens == end).any(1)
    assert cut.any()
    assert segment.mask.shape[1] == 3
    assert segment.mask[cut].all()
    # The same words, sampled with room to end: the policy goes on from the same place.
    long, longer = policy.write(policy.open(start), Sampling(8), keys(4))
    x_t = torch.randn(4, 2, 3, 48, generator=torch.Generator().manual_seed(0))
    t = torch.full((4, 1), 0.7)
    replay = policy.root(
        ReplayBatch(
            prompts=start,
            tokens=segment.tokens,
            mask=segment.mask,
            temperature=1.0,
            want_logps=True,
            x_t=x_t[:, None],
            t=t,
            branches=(),
            context_gradient=True,
        )
    )
    v = policy.velocity(history, x_t, t[:, 0])
    torch.testing.assert_close(v, replay.velocities[:, 0].detach(), atol=1e-5, rtol=1e-5)
    # That the end stands there, the replay of the thought with an explicit end shows.
    closed = torch.cat((segment.tokens, torch.full((4, 1), end)), 1)[cut]
    explicit = policy.root(
        ReplayBatch(
            prompts=tuple(p for p, c in zip(start, cut.tolist(), strict=True) if c),
            tokens=closed,
            mask=torch.ones_like(closed).bool(),
            temperature=1.0,
            want_logps=True,
            x_t=x_t[cut][:, None],
            t=t[cut],
            branches=(),
            context_gradient=True,
        )
    )
    torch.testing.assert_close(v[cut], explicit.velocities[:, 0].detach(), atol=1e-5, rtol=1e-5)
    assert long.mask[cut].sum(1).gt(3).all()
    assert len(longer) == 4


def test_writing_stops_when_every_row_has_ended(policy):
    """A model that ends at once is asked for a token or two, not for the limit."""
    end = vocabulary(policy)["<|im_end|>"]
    lean(policy, end, 1000.0)
    calls = []
    policy.network.language_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    segment, _ = policy.write(policy.open(prompts(2)), Sampling(30), keys(2))
    assert segment.tokens[segment.mask].tolist() == [end, end]
    assert segment.texts == ("", "")
    assert len(calls) <= 3


def test_nothing_is_said_after_the_end(policy):
    end = vocabulary(policy)["<|im_end|>"]
    lean(policy, end, 2.0)
    segment, _ = policy.write(policy.open(prompts(4) * 4), Sampling(12), keys(16))
    assert len(set(segment.mask.sum(1).tolist())) > 2
    for row, mask in zip(segment.tokens, segment.mask, strict=True):
        said = row[mask].tolist()
        assert end not in said[:-1]
        assert said[-1] == end or len(said) == 12
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert segment.logps[~segment.mask].eq(0).all()


def test_a_thought_beyond_the_context_is_an_error(policy):
    with pytest.raises(UserError, match=r"context of \d+; the model's ends at 64"):
        policy.write(policy.open(prompts(1)), Sampling(60), keys(1))


def test_unknown_words_and_long_prompts_are_errors(policy):
    from unigrpo_core.records import Prompt

    with pytest.raises(UserError, match="does not know 'zebra'"):
        policy.prompt_tokens(Prompt("x", "two zebra circle"))
    with pytest.raises(UserError, match=r"takes 72 tokens, but the model's context ends at 64"):
        policy.prompt_tokens(Prompt("x", "red " * 70))
    assert policy.prompt_tokens(Prompt("x", "two red circle")) == 5
