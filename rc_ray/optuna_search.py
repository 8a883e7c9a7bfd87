"""Optuna's suggestions, one study per domain: what helps one says little about another.

Each suggestion is written as a trial's order, so a study is filled anew from the finished trials
when Tune's own books do not outlive the driver.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rc_ray import artifacts
from rc_ray.merge_config import MergeConfig
from rc_ray.search_space import Distribution
from rc_ray.sweep_plan import is_finished, was_stopped
from rc_ray.tune_config import TuneConfig

_MAX_ASKS = 50
"""For a point that the domain has not had."""

Order = dict[str, Any]
"""Of a trial: what its worker is handed; `setting` holds the whole setting."""


class OptunaPerDomain(Searcher):  # type: ignore[misc]
    """Takes the domains in turn and asks each one's study for its next point.

    Args:
        domains: their names.
        config: what is searched, how often, and with which seed.
        known: a domain's name -> path and content of each of its orders so far.
        make: a domain's name and a setting -> path and content of the trial's order.
        metric: what a trial reports and a study learns from.
        mode: whether more of it is better.
    """

    def __init__(
        self,
        domains: Iterable[str],
        config: TuneConfig | MergeConfig,
        known: Callable[[str], list[tuple[Path, Order]]],
        make: Callable[[str, Any], tuple[Path, Order]],
        *,
        metric: str = "valid_ndcg",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._config = config
        self._known = known
        self._make = make
        self._studies: dict[str, Any] = {}
        self._left: dict[str, int] = {}
        self._asked: dict[str, tuple[str, str]] = {}
        self._again: dict[str, list[Path]] = {}
        self._begun: dict[str, Path] = {}
        self._given: set[str] = set()
        self._space = {
            name.replace(".", "|"): _optuna_distribution(one)
            for name, one in config.space.distributions.items()
        }
        self._choices = {
            name.replace(".", "|"): [_held(config, name, value) for value in values]
            for name, values in config.space.choices.items()
        }
        for domain in domains:
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
            order = self._order(domain, self._studies[domain].suggest(asked))
            if order is not None:
                self._asked[trial_id] = (domain, asked)
                self._given.add(order.name)
                return {"trial": str(order)}
        self._left[domain] = 0  # a small space: everything in it has been tried
        return self.suggest(trial_id)

    def _order(self, domain: str, point: Mapping[str, Any]) -> Path | None:
        """The order of a new point, None for one that is no setting or that the domain has."""
        choices = self._config.space.choices
        values = {name.replace("|", "."): place for name, place in point.items()}
        values |= {name: choices[name][values[name]] for name in choices}
        try:
            setting = self._config.setting(values)
        except ValueError:  # e.g. a batch between two ends that does not divide into whole parts
            return None
        path, order = self._make(domain, setting)
        if path.exists():
            return None
        artifacts.write_json(path, order)
        return path

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
            self._tell(order, (result or {}).get(self.metric))

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
        return [path for path, order in self._known(domain) if not _has_ended(order)]

    def _tell(self, order: Order, value: float | None) -> None:
        if value is None:  # it failed, or the domain has no validation users
            return
        point = {name: _at(order["setting"], name.replace("|", ".")) for name in self._space}
        point |= {name: held.index(point[name]) for name, held in self._choices.items()}
        self._studies[order["domain"]].add_evaluated_point(point, value)

    def _prepare(self, domain: str) -> None:
        """A study that knows the domain's finished trials."""
        config = self._config
        self._studies[domain] = OptunaSearch(
            self._space, metric=self.metric, mode=self.mode, seed=config.search_seed
        )
        num_ended = 0
        for _, order in self._known(domain):
            if _has_ended(order):
                num_ended += 1
            if is_finished(order):
                manifest = artifacts.read_json(Path(order["folder"]) / artifacts.MANIFEST)
                self._tell(order, manifest["metrics"].get(self.metric))
        self._again[domain] = self._unfinished(domain)
        self._left[domain] = max(0, (config.num_samples or 0) - num_ended)


def _has_ended(order: Order) -> bool:
    """Whether a trial is finished, or was stopped early and stays so."""
    return is_finished(order) or was_stopped(Path(order["folder"]), order["scheduler"])


def _held(config: TuneConfig | MergeConfig, name: str, value: Any) -> Any:
    """What an order's setting holds where this value was chosen, e.g. a number for its text."""
    point = {**config.space.draw(config.search_seed, 0), name: value}
    return _at(config.setting(point).model_dump(mode="json"), name)


def _at(setting: Mapping[str, Any], name: str) -> Any:
    """The value of a field, whose name may begin with its section's and a dot."""
    section, _, leaf = name.rpartition(".")
    return (setting[section] if section else setting)[leaf]


def _optuna_distribution(one: Distribution) -> Any:
    """A choice is drawn by its place in the list: a list of domains is no value for Optuna."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if one.kind == "choice":
        return CategoricalDistribution(range(len(one.values)))
    low, high = one.values
    if one.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=one.kind == "loguniform")
