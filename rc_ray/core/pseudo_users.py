"""Users made up from a catalogue alone: for weights that are learned without any user's data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rc_ray.core.predictions import UnlabeledPrompt

NUM_CANDIDATES = 20


def pseudo_users(
    titles: Sequence[str], num_prompts: int, seed: int, *, num_candidates: int = NUM_CANDIDATES
) -> list[UnlabeledPrompt]:
    """Items as one-item histories (MergeRec, arXiv 2601.01753), each with random candidates.

    Args:
        titles: of all items of the catalogue, by item index.
        num_prompts: users at most; each is a different item.
        seed: which items, and which candidates.
        num_candidates: items to choose from; never one with the title of the history. Where the
            catalogue has fewer, all others.

    Raises:
        ValueError: the catalogue has fewer than three titles.
    """
    if len(set(titles)) < 3:
        raise ValueError("made-up users need a catalogue of three titles or more")
    rng = np.random.default_rng(seed)
    prompts = []
    for item in rng.permutation(len(titles))[:num_prompts].tolist():
        order = rng.permutation(len(titles)).tolist()
        others = [other for other in order if titles[other] != titles[item]]
        prompts.append(UnlabeledPrompt((titles[item],), tuple(others[:num_candidates])))
    return prompts
