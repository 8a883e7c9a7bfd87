"""One trial: train an ingredient in this process, rank validation, seal the folder."""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from rc_ray.artifacts import MANIFEST, read_json, replaced_dir, restored, write_manifest
from rc_ray.core.adapters import Adapter, check_adapter, load_adapter, save_adapter
from rc_ray.core.domains import Domain, read_domain, sample
from rc_ray.core.loading import choose_dtype, dtype_name, load_language_model
from rc_ray.core.metrics import ndcg, rank_targets
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.training import StepMetrics
from rc_ray.curves import read_metrics, summary, write_metrics
from rc_ray.engines import (
    build_learner,
    check_trained,
    local_model_dir,
    prepare_process,
    read_share,
)
from rc_ray.errors import UserError
from rc_ray.precision import dtypes_in, joined
from rc_ray.tracking import tracked_trial
from rc_ray.training_config import TrainingConfig

WORKERS = ".workers"
"""Where Ray Train keeps its books of a trial with several workers."""
CHECKPOINT = ".checkpoint"
"""Hidden: no part of what the manifest seals."""
_TRAINED = "training_fingerprint"


class _Clock:
    """Where a process's time went; Unix seconds of its start, seconds of its laps.

    There is no `train_s` where others trained: a group shares its passes, the loss curve has each
    trial's seconds.
    """

    def __init__(self) -> None:
        self.spent = {"started_at": time.time()}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = round(now - self._last, 3)
        self._last = now


Report = Callable[[int, float], None]
"""Takes the number of steps done and the validation loss after them."""


def train_ingredient(
    trial: dict[str, Any], report: Report | None = None, *, adapter: Adapter | None = None
) -> dict[str, Any]:
    """Train from the last checkpoint on, rank the validation users, seal the folder.

    A folder that other validation settings have sealed is ranked anew without training.

    Args:
        trial: the trial's order; all JSON-able.
        report: is told of every validation, and may end the thread.
        adapter: the trained adapter, where others have trained it; its loss curve is in the folder.

    Returns:
        The manifest's metrics.
    """
    clock = _Clock()
    folder = Path(trial["folder"])
    setting = TrainingConfig.model_validate(trial["setting"])
    prepare_process(trial["num_cpus"])
    lm = base_of(trial)
    domain = read_domain(Path(trial["domain_dir"]))
    clock.lap("load_s")
    folder.mkdir(parents=True, exist_ok=True)
    sealed = sealed_adapter(trial, folder)
    if sealed is not None:
        adapter = sealed
    elif adapter is None:
        adapter = _train(trial, setting, lm, domain, folder, report)
        clock.lap("train_s")
    check_adapter(adapter, folder)
    check_trained(adapter, folder)
    renderer = PromptRenderer(lm.tokenizer, setting.style)
    with lm.folded(adapter):
        ranker = Ranker(
            lm,
            domain.name,
            domain.titles,
            domain.num_train,
            renderer,
            max_titles=trial["valid_max_titles"],
            tokens_per_batch=trial["tokens_per_batch"],
        )
        quality, num_users = validate(
            ranker,
            domain,
            num_users=trial["num_valid_users"],
            seed=trial["seed"],
            with_prior=setting.learns_with_prior,
        )
    clock.lap("rank_s")
    rows = read_metrics(folder / "metrics.jsonl")
    if sealed is None:
        save_adapter(folder / "adapter", adapter, trial["model"]["path"])
        write_metrics(folder / "metrics.jsonl", rows)
    metrics = {
        **summary(rows),
        "valid_ndcg": quality,
        "num_valid_users": num_users,
        "dtypes": joined(dtypes_in(rows), [dtype_name(lm.dtype)]),
        "spent": clock.spent,
        _TRAINED: trial["training_fingerprint"],
    }
    write_manifest(
        folder,
        stage="tune",
        config=trial["config"],
        seed=trial["seed"],
        inputs=trial["inputs"],
        metrics=metrics,
    )
    # Only now: a kill before the manifest must not cost the training.
    for left in (folder / WORKERS, *folder.glob(f"*{CHECKPOINT}*")):  # halves of killed writers too
        shutil.rmtree(left, ignore_errors=True)
    return metrics


def validate(
    ranker: Ranker, domain: Domain, *, num_users: int, seed: int, with_prior: bool
) -> tuple[float | None, int]:
    """Mean NDCG over validation users that are scored, on warm items.

    Args:
        ranker: with the adapter in place.
        domain: gives the users.
        num_users: at most so many.
        seed: which ones.
        with_prior: rank by the likelihood with the prior inside the trie, as it was trained.

    Returns:
        The mean over users of 1 / log2(rank + 1), in (0, 1], and the number of users; None and 0
        where the domain has no validation users.
    """
    cases = sample(domain.cases("valid", "warm", "scored"), num_users, seed)
    if not cases:
        return None, 0
    histories = [[domain.titles[item] for item in case.history] for case in cases]
    with torch.no_grad():
        scores = ranker.log_likelihoods(
            histories, [case.candidates for case in cases], with_prior=with_prior
        )
    gains = []
    for case, score in zip(cases, scores, strict=True):
        ranks = rank_targets(score.cpu().numpy()[None], [case.candidates.index(case.target)])
        gains.append(float(ndcg(ranks, len(case.candidates))[0]))
    return float(np.mean(gains)), len(gains)


def sealed_adapter(trial: dict[str, Any], folder: Path) -> Adapter | None:
    """The adapter of a folder that was sealed after this very training."""
    if not (folder / MANIFEST).exists():
        return None
    metrics = read_json(folder / MANIFEST)["metrics"]
    if metrics.get(_TRAINED) != trial["training_fingerprint"]:
        return None
    return load_adapter(folder / "adapter", trial["model"]["path"])


def _train(
    trial: dict[str, Any],
    setting: TrainingConfig,
    lm: LanguageModel,
    domain: Domain,
    folder: Path,
    report: Report | None,
) -> Adapter:
    """Run the remaining steps; the base model is bare again afterwards."""
    checkpoint = folder / CHECKPOINT
    learner = build_learner(
        lm,
        [domain, *(read_domain(Path(place)) for place in trial.get("pooled_dirs", ()))],
        setting,
        seed=trial["seed"],
        num_listed=trial["num_listed"],
        base_name=trial["model"]["path"],
        checkpoint=checkpoint if restored(checkpoint) else None,
        own_share=read_share(trial.get("own_share")),
    )
    try:
        if learner.start_step == 0:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        with (
            (folder / "metrics.jsonl").open("a", encoding="utf-8") as log,
            tracked_trial(trial, learner.start_step) as curve,
        ):
            for metrics in learner.steps():
                write_step(log, metrics, setting, learner.dtype)
                curve(metrics)
                num_done = metrics["step"] + 1
                if num_done % trial["checkpoint_every"] == 0 or learner.finished:
                    with replaced_dir(checkpoint) as work:
                        learner.save(work, num_done)
                valid_loss = metrics.get("valid_loss")
                if report is not None and valid_loss is not None and not learner.finished:
                    report(num_done, valid_loss)
        return learner.result()
    finally:
        learner.peft_model.unload()
        lm.model.eval()


def write_step(log: TextIO, metrics: StepMetrics, setting: TrainingConfig, dtype: str) -> None:
    """Append a step to the loss curve, with the precision that it was computed in.

    Raises:
        UserError: its loss is not finite.
    """
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"the loss is {metrics['loss']} at step {metrics['step']}; lower "
            f"`tune.learning_rate` ({setting.learning_rate:g})"
        )
    rate = metrics["num_tokens"] / metrics["seconds"]
    log.write(json.dumps({**metrics, "tokens_per_s": rate, "dtype": dtype}) + "\n")
    log.flush()


def base_of(trial: dict[str, Any]) -> LanguageModel:
    """The base model that a trial's order names, from this node."""
    folder = local_model_dir(trial["model_dir"], trial["model"]["path"])
    device = "cuda" if trial["use_gpu"] else "cpu"
    return base_model(folder, trial["model"]["dtype"], device)


def forget_base() -> None:
    """Drop the loaded base model, which a failed trial may have left with its LoRA."""
    base_model.cache_clear()


@functools.lru_cache(maxsize=1)
def base_model(folder: Path, dtype: str, device: str) -> LanguageModel:
    """The base model; Tune runs the next trial in the same process, which finds it loaded."""
    return load_language_model(folder, choose_dtype(dtype, device), device)
