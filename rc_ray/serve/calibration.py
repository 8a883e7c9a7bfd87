"""Alpha, gamma and the prior in the trie, as a domain is served with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rc_ray.artifacts import RunFolder, read_json
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError
from rc_ray.guard import read_guard
from rc_ray.serve.served import guard_of, served_system


@dataclass(frozen=True)
class Calibration:
    """Settings of the calibrated score."""

    alpha: float = 0.0
    gamma: float = 0.0
    prior_in_trie: bool = False
    measured: bool = False
    """Whether they were chosen or fixed; else they are the defaults."""
    chosen_by: str = "default"
    scope: str = "domain"


def open_calibration(experiment: Experiment, domain: str) -> Calibration:
    """The weights that the experiment fixes, or that `evaluate` chose for the served system.

    What a guard chose may have been evaluated as `guarded` alone; it is served as it was then.
    A domain that was not evaluated takes what was chosen for all domains, else what the guard of
    the merge chose for this domain. Where there is nothing of this, it is the likelihood as it was
    trained.

    Raises:
        ArtifactError: the file is damaged.
    """
    fixed = experiment.evaluate.calibration.fixed
    if fixed is not None:
        return Calibration(*fixed, True, "fixed", experiment.evaluate.calibration.scope)
    path = RunFolder(experiment.run_dir).evaluate_dir / "calibration.json"
    as_trained = Calibration(prior_in_trie=experiment.tune.learns_with_prior)
    system = served_system(experiment, domain)
    try:
        chosen = None
        if path.exists():
            is_guarded = guard_of(experiment, domain) is not None
            chosen = _chosen(read_json(path), domain, system, is_guarded=is_guarded)
        if chosen is None:
            verdict = read_guard(RunFolder(experiment.run_dir).cocktail_dir(domain))
            chosen = None if verdict is None else verdict.systems.get(system)
            if chosen is not None:  # an earlier version did not tell who chose
                chosen = {"chosen_by": experiment.evaluate.calibration.chosen_by, **chosen}
        if chosen is None:
            return as_trained
        return Calibration(
            float(chosen["alpha"]),
            float(chosen["gamma"]),
            bool(chosen["prior_in_trie"]),
            True,
            str(chosen.get("chosen_by", "clicks")),
            str(chosen.get("scope", "domain")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: damaged; run `rc-ray evaluate` again") from None


def _chosen(
    table: Mapping[str, Mapping[str, Mapping[str, Any]]],
    domain: str,
    system: str,
    *,
    is_guarded: bool,
) -> Mapping[str, Any] | None:
    """The entry of `calibration.json` that holds for a domain; None where nothing was chosen."""
    own = table.get(domain, {}).get(system)
    if own is None and is_guarded:  # what a guard chose may be compared under that name alone
        guarded = table.get(domain, {}).get("guarded")
        own = None if guarded is None or "is" in guarded else guarded
    shared = [one[system] for one in table.values() if one.get(system, {}).get("scope") == "global"]
    entry = own if own is not None else next(iter(shared), None)
    if entry is None or entry.get("chosen_by", "clicks") == "default":
        return None
    # Files without `chosen_by` are of runs whose validation users chose, where there were any.
    return entry if "chosen_by" in entry or entry["valid_ndcg"] is not None else None
