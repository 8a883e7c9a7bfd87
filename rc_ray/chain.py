"""The chain of stages over one experiment file: what the verbs of the command line run.

Imports stand inside the functions, see cli.py.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rc_ray.command_line import plain_errors

if TYPE_CHECKING:
    from rc_ray.config import Experiment
    from rc_ray.progress import Progress

BEFORE_RAY = ("prepare",)
ON_RAY = ("train", "tune", "merge", "evaluate")
AFTER_RAY = ("report",)
STAGES = (*BEFORE_RAY, *ON_RAY, *AFTER_RAY)
"""Every stage, in order. Each is the module of its name with `run(experiment, force, console)`."""


def run_stages(
    path: Path,
    overrides: Sequence[str] | None,
    stages: Sequence[str],
    force: bool,
    verbose: bool,
    address: str | None = None,
) -> None:
    with plain_errors(verbose), opened(path, overrides) as (experiment, console):
        from rc_ray.status import refuse_stale, refuse_without_inputs

        stages = _possible(experiment, stages, console)
        refuse_stale(path, experiment, _built_on(stages))
        on_ray = [name for name in stages if name in ON_RAY]
        if on_ray and on_ray[0] == stages[0]:
            refuse_without_inputs(experiment, stages[0])
        with only_driver_of(experiment, stages):
            write_config(experiment)
            run_each([name for name in stages if name in BEFORE_RAY], experiment, force, console)
            with session(experiment, address, verbose) if on_ray else nullcontext():
                run_each(on_ray, experiment, force, console)
            run_each([name for name in stages if name in AFTER_RAY], experiment, force, console)


def _possible(experiment: Experiment, stages: Sequence[str], console: Progress) -> Sequence[str]:
    """The stages to run: of several, those that a compared system needs.

    Raises:
        ConfigError: the one stage asked for needs a base spirit and no domain feeds one.
    """
    from rc_ray.errors import ConfigError
    from rc_ray.recipes import stages_needed

    needed = stages_needed(experiment)
    if len(stages) > 1:
        left_out = [name for name in stages if name not in needed]
        if left_out:
            console.note(f"no system of `evaluate.systems` needs {', '.join(left_out)}: left out")
        return [name for name in stages if name in needed]
    if _nothing_to_do(experiment, stages[0]):
        raise ConfigError(f"`data.spirit` names no domain, so there is nothing to {stages[0]}")
    return stages


def _nothing_to_do(experiment: Experiment, stage: str) -> bool:
    """Whether a stage lacks the adapters or domains that it works on."""
    match stage:
        case "train":
            return not experiment.data.spirit
        case "merge":
            return not experiment.can_mix
        case _:
            return False


def _built_on(stages: Sequence[str]) -> set[str]:
    """What these read and do not make anew; an ingredient knows nothing of the spirit."""
    before = set(STAGES[: STAGES.index(stages[-1])]) - set(stages)
    return before - {"train"} if stages[-1] == "tune" else before


def run_each(stages: Sequence[str], experiment: Experiment, force: bool, console: Progress) -> None:
    handler = signal.getsignal(signal.SIGINT)
    for name in stages:
        try:
            importlib.import_module(f"rc_ray.{name}").run(experiment, force=force, console=console)
        finally:
            # Ray Train leaves a handler behind that would end its own run, long over, on Ctrl-C.
            signal.signal(signal.SIGINT, handler)


@contextmanager
def opened(path: Path, overrides: Sequence[str] | None) -> Iterator[tuple[Experiment, Progress]]:
    """The experiment, and the console, which must be made before a session takes the terminal."""
    from rc_ray.config import load
    from rc_ray.progress import Progress

    experiment = load(path, tuple(overrides or ()))
    with Progress() as console:
        yield experiment, console


@contextmanager
def only_driver_of(experiment: Experiment, stages: Sequence[str]) -> Iterator[None]:
    from rc_ray.run_lock import only_driver

    with only_driver(experiment.run_dir, stages):
        yield


@contextmanager
def session(experiment: Experiment, address: str | None, verbose: bool) -> Iterator[None]:
    from rc_ray.artifacts import RunFolder
    from rc_ray.session import ray_session

    # Else Ctrl-C would end the trials and let the stage go on without them.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with ray_session(RunFolder(experiment.run_dir), address=address, verbose=verbose):
        yield


def write_config(experiment: Experiment) -> None:
    """Keep the resolved experiment; which stages it makes stale, their fingerprints tell."""
    from rc_ray.artifacts import RunFolder, write_text
    from rc_ray.status import dump

    write_text(RunFolder(experiment.run_dir).config_path, dump(experiment))
