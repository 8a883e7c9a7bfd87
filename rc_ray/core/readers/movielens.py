"""MovieLens as GroupLens publishes it: 100K, 1M, 10M, and the CSV releases since 20M."""

from __future__ import annotations

from rc_ray.core.readers.delimited import Dialect
from rc_ray.core.readers.layout import Category, Format, Layout

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance",
    "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The flags of `u.item`, in their order."""
_PAGE = "grouplens.org/datasets/movielens"
_NAMES = {
    "user_id": ("userId",),
    "item_id": ("movieId",),
    "timestamp": ("timestamp",),
    "rating": ("rating",),
}
_FILMS = {"item_id": ("movieId",), "title": ("title",), "category": ("genres",)}
_CATEGORY = Category(separator="|", nothing=("(no genres listed)",))

MOVIELENS_100K = Format(
    name="movielens-100k",
    page=_PAGE,
    layouts=(
        Layout(
            "interactions",
            ("u.data",),
            _NAMES,
            medium="delimited",
            dialect=Dialect("\t", False, ("userId", "movieId", "rating", "timestamp")),
        ),
        Layout(
            "items",
            ("u.item",),
            {"item_id": ("movieId",), "title": ("title",), "category": GENRES_100K},
            medium="delimited",
            category=Category(flags=True, nothing=("unknown",)),
            dialect=Dialect(
                "|",
                False,
                ("movieId", "title", "released", "released_on_video", "url", *GENRES_100K),
                encoding="latin-1",
            ),
        ),
    ),
)


def _colons(name: str, encoding: str) -> Format:
    return Format(
        name=name,
        page=_PAGE,
        layouts=(
            Layout(
                "interactions",
                ("ratings.dat",),
                _NAMES,
                medium="delimited",
                dialect=Dialect("::", False, ("userId", "movieId", "rating", "timestamp")),
            ),
            Layout(
                "items",
                ("movies.dat",),
                _FILMS,
                medium="delimited",
                category=_CATEGORY,
                dialect=Dialect("::", False, ("movieId", "title", "genres"), encoding),
            ),
        ),
    )


MOVIELENS_1M = _colons("movielens-1m", "latin-1")
MOVIELENS_10M = _colons("movielens-10m", "utf-8")

MOVIELENS_CSV = Format(
    name="movielens-csv",
    page=_PAGE,
    layouts=(
        Layout("interactions", ("ratings.csv",), _NAMES, medium="delimited"),
        Layout("items", ("movies.csv",), _FILMS, medium="delimited", category=_CATEGORY),
    ),
)
