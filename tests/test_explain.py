"""The page on one cocktail: what it reads, shows and escapes, and the rankings of its users."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rc_ray import artifacts, charts, explain, explain_page
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.domains import read_domain
from rc_ray.errors import ArtifactError
from rc_ray.mixtures import Cocktail, read_cocktail, read_mixture
from rc_ray.sample_users import (
    NUM_TOP,
    RankedTitle,
    Ranking,
    SampleOrder,
    SampleUser,
    ShownSystem,
    rankings,
)
from rc_ray.serve.scoring import open_language_model, rank_offline
from rc_ray.shards import Calibration
from tests.serve.fake_run import make_run, seal_evaluation
from tests.test_report import NASTY, Outline, make_experiment

MODULES = [
    f"model.layers.{layer}.{name}_proj" for layer in (4, 5) for name in ("self_attn.q", "mlp.down")
]
TWO = [[0.4, 0.6], [0.8, 0.2], [0.5, 0.5], [0.1, 0.9]]
THREE = [[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2]]
GUARD = {
    "chosen": "uniform",
    "why": f"The `uniform` average is ahead by 0.020 NDCG {NASTY}",
    "num_valid_users": 1234,
    "systems": {
        name: {
            "ndcg": ndcg,
            "hr1": 0.25,
            "alpha": 0.5,
            "gamma": 2.0,
            "prior_in_trie": True,
            "p_value": p_value,
            **told,
        }
        for name, ndcg, p_value, told in (
            ("cocktail", 0.601, None, {"entropy": 1.75, "chosen_by": "unlabeled"}),
            ("ingredient", 0.611, 0.04, {}),
            ("uniform", 0.621, 0.0004, {"entropy": 2.25, "chosen_by": "unlabeled"}),
        )
    },
    "collapse": "Confident and wrong: entropy fell, and so did NDCG.",
}


def write_cocktail(
    folder: Path,
    adapters: tuple[str, ...],
    weights: list[list[float]],
    guard: dict[str, Any] | None = None,
    **columns: float,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = {"modules": MODULES, "adapters": adapters, "weights": weights}
    artifacts.write_json(folder / "weights.json", table)
    rows = [{"step": s, "entropy": 2.0 - 0.1 * s, "num_steps": 3, **columns} for s in range(3)]
    (folder / "entropy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if guard is not None:
        artifacts.write_json(folder / "guard.json", guard)
    artifacts.write_manifest(
        folder,
        stage="merge",
        config={"merge": {"objective": "anchored", "granularity": "layer"}},
        seed=7,
        inputs={},
        metrics={"num_prompts": 48, "first_entropy": 2.345, "last_entropy": 1.234},
    )
    return folder


def user(*systems: str) -> SampleUser:
    top = (
        RankedTitle(f"{NASTY} 1", -0.5, is_next=False),
        RankedTitle("The Next One", -1.25, is_next=True),
    )
    return SampleUser(
        history=tuple(f"Seen {NASTY} {i:02d}" for i in range(11)),
        next_title="The Next One",
        num_candidates=20,
        rankings=dict.fromkeys(systems, Ranking(top, rank=2.5)),
    )


def page_of(cocktail: Cocktail, users: list[SampleUser], systems: tuple[str, ...]) -> str:
    experiment = make_experiment(Path("x"))
    order = SampleOrder(
        domain_dir=Path("data"),
        systems=tuple(
            ShownSystem(name, Path(name), Calibration(0.5, 2.0, True), "evaluate")
            for name in systems
        ),
        model_dir="model",
        model_path="model",
        dtype="float32",
        style="brief",
        max_titles=15,
        tokens_per_batch=4096,
        seed=7,
        num_cpus=1.0,
        num_gpus=0.0,
    )
    page = explain_page.render(experiment, "action", cocktail, order, users)
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    assert outline.loads == []
    assert "script" not in outline.seen
    assert NASTY not in page
    return page


def test_weights_are_told_by_layer_projection_and_adapter(tmp_path: Path) -> None:
    folder = write_cocktail(tmp_path, ("spirit", "ingredient", "films"), THREE)
    mixture = read_mixture(folder)
    assert mixture.uniform == pytest.approx(1 / 3)
    assert mixture.added == ("ingredient", "films")
    assert mixture.columns() == ["q", "down"]
    assert mixture.of("films") == {(4, "q"): 0.5, (4, "down"): 0.3, (5, "q"): 0.6, (5, "down"): 0.2}
    assert mixture.by_layer("films") == pytest.approx({"layer 4": 0.4, "layer 5": 0.4})
    assert mixture.by_projection("films") == pytest.approx({"q": 0.55, "down": 0.25})
    assert mixture.mean("ingredient") == pytest.approx(0.25)
    assert list(mixture.curves) == ["entropy"]


def test_linears_at_one_place_count_by_their_mean(tmp_path: Path) -> None:
    folder = write_cocktail(tmp_path, ("spirit", "ingredient"), TWO)
    table = json.loads((folder / "weights.json").read_text())
    table["modules"] = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(4)]
    artifacts.write_json(folder / "weights.json", table)
    assert read_mixture(folder).of("ingredient") == {(0, "up"): pytest.approx(0.55)}


@pytest.mark.parametrize(
    "weights", [TWO[:3], [[0.5]] * 4, [[0.5, "x"]] * 4, [[0.5, float("nan")]] * 4]
)
def test_weights_of_another_form_are_named(tmp_path: Path, weights: list[list[float]]) -> None:
    folder = write_cocktail(tmp_path, ("spirit", "ingredient"), weights)
    with pytest.raises(ArtifactError, match=r"weights\.json: is not in the form"):
        read_cocktail(folder)


def test_a_guard_of_another_form_is_named(tmp_path: Path) -> None:
    folder = write_cocktail(tmp_path, ("spirit", "ingredient"), TWO, {"chosen": "spirit"})
    with pytest.raises(ArtifactError, match=r"guard\.json: "):
        read_cocktail(folder)


def test_the_page_of_two_adapters_without_a_guard(tmp_path: Path) -> None:
    systems = ("spirit", "ingredient", "cocktail")
    cocktail = read_cocktail(write_cocktail(tmp_path, ("spirit", "ingredient"), TWO))
    page = page_of(cocktail, [user(*systems), user(*systems)], systems)
    assert "No guard ran" in page
    assert "Entropy collapse" not in page
    assert "2.345 in the first, 1.234 in the last" in page
    # One map, of the ingredient; every cell tells its value to a pointer and in the table.
    assert page.count('class="spot"') == len(MODULES)
    assert "<title>layer 5, down: 0.900</title>" in page
    assert "<tr><td>5</td><td>0.500</td><td>0.900</td></tr>" in page
    assert "One weight was learned for each layer" in page
    # Two users, three lists each, with the next item marked in words and not by colour alone.
    assert page.count("next item at rank 2.5 of 20") == 6
    assert page.count('<li class="next">The Next One <span class="score">-1.25</span>') == 6
    assert page.count('<span class="tag">next item</span>') == 6
    assert "3 earlier, then Seen &lt;script&gt;" in page
    # Of eleven titles the last eight are shown.
    assert "&lt;/script&gt; 03;" in page
    assert "&lt;/script&gt; 02;" not in page
    assert "2 validation users, drawn by the seed 7; no test click is shown or" in page


def test_the_guard_s_choice_is_told_and_marked(tmp_path: Path) -> None:
    systems = ("spirit", "ingredient", "uniform", "cocktail")
    folder = write_cocktail(
        tmp_path,
        ("spirit", "ingredient"),
        TWO,
        GUARD,
        objective=1.0,
        mean_prediction_entropy=2.5,
        num_reliable=7,
    )
    page = page_of(read_cocktail(folder), [user(*systems)], systems)
    assert "<b>Served: uniform.</b> The <code>uniform</code> average is ahead by 0.020" in page
    assert "<b>Entropy collapse.</b> Confident and wrong" in page
    # The entropy stands behind the p-value; the ingredient's is of an earlier version, untold.
    row = r"<td>ingredient</td><td>0\.611</td><td>0\.250</td><td>0\.040</td><td></td><td>0\.5</td>"
    assert re.search(row, page)
    assert "<td>uniform</td><td>0.621</td><td>0.250</td><td>&lt;0.001</td><td>2.250</td>" in page
    assert "<td>cocktail</td><td>0.601</td><td>0.250</td><td></td><td>1.750</td>" in page
    assert "1,234 validation users. Each system is calibrated as these users&#x27; lists on" in page
    assert "1,234 validation users" in page
    assert '<h4>uniform <span class="tag">served</span></h4>' in page
    assert page.count(">served</span>") == 1
    for heading in ("Entropy", "Objective", "Entropy of the mean prediction", "Prompts that coun"):
        assert f"<h3>{heading}" in page


def test_a_curve_that_repeats_the_entropy_is_left_out(tmp_path: Path) -> None:
    folder = write_cocktail(tmp_path, ("spirit", "ingredient"), TWO)
    rows = [{"step": s, "entropy": 2.0, "objective": 2.0, "num_reliable": 8} for s in range(3)]
    (folder / "entropy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cocktail = read_cocktail(folder)
    page = page_of(cocktail, [], ("spirit", "ingredient", "cocktail"))
    assert "<h3>Objective" not in page
    assert "<h3>Prompts that counted" in page
    page = page_of(replace(cocktail, config={"objective": "entropy"}), [], ("spirit", "cocktail"))
    assert "<h3>Entropy<" in page
    assert "<h3>Prompts that counted" not in page


def test_a_guard_that_compared_nothing_has_no_table(tmp_path: Path) -> None:
    guard = {**GUARD, "chosen": "cocktail", "why": "There is no validation user.", "systems": {}}
    cocktail = read_cocktail(write_cocktail(tmp_path, ("spirit", "ingredient"), TWO, guard))
    page = page_of(cocktail, [], ("spirit", "ingredient", "cocktail"))
    assert "<b>Served: cocktail.</b> There is no validation user." in page
    assert "<th>NDCG</th>" not in page
    assert "The domain has no validation users" in page


def test_a_guest_has_a_map_for_each_other_domain(tmp_path: Path) -> None:
    systems = ("spirit", "uniform", "cocktail")
    adapters = ("spirit", "films", NASTY)
    cocktail = read_cocktail(write_cocktail(tmp_path, adapters, THREE))
    page = page_of(cocktail, [user(*systems)], systems)
    assert page.count('class="spot"') == 2 * len(MODULES)
    assert "Weight of <code>films</code>" in page
    assert "Weight of <code>&lt;script&gt;" in page
    assert "the equal mix has 0.333" in page
    assert "<h4>ingredient" not in page
    assert "<h4>uniform" in page


def test_bars_start_at_the_centre() -> None:
    """From -0.1 to 0.3 around the centre: the left bar takes a quarter of the room."""
    drawn = charts.bars({"a": 0.4, "b": 0.8, "c": 0.5}, centre=0.5, what="means")
    found = re.findall(r'class="bar (\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    (left, start_a, wide_a), (right, start_b, wide_b), (_, _, wide_c) = found
    assert (left, right) == ("below", "above")
    assert float(wide_b) == pytest.approx(3 * float(wide_a), abs=0.2)
    assert float(start_b) == pytest.approx(float(start_a) + float(wide_a), abs=0.2)
    assert float(start_b) + float(wide_b) == pytest.approx(charts.WIDTH - 46, abs=0.2)
    assert float(wide_c) == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run with one validation user; the spirit is the adapter that another domain has."""
    experiment = make_run(tmp_path_factory.mktemp("served"))
    run = RunFolder(experiment.run_dir)
    shutil.copytree(run.cocktail_dir("rivers"), run.spirit_dir)
    return experiment


def test_rankings_are_those_of_the_service(served: Experiment) -> None:
    """Folded one after another, with the candidates' empty history: as served, adapter by adapter.

    The service runs adapters by hooks and scores the whole catalogue under the empty history.
    """
    run = RunFolder(served.run_dir)
    write_cocktail(run.cocktail_dir("tools"), ("spirit", "rivers"), TWO)
    seal_evaluation(run, "cocktails/tools")
    domain = read_domain(run.domain_dir("tools"))
    cases = domain.cases("valid", "warm")
    folders = {"spirit": run.spirit_dir, "cocktail": run.cocktail_dir("tools")}
    order = SampleOrder(
        domain_dir=run.domain_dir("tools"),
        systems=tuple(
            explain.shown_system(served, "tools", name, folder, None)
            for name, folder in folders.items()
        ),
        model_dir=served.model.path,
        model_path=served.model.path,
        dtype="float32",
        style=served.tune.style,
        max_titles=served.evaluate.max_titles,
        tokens_per_batch=64,
        seed=0,
        num_cpus=1.0,
        num_gpus=0.0,
    )
    assert [system.calibration for system in order.systems] == [
        Calibration(0.0, 0.0, served.tune.learns_with_prior),
        Calibration(0.5, 0.25, True),
    ]
    assert [system.chosen_by for system in order.systems] == ["", "evaluate"]
    (found,) = rankings(open_language_model(served), domain, cases, order)
    (case,) = cases
    assert found.history == tuple(domain.titles[item] for item in case.history)
    assert found.next_title == domain.titles[case.target]
    assert found.num_candidates == len(case.candidates) == 3
    assert list(found.rankings) == ["spirit", "cocktail"]
    scores = {}
    for system, ranking in found.rankings.items():
        serving = served.serve.model_copy(update={"system": system})
        answer = rank_offline(
            served.model_copy(update={"serve": serving}),
            "tools",
            [domain.item_ids[item] for item in case.history],
            [domain.item_ids[item] for item in case.candidates],
            k=NUM_TOP,
        )
        assert [line.title for line in ranking.top] == [item.title for item in answer.items]
        scores[system] = [item.score for item in answer.items]
        assert [line.score for line in ranking.top] == pytest.approx(scores[system], abs=1e-3)
        target = domain.item_ids[case.target]
        assert [line.is_next for line in ranking.top] == [i.item_id == target for i in answer.items]
        assert ranking.rank == next(i.rank for i in answer.items if i.item_id == target)
    assert scores["spirit"] != pytest.approx(scores["cocktail"], abs=0.1)


def test_the_guard_s_calibration_comes_first(served: Experiment, tmp_path: Path) -> None:
    folder = write_cocktail(tmp_path, ("spirit", "ingredient"), TWO, GUARD)
    guard = read_cocktail(folder).guard
    shown = explain.shown_system(served, "tools", "cocktail", folder, guard)
    assert shown.calibration == Calibration(0.5, 2.0, True)
    assert shown.chosen_by == "the guard"
    assert guard is not None
    fixed = {"cocktail": {**guard.systems["cocktail"], "chosen_by": "fixed"}}
    as_given = replace(guard, systems=fixed)
    shown = explain.shown_system(served, "tools", "cocktail", folder, as_given)
    assert shown.chosen_by == "the experiment file"


@pytest.mark.parametrize(
    ("adapters", "guard", "systems"),
    [
        (("spirit", "ingredient"), None, ["spirit", "ingredient", "cocktail"]),
        (("spirit", "ingredient"), GUARD, ["spirit", "ingredient", "uniform", "cocktail"]),
        (("spirit", "rivers"), None, ["spirit", "uniform", "cocktail"]),
        (("ingredient", "rivers"), None, ["ingredient", "uniform", "cocktail"]),
    ],
)
def test_what_is_ranked_follows_from_the_adapters(
    served: Experiment,
    tmp_path: Path,
    adapters: tuple[str, ...],
    guard: dict[str, Any] | None,
    systems: list[str],
) -> None:
    cocktail = read_cocktail(write_cocktail(tmp_path, adapters, TWO, guard))
    order = explain.make_order(served, "tools", cocktail, lambda _: None)
    assert [system.name for system in order.systems] == systems
