"""Early stopping among the trials of one domain, by hand, and its memory across restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rc_ray import artifacts
from rc_ray.curves import write_metrics
from rc_ray.tune_config import TuneConfig

# Nothing runs on Ray here, but Ray must not be imported before the tests' session sets it up.
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_local")]

SETTINGS = {"name": "asha", "grace_period": 2, "reduction_factor": 2.0}


def write_trial(
    root: Path,
    domain: str,
    name: str,
    losses: dict[int, float],
    *,
    inputs: str = "new",
    num_steps: int = 16,
) -> dict[str, Any]:
    folder = root / domain / name
    rows = [{"step": step - 1, "valid_loss": loss} for step, loss in losses.items()]
    write_metrics(folder / "metrics.jsonl", rows)
    order = {
        "domain": domain,
        "folder": str(folder),
        "inputs": {"data": inputs},
        "config": {},
        "seed": 3,
        "scheduler": SETTINGS,
        "setting": {"num_steps": num_steps},
    }
    artifacts.write_json(root / "orders" / f"{domain}.{name}.json", order)
    return order


def test_a_trial_is_stopped_when_it_is_in_the_worse_half_of_its_own_domain(tmp_path: Path) -> None:
    from rc_ray.halving import HalvingPerDomain

    films = [write_trial(tmp_path, "films", name, {}) for name in "abc"]
    books = [write_trial(tmp_path, "books", name, {}) for name in "ab"]
    halving = HalvingPerDomain(tmp_path / "orders", SETTINGS)
    assert halving.judge(films[0], 1, 9.0) == "CONTINUE"  # within the grace period
    assert halving.judge(films[0], 2, 3.0) == "CONTINUE"  # the first has nothing to be compared to
    assert halving.judge(films[1], 2, 2.0) == "CONTINUE"  # better than the median of {3.0}
    assert halving.judge(films[2], 2, 2.6) == "STOP"  # worse than 2.5, the median of {3.0, 2.0}
    # By the films' cut-off both would go.
    assert halving.judge(books[0], 2, 50.0) == "CONTINUE"
    assert halving.judge(books[1], 2, 40.0) == "CONTINUE"
    # The next rung is at 4 steps, with a record of its own.
    assert halving.judge(films[0], 4, 2.9) == "CONTINUE"
    assert halving.judge(films[1], 4, 3.1) == "STOP"


def test_the_verdicts_of_before_count_after_a_restart(tmp_path: Path) -> None:
    from rc_ray.halving import HalvingPerDomain

    write_trial(tmp_path, "films", "a", {2: 3.0})
    write_trial(tmp_path, "films", "b", {2: 2.0, 4: 1.0})
    late = write_trial(tmp_path, "films", "c", {})
    for loss, verdict in ((2.6, "STOP"), (2.4, "CONTINUE")):
        halving = HalvingPerDomain(tmp_path / "orders", SETTINGS)
        halving.prepare(late)
        assert halving.judge(late, 2, loss) == verdict


def test_what_was_seen_on_other_data_does_not_count(tmp_path: Path) -> None:
    from rc_ray.halving import HalvingPerDomain

    write_trial(tmp_path, "films", "a", {2: 1.0}, inputs="old")
    late = write_trial(tmp_path, "films", "b", {})
    halving = HalvingPerDomain(tmp_path / "orders", SETTINGS)
    assert halving.judge(late, 2, 2.0) == "CONTINUE"  # the first on these data


def test_a_trial_at_its_end_is_neither_judged_nor_a_measure_for_others(tmp_path: Path) -> None:
    from rc_ray.halving import HalvingPerDomain

    # Losses at 4 steps: one ended there by its settings, one by its patience, one is half way.
    write_trial(tmp_path, "films", "a", {2: 1.0, 4: 0.1}, num_steps=4)
    write_trial(tmp_path, "films", "b", {2: 1.0, 4: 0.2})
    artifacts.write_json(tmp_path / "films" / "b" / artifacts.MANIFEST, {})
    late = write_trial(tmp_path, "films", "c", {2: 1.0})
    last = write_trial(tmp_path, "films", "d", {2: 1.0}, num_steps=4)
    halving = HalvingPerDomain(tmp_path / "orders", SETTINGS)
    assert halving.judge(late, 4, 0.5) == "CONTINUE"
    assert halving.judge(last, 4, 9.0) == "CONTINUE"


def test_a_stopped_trials_folder_says_so(tmp_path: Path) -> None:
    from rc_ray.halving import HalvingPerDomain
    from rc_ray.sweep_plan import STOPPED

    class Tried:
        def __init__(self, name: str) -> None:
            self.config = {"trial": str(tmp_path / "orders" / f"films.{name}.json")}

    for name in "ab":
        write_trial(tmp_path, "films", name, {})
    halving = HalvingPerDomain(tmp_path / "orders", SETTINGS)
    for name, loss in (("a", 1.0), ("b", 2.0)):
        halving.on_trial_add(None, Tried(name))
        result = {"num_steps_done": 2, "valid_loss": loss}
        halving.on_trial_result(None, Tried(name), result)
    assert not (tmp_path / "films" / "a" / STOPPED).exists()
    told = json.loads((tmp_path / "films" / "b" / STOPPED).read_text())
    assert told == {"scheduler": SETTINGS, "num_steps": 2, "valid_loss": 2.0}


def test_a_trial_that_ended_before_its_driver_was_killed_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    from rc_ray.sweep_plan import STOPPED
    from rc_ray.trial_process import run_trial

    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", reports.append)
    write_trial(tmp_path, "films", "a", {2: 3.0})
    told = {"scheduler": SETTINGS, "num_steps": 2, "valid_loss": 3.0}
    artifacts.write_json(tmp_path / "films" / "a" / STOPPED, told)
    run_trial({"trial": str(tmp_path / "orders" / "films.a.json")})
    assert reports == [{"failed": False}]
    assert json.loads((tmp_path / "films" / "a" / STOPPED).read_text()) == told

    order = write_trial(tmp_path, "films", "b", {})
    sealed = {key: order[key] for key in ("config", "seed", "inputs")}
    metrics = {"valid_ndcg": 0.5}
    artifacts.write_manifest(tmp_path / "films" / "b", stage="tune", metrics=metrics, **sealed)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "films" / "b").iterdir()}
    run_trial({"trial": str(tmp_path / "orders" / "films.b.json")})
    assert reports[1:] == [{"failed": False, "valid_ndcg": 0.5}]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "films" / "b").iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"valid_every": None}, "set `valid_every`"),
        ({"search": {}}, "nothing to compare"),
        ({"scheduler": {"grace_period": 2}}, "at least `valid_every`"),
        ({"scheduler": {"grace_period": 90}}, "below `num_steps`"),
        ({"scheduler": {"name": "hyperband", "grace_period": 9}}, "asha"),
        ({"search": {"valid_every": [5, 10]}}, "how trials are judged"),
    ],
)
def test_a_halving_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    whole = {
        "num_steps": 90,
        "valid_every": 5,
        "search": {"learning_rate": [0.1, 0.2]},
        "scheduler": {"name": "asha", "grace_period": 10},
    }
    assert TuneConfig.model_validate(whole).scheduler is not None
    with pytest.raises(ValueError, match=words):
        TuneConfig.model_validate({**whole, **fields})
