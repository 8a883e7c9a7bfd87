"""The command line: one verb per stage, over one experiment file.

Imports stand inside the functions: `--help` is instant, and Ray, which reads its settings when it
is imported, is imported by the session that makes them.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rc_ray import data_verbs
from rc_ray.command_line import (
    Address,
    ExperimentFile,
    Force,
    Overrides,
    Verbose,
    plain_errors,
)

if TYPE_CHECKING:
    from rc_ray.config import Experiment
    from rc_ray.progress import Progress

BEFORE_RAY = ("prepare",)
ON_RAY = ("train", "tune", "merge", "evaluate")
AFTER_RAY = ("report",)
STAGES = (*BEFORE_RAY, *ON_RAY, *AFTER_RAY)
"""Every stage, in order. Each is the module of its name with `run(experiment, force, console)`."""

app = typer.Typer(
    name="rc-ray",
    help="RecCocktail on Ray: a base spirit, ingredients, cocktails, and the proof that they help.",
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
    _run_stages(experiment, overrides, ("prepare",), force, verbose)


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Train the base spirit with Ray Train and DeepSpeed."""
    _run_stages(experiment, overrides, ("train",), force, verbose, address)


@app.command()
def tune(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="search the cocktails' settings instead (`merge.search`): verb merge"
        ),
    ] = False,
    force: Force = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Train the ingredients, one trial per domain and setting, with Ray Tune."""
    if not merge:
        _run_stages(experiment, overrides, ("tune",), force, verbose, address)
        return
    with plain_errors(verbose):
        from rc_ray.config import load
        from rc_ray.errors import ConfigError

        if load(experiment, tuple(overrides or ())).merge.search is None:
            raise ConfigError(
                "`--merge` searches over merge settings, but `merge.search` names none; add e.g. "
                "`merge.search: {granularity: [model, linear]}`"
            )
    _run_stages(experiment, overrides, ("merge",), force, verbose, address)


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
        _run_stages(experiment, overrides, ("merge",), force, verbose, address)
        return
    with plain_errors(verbose), _opened(experiment, overrides) as (loaded, console):
        from rc_ray import explain as explanation

        explanation.check(loaded, explain, force=force)
        with _session(loaded, address, verbose):
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
    _run_stages(experiment, overrides, ("evaluate",), force, verbose, address)


@app.command()
def report(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Tell what was found, on one HTML page and in Markdown."""
    _run_stages(experiment, overrides, ("report",), force, verbose)


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
        _run_stages(experiment, overrides, STAGES, force, verbose, address)
        return
    with plain_errors(verbose):
        from rc_ray.config import load
        from rc_ray.seeds import summarise, variants

        loaded = load(experiment, tuple(overrides or ()))
        runs = variants(loaded, seeds)
        for one in runs:
            own = [f"name={one.name}", f"seed={one.seed}", f"data_seed={one.data_seed}"]
            _run_stages(experiment, [*(overrides or ()), *own], STAGES, force, verbose, address)
        typer.echo(f"over {seeds} seeds: {summarise(loaded, runs) / 'summary.md'}")


@app.command()
def serve(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Serve the cocktails of all domains behind one HTTP endpoint, until Ctrl-C."""
    with plain_errors(verbose), _opened(experiment, overrides) as (loaded, console):
        with _session(loaded, address, verbose):
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
        from rc_ray.serve.scoring import rank_offline

        loaded = load(experiment, tuple(overrides or ()))
        answer = rank_offline(loaded, domain, history or [], candidates, k)
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
        from rc_ray.status import dump, read_status, told_by_merges

        loaded = load(experiment, tuple(overrides or ()))
        typer.echo(dump(loaded))
        typer.echo(f"# {loaded.run_dir}")
        for status in read_status(loaded):
            typer.echo(f"# {status.stage:9} {status.state:9} {status.detail}".rstrip())
        for line in told_by_merges(loaded):
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
        with _opened(experiment, overrides) as (loaded, console), _only_driver(loaded, STAGES):
            from rc_ray import demo as tour

            _write_config(loaded)
            _run_each(BEFORE_RAY, loaded, force, console)
            with _session(loaded, None, verbose):
                _run_each(ON_RAY, loaded, force, console)
                tour.ask_the_endpoint(loaded, console)
            _run_each(AFTER_RAY, loaded, force, console)
        tour.last_screen(loaded, experiment)


def _run_stages(
    path: Path,
    overrides: Sequence[str] | None,
    stages: Sequence[str],
    force: bool,
    verbose: bool,
    address: str | None = None,
) -> None:
    with plain_errors(verbose), _opened(path, overrides) as (experiment, console):
        from rc_ray.status import refuse_stale

        stages = _possible(experiment, stages, console)
        refuse_stale(path, experiment, _built_on(stages))
        on_ray = [name for name in stages if name in ON_RAY]
        with _only_driver(experiment, stages):
            _write_config(experiment)
            _run_each([name for name in stages if name in BEFORE_RAY], experiment, force, console)
            with _session(experiment, address, verbose) if on_ray else nullcontext():
                _run_each(on_ray, experiment, force, console)
            _run_each([name for name in stages if name in AFTER_RAY], experiment, force, console)


def _possible(experiment: Experiment, stages: Sequence[str], console: Progress) -> Sequence[str]:
    """The stages to run: of several, those that a compared system needs.

    Raises:
        ConfigError: the one stage asked for needs a base spirit and no domain feeds one.
    """
    from rc_ray.errors import ConfigError
    from rc_ray.recipes import nothing_to_do, stages_needed

    needed = stages_needed(experiment)
    if len(stages) > 1:
        left_out = [name for name in stages if name not in needed]
        if left_out:
            console.note(f"no system of `evaluate.systems` needs {', '.join(left_out)}: left out")
        return [name for name in stages if name in needed]
    if nothing_to_do(experiment, stages[0]):
        raise ConfigError(f"`data.spirit` names no domain, so there is nothing to {stages[0]}")
    return stages


def _built_on(stages: Sequence[str]) -> set[str]:
    """What these read and do not make anew; an ingredient knows nothing of the spirit."""
    before = set(STAGES[: STAGES.index(stages[-1])]) - set(stages)
    return before - {"train"} if stages[-1] == "tune" else before


def _run_each(
    stages: Sequence[str], experiment: Experiment, force: bool, console: Progress
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    for name in stages:
        try:
            importlib.import_module(f"rc_ray.{name}").run(experiment, force=force, console=console)
        finally:
            # Ray Train leaves a handler behind that would end its own run, long over, on Ctrl-C.
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _opened(path: Path, overrides: Sequence[str] | None) -> Iterator[tuple[Experiment, Progress]]:
    """The experiment, and the console, which must be made before a session takes the terminal."""
    from rc_ray.config import load
    from rc_ray.progress import Progress

    experiment = load(path, tuple(overrides or ()))
    with Progress() as console:
        yield experiment, console


@contextmanager
def _only_driver(experiment: Experiment, stages: Sequence[str]) -> Iterator[None]:
    from rc_ray.run_lock import only_driver

    with only_driver(experiment.run_dir, stages):
        yield


@contextmanager
def _session(experiment: Experiment, address: str | None, verbose: bool) -> Iterator[None]:
    from rc_ray.artifacts import RunFolder
    from rc_ray.session import ray_session

    # Else Ctrl-C would end the trials and let the stage go on without them.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with ray_session(RunFolder(experiment.run_dir), address=address, verbose=verbose):
        yield


def _write_config(experiment: Experiment) -> None:
    """Keep the resolved experiment; which stages it makes stale, their fingerprints tell."""
    from rc_ray.artifacts import RunFolder, write_text
    from rc_ray.status import dump

    write_text(RunFolder(experiment.run_dir).config_path, dump(experiment))


if __name__ == "__main__":
    sys.exit(app())
