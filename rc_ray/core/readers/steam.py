"""The Steam data of UCSD: reviews of 2018, reviews of Australian users, and the games."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rc_ray.core.readers.layout import Format, Layout


def _reviews_of_a_user(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Australian file has one user per line, with a list of reviews."""
    reviews = record.get("reviews")
    for review in reviews if isinstance(reviews, list) else ():
        if isinstance(review, dict):
            yield {"user_id": record.get("user_id"), **review}


STEAM = Format(
    name="steam",
    page="cseweb.ucsd.edu/~jmcauley/datasets.html",
    layouts=(
        Layout(
            "interactions",
            ("steam_reviews.json", "steam_new.json"),
            {
                # `user_id` stands in some of the rows only, `username` in all.
                "user_id": ("username",),
                "item_id": ("product_id",),
                "timestamp": ("date",),
            },
            time="iso",
            medium="lines",
        ),
        Layout(
            "interactions",
            ("australian_user_reviews.json",),
            {
                "user_id": ("user_id",),
                "item_id": ("item_id",),
                "timestamp": ("posted",),
                "rating": ("recommend",),
            },
            time="steam",
            medium="lines",
            expand=_reviews_of_a_user,
        ),
        Layout(
            "items",
            ("steam_games.json",),
            {"item_id": ("id",), "title": ("title", "app_name"), "category": ("genres",)},
            medium="lines",
        ),
    ),
)
