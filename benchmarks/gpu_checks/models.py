"""Random models on the device, as policies, and the seams through which they are varied.

The module is also a plugin (see :func:`unigrpo_policies`), so that a recipe's policy can be such a
model.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unigrpo_board.make_checkpoint import write_tokenizer
from unigrpo_models.bagel.latents import unpatchify
from unigrpo_models.bagel.network import BagelNetwork, PositionTable
from unigrpo_models.bagel.policy import BagelPolicy
from unigrpo_models.bagel.tokens import Codec
from unigrpo_models.painters.policy import PainterPolicy

from gpu_checks.harness import UnavailableError
from gpu_checks.scales import FILLED, SCALES, Scale
from unigrpo_core.interfaces import Policy
from unigrpo_core.plugin import Field, Options, Placement, Provider, hookimpl
from unigrpo_core.records import Prompt, ReplayBatch, TextSegment

EXPERTS = frozenset({"text", "image"})
IMAGE = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RandomBagel(BagelPolicy):
    """Without an autoencoder: an image is what three channels of its latents look like, since the
    step that is measured wants some image, and the autoencoder has a case of its own."""

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        with torch.no_grad():
            grid = unpatchify(self.network.config.latent, latents)[:, :3]
            return (F.interpolate(grid, size) * 0.5 + 0.5).clamp(0, 1)


def random_policy(
    scale: Scale, device: torch.device, *, train: frozenset[str] = frozenset(), rank: int = 0
) -> BagelPolicy:
    """A policy with weights from N(0, .02), norms 1, made on the device. With ``rank`` the experts
    are trained through adapters. What is trained is float32, all else of the compute type.

    Raises:
        UnavailableError: the package has no adapters.
    """
    gc.collect()  # of models before it, which hold references to themselves
    place = Placement(device, scale.compute, train)
    adapters = {"lora": _lora(rank)} if rank else {}
    with torch.device("meta"):
        network = BagelNetwork(scale.config)
    whole = frozenset() if rank else train
    generator = torch.Generator(device).manual_seed(0)
    state = {
        name: _random(name, parameter, whole, place, generator)
        for name, parameter in network.named_parameters()
    }
    table = PositionTable(scale.config.latent.max_size, scale.config.llm.hidden_size).pos_embed
    state["latent_pos_embed.pos_embed"] = table.detach().to(device, scale.compute)
    network.load_state_dict(state, assign=True)
    codec, folder = codec_of(scale)
    return RandomBagel(network, codec, folder, place, **adapters)


def _random(
    name: str,
    parameter: nn.Parameter,
    whole: frozenset[str],
    place: Placement,
    generator: torch.Generator,
) -> Tensor:
    expert = "image" if any(word in name for word in IMAGE) else "text"
    dtype = torch.float32 if expert in whole else place.compute
    weight = torch.empty(parameter.shape, dtype=dtype, device=place.device)
    if "norm" in name:
        return weight.fill_(1.0)
    return weight.normal_(0.0, 0.02, generator=generator)


def _lora(rank: int) -> Any:
    try:
        from unigrpo_models.adapters import Lora
    except ImportError as error:
        raise UnavailableError("this version of the package has no adapters") from error
    return Lora(rank, 2 * rank, dict.fromkeys(sorted(EXPERTS), PROJECTIONS))


def codec_of(scale: Scale) -> tuple[Codec, Path]:
    """A tokenizer of whole words, most of which nobody says, and the folder that it was read
    from, which is gone again."""
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name))
        llm = scale.config.llm
        codec = Codec.read(Path(name), llm.vocab_size, llm.max_position_embeddings, "")
    free = min(FILLED, llm.vocab_size) - len(codec.tokenizer)
    codec.tokenizer.add_tokens([f"word{number}" for number in range(free)])
    return codec, Path(name)


# --- seams ------------------------------------------------------------------------------------


def checkpointing(policy: BagelPolicy, mode: str) -> None:
    """Chooses what a backward computes again.

    Raises:
        UnavailableError: the package has no choice, and ``mode`` is not what it does.
    """
    if hasattr(policy.network, "checkpointing"):
        policy.network.checkpointing = mode
    elif mode != "none":
        raise UnavailableError("this version of the package has no activation checkpointing")


class Compiled:
    """The blocks of a network compiled as the package compiles them; a run inside uses them, and
    the network stays as it was for all others.

    Raises:
        UnavailableError: the package does not compile, or it would take too long here.
    """

    def __init__(self, policy: BagelPolicy) -> None:
        if policy.place.device.type == "cpu":
            raise UnavailableError("compiling for a CPU takes longer than this budget")
        try:
            from unigrpo_models.compiled import compile_units
        except ImportError as error:
            raise UnavailableError("this version of the package does not compile") from error
        layers = policy.network.layers
        compile_units(layers[:-1])  # as the policy does: the last has passes of its own
        # torch has no public way back from Module.compile(); this attribute is what it sets.
        self.calls = [(layer, layer._compiled_call_impl) for layer in layers]
        self._set(on=False)

    def _set(self, *, on: bool) -> None:
        for layer, call in self.calls:
            layer._compiled_call_impl = call if on else None

    def __call__(self, run: Callable[[], Any]) -> Any:
        self._set(on=True)
        try:
            return run()
        finally:
            self._set(on=False)


# --- inputs -----------------------------------------------------------------------------------


def prompts(scale: Scale, count: int) -> tuple[Prompt, ...]:
    """Different prompts of ``scale.prompt`` tokens, their two ends included."""
    words = ("red", "green", "blue", "circle", "square", "two", "four", "a")

    def text(number: int) -> str:
        digits = [number >> shift & 7 for shift in (0, 3, 6)]
        start = [words[digit] for digit in digits][: scale.prompt - 2]
        return " ".join(start + ["red"] * (scale.prompt - 2 - len(start)))

    return tuple(Prompt(f"p{number}", text(number)) for number in range(count))


def thoughts(policy: BagelPolicy, rows: int, tokens: int) -> TextSegment:
    """Different thoughts that take ``tokens`` tokens with their ends."""
    words = torch.nonzero(policy.codec.allowed(torch.device("cpu")))[:, 0]
    words = words[words != policy.codec.eos]
    generator = torch.Generator().manual_seed(1)
    chosen = words[torch.randint(len(words), (rows, tokens - 1), generator=generator)]
    chosen[:, -1] = policy.codec.eos
    chosen = chosen.to(policy.place.device)
    blank = torch.zeros(chosen.shape, device=chosen.device)
    return TextSegment(chosen, torch.ones_like(chosen, dtype=torch.bool), blank, ("",) * rows)


def replay_batch(
    policy: BagelPolicy, scale: Scale, rows: int, size: str, *, scored: bool = True
) -> ReplayBatch:
    """Chains of different prompts and thoughts with the points of one window each."""
    device, written = policy.place.device, thoughts(policy, rows, scale.thought)
    shape = (rows, scale.window, *policy.latent_shape(scale.sizes[size]))
    t = torch.linspace(0.9, 0.6, scale.window, device=device).expand(rows, -1)
    return ReplayBatch(
        prompts=prompts(scale, rows),
        tokens=written.tokens,
        mask=written.mask,
        temperature=1.0,
        want_logps=scored,
        x_t=torch.randn(shape, device=device),
        t=t,
        branches=(),
        context_gradient=True,
    )


def autocast(policy: BagelPolicy, *, cache: bool = True) -> torch.autocast:
    """As the policy computes."""
    compute, device = policy.place.compute, policy.place.device.type
    return torch.autocast(device, compute, enabled=compute != torch.float32, cache_enabled=cache)


def trained(policy: Policy) -> Sequence[nn.Parameter]:
    owned: Mapping[str, Mapping[str, nn.Parameter]] = policy.parameters()
    return [p for expert in owned.values() for p in expert.values() if p.requires_grad]


# --- plugin -----------------------------------------------------------------------------------


class RandomBagelOptions(Options):
    scale: str = Field(description="7b, eighth or mini")
    lora_rank: int = Field(0, ge=0, description="rank of adapters; 0: whole experts are trained")


def build(options: RandomBagelOptions, place: Placement) -> BagelPolicy:
    scale = SCALES[options.scale]()
    return random_policy(scale, place.device, train=place.train, rank=options.lora_rank)


class RandomSD3Options(Options):
    scale: str = Field(description="7b, eighth or mini")


def build_sd3(options: RandomSD3Options, place: Placement) -> PainterPolicy:
    from gpu_checks.random_sd3 import random_sd3

    return random_sd3(SCALES[options.scale](), place)


@hookimpl
def unigrpo_policies():
    yield Provider(
        name="random_bagel",
        build=build,
        options=RandomBagelOptions,
        summary="random weights of a published size, made on the device",
        provides=("text", "image", "branch:text"),
    )
    yield Provider(
        name="random_sd3",
        build=build_sd3,
        options=RandomSD3Options,
        summary="the same of Stable Diffusion 3's kind",
        provides=("image", "branch:text"),
    )
