from __future__ import annotations

from pathlib import Path

import pytest

from rc_ray.config import Experiment
from tests.serve.fake_run import make_run


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder: Path = tmp_path_factory.mktemp("served")
    return make_run(folder)
