"""The cached sampler and the replay against one masked pass over everything, written here anew.

The reference packs prompt, thought and all noisy images of a row into one sequence under BAGEL's
training mask: a token sees what comes before it and its own image block; an image block is seen by
nobody else. It shares no code with the model, only the weights.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZE, is_image, prompts, same_tokens

from unigrpo_core.keys import Key, normals
from unigrpo_core.records import ReplayBatch, Sampling

HIGH, WIDE = SIZE[0] // 4, SIZE[1] // 4
TIMES = (0.9, 0.35)
BRIEF = Sampling(max_tokens=6, temperature=0.8)


# --- the reference ----------------------------------------------------------------------------


class Packed:
    """The model's formulas from the specification, in float64, for one row at a time."""

    def __init__(self, folder):
        state = load_file(folder / "ema.safetensors")
        self.w = {name: x.double().requires_grad_() for name, x in state.items()}
        self.llm = json.loads((folder / "llm_config.json").read_text())
        self.vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]

    def id(self, word):
        return self.vocabulary[word]

    def wrap(self, text):
        return [self.id("<|im_start|>"), *map(self.id, text.split()), self.id("<|im_end|>")]

    def both(self, name, x, gen, parameter="weight"):
        """A linear layer, by the expert of each token."""
        und, own = f"{name}.{parameter}", f"{name}_moe_gen.{parameter}"
        bias = [self.w.get(n.replace("weight", "bias"), 0.0) for n in (und, own)]
        return torch.where(gen[:, None], x @ self.w[own].T + bias[1], x @ self.w[und].T + bias[0])

    def norm(self, name, x, gen):
        scaled = x / (x.square().mean(-1, keepdim=True) + self.llm["rms_norm_eps"]).sqrt()
        shape = (-1,) + (1,) * (x.dim() - 1)
        own, und = self.w[f"{name}_moe_gen.weight"], self.w[f"{name}.weight"]
        return scaled * torch.where(gen.view(shape), own, und)

    def rotate(self, x, positions):
        d = x.shape[-1]
        angle = positions[:, None] * self.llm["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
        cos, sin = (torch.cat((f(angle), f(angle)), 1)[:, None] for f in (torch.cos, torch.sin))
        first, second = x[..., : d // 2], x[..., d // 2 :]
        return x * cos + torch.cat((-second, first), -1) * sin

    def table(self, row, column):
        width = self.llm["hidden_size"]
        rate = 10000 ** (-torch.arange(width // 4).double() / (width // 4))
        halves = [torch.cat(((u * rate).sin(), (u * rate).cos())) for u in (column, row)]
        return torch.cat(halves)

    def time(self, t):
        rate = 10000 ** (-torch.arange(128).double() / 128)
        x = torch.cat(((t * rate).cos(), (t * rate).sin()))
        x = self.w["time_embedder.mlp.0.weight"] @ x + self.w["time_embedder.mlp.0.bias"]
        x = torch.nn.functional.silu(x)
        return self.w["time_embedder.mlp.2.weight"] @ x + self.w["time_embedder.mlp.2.bias"]

    def __call__(self, ids, images):
        """Hidden states [L, D] of the text and velocities [h, w, token] per image (x_t, t)."""
        embedding = self.w["language_model.model.embed_tokens.weight"]
        start, end = self.id("<|vision_start|>"), self.id("<|vision_end|>")
        rows, gen, block, positions = [], [], [], []

        def put(vector, *, of_image, expert):
            rows.append(vector)
            gen.append(expert)
            block.append(of_image)
            positions.append(len(ids) if of_image >= 0 else len(positions))

        for token in ids:
            put(embedding[token], of_image=-1, expert=False)
        for number, (x_t, t) in enumerate(images):
            put(embedding[start], of_image=number, expert=False)
            for row in range(HIGH):
                for column in range(WIDE):
                    token = self.w["vae2llm.weight"] @ x_t[row, column].double()
                    token = token + self.w["vae2llm.bias"] + self.time(t) + self.table(row, column)
                    put(token, of_image=number, expert=True)
            put(embedding[end], of_image=number, expert=False)

        x, gen, block = torch.stack(rows), torch.tensor(gen), torch.tensor(block)
        place = torch.tensor(positions).double()
        order = torch.arange(len(x))
        mine = (block[:, None] == block[None]) & (block[None] >= 0)
        seen = (order[None] <= order[:, None]) & (block[None] < 0) | mine
        heads, groups = self.llm["num_attention_heads"], self.llm["num_key_value_heads"]
        width = self.llm["hidden_size"] // heads
        for number in range(self.llm["num_hidden_layers"]):
            name = f"language_model.model.layers.{number}"
            normed = self.norm(f"{name}.input_layernorm", x, gen)
            q, k, v = (
                self.both(f"{name}.self_attn.{letter}_proj", normed, gen).view(len(x), -1, width)
                for letter in "qkv"
            )
            q = self.rotate(self.norm(f"{name}.self_attn.q_norm", q, gen), place)
            k = self.rotate(self.norm(f"{name}.self_attn.k_norm", k, gen), place)
            k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
            share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            attended = torch.einsum("hij,jhd->ihd", share, v).flatten(1)
            x = x + self.both(f"{name}.self_attn.o_proj", attended, gen)
            normed = self.norm(f"{name}.post_attention_layernorm", x, gen)
            x = x + self.mlp(name, normed, gen)
        x = self.norm("language_model.model.norm", x, gen)
        out = x @ self.w["llm2vae.weight"].T + self.w["llm2vae.bias"]
        velocities = [
            out[(block == number) & gen].view(HIGH, WIDE, -1) for number in range(len(images))
        ]
        return x[: len(ids)], velocities

    def mlp(self, name, x, gen):
        def project(letter, y):
            own, und = (f"{name}.mlp{s}.{letter}_proj.weight" for s in ("_moe_gen", ""))
            return torch.where(gen[:, None], y @ self.w[own].T, y @ self.w[und].T)

        return project("down", torch.nn.functional.silu(project("gate", x)) * project("up", x))

    def logps(self, hidden, ids, first, tokens, temperature):
        """Log-probs of ``tokens`` at places first, first + 1, ... of ids, over what may be said."""
        logits = hidden @ self.w["language_model.lm_head.weight"].T / temperature
        words = [i for word, i in self.vocabulary.items() if not word.startswith("<|")]
        may = [*words, self.id("<|im_end|>")]
        places = torch.arange(first - 1, first - 1 + len(tokens))
        total = logits[places][:, may].logsumexp(1)
        return logits[places, tokens] - total


@pytest.fixture(scope="module")
def packed(checkpoint):
    return Packed(checkpoint)


# --- a batch of rows, as sampled --------------------------------------------------------------


@pytest.fixture
def policy(setup):
    return setup().policy


def keys(count):
    return [Key(("packed", row)) for row in range(count)]


def sampled(policy, starts, sampling=BRIEF):
    segment, history = policy.write(policy.open(starts), sampling, keys(len(starts)))
    return segment, history


def noisy(count):
    """x_t [count, K, h, w, token] and t [count, K]."""
    shape = (len(TIMES), HIGH, WIDE, 48)
    x_t = normals([Key(("x_t", row)) for row in range(count)], shape, "cpu")
    return x_t, torch.tensor([TIMES] * count)


def replay_batch(starts, segment, x_t=None, t=None, **changes):
    settings = {"branches": (), "context_gradient": True, "want_logps": True} | changes
    return ReplayBatch(
        prompts=starts,
        tokens=segment.tokens,
        mask=segment.mask,
        temperature=BRIEF.temperature,
        x_t=x_t,
        t=t,
        **settings,
    )


def rows_of(packed, starts, segment):
    """Per row: context ids, sampled tokens, and the ids of the whole closed text."""
    for prompt, tokens, mask in zip(starts, segment.tokens, segment.mask, strict=True):
        context, said = packed.wrap(prompt.text), tokens[mask].tolist()
        end = packed.id("<|im_end|>")
        closing = [] if said[-1] == end else [end]
        yield context, said, [*context, packed.id("<|im_start|>"), *said, *closing]


@pytest.mark.parametrize("count", [1, 4])
def test_sampler_and_replay_equal_the_masked_pass(packed, policy, count):
    starts = prompts(count)
    segment, history = sampled(policy, starts)
    x_t, t = noisy(count)
    velocities = torch.stack(
        [policy.velocity(history, x_t[:, k], t[:, k]) for k in range(len(TIMES))], 1
    )
    replay = policy.root(replay_batch(starts, segment, x_t, t))
    lengths = set()
    for row, (context, said, ids) in enumerate(rows_of(packed, starts, segment)):
        lengths.add(len(ids))
        images = [(x_t[row, k], TIMES[k]) for k in range(len(TIMES))]
        with torch.no_grad():
            hidden, expected = packed(ids, images)
            logps = packed.logps(hidden, ids, len(context) + 1, said, BRIEF.temperature)
        torch.testing.assert_close(
            segment.logps[row, : len(said)].double(), logps, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            replay.logps[row, : len(said)].detach().double(), logps, atol=1e-5, rtol=0
        )
        for got in (velocities[row], replay.velocities[row].detach()):
            torch.testing.assert_close(got.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert count == 1 or len(lengths) > 1, "the rows should differ in length"
    assert replay.logps.detach()[~segment.mask].eq(0).all()


def test_the_unconditional_branch_is_an_image_block_without_any_text(packed, policy):
    starts = prompts(2)
    segment, history = sampled(policy, starts)
    x_t, t = noisy(2)
    replay = policy.root(replay_batch(starts, segment, x_t, t, branches=("text",)))
    branch = policy.branches(history, ("text",))["text"]
    for row in range(2):
        with torch.no_grad():
            _, expected = packed([], [(x_t[row, k], TIMES[k]) for k in range(len(TIMES))])
        for k in range(len(TIMES)):
            got = policy.velocity(branch, x_t[:, k], t[:, k])[row]
            torch.testing.assert_close(got.double(), expected[k], atol=1e-5, rtol=1e-5)
            got = replay.branches["text"][row, k].detach()
            torch.testing.assert_close(got.double(), expected[k], atol=1e-5, rtol=1e-5)


def test_a_system_prompt_stands_before_the_prompt_and_alone_in_the_branch(packed, setup):
    policy = setup("policy.system_prompt='mix red and blue'").policy
    starts, system = prompts(2), packed.wrap("mix red and blue")
    x_t, t = noisy(2)
    history = policy.open(starts)
    branch = policy.branches(history, ("text",))["text"]
    for row, prompt in enumerate(starts):
        image = [(x_t[row, 0], TIMES[0])]
        with torch.no_grad():
            full, alone = packed(system + packed.wrap(prompt.text), image), packed(system, image)
        for context, expected in ((history, full), (branch, alone)):
            got = policy.velocity(context, x_t[:, 0], t[:, 0])[row]
            torch.testing.assert_close(got.double(), expected[1][0], atol=1e-5, rtol=1e-5)


def test_rows_together_equal_rows_alone(policy):
    starts = prompts(4)
    segment, history = sampled(policy, starts)
    x_t, t = noisy(4)
    together = policy.velocity(history, x_t[:, 0], t[:, 0])
    replay = policy.root(replay_batch(starts, segment, x_t, t))
    for row in range(4):
        alone, own = policy.write(policy.open([starts[row]]), BRIEF, [keys(4)[row]])
        length = int(alone.mask.sum())
        assert alone.tokens[0, :length].tolist() == segment.tokens[row][segment.mask[row]].tolist()
        torch.testing.assert_close(
            alone.logps[0, :length], segment.logps[row, :length], atol=1e-5, rtol=0
        )
        v = policy.velocity(own, x_t[row : row + 1, 0], t[row : row + 1, 0])[0]
        torch.testing.assert_close(v, together[row], atol=1e-5, rtol=1e-5)
        single = policy.root(
            replay_batch(starts[row : row + 1], alone, x_t[row : row + 1], t[row : row + 1])
        )
        torch.testing.assert_close(
            single.velocities[0], replay.velocities[row], atol=1e-5, rtol=1e-5
        )


def test_histories_are_values(policy):
    """Continuing a history, or asking it for velocities, never changes it; rows may repeat."""
    starts = prompts(3)
    opened = policy.open(starts)
    x_t, t = noisy(3)
    before = policy.velocity(opened, x_t[:, 0], t[:, 0])
    first, longer = policy.write(opened, BRIEF, keys(3))
    again, _ = policy.write(opened, BRIEF, keys(3))
    assert same_tokens(first, again)
    assert torch.equal(policy.velocity(opened, x_t[:, 0], t[:, 0]), before)
    index = torch.tensor([2, 0, 2])
    picked = policy.velocity(longer.rows(index), x_t[index, 0], t[index, 0])
    expected = policy.velocity(longer, x_t[:, 0], t[:, 0])[index]
    torch.testing.assert_close(picked, expected, atol=1e-5, rtol=1e-5)
    assert (len(opened), len(longer), len(longer.rows(index))) == (3, 3, 3)


# --- gradients --------------------------------------------------------------------------------


def gradients(policy, batch, *, text, image, seed=0):
    """Gradients by published name of a random linear function of the replay's values."""
    for owned in policy.parameters().values():
        for parameter in owned.values():
            parameter.grad = None
    replay = policy.root(batch)
    loss = torch.zeros(())
    if text:
        loss = loss + (replay.logps * weights(replay.logps.shape, seed)).sum()
    if image:
        loss = loss + (replay.velocities * weights(replay.velocities.shape, seed + 1)).sum()
    loss.backward()
    return {
        name.removeprefix("network."): parameter.grad
        for owned in policy.parameters().values()
        for name, parameter in owned.items()
    }


def weights(shape, seed):
    return normals([Key(("weights", seed))], tuple(shape), "cpu")[0]


@pytest.mark.parametrize(("text", "image"), [(True, False), (False, True), (True, True)])
def test_gradients_equal_those_of_the_masked_pass(packed, policy, text, image):
    starts = prompts(2)
    segment, _ = sampled(policy, starts)
    x_t, t = noisy(2)
    found = gradients(policy, replay_batch(starts, segment, x_t, t), text=text, image=image)

    loss = torch.zeros((), dtype=torch.float64)
    text_weights = weights(segment.tokens.shape, 0).double()
    image_weights = weights(x_t.shape, 1).double()
    for row, (context, said, ids) in enumerate(rows_of(packed, starts, segment)):
        hidden, v = packed(ids, [(x_t[row, k], TIMES[k]) for k in range(len(TIMES))])
        if text:
            logps = packed.logps(hidden, ids, len(context) + 1, said, BRIEF.temperature)
            loss = loss + (logps * text_weights[row, : len(said)]).sum()
        if image:
            loss = loss + (torch.stack(v) * image_weights[row]).sum()
    names = [name for name in packed.w if "pos_embed" not in name]
    expected = torch.autograd.grad(loss, [packed.w[n] for n in names], allow_unused=True)
    assert set(names) == set(found)
    checked = 0
    for name, wanted in zip(names, expected, strict=True):
        got = found[name]
        if wanted is None or not wanted.any():
            assert got is None or got.abs().max() < 1e-4, name
            continue
        checked += 1
        assert got is not None, name
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < 1e-3, f"{name}: {error:.1e}"
    assert checked > 20


def test_without_context_gradient_text_gets_none_and_the_image_expert_all_of_its_own(policy):
    starts = prompts(2)
    segment, _ = sampled(policy, starts)
    x_t, t = noisy(2)
    free, cut = (
        gradients(
            policy,
            replay_batch(starts, segment, x_t, t, context_gradient=flag),
            text=False,
            image=True,
        )
        for flag in (True, False)
    )
    texts = [name for name in free if not is_image(name)]
    assert all(cut[name] is None or not cut[name].any() for name in texts)
    reached = {name for name in texts if free[name] is not None and free[name].any()}
    for part in ("embed_tokens", "q_proj", "k_proj", "mlp.up_proj", "input_layernorm"):
        assert any(part in name for name in reached), part
    # Boundary tokens pass the image expert's gradient on through the text expert's weights: were
    # that cut, what reaches the first layer would change.
    for name in filter(is_image, free):
        torch.testing.assert_close(cut[name], free[name], atol=1e-5, rtol=1e-4)


def test_the_boundary_tokens_do_carry_gradient_between_latents(packed, checkpoint):
    """What gives the test above its power: without the boundary's part the gradient differs."""
    x_t, _ = noisy(1)
    name = "language_model.model.layers.0.self_attn.v_proj_moe_gen.weight"
    _, (v,) = packed([], [(x_t[0, 0], TIMES[0])])
    (with_boundary,) = torch.autograd.grad(v.square().sum(), packed.w[name])

    class Cut(Packed):
        """Boundary tokens see only themselves from the latents on: no way through them."""

        def both(self, name, x, gen, parameter="weight"):
            y = super().both(name, x, gen, parameter)
            return torch.where(gen[:, None], y, y.detach())

    cut = Cut(checkpoint)
    _, (same,) = cut([], [(x_t[0, 0], TIMES[0])])
    (without,) = torch.autograd.grad(same.square().sum(), cut.w[name])
    assert torch.equal(same, v)
    assert (with_boundary - without).norm() > 1e-3 * with_boundary.norm()


def test_text_without_context_gradient_is_trained_as_ever(policy):
    starts = prompts(2)
    segment, _ = sampled(policy, starts)
    x_t, t = noisy(2)
    free, cut = (
        gradients(
            policy,
            replay_batch(starts, segment, x_t, t, context_gradient=flag),
            text=True,
            image=False,
        )
        for flag in (True, False)
    )
    for name, wanted in free.items():
        if wanted is not None and wanted.any():
            torch.testing.assert_close(cut[name], wanted, atol=1e-6, rtol=1e-5)


# --- weights ----------------------------------------------------------------------------------


def test_ownership(setup):
    policy = setup("train=['image']").policy
    owned = policy.parameters()
    assert set(owned) == {"text", "image"}
    assert not owned["text"].keys() & owned["image"].keys()
    assert all(is_image(name) for name in owned["image"])
    assert not any(is_image(name) for name in owned["text"])
    assert all(parameter.requires_grad for parameter in owned["image"].values())
    assert not any(parameter.requires_grad for parameter in owned["text"].values())
    rest = set(dict(policy.root.named_parameters())) - owned["text"].keys() - owned["image"].keys()
    assert {name.rpartition("latent_pos_embed.")[2] for name in rest} == {"pos_embed"}


def test_kept_weights_compute_the_past_and_restore_bit_for_bit(policy):
    starts = prompts(2)
    segment, _ = sampled(policy, starts)
    x_t, t = noisy(2)
    batch = replay_batch(starts, segment, x_t, t)
    with torch.no_grad():
        start = policy.root(batch)
        policy.keep("reference")
        for owned in policy.parameters().values():
            for parameter in owned.values():
                parameter.add_(0.01 * torch.randn_like(parameter))
        now = {name: p.clone() for name, p in policy.root.named_parameters()}
        changed = policy.root(batch)
        with policy.weights("reference"):
            past = policy.root(batch)
        current = policy.root(batch)
    assert torch.equal(past.velocities, start.velocities)
    assert torch.equal(past.logps, start.logps)
    assert torch.equal(current.velocities, changed.velocities)
    assert not torch.allclose(changed.velocities, start.velocities, atol=1e-3)
    assert all(torch.equal(p, now[name]) for name, p in policy.root.named_parameters())


def test_kept_weights_come_back_after_an_error_and_carry_no_gradient(policy):
    starts = prompts(1)
    segment, _ = sampled(policy, starts)
    policy.keep("reference")
    now = {name: p.clone() for name, p in policy.root.named_parameters()}

    def fail():
        with policy.weights("reference"):
            assert not policy.root(replay_batch(starts, segment)).logps.requires_grad
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert all(torch.equal(p, now[name]) for name, p in policy.root.named_parameters())
    assert policy.root(replay_batch(starts, segment)).logps.requires_grad


def test_saving_and_loading(policy, setup, tmp_path):
    starts = prompts(2)
    with torch.no_grad():
        for owned in policy.parameters().values():
            for parameter in owned.values():
                parameter.mul_(1.01)
    policy.save(tmp_path / "saved")
    loaded = setup(f"policy.checkpoint='{tmp_path / 'saved'}'").policy
    original = dict(policy.root.named_parameters())
    assert all(torch.equal(p, original[name]) for name, p in loaded.root.named_parameters())
    assert same_tokens(sampled(policy, starts)[0], sampled(loaded, starts)[0])
    fresh = setup().policy
    fresh.load(tmp_path / "saved")
    assert all(torch.equal(p, original[name]) for name, p in fresh.root.named_parameters())
