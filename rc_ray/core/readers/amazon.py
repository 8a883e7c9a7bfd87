"""Amazon reviews as the McAuley Lab publishes them: 2014, 2018 and 2023."""

from __future__ import annotations

from rc_ray.core.readers.delimited import Dialect
from rc_ray.core.readers.layout import Category, Format, Layout

_REVIEW = {
    "user_id": ("reviewerID",),
    "item_id": ("asin",),
    "timestamp": ("unixReviewTime",),
    "rating": ("overall",),
}
_RATINGS_ONLY = {name: (name,) for name in ("user_id", "item_id", "rating", "timestamp")}

AMAZON_2014 = Format(
    name="amazon-2014",
    page="jmcauley.ucsd.edu/data/amazon",
    layouts=(
        Layout(
            "interactions",
            ("reviews_*.json", "kcore_5.json", "aggressive_dedup.json"),
            _REVIEW,
            medium="lines",
        ),
        Layout(
            "interactions",
            ("ratings_*.csv",),
            _RATINGS_ONLY,
            dialect=Dialect(header=("user_id", "item_id", "rating", "timestamp")),
        ),
        Layout(
            "items",
            ("meta_*.json", "metadata.json"),
            {"item_id": ("asin",), "title": ("title",), "category": ("categories",)},
            category=Category(take="last"),
            medium="lines",
        ),
    ),
)

AMAZON_2018 = Format(
    name="amazon-2018",
    page="nijianmo.github.io/amazon",
    layouts=(
        Layout(
            "items",
            ("meta_*.json", "All_Amazon_Meta.json"),
            {"item_id": ("asin",), "title": ("title",), "category": ("category", "main_cat")},
            category=Category(take="last"),
            medium="lines",
            spoilt_title="getTime",  # a script of the page in place of the title
        ),
        Layout("interactions", ("*.json",), _REVIEW, medium="lines"),
        Layout(
            "interactions",
            ("*.csv",),
            _RATINGS_ONLY,
            dialect=Dialect(header=("item_id", "user_id", "rating", "timestamp")),
        ),
    ),
)

AMAZON_2023 = Format(
    name="amazon-2023",
    page="amazon-reviews-2023.github.io",
    layouts=(
        Layout(
            "items",
            ("meta_*.jsonl", "meta_*.parquet", "raw_meta_*/*.parquet"),
            {
                "item_id": ("parent_asin",),
                "title": ("title",),
                "category": ("categories", "main_category"),
            },
            category=Category(take="last"),
        ),
        Layout(
            "interactions",
            ("*.jsonl", "*.csv", "*.parquet"),
            {
                "user_id": ("user_id",),
                "item_id": ("parent_asin",),
                "timestamp": ("timestamp",),
                "rating": ("rating",),
            },
            time="ms",
        ),
    ),
)
