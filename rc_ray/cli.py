"""The command line: one verb per stage, over one experiment file.

Imports stand inside the functions: `--help` is instant, and Ray, which reads its settings when it
is imported, is imported by the session that makes them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rc_ray import data_verbs
from rc_ray.chain import (
    AFTER_RAY,
    BEFORE_RAY,
    ON_RAY,
    STAGES,
    only_driver_of,
    opened,
    run_each,
    run_stages,
    session,
    write_config,
)
from rc_ray.command_line import (
    Address,
    ExperimentFile,
    Force,
    Overrides,
    Verbose,
    plain_errors,
)

app = typer.Typer(
    name="rc-ray",
    help="RecCocktail on Ray: a base spirit, ingredients, cocktails, and a test of what they give.",
    no_args_is_help=True,
    context_settings={"max_content_width": 100},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Explain = Annotated[
    str | None,
    typer.Option("--explain", metavar="DOMAIN", help="write a page on a finished cocktail instead"),
]


@app.command()
def prepare(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Turn raw logs into leak-proof domains with frozen candidates."""
    run_stages(experiment, overrides, ("prepare",), force, verbose)


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Train the base spirit with Ray Train and DeepSpeed."""
    run_stages(experiment, overrides, ("train",), force, verbose, address)


@app.command()
def tune(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="run the search of `merge.search` in place of the ingredients"
        ),
    ] = False,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Train the ingredients, one trial per domain and setting, with Ray Tune."""
    if not merge:
        run_stages(experiment, overrides, ("tune",), force, verbose, address)
        return
    with plain_errors(verbose):
        from rc_ray.config import load
        from rc_ray.errors import ConfigError

        if load(experiment, tuple(overrides or ())).merge.search is None:
            raise ConfigError(
                "`--merge` searches over merge settings, but `merge.search` names none; add e.g. "
                "`merge.search: {granularity: [model, linear]}`"
            )
    run_stages(experiment, overrides, ("merge",), force, verbose, address)


@app.command()
def merge(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    explain: Explain = None,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Learn, without labels, how to mix spirit and ingredient into cocktails.

    With `merge.search`, a trial per domain and setting on Ray Tune, and each domain's best.
    """
    if explain is None:
        run_stages(experiment, overrides, ("merge",), force, verbose, address)
        return
    with plain_errors(verbose), opened(experiment, overrides) as (loaded, console):
        from rc_ray import explain as explanation

        explanation.check(loaded, explain, force=force)
        with session(loaded, address, verbose):
            page = explanation.run(loaded, explain, console=console)
    typer.echo(page)


@app.command()
def evaluate(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Rank the frozen test candidates with every system."""
    run_stages(experiment, overrides, ("evaluate",), force, verbose, address)


@app.command()
def report(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Tell what was found, on one HTML page and in Markdown."""
    run_stages(experiment, overrides, ("report",), force, verbose)


@app.command()
def run(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="train with so many seeds, on the same data")
    ] = 1,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """All stages that the compared systems need; what is finished is not done again."""
    if seeds == 1:
        run_stages(experiment, overrides, STAGES, force, verbose, address)
        return
    with plain_errors(verbose):
        from rc_ray.config import load
        from rc_ray.seeds import summarise, variants

        loaded = load(experiment, tuple(overrides or ()))
        runs = variants(loaded, seeds)
        for one in runs:
            own = [f"name={one.name}", f"seed={one.seed}", f"data_seed={one.data_seed}"]
            run_stages(experiment, [*(overrides or ()), *own], STAGES, force, verbose, address)
        typer.echo(f"over {seeds} seeds: {summarise(loaded, runs) / 'summary.md'}")


@app.command()
def serve(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Serve the cocktails of all domains behind one HTTP endpoint, until Ctrl-C."""
    with plain_errors(verbose), opened(experiment, overrides) as (loaded, console):
        from rc_ray.serve.served import refuse_unmade

        refuse_unmade(loaded)
        with session(loaded, address, verbose):
            from rc_ray.serve.deployments import deploy

            deploy(loaded, console, blocking=True)


@app.command()
def rank(
    experiment: ExperimentFile,
    domain: Annotated[str, typer.Option("--domain", help="one of the served domains")],
    history: Annotated[
        list[str] | None,
        typer.Option("--history", metavar="TITLE", help="title or item id, oldest first"),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option("--candidate", metavar="TITLE", help="left out: the whole catalogue"),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="how many items to show")] = 10,
    json: Annotated[bool, typer.Option("--json", help="print the service's JSON answer")] = False,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Answer one request on this machine, without Ray, as the service would."""
    with plain_errors(verbose):
        from rc_ray.config import load
        from rc_ray.serve.calibration import open_calibration
        from rc_ray.serve.scoring import rank_offline

        loaded = load(experiment, tuple(overrides or ()))
        answer = rank_offline(loaded, domain, history or [], candidates, k)
        calibration = open_calibration(loaded, domain)
        if calibration.is_left:
            typer.echo(calibration.why, err=True)
        if json:
            typer.echo(answer.model_dump_json(indent=2))
            return
        for entry in answer.unknown_history:
            typer.echo(f"not in the catalogue, read as a title: {entry}", err=True)
        for item in answer.items:
            typer.echo(f"{item.rank:3}. {item.title}  [{item.item_id}]  {item.score:.3f}")


@app.command()
def show(experiment: ExperimentFile, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Print the resolved experiment and which stages are finished, stale or missing."""
    with plain_errors(verbose):
        from rc_ray.config import load
        from rc_ray.serve.calibration import told_by_calibrations
        from rc_ray.status import dump, read_status, told_by_merges

        loaded = load(experiment, tuple(overrides or ()))
        typer.echo(dump(loaded))
        typer.echo(f"# {loaded.run_dir}")
        for status in read_status(loaded):
            typer.echo(f"# {status.stage:9} {status.state:9} {status.detail}".rstrip())
        for line in (*told_by_merges(loaded), *told_by_calibrations(loaded)):
            typer.echo(f"# {line}")


@app.command()
def assets(verbose: Verbose = False) -> None:
    """Fetch the embedded model and data set into the cache, where they are not there yet."""
    with plain_errors(verbose):
        from rc_ray.assets import EMBEDDED_MODEL, model_dir, movielens_dir
        from rc_ray.progress import Progress

        with Progress() as console:
            console.stage("assets")
            console.note(str(movielens_dir(console.note)))
            console.note(str(model_dir(EMBEDDED_MODEL, console.note)))


app.command("import")(data_verbs.import_)
app.command()(data_verbs.prior)


@app.command()
def demo(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="what to run")] = Path(
        "jobs/demo.yaml"
    ),
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """The whole chain on real data, the endpoint, and a real request for two domains."""
    with plain_errors(verbose):
        with opened(experiment, overrides) as (loaded, console), only_driver_of(loaded, STAGES):
            from rc_ray import demo as tour

            write_config(loaded)
            run_each(BEFORE_RAY, loaded, force, console)
            with session(loaded, None, verbose):
                run_each(ON_RAY, loaded, force, console)
                tour.ask_the_endpoint(loaded, console)
            run_each(AFTER_RAY, loaded, force, console)
        tour.last_screen(loaded, experiment)


if __name__ == "__main__":
    sys.exit(app())
