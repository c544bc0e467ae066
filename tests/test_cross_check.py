"""Losses, penalties and gradients of the engine against a second implementation, in float64.

The second one is written from the formulas alone: the paper's equations, and BAGEL's specification
for the network. It has no caches, no batches and no streams: one sequence [prompt, thought, image
block] at a time under a dense mask, and autograd.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import image_of, text_of

from unigrpo_core.catalog import load_catalog
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import advantages, episodes, score
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.engine.trainset import build_train_set
from unigrpo_core.engine.update import Updater
from unigrpo_core.keys import Key
from unigrpo_core.recipe import load_recipe

BASE = Path(__file__).parent.parent / "recipes" / "_base" / "board.toml"
RECIPE = """
extends = ['BASE']
steps = 1
train = ["text", "image"]
prompts = 2
group = { fan_out = [3, 1] }
updates = { count = 1 }
rewards = [{ use = "random" }]
advantage = { use = "group_norm", floor = 1e-6 }
optimizer = { max_grad_norm = 1e9 }
compute = { device = "cpu", rollout_rows = 4, replay_tokens = 256 }

[text]
lr = 2e-3
objective = { use = "grpo", clip_range = 0.05 }

[image]
lr = 2e-3
objective = { use = "flow_grpo", ratio_norm = true }
window = { use = "random", size = 3, range = [0, 5] }
regularizers = [{ use = "velocity_mse", weight = 0.5 }]
"""
D, HEADS, KV, LAYERS, SIDE, STEPS, SHIFT = 96, 4, 2, 3, 6, 8, 2.0
WIDTH = D // HEADS
BOS, EOS, START, END = 1, 2, 3, 4
SAMPLED = [EOS, *range(5, 41)]  # every word, and the end


# --- the network ------------------------------------------------------------------------------


def norm(x, weight):
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotated(x, positions):
    """x [L, heads, WIDTH] turned by its positions, halves split."""
    half = WIDTH // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def transformer(w, x, drawn, positions, mask):
    """x [L, D]; rows where ``drawn`` go through the image expert, the others through the text's;
    query i sees key j where mask[i, j]."""

    def each(name, x, function):
        plain, gen = (f"language_model.model.{n}" for n in name)
        return torch.where(drawn[:, None], function(x, gen), function(x, plain))

    def pair(i, module):
        return f"layers.{i}.{module}", f"layers.{i}.{module}_moe_gen"

    def scale(x, n):
        return norm(x, w[f"{n}.weight"])

    def linear(x, n):
        return F.linear(x, w[f"{n}.weight"], w.get(f"{n}.bias"))

    def mlp(x, n):
        inner = F.silu(linear(x, f"{n}.gate_proj")) * linear(x, f"{n}.up_proj")
        return linear(inner, f"{n}.down_proj")

    def heads(i, x, letter, count):
        y = each(pair(i, f"self_attn.{letter}_proj"), x, linear)
        if letter == "v":
            return y.view(-1, count, WIDTH)
        y = each(
            pair(i, f"self_attn.{letter}_norm"),
            y,
            lambda y, n: norm(y.view(-1, count, WIDTH), w[f"{n}.weight"]).flatten(1),
        )
        return rotated(y.view(-1, count, WIDTH), positions)

    for i in range(LAYERS):
        y = each(pair(i, "input_layernorm"), x, scale)
        q, k, v = heads(i, y, "q", HEADS), heads(i, y, "k", KV), heads(i, y, "v", KV)
        out = []
        for h in range(HEADS):
            g = h // (HEADS // KV)
            logits = (q[:, h] @ k[:, g].T / math.sqrt(WIDTH)).masked_fill(~mask, -math.inf)
            out.append(logits.softmax(-1) @ v[:, g])
        x = x + each(pair(i, "self_attn.o_proj"), torch.cat(out, -1), linear)
        y = each(pair(i, "post_attention_layernorm"), x, scale)
        x = x + each(pair(i, "mlp"), y, mlp)
    return each(("norm", "norm_moe_gen"), x, scale)


def token_logps(w, prompt, thought, temperature):
    """[len(thought)]: log-probs of the sampled tokens after the prompt's."""
    ids = torch.tensor([*prompt, BOS, *thought[:-1]])
    x = w["language_model.model.embed_tokens.weight"][ids]
    many = len(ids)
    causal = torch.ones(many, many).tril().bool()
    x = transformer(w, x, torch.zeros(many).bool(), torch.arange(many), causal)
    logits = F.linear(x[len(prompt) :], w["language_model.lm_head.weight"]) / temperature
    logps = logits[:, SAMPLED].log_softmax(-1)
    return torch.stack([row[SAMPLED.index(i)] for row, i in zip(logps, thought, strict=True)])


def velocity(w, context, x_t, t):
    """[SIDE, SIDE, 48]: the velocity after a context of token ids."""
    tokens, many = x_t.reshape(SIDE * SIDE, -1), len(context)
    waves = t * 10000.0 ** (-torch.arange(128).double() / 128)
    time = torch.cat([waves.cos(), waves.sin()])
    time = F.linear(time, w["time_embedder.mlp.0.weight"], w["time_embedder.mlp.0.bias"])
    time = F.linear(F.silu(time), w["time_embedder.mlp.2.weight"], w["time_embedder.mlp.2.bias"])
    latents = F.linear(tokens, w["vae2llm.weight"], w["vae2llm.bias"]) + time + table()
    words = w["language_model.model.embed_tokens.weight"]
    ids = torch.tensor(context, dtype=torch.int64)
    x = torch.cat([words[ids], words[START][None], latents, words[END][None]])
    drawn = torch.zeros(len(x)).bool()
    drawn[many + 1 : -1] = True
    mask = torch.ones(len(x), len(x)).tril().bool()
    mask[many:] = True
    positions = torch.arange(len(x)).clamp(max=many)
    x = transformer(w, x, drawn, positions, mask)[many + 1 : -1]
    return F.linear(x, w["llm2vae.weight"], w["llm2vae.bias"]).view_as(x_t)


def table():
    """[SIDE * SIDE, D]: the column's waves, then the row's."""
    quarter = D // 4
    waves = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    half = torch.arange(SIDE).double()[:, None] * waves
    half = torch.cat([half.sin(), half.cos()], 1)
    rows, columns = half.repeat_interleave(SIDE, 0), half.repeat(SIDE, 1)
    return torch.cat([columns, rows], 1)


def is_image(name):
    parts = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae")
    return any(part in name for part in parts)


# --- the method -------------------------------------------------------------------------------


class Reference:
    """The loss of one update, from the rollout's records and three sets of weights."""

    def __init__(self, built, rollout, rewards, old, start):
        self.old, self.start = old, start
        self.known = {}
        recipe = built.recipe
        self.recipe, self.codec = recipe, built.policy.codec
        self.text, self.image = text_of(rollout), image_of(rollout)
        self.prompts = rollout.prompts
        self.width = recipe.group.fan_out[0]
        self.per_thought = recipe.group.fan_out[1]
        self.image_rewards = rewards.double()
        self.text_rewards = self.image_rewards.view(-1, self.per_thought).mean(1)
        self.level = recipe.image.scheduler.noise_level
        u = torch.linspace(1, 0, STEPS + 1).double()
        self.grid = SHIFT * u / (1 + (SHIFT - 1) * u)
        self.guidance = recipe.image.guidance
        self.penalties = {
            slot.use: (slot.weight, getattr(slot, "on", None))
            for slot in (*recipe.text.regularizers, *recipe.image.regularizers)
        }

    def advantage(self, rewards, size):
        groups = rewards.view(-1, size)
        std = groups.std(1, keepdim=True, correction=0)
        return ((groups - groups.mean(1, keepdim=True)) / (std + 1e-6)).clamp(-5, 5).flatten()

    def thought(self, row):
        return self.text.tokens[row][self.text.mask[row]].tolist()

    def prompt(self, row):
        words = self.prompts[row // self.width].text
        return [BOS, *self.codec.tokenizer.encode(words, add_special_tokens=False), EOS]

    def context(self, row):
        thought = self.thought(row)
        return [*self.prompt(row), BOS, *thought, *([] if thought[-1] == EOS else [EOS])]

    def logps(self, w, row):
        return token_logps(w, self.prompt(row), self.thought(row), self.recipe.text.temperature)

    def point(self, w, image, k):
        """Guided and conditional velocity, mean and std of a trained step."""
        x, stored = self.image.x_t[image, k].double(), self.image.t[image, k].double()
        step = int((self.grid - stored).abs().argmin())
        t, t_next = self.grid[step], self.grid[step + 1]
        assert abs(t - stored) < 1e-6
        assert abs(t_next - self.image.t_next[image, k]) < 1e-6
        conditional = v = velocity(w, self.context(image // self.per_thought), x, t)
        if self.guidance.use == "cfg":
            free = velocity(w, [], x, t)
            v = free + self.guidance.options.scale * (v - free)
        below = 1 - t_next if step == 0 else 1 - t
        sigma, dt = self.level * torch.sqrt(t / below), t_next - t
        mean = x * (1 + sigma**2 / (2 * t) * dt)
        mean = mean + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        return v, conditional, mean, sigma * torch.sqrt(-dt)

    def fixed(self, function, w, *place):
        """What weights that do not change give at a place, computed once."""
        name = (function.__name__, id(w), *place)
        if name not in self.known:
            self.known[name] = function(w, *place)
        return self.known[name]

    def loss(self, w, rows):
        """Total and figures for the thoughts ``rows``; ``w`` alone has gradient."""
        found = dict.fromkeys(("text", "image", *self.penalties), 0.0)
        advantage = self.advantage(self.text_rewards, self.width)
        clip = self.recipe.text.objective.options.clip_range
        for row in rows:
            logps = self.logps(w, row)
            ratio = torch.exp(logps - self.fixed(self.logps, self.old, row))
            a = advantage[row]
            value = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            found["text"] = found["text"] + value.mean() / len(rows)
            if "text_kl" in self.penalties:
                gap = self.fixed(self.logps, self.start, row) - logps
                found["text_kl"] += (gap.exp() - gap - 1).mean() / len(rows)
        size = self.width * self.per_thought
        by = 1 if self.recipe.image.group_by == "prompt" else self.width
        advantage = self.advantage(self.image_rewards, size // by)
        images = [r * self.per_thought + i for r in rows for i in range(self.per_thought)]
        steps = self.image.t.shape[1]
        count = len(images) * steps
        seen = w
        if not self.recipe.image.context_gradient:
            seen = {name: x if is_image(name) else x.detach() for name, x in w.items()}
        for image in images:
            for k in range(steps):
                v, conditional, mean, std = self.point(seen, image, k)
                v_start, conditional_start, mean_start, _ = self.fixed(
                    self.point, self.start, image, k
                )
                old_mean = self.fixed(self.point, self.old, image, k)[2]
                value = self.flow_value(image, k, mean, old_mean, std, advantage[image])
                found["image"] = found["image"] + value / count
                if "velocity_mse" in self.penalties:
                    guided = self.penalties["velocity_mse"][1] == "transition"
                    gap = v - v_start if guided else conditional - conditional_start
                    found["velocity_mse"] += gap.pow(2).mean() / count
                if "latent_kl" in self.penalties:
                    gap = (mean - mean_start).pow(2).mean() / (2 * std**2)
                    found["latent_kl"] += gap / count
        weights = {"text": self.recipe.text.weight, "image": self.recipe.image.weight}
        weights |= {name: weight for name, (weight, _) in self.penalties.items()}
        return sum(weights[name] * value for name, value in found.items()), found

    def flow_value(self, image, k, mean, old_mean, std, a):
        options = self.recipe.image.objective.options
        x_next = self.image.x_next[image, k].double()
        log_ratio = ((x_next - old_mean).pow(2) - (x_next - mean).pow(2)).mean() / (2 * std**2)
        clip = options.clip_range
        if options.ratio_norm:
            drift = (old_mean - mean).pow(2).mean()
            log_ratio = std * (log_ratio + drift / (2 * std**2))
            clip = 5.1e-4 / math.sqrt(mean.numel())
        ratio = torch.exp(log_ratio)
        return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)


# --- the comparison ---------------------------------------------------------------------------


def weights_of(policy, folder):
    policy.save(folder)
    state = load_file(folder / "ema.safetensors")
    return {name: x.double() for name, x in state.items() if "pos_embed" not in name}


def perturb(policy):
    """Away from the reference, so that no penalty is 0 at the first update."""
    with torch.no_grad():
        for expert in policy.parameters().values():
            for name, p in expert.items():
                noise = Key(("cross", name)).normal(p.shape)
                p += 0.01 * torch.from_numpy(noise).to(p)


def gradients(policy):
    return {
        name.removeprefix("network."): None if p.grad is None else p.grad.double().clone()
        for expert in policy.parameters().values()
        for name, p in expert.items()
    }


TWICE = "updates={count=2, data='repeat'}"
KL = "{use='latent_kl', weight=0.05}"
CASES = {
    "the paper's": (),
    "repeat, guided, every penalty": (
        TWICE,
        "image.guidance={use='cfg', scale=2.0}",
        f"image.regularizers=[{{use='velocity_mse', weight=0.5, on='conditional'}}, {KL}]",
        "text.regularizers=[{use='text_kl', weight=0.1}]",
        "image.weight=0.7",
        "image.window.size=2",
    ),
    "disjoint, two images a thought, context detached": (
        "updates={count=2, data='disjoint'}",
        "group.fan_out=[2, 2]",
        "image.group_by='siblings'",
        "image.noise_scope='thought'",
        "image.context_gradient=false",
        "text.temperature=0.7",
        "text.max_tokens=4",
        "text.weight=1.3",
        "compute.replay_tokens=100",
    ),
    "repeat, plain ratio, clipped gradients": (
        TWICE,
        "image.objective.ratio_norm=false",
        "image.objective.clip_range=1e-3",
        f"image.regularizers=[{KL}]",
        "image.window={use='fixed', steps=[0, 3]}",
        "optimizer.max_grad_norm=0.1",
    ),
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_formulas(case, tmp_path):
    (tmp_path / "cross.toml").write_text(RECIPE.replace("BASE", str(BASE)))
    resolved = load_recipe(tmp_path / "cross.toml", load_catalog(), list(CASES[case]))
    built = build_setup(resolved)
    policy, recipe = built.policy, built.recipe
    start = weights_of(policy, tmp_path / "start")
    updater = Updater(built)
    perturb(policy)

    key = Key((3, "cross"))
    chosen = built.source.train(3, 0, recipe.prompts)
    trained = built.window.steps(built.training.steps, key.child("window"), 1)
    rollout = sample(
        built, chosen, Plan(recipe.episode, recipe.group.fan_out, built.training, trained), key
    )
    scores = score(built.rewards, episodes(rollout, "cross"), details=False)
    found = tuple(advantages(built, rollout, scores, level) for level in (0, 1))
    data = build_train_set(built, rollout, found, scores.total, key)

    seen = []  # weights and gradients at every update
    step = updater.optimizer.step

    def recorded():
        before = weights_of(policy, tmp_path / f"before-{len(seen)}")
        seen.append((before, gradients(policy)))
        step()

    updater.optimizer.step = recorded
    metrics = updater(data)

    rows = list(range(len(text_of(rollout).tokens)))
    old = seen[0][0]
    reference = Reference(built, rollout, scores.total, old, start)
    for number, (before, gradient) in enumerate(seen):
        w = {name: x.clone().requires_grad_() for name, x in before.items()}
        half = len(rows) // 2
        mine = rows
        if recipe.updates.data == "disjoint" and recipe.updates.count == 2:
            mine = rows[number * half : (number + 1) * half]
        total, figures = reference.loss(w, mine)
        total.backward()
        norms = compare(gradient, {n: x.grad for n, x in w.items()}, recipe.optimizer.max_grad_norm)
    assert len(seen) == recipe.updates.count
    names = {"text": "text/loss", "image": "image/loss", "text_kl": "text/text_kl"}
    for name, value in figures.items():
        shown = metrics[names.get(name, f"image/{name}")]
        assert shown == pytest.approx(float(value.detach()), rel=1e-7, abs=1e-8), name
    assert metrics["text/grad_norm"] == pytest.approx(norms[0], rel=1e-5)
    assert metrics["image/grad_norm"] == pytest.approx(norms[1], rel=1e-5)
    if len(seen) == 2:
        assert 0 < metrics["text/clip_fraction"] < 1
        assert 0 < metrics["image/clip_fraction"] < 1
        moved(seen, {False: recipe.text.lr, True: recipe.image.lr})


def compare(gradient, expected, bound):
    """Every weight's gradient, clipped expert by expert; returns the norms before clipping."""
    norms = []
    for image in (False, True):
        names = [n for n in sorted(expected) if is_image(n) == image]
        norm = math.sqrt(sum(float(expected[n].square().sum()) for n in names))
        for n in names:
            clipped = expected[n] * min(1.0, bound / norm)
            away = float((gradient[n] - clipped).norm())
            assert away <= 2e-5 * float(clipped.norm()) + 2e-6 * min(norm, bound), n
        norms.append(norm)
    return norms


def moved(seen, rates):
    """The first step of Adam moves a weight by its rate against the gradient's sign."""
    (before, gradient), (after, _) = seen
    for name, g in gradient.items():
        if name in before:
            step = -rates[is_image(name)] * g / (g.abs() + 1e-8)
            assert (after[name] - before[name] - step).abs().max() <= 1e-6, name
