"""Every kind of mix, neighbours, a guest and the guard, from adapters made on the spot."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from rc_ray import artifacts, evaluate, merge, mixing, prepare, recipes, report
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment, load
from rc_ray.core.adapters import load_adapter, save_adapter
from rc_ray.core.random_lora import product_norm, random_like
from rc_ray.guard import read_guard
from rc_ray.progress import Progress
from rc_ray.serve.calibration import open_calibration
from rc_ray.serve.served import served_domains, served_system
from rc_ray.status import told_by_merges
from tests.conftest import Screen
from tests.core.test_model import random_adapter
from tests.distributed.test_chain import put_adapter
from tests.tiny import make_domain, make_experiment

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_local")]

SHORT = {"num_prompts": 4, "num_epochs": 1, "batch_size": 2, "max_titles": 5}
MIXES: dict[str, dict[str, Any]] = {
    "ties": {"method": "ties", "density": 0.5},
    "added": {"method": "task_arithmetic"},
    "labelled": {"objective": "clicks", **SHORT},
    "made_up_users": {"objective": "distillation", "granularity": "model", **SHORT},
    "transductive": {"prompts_of": "scored_users", "score": "calibrated", **SHORT},
    "hub": {"method": "lorahub", "num_prompts": 3, "num_evaluations": 4},
}
TARGETS = ("rivers", "tools", "books")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """`rivers` and `tools` have ingredients and are each other's neighbours; `books` is a guest."""
    folder = tmp_path_factory.mktemp("mixes")
    mixes = {name: {"method": "learned", **fields} for name, fields in MIXES.items()}
    path = make_experiment(
        folder,
        merge={"mixes": mixes, "neighbours": "all", "rank": 6, "guard": {"num_valid_users": 8}},
        evaluate={
            "systems": ["base", "ingredient", "random_spirit", "cocktail", "guarded", *mixes],
            "num_test_users": 10,
            "num_actors": 1,
        },
    )
    raw = yaml.safe_load(path.read_text())
    make_domain(folder / "raw" / "books", prefix="Books", seed=9)
    raw["data"]["sources"].append(
        {"format": "parquet", "domain": "books", "path": str(folder / "raw" / "books")}
    )
    raw["data"] |= {"spirit": ["lamps"], "ingredients": ["rivers", "tools"], "guests": ["books"]}
    path.write_text(yaml.safe_dump(raw))
    made = load(path)
    prepare.run(made, console=Progress(stream=io.StringIO()))
    run = RunFolder(made.run_dir)
    put_adapter(run.spirit_dir, 1, "train", made.model.path)
    for seed, domain in enumerate(("rivers", "tools"), start=2):
        put_adapter(run.ingredient_dir(domain), seed, "tune", made.model.path)
    return made


def test_every_mix_is_made_and_compared(experiment: Experiment, screen: Screen) -> None:
    run = RunFolder(experiment.run_dir)
    for domain in TARGETS:  # here rather than in workers of Ray, which take seconds to start
        assert "error" not in mixing.mix_domain(_order(experiment, domain))
    merge.run(experiment, console=screen.console)
    assert screen.text.count("is up to date") == 3
    adapters = {
        "rivers": ["spirit", "ingredient", "tools"],
        "tools": ["spirit", "ingredient", "rivers"],
        "books": ["spirit", "rivers", "tools"],
    }
    for domain in TARGETS:
        for name in recipes.mixes(experiment):
            folder = run.mix_dir(domain, name)
            made = load_adapter(folder)
            assert max(pair.a.shape[0] for pair in made.modules.values()) == 6
            errors = json.loads((folder / "compression.json").read_text())["relative_errors"]
            assert set(errors) == set(made.modules)
            assert all(0 < error < 1 for error in errors.values())
            assert json.loads((folder / "fold_check.json").read_text())["relative"] < 1e-3
            if name != "ties":
                weights = json.loads((folder / "weights.json").read_text())
                assert weights["adapters"] == adapters[domain]
        metrics = artifacts.read_json(run.cocktail_dir(domain) / "manifest.json")["metrics"]
        assert metrics["failed_mixes"] == {}
        assert metrics["mixes"]["transductive"]["prompts_of"] == "scored_users"
        assert "prompts_of" not in metrics["mixes"]["made_up_users"]
    one_weight = json.loads((run.mix_dir("tools", "made_up_users") / "weights.json").read_text())
    assert all(row == one_weight["weights"][0] for row in one_weight["weights"])

    evaluate.run(experiment, console=screen.console)
    rows = pq.read_table(run.evaluate_dir / "results.parquet").to_pylist()
    asked = set(experiment.evaluate.systems)
    for domain in TARGETS:
        found = {row["system"] for row in rows if row["domain"] == domain}
        scored = {name for name in found if not name.endswith("(raw)")}
        assert scored == (asked - {"ingredient"} if domain == "books" else asked)
    report.run(experiment, console=screen.console)
    page = (run.report_dir / "index.html").read_text()
    assert "scored users (transductive)" in page
    assert "Each system is calibrated as these users&#x27; clicks on this domain choose." in page
    assert "guests books" in page
    assert len(list(told_by_merges(experiment))) == 3
    assert served_domains(experiment) == TARGETS


def test_what_the_guard_serves_is_no_system_of_its_own(experiment: Experiment) -> None:
    """Its rows are those of what it chose, difference by difference; the two do not differ."""
    run = RunFolder(experiment.run_dir)
    for domain in TARGETS:
        verdict = read_guard(run.cocktail_dir(domain))
        assert verdict is not None
        assert verdict.num_valid_users == 8
        own = set() if domain == "books" else {"ingredient"}
        assert set(verdict.systems) == {"spirit", "uniform", "cocktail"} | own
        assert served_system(experiment, domain) == verdict.chosen
        if verdict.chosen not in experiment.evaluate.systems:
            continue
        rows = pq.read_table(run.evaluate_dir / "differences.parquet").to_pylist()
        found = {
            (row["system_a"], row["system_b"]): row["p_adjusted"]
            for row in rows
            if row["domain"] == domain and row["metric"] == "HR@1" and row["split"] == "warm"
        }
        assert found["guarded", verdict.chosen] == 1.0
        for a, b in [pair for pair in found if "guarded" not in pair and verdict.chosen == pair[0]]:
            assert found["guarded", b] == found[a, b]


def test_finished_mixes_outlive_a_kill_and_a_longer_file(
    experiment: Experiment, screen: Screen
) -> None:
    run = RunFolder(experiment.run_dir)
    work = run.mix_work_dir("tools")
    before = _times(work)
    (work / "ties" / "manifest.json").unlink()  # killed before it was sealed
    (work / "hub" / "manifest.json").write_text('{"fingerpr')
    shutil.rmtree(run.cocktail_dir("tools"))
    mixes = {**experiment.merge.model_dump()["mixes"], "dare": {"method": "dare_linear"}}
    fields = {**experiment.merge.model_dump(), "mixes": mixes}
    longer = experiment.model_copy(update={"merge": type(experiment.merge).model_validate(fields)})
    result = mixing.mix_domain(_order(longer))
    assert result["failed_mixes"] == {}
    after = _times(work)
    anew = {name for name, time in after.items() if before.get(name) != time}
    assert anew == {"ties", "hub", "dare"}
    assert (run.mix_dir("tools", "dare") / "adapter_model.safetensors").exists()


def test_a_mix_that_fails_is_named_and_the_others_stand(
    experiment: Experiment, screen: Screen
) -> None:
    run = RunFolder(experiment.run_dir)
    uneven = random_adapter(8)
    first = next(iter(uneven.modules))
    pair = uneven.modules[first]
    short = type(pair)(a=pair.a[:1], b=pair.b[:, :1], scale=pair.scale)
    uneven.modules[first] = short
    save_adapter(run.ingredient_dir("rivers"), uneven, experiment.model.path)
    artifacts.write_manifest(
        run.ingredient_dir("rivers"), stage="tune", config={}, seed=8, inputs={}, metrics={}
    )
    data = experiment.data.model_copy(update={"ingredients": ("rivers",), "guests": ()})
    fields = {"neighbours": (), "mixes": {"averaged": {"method": "peft_linear"}}}
    merging = type(experiment.merge).model_validate({**experiment.merge.model_dump(), **fields})
    alone = experiment.model_copy(update={"data": data, "merge": merging})
    for _ in range(2):  # what failed is tried again, and told again
        with pytest.raises(merge.CocktailsFailed, match="no mix averaged for rivers: .*rank"):
            merge.run(alone, console=screen.console)
    assert load_adapter(run.cocktail_dir("rivers")).modules
    assert not run.mix_dir("rivers", "averaged").exists()
    assert any("rivers: no mix averaged: `method: " in line for line in told_by_merges(alone))


def test_a_cocktail_that_loses_is_not_served(experiment: Experiment) -> None:
    """Noise is put in the place of a finished cocktail until a control is ahead of it."""
    run = RunFolder(experiment.run_dir)
    planted = run.mix_work_dir("books") / "cocktail"
    for seed in range(20):
        save_adapter(planted, random_adapter(100 + seed), experiment.model.path)
        result = mixing.mix_domain(_order(experiment, "books"))
        if result["guard"]["chosen"] != "cocktail":
            break
    verdict = read_guard(run.cocktail_dir("books"))
    assert verdict is not None
    assert verdict.chosen in ("spirit", "uniform")
    ahead = verdict.systems[verdict.chosen]["ndcg"]
    assert ahead == max(one["ndcg"] for one in verdict.systems.values())
    assert ahead > verdict.systems["cocktail"]["ndcg"]
    assert "is ahead of the cocktail" in verdict.why
    assert served_system(experiment, "books") == verdict.chosen
    as_learned = experiment.serve.model_copy(update={"guard": False})
    plain = experiment.model_copy(update={"serve": as_learned})
    assert served_system(plain, "books") == "cocktail"
    # The evaluation's was chosen for the cocktail that was there before.
    found = open_calibration(plain, "books")
    assert (found.source, found.is_left) == ("guard", True)
    assert found.alpha == verdict.systems["cocktail"]["alpha"]
    (run.evaluate_dir / "calibration.json").unlink()
    calibration = open_calibration(experiment, "books")
    assert (calibration.source, calibration.is_left) == ("guard", False)
    assert calibration.alpha == verdict.systems[verdict.chosen]["alpha"]


def test_a_random_spirit_is_as_large_as_the_trained_one(experiment: Experiment) -> None:
    spirit = load_adapter(RunFolder(experiment.run_dir).spirit_dir)
    drawn = random_like(spirit, 5)
    assert set(drawn.modules) == set(spirit.modules)
    for name, pair in drawn.modules.items():
        trained = spirit.modules[name]
        delta = trained.scale * (trained.b @ trained.a)
        own = pair.scale * (pair.b @ pair.a)
        assert float(own.norm()) == pytest.approx(float(delta.norm()), rel=1e-4)
        assert product_norm(pair.b, pair.a) == pytest.approx(float(own.norm()), rel=1e-4)
        assert abs(float((own * delta).sum())) < 0.7 * float(delta.norm()) ** 2


def _order(experiment: Experiment, domain: str = "tools") -> dict[str, Any]:
    order = merge.make_order(experiment, RunFolder(experiment.run_dir), domain)
    return {**order, "model_dir": experiment.model.path}


def _times(work: Path) -> dict[str, int]:
    return {
        folder.name: (folder / "adapter_model.safetensors").stat().st_mtime_ns
        for folder in work.iterdir()
    }
