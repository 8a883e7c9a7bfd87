"""Choices by keyed hashes: what looks random depends on an id and a key, never on other rows.

A running generator would give every user other negatives as soon as one row is added. Here each id
is hashed once with a key, and streams of numbers follow from that hash.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def keyed_hashes(values: Any, *key: object) -> Hashes:
    """One 64-bit SipHash per text; equal texts and keys give equal hashes on every machine.

    Args:
        values: (N,) strings: a sequence, or an Arrow array or chunked array without nulls.
        key: what the hash is for, e.g. the seed, the domain and a word.

    Returns:
        (N,) hashes, uniform over 64 bits.
    """
    from pandas.util import hash_array  # slow to import, and only `prepare` hashes

    if hasattr(values, "to_numpy"):
        texts = np.asarray(values.to_numpy(zero_copy_only=False), dtype=object)
    else:
        texts = np.array(list(values), dtype=object)
    if not len(texts):
        return np.zeros(0, dtype=np.uint64)
    secret = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).hexdigest()
    hashes: Hashes = hash_array(texts, hash_key=secret, categorize=False)
    return hashes


def purpose_key(*key: object) -> np.uint64:
    """A 64-bit constant for a purpose, to be mixed into hashes that exist already."""
    text = "\x1f".join(map(str, key)).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection that spreads bits."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _MIX_1
        values = (values ^ (values >> np.uint64(27))) * _MIX_2
        return values ^ (values >> np.uint64(31))


def stream(seeds: Hashes, start: int, num: int) -> Hashes:
    """Numbers `start` to `start + num` of each seed's SplitMix64 stream.

    Args:
        seeds: (N,) one 64-bit seed per stream.
        start: place of the first number.
        num: how many.

    Returns:
        (N, num) hashes.
    """
    places = np.arange(start + 1, start + num + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return mixed(seeds[:, None] + places[None, :] * _GOLDEN)


def fractions(hashes: Hashes) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1), 53 bits each."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(hashes: Hashes, bounds: npt.NDArray[np.int64] | int) -> npt.NDArray[np.int64]:
    """Hashes as whole numbers in [0, bounds); bounds up to 2**31, bias below 2**-32."""
    high = hashes >> np.uint64(32)
    with np.errstate(over="ignore"):
        return ((high * np.asarray(bounds).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
