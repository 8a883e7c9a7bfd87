"""What is learned when weights are learned: which linear layers share them, how they are bounded.

Letters: L adapted linear layers, G groups of them, K adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rc_ray.mix_config import Granularity

_NEARLY_ALL = 0.99
"""Where a single adapter's sigmoid starts: at 1 itself it would have no slope."""


def groups_of(modules: Sequence[str], granularity: Granularity) -> Tensor:
    """The group, 0 to G - 1, of each linear layer: (L,).

    Args:
        modules: names as `named_modules()` spells them, such as `model.layers.3.mlp.up_proj`.
        granularity: what shares its weights. A name that tells no decoder layer is a layer of its
            own; a projection is the last part of a name.
    """
    keys = [_group(name, granularity) for name in modules]
    number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([number[key] for key in keys], dtype=torch.long)


def _group(name: str, granularity: Granularity) -> str:
    if granularity == "model":
        return ""
    if granularity == "projection":
        return name.rpartition(".")[2]
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return layer.group(1) if granularity == "layer" and layer else name


class Parametrisation:
    """Free numbers (G, K) -> the weights (L, K) of every linear layer.

    `softmax`: lambda = softmax(w / T), w starts at 0. `sigmoid`: lambda = sigmoid(w / T). `free`:
    lambda = w. All three start at the uniform mix, lambda = 1/K; with a single adapter the sigmoid,
    which cannot reach 1, starts at 0.99, and the softmax is 1 whatever w.

    Args:
        modules: names of the linear layers.
        num_adapters: K.
        granularity: what shares its weights.
        kind: `softmax`, `sigmoid` or `free`.
        temperature: T; `free` has none.
    """

    def __init__(
        self,
        modules: Sequence[str],
        num_adapters: int,
        granularity: Granularity,
        kind: Literal["softmax", "sigmoid", "free"],
        temperature: float = 1.0,
    ) -> None:
        self.groups = groups_of(modules, granularity)
        self.shape = (int(self.groups.max()) + 1, num_adapters)
        self.kind = kind
        self.temperature = temperature

    def start(self) -> Tensor:
        """(G, K) of the uniform mix."""
        share = 1.0 / self.shape[1]
        if self.kind == "free":
            return torch.full(self.shape, share)
        if self.kind == "softmax":
            return torch.zeros(self.shape)
        share = min(share, _NEARLY_ALL)
        return torch.full(self.shape, self.temperature * math.log(share / (1.0 - share)))

    def weights(self, parameters: Tensor) -> Tensor:
        """(G, K) -> (L, K), differentiable."""
        if self.kind == "softmax":
            parameters = torch.softmax(parameters / self.temperature, dim=-1)
        elif self.kind == "sigmoid":
            parameters = torch.sigmoid(parameters / self.temperature)
        return parameters[self.groups.to(parameters.device)]
