"""Alpha, gamma and the prior in the trie, as a domain is served with them.

They were chosen for an adapter. Another one, made since, is not served with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rc_ray.artifacts import MANIFEST, RunFolder, manifest_digest, read_json
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError
from rc_ray.guard import ARTICLES, read_guard
from rc_ray.serve.served import guard_of, served_domains, served_system, stage_of

_STAGES = {
    "spirit": "the base spirit",
    "ingredients": "the ingredient",
    "cocktails": "the cocktail folder",
}
"""By the first part of a stage folder's name."""


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
    source: Literal["experiment", "evaluate", "guard", "default"] = "default"
    is_left: bool = False
    """Whether what `evaluate` chose was left, since it was for another adapter."""
    why: str = ""
    """Where they come from, and why from there, in words."""


def open_calibration(experiment: Experiment, domain: str) -> Calibration:
    """The weights that the experiment fixes, or that were chosen for what is served.

    Those of `evaluate` come first, where its manifest names the stage folder that is served as it
    is now. What a guard chose may have been evaluated as `guarded` alone; it is served as it was
    then. A domain that was not evaluated takes what was chosen for all domains, if none of their
    folders has changed. Then come those of the merge's guard for this domain, where it judged this
    adapter. Where there is nothing of this, it is the likelihood as it was trained.

    Raises:
        ArtifactError: a file is damaged.
    """
    settings = experiment.evaluate.calibration
    if settings.fixed is not None:
        why = "The calibration is that of the experiment file."
        fixed = (*settings.fixed, True, "fixed", settings.scope)
        return Calibration(*fixed, source="experiment", why=why)
    run = RunFolder(experiment.run_dir)
    system = served_system(experiment, domain)
    what = ARTICLES.get(system, f"the mix `{system}`")
    path = run.evaluate_dir / "calibration.json"
    try:
        is_guarded = guard_of(experiment, domain) is not None
        found = _of_evaluation(run, domain, system, is_guarded=is_guarded)
        if found is not None and found.changed is None:
            of = " on all evaluated domains at once, of which this is none" if found.shared else ""
            why = f"The calibration is that of `rc-ray evaluate` for {what}{of}."
            return _calibration(found.entry, source="evaluate", why=why)
        left = (
            f"{found.changed} has changed since `rc-ray evaluate` chose; run `rc-ray evaluate`"
            if found is not None and found.changed is not None
            else ""
        )
        by_guard = _of_guard(run, domain, system)
        if by_guard is not None:  # an earlier version did not tell who chose
            entry = {"chosen_by": settings.chosen_by, **by_guard}
            because = f": {left}" if left else "; `rc-ray evaluate` has chosen none"
            why = f"The calibration is that of the merge's guard for {what}{because}."
            return _calibration(entry, source="guard", is_left=bool(left), why=why)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: damaged; run `rc-ray evaluate` again") from None
    chooses = "; `rc-ray evaluate` chooses one for each system and domain that it compares"
    because = f": {left}" if left else chooses
    return Calibration(
        prior_in_trie=experiment.tune.learns_with_prior,
        is_left=bool(left),
        why=f"The likelihood ranks as it was trained, with no calibration for {what}{because}.",
    )


def told_by_calibrations(experiment: Experiment) -> Iterator[str]:
    """One line for all domains that are there and have their calibration from the same place.

    Raises:
        ArtifactError: a file is damaged.
    """
    run = RunFolder(experiment.run_dir)
    domains: dict[str, list[str]] = {}
    for domain in served_domains(experiment):
        if (stage_of(run, served_system(experiment, domain), domain) / MANIFEST).exists():
            domains.setdefault(open_calibration(experiment, domain).why, []).append(domain)
    for why, names in domains.items():
        yield f"{', '.join(names)}: {why}"


@dataclass(frozen=True)
class _Found:
    """An entry of `calibration.json` that holds for a domain."""

    entry: Mapping[str, Any]
    shared: bool
    """Whether it was chosen on other domains."""
    changed: str | None
    """What it was chosen for and is no longer as it was; None where all is."""


def _of_evaluation(run: RunFolder, domain: str, system: str, *, is_guarded: bool) -> _Found | None:
    """What an evaluation chose for a system on a domain; None where it chose nothing."""
    if not (run.evaluate_dir / "calibration.json").exists():
        return None
    table: Mapping[str, Mapping[str, Mapping[str, Any]]] = read_json(
        run.evaluate_dir / "calibration.json"
    )
    stages = [stage_of(run, system, domain)]
    entry = table.get(domain, {}).get(system)
    if entry is None and is_guarded:  # what a guard chose may be compared under that name alone
        guarded = table.get(domain, {}).get("guarded")
        entry = None if guarded is None or "is" in guarded else guarded
        stages.append(run.cocktail_dir(domain))  # another guard may have meant another system
    shared = entry is None
    if entry is None:
        alike = {
            name: one[system]
            for name, one in table.items()
            if one.get(system, {}).get("scope") == "global"
        }
        stages = [stage_of(run, system, name) for name in alike]
        entry = next(iter(alike.values()), None)
    if entry is None or entry.get("chosen_by", "clicks") == "default":
        return None
    # Files without `chosen_by` are of runs whose validation users chose, where there were any.
    if "chosen_by" not in entry and entry["valid_ndcg"] is None:
        return None
    return _Found(entry, shared, _changed(run, stages, read_by=run.evaluate_dir))


def _of_guard(run: RunFolder, domain: str, system: str) -> Mapping[str, Any] | None:
    """What the guard of a domain chose for the adapter that is served there."""
    folder = run.cocktail_dir(domain)
    verdict = read_guard(folder)
    entry = None if verdict is None else verdict.systems.get(system)
    stage = stage_of(run, system, domain)
    # What the merge made lies in the guard's own folder.
    is_same = stage == folder or _changed(run, [stage], read_by=folder) is None
    return entry if is_same else None


def _changed(run: RunFolder, stages: Iterable[Path], *, read_by: Path) -> str | None:
    """The first of these stages that is not as another one read it."""
    path = read_by / MANIFEST
    inputs = read_json(path)["inputs"] if path.exists() else {}
    for stage in stages:
        name = str(stage.relative_to(run.root))
        is_there = (stage / MANIFEST).exists()
        if not is_there or inputs.get(name) != manifest_digest(stage):
            return _STAGES[name.partition("/")[0]]
    return None


def _calibration(entry: Mapping[str, Any], **told: Any) -> Calibration:
    return Calibration(
        float(entry["alpha"]),
        float(entry["gamma"]),
        bool(entry["prior_in_trie"]),
        True,
        str(entry.get("chosen_by", "clicks")),
        str(entry.get("scope", "domain")),
        **told,
    )
