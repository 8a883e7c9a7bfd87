"""Merges of LoRA adapters by formula: weighted sums, and the entry to every fixed method.

`sum_k w_k s_k B_k A_k` is the product of the A's stacked by rows and the scaled B's side by side
(LoRA soups, arXiv 2410.13025); its rank is the sum of the ranks. Averaging the A's and B's apart,
as some tools do, is not the sum of the updates.

Letters: R rank, K adapters, L adapted linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.compression import compressed, truncated
from rc_ray.core.knots import knots
from rc_ray.core.sparsified import sparsified_updates
from rc_ray.errors import ArtifactError, ConfigError
from rc_ray.mix_config import FixedMix


def concatenate(adapters: Sequence[Adapter], weights: Mapping[str, Sequence[float]]) -> Adapter:
    """One LoRA equal to the weighted sum of several.

    Args:
        adapters: K adapters; ranks, scales and adapted layers may differ.
        weights: layer name -> K weights.

    Raises:
        ValueError: a layer has no weights, or not K of them.
    """
    modules = {}
    for name in layers_of(adapters):
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
    return {name: [1.0 / len(adapters)] * len(adapters) for name in layers_of(adapters)}


def layers_of(adapters: Sequence[Adapter]) -> list[str]:
    """Names of the layers that any of the adapters changes, sorted."""
    return sorted({name for adapter in adapters for name in adapter.modules})


def merge_fixed(
    adapters: Sequence[Adapter], config: FixedMix, seed: int, rank: int | None = None
) -> Adapter:
    """Merge adapters by formula; `merge_fixed_measured` also tells what the rank cost."""
    return merge_fixed_measured(adapters, config, seed, rank)[0]


def merge_fixed_measured(
    adapters: Sequence[Adapter], config: FixedMix, seed: int, rank: int | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Merge adapters by formula, as one LoRA.

    - `linear`, `task_arithmetic` (arXiv 2212.04089, section 2): `sum_k w_k dW_k`, exact.
    - `ties`, `dare_linear`, `dare_ties`: see `sparsified_updates`. Their result is of full rank;
      the LoRA is its truncated SVD. A rank of a layer's smaller side keeps it whole.
    - `knots`: see `knots`, exact.
    - `peft_linear`: see `peft_linear`.

    Args:
        adapters: K adapters of one base; ranks, scales and adapted layers may differ. One that
            lacks a layer has the update 0 there, and the weights of the others stay.
        config: method and settings; weights that it leaves out are 1/K, for `task_arithmetic` 1.
        seed: of DARE's choice.
        rank: largest rank of a layer in the result; None: the sum of the ranks.

    Returns:
        The LoRA, and by layer the Frobenius norm of its difference from the method's result over
        that of the result; 0 where it is exact.

    Raises:
        ArtifactError: the adapters are of different bases.
        ConfigError: there are not K weights, or the method needs equal ranks.
        ValueError: there are no adapters, or the rank is below 1.
    """
    if not adapters:
        raise ValueError("a merge needs at least one adapter")
    _check_shapes(adapters)
    weights = fixed_weights(config, len(adapters))
    if config.method in ("ties", "dare_linear", "dare_ties"):
        modules, errors = {}, {}
        for name, delta in sparsified_updates(adapters, weights, config, seed):
            ranks = [ad.modules[name].a.shape[0] for ad in adapters if name in ad.modules]
            modules[name], errors[name] = truncated(delta, sum(ranks) if rank is None else rank)
        return Adapter(modules), errors
    if config.method == "knots":
        merged = knots(adapters, weights, config)
    elif config.method == "peft_linear":
        merged = peft_linear(adapters, weights)
    else:
        merged = concatenate(adapters, dict.fromkeys(layers_of(adapters), weights))
    if rank is None:
        return merged, dict.fromkeys(merged.modules, 0.0)
    return compressed(merged, rank)


def fixed_weights(config: FixedMix, num_adapters: int) -> list[float]:
    """The weights of a fixed merge, one per adapter.

    Raises:
        ConfigError: the configuration has another number of them.
    """
    if config.weights is None:
        weight = 1.0 if config.method == "task_arithmetic" else 1.0 / num_adapters
        return [weight] * num_adapters
    if len(config.weights) != num_adapters:
        raise ConfigError(
            f"`weights` of the mix `{config.method}` has {len(config.weights)} values for "
            f"{num_adapters} adapters; give one for each (spirit, ingredient, neighbours)"
        )
    return list(config.weights)


def peft_linear(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """PEFT's `add_weighted_adapter(combination_type="linear")`, for comparison.

    `A = sum_k sign(w_k s_k) sqrt(|w_k s_k|) A_k` and `B = sum_k sqrt(|w_k s_k|) B_k`: their product
    has terms `B_j A_k` of one adapter's B and another's A, and depends on how each adapter's update
    is split into A and B. One adapter stays itself; K equal ones at weights 1/K become K times
    themselves. PEFT copies `use_rslora` from the first adapter and thereby multiplies the result by
    the root of the rank; here it is not.

    Raises:
        ConfigError: the adapters of a layer have different ranks.
    """
    modules = {}
    for name in layers_of(adapters):
        owned = [
            (adapter.modules[name], weight * adapter.modules[name].scale)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        ranks = [int(pair.a.shape[0]) for pair, _ in owned]
        if len(set(ranks)) > 1:
            raise ConfigError(
                f"`method: peft_linear` needs adapters of one rank, those of layer {name} have "
                f"{', '.join(map(str, ranks))}; take `method: linear`, which is exact"
            )
        parts = [(pair, math.sqrt(abs(w)), math.copysign(1.0, w)) for pair, w in owned]
        modules[name] = LoraPair(
            a=torch.stack([pair.a * (root * sign) for pair, root, sign in parts]).sum(dim=0),
            b=torch.stack([pair.b * root for pair, root, _ in parts]).sum(dim=0),
            scale=1.0,
        )
    return Adapter(modules)


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    for name in layers_of(adapters):
        shapes = {
            (int(pair.b.shape[0]), int(pair.a.shape[1]))
            for pair in (ad.modules[name] for ad in adapters if name in ad.modules)
        }
        if len(shapes) > 1:
            told = " and ".join(f"{out} x {fan_in}" for out, fan_in in sorted(shapes))
            raise ArtifactError(
                f"the adapters are for different base models: layer {name} is {told} in them; "
                "merge adapters of one base"
            )
