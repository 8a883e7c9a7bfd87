from __future__ import annotations

import numpy as np
import pyarrow as pa

from rc_ray.core.hashing import below, fractions, keyed_hashes, purpose_key, stream
from rc_ray.core.pairs import PairSet


def test_streams_are_those_of_splitmix64() -> None:
    # Rosetta Code, "Pseudo-random numbers/Splitmix64", seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    seeds = np.array([1234567, 7], dtype=np.uint64)
    assert stream(seeds, 0, 5)[0].tolist() == expected
    assert stream(seeds, 2, 3)[0].tolist() == expected[2:]


def test_hashes_depend_on_text_and_key_alone() -> None:
    names = ["ann", "bob", "é", ""]
    whole = keyed_hashes(names, 3, "shop")
    assert whole.dtype == np.uint64
    assert len(set(whole.tolist())) == 4
    assert keyed_hashes(names[::-1], 3, "shop").tolist() == whole[::-1].tolist()
    assert keyed_hashes(pa.array(names), 3, "shop").tolist() == whole.tolist()
    chunked = pa.chunked_array([names[:1], names[1:]])
    assert keyed_hashes(chunked, 3, "shop").tolist() == whole.tolist()
    for key in ((4, "shop"), (3, "shops"), ("3shop",)):
        assert not set(keyed_hashes(names, *key).tolist()) & set(whole.tolist())
    assert keyed_hashes([], 1).shape == (0,)
    assert purpose_key("test", "warm") != purpose_key("test", "cold")


def test_numbers_of_hashes_are_even() -> None:
    hashes = keyed_hashes([f"u{i}" for i in range(40_000)], 1)
    assert abs(fractions(hashes).mean() - 0.5) < 0.006  # standard deviation .0014
    counts = np.bincount(below(hashes, 10))
    assert len(counts) == 10
    assert np.abs(counts - 4000).max() < 250  # standard deviation 60
    assert below(hashes[:3], np.array([1, 2, 3])).tolist()[0] == 0


def test_a_pair_set_is_a_set() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 50_000, 4000)
    asked = rng.integers(0, 50_000, (300, 40))
    members = set(keys.tolist())
    expected = [[key in members for key in row] for row in asked.tolist()]
    assert PairSet(keys).holds(asked).tolist() == expected
    assert not PairSet(keys[:0]).holds(asked).any()
