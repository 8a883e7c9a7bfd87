"""A log of any size for the benchmark of `prepare`, made once and kept.

    python jobs/benchmarks/generated_log.py FOLDER --interactions 20000000 --users 1000000

Popularity of the items falls like 1/rank, activity of the users is log-normal, times spread over
five years and every third one is a midnight, so that times tie. One row in a hundred repeats an
earlier one, a few lack their user, and one item in a hundred has no title. One block of rows is in
memory at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.artifacts import replaced_dir

BLOCK_ROWS = 2_000_000
START, DAY = 1_577_836_800, 86_400
SPAN = 5 * 365 * DAY
INTERACTIONS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())]
)
WORDS = (
    "amber bridge candle desert echo forest garden harbour island jungle kettle lantern mirror "
    "northern ocean paper quiet river silver thunder umbrella velvet winter yellow zephyr the of "
    "and last first secret little great red blue song story night day return edition"
).split()


def generate(
    folder: Path, interactions: int, users: int, items: int, *, seed: int = 0, ties: bool = True
) -> None:
    """Write `interactions.parquet` and `items.parquet`; a folder made alike is kept.

    Args:
        folder: replaced where it was made with other settings.
        interactions: rows of the log.
        users: people to draw from; a few may get no row.
        items: rows of `items.parquet`.
        seed: of everything drawn.
        ties: False gives each row a time of its own, but for the repeats.
    """
    settings = {
        "interactions": interactions,
        "users": users,
        "items": items,
        "seed": seed,
        "ties": ties,
    }
    made = folder / "settings.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == settings:
        return
    rng = np.random.default_rng(seed)
    item_ids = pa.array([f"i{item:06d}" for item in range(items)], pa.string())
    user_ids = pa.array([f"u{user:07d}" for user in range(users)], pa.string())
    popularity = _summed(1.0 / np.arange(1, items + 1))
    activity = _summed(rng.lognormal(0.0, 1.0, users))
    item_of_rank = rng.permutation(items)
    with replaced_dir(folder) as work:
        pq.write_table(
            pa.table(
                {
                    "item_id": item_ids,
                    "title": pa.array(_titles(rng, items), pa.string()),
                    "category": [f"category {one}" for one in rng.integers(0, 50, items)],
                }
            ),
            work / "items.parquet",
        )
        with pq.ParquetWriter(work / "interactions.parquet", INTERACTIONS) as writer:
            for start in range(0, interactions, BLOCK_ROWS):
                num = min(BLOCK_ROWS, interactions - start)
                user = np.searchsorted(activity, rng.random(num), side="right")
                item = item_of_rank[np.searchsorted(popularity, rng.random(num), side="right")]
                if ties:
                    time = START + rng.integers(0, SPAN, num)
                    time = np.where(rng.random(num) < 1 / 3, time // DAY * DAY, time)
                else:
                    time = START + (start + rng.permutation(num)) * (SPAN // interactions)
                again = rng.integers(0, num, num // 100)
                source = rng.integers(0, num, num // 100)
                for column in (user, item, time):
                    column[again] = column[source]
                without_user = rng.random(num) < 1e-4
                columns = [
                    user_ids.take(pa.array(user, mask=without_user)),
                    item_ids.take(pa.array(item)),
                    pa.array(time),
                ]
                writer.write_table(pa.table(columns, schema=INTERACTIONS))
        (work / made.name).write_text(json.dumps(settings), encoding="utf-8")


def _summed(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    summed = np.cumsum(weights)
    summed /= summed[-1]
    summed[-1] = 1.0
    return summed


def _titles(rng: np.random.Generator, num: int) -> list[str | None]:
    """Three to eight words each; one in a hundred is null or blank."""
    words = rng.integers(0, len(WORDS), (num, 8))
    lengths = rng.integers(3, 9, num)
    titles: list[str | None] = [
        " ".join(WORDS[word] for word in row[:length])
        for row, length in zip(words.tolist(), lengths.tolist(), strict=True)
    ]
    for place, item in enumerate(rng.permutation(num)[: max(1, num // 100)].tolist()):
        titles[item] = None if place % 2 else "  "
    return titles


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--interactions", type=int, required=True)
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    generate(wanted.folder, wanted.interactions, wanted.users, wanted.items, seed=wanted.seed)
