"""What a sweep asks of the nodes, and what is refused before its first trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rc_ray import session, sweep_resources
from rc_ray.errors import ConfigError
from rc_ray.sweep import Request
from rc_ray.sweep_resources import check_request, slots
from rc_ray.tune_config import TuneConfig
from tests.tiny import make_model


def config(**fields: Any) -> TuneConfig:
    return TuneConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("memory", "num_workers", "expected"),
    [
        (1e9, 1, 8),  # 4 CPUs on each of two nodes
        (3e9, 1, 6),  # three times 3 GB in 10
        (6e9, 1, 2),  # the 4 GB that are left on each node are no place together
        (3e9, 4, 1),  # six workers, four to a trial
    ],
)
def test_memory_and_workers_bound_how_many_trials_run(
    monkeypatch: pytest.MonkeyPatch, memory: float, num_workers: int, expected: int
) -> None:
    nodes = [{"CPU": 4.0, "memory": 10e9}] * 2
    monkeypatch.setattr(session, "_live_nodes", lambda: nodes)
    monkeypatch.setattr(sweep_resources, "require_resources", lambda *_, **__: None)
    request = Request(1.0, 0.0, int(memory), num_workers)
    assert slots(config(), request) == expected
    assert slots(config(max_concurrent_trials=1), request) == 1
    if num_workers == 1:
        assert request.of_a_trial == {"cpu": 1.0, "memory": int(memory)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora": {"target_modules": ["q_proj", "wq"]}}, "`tune.lora.target_modules` names wq;"),
        ({"search": {"lora.first_layer": [0, 2]}}, "`tune.lora.first_layer` 2 leaves nothing"),
    ],
)
def test_a_lora_that_the_model_has_no_layers_for_is_refused_before_a_trial(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=words):
        check_request(config(**fields), model)
    check_request(config(lora={"target_modules": ["q_proj"], "first_layer": 1}), model)


def test_trials_of_several_workers_need_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(sweep_resources, "find_spec", lambda name: None)
    check_request(config(), model)
    with pytest.raises(ConfigError, match=r"`tune.num_workers` .* run `pip install deepspeed`"):
        check_request(config(num_workers=2), model)
