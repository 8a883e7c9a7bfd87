"""Which adapters an evaluation scores on a domain: not every domain has every system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.guard import read_guard
from rc_ray.systems import BASELINES, System


def scored_adapters(
    experiment: Experiment, folder: RunFolder, domain: str
) -> dict[System, Path | None]:
    """The systems that an LLM scores on a domain and their adapters' folders; None: the bare base.

    A guest has no ingredient and no joint LoRA, and a mix that failed on this domain no scores.
    `guarded` is among them only where what the guard chose is not scored under its own name.

    Raises:
        ArtifactError: what a guard said is damaged.
    """
    found: dict[System, Path | None] = {}
    for system in experiment.evaluate.systems:
        if system in BASELINES or system == "guarded":
            continue
        if system in ("ingredient", "joint") and domain not in experiment.data.ingredients:
            continue
        place = folder.adapter_dir(domain, system)
        if place is None or place.exists() or not experiment.is_mixed(system):
            found[system] = place
    if "guarded" in experiment.evaluate.systems:
        chosen = chosen_by_guard(folder, domain)
        if chosen not in found:
            found["guarded"] = folder.adapter_dir(domain, chosen)
    return found


def left_out(experiment: Experiment, folder: RunFolder) -> Iterator[str]:
    """Mixes that a domain lacks because they failed there."""
    for domain in experiment.data.tested:
        for system in experiment.evaluate.systems:
            place = folder.adapter_dir(domain, system)
            is_mix = experiment.is_mixed(system) and system != "guarded"
            if is_mix and place is not None and not place.exists():
                yield f"{domain} has no mix {system}: it is not compared there"


def chosen_by_guard(folder: RunFolder, domain: str) -> System:
    """What the guard of a domain serves."""
    verdict = read_guard(folder.cocktail_dir(domain))
    return "cocktail" if verdict is None else verdict.chosen
