"""What a recipe may say: one frozen class per table, every key described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from unigrpo_core.plugin import Checkpointing, RecipePath
from unigrpo_core.recipe.slots import (
    AdvantageSlot,
    FlowRegularizerSlot,
    GuidanceSlot,
    ImageObjectiveSlot,
    MonitorSlot,
    PolicySlot,
    PromptsSlot,
    RegularizerSlot,
    RewardSlot,
    SchedulerSlot,
    Slot,
    Table,
    TextObjectiveSlot,
    WindowSlot,
)

Count = Annotated[int, Field(ge=1)]
Expert = Literal["text", "image"]
Segment = Literal["think", "draw"]
NoiseScope = Literal["episode", "thought", "prompt"]

EXPERTS: tuple[Expert, ...] = ("text", "image")
EXPERT_OF: dict[Segment, Expert] = {"think": "text", "draw": "image"}


class Ema(Table):
    decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="what is left of the moving average of the weights at every rollout, in "
        "[0, 1); 0: no average is kept",
    )
    slope: float = Field(
        0.0,
        ge=0,
        description="after rollout i the decay is at most slope x i, so that the average follows "
        "at first; 0: the decay from the start",
    )
    sample: bool = Field(
        False, description="whether rollouts are sampled by the average, which then is the old"
    )


class Group(Table):
    fan_out: tuple[Count, ...] = Field(
        (12, 1),
        min_length=1,
        description="how many continuations each row has, one number >= 1 per segment; "
        "their product is the group size",
    )
    equal: Literal["keep", "drop", "resample"] = Field(
        "keep",
        description="what becomes of prompts whose episodes all have the same reward, and so teach "
        "nothing: they stay, or are dropped, or others are sampled in their place",
    )
    resample_rounds: int = Field(
        3, ge=1, description="further rollouts of a step at most, to fill dropped places"
    )


class Turns(Table):
    text: int = Field(ge=1, description="steps that train the text expert alone, which come first")
    image: int = Field(ge=1, description="steps after them that train the image expert alone")


class Updates(Table):
    count: int = Field(2, ge=1, description="optimizer steps per rollout")
    data: Literal["disjoint", "repeat"] = Field(
        "disjoint",
        description="each update trains on its own share of the prompts, or all on all of them",
    )
    turns: Turns | None = Field(
        None, description="the experts train in turns of so many steps; absent: in every step"
    )


class Text(Table):
    weight: float = Field(1.0, ge=0, description="factor of the text loss in the total")
    lr: float = Field(1e-6, gt=0, description="learning rate of the text expert")
    max_tokens: int = Field(1024, ge=1, description="longest thought in tokens, its end included")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    group_by: Literal["prompt"] = Field("prompt", description="whom a thought is compared with")
    objective: TextObjectiveSlot | None = Field(None, description="loss on the sampled tokens")
    regularizers: tuple[RegularizerSlot, ...] = Field((), description="penalties per token")


class Image(Table):
    weight: float = Field(1.0, ge=0, description="factor of the image loss in the total (lambda)")
    lr: float = Field(3e-5, gt=0, description="learning rate of the image expert")
    size: tuple[Count, Count] = Field((512, 512), description="height and width in pixels")
    noise_scope: NoiseScope = Field(
        "episode", description="which episodes start from the same initial noise"
    )
    group_by: Literal["prompt", "siblings"] = Field(
        "prompt",
        description="whom an image is compared with: all of its prompt, or all of its thought",
    )
    context_gradient: bool = Field(
        True, description="whether the image loss also trains the text expert through the context"
    )
    objective: ImageObjectiveSlot | None = Field(None, description="loss on velocities")
    scheduler: SchedulerSlot | None = Field(None, description="time grid and kernel of sampling")
    window: WindowSlot | None = Field(None, description="which steps are stochastic, so trained")
    guidance: GuidanceSlot | None = Field(None, description="use of unconditional velocities")
    regularizers: tuple[FlowRegularizerSlot, ...] = Field((), description="penalties per point")


class Optimizer(Table):
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = Field((0.9, 0.999), description="Adam's decay rates, each in [0, 1)")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm bound of each expert")
    warmup_updates: int = Field(
        0, ge=0, description="updates of linear learning-rate warm-up, of each expert"
    )
    signal_every: int = Field(
        0,
        ge=0,
        description="steps between measurements of how much of the gradients is signal, at the "
        "price of a copy of them; 0: never",
    )


class View(Table):
    """A further evaluation of the same weights on the same prompts. What it does not state is as in
    the evaluation."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="lower-case letters, digits and _")
    episode: tuple[Segment, ...] | None = Field(None, description="the segments of an episode")
    thoughts: Literal["own", "swapped"] = Field(
        "own",
        description='what is drawn: each prompt by its own thought, or ("swapped") by that of '
        "another prompt, to see whether the image follows the thought",
    )
    scheduler: SchedulerSlot | None = Field(None, description="time grid and kernel of sampling")
    guidance: GuidanceSlot | None = Field(None, description="use of unconditional velocities")

    def over(self, main: View) -> View:
        """The view with what it does not state taken from another."""
        open_ = [key for key in type(self).model_fields if getattr(self, key) is None]
        return self.model_copy(update={key: getattr(main, key) for key in open_})


class Evaluation(Table):
    every: int = Field(20, ge=0, description="steps between; 0: only at the start and the end")
    prompts: int = Field(128, ge=1, description="held-out prompts during the run")
    final_prompts: int = Field(512, ge=1, description="held-out prompts at the start and the end")
    sheet: int = Field(6, ge=0, description="episodes on the sample sheet; 0: no sheet")
    episode: tuple[Segment, ...] | None = Field(
        None, description="the segments of an evaluated episode; as in training when absent"
    )
    scheduler: SchedulerSlot | None = Field(None, description="time grid and kernel of sampling")
    guidance: GuidanceSlot | None = Field(None, description="use of unconditional velocities")
    views: tuple[View, ...] = Field(
        (), description="further evaluations of the same weights, at the start and the end"
    )


class Compute(Table):
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto is cuda if there is any, else cpu (mps lacks "
        "the float64 that sampling needs)",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="the type models compute in; trained weights are float32"
    )
    threads: int = Field(1, ge=0, description="CPU threads; 0 leaves torch's choice")
    rollout_rows: int = Field(256, ge=1, description="rows sampled at once")
    rollout_images: int | None = Field(
        None, ge=1, description="images denoised at once, if fewer than rollout_rows"
    )
    replay_tokens: int = Field(16384, ge=1, description="tokens of one replay batch at most")
    checkpointing: Checkpointing = Field(
        "none",
        description="activations that a backward computes again to save memory: none, selective "
        "(all but products and attention) or full",
    )
    compile: bool = Field(False, description="whether the model's blocks go through torch.compile")
    cuda_graphs: bool = Field(
        False, description="whether a GPU replays the decoding of text as CUDA graphs"
    )
    reference: Literal["device", "host"] = Field(
        "device", description="where the reference's weights wait: beside the model, or on its host"
    )


class Plugins(Table):
    require: tuple[str, ...] = Field(
        (),
        description="distributions of plugins that must be installed, with versions as pip takes "
        'them: "unigrpo-reward-colorfulness>=0.1"',
    )
    disable: tuple[str, ...] = Field(
        (), description="installed distributions whose plugins are not there for this recipe"
    )


class Recipe(Table):
    """A whole recipe, ``extends`` resolved."""

    title: str = Field("", pattern=r"^[^\r\n]*$", description="one line for listings")
    seed: int = Field(0, ge=0, description="seed of every draw")
    steps: int = Field(60, ge=0, description="training steps; each is one rollout")
    episode: tuple[Segment, ...] = Field(
        ("think", "draw"), min_length=1, description="the segments of an episode"
    )
    train: tuple[Expert, ...] = Field(
        ("text", "image"), description="the experts to train; the others are frozen"
    )
    prompts: int = Field(12, ge=1, description="prompts per rollout")
    group: Group = Field(default_factory=Group.defaults)
    updates: Updates = Field(default_factory=Updates.defaults)
    ema: Ema = Field(default_factory=Ema.defaults)
    budget: str = Field(
        "",
        pattern=r"^((cpu|wall):[1-9]\d*s)?$",
        description="seconds of training, of the CPU or of the wall, after which a run ends if "
        'steps have not: "cpu:120s"; empty: none',
    )
    start: RecipePath = Field(
        "", description="folder of a run whose final weights to start from; empty: none"
    )
    after: RecipePath = Field(
        "",
        description="recipe whose run comes first, this one starting from its final weights: "
        "`unigrpo ablate` runs both, and alone it needs that run's folder in start; empty: none",
    )
    policy: PolicySlot = Field(description="the model")
    source: PromptsSlot = Field(description="where prompts come from")
    rewards: tuple[RewardSlot, ...] = Field(min_length=1, description="what episodes are scored by")
    monitors: tuple[MonitorSlot, ...] = Field(
        (), description="rewards that evaluations score too, and that are never trained on"
    )
    advantage: AdvantageSlot | None = Field(None, description="from rewards to advantages")
    text: Text = Field(default_factory=Text.defaults)
    image: Image = Field(default_factory=Image.defaults)
    optimizer: Optimizer = Field(default_factory=Optimizer.defaults)
    evaluation: Evaluation = Field(default_factory=Evaluation.defaults)
    compute: Compute = Field(default_factory=Compute.defaults)
    plugins: Plugins = Field(default_factory=Plugins.defaults)

    def trained(self, step: int) -> frozenset[Expert]:
        """The experts that a step trains, the first being step 1."""
        turns = self.updates.turns
        if turns is None:
            return frozenset(self.train)
        return frozenset(
            {"text" if (step - 1) % (turns.text + turns.image) < turns.text else "image"}
        )

    @property
    def views(self) -> tuple[View, ...]:
        """All evaluations, each with what it leaves to the evaluation filled in; the evaluation
        itself, without a name, is the first."""
        main = View.model_construct(
            name="",
            episode=self.evaluation.episode or self.episode,
            scheduler=self.evaluation.scheduler,
            guidance=self.evaluation.guidance,
        )
        return (main, *(view.over(main) for view in self.evaluation.views))


def slots(table: Table, above: str = "") -> Iterator[tuple[str, Slot]]:
    """Every slot of a recipe that is filled, with its dotted path."""
    for key in type(table).model_fields:
        value = getattr(table, key)
        path = f"{above}{key}"
        if isinstance(value, Slot):
            yield path, value
            if isinstance(value, PolicySlot):
                yield from ((f"{path}.{name}", part) for name, part in value.parts.items())
        elif isinstance(value, Table):
            yield from slots(value, f"{path}.")
        elif isinstance(value, tuple):
            for place, item in enumerate(value):
                if isinstance(item, Slot):
                    yield f"{path}.{place}", item
                elif isinstance(item, Table):
                    yield from slots(item, f"{path}.{place}.")
