"""A LoRA that knows nothing: random matrices as large as those of a trained one.

The control of arXiv 2602.12323: where mixing in a random adapter helps as much as mixing in a
trained one, the trained one's knowledge is not what helps.

Letters: R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter, LoraPair


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """Gaussian matrices of the same shapes, each layer's update with the norm of the original's.

    Args:
        adapter: gives layers, shapes and Frobenius norms.
        seed: of the draw; layers are drawn in the order of their names.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in sorted(adapter.modules):
        pair = adapter.modules[name]
        a = torch.randn(pair.a.shape, generator=generator)
        b = torch.randn(pair.b.shape, generator=generator)
        wanted = abs(pair.scale) * product_norm(pair.b, pair.a)
        modules[name] = LoraPair(a=a, b=b * (wanted / product_norm(b, a)), scale=1.0)
    return Adapter(modules)


def product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of `b @ a`, from (R, R) matrices alone.

    `||BA||^2 = trace(A^T B^T B A) = sum of (B^T B) * (A A^T)`, entry by entry.
    """
    b, a = b.double(), a.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())
