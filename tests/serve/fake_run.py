"""A finished run made by hand: two domains, a random adapter for each, no stage needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rc_ray.artifacts import (
    MANIFEST,
    RunFolder,
    manifest_digest,
    read_json,
    write_json,
    write_manifest,
)
from rc_ray.config import Experiment, load
from rc_ray.core.adapters import Adapter, LoraPair, save_adapter
from rc_ray.core.loading import load_language_model
from tests import tiny

DOMAINS = ("rivers", "tools")


def make_run(folder: Path, **serve: object) -> Experiment:
    """`tools` is calibrated with alpha 0.5 and gamma 0.25; `rivers` is not."""
    path = tiny.make_experiment(
        folder,
        data={"spirit": ["lamps"], "ingredients": list(DOMAINS)},
        serve={"port": 0, "max_candidates": 200, "cpus_per_replica": 0.5, **serve},
    )
    experiment = load(path)
    run = RunFolder(experiment.run_dir)
    for seed, domain in enumerate(DOMAINS):
        _prepare(run.domain_dir(domain), domain, seed)
        _cocktail(run.cocktail_dir(domain), Path(experiment.model.path), seed)
    write_json(
        run.evaluate_dir / "calibration.json",
        {
            "tools": {
                "cocktail": {"alpha": 0.5, "gamma": 0.25, "prior_in_trie": True, "valid_ndcg": 0.3}
            }
        },
    )
    seal_evaluation(run, "cocktails/tools")
    return experiment


def seal_evaluation(run: RunFolder, *places: str) -> None:
    """As if `evaluate` had read these stage folders as they are now."""
    inputs = {place: manifest_digest(run.root / place) for place in places}
    (run.evaluate_dir / MANIFEST).unlink(missing_ok=True)
    write_manifest(run.evaluate_dir, stage="evaluate", config={}, seed=0, inputs=inputs, metrics={})


def seal_anew(run: RunFolder, place: str, *reads: str) -> None:
    """As if the stage had run again and had read these stage folders as they are now."""
    folder = run.root / place
    seconds = 1.0
    if (folder / MANIFEST).exists():
        seconds += read_json(folder / MANIFEST)["metrics"].get("seconds", 0.0)
        (folder / MANIFEST).unlink()
    inputs = {name: manifest_digest(run.root / name) for name in reads}
    metrics = {"seconds": seconds}
    write_manifest(folder, stage="any", config={}, seed=0, inputs=inputs, metrics=metrics)


def _prepare(folder: Path, domain: str, seed: int) -> None:
    titles = [f"{domain.capitalize()} {a} {n}" for a in tiny.ADJECTIVES for n in tiny.NOUNS]
    titles[41] = titles[40]  # a title that two items bear
    titles[39] = "Odd <|im_end|> Thing"
    num_items = len(titles)
    num_train = np.random.default_rng(seed).permutation(num_items)
    folder.mkdir(parents=True)
    items = {
        "item_id": pa.array([f"{domain}-{i:02d}" for i in range(num_items)]),
        "title": pa.array(titles),
        "category": pa.array([None] * num_items, pa.string()),
        "num_train": pa.array(num_train, pa.int64()),
        "cold": pa.array([False] * num_items),
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    indices = pa.list_(pa.int32())
    users = {"user_id": pa.array(["u0"]), "history": pa.array([[0, 1, 2]], indices)}
    group = pa.array(["scored"])
    pq.write_table(pa.table({**users, "group": group}), folder / "train.parquet")
    for purpose, target in (("valid", 3), ("test", 4)):
        rows = {
            **users,
            "target": pa.array([target], pa.int32()),
            "split": pa.array(["warm"]),
            "group": group,
        }
        if purpose == "test":
            rows["history"] = pa.array([[0, 1, 2, 3]], indices)
        pq.write_table(pa.table(rows), folder / f"{purpose}.parquet")
    candidates = {
        "user_id": pa.array(["u0", "u0"]),
        "purpose": pa.array(["valid", "test"]),
        "split": pa.array(["warm", "warm"]),
        "list": ["main", "main"],
        "candidates": pa.array([[3, 7, 9], [4, 8, 10]], indices),
    }
    pq.write_table(pa.table(candidates), folder / "candidates.parquet")
    write_manifest(folder, stage="prepare", config={}, seed=0, inputs={}, metrics={})


def _cocktail(folder: Path, model_folder: Path, seed: int) -> None:
    lm = load_language_model(model_folder, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in lm.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("q_proj", "down_proj")):
            a = torch.randn(4, module.in_features, generator=generator) * 0.3
            b = torch.randn(module.out_features, 4, generator=generator) * 0.3
            modules[name] = LoraPair(a=a, b=b, scale=1.0)
    save_adapter(folder, Adapter(modules), str(model_folder))
    write_manifest(folder, stage="merge", config={}, seed=0, inputs={}, metrics={})
