"""What share of a sweep's slots goes into training: 16 trials of some seconds each on 2 slots.

    python jobs/benchmarks/sweep_overhead.py runs/benchmarks/sweep

Runs `rc-ray tune` on generated logs as a command of its own and counts from its first to its last
moment, Python's and Ray's start included. Training is what stands as `seconds` in the trials' loss
curves: the optimiser steps alone. Prints the share and where the rest of the slots' time went.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rc_ray import prepare
from rc_ray.artifacts import MANIFEST, read_json
from rc_ray.config import load
from rc_ray.curves import read_metrics
from rc_ray.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
from generated_log import generate

COMMAND = "from rc_ray.cli import app; app()"


def write_experiment(folder: Path, args: argparse.Namespace) -> Path:
    """Generated logs and the experiment file; prepared data of the same settings are kept."""
    names = [f"domain{place}" for place in range(args.domains + 1)]
    for place, name in enumerate(names):
        generate(folder / "logs" / name, 3000, 150, 250, seed=place, ties=False)
    num_settings = -(-args.trials // args.domains)
    rates = [round(1e-3 * (1 + place / num_settings), 6) for place in range(num_settings)]
    raw = {
        "name": "sweep",
        "output_dir": str(folder),
        "model": {"path": args.model, "dtype": "float32"},
        "data": {
            "sources": [
                {"format": "parquet", "domain": name, "path": str(folder / "logs" / name)}
                for name in names
            ],
            "spirit": names[:1],
            "ingredients": names[1:],
        },
        "tune": {
            "num_steps": args.steps,
            "batch_size": 4,
            "max_titles": 10,
            "num_valid_users": args.valid_users,
            "max_concurrent_trials": args.slots,
            "search": {"learning_rate": rates},
            "lora": {"first_layer": args.first_layer},
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def measure(path: Path, num_slots: int) -> dict[str, float]:
    """Run the sweep; seconds, of all slots together unless they are the command's own."""
    experiment = load(path)
    with Progress() as console:
        prepare.run(experiment, console=console)
    for name in ("ingredients", "ingredients.work"):
        shutil.rmtree(experiment.run_dir / name, ignore_errors=True)
    started = time.time()
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", COMMAND, "tune", str(path)], check=True, env=environment)
    wall = time.time() - started
    folders = [
        manifest.parent
        for manifest in (experiment.run_dir / "ingredients.work").glob(f"*/*/{MANIFEST}")
    ]
    spent: list[dict[str, Any]] = [
        read_json(folder / MANIFEST)["metrics"]["spent"] for folder in folders
    ]
    training = sum(
        row["seconds"] for folder in folders for row in read_metrics(folder / "metrics.jsonl")
    )
    ended = max((folder / MANIFEST).stat().st_mtime for folder in folders)
    parts = {key: sum(one[key] for one in spent) for key in ("load_s", "train_s", "rank_s")}
    begun = sorted(one["started_at"] for one in spent)[:num_slots]
    before = sum(begun) - num_slots * started
    after = num_slots * (started + wall - ended)
    whole = num_slots * wall
    return {
        "wall": wall,
        "slots": whole,
        "trials": len(folders),
        "training": training,
        "share": training / whole,
        "before the first trial": before,
        "loading model and data": parts["load_s"],
        "around the steps": parts["train_s"] - training,
        "ranking validation users": parts["rank_s"],
        "after the last trial": after,
        "between trials": whole - before - after - sum(parts.values()),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--domains", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--valid-users", type=int, default=10)
    parser.add_argument("--first-layer", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = measure(write_experiment(folder, args), args.slots)
    whole = found["slots"]
    print(
        f"{found['trials']:.0f} trials on {args.slots} slots in {found['wall']:.1f} s: "
        f"{100 * found['share']:.1f} % of the slots' time in optimiser steps"
    )
    for name, seconds in found.items():
        if name not in ("wall", "slots", "trials", "share"):
            print(f"  {name:26} {seconds:7.1f} s {100 * seconds / whole:5.1f} %")
    return found


if __name__ == "__main__":
    main()
