"""Stage 1: raw logs -> prepared domains in `runs/<name>/data`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rc_ray import artifacts, assets
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core import sources
from rc_ray.core.cleaning import DomainError
from rc_ray.core.domains import prepare_domain
from rc_ray.core.sources import RawDomain, SourceError
from rc_ray.data_config import DataConfig, MovieLensSource, Source
from rc_ray.errors import UserError
from rc_ray.progress import Progress


class PrepareError(UserError):
    """Several domains could not be prepared; one line for each."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Prepare every domain in use; those that stand are kept, also when another one fails.

    Args:
        experiment: the whole experiment.
        force: redo what stands.
        console: hears one line per domain.

    Returns:
        The folder with one folder per domain.

    Raises:
        SourceError: a raw file cannot be used.
        DomainError: too little is left of a domain.
        PrepareError: several of these.
    """
    data = experiment.data
    folder = RunFolder(experiment.run_dir)
    console.stage("prepare")
    failures: list[UserError] = []
    for source in data.sources:
        wanted = [name for name in sources.domain_names(source) if name in data.domains]
        if not wanted:
            continue
        try:
            failures += _prepare_source(experiment, source, wanted, folder, force, console)
        except SourceError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise PrepareError("\n".join(str(failure) for failure in failures))
    return folder.domain_dir(data.domains[0]).parent


def fingerprint_config(data: DataConfig, source: Source, domain: str) -> dict[str, Any]:
    """The settings that shape this prepared domain; where its files lie is none of them."""
    is_ingredient = domain in data.ingredients
    own = {"sources", "spirit", "ingredients"}
    if not is_ingredient:
        own |= {"cold_item_fraction", "unlabeled_fraction"}
    return {
        "domain": domain,
        "role": "ingredient" if is_ingredient else "spirit",
        "source": source.model_dump(mode="json", exclude={"path", "interactions", "items"}),
        **data.model_dump(mode="json", exclude=own),
    }


def _prepare_source(
    experiment: Experiment,
    source: Source,
    wanted: list[str],
    folder: RunFolder,
    force: bool,
    console: Progress,
) -> list[UserError]:
    """Prepare the wanted domains of one source; returns the failures of single domains."""
    data, seed = experiment.data, experiment.seed
    movielens_dir = None
    if isinstance(source, MovieLensSource) and source.path is None:
        movielens_dir = assets.movielens_dir(console.note)
    inputs = {
        path.name: artifacts.sha256_file(path) for path in sources.files(source, movielens_dir)
    }
    raw: dict[str, RawDomain] | None = None
    failures: list[UserError] = []
    for name in wanted:
        config = fingerprint_config(data, source, name)
        target = folder.domain_dir(name)
        fingerprint = artifacts.fingerprint(config=config, seed=seed, inputs=inputs)
        if not force and artifacts.is_finished(target, fingerprint):
            console.note(f"{name:18} stands already")
            continue
        start = time.monotonic()
        if raw is None:
            raw = sources.read(source, movielens_dir)
        try:
            metrics = prepare_domain(
                raw[name], target, data, seed, fingerprint_config=config, inputs=inputs
            )
        except DomainError as error:
            failures.append(error)
            continue
        console.note(summary(name, metrics, time.monotonic() - start))
    return failures


def summary(name: str, metrics: Mapping[str, Any], seconds: float) -> str:
    """One line of the table of prepared domains."""
    dropped = metrics["raw_interactions"] - metrics["interactions"]
    return (
        f"{name:18} {metrics['users']:7,} users {metrics['items']:7,} items "
        f"{metrics['interactions']:9,} interactions ({dropped:,} dropped), "
        f"{metrics['cold_items']:,} cold items; cases: {metrics['valid_cases']:,} valid, "
        f"{metrics['test_cases']:,} test, {metrics['cold_test_cases']:,} cold; {seconds:.1f} s"
    )
