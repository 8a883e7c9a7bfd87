"""Users made up from a catalogue alone: for weights that are learned without any user's data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rc_ray.core.histories import Indices
from rc_ray.core.predictions import UnlabeledPrompt

NUM_CANDIDATES = 20


def pseudo_users(
    titles: Sequence[str],
    num_prompts: int,
    seed: int,
    *,
    items: Indices | None = None,
    num_candidates: int = NUM_CANDIDATES,
) -> list[UnlabeledPrompt]:
    """Items as one-item histories (MergeRec, arXiv 2601.01753), each with random candidates.

    Args:
        titles: of all items of the catalogue, by item index.
        num_prompts: users at most; each is a different item.
        seed: which items, and which candidates.
        items: those that histories and candidates are of, e.g. without the cold ones; null: all.
        num_candidates: items to choose from; never one with the title of the history. Where there
            are fewer, all others.

    Raises:
        ValueError: the items have fewer than three titles.
    """
    pool = np.arange(len(titles)) if items is None else np.asarray(items)
    if len({titles[item] for item in pool.tolist()}) < 3:
        raise ValueError("made-up users need three titles or more that are not held out")
    rng = np.random.default_rng(seed)
    prompts = []
    for item in rng.permutation(pool)[:num_prompts].tolist():
        order = rng.permutation(pool).tolist()
        others = [other for other in order if titles[other] != titles[item]]
        prompts.append(UnlabeledPrompt((titles[item],), tuple(others[:num_candidates])))
    return prompts
