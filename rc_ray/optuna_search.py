"""Optuna's suggestions, one study per domain: what helps one says little about another.

Each suggestion is written as a trial's order, so a study is filled anew from the finished trials
when Tune's own books do not outlive the driver.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rc_ray import artifacts
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.search_space import Distribution
from rc_ray.sweep_plan import (
    is_finished,
    order_path,
    orders_of,
    plan_trial,
    trial_config,
    was_stopped,
    write_order,
)

METRIC = "valid_ndcg"
_MAX_ASKS = 50
"""For a point that the domain has not had."""


class OptunaPerDomain(Searcher):  # type: ignore[misc]
    """Takes the domains in turn and asks each one's study for its next point.

    Args:
        experiment: the whole experiment.
        inputs: domain -> name -> digest of what its ingredient is made from.
        work: the folder of all trials.
        orders: where orders are written.
        model: the base model's folder on the driver's node.
        memory: bytes that a trial's process is given.
    """

    def __init__(
        self,
        experiment: Experiment,
        inputs: Mapping[str, dict[str, str]],
        work: Path,
        orders: Path,
        model: Path,
        memory: int,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._experiment = experiment
        self._inputs = dict(inputs)
        self._work = work
        self._orders = orders
        self._model = model
        self._memory = memory
        self._studies: dict[str, Any] = {}
        self._left: dict[str, int] = {}
        self._asked: dict[str, tuple[str, str]] = {}
        self._again: dict[str, list[Path]] = {}
        self._begun: dict[str, Path] = {}
        self._given: set[str] = set()
        self._space = {
            name.replace(".", "|"): _optuna_distribution(one)
            for name, one in experiment.tune.space.distributions.items()
        }
        for domain in inputs:
            self._prepare(domain)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        domain = max(self._left, key=lambda name: self._left[name], default=None)
        if domain is None or self._left[domain] == 0:
            return Searcher.FINISHED
        self._left[domain] -= 1
        if self._again[domain]:  # begun by a driver that was killed
            path = self._begun[trial_id] = self._again[domain].pop(0)
            self._given.add(path.name)
            return {"trial": str(path)}
        for attempt in range(_MAX_ASKS):
            asked = trial_id if attempt == 0 else f"{trial_id}.{attempt}"
            point = self._studies[domain].suggest(asked)
            order = self._order(domain, {key.replace("|", "."): v for key, v in point.items()})
            if order is not None:
                self._asked[trial_id] = (domain, asked)
                self._given.add(order.name)
                return {"trial": str(order)}
        self._left[domain] = 0  # a small space: everything in it has been tried
        return self.suggest(trial_id)

    def _order(self, domain: str, point: dict[str, Any]) -> Path | None:
        """The order of a new point, None for one that is no setting or that the domain has."""
        try:
            setting = self._experiment.tune.setting(point)
        except ValueError:  # e.g. a batch between two ends that does not divide into whole parts
            return None
        trial = plan_trial(self._experiment, self._inputs[domain], domain, self._work, setting)
        if order_path(self._orders, trial).exists():
            return None
        run = RunFolder(self._work.parent)
        order = trial_config(self._experiment, run, trial, self._model, memory=self._memory)
        return write_order(self._orders, trial, order)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in self._asked:
            domain, asked = self._asked.pop(trial_id)
            failed = error or bool((result or {}).get("failed"))
            self._studies[domain].on_trial_complete(asked, result, failed)
        elif trial_id in self._begun:
            order = artifacts.read_json(self._begun.pop(trial_id))
            self._tell(order, (result or {}).get(METRIC))

    def save(self, checkpoint_path: str) -> None:
        # Studies and what is left; what a restored experiment says else is the pickled searcher's.
        state = (
            self._studies,
            self._left,
            self._asked,
            self._again,
            self._begun,
            self._given,
        )
        with open(checkpoint_path, "wb") as file:
            pickle.dump(state, file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            (
                self._studies,
                self._left,
                self._asked,
                self._again,
                self._begun,
                self._given,
            ) = pickle.load(file)
        # Given after the books were last written: Tune does not know these.
        for domain, again in self._again.items():
            known = {*self._given, *(path.name for path in again)}
            again += [path for path in self._unfinished(domain) if path.name not in known]

    def _unfinished(self, domain: str) -> list[Path]:
        return [
            path
            for path, order in orders_of(self._orders, domain, self._inputs[domain])
            if not _has_ended(order)
        ]

    def _tell(self, order: dict[str, Any], value: float | None) -> None:
        if value is not None:  # None: it failed, or the domain has no validation users
            point = _point(order["setting"], self._space)
            self._studies[order["domain"]].add_evaluated_point(point, value)

    def _prepare(self, domain: str) -> None:
        """A study that knows the domain's finished trials."""
        config = self._experiment.tune
        self._studies[domain] = OptunaSearch(
            self._space, metric=METRIC, mode="max", seed=config.search_seed
        )
        num_ended = 0
        for _, order in orders_of(self._orders, domain, self._inputs[domain]):
            if _has_ended(order):
                num_ended += 1
            if is_finished(order):
                manifest = artifacts.read_json(Path(order["folder"]) / artifacts.MANIFEST)
                self._tell(order, manifest["metrics"].get(METRIC))
        self._again[domain] = self._unfinished(domain)
        self._left[domain] = max(0, (config.num_samples or 0) - num_ended)


def _has_ended(order: dict[str, Any]) -> bool:
    """Whether a trial is finished, or was stopped early and stays so."""
    return is_finished(order) or was_stopped(Path(order["folder"]), order["scheduler"])


def _point(setting: dict[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """Where in the space a setting lies; the space's names have a bar in place of the dot."""
    point = {}
    for name in space:
        section, _, leaf = name.rpartition("|")
        point[name] = (setting[section] if section else setting)[leaf]
    return point


def _optuna_distribution(one: Distribution) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if one.kind == "choice":
        return CategoricalDistribution(list(one.values))
    low, high = one.values
    if one.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=one.kind == "loguniform")
