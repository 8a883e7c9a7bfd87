"""One local Ray and one prepared tiny experiment for the whole test session."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rc_ray.config import Experiment, load
from rc_ray.progress import Progress
from tests.tiny import make_experiment

Factory = Callable[..., Experiment]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices: threads only wait for each other, most of all beside Ray's processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A quiet local Ray with 4 logical CPUs; sessions opened inside a test use it."""
    from rc_ray.artifacts import RunFolder
    from rc_ray.session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        run = RunFolder(tmp_path_factory.mktemp("ray"))
        # Verbose: a redirection here would take from pytest what every later test prints.
        with ray_session(run, num_cpus=4, verbose=True):
            yield


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rc_ray import prepare

    folder = tmp_path_factory.mktemp("prepared")
    path = make_experiment(folder)
    prepare.run(load(path), console=Progress(stream=io.StringIO()))
    return path


@pytest.fixture(scope="session")
def make_run(_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Make a run folder of its own with the tiny experiment's prepared data; takes overrides."""

    def make(*overrides: str) -> Experiment:
        folder = tmp_path_factory.mktemp("run")
        experiment = load(_prepared, (*overrides, f"output_dir={folder}"))
        data = _prepared.parent / "runs" / "tiny" / "data"
        shutil.copytree(data, experiment.run_dir / "data", dirs_exist_ok=True)
        return experiment

    return make


class Screen:
    """A console that writes to memory."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.console = Progress(stream=self._stream, interval_s=0.0)

    @property
    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture
def screen() -> Iterator[Screen]:
    made = Screen()
    yield made
    made.console.close()
