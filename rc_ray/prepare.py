"""Stage 1: raw logs -> prepared domains in `runs/<name>/data`.

Tested domains come first: what they hold out of all training, cold items and cold users, must not
train a spirit either, so the spirit domains are told. Where ingredients are mixed on other domains
(`merge.neighbours`, `data.guests`) these domains hold out from them too. Since two domains may hold
out from each other, what each holds out is then written before any domain is prepared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rc_ray import artifacts, assets
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core import sources
from rc_ray.core.cleaning import DomainError
from rc_ray.core.domain_files import HELD_OUT_FILE, read_held_out
from rc_ray.core.held_out import HeldOut
from rc_ray.core.leaks import LeakError
from rc_ray.core.preparing import hold_out, prepare_domain
from rc_ray.core.sources import RawDomain, SourceError
from rc_ray.data_config import MovieLensSource, Source, domain_names
from rc_ray.errors import UserError
from rc_ray.progress import Progress


class PrepareError(UserError):
    """Several domains could not be prepared; one line for each."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Prepare every domain in use; those that stand are kept, also when another one fails.

    Spirit domains wait for the tested domains: while one of these fails they are not made. So does
    an ingredient domain for those that hold out from it.

    Args:
        experiment: the whole experiment.
        force: redo what stands.
        console: hears one line per domain, and what a slow one is doing.

    Returns:
        The folder with one folder per domain.

    Raises:
        SourceError: a raw file cannot be used.
        DomainError: too little is left of a domain.
        LeakError: a split would leak.
        PrepareError: several of these.
    """
    data = experiment.data
    folder = RunFolder(experiment.run_dir)
    console.stage("prepare")
    opened = [_Opened(source) for source in data.sources]
    failures: dict[int, list[UserError]] = {place: [] for place in range(len(opened))}
    failed: set[str] = set()
    unreadable: set[int] = set()
    before = {name: set(experiment.held_out_by(name)) for name in data.domains}
    apart = {other for name in data.ingredients for other in before[name]}
    for work, names in (
        (_hold_out, apart),
        (_prepare, set(data.tested)),
        (_prepare, set(data.spirit)),
    ):
        lacking = frozenset(failed)
        for place, source in enumerate(opened):
            own = [one for one in domain_names(source.source) if one in names - failed]
            if not own or place in unreadable:
                continue
            wanted = own if work is _hold_out else [one for one in own if not before[one] & lacking]
            try:
                source.find(console)
                found = work(experiment, source, wanted, folder, force, console) if wanted else {}
                failures[place] += found.values()
                failed.update(found)
            except SourceError as error:
                failures[place].append(error)
                failed.update(own)
                unreadable.add(place)
    told = [failure for one in failures.values() for failure in one]
    if len(told) == 1:
        raise told[0]
    if told:
        raise PrepareError("\n".join(str(failure) for failure in told))
    return folder.domain_dir(data.domains[0]).parent


def fingerprint_config(experiment: Experiment, source: Source, domain: str) -> dict[str, Any]:
    """The settings that shape this prepared domain; where its files lie is none of them.

    A spirit domain, and one whose ingredient is mixed on others, names the domains that hold out
    from it; what they hold out in fact is among its inputs.
    """
    data = experiment.data
    is_tested = domain in data.tested
    config = {
        "domain": domain,
        "role": "ingredient" if is_tested else "spirit",
        "source": source.model_dump(mode="json", exclude={"path", "interactions", "items"}),
        **data.model_dump(
            mode="json",
            exclude={"sources", "spirit", "ingredients", "guests", "num_training_users"},
        ),
    }
    if domain in data.num_training_users:
        config["num_training_users"] = data.num_training_users[domain]
    if not is_tested:
        for field in ("unlabeled_fraction", "few_shot_user_fraction", "num_few_shot"):
            del config[field]
    held_out_by = list(experiment.held_out_by(domain))
    if held_out_by or not is_tested:
        config["held_out_by"] = held_out_by
    return config


def held_out_inputs(experiment: Experiment, folder: RunFolder, domain: str) -> dict[str, str]:
    """Digests of what other domains hold out from one, by path in the run folder."""
    names = experiment.held_out_by(domain)
    if domain in experiment.data.tested:
        return {
            f"held_out/{name}": artifacts.manifest_digest(folder.held_out_dir(name))
            for name in names
        }
    paths = {name: folder.domain_dir(name) / HELD_OUT_FILE for name in names}
    return {
        f"data/{name}/{HELD_OUT_FILE}": artifacts.sha256_file(path) for name, path in paths.items()
    }


class _Opened:
    """A source whose files are looked up, hashed and opened once, and only if need be."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._files: dict[str, Path] | None = None
        self._movielens_dir: Path | None = None
        self._inputs: dict[str, str] | None = None
        self._raw: dict[str, RawDomain] | None = None

    def find(self, console: Progress) -> None:
        if isinstance(self.source, MovieLensSource) and self.source.path is None:
            self._movielens_dir = assets.movielens_dir(console.note)
        self._files = sources.files(self.source, self._movielens_dir)

    def inputs(self) -> dict[str, str]:
        assert self._files is not None
        if self._inputs is None:
            self._inputs = {name: artifacts.sha256_file(path) for name, path in self._files.items()}
        return self._inputs

    def raw(self, domain: str) -> RawDomain:
        if self._raw is None:
            self._raw = sources.read(self.source, self._movielens_dir)
        return self._raw[domain]


def _hold_out(
    experiment: Experiment,
    source: _Opened,
    wanted: Sequence[str],
    folder: RunFolder,
    force: bool,
    console: Progress,
) -> dict[str, UserError]:
    """Write what domains of one source hold out from other ingredients; returns what failed."""
    seed = experiment.split_seed
    failures: dict[str, UserError] = {}
    for name in wanted:
        config = fingerprint_config(experiment, source.source, name)
        # Neither has a part in what the domain itself holds out.
        for field in ("held_out_by", "num_training_users"):
            config.pop(field, None)
        target, inputs = folder.held_out_dir(name), source.inputs()
        fingerprint = artifacts.fingerprint(config=config, seed=seed, inputs=inputs)
        if not force and artifacts.is_finished(target, fingerprint):
            continue
        try:
            metrics = hold_out(
                source.raw(name),
                target,
                experiment.data,
                seed,
                fingerprint_config=config,
                inputs=inputs,
                say=_Patient(name, console),
            )
        except DomainError as error:
            failures[name] = error
            continue
        console.note(
            f"{name:18} keeps {metrics['held_out_titles']:,} titles, "
            f"{metrics['held_out_users']:,} users and {metrics['held_clicks']:,} clicks from the "
            "ingredients of others"
        )
    return failures


def _prepare(
    experiment: Experiment,
    source: _Opened,
    wanted: Sequence[str],
    folder: RunFolder,
    force: bool,
    console: Progress,
) -> dict[str, UserError]:
    """Prepare domains of one source; returns the failures of single domains."""
    data, seed = experiment.data, experiment.split_seed
    failures: dict[str, UserError] = {}
    for name in wanted:
        inputs = {**source.inputs(), **held_out_inputs(experiment, folder, name)}
        held_out: HeldOut | None = None
        config = fingerprint_config(experiment, source.source, name)
        target = folder.domain_dir(name)
        fingerprint = artifacts.fingerprint(config=config, seed=seed, inputs=inputs)
        if not force and artifacts.is_finished(target, fingerprint):
            console.note(f"{name:18} stands already")
            continue
        if experiment.held_out_by(name):
            place = folder.domain_dir if name in data.spirit else folder.held_out_dir
            held_out = read_held_out(map(place, experiment.held_out_by(name)))
        start = time.monotonic()
        try:
            metrics = prepare_domain(
                source.raw(name),
                target,
                data,
                seed,
                fingerprint_config=config,
                inputs=inputs,
                held_out=held_out,
                say=_Patient(name, console),
            )
        except (DomainError, LeakError) as error:
            failures[name] = error
            continue
        console.note(summary(name, metrics, time.monotonic() - start))
    return failures


class _Patient:
    """Says what a domain is at, but only where that takes long."""

    def __init__(self, domain: str, console: Progress, every_s: float = 5.0) -> None:
        self._domain = domain
        self._console = console
        self._every_s = every_s
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._console.note(f"{self._domain:18} {text} ...")


def summary(name: str, metrics: Mapping[str, Any], seconds: float) -> str:
    """One line of the table of prepared domains."""
    further = {
        "cold users": metrics["cold_user_test_cases"],
        "few-shot": metrics["few_shot_test_cases"],
    }
    more = "".join(f", {num:,} {name}" for name, num in further.items() if num)
    dropped = metrics["raw_interactions"] - metrics["interactions"]
    return (
        f"{name:18} {metrics['users']:7,} users {metrics['items']:7,} items "
        f"{metrics['interactions']:9,} interactions ({dropped:,} dropped), "
        f"{metrics['cold_items']:,} cold items; cases: {metrics['valid_cases']:,} valid, "
        f"{metrics['test_cases']:,} test, {metrics['cold_test_cases']:,} cold{more}; "
        f"{seconds:.1f} s"
    )
