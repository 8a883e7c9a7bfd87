"""How a step runs: what cannot be cut is refused, and no finished stage is known by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rc_ray.config import Experiment, load
from rc_ray.curves import shaping_config
from rc_ray.training_config import TrainConfig, TrainingConfig
from rc_ray.tune_config import TuneConfig
from tests.tiny import make_experiment

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (TrainingConfig, {"batch_size": 8, "micro_batch_size": 3}, "is 8 each, not divisible by"),
        (TrainingConfig, {"batch_size": 2, "micro_batch_size": 4}, "is 2 each, not divisible by"),
        (
            TrainConfig,
            {"batch_size": 8, "num_workers": 4, "micro_batch_size": 4},
            "`batch_size` 8 over 4 worker.s. is 2 each, not divisible by `micro_batch_size` 4",
        ),
        (TrainConfig, {"batch_size": 8, "num_workers": 3}, "`batch_size` 8 is not divisible by"),
        (
            TrainConfig,
            {"batch_size": 8, "num_workers": 2, "min_workers": 3},
            "`min_workers` 3 is above `num_workers` 2",
        ),
        (
            TrainConfig,
            {"batch_size": 2, "num_workers": 3, "min_workers": 1},
            "`batch_size` 2 leaves some of `num_workers` 3 without",
        ),
        (
            TrainConfig,
            {"batch_size": 8, "num_workers": 4, "min_workers": 1, "micro_batch_size": 1},
            "must divide evenly over every number of workers .* over 3 it does not",
        ),
        (
            TrainConfig,
            {"engine": "torch", "num_workers": 2, "batch_size": 8},
            "`engine: torch` is for one worker",
        ),
        (
            TrainConfig,
            {"engine": "torch", "deepspeed": {"zero_stage": 3}},
            "`deepspeed` is set, but `engine: torch` does not use it",
        ),
        (
            TrainConfig,
            {"deepspeed": {"zero_stage": 0, "offload": "cpu"}},
            "`offload: cpu` needs `zero_stage` 1, 2 or 3",
        ),
        (
            TrainConfig,
            {"checkpoint_storage": "checkpoints"},
            "`checkpoint_storage` 'checkpoints' must be an absolute path or a URI",
        ),
        (TuneConfig, {"search": {"micro_batch_size": [1, 2]}}, "set it beside `search`"),
        (
            TuneConfig,
            {"search": {"activation_checkpointing": [False, True]}},
            "`activation_checkpointing` shapes no result",
        ),
    ],
)
def test_refused(section: type[TrainingConfig], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(settings)


def test_number_of_parts() -> None:
    paper = load(ROOT / "jobs/paper.yaml")
    assert paper.train.num_parts(paper.train.num_workers) == 8
    assert [setting.num_parts(1) for setting in paper.tune.settings()] == [64]
    assert TrainingConfig(batch_size=6).num_parts(3) == 1
    # Of an elastic run, shares may differ by one.
    elastic = TrainConfig(batch_size=8, num_workers=3, min_workers=1)
    assert [elastic.num_parts(number) for number in (1, 2, 3)] == [1, 1, 1]


def test_what_a_training_run_is_known_by(tmp_path: Path) -> None:
    path = make_experiment(tmp_path)

    def shaping(*overrides: str) -> dict[str, Any]:
        experiment: Experiment = load(path, overrides)
        return shaping_config(experiment.train, experiment)

    known = shaping()
    assert shaping("train.micro_batch_size=2") == known
    assert shaping("train.activation_checkpointing=true") == known
    assert shaping("train.batch_size=2") != known
    # The number of negatives shapes the prompts that list them, and those alone.
    assert shaping("data.num_negatives=5") == known
    instruct = ("train.style=instruct", "tune.style=instruct")
    assert shaping(*instruct, "data.num_negatives=5") != shaping(*instruct)
