"""merge and evaluate on the shared Ray, from adapters made on the spot; what stands is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rc_ray import artifacts, evaluate, merge, merge_prompts, prior
from rc_ray.artifacts import RunFolder
from rc_ray.calibration_config import CalibrationConfig
from rc_ray.cli import app
from rc_ray.config import Experiment
from rc_ray.core.adapters import load_adapter, save_adapter
from rc_ray.core.domains import read_domain
from rc_ray.errors import ArtifactError
from rc_ray.sample_users import sampled_cases
from rc_ray.serve.scoring import open_catalogue
from rc_ray.status import dump
from rc_ray.systems import BASELINES, DEFAULT_SYSTEMS
from tests.conftest import Factory, Screen
from tests.core.test_model import random_adapter
from tests.test_benchmarks import load as load_benchmark

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_local")]


def put_adapter(folder: Path, seed: int, stage: str, base_name: str) -> None:
    save_adapter(folder, random_adapter(seed), base_name)
    artifacts.write_manifest(folder, stage=stage, config={}, seed=seed, inputs={}, metrics={})


@pytest.fixture(scope="module")
def experiment(make_run: Factory, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    made = make_run(
        "merge.num_epochs=2",
        "evaluate.num_test_users=20",
        "evaluate.num_catalogue_users=6",
        "evaluate.probes=[shuffled_history,permuted_candidates,masked_titles]",
        "evaluate.num_probe_users=8",
        "evaluate.sasrec.max_rounds=2",
    )
    folder = RunFolder(made.run_dir)
    put_adapter(folder.spirit_dir, 1, "train", made.model.path)
    put_adapter(folder.ingredient_dir("tools"), 2, "tune", made.model.path)
    return made


def test_merge_then_evaluate(experiment: Experiment, screen: Screen) -> None:
    folder = RunFolder(experiment.run_dir)
    merge.run(experiment, console=screen.console)
    cocktail = folder.cocktail_dir("tools")
    weights = json.loads((cocktail / "weights.json").read_text())
    assert weights["adapters"] == ["spirit", "ingredient"]
    assert all(sum(row) == pytest.approx(1.0, abs=1e-6) for row in weights["weights"])
    check = json.loads((cocktail / "fold_check.json").read_text())
    assert check["relative"] < 1e-4
    curve = [json.loads(line) for line in (cocktail / "entropy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == list(range(4))

    # Plain PEFT gives the weighted sum of the two adapters, worked out here layer by layer.
    rows = dict(zip(weights["modules"], weights["weights"], strict=True))
    parts = [load_adapter(folder.spirit_dir), load_adapter(folder.ingredient_dir("tools"))]
    base = AutoModelForCausalLM.from_pretrained(experiment.model.path)
    before = {name: base.get_submodule(name).weight.detach().clone() for name in rows}
    merged = PeftModel.from_pretrained(base, cocktail).merge_and_unload()
    for name, row in rows.items():
        expected = before[name]
        for weight, part in zip(row, parts, strict=True):
            pair = part.modules[name]
            expected = expected + weight * pair.scale * pair.b @ pair.a
        assert torch.allclose(merged.get_submodule(name).weight, expected, atol=1e-5)

    evaluate.run(experiment, console=screen.console)
    results = pq.read_table(folder.evaluate_dir / "results.parquet").to_pylist()
    systems = {row["system"] for row in results if not row["system"].endswith("(raw)")}
    assert systems == set(DEFAULT_SYSTEMS)
    assert {row["split"] for row in results} == {"warm", "cold"}
    beyond = {"coverage@10", "popularity@10", "ECE"}
    for row in results:
        if row["metric"] in beyond:
            assert row["ci_low"] is None
            assert 0 <= row["value"] <= 1
        else:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert beyond < {row["metric"] for row in results}
    sizes = {(row["candidates"], row["num_candidates"]) for row in results}
    assert sizes == {("main", 10), ("catalogue", 42)}
    assert {row["num_users"] for row in results if row["candidates"] == "catalogue"} == {6}
    costs = json.loads((folder.evaluate_dir / "costs.json").read_text())
    (mixed,) = [row for row in costs if row["system"] == "cocktail" and row["what"] == "training"]
    assert mixed["seconds"] > 0
    assert mixed["peak_memory_mb"] > 0
    searched = [row for row in costs if row["what"] == "catalogue"]
    assert len(searched) == 5
    assert all(row["proved"] == 1.0 and row["num_tokens"] > 0 for row in searched)

    # No scored user lent a prompt to the merge.
    domain = read_domain(folder.domain_dir("tools"))
    unlabeled = {case.user_id for case in domain.cases("valid", "warm", "unlabeled")}
    ranks = pq.read_table(folder.evaluate_dir / "ranks.parquet")
    scored = set(ranks["user_id"].to_pylist())
    assert unlabeled
    assert not unlabeled & scored


def test_a_finished_cocktail_is_explained(experiment: Experiment, tmp_path: Path) -> None:
    """The command on the shared Ray: one page with ten validation users, and nothing else new."""
    run = RunFolder(experiment.run_dir)
    cocktail = run.cocktail_dir("tools")
    sealed = (cocktail / "manifest.json").read_bytes()
    path = tmp_path / "same.yaml"
    path.write_text(dump(experiment))
    result = CliRunner().invoke(app, ["merge", str(path), "--explain", "tools", "--verbose"])
    assert result.exit_code == 0, result.output
    page = run.explanation_path("tools")
    assert result.stdout.splitlines()[-1] == str(page)
    assert [one.name for one in page.parent.iterdir()] == ["tools.html"]
    assert (cocktail / "manifest.json").read_bytes() == sealed
    text = page.read_text()
    assert text.count("<h3>User ") == 10
    num_systems = text.count("; chosen by ")
    assert num_systems >= 3
    assert text.count("next item at rank ") == 10 * num_systems
    weights = json.loads((cocktail / "weights.json").read_text())
    assert text.count('class="spot"') == len(weights["modules"])


def test_the_tables_of_a_study_are_those_of_its_evaluation(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Means from the kept scores equal the published ones, and gains are their differences."""
    run = RunFolder(experiment.run_dir)
    path, svg = run.root / "config.yaml", tmp_path / "weights.svg"
    path.write_text(dump(experiment))
    tables = load_benchmark("cocktail_tables")
    study = tables.read_study(path)
    results = {
        (row["system"], row["split"], row["metric"]): row["value"]
        for row in pq.read_table(run.evaluate_dir / "results.parquet").to_pylist()
        if row["candidates"] == "main"
    }
    for (_, system, split, measure), values in study.measured.items():
        if measure not in ("NDCG@10", "HR@1"):
            continue
        assert values.mean() == pytest.approx(results[system, split, measure], abs=1e-9)
        if split == "warm" and measure == "HR@1" and f"{system} (raw)" in results:
            raw = results[f"{system} (raw)", split, measure]
            assert study.hits["tools", system].mean() == pytest.approx(raw, abs=1e-9)
    assert {system for _, system, *_ in study.measured} >= {"cocktail", "uniform", "guarded"}
    # -(3/4 ln 3/4 + 1/4 ln 1/4), and the entropy of four equals.
    found = load_benchmark("study").entropy(
        np.log([[3.0, 1.0, 1e-30, 1e-30], [2.0, 2.0, 2.0, 2.0]])
    )
    assert found == pytest.approx([0.5623351446, np.log(4)], abs=1e-9)

    monkeypatch.setattr("sys.argv", ["cocktail_tables.py", str(path), "--svg", str(svg)])
    tables.main()
    told = capsys.readouterr().out
    gain = results["cocktail", "warm", "NDCG@10"] - results["uniform", "warm", "NDCG@10"]
    assert f"| uniform | {gain:+.3f} | [" in told
    weights = json.loads((run.cocktail_dir("tools") / "weights.json").read_text())
    assert svg.read_text().count('class="spot"') == len(weights["modules"])
    ElementTree.parse(svg)


def test_sample_users_lend_no_prompts_and_no_test_clicks(experiment: Experiment) -> None:
    domain = read_domain(RunFolder(experiment.run_dir).domain_dir("tools"))
    cases = sampled_cases(domain, seed=3)
    assert cases == sampled_cases(domain, seed=3)
    assert len({case.user_id for case in cases}) == 10
    unlabeled = {case.user_id for case in domain.cases("valid", "warm", "unlabeled")}
    assert not unlabeled & {case.user_id for case in cases}
    tested = {
        case.user_id: case.target
        for split in ("warm", "cold")
        for case in domain.cases("test", split)
    }
    assert all(case.target != tested.get(case.user_id) for case in cases)


def test_probes_change_what_they_may(experiment: Experiment) -> None:
    """Candidates in another order change nothing in `sequence`; made-up names change the scores."""
    folder = RunFolder(experiment.run_dir)
    rows = pq.read_table(folder.evaluate_dir / "probes.parquet").to_pylist()
    change = {(row["system"], row["probe"]): row["max_score_change"] for row in rows}
    assert {row["num_users"] for row in rows} == {8}
    scored = set(DEFAULT_SYSTEMS) - {"guarded"}  # which is one of the others
    for system in scored:
        assert change[system, "permuted_candidates"] < 1e-3
    for system in scored - set(BASELINES):
        assert change[system, "shuffled_history"] > 0.01
        assert change[system, "masked_titles"] > 0.01
    assert change["popularity", "shuffled_history"] == 0.0
    assert change["sasrec", "masked_titles"] == 0.0
    assert all(row["p_adjusted"] >= row["p_value"] for row in rows)


def test_what_is_finished_is_not_done_again(experiment: Experiment, screen: Screen) -> None:
    folder = RunFolder(experiment.run_dir)
    before = os.stat(folder.cocktail_dir("tools") / "adapter_model.safetensors").st_mtime_ns
    merge.run(experiment, console=screen.console)
    evaluate.run(experiment, console=screen.console)
    assert screen.text.count("is up to date") == 2
    after = os.stat(folder.cocktail_dir("tools") / "adapter_model.safetensors").st_mtime_ns
    assert before == after


def test_a_killed_evaluation_goes_on(experiment: Experiment, screen: Screen) -> None:
    folder = RunFolder(experiment.run_dir)
    expected = pq.read_table(folder.evaluate_dir / "results.parquet")
    (folder.evaluate_dir / "manifest.json").unlink()
    shards = sorted((folder.root / "evaluate.work").rglob("warm-*.npz"))
    times = {path: path.stat().st_mtime_ns for path in shards[1:]}
    shards[0].unlink()
    evaluate.run(experiment, console=screen.console)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert pq.read_table(folder.evaluate_dir / "results.parquet").equals(expected)


def test_a_refreshed_prior_changes_no_result(
    experiment: Experiment, screen: Screen, tmp_path: Path
) -> None:
    """Scores made anew after `rc-ray prior` are those from before, to the last bit."""
    folder = RunFolder(experiment.run_dir)
    names = ("results.parquet", "ranks.parquet", "calibration.json")
    expected = [(folder.evaluate_dir / name).read_bytes() for name in names]
    log = tmp_path / "log.parquet"
    clicks = {"user_id": ["u", "v"], "item_id": ["Tools-07"] * 2, "timestamp": [1, 2]}
    pq.write_table(pa.table(clicks), log)
    prior.refresh(experiment, "tools", log)
    (folder.evaluate_dir / "manifest.json").unlink()
    for path in (folder.root / "evaluate.work").rglob("valid-*.npz"):
        path.unlink()
    evaluate.run(experiment, console=screen.console)
    assert [(folder.evaluate_dir / name).read_bytes() for name in names] == expected
    assert open_catalogue(experiment, "tools").prior_since is not None
    prior.remove(experiment, "tools")


@pytest.mark.slow
def test_another_choice_of_the_settings_scores_no_list_anew(
    experiment: Experiment, screen: Screen
) -> None:
    folder = RunFolder(experiment.run_dir)
    merge.run(experiment, console=screen.console)  # the slow tests may be asked for alone
    evaluate.run(experiment, console=screen.console)
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("warm-*.npz")}
    assert before
    settings = CalibrationConfig(chosen_by="unlabeled", scope="global")
    changed = experiment.evaluate.model_copy(
        update={"calibration": settings, "num_catalogue_users": 0}
    )
    evaluate.run(experiment.model_copy(update={"evaluate": changed}), console=screen.console)
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("warm-*.npz")} == before
    found = json.loads((folder.evaluate_dir / "calibration.json").read_text())["tools"]
    assert (found["base"]["chosen_by"], found["base"]["scope"]) == ("unlabeled", "global")
    assert found["base"]["prior_mismatch"] >= 0.0
    assert "chosen_by" not in found["popularity"]
    evaluate.run(experiment, console=screen.console)
    found = json.loads((folder.evaluate_dir / "calibration.json").read_text())["tools"]
    assert (found["base"]["chosen_by"], found["base"]["scope"]) == ("clicks", "domain")


def test_a_new_ingredient_makes_its_own_scores_stale_only(
    experiment: Experiment, screen: Screen
) -> None:
    folder = RunFolder(experiment.run_dir)
    old = {path.parent.name for path in (folder.root / "evaluate.work").rglob("*.npz")}
    put_adapter(folder.ingredient_dir("tools"), 5, "tune", experiment.model.path)
    merge.run(experiment, console=screen.console)
    evaluate.run(experiment, console=screen.console)
    now = {path.parent.name for path in (folder.root / "evaluate.work").rglob("*.npz")}
    assert len(now - old) == 3  # ingredient, uniform, cocktail; not the others
    assert len(now) == len(old) == 9  # what no system uses any more is gone
    metrics = artifacts.read_json(folder.evaluate_dir / "manifest.json")["metrics"]
    assert {"last_run_seconds", "last_run_num_scores"} <= metrics.keys()


def test_a_truncated_adapter_is_named_and_nothing_is_lost(
    experiment: Experiment, screen: Screen
) -> None:
    folder = RunFolder(experiment.run_dir)
    kept = (folder.cocktail_dir("tools") / "weights.json").read_text()
    path = folder.spirit_dir / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    try:
        with pytest.raises(merge.CocktailsFailed, match="damaged or cut short"):
            merge.run(experiment, force=True, console=screen.console)
    finally:
        path.write_bytes(whole)
    assert (folder.cocktail_dir("tools") / "weights.json").read_text() == kept


def test_stages_out_of_order_say_what_is_missing(make_run: Factory, screen: Screen) -> None:
    experiment = make_run()
    with pytest.raises(merge.CocktailsFailed, match="not there yet; run `rc-ray train` first"):
        merge.run(experiment, console=screen.console)
    with pytest.raises(ArtifactError, match="not there yet; run `rc-ray train` first"):
        evaluate.run(experiment, console=screen.console)


def test_prompts_of_unlabeled_users_hold_no_target_mark(experiment: Experiment) -> None:
    domain = read_domain(RunFolder(experiment.run_dir).domain_dir("tools"))
    prompts = merge_prompts.unlabeled_prompts(domain, 5, seed=0)
    assert len(prompts) == 5
    assert all(prompt.target is None for prompt in prompts)
