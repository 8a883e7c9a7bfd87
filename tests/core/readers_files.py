"""Small files in the layouts of the publishers, made by hand for the tests of the readers."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa

from rc_ray.core.readers.finding import find
from rc_ray.core.readers.formats import format_named
from rc_ray.core.readers.shard import ShardReader

AMAZON_2014_REVIEWS = (
    '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "reviewerName": "J. McDonald", '
    '"helpful": [2, 3], "reviewText": "I bought this for my husband who plays the piano.", '
    '"overall": 5.0, "summary": "Heavenly Highway Hymns", "unixReviewTime": 1252800000, '
    '"reviewTime": "09 13, 2009"}\n'
    '{"reviewerID": "A1YJEY40YUW4SE", "asin": "7806397051", "helpful": [3, 4], "reviewText": '
    '"Very oily", "overall": 1.0, "summary": "", "unixReviewTime": 1391040000, '
    '"reviewTime": "01 30, 2014"}\n'
)
AMAZON_2014_ITEMS = (
    "{'asin': '0000013714', 'title': 'Hymns: \"Old\" &amp; New', 'price': 3.17, 'imUrl': 'x', "
    "'related': {'also_bought': ['B00JHONN1S']}, 'salesRank': {'Toys & Games': 211836}, "
    "'brand': 'Coxlures', 'categories': [['Books', 'Music', 'Hymns'], ['Gifts']]}\n"
    "{'asin': '7806397051', 'description': \"Warm\\\\ don't \\\\d\", 'categories': [['Beauty']]}\n"
    "{'asin': '0000000003', 'title': \"Girl's Tutu\", 'categories': [[]]}\n"
)
AMAZON_2018_REVIEWS = (
    '{"image": ["https://images-na/71eG75FTJJL._SY88.jpg"], "overall": 5.0, "vote": "2", '
    '"verified": true, "reviewTime": "01 1, 2018", "reviewerID": "AUI6WTTT0QZYS", '
    '"asin": "5120053084", "style": {"Size:": "Large", "Color:": "Charcoal"}, '
    '"reviewerName": "Abbey", "reviewText": "I now have 4", "summary": "Comfy", '
    '"unixReviewTime": 1514764800}\n'
    '{"overall": 2.0, "verified": false, "reviewTime": "09 9, 2016", "reviewerID": "A1", '
    '"asin": "B01", "unixReviewTime": 1473379200}\n'
)
AMAZON_2018_ITEMS = (
    '{"category": ["Clothing", "Shirts"], "tech1": "", "description": ["d"], "fit": "", '
    '"title": "Shirt &quot;L&quot;", "also_buy": [], "image": [], "tech2": "", "brand": "B", '
    '"feature": ["f"], "rank": "13,052,976inClothing", "also_view": [], "main_cat": '
    '"AMAZON FASHION", "similar_item": "", "date": "8.70 inches", "price": "$7.59", '
    '"asin": "5120053084"}\n'
    '{"category": [], "title": "var aPageStart = (new Date()).getTime();", '
    '"main_cat": "AMAZON FASHION", "asin": "B01"}\n'
    '{"category": ["Clothing", "</span></span>"], "title": "", "main_cat": "<img src=x />", '
    '"asin": "B02"}\n'
)
AMAZON_2023_REVIEWS = (
    '{"rating": 5.0, "title": "Such a lovely scent", "text": "ok", "images": [], "asin": '
    '"B00YQ6X8EO", "parent_asin": "B00YQ6X8EP", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", '
    '"timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}\n'
)
AMAZON_2023_ITEMS = (
    '{"main_category": "All Beauty", "title": "Howard LC0008 Conditioner", "average_rating": 4.8, '
    '"rating_number": 10, "features": [], "description": [], "price": null, "images": '
    '[{"thumb": "t", "hi_res": null}], "videos": [], "store": "Howard", "categories": [], '
    '"details": {"UPC": "617390882781"}, "parent_asin": "B00YQ6X8EP", "bought_together": null}\n'
    '{"main_category": null, "title": null, "categories": ["Beauty", "Hair"], '
    '"parent_asin": "B2", "price": 9.5}\n'
)
YELP_REVIEWS = (
    '{"review_id":"KU_O5udG6zpxOg-VcAEodg","user_id":"mh_-eMZ6K5RLWhZyISBhwA","business_id":'
    '"XQfwVwDr-v0ZS3_CbbE5Xw","stars":3.0,"useful":0,"funny":0,"cool":0,"text":"If you\\n'
    'decide","date":"2018-07-07 22:09:11"}\n'
)
YELP_ITEMS = (
    '{"business_id":"XQfwVwDr-v0ZS3_CbbE5Xw","name":"Turning Point of North Wales","address":'
    '"1460 Bethlehem Pike","city":"North Wales","stars":3.0,"is_open":1,"attributes":'
    '{"NoiseLevel":"u\'average\'"},"categories":"Restaurants, Breakfast & Brunch, Food","hours":'
    "null}\n"
    '{"business_id":"b2","name":"Caf\\u00e9","attributes":null,"categories":null,"hours":null}\n'
)
STEAM_REVIEWS = (
    "{u'username': u'Chaos Syren', u'hours': 0.1, u'products': 41, u'product_id': u'725280', "
    "u'page_order': 0, u'date': u'2017-12-17', u'text': u'This would not be acceptable', "
    "u'early_access': False, u'page': 1}\n"
    "{u'username': u'\\u2665 Ariman', u'user_id': u'76561198007483075', u'found_funny': 2, "
    "u'compensation': u'Product received for free', u'hours': 13.2, u'product_id': u'328100', "
    "u'date': u'2017-08-02', u'text': u\"Antihero's \\\\d\", u'early_access': True, u'page': 1}\n"
)
STEAM_AUSTRALIAN = (
    "{'user_id': '76561197970982479', 'user_url': 'http://steamcommunity.com/x', 'reviews': "
    "[{'funny': '', 'posted': 'Posted November 5, 2011.', 'last_edited': '', 'item_id': '1250', "
    "'helpful': 'No ratings yet', 'recommend': True, 'review': 'Simple yet great.'}, "
    "{'funny': '', 'posted': 'Posted July 15.', 'last_edited': '', 'item_id': '22200', "
    "'helpful': '', 'recommend': False, 'review': \"It's unique\"}]}\n"
    "{'user_id': 'js41637', 'user_url': 'x', 'reviews': []}\n"
)
STEAM_ITEMS = (
    "{u'publisher': u'Kotoshiro', u'genres': [u'Action', u'Indie'], u'app_name': u'Lost Summoner "
    "Kitty', u'title': u'Lost Summoner Kitty', u'url': u'http://x', u'release_date': "
    "u'2018-01-04', u'price': 4.99, u'early_access': False, u'id': u'761140', u'developer': u'K'}\n"
    "{u'url': u'http://y', u'app_name': u'Snow\\xae', u'price': u'Free', u'id': u'643980'}\n"
    "{u'url': u'http://store.steampowered.com', u'price': 19.99, u'early_access': False}\n"
)
GOODREADS_INTERACTIONS = (
    '{"user_id": "8842281e1d1347389f2ab93d60773d4d", "book_id": "24375664", "review_id": '
    '"5cd416f3efc3f944fce4ce2db2290d5e", "is_read": true, "rating": 5, "review_text_incomplete": '
    '"Mind blowingly cool.", "date_added": "Fri Aug 25 13:55:02 -0700 2017", "date_updated": '
    '"Mon Oct 09 08:55:59 -0700 2017", "read_at": "Sat Oct 07 00:00:00 -0700 2017", '
    '"started_at": ""}\n'
    '{"user_id": "u2", "book_id": "36097", "is_read": false, "rating": 0, "date_added": '
    '"Wed Jan 02 00:00:01 +0100 2008", "read_at": "", "started_at": ""}\n'
)
GOODREADS_ITEMS = (
    '{"isbn": "", "series": [], "country_code": "US", "popular_shelves": [{"count": "100", '
    '"name": "to-read"}], "book_id": "24375664", "title": "W.C. Fields: A Life", '
    '"title_without_series": "W.C. Fields"}\n'
    '{"book_id": "36097", "title": ""}\n'
)


def write(path: Path, text: str | bytes, *, encoding: str = "utf-8") -> Path:
    """Write a file; compressed when its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode(encoding)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


def read(
    format_name: str, path: Path, role: str, **options: Any
) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    """Rows as tuples, and counts, of the one file of a role below a folder."""
    shards = find(format_named(format_name, **options), [path])
    (shard,) = shards[role]  # type: ignore[index]
    reader = ShardReader(shard)
    rows = [tuple(row.values()) for batch in reader.batches() for row in batch.to_pylist()]
    return rows, {name: count for name, count in reader.counts.items() if count}
