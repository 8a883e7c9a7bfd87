"""What is served where: the domains of a system, and what a guard put in a cocktail's place."""

from __future__ import annotations

from pathlib import Path

from rc_ray.artifacts import MANIFEST, RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError
from rc_ray.guard import Verdict, read_guard


def served_domains(experiment: Experiment) -> tuple[str, ...]:
    """Domains that the served system knows: the spirit serves all, the others their own."""
    data = experiment.data
    known = {"spirit": data.domains, "ingredient": data.ingredients}
    return known.get(experiment.serve.system, data.tested)


def served_system(experiment: Experiment, domain: str) -> str:
    """What is served on a domain: in the cocktail's place, what its guard chose.

    Raises:
        ArtifactError: what the guard said is damaged.
    """
    verdict = guard_of(experiment, domain)
    return experiment.serve.system if verdict is None else verdict.chosen


def told_by_system(experiment: Experiment) -> str:
    """What is served where, as `action, drama (cocktail); music (spirit)`."""
    found: dict[str, list[str]] = {}
    for domain in served_domains(experiment):
        found.setdefault(served_system(experiment, domain), []).append(domain)
    return "; ".join(f"{', '.join(domains)} ({system})" for system, domains in found.items())


def guard_of(experiment: Experiment, domain: str) -> Verdict | None:
    """What the guard of a domain said; None where it has no say in what is served.

    Raises:
        ArtifactError: the file is damaged.
    """
    if experiment.serve.system != "cocktail" or not experiment.serve.guard:
        return None
    return read_guard(RunFolder(experiment.run_dir).cocktail_dir(domain))


def refuse_unmade(experiment: Experiment) -> None:
    """Refuse to serve what is not there, before Ray is started for it.

    Raises:
        ArtifactError: names the first folder that is missing and the verb that makes it.
    """
    run = RunFolder(experiment.run_dir)
    for domain in served_domains(experiment):
        system = served_system(experiment, domain)
        made_by = {run.domain_dir(domain): "prepare", stage_of(run, system, domain): maker(system)}
        for folder, verb in made_by.items():
            if not (folder / MANIFEST).exists():
                raise ArtifactError(f"{folder}: not there yet; run `rc-ray {verb}` first")


def maker(system: str) -> str:
    """The verb that makes what is served."""
    return {"spirit": "train", "ingredient": "tune"}.get(system, "merge")


def stage_of(run: RunFolder, system: str, domain: str) -> Path:
    """The stage folder that holds what is served, whose manifest tells one making from another."""
    own = {"spirit": run.spirit_dir, "ingredient": run.ingredient_dir(domain)}
    return own.get(system, run.cocktail_dir(domain))
