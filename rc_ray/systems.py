"""What is compared and served, by name."""

from __future__ import annotations

System = str
"""One of `SYSTEMS`, or a mix of `merge.mixes`."""
SYSTEMS: tuple[System, ...] = (
    "popularity",
    "item_knn",
    "sasrec",
    "title_embedding",
    "base",
    "spirit",
    "ingredient",
    "joint",
    "random_spirit",
    "uniform",
    "cocktail",
    "guarded",
)
"""Every system that needs no entry of its own in the file, in the order of reports; mixes stand
between `uniform` and `cocktail`."""
DEFAULT_SYSTEMS: tuple[System, ...] = tuple(
    one for one in SYSTEMS if one not in ("joint", "random_spirit")
)
BASELINES: tuple[System, ...] = ("popularity", "item_knn", "sasrec", "title_embedding")
"""Systems that no adapter shapes and no LLM likelihood ranks."""
MIXED: tuple[System, ...] = ("random_spirit", "uniform", "cocktail", "guarded")
"""Systems that the merge makes, beside those of `merge.mixes`."""

OF_THE_SPIRIT: tuple[System, ...] = ("spirit", "joint", "random_spirit")
"""Systems that need a base spirit, or its domains, for themselves."""
SERVED: tuple[System, ...] = ("spirit", "ingredient", "uniform", "cocktail")
"""Systems that can be served, beside those of `merge.mixes`."""
