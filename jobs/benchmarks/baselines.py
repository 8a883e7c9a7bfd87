r"""Our SASRec against RecBole's on MovieLens-100K: the same split, the same ranking, several seeds.

    python -m venv rb && rb/bin/pip install "numpy<2" "scipy<1.14" "pandas<3" torch tqdm pyyaml \
        tabulate texttable psutil colorama colorlog==4.7.2 scikit-learn
    rb/bin/pip install --no-deps recbole==1.2.1 thop
    python jobs/benchmarks/baselines.py --recbole-python rb/bin/python --work-dir rb_work

Leave-one-out in time: the last item of a user is the test target, the one before it validates, the
others train. All items are ranked but those of the history. The network is the same on both
sides (2 layers, 2 heads, width 64 and 256 inside, dropout 0.5) and so is the number of items
read; batches and learning rates are each side's own defaults, since RecBole makes one example of
every prefix and ours one of every window. Each side stops by its validation NDCG@10. RecBole's test
figure is its own; ours is computed on RecBole's scores too, and the two must agree. One thread.
RecBole takes 10 to 20 minutes a seed with 20 items; finished seeds are kept in the work folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rc_ray.assets import movielens_dir
from rc_ray.baselines_config import SasrecConfig
from rc_ray.core.baselines import Case, catalogue_ndcg
from rc_ray.core.sasrec import Sasrec

DATASET = "split"
RECBOLE_DEFAULTS = {"train_batch_size": 256, "epochs": 40, "stopping_step": 3}
"""Batches of 256 prefixes: with RecBole's 2048 a CPU needs many more epochs for the same."""

Histories = dict[str, list[str]]


def read_histories() -> tuple[Histories, list[str]]:
    """User -> items in time order (equal times in the file's order), and all items."""
    rows = defaultdict(list)
    with (movielens_dir(print) / "ml-100k.inter").open(encoding="utf-8") as file:
        lines = csv.reader(file, delimiter="\t")
        next(lines)
        for place, (user, item, _, timestamp) in enumerate(lines):
            rows[user].append((float(timestamp), place, item))
    histories = {
        user: [item for _, _, item in sorted(rows[user])] for user in sorted(rows, key=int)
    }
    return histories, sorted({item for one in histories.values() for item in one}, key=int)


def export(histories: Histories, folder: Path, max_length: int) -> None:
    """Write RecBole's pre-split files, one row per position, and what not to rank."""
    target = folder / DATASET
    target.mkdir(parents=True, exist_ok=True)
    parts = {part: ["user_id:token\titem_id_list:token_seq\titem_id:token"] for part in _PARTS}
    for user, items in histories.items():
        for place in range(1, len(items)):
            part = {1: "test", 2: "valid"}.get(len(items) - place, "train")
            shown = " ".join(items[max(0, place - max_length) : place])
            parts[part].append(f"{user}\t{shown}\t{items[place]}")
    for part, lines in parts.items():
        (target / f"{DATASET}.{part}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    seen = {
        "valid": {user: items[:-2] for user, items in histories.items()},
        "test": {user: items[:-1] for user, items in histories.items()},
    }
    (target / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


_PARTS = ("train", "valid", "test")


def recbole(
    python: str, histories: Histories, items: Sequence[str], seed: int, folder: Path, length: int
) -> dict[str, Any]:
    """Train RecBole's SASRec and rank the test targets by its scores with our metric."""
    if not (folder / "result.json").exists():
        export(histories, folder, length)
        settings = {
            "dataset": DATASET,
            "seed": seed,
            "MAX_ITEM_LIST_LENGTH": length,
            **RECBOLE_DEFAULTS,
        }
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        driver = Path(__file__).with_name("recbole_sasrec.py")
        subprocess.run(
            [python, "-W", "ignore", str(driver), str(folder), str(folder / "settings.json")],
            check=True,
            cwd=folder,
        )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    found = np.load(folder / "scores.npy")  # (users, items + padding)
    places = {item: place for place, item in enumerate(items)}
    users = {user: row for row, user in enumerate(histories)}
    # An item of no row of RecBole's files has no score there.
    table = np.full((len(users), len(items)), np.finfo(np.float32).min, dtype=np.float32)
    columns = [places[item] for item in names["items"][1:]]
    table[np.ix_([users[user] for user in names["users"]], columns)] = np.nan_to_num(found[:, 1:])
    by_history = {
        tuple(case[0]): row for case, row in zip(cases(histories, places, 1), table, strict=True)
    }
    result["ours_on_its_scores"] = catalogue_ndcg(
        lambda asked: np.array([by_history[tuple(one)] for one in asked]),
        cases(histories, places, 1),
        len(items),
    )
    return result


def cases(histories: Histories, places: dict[str, int], num_last: int) -> list[Case]:
    """Histories without their last `num_last` items, each with the item that came next."""
    indexed = [[places[item] for item in items] for items in histories.values()]
    return [(items[:-num_last], items[-num_last]) for items in indexed]


def ours(
    histories: Histories, items: Sequence[str], seed: int, config: SasrecConfig
) -> dict[str, Any]:
    places = {item: place for place, item in enumerate(items)}
    valid, test = cases(histories, places, 2), cases(histories, places, 1)
    start = time.perf_counter()
    model = Sasrec.fit([one for one, _ in valid], len(items), config, valid, seed=seed)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "valid_ndcg": model.chosen["valid_ndcg"],
        "test_ndcg": catalogue_ndcg(model.scores, test, len(items)),
    }


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    histories, items = read_histories()
    config = SasrecConfig(max_length=arguments.max_length)
    folder = arguments.work_dir or Path(tempfile.mkdtemp(prefix="recbole-"))
    figures: dict[str, list[float]] = {"RecBole": [], "ours": []}
    print(f"{len(histories)} users, {len(items)} items, the last {arguments.max_length} read")
    print("seed  side     valid NDCG@10  test NDCG@10  our metric on its scores  seconds")
    for seed in arguments.seeds:
        if arguments.recbole_python:
            work = (folder / f"s{seed}").resolve()
            one = recbole(
                arguments.recbole_python, histories, items, seed, work, arguments.max_length
            )
            own = one["test"]["ndcg@10"]
            figures["RecBole"].append(own)
            print(
                f"{seed:4}  RecBole  {one['valid_ndcg']:13.4f}  {own:12.4f}  "
                f"{one['ours_on_its_scores']:24.4f}  {one['seconds']:7.0f}",
                flush=True,
            )
        one = ours(histories, items, seed, config)
        figures["ours"].append(one["test_ndcg"])
        print(
            f"{seed:4}  ours     {one['valid_ndcg']:13.4f}  {one['test_ndcg']:12.4f}  "
            f"{'':24}  {one['seconds']:7.0f}",
            flush=True,
        )
    for side, values in figures.items():
        if values:
            print(f"mean  {side:7}  {'':13}  {np.mean(values):12.4f}  +- {np.std(values):.4f}")
    if figures["RecBole"]:
        ratio = np.mean(figures["ours"]) / np.mean(figures["RecBole"])
        print(f"ours against RecBole: {100 * (ratio - 1):+.1f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recbole-python", help="Python of an environment with RecBole 1.2.1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max-length", type=int, default=20)
    parser.add_argument("--work-dir", type=Path, help="keeps what RecBole made; default temporary")
    main(parser.parse_args())
