"""Atomic files of RecBole: tab-separated, a header of `name:type`."""

from __future__ import annotations

from rc_ray.core.readers.delimited import Dialect
from rc_ray.core.readers.layout import Category, Format, Layout

_DIALECT = Dialect("\t", quoted=False, typed_names=True)
_ITEM = ("item_id", "movie_id", "book_id", "product_id", "business_id", "asin", "ISBN")

RECBOLE = Format(
    name="recbole",
    page="recbole.io/docs/user_guide/data/atomic_files.html",
    free=True,
    layouts=(
        Layout(
            "interactions",
            ("*.inter",),
            {
                "user_id": ("user_id",),
                "item_id": _ITEM,
                "timestamp": ("timestamp",),
                "rating": ("rating",),
            },
            medium="delimited",
            dialect=_DIALECT,
        ),
        Layout(
            "items",
            ("*.item",),
            {
                "item_id": _ITEM,
                "title": ("title", "movie_title", "item_name", "book_title", "name", "app_name"),
                "category": ("class", "genre", "genres", "categories", "category"),
            },
            medium="delimited",
            category=Category(separator=" "),
            dialect=_DIALECT,
        ),
    ),
)
