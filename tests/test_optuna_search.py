"""Optuna's points after a driver was killed: what has ended counts, the rest goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rc_ray import artifacts, merge_search, tune
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.sweep_plan import STOPPED, trial_config, write_order
from tests.conftest import Factory
from tests.test_merge_search import with_adapters

# Nothing runs on Ray here, but Ray must not be imported before the tests' session sets it up.
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_local")]
pytest.importorskip("optuna")

SETTINGS = (
    "tune.search={lora.rank: {randint: [2, 9]}, learning_rate: {loguniform: [1.0e-4, 1.0e-1]}}",
    "tune.num_samples=4",
    "tune.search_algorithm=optuna",
    "tune.valid_every=2",
    "tune.scheduler={name: asha, grace_period: 2}",
)


def searcher(experiment: Experiment) -> Any:
    """What a driver that has just been started asks, after it has written its orders anew."""
    run = RunFolder(experiment.run_dir)
    work = run.root / "ingredients.work"
    orders = tune._orders_dir(experiment, work)
    for trial in tune._trials_of(experiment, run, "tools", work):
        write_order(orders, trial, trial_config(experiment, run, trial, Path("model")))
    return tune._optuna(experiment, run, work, ["tools"], Path("model"), 1)


def asked(one: Any, *names: str) -> list[dict[str, Any]]:
    return [artifacts.read_json(Path(one.suggest(name)["trial"])) for name in names]


def finish(order: dict[str, Any], value: float | None, metric: str = "valid_ndcg") -> None:
    artifacts.write_manifest(
        Path(order["folder"]),
        stage="tune",
        config=order["config"],
        seed=order["seed"],
        inputs=order["inputs"],
        metrics={metric: value},
    )


def told(one: Any) -> list[tuple[float, dict[str, Any]]]:
    trials = one._studies["tools"]._ot_study.trials
    return [(trial.value, trial.params) for trial in trials if trial.value is not None]


def test_a_new_start_counts_what_has_ended_and_goes_on_with_the_rest(make_run: Factory) -> None:
    experiment = make_run(*SETTINGS)
    done, stopped, begun = asked(searcher(experiment), "a", "b", "c")
    finish(done, 0.5)
    told_by = {"scheduler": stopped["scheduler"], "num_steps": 2, "valid_loss": 3.0}
    artifacts.write_json(Path(stopped["folder"]) / STOPPED, told_by)

    again = searcher(experiment)
    setting = done["setting"]
    point = {"lora|rank": setting["lora"]["rank"], "learning_rate": setting["learning_rate"]}
    assert told(again) == [(0.5, point)]
    first, new = asked(again, "d", "e")
    assert first["folder"] == begun["folder"]
    assert new["folder"] not in {done["folder"], stopped["folder"], begun["folder"]}
    assert again.suggest("f") == again.FINISHED
    again.on_trial_complete("d", {"valid_ndcg": 0.25, "failed": False})
    assert [value for value, _ in told(again)] == [0.5, 0.25]


def test_what_yaml_reads_as_text_is_the_number_that_a_trial_holds(make_run: Factory) -> None:
    search = "tune.search={learning_rate: {choice: [1e-3, 1e-2, 1e-4]}}"
    experiment = make_run(search, "tune.num_samples=3", *SETTINGS[2:])
    assert experiment.tune.search["learning_rate"]["choice"][0] == "1e-3"
    (done,) = asked(searcher(experiment), "a")
    finish(done, 0.5)
    place = [1e-3, 1e-2, 1e-4].index(done["setting"]["learning_rate"])
    assert told(searcher(experiment)) == [(0.5, {"learning_rate": place})]


def test_a_cocktails_study_is_told_what_its_setting_came_to(make_run: Factory) -> None:
    """The lowest objective is the best; a list of domains is told by its place."""
    experiment = make_run(
        "data.ingredients=[tools,lamps]",
        "data.spirit=[rivers]",
        "merge.search={neighbours: {choice: [[], [lamps]]}, pull: {uniform: [0.0, 1.0]}}",
        "merge.num_samples=2",
        "merge.search_algorithm=optuna",
        "merge.choose_by=objective",
    )
    run = RunFolder(experiment.run_dir)
    with_adapters(experiment)

    def started() -> Any:
        return merge_search._optuna(experiment, run, ["tools"], Path("model"))

    (done,) = asked(started(), "a")
    finish(done, -0.5, "final_objective")
    again = started()
    setting = done["setting"]
    place = [[], ["lamps"]].index(setting["neighbours"])
    assert told(again) == [(-0.5, {"neighbours": place, "pull": setting["pull"]})]
    assert again._studies["tools"]._ot_study.direction.name == "MINIMIZE"
    (new,) = asked(again, "b")
    assert new["folder"] != done["folder"]
    assert again.suggest("c") == again.FINISHED


def test_a_domain_without_validation_users_gets_all_its_points(make_run: Factory) -> None:
    experiment = make_run(*SETTINGS)
    for order in asked(searcher(experiment), "a", "b"):
        finish(order, None)
    again = searcher(experiment)
    assert len({order["folder"] for order in asked(again, "c", "d")}) == 2
    assert again.suggest("e") == again.FINISHED


def test_points_of_other_data_are_no_points_of_these(make_run: Factory) -> None:
    experiment = make_run(*SETTINGS)
    run = RunFolder(experiment.run_dir)
    (old,) = asked(searcher(experiment), "a")
    finish(old, 0.5)
    books = tune._sweep_name(experiment, run, {"tools": []})
    manifest = run.domain_dir("tools") / artifacts.MANIFEST
    artifacts.write_json(manifest, {**artifacts.read_json(manifest), "metrics": {"changed": 1}})
    assert tune._sweep_name(experiment, run, {"tools": []}) != books
    again = searcher(experiment)
    assert told(again) == []
    assert old["folder"] not in {order["folder"] for order in asked(again, *"bcde")}


def test_a_point_that_is_no_setting_is_not_given(make_run: Factory) -> None:
    search = "tune.search={batch_size: {randint: [2, 9]}}"
    experiment = make_run(search, "tune.num_samples=2", *SETTINGS[2:3], "tune.batch_size=3")
    odd = experiment.model_copy(
        update={"tune": experiment.tune.model_copy(update={"micro_batch_size": 2})}
    )
    sizes = [order["setting"]["batch_size"] for order in asked(searcher(odd), "a", "b")]
    assert len(set(sizes)) == 2
    assert not [size for size in sizes if size % 2]


def test_what_was_given_after_the_books_were_written_is_given_again(
    make_run: Factory, tmp_path: Path
) -> None:
    experiment = make_run(*SETTINGS)
    first = searcher(experiment)
    asked(first, "a")
    first.save(str(tmp_path / "books"))
    (lost,) = asked(first, "b")
    restored = searcher(experiment)
    restored.restore(str(tmp_path / "books"))
    found = asked(restored, "c", "d", "e")
    assert found[0]["folder"] == lost["folder"]
    assert len({order["folder"] for order in found}) == 3
    assert restored.suggest("f") == restored.FINISHED
