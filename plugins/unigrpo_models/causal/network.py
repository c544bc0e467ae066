"""A causal language model of transformers: its passes, and the units that it is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Checkpointing
from unigrpo_models.recompute import recomputed


class CausalNetwork:
    """The model as decoder and head: sampler and trainer compute by the same two calls."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        self._words = inspect.signature(model.base_model.forward).parameters
        # Before transformers 5 a cache was called by what it holds.
        self._cache = "cache" if "cache" in self._words else "past_key_values"
        self.units = _units(model, config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Final hidden states [B, L, D] of ids [B, L], which see what is in the cache, and are
        added to it.

        Args:
            mask: int64 [B, cached + L], 0 where there is padding; None: nowhere.
            positions: int64 [B, L]; None: those after the cache's.
        """
        asked: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
        asked = {word: x for word, x in asked.items() if x is not None and word in self._words}
        if cache is not None:
            asked[self._cache] = cache
        found = self.model.base_model(input_ids=ids, use_cache=cache is not None, **asked)
        hidden: Tensor = found[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D]."""
        model: Any = self.model
        logits: Tensor = model.get_output_embeddings()(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    @torch.no_grad()
    def check_head(self) -> None:
        """Whether these logits are the model's own.

        Raises:
            UserError: its head does something else besides.
        """
        ids = torch.tensor([[0, 1, 2]], device=self.device)
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        mine = self.logits(self.hidden(ids)).float()
        size = float(own.abs().max())
        if not torch.allclose(mine, own, atol=1e-2 * size, rtol=0, equal_nan=True):
            raise UserError(
                f"the head of {type(self.model).__name__} is not a product of hidden states and "
                "weights, scaled or softly capped or not, so its log-probs cannot be "
                "computed in parts; this model needs a policy of its own"
            )

    def recompute(self, mode: Checkpointing) -> None:
        """From now on a backward computes the units' activations again, as ``mode`` says. The
        library's own way would ask for training mode, and so for dropout."""
        for unit in self.units if mode != "none" else ():
            unit.forward = partial(_forward, mode, unit.forward)


def _forward(mode: Checkpointing, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return recomputed(mode, run, *args, **kwargs)


def _units(model: nn.Module, layers: int) -> list[nn.Module]:
    """The decoder's layers: the outermost list of as many modules as the config says."""
    lists = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == layers]
    return list(lists[0]) if lists else []
