"""KnOTS: updates in one basis, merged there by TIES.

Letters: K adapters, R rank, N singular values, O output size, I input size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.compression import product_svd
from rc_ray.core.sparsified import elected_mean, trimmed
from rc_ray.mix_config import FixedMix

_NEGLIGIBLE = 1e-8
"""A direction with less than this share of the largest singular value is rounding: dropped."""


def knots(adapters: Sequence[Adapter], weights: Sequence[float], config: FixedMix) -> Adapter:
    """Merge by KnOTS with TIES (arXiv 2410.19735).

    With `[dW_1 .. dW_K] = U S [V_1 .. V_K]` side by side, U is a basis of the outputs that all
    adapters share. TIES merges the `S V_k`, and U brings the result back. As in the authors' code S
    stands with the V_k while they are trimmed; elections and averages are the same without it. The
    SVD is that of `[B_1 .. B_K]` times the block diagonal of the A's, so nothing as large as the
    updates is formed, and the result is an exact LoRA of rank N, at most the sum of the ranks.

    Args:
        adapters: K adapters. One that lacks a layer has V_k = 0 there: no vote and no part in the
            average.
        weights: K, with TIES' meaning (`sparsified_updates`). They do not enter the basis, so that
            an adapter of weight 0 still has a part in it.
        config: density and majority.
    """
    strength = sum(abs(weight) for weight in weights)
    modules = {}
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        owned = [
            (adapter.modules[name], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        b = torch.cat([pair.b.double() * pair.scale for pair, _ in owned], dim=1)  # (O, sum R)
        a = torch.block_diag(*(pair.a.double() for pair, _ in owned))  # (sum R, K I)
        u, s, vt = product_svd(b, a)
        num_kept = max(1, int((s > s[0] * _NEGLIGIBLE).sum()))
        aligned = (s[:num_kept, None] * vt[:num_kept]).chunk(len(owned), dim=1)  # K of (N, I)
        merged = elected_mean(
            [trimmed(part, config.density) for part in aligned],
            [weight for _, weight in owned],
            config.majority_sign,
        )
        modules[name] = LoraPair(
            a=(merged * strength).float(), b=u[:, :num_kept].float().contiguous(), scale=1.0
        )
    return Adapter(modules)
