"""The stage `report`: one HTML page, one Markdown page, and the table that a terminal shows."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table

from rc_ray import artifacts, mix_parts, page, recipes
from rc_ray.config import Experiment
from rc_ray.findings import Findings, read_findings
from rc_ray.progress import Progress
from rc_ray.results import Results, Score
from rc_ray.verdicts import HEADLINE, sentences, too_few_samples


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Tell what a finished evaluation showed, in `report/index.html` and `report/report.md`.

    Raises:
        ArtifactError: `evaluate` has not finished, or one of its files is damaged.
    """
    run_folder = artifacts.RunFolder(experiment.run_dir)
    folder = run_folder.report_dir
    console.stage("report")
    recipe = recipes.report(experiment)
    config, inputs = recipe.config, recipe.inputs(run_folder)
    wanted = artifacts.fingerprint(config=config, seed=experiment.seed, inputs=inputs)
    if not force and artifacts.is_finished(folder, wanted):
        console.note(f"finished before: {folder / 'index.html'}")
        return folder
    findings = read_findings(experiment)
    with artifacts.replaced_dir(folder) as work:
        (work / "index.html").write_text(page.render(findings), encoding="utf-8")
        (work / "report.md").write_text(markdown(findings), encoding="utf-8")
        artifacts.write_manifest(
            work,
            stage="report",
            config=config,
            seed=experiment.seed,
            inputs=inputs,
            metrics={"verdicts": sentences(findings.results, experiment.data.tested)},
        )
    console.note(f"report: {folder / 'index.html'}")
    return folder


def markdown(findings: Findings) -> str:
    """The findings and the tables of systems as Markdown."""
    experiment, results = findings.experiment, findings.results
    metrics = results.metrics()
    lines = [f"# {experiment.name}", ""]
    lines += [f"- {one}" for one in sentences(results, experiment.data.tested)]
    lines += [f"- {one}" for one in mix_parts.sentences(findings)]
    lines += ["", "In brackets: 95 % bootstrap intervals over users.", ""]
    coarse = too_few_samples(results, experiment.evaluate.num_bootstrap)
    lines += [coarse, ""] if coarse else []
    for domain in results.domains():
        for split in page.SPLITS:
            for candidates in results.lists(domain):
                rows = [
                    (name, scores)
                    for system in results.systems(domain)
                    for name in (system, f"{system} (raw)")
                    if any(
                        scores := [
                            results.score(domain, split, name, metric, candidates)
                            for metric in metrics
                        ]
                    )
                ]
                if not rows:
                    continue
                lines += [f"## {domain}, {split}, {candidates}", ""]
                lines.append(f"| system | {' | '.join(metrics)} |")
                lines.append("|---" * (1 + len(metrics)) + "|")
                lines += [f"| {name} | {' | '.join(map(_cell, scores))} |" for name, scores in rows]
                lines.append("")
    lines += ["```", findings.command, "```", ""]
    return "\n".join(lines)


def summary_table(results: Results) -> Table:
    """Systems by two metrics with intervals, a pair of columns per domain, warm split."""
    table = Table(
        title="Test users, items seen in training: value [95 % interval]",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        # Two domains fit a terminal of 80 columns, though names are long.
        padding=(0, 1, 0, 0),
    )
    table.add_column("system", no_wrap=True)
    shown = (HEADLINE, results.deep_metric())
    for domain in results.domains():
        for metric in shown:
            table.add_column(f"{domain}\n{metric}", justify="right", no_wrap=True)
    for system in results.systems():
        scores = [results.score(d, "warm", system, m) for d in results.domains() for m in shown]
        if any(scores):
            style = "bold" if system == "cocktail" else None
            table.add_row(system, *map(_short_cell, scores), style=style)
    return table


def _cell(score: Score | None) -> str:
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" if score else ""


def _short_cell(score: Score | None) -> str:
    """Without the leading zeros, so that two domains fit a terminal of 80 columns."""
    if score is None:
        return ""
    value, low, high = (f"{x:.2f}".removeprefix("0") for x in (score.value, score.low, score.high))
    return f"{value} [{low} {high}]"
