"""Cases 2 to 4: decoding, prefill and denoising, by the calls that the engine makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from unigrpo_models.bagel.accounting import decode_step, prefill, velocity
from unigrpo_models.bagel.decoding import decode_texts
from unigrpo_models.bagel.history import BagelHistory
from unigrpo_models.bagel.policy import BagelPolicy
from unigrpo_models.sampling import draw_tokens, scaled_logits

from gpu_checks.harness import Bench, Entry, Pace, UnavailableError
from gpu_checks.models import Compiled, autocast, prompts, random_policy, thoughts
from gpu_checks.scales import Scale

TURNS = 4  # a quarter of the short thought is decoded in a call
OPENED = 8  # prompts that are read; more rows are copies of them


def decode(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one step of all rows."""
    policy = random_policy(scale, bench.device)
    for rows in scale.decode_rows:
        for ends in ("short", "long"):
            _decode(bench, scale, policy, rows, ends, "")
    del policy
    if not scale.lora_rank:
        bench.skip("adapters", "this size is trained whole")
        return
    with bench.guarded("adapters"):
        both = frozenset(("text", "image"))
        policy = random_policy(scale, bench.device, train=both, rank=scale.lora_rank)
        _decode(bench, scale, policy, scale.decode_rows[-2], "long", "adapters, ")


def _decode(
    bench: Bench, scale: Scale, policy: BagelPolicy, rows: int, ends: str, what: str
) -> None:
    """A call of the package's decoder, and steps of the network alone: launched one by one, and
    as a CUDA graph that is made here."""
    turns = max(TURNS, scale.short // TURNS)
    history = _context(scale, policy, rows, scale.thought - turns if ends == "long" else 0)
    start = max(history.lengths)
    grown = history.grown(start + turns + 2)
    allowed = policy.codec.allowed(bench.device)
    uniform = torch.rand(rows, turns, dtype=torch.float64, device=bench.device)
    step = partial(decode_step, scale.config, rows, itemsize=scale.compute.itemsize)

    @torch.no_grad()
    def package() -> object:
        with autocast(policy):
            return decode_texts(policy.network, policy.codec, grown, allowed, uniform, 1.0)

    name = f"{what}B {rows}, cache {start}"
    alone = Steps(policy, grown, rows, start, turns)
    full = turns + 2  # the decoder also feeds the start and the end
    phase = f"decode/{rows}/{what}{ends}"
    entries = [
        Entry(f"{name}: decoder", package, step(start + full / 2) * full, full, phase),
        Entry(f"{name}: network alone", alone.eager, step(start + turns / 2) * turns, turns),
    ]
    bench.race(
        *entries,
        pace=Pace(min(2, bench.pace.warm), min(3, bench.pace.least), bench.pace.seconds / 4),
    )
    with bench.guarded(f"{name}: network alone, CUDA graph"):
        for sampled in (False, True):
            drawn = ", sampled" if sampled else ""
            run = alone.graph(allowed, uniform[:, 0], sampled=sampled)
            work = step(start + turns + 2) * Steps.REPLAYS
            title = f"{name}: network alone, CUDA graph{drawn}"
            bench.race(Entry(title, run, work, Steps.REPLAYS))


class Steps:
    """Steps of the network over preallocated slots, without the decoder's bookkeeping."""

    REPLAYS = 32

    def __init__(
        self, policy: BagelPolicy, grown: BagelHistory, rows: int, start: int, turns: int
    ) -> None:
        self.policy, self.caches, self.start, self.turns = policy, list(grown.caches), start, turns
        device = policy.place.device
        self.feed = torch.full((rows,), policy.codec.bos, device=device)
        self.place = torch.full((rows,), start, device=device)
        self.padding = torch.zeros(rows, 1, 1, start + turns + 2, device=device)

    @torch.no_grad()
    def eager(self) -> Tensor:
        with autocast(self.policy):
            for turn in range(self.turns):
                seen = self.padding[..., : self.start + turn + 1]
                logits = self._logits(self.place + turn, seen)
        return logits

    def graph(self, allowed: Tensor, uniform: Tensor, *, sampled: bool) -> Callable[[], None]:
        """One step at the last slot, replayed; with ``sampled`` its token is drawn too.

        Raises:
            UnavailableError: there is no CUDA.
        """
        if self.feed.device.type != "cuda":
            raise UnavailableError("CUDA graphs need CUDA")

        def step() -> Tensor:
            logits = self._logits(self.place, self.padding)
            return draw_tokens(scaled_logits(logits, allowed, 1.0), uniform) if sampled else logits

        captured = torch.cuda.CUDAGraph()
        with torch.no_grad(), autocast(self.policy, cache=False):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(captured):
                kept = step()

        def run() -> None:
            assert kept is not None
            for _ in range(self.REPLAYS):
                captured.replay()

        return run

    def _logits(self, place: Tensor, padding: Tensor) -> Tensor:
        network = self.policy.network
        return network.language_model.lm_head(network.step(self.feed, place, self.caches, padding))


def _context(scale: Scale, policy: BagelPolicy, rows: int, thought: int) -> BagelHistory:
    """Rows of text as the engine has them before it writes or draws."""
    count = min(rows, OPENED)
    history = policy.open(prompts(scale, count))
    if thought:
        history = policy.append(history, thoughts(policy, count, thought))
    return history.rows(torch.arange(rows) % count)


def prefilled(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one prompt."""
    policy, count = random_policy(scale, bench.device), scale.projected[0].prompts
    asked = prompts(scale, count)
    work = prefill(scale.config, count, scale.prompt, itemsize=scale.compute.itemsize)
    name = f"{count} prompts of {scale.prompt} tokens"
    bench.race(Entry(name, lambda: policy.open(asked), work, count, "prefill"))


def denoise(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one image in one step, over contexts as sampling makes them, which bf16 pads
    to common widths; and, where they are padded, over contexts of exact length. Only the largest
    batch of a size is compiled too: every shape class may take a minute."""
    policy = random_policy(scale, bench.device)
    compiled = None
    with bench.guarded("compiled"):
        compiled = Compiled(policy)
    for size, batches in scale.images.items():
        for count in batches:
            history = _drawn_over(scale, policy, count)
            x = torch.randn(count, *policy.latent_shape(scale.sizes[size]), device=bench.device)
            t = torch.full((count,), 0.8, device=bench.device)
            tokens, itemsize = scale.latent_tokens(size), scale.compute.itemsize
            work = velocity(scale.config, count, tokens, scale.context, itemsize=itemsize)
            call = partial(policy.velocity, history, x, t)
            name, phase = f"{size} B {count}", f"denoise/{size}"
            entries = [Entry(f"{name}, eager", call, work, count, phase)]
            if compiled is not None and count == batches[-1]:
                run = partial(compiled, call)
                entries.append(Entry(f"{name}, compiled", run, work, count, phase))
            if history.caches[0][0].shape[2] > max(history.lengths):
                exact = partial(policy.velocity, history.filled(history.ids), x, t)
                entries.append(Entry(f"{name}, eager, nothing padded", exact, work, count))
            bench.race(
                *entries,
                pace=Pace(bench.pace.warm, min(3, bench.pace.least), bench.pace.seconds / 2),
            )


def _drawn_over(scale: Scale, policy: BagelPolicy, rows: int) -> BagelHistory:
    """Different texts, so that each image has its own keys and values."""
    history = policy.open(prompts(scale, rows))
    return policy.append(history, thoughts(policy, rows, scale.thought))
