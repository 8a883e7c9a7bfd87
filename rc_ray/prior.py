"""The verb `prior`: a domain's popularity from a newer log, for serving alone.

It lies in `priors/<domain>`, away from the prepared domain. Training and evaluation go on with the
training clicks, so no result changes; no adapter does either.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.artifacts import MANIFEST, RunFolder
from rc_ray.config import Experiment
from rc_ray.core import sources
from rc_ray.core.domains import Domain, read_domain
from rc_ray.core.prior import ClickCounts, PriorError, count_clicks
from rc_ray.core.raw_files import FractionalTimes
from rc_ray.core.sources import SourceError
from rc_ray.data_config import CsvSource, Source, domain_names
from rc_ray.errors import ArtifactError, ConfigError

FILE = "prior.parquet"
_SCHEMA = pa.schema([("item_id", pa.string()), ("clicks", pa.float64())])
_SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class Prior:
    """A refreshed prior as it is served; I items."""

    clicks: npt.NDArray[np.float64]
    """(I,) not smoothed."""
    since: str
    """When it was made, ISO 8601 in UTC."""


def refresh(
    experiment: Experiment,
    domain: str,
    log: Path,
    *,
    half_life_days: float | None = None,
    add_training: bool = False,
    now: float | None = None,
) -> dict[str, Any]:
    """Count a log and put the result in the place of the domain's refreshed prior.

    Args:
        experiment: names the run and the domain's source, whose form the log may have.
        domain: a prepared one.
        log: a file or folder, see `sources.open_log`.
        half_life_days: a click that is so much older than the newest weighs half; None weighs all
            alike.
        add_training: count on top of the training clicks, which have no age.
        now: Unix seconds that the prior is dated; None is the present.

    Returns:
        What was counted.

    Raises:
        ConfigError: the experiment has no such domain, or the half-life is not positive.
        ArtifactError: the domain is not prepared, or damaged.
        SourceError: the log cannot be read or used.
    """
    source = _source_of(experiment, domain)
    if half_life_days is not None and not 0.0 < half_life_days < float("inf"):
        raise ConfigError(f"--half-life-days {half_life_days:g}: must be greater than 0")
    run = RunFolder(experiment.run_dir)
    prepared = read_domain(run.domain_dir(domain))
    files, interactions = sources.open_log(source, log)
    counts = _count(log, source, interactions, prepared, half_life_days)
    clicks = counts.clicks + (prepared.num_train if add_training else 0)
    metrics = {
        "made_at": _iso(time.time() if now is None else now),
        "rows": counts.num_rows,
        "counted": counts.num_counted,
        "weight": float(counts.clicks.sum()),
        "items": len(prepared.item_ids),
        "items_clicked": int((counts.clicks > 0).sum()),
        "incomplete_rows": counts.num_incomplete,
        "unknown_rows": counts.num_unknown,
        "unknown_items": counts.unknown_items,
        "newest": None if counts.newest is None else _iso(counts.newest),
        "add_training": add_training,
    }
    table = pa.table([pa.array(prepared.item_ids), pa.array(clicks)], schema=_SCHEMA)
    with artifacts.replaced_dir(run.prior_dir(domain)) as work:
        pq.write_table(table, work / FILE)
        artifacts.write_manifest(
            work,
            stage="prior",
            config={"half_life_days": half_life_days, "add_training": add_training},
            seed=experiment.split_seed,
            inputs={
                f"data/{domain}": artifacts.manifest_digest(run.domain_dir(domain)),
                **{f"log/{name}": artifacts.sha256_file(path) for name, path in files.items()},
            },
            metrics=metrics,
        )
    return metrics


def remove(experiment: Experiment, domain: str) -> bool:
    """Go back to the training clicks; whether there was a refreshed prior."""
    _source_of(experiment, domain)
    folder = RunFolder(experiment.run_dir).prior_dir(domain)
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


def read_prior(run: RunFolder, domain: str, item_ids: tuple[str, ...]) -> Prior | None:
    """The refreshed prior of a domain; None where the training clicks serve.

    Args:
        run: the run folder.
        domain: a prepared one.
        item_ids: (I,) of the domain.

    Raises:
        ArtifactError: it is damaged, or was made for another preparation of the domain.
    """
    folder = run.prior_dir(domain)
    if not folder.exists():
        return None
    fix = (
        f"run `rc-ray prior` for {domain} again, or with --remove to serve the training popularity"
    )
    try:
        manifest = artifacts.read_json(folder / MANIFEST)
        digest, since = manifest["outputs"][FILE], str(manifest["metrics"]["made_at"])
        made_for = manifest["inputs"][f"data/{domain}"]
        if artifacts.sha256_file(folder / FILE) != digest:
            raise ArtifactError("it differs from its manifest")
        table = pq.read_table(folder / FILE, schema=_SCHEMA)
        clicks = table["clicks"].to_numpy()
        if not (np.isfinite(clicks).all() and (clicks >= 0).all()):
            raise ArtifactError("it holds what is no number of clicks")
    except (ArtifactError, OSError, KeyError, TypeError, AttributeError, pa.ArrowInvalid):
        raise ArtifactError(f"{folder}: missing files or damaged; {fix}") from None
    is_of_domain = made_for == artifacts.manifest_digest(run.domain_dir(domain))
    if not is_of_domain or tuple(table["item_id"].to_pylist()) != item_ids:
        raise ArtifactError(f"{folder}: the domain was prepared anew since; {fix}")
    return Prior(clicks, since)


def summary(domain: str, metrics: Mapping[str, Any]) -> str:
    """What was counted, in lines for the terminal."""
    lines = [
        f"{domain}: {metrics['counted']:,} clicks of {metrics['rows']:,} rows on "
        f"{metrics['items_clicked']:,} of {metrics['items']:,} items"
    ]
    if metrics["weight"] < metrics["counted"]:
        lines[0] += f", weighing {metrics['weight']:,.1f} by age"
    if metrics["unknown_rows"]:
        lines.append(
            f"left out: {metrics['unknown_rows']:,} rows of {metrics['unknown_items']:,} items "
            "outside the catalogue; new items enter it by `rc-ray prepare`"
        )
    if metrics["incomplete_rows"]:
        lines.append(f"left out: {metrics['incomplete_rows']:,} rows without user, item or time")
    if metrics["weight"] < metrics["items"] and not metrics["add_training"]:
        lines.append(
            "fewer clicks than items: every item counts one more, so this prior is nearly flat; "
            "--add-training counts on top of the training clicks"
        )
    lines.append("a running service reads it when it is started again")
    return "\n".join(lines)


def _count(
    log: Path,
    source: Source,
    interactions: sources.Interactions,
    prepared: Domain,
    half_life_days: float | None,
) -> ClickCounts:
    half_life_s = None if half_life_days is None else half_life_days * _SECONDS_PER_DAY
    if (
        half_life_s is not None
        and isinstance(source, CsvSource)
        and source.columns.timestamp is None
        and log.is_file()
        and log.suffix != ".parquet"
    ):
        raise SourceError(
            f"{log}: has no times, for `columns.timestamp` of its source is null; leave "
            "--half-life-days out"
        )
    try:
        try:
            return count_clicks(interactions.batches(), prepared.item_ids, half_life_s)
        except FractionalTimes as error:
            if half_life_s is not None:
                raise SourceError(f"{error}, and a half-life needs those") from None
            # Without a half-life times matter to nobody.
            return count_clicks(interactions.batches(by_order=True), prepared.item_ids)
    except PriorError as error:
        raise SourceError(f"{log}: {error}") from None


def _source_of(experiment: Experiment, domain: str) -> Source:
    for source in experiment.data.sources:
        if domain in domain_names(source) and domain in experiment.data.domains:
            return source
    known = ", ".join(experiment.data.domains)
    raise ConfigError(f"the experiment has no domain `{domain}`; its domains: {known}")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
