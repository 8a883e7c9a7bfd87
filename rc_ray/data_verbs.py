"""The verbs about logs beside `prepare`: import, and prior.

Imports stand inside the functions, see cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rc_ray.command_line import Address, ExperimentFile, Overrides, Verbose, plain_errors


def import_(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="e.g. amazon-2023, movielens-csv, table")
    ],
    domain: Annotated[str, typer.Option("--domain", help="the domain's name")],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="files, or a folder with the publisher's files"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="default: imported/DOMAIN")
    ] = None,
    interactions: Annotated[
        list[Path] | None,
        typer.Option("--interactions", metavar="PATH", help="file or folder of interactions"),
    ] = None,
    items: Annotated[
        list[Path] | None, typer.Option("--items", metavar="PATH", help="file or folder of items")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="FIELD=COLUMN", help="of a table: title=name"),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="of a table: one character, or tab")
    ] = None,
    time_unit: Annotated[
        str | None, typer.Option("--time-unit", help="of a table: s (default), ms, us or iso")
    ] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="read the files of interactions in parallel, on Ray")
    ] = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Read a publisher's raw files into a folder for `format: parquet`.

    Formats: amazon-2014, amazon-2018, amazon-2023, movielens-100k, movielens-1m, movielens-10m,
    movielens-csv, yelp, steam, goodreads, recbole, and table for any CSV, TSV, JSON lines or
    Parquet with a map of columns. docs/data.md lists the files of each.
    """
    with plain_errors(verbose):
        from rc_ray import importing
        from rc_ray.progress import Progress

        request = importing.Request(
            format=format,
            domain=domain,
            out=out or Path("imported") / domain,
            paths=paths or (),
            interactions=interactions or (),
            items=items or (),
            columns=columns or (),
            delimiter=delimiter,
            time_unit=time_unit,
            parallel=parallel,
            address=address,
            verbose=verbose,
        )
        with Progress() as console:
            counts = importing.run(request, console)
        typer.echo(importing.summary(request, counts))


def prior(
    experiment: ExperimentFile,
    domain: Annotated[str, typer.Option("--domain", help="one of the experiment's domains")],
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="PATH", help="Parquet as `import` writes, or as the source"),
    ] = None,
    half_life_days: Annotated[
        float | None, typer.Option("--half-life-days", help="a click so old weighs half")
    ] = None,
    add_training: Annotated[
        bool, typer.Option("--add-training", help="count on top of the training clicks")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="serve the training popularity again")
    ] = False,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Serve a domain with the popularity of a newer log; no adapter and no result changes."""
    with plain_errors(verbose):
        from rc_ray import prior as priors
        from rc_ray.config import load
        from rc_ray.errors import ConfigError

        loaded = load(experiment, tuple(overrides or ()))
        if remove == (log is not None):
            raise ConfigError("give either --log PATH, or --remove")
        if log is None:
            gone = priors.remove(loaded, domain)
            typer.echo(f"{domain}: {'removed' if gone else 'has no refreshed prior'}")
            return
        metrics = priors.refresh(
            loaded, domain, log, half_life_days=half_life_days, add_training=add_training
        )
        typer.echo(priors.summary(domain, metrics))
