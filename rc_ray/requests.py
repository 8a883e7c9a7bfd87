"""What a system is asked about a test case: its lists of candidates, and the probes that alter it.

A probe changes one thing about the request and sees whether the ranking follows. Every random
choice is drawn from a hash of the user, so it is the same for every system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rc_ray.core.domains import RankingCase
from rc_ray.data_config import MAIN_LIST
from rc_ray.evaluate_config import Probe

MAIN = MAIN_LIST
CATALOGUE = "catalogue"
"""Name of the ranking of all items."""

ASKED_PROBES: tuple[Probe, ...] = ("shuffled_history", "permuted_candidates", "masked_titles")
"""Probes that need scores of their own; the others compare lists that are scored anyway."""

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def flat_candidates(case: RankingCase) -> tuple[int, ...]:
    """The candidates of all lists, one list after another; an item may stand in several."""
    further = (item for items in case.more_candidates.values() for item in items)
    return (*case.candidates, *further)


def list_slices(case: RankingCase) -> dict[str, slice]:
    """Name of each list -> its place in `flat_candidates`; the same for all cases of a domain."""
    slices = {MAIN: slice(0, len(case.candidates))}
    start = len(case.candidates)
    for name, items in case.more_candidates.items():
        slices[name] = slice(start, start + len(items))
        start += len(items)
    return slices


def list_items(case: RankingCase, name: str) -> tuple[int, ...]:
    """The items of one list."""
    return case.candidates if name == MAIN else case.more_candidates[name]


def target_positions(cases: Sequence[RankingCase], name: str) -> list[int]:
    """(N,) where each target stands in its list."""
    return [list_items(case, name).index(case.target) for case in cases]


@dataclass(frozen=True)
class Probed:
    """A case as a probe alters it."""

    history: tuple[int, ...]
    candidates: tuple[int, ...]
    places: npt.NDArray[np.int64]
    """(C,) where each candidate of the main list now stands."""


def probed(case: RankingCase, probe: Probe, seed: int) -> Probed:
    """Alter a case; `masked_titles` leaves the items and changes what they are called."""
    num = len(case.candidates)
    same = np.arange(num)
    generator = np.random.default_rng(_seed(seed, probe, case.user_id))
    match probe:
        case "shuffled_history":
            order = generator.permutation(len(case.history))
            return Probed(tuple(case.history[i] for i in order), case.candidates, same)
        case "permuted_candidates":
            order = generator.permutation(num)
            return Probed(case.history, tuple(case.candidates[i] for i in order), np.argsort(order))
        case _:
            return Probed(case.history, case.candidates, same)


def made_up_titles(num: int, seed: int) -> list[str]:
    """(num,) distinct names of two words that mean nothing and tell nothing of the items."""
    generator = np.random.default_rng([seed, 4])
    found: dict[str, None] = {}
    while len(found) < num:
        for row in generator.integers(0, len(_SYLLABLES), (num, 5)):
            parts = [_SYLLABLES[i] for i in row]
            found.setdefault(f"{''.join(parts[:3])} {''.join(parts[3:])}".title())
    return list(found)[:num]


def _seed(seed: int, *key: str) -> int:
    text = "\x1f".join((str(seed), *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
