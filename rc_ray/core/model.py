"""The base LLM, and adapters that act on it at run time or folded in.

Any number of adapters act on one shared base, whose linear layers run theirs while they act.

Letters: B batch, T tokens, H hidden size, R rank, K adapters, L adapted linear layers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rc_ray.core.adapters import Adapter
from rc_ray.core.fused_lora import mixed_linear
from rc_ray.errors import ArtifactError


class AdapterMix:
    """Adapters that act together: per linear layer the sum of `weight * scale * b @ a`.

    Args:
        adapters: K adapters; a layer that an adapter lacks gets nothing from it.
        weights: (L, K), one row per name in `modules`; None gives every adapter weight 1.
            May require a gradient.
    """

    def __init__(self, adapters: Sequence[Adapter], weights: Tensor | None = None) -> None:
        self.modules = sorted({name for adapter in adapters for name in adapter.modules})
        self.num_adapters = len(adapters)
        self.weights = weights
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        self._owner: dict[str, Tensor] = {}
        for name in self.modules:
            owned = [(k, ad.modules[name]) for k, ad in enumerate(adapters) if name in ad.modules]
            self._a[name] = torch.cat([pair.a for _, pair in owned])  # (sum R, in)
            self._b[name] = torch.cat([pair.b * pair.scale for _, pair in owned], dim=1)
            self._owner[name] = torch.tensor(
                [k for k, pair in owned for _ in range(pair.a.shape[0])]
            )
        self._row = {name: row for row, name in enumerate(self.modules)}

    def to(self, device: torch.device, dtype: torch.dtype) -> AdapterMix:
        """Move the matrices; weights stay in their own precision."""
        for store in (self._a, self._b):
            for name in store:
                store[name] = store[name].to(device, dtype)
        self._owner = {name: owner.to(device) for name, owner in self._owner.items()}
        return self

    def with_weights(self, weights: Tensor) -> AdapterMix:
        """The same matrices under other weights (L, K)."""
        other = object.__new__(AdapterMix)
        other.__dict__.update(self.__dict__)
        other.weights = weights
        return other

    def update(self, name: str, x: Tensor) -> Tensor:
        """What the adapters add to the output of linear layer `name`: (..., in) -> (..., out)."""
        weights = self._row_weights(name).to(x.dtype)
        return ((x @ self._a[name].T) * weights) @ self._b[name].T

    def output(self, name: str, linear: nn.Linear, x: Tensor) -> Tensor:
        """Linear layer `name` with the update added: (..., in) -> (..., out)."""
        weights = self._row_weights(name)
        return mixed_linear(x, linear, self._a[name], self._b[name], weights)

    def _row_weights(self, name: str) -> Tensor:
        """The weight of each row of A: (sum R,)."""
        owner = self._owner[name]
        if self.weights is None:
            return torch.ones(len(owner), device=owner.device)
        return self.weights[self._row[name]][owner]


@dataclass(frozen=True)
class LanguageModel:
    """A frozen base LLM with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @contextmanager
    def using(self, mix: AdapterMix | None) -> Iterator[None]:
        """Let a mix act on the forward passes inside the block; None is the bare base."""
        if mix is None:
            yield
            return
        mix.to(self.device, self.dtype)
        linears: dict[str, Any] = dict(_linears(self.model, mix.modules))
        replaced = {name: vars(linear).get("forward") for name, linear in linears.items()}
        for name, linear in linears.items():
            is_plain = type(linear) is nn.Linear and replaced[name] is None

            def forward(
                x: Tensor,
                name: str = name,
                linear: Any = linear,
                base: Any = None if is_plain else linear.forward,
            ) -> Tensor:
                if base is None:
                    return mix.output(name, linear, x)
                output: Tensor = base(x) + mix.update(name, x)
                return output

            linear.forward = forward
        try:
            yield
        finally:
            for name, linear in linears.items():
                del linear.forward
                if replaced[name] is not None:
                    linear.forward = replaced[name]

    @contextmanager
    def folded(self, adapter: Adapter | None) -> Iterator[None]:
        """Add an adapter into the weights inside the block, for passes at the base's own cost.

        The original weights are kept and put back bit for bit.
        """
        linears = _linears(self.model, list(adapter.modules)) if adapter else {}
        originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                pair = adapter.modules[name]  # type: ignore[union-attr]
                a, b = (x.to(self.device, torch.float32) for x in (pair.a, pair.b))
                folded = linear.weight.detach().float() + pair.scale * (b @ a)
                linear.weight.data.copy_(folded)
            yield
        finally:
            for name, original in originals.items():
                linears[name].weight.data.copy_(original)

    def lower_states(
        self, num_layers: int, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Hidden states after the first `num_layers` layers: (B, T) tokens -> (B, T, H).

        Adapters that leave these layers alone all share them.
        """
        layers = _layers(self.model)[:num_layers]
        part = _decoder_part(self.model, layers, norm=nn.Identity())
        output = part(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        states: Tensor = output.last_hidden_state
        return states

    def upper_hidden(
        self, num_layers: int, states: Tensor, position_ids: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Last hidden states from what `lower_states` gave: (B, T, H) -> (B, T, H)."""
        layers = _layers(self.model)[num_layers:]
        part = _decoder_part(self.model, layers, norm=self.model.get_decoder().norm)
        output = part(
            inputs_embeds=states, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def cached_hidden(
        self, cache: Cache, input_ids: Tensor, position_ids: Tensor, mask: Tensor
    ) -> Tensor:
        """Last hidden states of tokens that follow those in a cache, which they join.

        Args:
            cache: keys and values of L tokens.
            input_ids: (B, T).
            position_ids: (B, T).
            mask: (B, 1, T, L + T) bool, True where the row may look.

        Returns:
            (B, T, H).
        """
        output = self.model.get_decoder()(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def output_rows(self, vocabulary_ids: Tensor) -> Tensor:
        """(V, H) rows of the output projection, in fp32."""
        return output_rows(self.model, vocabulary_ids)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_decoder().layers)


def _decoder_part(
    model: PreTrainedModel, layers: Sequence[nn.Module], norm: nn.Module
) -> nn.Module:
    """A decoder that shares the model's weights and runs some of its layers."""
    part: nn.Module = copy.copy(model.get_decoder())
    part._modules = {**part._modules, "layers": nn.ModuleList(layers), "norm": norm}
    return part


def checkpoint_activations(model: nn.Module, enabled: bool) -> None:
    """Let every decoder layer keep its input alone and compute the rest anew in the backward pass.

    Transformers' own switch would make the embeddings ask for a gradient, and with them every
    frozen layer below the first adapted one.

    Raises:
        ValueError: the model's layers do not support it.
    """
    for layer in _layers(base_of(model)):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = enabled
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        elif enabled:
            raise ValueError(
                f"`activation_checkpointing`: {type(layer).__name__} cannot be computed anew; set "
                "it to false and lower `micro_batch_size` instead"
            )


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, out of its PEFT model if it is in one."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def decoder_hidden(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Hidden states before the output projection.

    Args:
        model: a causal LM, or a PEFT model around one.
        input_ids: (B, T).
        position_ids: (B, T); None counts from 0.
        mask: (B, 1, T, T) bool, True where the row may look; None is plain causal attention,
            under which padding on the right needs no mask.
        lengths: of the texts in the one row, instead of a mask; the model needs packed attention
            (core/packed_attention.py).
    """
    further: dict[str, Any] = {}
    if lengths is not None:
        # A mask of four axes is passed on unread; without one transformers would build its own.
        mask, further = torch.empty(1, 1, 0, 0, device=input_ids.device), {"lengths": lengths}
    output = base_of(model).get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=False,
        **further,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def output_rows(model: nn.Module, vocabulary_ids: Tensor) -> Tensor:
    """(V, H) rows of a causal LM's output projection, detached, in fp32."""
    weight: Tensor = base_of(model).get_output_embeddings().weight
    return weight.detach()[vocabulary_ids.to(weight.device)].float()


def _linears(model: PreTrainedModel, names: Sequence[str]) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ArtifactError(
                f"the adapter is for another model: there is no linear layer {name}"
            )
        if module is model.get_output_embeddings():
            # Its rows are read as they are, and it may share its weights with the embedding.
            raise ArtifactError(
                f"the adapter changes the output projection {name}, which ranking reads without "
                "adapters; train one that leaves it alone"
            )
        found[name] = module
    return found
