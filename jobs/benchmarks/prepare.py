"""Preparing one domain: ours, plain pandas and RecBole's loader on the same generated log.

    python jobs/benchmarks/prepare.py FOLDER
    python jobs/benchmarks/prepare.py FOLDER --recbole-python PATH   # RecBole 1.2.1 lives there

FOLDER keeps the generated logs between runs; making them is not timed. Ours runs at
`--interactions`; ours, pandas and RecBole run at `--baseline-interactions`, with users and items
scaled alike, so that each ratio is one of equal size. Every run is a process of its own: its peak
memory is that process's, imports included; its seconds and CPU seconds begin after the imports.
Logs are read once before, so that no run pays for a cold disk.

What is done by all: drop incomplete rows, keep the first of a user's repeats of an item, iterative
5-core of users and items, time order, leave-one-out, 19 uniform negatives per validation and test
case (by ours and pandas: distinct ones that the user never met).

ours    reads and cleans titles, drops the items without one, breaks ties in time by a hash of the
        item, checks the split and every list for leaks, hashes what it reads and writes, and writes
        histories and frozen candidates as Parquet. It streams: no text of the log stays in memory.
pandas  reads titles and drops the items without one, breaks ties by the order of rows, and writes
        the training rows and the frozen candidates as Parquet; it checks and hashes nothing.
RecBole reads no titles (its file leaves the untitled items out beforehand), freezes nothing on
        disk and draws negatives, which may repeat, as a loader is iterated: one pass over its
        validation and its test loader is part of its seconds. BPR loads plain rows; a validation
        negative may be the test target. SASRec makes of each position a row with the 50 items
        before it; its negatives leave out the target alone.

Prints one line per run: `x time` and `x CPU` say how many times our seconds it takes, `users`,
`items` and `left` what it keeps. On a machine that others use, CPU seconds tell more than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOMAIN = "log"
MIN_INTERACTIONS = 5
NUM_NEGATIVES = 19
SEED = 0

Row = dict[str, Any]


def prepare_ours(source: Path, target: Path) -> dict[str, int]:
    """Prepare the log as one ingredient domain, as the stage `prepare` does; returns its counts."""
    from rc_ray import artifacts
    from rc_ray.core import sources
    from rc_ray.core.preparing import prepare_domain
    from rc_ray.data_config import DataConfig, ParquetSource

    config = DataConfig(
        sources=(ParquetSource(format="parquet", domain=DOMAIN, path=source),),
        ingredients=(DOMAIN,),
        min_user_interactions=MIN_INTERACTIONS,
        min_item_interactions=MIN_INTERACTIONS,
        cold_item_fraction=0.0,
        num_negatives=NUM_NEGATIVES,
    )
    (one,) = config.sources
    files = sources.files(one)
    inputs = {name: artifacts.sha256_file(path) for name, path in files.items()}
    metrics = prepare_domain(
        sources.read(one)[DOMAIN],
        target,
        config,
        SEED,
        fingerprint_config=config.model_dump(mode="json"),
        inputs=inputs,
    )
    num_cases = metrics["valid_cases"] + metrics["test_cases"]
    return {
        **{name: metrics[name] for name in ("users", "items", "interactions")},
        "candidates": num_cases * (NUM_NEGATIVES + 1),
    }


def prepare_pandas(source: Path, target: Path) -> dict[str, int]:
    """The same steps as one writes them by hand; returns the counts.

    Writes `items.parquet`, `train.parquet` (rows in time order) and `valid.parquet` and
    `test.parquet`: one row per user, its target and its candidates as places in the items.
    """
    import numpy as np
    import pandas as pd

    items = pd.read_parquet(source / "items.parquet").dropna(subset=["item_id", "title"])
    items = items[items["title"].str.strip() != ""].drop_duplicates("item_id")
    log = pd.read_parquet(
        source / "interactions.parquet", columns=["user_id", "item_id", "timestamp"]
    ).dropna()
    log = log[log["item_id"].isin(items["item_id"])]
    log = log.sort_values("timestamp", kind="stable").drop_duplicates(["user_id", "item_id"])
    while True:
        num_rows = len(log)
        for column in ("item_id", "user_id"):
            counts = log[column].value_counts()
            log = log[log[column].isin(counts.index[counts >= MIN_INTERACTIONS])]
        if len(log) == num_rows:
            break
    items = items[items["item_id"].isin(log["item_id"])].sort_values("item_id")
    items = items.reset_index(drop=True)
    log["item"] = log["item_id"].map(pd.Series(items.index, index=items["item_id"]))
    log = log.sort_values(["user_id", "timestamp"], ignore_index=True)
    test = log.groupby("user_id").tail(1)
    rest = log.drop(test.index)
    valid = rest.groupby("user_id").tail(1)
    train = rest.drop(valid.index)
    target.mkdir(parents=True, exist_ok=True)
    items.to_parquet(target / "items.parquet")
    train[["user_id", "item_id", "timestamp"]].to_parquet(target / "train.parquet")
    met = log.groupby("user_id")["item"].agg(set)
    rng = np.random.default_rng(SEED)
    for name, cases in (("valid", valid), ("test", test)):
        lists = []
        for user, wanted in zip(cases["user_id"], cases["item"], strict=True):
            seen = met[user]
            candidates = {wanted}
            while len(candidates) <= NUM_NEGATIVES:
                for item in rng.integers(0, len(items), NUM_NEGATIVES + 1 - len(candidates)):
                    if item not in seen:
                        candidates.add(int(item))
            lists.append(rng.permutation(list(candidates)))
        cases[["user_id", "item_id", "timestamp"]].assign(candidates=lists).to_parquet(
            target / f"{name}.parquet"
        )
    num_cases = len(valid) + len(test)
    return {
        "users": len(test),
        "items": len(items),
        "interactions": len(log),
        "candidates": num_cases * (NUM_NEGATIVES + 1),
    }


def write_atomic(source: Path, target: Path) -> None:
    """The rows of titled items as RecBole reads them; kept where they stand."""
    import pandas as pd

    if target.is_file():
        return
    items = pd.read_parquet(source / "items.parquet").dropna(subset=["item_id", "title"])
    titled = items.loc[items["title"].str.strip() != "", "item_id"]
    log = pd.read_parquet(
        source / "interactions.parquet", columns=["user_id", "item_id", "timestamp"]
    ).dropna()
    log = log[log["item_id"].isin(titled)]
    log.columns = ["user_id:token", "item_id:token", "timestamp:float"]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    log.to_csv(part, sep="\t", index=False)
    part.rename(target)


STEPS = {"ours": prepare_ours, "pandas": prepare_pandas}


def step(name: str, source: Path, target: Path) -> None:
    """One timed run in this process; prints a line of JSON."""
    if name == "recbole-files":
        write_atomic(source, target)
        print("{}")
        return
    # What a run imports is no part of its seconds; pyarrow too imports pandas where it finds it.
    import pandas  # noqa: F401

    if name == "ours":
        import rc_ray.core.preparing  # noqa: F401
    start, start_cpu = time.perf_counter(), time.process_time()
    counts = STEPS[name](source, target)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    row = {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        **counts,
    }
    print(json.dumps(row))


def run(command: Sequence[str | Path], cwd: Path, timeout_s: float | None) -> Row | None:
    """The last line that a process prints, as JSON; null where it takes too long.

    This process stays small: a child's peak counts from the size of what started it.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            timeout=timeout_s,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def line(what: str, rows: int, row: Row | None, ours: Row | None) -> str:
    """One line of the table; `ours` is our run of the same size, null where the two do not meet."""
    if row is None:
        return f"{what:16} {rows:12,} {'gave up':>9}"
    times = [f"{row[key] / ours[key]:7.1f}" if ours else f"{'':7}" for key in ("seconds", "cpu_s")]
    return (
        f"{what:16} {rows:12,} {row['seconds']:9.1f} {row['cpu_s']:8.1f} "
        f"{rows / row['seconds']:11,.0f} {row['peak_gb']:8.2f} {times[0]} {times[1]} "
        f"{row['users']:>9,} {row['items']:>8,} {row['interactions']:>11,}"
    )


def generated(args: argparse.Namespace, interactions: int) -> Path:
    """The folder of the log of this size, made if need be."""
    scale = interactions / args.interactions
    folder: Path = args.folder.resolve() / str(interactions)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE / "generated_log.py", folder]
    for name, num in (("users", args.users), ("items", args.items)):
        command += [f"--{name}", max(50, round(num * scale))]
    # Its own process, lest this one grow; its output is nothing.
    subprocess.run(
        [str(part) for part in [*command, "--interactions", interactions]], check=True, cwd=HERE
    )
    for name in ("interactions.parquet", "items.parquet"):
        with (folder / name).open("rb") as file:
            while file.read(1 << 24):
                pass
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps the generated logs")
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--baseline-interactions", type=int, default=1_000_000)
    parser.add_argument("--recbole-python", type=Path, help="a Python that has RecBole 1.2.1")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="for each run")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        step(args.step, args.folder, args.target)
        return

    def own(name: str, source: Path, target: Path) -> list[str | Path]:
        script = Path(__file__).resolve()
        return [sys.executable, script, source, "--step", name, "--target", target]

    def timed(
        what: str, source: Path, ours: Row | None, command: Sequence[str | Path] | None = None
    ) -> Row | None:
        # Here and not in the run, so that nothing is left of one that is killed.
        with tempfile.TemporaryDirectory(dir=source) as work:
            command = command or own(what, source, Path(work) / DOMAIN)
            row = run(command, Path(work), args.timeout_s)
        print(line(what, int(source.name), row, ours), flush=True)
        if row is not None and "loaded_s" in row:
            drawn = row["seconds"] - row["loaded_s"]
            print(f"{'':16} of which loading {row['loaded_s']:.1f} s, drawing {drawn:.1f} s")
        return row

    small = generated(args, args.baseline_interactions)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(
        f"{'':16} {'rows':>12} {'seconds':>9} {'CPU s':>8} {'rows/s':>11} {'peak GB':>8} "
        f"{'x time':>7} {'x CPU':>7} {'users':>9} {'items':>8} {'left':>11}"
    )
    ours = timed("ours", small, None)
    timed("pandas", small, ours)
    if args.recbole_python is None:
        print("RecBole: left out; give --recbole-python")
    else:
        atomic = small / "recbole" / DOMAIN / f"{DOMAIN}.inter"
        run(own("recbole-files", small, atomic), small, None)
        script = HERE / "recbole_prepare.py"
        for model in ("BPR", "SASRec"):
            # Not resolved: what a virtual environment's python links to has no RecBole.
            command = [args.recbole_python.absolute(), script, small / "recbole", model]
            timed(f"RecBole, {model}", small, ours, command)
    if args.interactions != args.baseline_interactions:
        large = generated(args, args.interactions)
        timed("ours", large, None)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
