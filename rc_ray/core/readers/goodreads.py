"""The UCSD Book Graph: interactions and reviews of Goodreads, and its books."""

from __future__ import annotations

from rc_ray.core.readers.layout import Format, Layout

GOODREADS = Format(
    name="goodreads",
    page="cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    layouts=(
        Layout(
            "interactions",
            ("goodreads_interactions_*.json", "goodreads_reviews_*.json"),
            {
                "user_id": ("user_id",),
                "item_id": ("book_id",),
                "timestamp": ("date_added",),
                "rating": ("rating",),
            },
            time="goodreads",
            unrated=0.0,
            medium="lines",
        ),
        Layout(
            "items",
            ("goodreads_books*.json",),
            {"item_id": ("book_id",), "title": ("title",)},
            medium="lines",
        ),
    ),
)
