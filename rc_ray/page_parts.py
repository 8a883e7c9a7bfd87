"""Parts of the HTML report beside the comparison of systems: probes, costs, curves, data."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from rc_ray import charts
from rc_ray.findings import Findings
from rc_ray.mixtures import Mixture
from rc_ray.requests import MAIN
from rc_ray.results import BEYOND, Difference, Score
from rc_ray.status import dump
from rc_ray.verdicts import HEADLINE, PROBES

COUNTS = (
    ("users", "users"),
    ("items", "items"),
    ("cold_items", "of them cold"),
    ("interactions", "interactions"),
    ("unlabeled_users", "unlabeled users"),
    ("cold_users", "cold users"),
    ("few_shot_users", "few-shot users"),
    ("valid_cases", "validation cases"),
    ("test_cases", "test cases"),
    ("cold_test_cases", "cold test cases"),
)
"""Keys of a prepared domain's metrics and their names in the table of data."""


def document(title: str, body: str) -> str:
    """A whole page that loads nothing; the title is escaped here, the body is HTML already."""
    style = resources.files("rc_ray").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def prose(sentence: str) -> str:
    """Escaped, with `names in backticks` as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(sentence))


def score_cell(score: Score | None, *, best: bool = False) -> str:
    """A value over its interval; without one where it has none."""
    if score is None:
        return ""
    value = f"<b>{score.value:.3f}</b>" if best else f"{score.value:.3f}"
    if score.high - score.low < 1e-9:  # none, or nothing to say
        return value
    return f'{value}<span class="range">{score.low:.3f}&ndash;{score.high:.3f}</span>'


def table(
    head: str,
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    anchor: Callable[[str], str] | None = None,
) -> str:
    """Rows of a name, escaped here, and cells that are HTML already.

    With `anchor` a name links to the part of the page that it gives for the name, escaped.
    """
    mark = {"cocktail": ' class="strong"'}

    def shown(name: str) -> str:
        text = html.escape(name)
        return text if anchor is None else f'<a href="#{anchor(name)}">{text}</a>'

    body = "".join(
        f"<tr{mark.get(name, '')}><td>{shown(name)}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def probes(findings: Findings, domain: str) -> str:
    """What changed when one thing about the request did."""
    found = findings.results.probes
    names = [name for name in PROBES if any(k[0] == domain and k[2] == name for k in found)]
    if not names:
        return ""
    shown = (HEADLINE, findings.results.deep_metric())
    cards = []
    for name in names:
        rows = []
        for system in findings.results.systems(domain):
            one = found.get((domain, system, name, shown[0]))
            if one is None:
                continue
            cells = []
            for metric in shown:
                row = found[domain, system, name, metric]
                cells += [f"{row.plain:.3f}", f"{row.probed:.3f}", difference_cell(row.difference)]
            moved = one.max_score_change
            cells.append("" if moved is None else f"{moved:.2g}")
            rows.append((system, cells))
            count = one.difference.num_users
        head = "<tr><th></th>" + "".join(f'<th class="group" colspan="3">{m}</th>' for m in shown)
        head += "<th></th></tr><tr><th>system</th>"
        head += "<th>plain</th><th>changed</th><th>difference</th>" * len(shown)
        head += "<th>largest change of a score</th></tr>"
        cards.append(
            f"<h3>{html.escape(PROBES[name])} ({count} warm test users)</h3>{table(head, rows)}"
        )
    note = (
        "In bold where the corrected test shows a difference. In the styles sequence and brief the "
        "order of the candidates must change nothing but the last digits."
    )
    return (
        f'<details class="card"><summary>Probes on <code>{html.escape(domain)}</code></summary>'
        f'<p class="soft">{note}</p>{"".join(cards)}</details>'
    )


def difference_cell(difference: Difference) -> str:
    """A signed difference over its interval, bold where it is shown."""
    value = f"{difference.value:+z.3f}"
    if difference.outcome != "ties":
        value = f"<b>{value}</b>"
    return f'{value}<span class="range">{difference.low:+z.3f} to {difference.high:+z.3f}</span>'


def beyond_accuracy(findings: Findings, domain: str) -> str:
    """Coverage, popularity and calibration of the systems."""
    results = findings.results
    columns = [
        (split, name, metric)
        for split, name, metric in dict.fromkeys(
            (key[1], key[2], key[4]) for key in results.scores if key[0] == domain
        )
        if metric in BEYOND and split in ("warm", "cold")
    ]
    if not columns:
        return ""
    rows = []
    for system in results.systems(domain):
        found = [results.score(domain, split, system, m, name) for split, name, m in columns]
        if any(found):
            rows.append((system, ["" if s is None else f"{s.value:.3f}" for s in found]))
    names = "".join(f"<th>{metric}<br>{split}</th>" for split, _, metric in columns)
    head = f"<tr><th>system</th>{names}</tr>"
    note = (
        "coverage: share of the catalogue that anybody is shown; popularity: mean percentile of "
        "what is shown; category_kl: distance of its categories from the history's, in nats; "
        "ECE: gap between stated and true probability of the first choice."
    )
    return (
        f'<details class="card"><summary>Beside accuracy on <code>{html.escape(domain)}</code>'
        f'</summary><p class="soft">{note}</p>{table(head, rows)}</details>'
    )


def differences(findings: Findings, domain: str) -> str:
    """Every pair of systems on warm test users by the headline metric."""
    results = findings.results
    systems = results.systems(domain)
    metric = results.deep_metric()
    rows = []
    for a in systems:
        cells = []
        for b in systems:
            found = results.difference(domain, "warm", metric, a, b) if a != b else None
            cells.append("" if found is None else difference_cell(found))
        rows.append((a, cells))
    if not any(cell for _, cells in rows for cell in cells):
        return ""
    head = "<tr><th>row minus column</th>" + "".join(f"<th>{b}</th>" for b in systems) + "</tr>"
    note = f"{metric}, warm test users, {MAIN} list; bold: corrected p below .05 (Holm, all pairs)."
    return (
        f'<details class="card"><summary>Every pair of systems on <code>{html.escape(domain)}'
        f'</code></summary><p class="soft">{note}</p>{table(head, rows)}</details>'
    )


def costs(findings: Findings) -> str:
    """Tokens, seconds and memory of training and scoring."""
    if not findings.costs:
        return ""
    head = (
        "<tr><th>system</th><th>domain</th><th>what</th><th>users</th><th>tokens</th>"
        "<th>seconds</th><th>users/s</th><th>peak MB</th><th>top proved</th></tr>"
    )
    rows = []
    for row in findings.costs:
        users, seconds = row.get("num_users"), row.get("seconds")
        rate = f"{users / seconds:.1f}" if users and seconds else ""
        cells = [
            html.escape(str(row.get("domain") or "")),
            html.escape(str(row.get("what", ""))),
            _count(users),
            _count(row.get("num_tokens")),
            _number(seconds, ".1f"),
            rate,
            _number(row.get("peak_memory_mb"), ",.0f"),
            _number(row.get("proved"), ".0%"),
        ]
        rows.append((str(row.get("system", "")), cells))
    note = (
        "Seconds of one process. Lower layers that several systems share are run once, and their "
        "time is divided among the systems; memory is the most main memory that the process ever "
        "held."
    )
    return (
        '<h2 id="costs">Costs</h2><details class="card"><summary>tokens, seconds, memory</summary>'
        f'<p class="soft">{note}</p>{table(head, rows)}</details>'
    )


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def cocktails(findings: Findings) -> str:
    if not findings.mixtures:
        return ""
    cards = []
    for domain, cocktail in findings.mixtures.items():
        cards += [
            f'<div class="card"><h3>Weight of {adapter_name(adapter)} on '
            f"<code>{html.escape(domain)}</code></h3>{weight_map(cocktail.mixture, adapter)}</div>"
            for adapter in cocktail.mixture.added
        ]
    return f'<h2 id="cocktails">How the cocktails mix</h2><div class="grid">{"".join(cards)}</div>'


def weight_map(mixture: Mixture, adapter: str) -> str:
    """The weights of one adapter by layer and projection, with a legend."""
    drawn = charts.heat_map(mixture.of(adapter), mixture.columns(), centre=mixture.uniform)
    return (
        f"<figure>{drawn}<figcaption>Layers from the input down, by projection; mean "
        f"{mixture.mean(adapter):.3f}, the equal mix has {mixture.uniform:.3f}. Point at a cell, "
        "or tap it, for its value.</figcaption></figure>"
    )


def adapter_name(name: str) -> str:
    """An adapter of a mix in a heading, as HTML; all but two bear the name of their domain."""
    if name in ("spirit", "ingredient"):
        return f"the {name}"
    return f"<code>{html.escape(name)}</code>"


def training(findings: Findings) -> str:
    """Loss and entropy curves side by side."""
    entropies = {
        domain: cocktail.mixture.curves.get("entropy", [])
        for domain, cocktail in findings.mixtures.items()
    }
    curves = (
        (
            "Training loss",
            charts.lines(findings.losses, x_label="step", y_label="loss (nats per title)"),
            "Base spirit and ingredients, on their own domains' titles.",
        ),
        (
            "Entropy while the weights are learned",
            charts.lines(entropies, x_label="step", y_label="entropy (nats)"),
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
    return (
        f'<h2 id="training">Training and merging</h2><div class="grid">{"".join(cards)}</div>'
        if cards
        else ""
    )


def data(findings: Findings) -> str:
    if not findings.data:
        return ""
    columns = [(k, n) for k, n in COUNTS if any(k in one for one in findings.data.values())]
    head = "<tr><th>domain</th><th>role</th>" + "".join(f"<th>{n}</th>" for _, n in columns)
    rows = []
    for domain, counts in findings.data.items():
        roles = findings.experiment.data
        role = "spirit" if domain in roles.spirit else "guest"
        role = "ingredient" if domain in roles.ingredients else role
        cells = [role, *(_count(counts.get(key)) for key, _ in columns)]
        rows.append((domain, cells))
    return (
        f'<h2 id="data">Data</h2><div class="card">{table(head + "</tr>", rows)}'
        f"{_dropped(findings)}</div>"
    )


def _dropped(findings: Findings) -> str:
    """What every step of the cleaning counted, which are too many for a table's columns."""
    shown = {key for key, _ in COUNTS}
    items = []
    for domain, counts in findings.data.items():
        words = ", ".join(
            f"{key.replace('_', ' ')} {value:,}"
            for key, value in counts.items()
            if isinstance(value, int) and key not in shown
        )
        if words:
            items.append(f"<li><code>{html.escape(domain)}</code>: {html.escape(words)}</li>")
    if not items:
        return ""
    return (
        "<details><summary>every count of the preparation</summary>"
        f"<ul>{''.join(items)}</ul></details>"
    )


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def reproduce(findings: Findings) -> str:
    """The command, and the experiment it runs."""
    return (
        '<h2 id="again">Run it again</h2><div class="card">'
        f"<pre>{html.escape(findings.command)}</pre>"
        "<details><summary>the resolved experiment file</summary>"
        f"<pre>{html.escape(dump(findings.experiment))}</pre></details></div>"
    )
