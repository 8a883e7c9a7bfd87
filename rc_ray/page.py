"""The report as one HTML page that loads nothing: its style and its charts stand inside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from rc_ray import __version__, charts
from rc_ray.config import SYSTEMS
from rc_ray.core.metrics import METRICS
from rc_ray.findings import Findings
from rc_ray.status import dump
from rc_ray.verdicts import HEADLINE, Score, sentences

SPLITS = {"warm": "Items seen in training", "cold": "Items absent from all training"}
COUNTS = (
    ("users", "users"),
    ("items", "items"),
    ("cold_items", "of them cold"),
    ("interactions", "interactions"),
    ("unlabeled_users", "unlabeled users"),
    ("valid_cases", "validation cases"),
    ("test_cases", "test cases"),
    ("cold_test_cases", "cold test cases"),
)
"""Keys of a prepared domain's metrics and their names in the table of data."""


def render(findings: Findings) -> str:
    """The whole page; everything that comes from data or settings is escaped."""
    experiment = findings.experiment
    style = resources.files("rc_ray").joinpath("report.css").read_text(encoding="utf-8")
    title = f"{experiment.name}: what the run showed"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{_summary(findings)}</p>',
        _findings_list(findings),
        *(_domain(findings, domain) for domain in findings.results.domains()),
        _cocktails(findings),
        _training(findings),
        _data(findings),
        _reproduce(findings),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _summary(findings: Findings) -> str:
    experiment = findings.experiment
    data = experiment.data
    text = (
        f"Base LLM {experiment.model.path}; spirit from {', '.join(data.spirit)}; "
        f"ingredients {', '.join(data.ingredients)}; seed {experiment.seed}; rc_ray {__version__}."
    )
    return html.escape(text)


def _findings_list(findings: Findings) -> str:
    found = sentences(findings.results, findings.experiment.data.ingredients)
    items = "".join(f"<li>{_prose(sentence)}</li>" for sentence in found)
    note = (
        "In brackets: 95 % bootstrap intervals over users, of differences paired by user. A claim "
        "needs an interval without 0; several claims stand side by side without correction."
    )
    return (
        f'<h2>Findings</h2><div class="card"><ul class="findings">{items}</ul></div>'
        f'<p class="soft">{note}</p>'
    )


def _prose(sentence: str) -> str:
    """Escaped, with `names in backticks` as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(sentence))


def _domain(findings: Findings, domain: str) -> str:
    results = findings.results
    systems = [
        system
        for system in SYSTEMS
        if any(k[0] == domain and k[2] == system for k in results.scores)
    ]
    figures, splits = [], []
    for split, title in SPLITS.items():
        scored = [s for s in systems if results.score(domain, split, s, HEADLINE)]
        if not scored:
            continue
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
            f'<div class="card"><h3>{title}</h3><figure>{chart}'
            f"<figcaption>{caption}</figcaption></figure></div>"
        )
        splits.append(split)
    parts = [f"<h2>Systems on <code>{html.escape(domain)}</code></h2>"]
    parts.append(f'<div class="grid">{"".join(figures)}</div>')
    parts.append(_scores_table(findings, domain, systems, splits))
    parts.append(_raw_table(findings, domain, systems, splits))
    return "".join(parts)


def _scores_table(
    findings: Findings, domain: str, systems: Sequence[str], splits: Sequence[str]
) -> str:
    head = "<tr><th></th>" + "".join(
        f'<th class="group" colspan="{len(METRICS)}">{SPLITS[split]}</th>' for split in splits
    )
    head += "</tr><tr><th>system</th>" + "".join(f"<th>{m}</th>" for _ in splits for m in METRICS)
    rows = []
    for system in systems:
        cells = [
            _score_cell(findings.results.score(domain, split, system, metric))
            for split in splits
            for metric in METRICS
        ]
        rows.append((system, cells))
    return f'<div class="card">{_table(head + "</tr>", rows)}</div>'


def _raw_table(
    findings: Findings, domain: str, systems: Sequence[str], splits: Sequence[str]
) -> str:
    """Calibrated beside raw: how much of a system's place is owed to the calibration."""
    shown = ("HR@1", "NDCG@5")
    measured = [
        system
        for system in systems
        if system != "popularity"  # it has nothing to calibrate
        and findings.results.score(domain, "warm", f"{system} (raw)", HEADLINE)
    ]
    if not measured:
        return ""
    calibration = findings.calibration.get(domain, {})
    head = '<tr><th></th><th class="group" colspan="3">chosen</th>' + "".join(
        f'<th class="group" colspan="{2 * len(shown)}">{SPLITS[split]}</th>' for split in splits
    )
    head += (
        "</tr><tr><th>system</th><th>&alpha;</th><th>&gamma;</th><th>prior in trie</th>"
        + "".join(f"<th>{metric}</th><th>raw</th>" for _ in splits for metric in shown)
    )
    rows = []
    for system in measured:
        chosen = calibration.get(system, {})
        cells = [f"{chosen[k]:g}" if k in chosen else "" for k in ("alpha", "gamma")]
        cells.append("yes" if chosen.get("prior_in_trie") else "no")
        for split in splits:
            for metric in shown:
                for name in (system, f"{system} (raw)"):
                    cells.append(_score_cell(findings.results.score(domain, split, name, metric)))
        rows.append((system, cells))
    return (
        '<div class="card"><h3>Calibrated score beside the raw likelihood</h3>'
        '<p class="soft">With all three chosen on validation users, the score '
        "is log p(title | history) &minus; &alpha; log p(title | empty "
        "history) + &gamma; log prior(title).</p>"
        f"{_table(head + '</tr>', rows)}</div>"
    )


def _score_cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f'{score.value:.3f}<span class="range">{score.low:.3f}&ndash;{score.high:.3f}</span>'


def _table(head: str, rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows of a name, escaped here, and cells that are HTML already."""
    mark = {"cocktail": ' class="strong"'}
    body = "".join(
        f"<tr{mark.get(name, '')}><td>{html.escape(name)}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _cocktails(findings: Findings) -> str:
    if not findings.mixtures:
        return ""
    cards = []
    for domain, mixture in findings.mixtures.items():
        drawn = charts.heat_map(mixture.ingredient_weights, mixture.columns(), centre=0.5)
        values = list(mixture.ingredient_weights.values())
        mean = sum(values) / len(values) if values else 0.5
        cards.append(
            f'<div class="card"><h3>Weight of the ingredient on <code>{html.escape(domain)}</code>'
            f"</h3><figure>{drawn}<figcaption>Layers from the input down, by projection; mean "
            f"{mean:.3f}, the spirit has the rest of 1.</figcaption></figure></div>"
        )
    return f'<h2>How the cocktails mix</h2><div class="grid">{"".join(cards)}</div>'


def _training(findings: Findings) -> str:
    """Loss and entropy curves side by side."""
    mixtures = findings.mixtures.items()
    curves = (
        (
            "Training loss",
            charts.lines(findings.losses, x_label="step", y_label="loss (nats per title)"),
            "Base spirit and ingredients, on their own domains' titles.",
        ),
        (
            "Entropy while the weights are learned",
            charts.lines(
                {domain: mixture.entropy for domain, mixture in mixtures},
                x_label="step",
                y_label="entropy (nats)",
            ),
            "Mean entropy of the next title over the catalogue, on unlabeled prompts of users "
            "that are never scored.",
        ),
    )
    cards = [
        f'<div class="card"><h3>{title}</h3><figure>{drawn}'
        f"<figcaption>{caption}</figcaption></figure></div>"
        for title, drawn, caption in curves
        if drawn
    ]
    return f'<h2>Training and merging</h2><div class="grid">{"".join(cards)}</div>' if cards else ""


def _data(findings: Findings) -> str:
    if not findings.data:
        return ""
    columns = [(k, n) for k, n in COUNTS if any(k in one for one in findings.data.values())]
    head = "<tr><th>domain</th><th>role</th>" + "".join(f"<th>{n}</th>" for _, n in columns)
    rows = []
    for domain, counts in findings.data.items():
        role = "spirit" if domain in findings.experiment.data.spirit else "ingredient"
        cells = [role, *(_count(counts.get(key)) for key, _ in columns)]
        rows.append((domain, cells))
    return f'<h2>Data</h2><div class="card">{_table(head + "</tr>", rows)}</div>'


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _reproduce(findings: Findings) -> str:
    return (
        f'<h2>Run it again</h2><div class="card"><pre>{html.escape(findings.command)}</pre>'
        "<details><summary>the resolved experiment file</summary>"
        f"<pre>{html.escape(dump(findings.experiment))}</pre></details></div>"
    )
