"""LoRAs of a smaller rank, and LoRAs out of dense updates, with the error that this costs.

The best approximation of rank R in the Frobenius norm keeps the R largest singular values (Eckart
and Young 1936), and its error is the root of the sum of the squares of the others. For a LoRA they
come out of a matrix of rank by rank; the update itself is never formed.

Letters: R rank, O output size, I input size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter, LoraPair

_OVERSAMPLING = 16
_NUM_POWER_ITERATIONS = 4


def compressed(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """An adapter whose layers have at most a given rank.

    Args:
        adapter: a layer whose rank is not above `rank` stays as it is.
        rank: at least 1.

    Returns:
        The adapter, and by layer the Frobenius norm of what was dropped over that of the update,
        between 0 and 1, exact but for rounding.

    Raises:
        ValueError: the rank is below 1.
    """
    _check_rank(rank)
    modules, errors = {}, {}
    for name, pair in sorted(adapter.modules.items()):
        if pair.a.shape[0] <= rank:
            modules[name], errors[name] = pair, 0.0
            continue
        u, s, vt = product_svd(pair.b * pair.scale, pair.a)
        modules[name] = split_evenly(u, s, vt, rank)
        errors[name] = _share(float(s[rank:].norm()), float(s.norm()))
    return Adapter(modules), errors


def truncated(delta: Tensor, rank: int) -> tuple[LoraPair, float]:
    """A LoRA near a dense update.

    Where the rank is far below the matrix's sizes, by a randomised SVD with power iterations (Halko
    and others, arXiv 0909.4061, algorithms 4.4 and 5.1) of a fixed seed.

    Args:
        delta: (O, I).
        rank: at least 1; one of min(O, I) or more loses nothing.

    Returns:
        The LoRA, and the Frobenius norm of its difference from `delta` over that of `delta`,
        measured.

    Raises:
        ValueError: the rank is below 1.
    """
    _check_rank(rank)
    width = rank + _OVERSAMPLING
    if 2 * width >= min(delta.shape):
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(delta.shape[1], width, generator=generator, dtype=delta.dtype)
        basis = torch.linalg.qr(delta @ start.to(delta.device)).Q  # (O, width)
        for _ in range(_NUM_POWER_ITERATIONS):
            across = torch.linalg.qr(delta.T @ basis).Q
            basis = torch.linalg.qr(delta @ across).Q
        u, s, vt = torch.linalg.svd(basis.T @ delta, full_matrices=False)
        u = basis @ u
    pair = split_evenly(*_signed(u, s, vt), rank)
    error = _share(float((delta - pair.b @ pair.a).norm()), float(delta.norm()))
    return pair, error


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `b @ a` without the product: QR of both, then the SVD of their small core.

    Args:
        b: (O, R).
        a: (R, I).

    Returns:
        U (O, N), the singular values (N,) from large to small, and V^T (N, I), in fp64, where N is
        the least of O, R and I. In each row of V^T the entry farthest from 0 is positive.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _signed(q_b @ u, s, vt @ q_a.T)


def split_evenly(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> LoraPair:
    """The `rank` largest components as a LoRA in fp32; A and B get the root of each value."""
    root = s[:rank].sqrt()
    return LoraPair(
        a=(root[:, None] * vt[:rank]).float(), b=(u[:, :rank] * root).float(), scale=1.0
    )


def _signed(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same decomposition with the sign of every component settled."""
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))  # (N, 1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(vt.dtype)
    return u * sign.T, s, vt * sign


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank {rank}: must be at least 1")
