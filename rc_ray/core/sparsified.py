"""Merges on the entries of the updates: TIES and DARE.

Both were made for whole weights: they act on the entries of `s B A`, not on those of A and B, whose
product is the update. The result is of full rank. One linear layer's updates are dense at a time.

Letters: K adapters, O output size, I input size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.mix_config import FixedMix


def sparsified_updates(
    adapters: Sequence[Adapter], weights: Sequence[float], config: FixedMix, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """The merged dense update of one layer after another.

    - `ties` (arXiv 2306.01708, algorithm 1): trim each update, elect the sign of every entry,
      average those that agree. The paper's scale lambda is the sum of the absolute weights.
    - `dare_linear` (arXiv 2311.03099, section 3): drop entries at random and divide the others by
      the density, then add by weight.
    - `dare_ties`: drop in the same way, then elect and average as TIES does, without trimming.

    Which entries DARE drops depends on the seed, the adapter's values and the layer's name, not on
    the adapter's place in the sequence.

    Args:
        adapters: K adapters. One that lacks a layer has the update 0 there: in a sum nothing is
            added and the others keep their weights; in an election it has no vote and no part in
            the average, so that an update that stands alone keeps its strength.
        weights: K. A negative one turns its update round; one of 0 leaves its adapter out.
        config: the method, density and majority.
        seed: of DARE's choice.

    Yields:
        Layer name and (O, I) in fp32.
    """
    draws = _draw_names(adapters) if config.method in ("dare_linear", "dare_ties") else []
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        deltas, present = [], []
        for k, adapter in enumerate(adapters):
            if name not in adapter.modules:
                continue
            delta = dense(adapter.modules[name])
            if config.method == "ties":
                delta = trimmed(delta, config.density)
            else:
                delta = dropped(delta, config.density, _generator(seed, draws[k], name))
            deltas.append(delta)
            present.append(weights[k])
        if config.method == "dare_linear":
            merged = torch.zeros_like(deltas[0])
            for weight, delta in zip(present, deltas, strict=True):
                merged.add_(delta, alpha=weight)
        else:
            merged = elected_mean(deltas, present, config.majority_sign)
            merged *= sum(abs(weight) for weight in weights)
        yield name, merged


def dense(pair: LoraPair) -> Tensor:
    """The update `scale * b @ a` in fp32: (O, I)."""
    return (pair.b.float() @ pair.a.float()).mul_(pair.scale)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """TIES' first step: the share `density` of the entries that lie farthest from 0, the rest 0."""
    num_kept = max(1, int(density * delta.numel()))
    if num_kept == delta.numel():
        return delta
    sizes = delta.abs()
    least = sizes.flatten().kthvalue(delta.numel() - num_kept + 1).values
    return torch.where(sizes >= least, delta, 0.0)


def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: each entry is kept with probability `density` and divided by it, the rest is 0.

    Args:
        delta: any shape; the expectation of the result.
        density: above 0; 1 keeps everything.
        generator: on the processor, whatever the device of `delta`.
    """
    if density == 1.0:
        return delta
    kept = torch.empty(delta.shape).bernoulli_(density, generator=generator).to(delta.device)
    return delta * kept.div_(density)


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float], majority_sign: str) -> Tensor:
    """TIES' second and third step: elect each entry's sign, average what has that sign.

    `total` elects the sign of the weighted sum. `frequency` elects the sign that more updates have;
    where as many are for either, the weighted sum decides. An entry whose sum is 0 has no sign and
    becomes 0.

    Args:
        deltas: of equal shape; an entry of 0 has no vote and no part in the average.
        weights: one per update. A negative one turns its update round.
        majority_sign: `total` or `frequency`.

    Returns:
        The mean of the entries that have the elected sign, weighted by the absolute weights.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    elected = reduce(torch.add, weighted).sign()
    if majority_sign == "frequency":
        votes = reduce(torch.add, (part.sign() for part in weighted))
        elected = torch.where(votes != 0, votes.sign(), elected)
    agreed, shares = torch.zeros_like(elected), torch.zeros_like(elected)
    for part, weight in zip(weighted, weights, strict=True):
        agrees = (part.sign() == elected) & (part != 0)
        agreed += torch.where(agrees, part, 0.0)
        shares += agrees * abs(weight)
    return torch.where(shares > 0, agreed / shares, 0.0)


def _draw_names(adapters: Sequence[Adapter]) -> list[str]:
    """A name of each adapter by its values; those of equal values are numbered."""
    seen: Counter[str] = Counter()
    names = []
    for adapter in adapters:
        digest = hashlib.sha256()
        for name, pair in sorted(adapter.modules.items()):
            digest.update(f"{name} {tuple(pair.a.shape)} {pair.scale!r}".encode())
            for matrix in (pair.a, pair.b):
                digest.update(matrix.detach().cpu().float().contiguous().numpy().tobytes())
        names.append(f"{digest.hexdigest()} {seen[digest.hexdigest()]}")
        seen[digest.hexdigest()] += 1
    return names


def _generator(seed: int, *key: str) -> torch.Generator:
    text = "\x1f".join((str(seed), *key)).encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)
