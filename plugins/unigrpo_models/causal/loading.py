"""From a folder to a model of transformers, in full or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as _logging

from unigrpo_core.errors import UserError
from unigrpo_core.loading import said
from unigrpo_models.causal.files import CONFIG, weight_files

logging: Any = _logging


def read_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in a folder, with weights of this type on this device, in evaluation mode.

    Raises:
        UserError: the folder has no causal language model, or not all of its weights.
    """
    config = _config(folder)
    kind = _causal_class(config, folder)
    weight_files(folder)
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # the library's, safetensors', torch's
        raise UserError(f"the model in {folder} cannot be loaded: {said(error)}") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors of {type(model).__name__}, the "
            f"first {missing[0]}; download or copy them again"
        )
    placed: PreTrainedModel = model.to(device).eval()
    return placed


def ends_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a text: those of the generation config, else of the config."""
    for config in (model.generation_config, model.config.get_text_config()):
        found: Any = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def forget_sampling(model: PreTrainedModel) -> None:
    """Drops what its authors wrote on sampling, which the library may refuse to save, and which
    nothing here reads."""
    config: Any = GenerationConfig
    model.generation_config = config(eos_token_id=list(ends_of(model)) or None)


def _config(folder: Path) -> Any:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: it is no model that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # an unknown model, JSON, code that would have to run
        raise UserError(
            f"{folder / CONFIG} is not that of a model that this transformers knows (code that "
            f"comes with a model is not run): {said(error)}"
        ) from error


def _causal_class(config: Any, folder: Path) -> type:
    """The class of a causal language model, if that is what was saved."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    classes = found if isinstance(found, tuple) else (found,)
    saved = list(config.architectures or ())
    names = [each.__name__ for each in classes if each is not None]
    if not names or (saved and not set(saved) & set(names)):
        what = ", ".join(saved) or config.model_type
        raise UserError(
            f"{folder} holds {what}, which is no causal language model"
            f"{f' ({names[0]} would be)' if names else ''}; give one whose config.json names a "
            "class such as Qwen3ForCausalLM"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{folder} holds quantized weights; give the ones they were made from")
    return next(each for each in classes if each is not None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's bars and reports; what matters of them is an error here."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
