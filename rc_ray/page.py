"""The report as one HTML page that loads nothing: its style and its charts stand inside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rc_ray import __version__, charts, mix_parts, page_parts
from rc_ray.findings import Findings
from rc_ray.page_parts import prose, score_cell, table
from rc_ray.requests import CATALOGUE, MAIN
from rc_ray.systems import BASELINES
from rc_ray.verdicts import HEADLINE, sentences, too_few_samples

SPLITS = {
    "warm": "Items seen in training",
    "cold": "Items absent from all training",
    "cold_user": "Users absent from all training",
    "few_shot": "Users with few items",
}


def render(findings: Findings) -> str:
    """The whole page; everything that comes from data or settings is escaped."""
    experiment = findings.experiment
    title = f"{experiment.name}: what the run showed"
    domains = findings.results.domains()
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{_summary(findings)}</p>',
        _overview(findings, domains),
        _findings_list(findings),
        *(_domain(findings, domain) for domain in domains),
        mix_parts.guards(findings),
        page_parts.cocktails(findings),
        mix_parts.mixes(findings),
        page_parts.training(findings),
        page_parts.costs(findings),
        page_parts.data(findings),
        page_parts.reproduce(findings),
    ]
    return page_parts.document(title, "".join(body))


def _summary(findings: Findings) -> str:
    experiment = findings.experiment
    data = experiment.data
    parts = []
    if set(findings.results.systems()) - set(BASELINES):
        parts.append(f"Base LLM {experiment.model.path}")
    if data.spirit:
        parts.append(f"spirit from {', '.join(data.spirit)}")
    parts.append(f"domains {', '.join(data.ingredients)}")
    if data.guests:
        parts.append(f"guests {', '.join(data.guests)}")
    num_seeds = experiment.evaluate.num_seeds
    if num_seeds > 1 and "sasrec" in findings.results.systems():
        parts.append(f"sasrec: mean over {num_seeds} seeds")
    parts.append(f"seed {experiment.seed}; rc_ray {__version__}.")
    return html.escape("; ".join(parts))


def _overview(findings: Findings, domains: Sequence[str]) -> str:
    """Domains by system at a glance, the best of a domain in bold; its name leads to its part.

    Domains are rows: a run may have hundreds of them, but has a handful of systems.
    """
    if not domains:
        return ""
    results = findings.results
    systems = results.systems()
    metrics = list(dict.fromkeys((HEADLINE, results.deep_metric())))
    rows = []
    for domain in domains:
        cells = []
        for metric in metrics:
            scores = [results.score(domain, "warm", system, metric) for system in systems]
            highest = max((score.value for score in scores if score is not None), default=None)
            for score in scores:
                text = "" if score is None else f"{score.value:.3f}"
                is_best = score is not None and score.value == highest
                cells.append(f"<b>{text}</b>" if is_best else text)
        rows.append((domain, cells))
    head = "<tr><th></th>" + "".join(
        f'<th class="group" colspan="{len(systems)}">{metric}</th>' for metric in metrics
    )
    names = "".join(f"<th>{html.escape(system)}</th>" for _ in metrics for system in systems)
    head += f"</tr><tr><th>domain</th>{names}</tr>"
    note = (
        "Warm test users, main list of candidates; highest value in bold, which by itself "
        "claims nothing: the findings say what is shown."
    )
    found = table(head, rows, anchor=_anchor)
    return f'<div class="card">{found}<p class="soft">{note}</p></div>'


def _anchor(domain: str) -> str:
    return f"on-{html.escape(domain, quote=True)}"


def _findings_list(findings: Findings) -> str:
    found = sentences(findings.results, findings.experiment.data.tested)
    items = "".join(f"<li>{prose(sentence)}</li>" for sentence in found)
    # Of baselines alone no sentence sums up the others.
    sums_up = not set(findings.results.systems()) <= set(BASELINES)
    style = "findings summed-up" if sums_up else "findings"
    note = (
        "In brackets: 95 % bootstrap intervals over users, of differences paired by user. A claim "
        "needs a p-value below .05 after Holm's correction for all pairs of systems that were "
        "compared on the same users, list and metric."
    )
    coarse = too_few_samples(findings.results, findings.experiment.evaluate.num_bootstrap)
    warning = "" if coarse is None else f"<p><b>{prose(coarse)}</b></p>"
    return (
        f'<h2>Findings</h2><div class="card"><ul class="{style}">{items}</ul></div>{warning}'
        f'<p class="soft">{note}</p>'
    )


def _domain(findings: Findings, domain: str) -> str:
    results = findings.results
    systems = results.systems(domain)
    figures = []
    splits = [
        split
        for split in SPLITS
        if any(results.score(domain, split, system, HEADLINE) for system in systems)
    ]
    for split in splits:
        scored = [s for s in systems if results.score(domain, split, s, HEADLINE)]
        rows, size, count = [], 0, 0
        for system in scored:
            score = results.score(domain, split, system, HEADLINE)
            assert score is not None
            size, count = score.num_candidates, score.num_users
            rows.append(
                charts.Interval(
                    system, score.value, score.low, score.high, highlight=system == "cocktail"
                )
            )
        chart = charts.intervals(rows, reference=("chance", 1 / size) if size else None)
        caption = f"{HEADLINE} of {size} candidates, {count} users"
        figures.append(
            f'<div class="card"><h3>{SPLITS[split]}</h3><figure>{chart}'
            f"<figcaption>{caption}</figcaption></figure></div>"
        )
    parts = [f'<h2 id="{_anchor(domain)}">Systems on <code>{html.escape(domain)}</code></h2>']
    parts.append(f'<div class="grid">{"".join(figures)}</div>')
    parts += [_list_table(findings, domain, name, systems) for name in results.lists(domain)]
    parts.append(_raw_table(findings, domain, systems, splits))
    parts.append(page_parts.differences(findings, domain))
    parts.append(page_parts.beyond_accuracy(findings, domain))
    parts.append(page_parts.probes(findings, domain))
    return "".join(parts)


def _list_table(findings: Findings, domain: str, name: str, systems: Sequence[str]) -> str:
    """All metrics on one list of candidates, splits side by side; the main list stands open."""
    results = findings.results
    metrics = results.metrics()
    measured = {
        split: score
        for split in SPLITS
        for system in systems
        if (score := results.score(domain, split, system, metrics[0], name)) is not None
    }
    head = "<tr><th></th>" + "".join(
        f'<th class="group" colspan="{len(metrics)}">{SPLITS[split]} '
        f"({score.num_users:,} users)</th>"
        for split, score in measured.items()
    )
    head += "</tr><tr><th>system</th>" + "".join(f"<th>{m}</th>" for _ in measured for m in metrics)
    rows = [
        (
            system,
            [
                score_cell(results.score(domain, split, system, metric, name))
                for split in measured
                for metric in metrics
            ],
        )
        for system in systems
    ]
    size = next(iter(measured.values())).num_candidates
    words = (
        f"the whole catalogue, {size:,} items"
        if name == CATALOGUE
        else f"list <code>{html.escape(name)}</code>, {size} candidates"
    )
    is_open = " open" if name == MAIN else ""
    return (
        f'<details class="card"{is_open}><summary>All metrics, {words}</summary>'
        f"{table(head + '</tr>', rows)}</details>"
    )


def how_chosen(entry: Mapping[str, Any]) -> str:
    """In words, how the three settings of a system's score came about."""
    words = {
        "clicks": "by validation clicks",
        "unlabeled": "without labels",
        "fixed": "fixed",
        "default": "default, no validation users",
    }
    chosen_by = entry.get("chosen_by", "clicks")
    told = words.get(chosen_by, "")
    is_shared = entry.get("scope") == "global" and chosen_by in ("clicks", "unlabeled")
    return f"{told}, one for all domains" if is_shared else told


def _raw_table(
    findings: Findings, domain: str, systems: Sequence[str], splits: Sequence[str]
) -> str:
    """Calibrated beside raw: how much of a system's place is owed to the calibration."""
    shown = (HEADLINE, findings.results.deep_metric())
    measured = [
        system
        for system in systems
        if findings.results.score(domain, "warm", f"{system} (raw)", HEADLINE)
    ]
    if not measured:
        return ""
    calibration = findings.calibration.get(domain, {})
    head = '<tr><th></th><th class="group" colspan="4">chosen</th>' + "".join(
        f'<th class="group" colspan="{2 * len(shown)}">{SPLITS[split]}</th>' for split in splits
    )
    head += (
        "</tr><tr><th>system</th><th>&alpha;</th><th>&gamma;</th><th>prior in trie</th>"
        "<th>how</th>"
        + "".join(f"<th>{metric}</th><th>raw</th>" for _ in splits for metric in shown)
    )
    rows = []
    for system in measured:
        chosen = calibration.get(system, {})
        cells = [f"{chosen[k]:g}" if k in chosen else "" for k in ("alpha", "gamma")]
        cells.append("yes" if chosen.get("prior_in_trie") else "no")
        cells.append(how_chosen(chosen))
        for split in splits:
            for metric in shown:
                for name in (system, f"{system} (raw)"):
                    cells.append(score_cell(findings.results.score(domain, split, name, metric)))
        rows.append((system, cells))
    return (
        '<details class="card"><summary>Calibrated score beside the raw likelihood</summary>'
        '<p class="soft">The score '
        "is log p(title | history) &minus; &alpha; log p(title | empty "
        "history) + &gamma; log prior(title).</p>"
        f"{table(head + '</tr>', rows)}</details>"
    )
