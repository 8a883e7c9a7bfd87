"""The Yelp Open Dataset."""

from __future__ import annotations

from rc_ray.core.readers.layout import Category, Format, Layout

YELP = Format(
    name="yelp",
    page="business.yelp.com/data/resources/open-dataset",
    layouts=(
        Layout(
            "interactions",
            ("yelp_academic_dataset_review.json",),
            {
                "user_id": ("user_id",),
                "item_id": ("business_id",),
                "timestamp": ("date",),
                "rating": ("stars",),
            },
            time="iso",
            medium="lines",
        ),
        Layout(
            "items",
            ("yelp_academic_dataset_business.json",),
            {"item_id": ("business_id",), "title": ("name",), "category": ("categories",)},
            category=Category(separator=","),
            medium="lines",
        ),
    ),
)
