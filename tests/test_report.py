"""The report on hand-made results: what it claims, what it escapes and that it loads nothing."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rc_ray import artifacts, charts, recipes, report
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError
from rc_ray.findings import Findings, read_findings
from rc_ray.page import render
from rc_ray.page_parts import difference_cell
from rc_ray.progress import Progress
from rc_ray.results import Difference, Probed, Results, Score
from rc_ray.verdicts import (
    beside_mixes,
    in_short,
    merge_verdict,
    overall,
    sentences,
    standing,
    too_few_samples,
)

NASTY = "<script>alert('genre')</script>"
SYSTEMS = ("popularity", "base", "spirit", "ingredient", "uniform", "cocktail")
VALUES = {
    "action": (0.198, 0.161, 0.214, 0.292, 0.271, 0.309),
    "horror_thriller": (0.223, 0.142, 0.187, 0.268, 0.249, 0.262),
}


def make_experiment(folder: Path) -> Experiment:
    raw: dict[str, Any] = {
        "name": "hand-made",
        "output_dir": str(folder / "runs & more"),
        "data": {
            "sources": [
                {
                    "format": "movielens-100k",
                    "genre_domains": {
                        "family": [NASTY],
                        "action": ["Action"],
                        "horror_thriller": ["Horror"],
                    },
                }
            ],
            "spirit": ["family"],
            "ingredients": ["action", "horror_thriller"],
        },
    }
    return Experiment.model_validate(raw)


def write_results(experiment: Experiment) -> Path:
    """Plausible results: on `action` the cocktail beats the ingredient, elsewhere not."""
    folder = artifacts.RunFolder(experiment.run_dir).evaluate_dir
    folder.mkdir(parents=True)
    scores, differences = [], []
    for domain, values in VALUES.items():
        for split, scale in (("warm", 1.0), ("cold", 0.6)):
            for system, value in zip(SYSTEMS, values, strict=True):
                for name, share in ((system, 1.0), (f"{system} (raw)", 0.8)):
                    if name == "popularity (raw)":
                        continue
                    for metric, factor in (
                        ("HR@1", 1.0),
                        ("HR@5", 2.1),
                        ("NDCG@5", 1.5),
                        ("MRR@5", 1.6),
                    ):
                        centre = value * scale * share * factor
                        scores.append(
                            {
                                "domain": domain,
                                "split": split,
                                "candidates": "main",
                                "system": name,
                                "metric": metric,
                                "value": centre,
                                "ci_low": centre - 0.035,
                                "ci_high": centre + 0.035,
                                "num_users": 512,
                                "num_candidates": 20,
                                "seed": 7,
                            }
                        )
            for system, value in zip(SYSTEMS[:-1], values, strict=False):
                gap = (values[-1] - value) * scale
                differences.append(
                    {
                        "domain": domain,
                        "split": split,
                        "candidates": "main",
                        "metric": "HR@1",
                        "system_a": "cocktail",
                        "system_b": system,
                        "difference": gap,
                        "ci_low": gap - 0.016,
                        "ci_high": gap + 0.016,
                        "p_value": 0.004,
                        "p_adjusted": 0.02,
                        "num_users": 512,
                    }
                )
    pq.write_table(pa.Table.from_pylist(scores), folder / "results.parquet")
    pq.write_table(pa.Table.from_pylist(differences), folder / "differences.parquet")
    artifacts.write_json(
        folder / "calibration.json",
        {d: {s: {"alpha": 1.0, "gamma": 0.5, "valid_ndcg": 0.3} for s in SYSTEMS} for d in VALUES},
    )
    artifacts.write_manifest(folder, stage="evaluate", config={}, seed=7, inputs={}, metrics={})
    return folder


def write_training(experiment: Experiment, *, num_layers: int = 30, num_steps: int = 60) -> None:
    run = artifacts.RunFolder(experiment.run_dir)
    folders = [run.spirit_dir, *map(run.ingredient_dir, experiment.data.ingredients)]
    for place, folder in enumerate(folders):
        folder.mkdir(parents=True)
        rows = [
            {"step": step, "loss": 4.2 - 0.2 * place + 1.6 / (1 + step / 9)}
            for step in range(num_steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    names = [
        f"model.layers.{layer}.{part}.{projection}_proj"
        for layer in range(num_layers)
        for part, projections in groups.items()
        for projection in projections
    ]
    for place, domain in enumerate(experiment.data.ingredients):
        folder = run.cocktail_dir(domain)
        folder.mkdir(parents=True)
        shares = [0.5 + 0.2 * ((7 * i + 13 * place) % 17 - 7) / 17 for i in range(len(names))]
        artifacts.write_json(
            folder / "weights.json",
            {
                "modules": names,
                "adapters": ["spirit", "ingredient"],
                "weights": [[1 - share, share] for share in shares],
            },
        )
        rows = [{"step": step, "entropy": 3.9 - 0.02 * step * (place + 1)} for step in range(12)]
        (folder / "entropy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        artifacts.write_manifest(folder, stage="merge", config={}, seed=7, inputs={}, metrics={})
    for domain in experiment.data.domains:
        folder = run.domain_dir(domain)
        folder.mkdir(parents=True)
        metrics = {"users": 890, "items": 372, "interactions": 12_345, "test_cases": 512}
        artifacts.write_manifest(
            folder, stage="prepare", config={}, seed=7, inputs={}, metrics=metrics
        )


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    made = make_experiment(tmp_path)
    write_results(made)
    write_training(made)
    return made


class Outline(HTMLParser):
    """Fails on unbalanced tags and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.loads += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def results_of(
    *differences: tuple[str, str, float, float, float],
    split: str = "warm",
    domain: str = "action",
    num_users: int = 500,
) -> Results:
    return Results(
        scores={
            (domain, split, "main", s, "HR@1"): Score(0.3, 0.27, 0.33, 500, 20)
            for s in ("cocktail", "ingredient", "popularity", "base", "spirit", "uniform")
        },
        differences={
            (domain, split, "main", "HR@1", a, b): Difference(value, low, high, num_users)
            for a, b, value, low, high in differences
        },
    )


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.09, "beats"), (-0.02, 0.04, "ties"), (-0.09, -0.01, "loses"), (0.0, 0.04, "ties")],
)
def test_an_outcome_needs_an_interval_without_zero(low: float, high: float, outcome: str) -> None:
    difference = Difference((low + high) / 2, low, high, num_users=500)
    assert difference.outcome == outcome
    mirrored = {"beats": "loses", "loses": "beats", "ties": "ties"}
    assert difference.reversed().outcome == mirrored[outcome]


def test_an_outcome_needs_the_corrected_test_too() -> None:
    assert Difference(0.05, 0.01, 0.09, 500, p_adjusted=0.049).outcome == "beats"
    assert Difference(0.05, 0.01, 0.09, 500, p_adjusted=0.05).outcome == "ties"
    assert Difference(0.05, 0.01, 0.09, 500, p_adjusted=0.3).reversed().outcome == "ties"


def test_too_few_users_show_no_difference() -> None:
    assert Difference(0.5, 0.3, 0.7, num_users=19).outcome == "ties"
    assert Difference(-0.5, -0.7, -0.3, num_users=19).reversed().outcome == "ties"
    assert Difference(0.5, 0.3, 0.7, num_users=20).outcome == "beats"
    won = ("cocktail", "popularity", 0.5, 0.3, 0.7)
    told = standing(results_of(won, num_users=12), "action", "cocktail", ("popularity",)) or ""
    assert "shows no difference from popularity" in told
    assert "too few users: 12" in told


def test_neither_the_service_nor_the_number_of_workers_makes_a_report_stale() -> None:
    def config(**sections: Any) -> dict[str, Any]:
        raw = make_experiment(Path("x")).model_dump(mode="json")
        for name, section in sections.items():
            raw[name] |= section
        return recipes.report(Experiment.model_validate(raw)).config

    assert config() == config(
        serve={"port": 9},
        train={"num_workers": 2},
        tune={"cpus_per_trial": 2},
        merge={"cpus_per_task": 2},
        evaluate={"num_actors": 2},
    )
    assert config() != config(evaluate={"num_bootstrap": 9})


def test_a_sentence_tells_wins_losses_and_ties_apart() -> None:
    results = results_of(
        ("cocktail", "popularity", 0.09, 0.04, 0.14),
        ("ingredient", "cocktail", 0.05, 0.01, 0.09),
        ("cocktail", "uniform", 0.01, -0.02, 0.04),
    )
    told = standing(results, "action", "cocktail", ("popularity", "base", "ingredient", "uniform"))
    assert told == (
        "On `action` the cocktail (HR@1 0.300 [0.270, 0.330]) "
        "beats popularity (+0.090 [+0.040, +0.140]); "
        "it loses to the ingredient (-0.050 [-0.090, -0.010]); "
        "it shows no difference from the uniform average (+0.010 [-0.020, +0.040])."
    )


def test_many_mixes_are_told_by_name_alone() -> None:
    results = results_of(
        ("cocktail", "a", 0.09, 0.04, 0.14),
        ("b", "cocktail", 0.05, 0.01, 0.09),
        ("cocktail", "c", 0.01, -0.02, 0.04),
        ("cocktail", "d", 0.00, -0.02, 0.02),
    )
    assert beside_mixes(results, "action", ("a", "b", "c", "d", "not_scored")) == (
        "On `action` and HR@1 the cocktail beats the mix `a`; it loses to the mix `b`; it shows no "
        "difference from the mixes `c` and `d`."
    )
    assert beside_mixes(results, "action", ()) is None


@pytest.mark.parametrize(
    ("over_ingredient", "over_uniform", "words"),
    [
        ((0.01, 0.05), (0.01, 0.05), "The merge won on `action`"),
        ((-0.02, 0.05), (0.01, 0.05), "The merge won in part on `action`"),
        ((-0.02, 0.05), (-0.01, 0.05), "The merge did not win on `action`"),
        ((-0.06, -0.01), (0.01, 0.05), "The merge lost on `action`"),
    ],
)
def test_a_merge_is_judged_by_its_controls(
    over_ingredient: tuple[float, float], over_uniform: tuple[float, float], words: str
) -> None:
    results = results_of(
        ("cocktail", "ingredient", sum(over_ingredient) / 2, *over_ingredient),
        ("cocktail", "uniform", sum(over_uniform) / 2, *over_uniform),
    )
    assert (merge_verdict(results, "action") or "").startswith(words)


def test_the_overall_claim_needs_both_plain_systems_beaten() -> None:
    beaten = results_of(
        ("ingredient", "popularity", 0.05, 0.01, 0.09), ("ingredient", "base", 0.1, 0.05, 0.15)
    )
    assert overall(beaten, ["action"]).startswith("On `action`, the one ingredient domain the")
    half = results_of(
        ("ingredient", "popularity", 0.05, -0.01, 0.09), ("ingredient", "base", 0.1, 0.05, 0.15)
    )
    assert overall(half, ["action"]).startswith("On no ingredient domain was it shown")
    # One system must beat both: popularity beaten by one and the base LLM by another is no claim.
    mixed = results_of(
        ("ingredient", "popularity", 0.05, 0.01, 0.09),
        ("cocktail", "base", 0.1, 0.05, 0.15),
    )
    assert overall(mixed, ["action"]).startswith("On no ingredient domain was it shown")


BASELINE_VALUES = {"popularity": 0.2, "item_knn": 0.3, "sasrec": 0.4, "title_embedding": 0.1}


def of_baselines(*domains: str) -> Results:
    """SASRec leads everywhere, shown on the main list and not on the catalogue."""
    scores, differences = {}, {}
    for domain in domains:
        for candidates, p in (("main", 0.01), ("catalogue", 0.2)):
            for system, value in BASELINE_VALUES.items():
                for metric in ("HR@1", "NDCG@10"):
                    key = (domain, "warm", candidates, system, metric)
                    scores[key] = Score(value, value - 0.05, value + 0.05, 100, 20)
                gap = BASELINE_VALUES["sasrec"] - value
                differences[domain, "warm", candidates, "NDCG@10", "sasrec", system] = Difference(
                    gap, gap - 0.05, gap + 0.05, 100, p
                )
    return Results(scores, differences)


def test_baselines_alone_are_compared_among_themselves() -> None:
    told = sentences(of_baselines("films"), ["films"])
    assert told[0] == (
        "On `films` SASRec (NDCG@10 0.400 [0.350, 0.450]) beats popularity (+0.200 [+0.150, "
        "+0.250]), item kNN (+0.100 [+0.050, +0.150]) and the title embedding "
        "(+0.300 [+0.250, +0.350])."
    )
    assert told[1].startswith("On `films` and its whole catalogue of 20 items SASRec (NDCG@10")
    assert "shows no difference from popularity" in told[1]
    assert in_short(of_baselines("films"), ["films"]) == told


def test_the_best_baseline_is_named_in_short() -> None:
    results = of_baselines("films")
    keys = {("films", "warm", "main", "cocktail", "HR@1"): Score(0.3, 0.25, 0.35, 100, 20)}
    lost = Difference(-0.1, -0.15, -0.05, 100, 0.01)
    pair = {("films", "warm", "main", "HR@1", "cocktail", "sasrec"): lost}
    found = Results({**results.scores, **keys}, {**results.differences, **pair})
    assert (
        "On `films` the best LLM system, the cocktail, loses to the best baseline that learns, "
        "SASRec."
    ) in in_short(found, ["films"])


def test_probes_are_told_of_the_system_that_matters() -> None:
    base = results_of()
    shown = Difference(-0.05, -0.08, -0.02, 100, 0.01)
    probes = {
        ("action", "cocktail", "shuffled_history", "HR@1"): Probed(0.3, 0.25, shown, 4.0),
        ("action", "popularity", "shuffled_history", "HR@1"): Probed(
            0.3, 0.3, Difference(0.0, 0.0, 0.0, 100, 1.0), 0.0
        ),
        ("action", "cocktail", "permuted_candidates", "HR@1"): Probed(
            0.3, 0.3, Difference(0.0, 0.0, 0.0, 100, 1.0), 1e-6
        ),
    }
    told = sentences(Results(base.scores, base.differences, probes), ["action"])
    assert (
        "With the history shuffled the cocktail loses on `action` (HR@1 -0.050 [-0.080, -0.020])."
        in told
    )
    assert any(
        one.startswith("With the candidates in another order the cocktail shows no difference")
        for one in told
    )


def test_a_bootstrap_too_coarse_for_any_claim_is_told() -> None:
    """Six systems are 15 pairs: 15 / (B + 1) < .05 needs B > 299."""
    told = too_few_samples(results_of(), 299)
    assert told is not None
    assert "299 bootstrap samples are too few for 15 pairs of systems" in told
    assert "`evaluate.num_bootstrap` to at least 300." in told
    assert too_few_samples(results_of(), 300) is None


def test_no_difference_has_no_sign() -> None:
    none = Difference(-0.0, -0.0001, 0.0001, 100, 1.0)
    assert difference_cell(none) == '+0.000<span class="range">+0.000 to +0.000</span>'


def test_long_names_of_systems_stay_within_the_chart() -> None:
    drawn = charts.intervals([charts.Interval("title_embedding", 0.5, 0.4, 0.6)])
    place = re.search(r'<text[^>]*x="([\d.]+)"[^>]*>title_embedding<', drawn)
    assert place is not None
    # Set at its end; 12 px letters are at most 6.6 px wide on average in the page's fonts.
    assert float(place[1]) >= 6.6 * len("title_embedding")


def page_summary(findings: Findings) -> str:
    """The line below the heading."""
    return render(findings).partition('<p class="soft">')[2].partition("</p>")[0]


def test_eight_domains_of_baselines_get_an_overview(experiment: Experiment) -> None:
    names = [f"domain{i}" for i in range(8)]
    findings = replace(
        read_findings(experiment),
        results=of_baselines(*names),
        mixtures={},
        losses={},
        costs=[
            {"domain": "domain0", "system": "sasrec", "what": "training", "seconds": 12.5},
            {"domain": NASTY, "system": "base", "what": "catalogue", "proved": 0.5, "seconds": 1},
        ],
    )
    assert "seeds" not in page_summary(findings)
    settings = findings.experiment.evaluate.model_copy(update={"num_seeds": 3})
    trained_thrice = findings.experiment.model_copy(update={"evaluate": settings})
    findings = replace(findings, experiment=trained_thrice)
    assert "sasrec: mean over 3 seeds" in page_summary(findings)
    page = render(findings)
    assert all(f'href="#on-{name}"' in page and f'id="on-{name}"' in page for name in names)
    assert page.count("<b>0.400</b>") == 2 * 8  # the best of both columns of each domain
    assert "the whole catalogue, 20 items" in page
    assert "12.5" in page
    assert "50%" in page
    assert NASTY not in page
    outline = Outline()
    outline.feed(page)
    assert outline.open == []


def test_nothing_is_claimed_of_what_was_not_scored() -> None:
    assert sentences(Results({}, {}), ["action"]) == ["No ingredient domain was scored."]
    assert merge_verdict(Results({}, {}), "action") is None


def test_the_page_is_balanced_and_loads_nothing(experiment: Experiment) -> None:
    page = render(read_findings(experiment))
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    assert {"svg", "table", "style"} <= outline.seen
    # Links within the page load nothing.
    assert [one for one in outline.loads if not one.startswith("href=#")] == []
    assert "script" not in outline.seen
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"alpha": 1.0}, "by validation clicks"),
        ({"chosen_by": "clicks", "scope": "domain"}, "by validation clicks"),
        ({"chosen_by": "clicks", "scope": "global"}, "by validation clicks, one for all domains"),
        ({"chosen_by": "unlabeled", "scope": "domain"}, "without labels"),
        ({"chosen_by": "unlabeled", "scope": "global"}, "without labels, one for all domains"),
        ({"chosen_by": "fixed", "scope": "global"}, "fixed"),
        ({"chosen_by": "default", "scope": "global"}, "default, no validation users"),
    ],
)
def test_the_page_says_how_the_score_was_set(
    experiment: Experiment, entry: dict[str, object], words: str
) -> None:
    findings = read_findings(experiment)
    domain = experiment.data.ingredients[0]
    page = render(replace(findings, calibration={domain: {"spirit": entry}}))
    assert f"<td>{words}</td>" in page


def test_data_and_settings_are_escaped(experiment: Experiment) -> None:
    page = render(read_findings(experiment))
    assert NASTY not in page
    assert "&lt;script&gt;" in page
    assert "runs &amp; more" in page


def test_the_stage_writes_both_pages_and_is_not_redone(experiment: Experiment) -> None:
    console = Progress()
    folder = report.run(experiment, console=console)
    text = (folder / "report.md").read_text()
    assert text.index("On `action` the cocktail") < text.index("| system |")
    row = next(line for line in text.splitlines() if line.startswith("| cocktail |"))
    assert "0.309 [0.274, 0.344]" in row
    before = (folder / "index.html").stat().st_mtime_ns
    report.run(experiment, console=console)
    assert (folder / "index.html").stat().st_mtime_ns == before
    report.run(experiment, force=True, console=console)
    assert (folder / "index.html").stat().st_mtime_ns != before


def test_a_missing_or_damaged_evaluation_is_named(tmp_path: Path) -> None:
    made = make_experiment(tmp_path)
    with pytest.raises(ArtifactError, match="evaluate"):
        report.run(made, console=Progress())
    folder = write_results(made)
    (folder / "results.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ArtifactError, match=r"results\.parquet: damaged"):
        report.run(made, console=Progress())


def test_a_run_without_cocktails_still_gets_its_page(tmp_path: Path) -> None:
    made = make_experiment(tmp_path)
    write_results(made)
    page = render(read_findings(made))
    assert "How the cocktails mix" not in page
    assert "Systems on <code>action</code>" in page


def test_the_summary_fits_a_terminal(experiment: Experiment) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.summary_table(read_findings(experiment).results))
    text = console.export_text()
    assert ".31 [.27 .34]" in text
    assert max(map(len, text.splitlines())) <= 80
