"""Scoring without Ray: who gets a shard, what a shard may hold, which scores are kept."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rc_ray import artifacts, crew, evaluate_plan, recipes, session, shards
from rc_ray.artifacts import RunFolder
from rc_ray.core.adapters import save_adapter
from rc_ray.core.domains import RankingCase, read_domain
from rc_ray.errors import ArtifactError
from rc_ray.scorer import Scorer
from rc_ray.shards import DomainRun, Shard, SystemRun, read_scores, shards_of, write_arrays
from tests.conftest import Factory, Screen
from tests.core.test_model import random_adapter

COST = [0.5, 10, 7.0]
"""Seconds, tokens and megabytes of a shard."""


def make_domain_run(folder: Path, num_users: int = 40) -> DomainRun:
    cases = [RankingCase(f"u{i}", (0,), target=1, candidates=(1, 2, 3)) for i in range(num_users)]
    system = SystemRun("base", None, folder / "scores")
    return DomainRun("films", folder, {"warm": cases}, {}, [system], "sequence", 5, 64)


class Call:
    """A reference to an answer that is there, or never comes."""

    def __init__(self, answer: Any, comes: bool) -> None:
        self.answer, self.comes = answer, comes


class Method:
    def __init__(self, function: Any, comes: bool) -> None:
        self._function, self._comes = function, comes

    def remote(self, *arguments: Any) -> Call:
        return Call(self._function(*arguments), self._comes)


class Actor:
    """One that finds no room never answers."""

    def __init__(self, finds_room: bool) -> None:
        self.given: list[Shard] = []
        self.score = Method(self.given.append, finds_room)
        self.__ray_ready__ = Method(lambda: None, finds_room)


class FakeRay(types.ModuleType):
    """`wait` and `get` as Ray has them; a wait that would never end fails the test."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

    def __init__(self, late: list[Actor]) -> None:
        super().__init__("ray")
        self.late = late
        self.waits: list[float | None] = []

    def wait(
        self, calls: list[Call], *, num_returns: int, timeout: float | None
    ) -> tuple[list[Call], list[Call]]:
        self.waits.append(timeout)
        done = [call for call in calls if call.comes]
        if not done:
            assert timeout is not None, "waits without end"
            for call in calls:  # room is made in the meantime
                call.comes = True
            for actor in self.late:
                actor.score = Method(actor.given.append, True)
        return done[:num_returns], []

    def get(self, call: Call) -> Any:
        return call.answer


def test_an_actor_without_room_gets_no_shard(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = shards_of(make_domain_run(tmp_path))
    assert len(pending) == 4
    alive, never = Actor(True), Actor(False)
    monkeypatch.setitem(sys.modules, "ray", FakeRay([]))
    assert crew.hand_out([never, alive], pending, screen.console, "users") == 40
    assert len(alive.given) == 4
    assert never.given == []


def test_a_wait_for_room_is_told_and_ends(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Actor(False)
    ray = FakeRay([late])
    monkeypatch.setitem(sys.modules, "ray", ray)
    crew.hand_out([late], shards_of(make_domain_run(tmp_path)), screen.console, "users")
    assert screen.text.count("wait for resources") == 1
    assert len(late.given) == 4
    assert ray.waits[0] == 60.0


def test_actors_are_counted_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of 3 CPUs hold three actors of 2 CPUs, not 9 / 2; a dead node holds none."""
    ray = types.ModuleType("ray")
    ray.nodes = lambda: [  # type: ignore[attr-defined]
        {"Alive": alive, "Resources": {"CPU": 3.0}} for alive in (True, True, True, False)
    ]
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert session.num_fitting(2.0, 0.0) == 3
    assert session.num_fitting(2.0, 1.0) == 0


@pytest.mark.parametrize("shape", [(39, 2, 3), (16, 1, 3), (16, 2, 4), (16, 6)])
def test_scores_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    run = make_domain_run(tmp_path)
    (system,) = run.systems
    system.folder.mkdir()
    for shard in shards_of(run):
        users = 1 if shard.split == shards.EMPTY else len(shard.cases)
        write_arrays(shard.path(system), scores=np.zeros((users, 2, 3), np.float32), cost=COST)
    found = read_scores(run, system)
    assert found.by_split["warm"].shape == (40, 2, 3)
    assert (found.seconds, found.num_tokens, found.peak_memory_mb) == (2.0, 40, 7.0)  # 4 shards
    write_arrays(shards_of(run)[1].path(system), scores=np.zeros(shape, np.float32), cost=COST)
    with pytest.raises(ArtifactError, match="warm-0000000.npz: holds scores of shape"):
        read_scores(run, system)


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04 cut short", b"no archive at all"])
def test_damaged_scores_are_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "warm-0000000.npz"
    path.write_bytes(text)
    with pytest.raises(ArtifactError, match="warm-0000000.npz: missing or damaged"):
        shards.read_arrays(path)


def test_a_model_that_a_node_cannot_get_is_told(tmp_path: Path) -> None:
    scorer = Scorer(str(tmp_path / "of_the_driver"), "./nowhere", "float32", 1, False)
    problem = scorer.score(shards_of(make_domain_run(tmp_path))[0])
    assert problem is not None
    assert "model.path: ./nowhere: no such folder" in problem


def test_a_node_that_does_not_see_the_drivers_model_takes_its_own(
    make_run: Factory, tmp_path: Path
) -> None:
    experiment = make_run("evaluate.systems=[base,spirit]", "evaluate.num_test_users=2")
    run = RunFolder(experiment.run_dir)
    adapter = tmp_path / "spirit"
    save_adapter(adapter, random_adapter(1), experiment.model.path)
    domain = read_domain(run.domain_dir("tools"))
    cases = {"warm": domain.cases("test", "warm")[:2]}
    systems = [
        SystemRun("base", None, tmp_path / "base"),
        SystemRun("spirit", adapter, tmp_path / "scores"),
    ]
    plan = DomainRun("tools", run.domain_dir("tools"), cases, {}, systems, "sequence", 3, 512)

    def score(model_path: str) -> str | None:
        elsewhere = str(tmp_path / "of_the_driver")
        return Scorer(elsewhere, model_path, "float32", 1, False).score(shards_of(plan)[1])

    assert score(experiment.model.path) is None
    (tmp_path / "scores" / "warm-0000000.npz").unlink()
    save_adapter(adapter, random_adapter(1), "another")
    assert "trained on another, the experiment says" in (score(experiment.model.path) or "")


def test_scores_that_no_system_uses_are_pruned(tmp_path: Path) -> None:
    run = make_domain_run(tmp_path)
    for path in (run.systems[0].folder, tmp_path / "scores_of_old"):
        path.mkdir()
    (tmp_path / "scores_of_old" / "warm-0000000.npy").write_text("")
    evaluate_plan.prune(tmp_path, [(run, [])])
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_the_size_of_a_batch_is_no_part_of_the_result(make_run: Factory) -> None:
    def config(*overrides: str) -> Any:
        return recipes.evaluation(make_run(*overrides)).config

    assert config("evaluate.tokens_per_batch=9") == config("evaluate.num_actors=2") == config()
    assert config("evaluate.num_bootstrap=9") != config()


def test_a_new_method_scores_anew(make_run: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make_run("evaluate.systems=[base]")
    run = RunFolder(experiment.run_dir)
    domain = read_domain(run.domain_dir("tools"))
    inputs = recipes.evaluation(experiment).inputs(run)

    def folder() -> Path:
        return evaluate_plan.plan(experiment, run, domain, inputs)[0].systems[0].folder

    before = folder()
    monkeypatch.setattr(artifacts, "METHOD", artifacts.METHOD + 1)
    assert folder() != before
