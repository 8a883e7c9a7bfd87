"""One run of Ray Tune over the trials that are left: fresh, or on from where a killed driver was.

Tune's books lie under `.tune` beside the trials for the length of a sweep, named after everything
that shapes it: a sweep of the same name goes on with `Tuner.restore`, any other starts anew. The
trials' own folders are the record, so even then no finished trial is run again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_RESTARTS = 2
"""Of a trial whose process died; an exception is final."""


@dataclass(frozen=True)
class Request:
    """What each of a trial's processes asks of its node."""

    cpus: float
    gpus: float
    memory: int
    """Bytes; 0 asks for none."""
    num_workers: int = 1

    @property
    def of_a_trial(self) -> dict[str, float]:
        """Resources of Tune's own process: none but a byte where it waits for workers."""
        if self.num_workers > 1:
            return {"cpu": 0, "memory": 1}
        asked = {"cpu": self.cpus, "gpu": self.gpus, "memory": self.memory}
        return {name: value for name, value in asked.items() if value}


def fit(
    books: Path,
    orders: Sequence[Path],
    orders_dir: Path,
    trainable: Callable[[dict[str, Any]], None],
    request: Request,
    *,
    num_slots: int,
    max_concurrent: int | None = None,
    scheduler: Any = None,
    searcher: Any = None,
    num_samples: int = 1,
    note: Callable[[str], None] = print,
) -> dict[Path, str]:
    """Run trials to their ends.

    Args:
        books: Tune's folder of this sweep; it is gone on with where there is one.
        orders: one file per planned trial.
        orders_dir: the folder with these files, or where the searcher writes its own.
        trainable: gets `{"trial": path of the order}`.
        request: what a trial's process asks for.
        num_slots: trials that the cluster holds at the same time now.
        max_concurrent: trials side by side at most; None, as many as there is room for.
        scheduler: stops trials early; None runs all to their ends.
        searcher: gives orders on the way, in place of `orders`.
        num_samples: how many the searcher gives.
        note: is told when a sweep is gone on with.

    Returns:
        Order -> what killed its trial, for trials whose process died too often.
    """
    from ray import tune

    for other in books.parent.glob("*"):
        if other != books:
            shutil.rmtree(other, ignore_errors=True)
    with_resources = tune.with_resources(trainable, request.of_a_trial)
    space: dict[str, Any] = {}
    if searcher is None:
        space = {"trial": tune.grid_search([str(path) for path in orders])}
    limit = max_concurrent
    if searcher is not None or request.num_workers > 1:  # nothing else bounds these
        limit = min(limit or num_slots, max(1, num_slots))
    tuner = _restored(books, with_resources, space)
    if tuner is None:
        shutil.rmtree(books, ignore_errors=True)
        tuner = tune.Tuner(
            with_resources,
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=num_samples,
                max_concurrent_trials=limit,
                scheduler=scheduler,
                search_alg=searcher,
                # The base model stays loaded between trials; Ray Train's workers end with theirs.
                reuse_actors=request.num_workers == 1,
                trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(
                name=books.name,
                storage_path=str(books.parent),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_RESTARTS),
            ),
        )
    else:
        note("the sweep of a driver that was killed goes on")
    results = tuner.fit()
    died = {}
    for result in results:
        if result.error is not None:
            lines = str(result.error).strip().splitlines() or [type(result.error).__name__]
            # By the folder's name: Tune knows no settings of a trial that died before its first
            # report, and a restored sweep may hold groups that are not among `orders`.
            died[orders_dir / f"{Path(result.path).name}.json"] = lines[-1]
    # Only a sweep that was cut off is gone on with.
    shutil.rmtree(books, ignore_errors=True)
    return died


def _restored(books: Path, trainable: Any, space: dict[str, Any]) -> Any:
    """The Tuner of a driver that was killed in this very sweep, or None."""
    from ray import tune

    if not books.exists() or not tune.Tuner.can_restore(str(books)):
        return None
    try:
        return tune.Tuner.restore(
            str(books),
            trainable=trainable,
            param_space=space,
            resume_unfinished=True,
            resume_errored=True,
        )
    except Exception as error:  # half-written books: the trial folders tell what is left to do
        logging.getLogger(__name__).warning("%s: not restored: %s", books, error)
        return None


def _folder_name(trial: Any) -> str:
    return Path(trial.config["trial"]).stem
