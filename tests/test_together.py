"""Several trials in one process: what each would be alone, through kills and failures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rc_ray import artifacts, together
from rc_ray import trial as trials
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.adapters import Adapter, load_adapter
from rc_ray.core.joint_training import JointTraining
from rc_ray.engines import Learner
from rc_ray.sweep_plan import (
    Trial,
    order_path,
    orders_in,
    plan_trials,
    read_orders,
    trial_config,
    write_groups,
    write_order,
)
from rc_ray.tune_config import TuneConfig
from tests.conftest import Factory

DOMAINS = ("lamps", "rivers", "tools")
SETTINGS = (
    "tune.num_steps=6",
    "tune.learning_rate=0.01",
    "tune.num_valid_users=4",
    "tune.checkpoint_every=2",
)


def plan(experiment: Experiment, work: str) -> dict[str, Trial]:
    folder = RunFolder(experiment.run_dir)
    planned = {
        domain: plan_trials(experiment, folder, domain, experiment.run_dir / work)[0]
        for domain in DOMAINS
    }
    for trial in planned.values():
        trial.folder.mkdir(parents=True)
    return planned


def orders(experiment: Experiment, planned: dict[str, Trial]) -> list[dict[str, Any]]:
    folder = RunFolder(experiment.run_dir)
    model = Path(experiment.model.path)
    return [trial_config(experiment, folder, trial, model) for trial in planned.values()]


def adapter_of(trial: Trial) -> Adapter:
    return load_adapter(trial.folder / "adapter")


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert one.modules.keys() == other.modules.keys()
    return max(
        float((x - y).abs().max())
        for name, pair in one.modules.items()
        for x, y in ((pair.a, other.modules[name].a), (pair.b, other.modules[name].b))
    )


def steps_in(trial: Trial) -> list[int]:
    return [json.loads(line)["step"] for line in trial.metrics_path.read_text().splitlines()]


@pytest.mark.parametrize("validation", [(), ("tune.valid_every=2", "tune.patience=1")])
def test_a_group_leaves_what_its_trials_would_leave_alone(
    make_run: Factory, validation: Sequence[str]
) -> None:
    experiment = make_run(*SETTINGS, *validation)
    apart, group = plan(experiment, "apart"), plan(experiment, "group")
    for order in orders(experiment, apart):
        trials.train_ingredient(order)
    assert together.train_group(orders(experiment, group)) == []
    for domain in DOMAINS:
        one, other = apart[domain], group[domain]
        assert other.is_finished
        assert largest_difference(adapter_of(one), adapter_of(other)) < 1e-5
        assert steps_in(one) == steps_in(other)
        files = [
            sorted(str(p.relative_to(t.folder)) for p in t.folder.rglob("*")) for t in (one, other)
        ]
        assert files[0] == files[1]
        manifests = [artifacts.read_json(t.folder / artifacts.MANIFEST) for t in (one, other)]
        for field in ("stage", "fingerprint", "seed", "config", "inputs"):
            assert manifests[0][field] == manifests[1][field]
        metrics = [manifest["metrics"] for manifest in manifests]
        assert metrics[0].keys() == metrics[1].keys()
        # A group's passes are no single trial's; each curve has its own seconds.
        assert metrics[0]["spent"].keys() - metrics[1]["spent"].keys() == {"train_s"}
        assert metrics[1]["seconds"] > 0.0
        for field in ("num_steps", "tokens", "valid_ndcg", "training_fingerprint"):
            assert metrics[0][field] == metrics[1][field]
        for field in {"final_loss", "best_valid_loss"} & metrics[0].keys():
            assert metrics[0][field] == pytest.approx(metrics[1][field], abs=1e-5)
        if not validation:
            assert metrics[0]["num_steps"] == 6


def test_a_killed_group_goes_on_where_it_was(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_run(*SETTINGS)
    unbroken, broken = plan(experiment, "unbroken"), plan(experiment, "broken")
    together.train_group(orders(experiment, unbroken))
    original = together.write_state
    count = 0

    def write_and_die(*arguments: Any) -> None:
        nonlocal count
        original(*arguments)
        count += 1
        if count == 5:  # two domains have done four steps by their checkpoints, one has done two
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(together, "write_state", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            together.train_group(orders(experiment, broken))
    done = [
        artifacts.read_json(trial.folder / trials.CHECKPOINT / "state.json")["num_steps_done"]
        for trial in broken.values()
    ]
    assert sorted(done) == [2, 2, 4]  # the fifth was killed before it got its name
    taken: list[int] = []
    step = JointTraining.step

    def counted(self: JointTraining) -> Any:
        found = step(self)
        taken.append(len(found))
        return found

    monkeypatch.setattr(JointTraining, "step", counted)
    assert together.train_group(orders(experiment, broken)) == []
    assert taken == [3, 3, 2, 2]
    for domain in DOMAINS:
        assert broken[domain].is_finished
        assert largest_difference(adapter_of(unbroken[domain]), adapter_of(broken[domain])) < 1e-6


def test_a_trial_begun_alone_goes_on_in_a_group(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_run(*SETTINGS)
    unbroken, moved = plan(experiment, "unbroken"), plan(experiment, "moved")
    trials.train_ingredient(orders(experiment, unbroken)[0])
    original = Learner.save

    def save_and_die(self: Any, target: Path, num_done: int) -> None:
        original(self, target, num_done)
        if num_done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            trials.train_ingredient(orders(experiment, moved)[0])
    assert together.train_group(orders(experiment, moved)) == []
    first = unbroken[DOMAINS[0]], moved[DOMAINS[0]]
    assert largest_difference(*map(adapter_of, first)) < 1e-5
    assert steps_in(first[1]) == list(range(6))


def test_what_is_finished_is_left_out(make_run: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make_run(*SETTINGS)
    planned = plan(experiment, "work")
    together.train_group(orders(experiment, planned)[:1])
    weights = planned[DOMAINS[0]].folder / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    names: list[list[str]] = []
    step = JointTraining.step
    monkeypatch.setattr(
        JointTraining, "step", lambda self: (names.append(self.active), step(self))[1]
    )
    assert together.train_group(orders(experiment, planned)) == []
    assert names == [[str(planned[domain].folder) for domain in DOMAINS[1:]]] * 6
    assert weights.stat().st_mtime_ns == before


def test_a_failed_domain_leaves_the_group(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_run(*SETTINGS)
    planned = plan(experiment, "work")
    (RunFolder(experiment.run_dir).domain_dir("lamps") / "items.parquet").write_bytes(b"x")
    original = together.make_member

    def spoilt(lm: Any, bank: Any, name: str, plan: Any) -> Any:
        member = original(lm, bank, name, plan)
        if "rivers" in name:
            loss = member.engine.module.loss
            monkeypatch.setattr(
                member.engine.module,
                "loss",
                lambda hidden, batch: loss(hidden * float("nan"), batch),
            )
        return member

    monkeypatch.setattr(together, "make_member", spoilt)
    failed = together.train_group(orders(experiment, planned))
    assert failed == [planned["lamps"].folder, planned["rivers"].folder]
    assert "items.parquet" in str(planned["lamps"].problem)
    assert "the loss is nan at step 0; lower `tune.learning_rate`" in str(planned["rivers"].problem)
    assert planned["tools"].is_finished
    assert planned["tools"].problem is None


def test_validation_users_that_cannot_be_read_spoil_one_domain_only(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_run(*SETTINGS, "tune.valid_every=2")
    planned = plan(experiment, "work")
    original = together.make_member

    def spoilt(lm: Any, bank: Any, name: str, plan: Any) -> Any:
        if "rivers" in name:
            raise IndexError("no such title")
        return original(lm, bank, name, plan)

    monkeypatch.setattr(together, "make_member", spoilt)
    assert together.train_group(orders(experiment, planned)) == [planned["rivers"].folder]
    assert planned["rivers"].problem == "IndexError: no such title"
    assert planned["lamps"].is_finished
    assert planned["tools"].is_finished


def test_what_no_group_can_do_is_told_to_every_trial(make_run: Factory) -> None:
    experiment = make_run(*SETTINGS, "tune.lora.dropout=0.5")
    planned = plan(experiment, "work")
    assert len(together.train_group(orders(experiment, planned))) == 3
    assert all("`lora.dropout` to 0" in str(trial.problem) for trial in planned.values())


def test_a_group_that_runs_out_of_memory_says_what_to_lower(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_run(*SETTINGS)
    planned = plan(experiment, "work")

    def exhausted(self: JointTraining) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't\nat ...")

    monkeypatch.setattr(JointTraining, "step", exhausted)
    assert len(together.train_group(orders(experiment, planned))) == 3
    for trial in planned.values():
        problem = str(trial.problem)
        assert problem.startswith("out of memory; lower `tune.tokens_per_pass` or ")
        assert "`tune.domains_per_trial`, or set `tune.micro_batch_size`" in problem
        assert len(problem.splitlines()) == 1


def test_groups_are_of_one_setting(make_run: Factory, tmp_path: Path) -> None:
    experiment = make_run(*SETTINGS, "tune.search={learning_rate: [0.01, 0.02]}")
    folder = RunFolder(experiment.run_dir)
    planned = [
        trial
        for domain in DOMAINS
        for trial in plan_trials(experiment, folder, domain, experiment.run_dir / "work")
    ]
    for trial in planned:
        write_order(tmp_path, trial, {"of": trial.domain, "rate": trial.setting.learning_rate})
    groups = write_groups(tmp_path, planned, 2)
    found = [
        [tuple(artifacts.read_json(order).values()) for order in orders_in(group)]
        for group in groups
    ]
    assert found == [
        [("lamps", 0.01), ("rivers", 0.01)],
        [("tools", 0.01)],
        [("lamps", 0.02), ("rivers", 0.02)],
        [("tools", 0.02)],
    ]
    alone = order_path(tmp_path, planned[0])
    assert orders_in(alone) == [alone]
    assert len(read_orders(tmp_path)) == 6  # the groups' own files are no orders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"dropout": 0.1}}, "`domains_per_trial` to 1, or `lora.dropout` to 0"),
        ({"search": {"lora.dropout": [0.0, 0.1]}}, "or `lora.dropout` to 0"),
        ({"num_workers": 2}, "`domains_per_trial` to 1, or `num_workers` to 1"),
        (
            {
                "search": {"learning_rate": [0.1, 0.01]},
                "valid_every": 5,
                "scheduler": {"name": "asha", "grace_period": 10},
            },
            "`scheduler` judges each trial by itself",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    TuneConfig.model_validate({"domains_per_trial": 4})
    TuneConfig.model_validate(settings)
    with pytest.raises(ValidationError, match=message):
        TuneConfig.model_validate({**settings, "domains_per_trial": 4})
