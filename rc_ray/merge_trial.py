"""One trial of a search over merge settings: a domain's cocktail, and what it is compared by.

Tune gives one process trial after trial. What they share stays open: the base LLM, and of the last
domain its adapters and its trie.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from rc_ray.artifacts import MANIFEST, read_json, write_manifest
from rc_ray.core.adapters import load_adapter
from rc_ray.core.loading import dtype_name
from rc_ray.core.weighting import measure_objective
from rc_ray.engines import prepare_process
from rc_ray.errors import UserError
from rc_ray.merge_prompts import prompts_for
from rc_ray.mix_config import LearnedMix
from rc_ray.mix_making import scored_by
from rc_ray.mixing import make_sealed
from rc_ray.open_domain import OpenDomain
from rc_ray.precision import joined
from rc_ray.shards import Stopwatch
from rc_ray.trial import base_of

MIX = "mix"
"""In a trial's folder: the cocktail, sealed by itself, so that another comparison finds it made."""

_last: dict[str, OpenDomain] = {}
"""The domain of this process's last trial, under what was asked for."""


def mix_cocktail(trial: dict[str, Any]) -> dict[str, Any]:
    """Make the cocktail of one setting, measure it, seal the folder.

    Validation clicks are read where they choose; no test click is ever read.

    Args:
        trial: the trial's order, see `merge_plan.trial_order`.

    Returns:
        The manifest's metrics: those of the mix, `valid_ndcg` (in (0, 1]; null where an objective
        chooses, or without validation users) and `final_objective` (null where clicks choose).

    Raises:
        UserError: the setting does not fit the domain, or what it is compared by is not finite.
    """
    watch = Stopwatch()
    folder = Path(trial["folder"])
    prepare_process(trial["num_cpus"])
    try:
        opened = _opened(trial)
        with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
            make_sealed(opened, "cocktail", trial["mix"], folder / MIX, log)
        ndcg, num_users, objective = None, 0, None
        if trial["choose_by"] == "valid_ndcg":
            ndcg, num_users = _valid_ndcg(opened, folder / MIX)
        else:
            objective = _final_objective(opened, trial["mix"]["config"]["mix"], folder / MIX)
    except Exception:
        _last.clear()  # a failure may leave the model with what was mixed
        raise
    mix = read_json(folder / MIX / MANIFEST)["metrics"]
    metrics = {
        **mix,
        "dtypes": joined(mix.get("dtypes", ()), [dtype_name(opened.lm.dtype)]),
        "valid_ndcg": ndcg,
        "num_valid_users": num_users,
        "final_objective": objective,
        "trial_seconds": round(watch.lap(), 1),
    }
    write_manifest(
        folder,
        stage="merge",
        config=trial["config"],
        seed=trial["seed"],
        inputs=trial["inputs"],
        metrics=metrics,
    )
    for left in folder.glob(f".{MIX}.*"):  # halves of killed writers
        shutil.rmtree(left, ignore_errors=True)
    return metrics


def _opened(trial: dict[str, Any]) -> OpenDomain:
    key = json.dumps([trial["opened"], trial["inputs"]], sort_keys=True)
    if key not in _last:
        _last.clear()
        _last[key] = OpenDomain(trial["opened"], base_of(trial))
    return _last[key]


def _valid_ndcg(opened: OpenDomain, mix_dir: Path) -> tuple[float | None, int]:
    """Mean NDCG over the choosing users under the calibration that they choose, and their number.

    The mean of 1 / log2(rank + 1) over the main candidate list; the evaluation reports it cut
    off at 10.
    """
    found = opened.judged({"cocktail": load_adapter(mix_dir)}, opened.choosing_cases)
    if not found:
        return None, 0
    gains = found["cocktail"].ndcg
    return float(np.mean(gains)), len(gains)


def _final_objective(opened: OpenDomain, config: dict[str, Any], mix_dir: Path) -> float:
    """The unlabeled objective at the learned weights, over the prompts that they were learned on.

    Raises:
        UserError: it is not finite.
    """
    mix = LearnedMix.model_validate(config)
    seed = opened.seed_of(mix)
    adapters = list(opened.adapters.values())
    saved = read_json(mix_dir / "weights.json")
    prompts = prompts_for(
        opened.domain,
        mix,
        seed,
        num_test_users=opened.evaluate.num_test_users,
        split_seed=opened.order["split_seed"],
    )
    calibration, with_prior = scored_by(opened, adapters, mix)
    objective = measure_objective(
        opened.ranker(mix.max_titles),
        adapters,
        prompts,
        mix,
        seed,
        dict(zip(saved["modules"], saved["weights"], strict=True)),
        with_prior=with_prior,
        micro_batch_size=opened.order["micro_batch_size"],
        calibration=calibration,
    )
    if not math.isfinite(objective):
        raise UserError(
            f"the objective is {objective} at the learned weights; lower `merge.learning_rate` "
            f"({mix.learning_rate:g})"
        )
    return objective
