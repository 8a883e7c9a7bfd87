"""Delta algebra of LoRA adapters: weighted sums kept as one LoRA, exactly, by concatenation.

`sum_k w_k s_k B_k A_k` is the product of the A's stacked by rows and the scaled B's side by side
(LoRA soups, arXiv 2410.13025); its rank is the sum of the ranks. Averaging the A's and B's apart,
as some tools do, is not the sum of the updates.

Letters: R rank, K adapters, L adapted linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rc_ray.core.adapters import Adapter, LoraPair


def concatenate(adapters: Sequence[Adapter], weights: Mapping[str, Sequence[float]]) -> Adapter:
    """One LoRA equal to the weighted sum of several.

    Args:
        adapters: K adapters; ranks, scales and adapted layers may differ.
        weights: layer name -> K weights.

    Raises:
        ValueError: a layer has no weights, or not K of them.
    """
    modules = {}
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        row = weights.get(name)
        if row is None or len(row) != len(adapters):
            raise ValueError(f"layer {name} needs {len(adapters)} weights, one per adapter")
        present = [
            (adapter.modules[name], weight)
            for adapter, weight in zip(adapters, row, strict=True)
            if name in adapter.modules
        ]
        modules[name] = LoraPair(
            a=torch.cat([pair.a for pair, _ in present]),  # (sum R, in)
            b=torch.cat([pair.b * (pair.scale * weight) for pair, weight in present], dim=1),
            scale=1.0,
        )
    return Adapter(modules)


def uniform_weights(adapters: Sequence[Adapter]) -> dict[str, list[float]]:
    """Weight 1/K for each of K adapters in every layer that any of them adapts."""
    names = sorted({name for adapter in adapters for name in adapter.modules})
    return {name: [1.0 / len(adapters)] * len(adapters) for name in names}
