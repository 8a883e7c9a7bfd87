"""LoRAs of several domains side by side on one frozen base, each acting on its own tokens.

Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rc_ray.core.adapters import Adapter, LoraPair, adapter_of
from rc_ray.core.fused_lora import lora_linear
from rc_ray.core.trainable_lora import with_lora
from rc_ray.errors import ArtifactError
from rc_ray.training_config import LoraConfig


class LoraBank:
    """Trainable LoRAs of one shape on one model.

    Inside `tokens` a forward pass sends each token through the LoRA that it belongs to; elsewhere
    the model is the bare base. A LoRA begins with the values that `with_lora` gives it.

    Args:
        model: the frozen base, which carries the bank until `unload()`.
        config: rank, scale and layers of every LoRA.
        seeds: by the LoRA's name, that of its first values.

    Raises:
        ValueError: the configuration has dropout or does not fit the model.
    """

    def __init__(
        self, model: PreTrainedModel, config: LoraConfig, seeds: Mapping[str, int]
    ) -> None:
        # Dropout draws from one stream of random numbers: a domain would see its neighbours.
        dropout = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        if config.dropout or getattr(model.config, "attention_dropout", 0.0) or any(dropout):
            raise ValueError(
                "dropout ties together what several domains' LoRAs learn side by side; set "
                "`lora.dropout` to 0 (and the model's own, if it has any), or train the domains "
                "apart"
            )
        first = {seed: _first_values(model, config, seed) for seed in set(seeds.values())}
        self._scale = config.alpha / config.rank
        self._linears: dict[str, nn.Linear] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name in next(iter(first.values())).modules
        }
        self._pairs: dict[str, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        for name, seed in seeds.items():
            self._pairs[name] = {}
            for layer, linear in self._linears.items():
                pair = first[seed].modules[layer]
                a, b = (nn.Parameter(m.clone().to(linear.weight.device)) for m in (pair.a, pair.b))
                self._pairs[name][layer] = (a, b)
        self._counts: tuple[tuple[str, int], ...] = ()
        for layer, linear in self._linears.items():
            linear.forward = self._forward(layer, linear)  # type: ignore[method-assign, assignment]

    def parameters(self, name: str) -> nn.ParameterList:
        """One LoRA's matrices in the order of a PEFT model's: by layer, A before B."""
        return nn.ParameterList(self.matrices(name).values())

    def matrices(self, name: str) -> dict[str, nn.Parameter]:
        """One LoRA's matrices by `<layer>.lora_A` and `<layer>.lora_B`."""
        return {
            f"{layer}.{kind}": matrix
            for layer, pair in self._pairs[name].items()
            for kind, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
        }

    def adapter(self, name: str) -> Adapter:
        """A copy of one LoRA as it is now, in fp32 on the processor."""
        modules = {}
        for layer in sorted(self._pairs[name]):
            a, b = (
                m.detach().to("cpu", torch.float32, copy=True) for m in self._pairs[name][layer]
            )
            modules[layer] = LoraPair(a=a, b=b, scale=self._scale)
        return Adapter(modules)

    def load(self, name: str, adapter: Adapter) -> None:
        """Put an adapter's values in the place of one LoRA's.

        Raises:
            ArtifactError: it adapts other layers or is of another rank.
        """
        if adapter.modules.keys() != self._linears.keys():
            raise ArtifactError(f"the adapter of {name} is for other layers than this run adapts")
        for layer, pair in adapter.modules.items():
            for own, value in zip(self._pairs[name][layer], (pair.a, pair.b), strict=True):
                if own.shape != value.shape:
                    raise ArtifactError(
                        f"the adapter of {name} has a matrix of shape {tuple(value.shape)} in "
                        f"layer {layer}, expected {tuple(own.shape)}"
                    )
                with torch.no_grad():
                    own.copy_(value)

    def remove(self, name: str) -> None:
        """Forget one LoRA."""
        del self._pairs[name]

    @contextmanager
    def tokens(self, counts: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Say whose the tokens of the passes inside the block are, forward and backward.

        Args:
            counts: names and numbers of neighbouring tokens, row by row; they add up to B * T. A
                name may come several times.
        """
        self._counts = tuple(counts)
        try:
            yield
        finally:
            self._counts = ()

    def unload(self) -> None:
        """Give the model its own layers back."""
        for linear in self._linears.values():
            del linear.forward

    def _forward(self, layer: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not self._counts:
                return nn.functional.linear(x, linear.weight, linear.bias)
            pairs = [self._pairs[name][layer] for name, _ in self._counts]
            num_tokens = tuple(count for _, count in self._counts)
            return lora_linear(x, linear, pairs, self._scale, num_tokens)

        return forward


def _first_values(model: PreTrainedModel, config: LoraConfig, seed: int) -> Adapter:
    peft_model = with_lora(model, config, seed)
    try:
        return adapter_of(peft_model)
    finally:
        peft_model.unload()
