"""What a tested domain holds out of its own: items drawn by title, users drawn by id.

Both are decided by keyed hashes, so that new items and users move nobody.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rc_ray.core.cleaning import CleanDomain
from rc_ray.core.hashing import fractions, keyed_hashes
from rc_ray.data_config import DataConfig

DRAWS = ("scored", "unlabeled", "cold_user", "few_shot", "held_out")
"""What a user was drawn for. `held_out`: a cold user of another domain, who trains no spirit."""
SCORED, UNLABELED, COLD_USER, FEW_SHOT, HELD_OUT = range(5)

Codes = npt.NDArray[np.uint8]


def draw_cold(domain: CleanDomain, config: DataConfig, seed: int) -> npt.NDArray[np.bool_]:
    """(I,) the share of items held out, large enough to draw cold negatives from if affordable.

    Drawn by title: items of equal title are cold together, so that nothing of a cold title trains.
    A title of more items than are to be held out is passed over.
    """
    num_items = len(domain.item_ids)
    if config.cold_item_fraction == 0.0:
        return np.zeros(num_items, dtype=bool)
    num = round(config.cold_item_fraction * num_items)
    enough = config.num_negatives + 11
    if enough <= num_items / 4:
        num = max(num, enough)
    encoded = domain.titles.dictionary_encode()
    title = np.asarray(encoded.indices)
    num_of = np.bincount(title)
    order = np.argsort(keyed_hashes(encoded.dictionary, seed, domain.name, "cold"), kind="stable")
    order = order[num_of[order] <= num]
    chosen = np.zeros(len(num_of), dtype=bool)
    chosen[order[: np.searchsorted(np.cumsum(num_of[order]), num) + 1]] = num > 0
    drawn: npt.NDArray[np.bool_] = chosen[title]
    return drawn


def draw_users(domain: CleanDomain, config: DataConfig, seed: int) -> Codes:
    """(U,) what each user of an ingredient domain is for; other users do not matter to it."""
    place = fractions(keyed_hashes(domain.user_ids, seed, domain.name, "group"))
    draws = np.full(len(place), SCORED, dtype=np.uint8)
    draws[place < config.unlabeled_fraction] = UNLABELED
    # From the other end, so that these fractions do not change who is unlabeled.
    not_cold = 1.0 - config.cold_user_fraction
    draws[place >= not_cold - config.few_shot_user_fraction] = FEW_SHOT
    draws[place >= not_cold] = COLD_USER
    return draws
