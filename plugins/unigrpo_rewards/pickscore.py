"""PickScore v1: which picture people would pick for a prompt, by a CLIP-H finetuned on their picks.

Mathematics
    s(text, image) = exp(logit_scale) * cos(E_text(text), E_image(image)) / scale
    Kirstain et al. 2023, arXiv 2305.01569, Eq 1, with scale = 1. A difference of 1 between two
    published scores is odds of e for the pick; real pictures get about 18 to 24. flow_grpo divides
    by 26 "to norm to 0-1", which brings good ones near 0.9 but bounds nothing; here it is the
    default. The range declared is the exact bound, +-exp(logit_scale) / scale of the checkpoint at
    hand (exp(logit_scale) is about 100: +-3.85).

Pictures
    The published processor works on bytes: the shorter side to 224 by PIL's bicubic, the middle
    224 x 224 cut out, (x - mean) / std. The same is computed here in torch on the device, with
    values rounded to bytes where PIL rounds (before, after the columns and after the rows), so
    that a value is the published one but for ties, where it may be one byte step off (on noise
    none to 0.3 % of the values, on smooth pictures none to 1.5 %). The published one is PIL's.

Gradients
    They reach the images; rounding is passed straight through, and nothing passes where the
    bicubic filter leaves [0, 1].

Deviations from the published example
    1. logit_scale is read as float32 also where the rest computes in bf16 or float16, which would
       round exp(logit_scale) by about a percent. The cosine is float32 too.
    2. Texts are padded to the model's full length, and each distinct one is encoded once. The
       text encoder is causal, so what stands after the end token changes nothing.
    3. Texts of more than 77 tokens are cut, as published; ``details`` says which ("truncated").
    4. Pixels, as said under Pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Reward
from unigrpo_core.plugin import (
    Field,
    Files,
    HubPath,
    Options,
    Provider,
    fetched_folder,
    local_folder,
)
from unigrpo_core.records import RewardBatch
from unigrpo_rewards.clip_pixels import Pixels, read_pixels

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, device
    from transformers import CLIPModel, PreTrainedTokenizerBase

MODEL_FILES = Files(("config.json", "model.safetensors"))
PROCESSOR_FILES = Files(
    ("preprocessor_config.json",),
    either=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    optional=("tokenizer_config.json", "special_tokens_map.json"),
)


class PickScoreOptions(Options):
    checkpoint: HubPath = Field(
        description="the model (published: yuvalkirstain/PickScore_v1, 4 GB), config.json and "
        "model.safetensors: a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub"
    )
    processor: HubPath = Field(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        description="tokenizer and preprocessor_config.json: a folder or an id of the hub",
    )
    scale: float = Field(
        26.0, gt=0, description="what the published score is divided by; 26 as flow_grpo, 1: none"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto is cuda if there is any, else cpu",
    )
    precision: Literal["float32", "bf16", "float16"] = Field(
        "float32", description="the type the encoders compute in"
    )
    batch_size: int = Field(32, ge=1, description="images, or texts, encoded at once")


class PickScore(Reward):
    """exp(logit_scale) * cosine / scale; float32, within ``range``."""

    reads: ClassVar[frozenset[str]] = frozenset({"prompt", "image"})

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        pixels: Pixels,
        scale: float,
        batch_size: int,
    ) -> None:
        """``model`` is in its type and on its device but for ``logit_scale``: float32."""
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels
        self.batch_size = batch_size
        config: Any = model.config
        self.longest: int = config.text_config.max_position_embeddings  # 77 as published
        self.factor = model.logit_scale.exp().item() / scale
        self.range = (-self.factor, self.factor)  # type: ignore[misc]

    def score(self, batch: RewardBatch) -> Tensor:
        """float32 [B].

        Raises:
            ValueError: the episodes have no image.
        """
        if batch.images is None:
            raise ValueError("the reward 'pickscore' reads an image, and the episode draws none")
        texts = [prompt.text for prompt in batch.prompts]
        distinct = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(distinct)}
        said = self.texts(distinct)[[place[text] for text in texts]]
        cosine = (said * self.images(batch.images)).sum(1).clamp(-1, 1)
        return (self.factor * cosine).to(batch.images.device)

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        """ "truncated": 1 where the prompt is longer than the model reads, else 0."""
        import torch

        texts = [prompt.text for prompt in batch.prompts]
        counts = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        return {"truncated": (torch.tensor(counts) > self.longest).float()}

    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, D], of length 1: the texts' embeddings."""
        import torch

        found = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding="max_length",
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            ).to(self.model.device)
            pooled = self.model.text_model(**tokens).pooler_output
            found.append(self.model.text_projection(pooled).float())
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def images(self, images: Tensor) -> Tensor:
        """float32 [B, D], of length 1: the embeddings of images [B, 3, H, W] in [0, 1]."""
        import torch

        compute = self.model.visual_projection.weight.dtype
        found = []
        for part in torch.split(images, self.batch_size):
            pixels = self.pixels(part.to(self.model.device)).to(compute)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            found.append(self.model.visual_projection(pooled).float())
        return torch.nn.functional.normalize(torch.cat(found), dim=1)


def build(options: PickScoreOptions) -> PickScore:
    """Loads, and downloads what is not there.

    Raises:
        UserError: files are missing, damaged or of another model; there is no such device.
    """
    import torch
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

    place = _device(options.device)
    processor = fetched_folder("processor", options.processor, PROCESSOR_FILES)
    pixels = read_pixels(processor / "preprocessor_config.json")
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(str(processor), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(
            f"processor: the tokenizer in {processor} cannot be read: {error}"
        ) from error
    model = _load(fetched_folder("checkpoint", options.checkpoint, MODEL_FILES))
    config: Any = model.config
    side, words = config.vision_config.image_size, config.text_config.vocab_size
    if pixels.side != side or len(tokenizer) > words:
        raise UserError(
            f"the processor {options.processor} makes images of {pixels.side} pixels and ids below "
            f"{len(tokenizer)}, the checkpoint {options.checkpoint} takes {side} and ids below "
            f"{words}; give the processor that belongs to it"
        )
    compute = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
    exact = model.logit_scale.data
    model.train(False).requires_grad_(False).to(place, compute[options.precision])
    model.logit_scale.data = exact
    return PickScore(model, tokenizer, pixels, options.scale, options.batch_size)


def _load(folder: Path) -> CLIPModel:
    """The model in float32 on the CPU, every weight from the file."""
    import json

    import torch
    from transformers import CLIPModel

    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f'config.json says "model_type": {kind!r}, expected "clip"')
        with _without_bars():
            loaded: Any = CLIPModel.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # those of the file formats and of three libraries
        raise UserError(
            f"checkpoint: {folder} cannot be loaded as a CLIP model: {error}"
        ) from error
    model, told = loaded
    extra = [name for name in told["unexpected_keys"] if not name.endswith("position_ids")]
    for names, what in ((told["missing_keys"], "lacks"), (extra, "has, and CLIP has not,")):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise UserError(f"checkpoint: {folder} {what} {len(names)} weights: {first} ...")
    return model  # type: ignore[no-any-return]


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' progress bar would stand between what a run prints."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _device(name: str) -> device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = torch.device(name)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r}: torch finds {torch.cuda.device_count()} CUDA devices here; "
            "say cpu or auto"
        )
    return wanted


def notes(options: PickScoreOptions) -> Sequence[str]:
    said = []
    for option, path, files in (
        ("checkpoint", options.checkpoint, MODEL_FILES),
        ("processor", options.processor, PROCESSOR_FILES),
    ):
        try:
            local_folder(option, path, files)
        except UserError as error:
            said.append(str(error))
    return said


PROVIDER = Provider(
    name="pickscore",
    options=PickScoreOptions,
    build=build,
    notes=notes,
    differentiable=True,
    summary="PickScore v1: which picture people would pick for a prompt (CLIP-H); differentiable",
    cite="Kirstain et al. 2023, arXiv 2305.01569",
)
