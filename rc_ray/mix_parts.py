"""Parts of the report about the merge: what the guards serve, and every mix side by side."""

from __future__ import annotations

import html
from typing import Any

from rc_ray.findings import Findings
from rc_ray.guard import ARTICLES
from rc_ray.merge_choice import sentence
from rc_ray.page_parts import prose, table
from rc_ray.verdicts import name_of

TRANSDUCTIVE = "scored users (transductive)"


def sentences(findings: Findings) -> list[str]:
    """By domain: what is served there and why, and which mixes saw the scored users' histories."""
    found = []
    for domain, mixture in findings.mixtures.items():
        if mixture.guard is not None:
            chosen = ARTICLES[mixture.guard.chosen]
            found.append(f"On `{domain}` the guard serves {chosen}. {mixture.guard.sentences}")
        if "search" in mixture.about:
            found.append(f"On `{domain}` the setting {sentence(mixture.about['search'])}")
        named = {"cocktail": mixture.about, **mixture.about.get("mixes", {})}
        seen = [name for name, about in named.items() if _is_transductive(about)]
        if seen:
            found.append(
                f"On `{domain}` the weights of {', '.join(map(name_of, seen))} were learned on the "
                "histories and "
                "candidates of scored users, without their clicks (transductive)."
            )
    return found


def guards(findings: Findings) -> str:
    """Cocktail and controls on validation users, by domain."""
    found = {d: m.guard for d, m in findings.mixtures.items() if m.guard is not None}
    if not found:
        return ""
    systems = [name for name in ARTICLES if any(name in one.systems for one in found.values())]
    head = "<tr><th>domain</th><th>served</th><th>users</th>" + "".join(
        f"<th>{name}<br>NDCG</th><th>HR@1</th>" + ("" if name == "cocktail" else "<th>p</th>")
        for name in systems
    )
    rows = []
    for domain, verdict in found.items():
        cells = [f"<b>{html.escape(verdict.chosen)}</b>", f"{verdict.num_valid_users:,}"]
        for name in systems:
            one = verdict.systems.get(name, {})
            cells += [_number(one.get("ndcg"), ".3f"), _number(one.get("hr1"), ".3f")]
            if name != "cocktail":
                cells.append(_number(one.get("p_value"), ".2g"))
        rows.append((domain, cells))
    items = "".join(f"<li>{prose(one)}</li>" for one in sentences(findings))
    calibrated = dict.fromkeys(one.calibrated for one in found.values() if one.calibrated)
    note = html.escape(
        " ".join(
            (
                "On validation users; no test click has a part in it.",
                *calibrated,
                "p: of the paired difference from the cocktail, not corrected.",
            )
        )
    )
    return (
        f'<h2 id="guard">What the guard serves</h2><div class="card">{table(head + "</tr>", rows)}'
        f'<ul>{items}</ul><p class="soft">{note}</p></div>'
    )


def mixes(findings: Findings) -> str:
    """How every mix was made; nothing where there is but the cocktail and the uniform one."""
    rows = []
    for domain, mixture in findings.mixtures.items():
        named: dict[str, Any] = {"cocktail": mixture.about, **mixture.about.get("mixes", {})}
        if set(named) <= {"cocktail", "uniform"} and not _is_transductive(mixture.about):
            continue
        for name, about in named.items():
            weights = ", ".join(
                f"{html.escape(adapter)} {weight:.2f}"
                for adapter, weight in about.get("mean_weights", {}).items()
            )
            entropies = [
                _number(about.get(key), ".3f") for key in ("first_entropy", "last_entropy")
            ]
            users = {"scored_users": TRANSDUCTIVE, "other_users": "other users"}
            rows.append(
                (
                    f"{domain}: {name}",
                    [
                        html.escape(str(about.get("objective") or about.get("method", ""))),
                        users.get(about.get("prompts_of", ""), "nobody"),
                        weights,
                        " to ".join(one for one in entropies if one),
                        str(about.get("rank", "")),
                        _number(about.get("max_relative_error"), ".2g"),
                        _number(about.get("seconds"), ".1f"),
                    ],
                )
            )
        for name, why in mixture.about.get("failed_mixes", {}).items():
            rows.append((f"{domain}: {name}", [f"failed: {html.escape(why)}", *[""] * 6]))
    if not rows:
        return ""
    head = (
        "<tr><th>mix</th><th>method</th><th>prompts of</th><th>mean weights</th><th>entropy</th>"
        "<th>rank</th><th>largest error by rank</th><th>seconds</th></tr>"
    )
    return (
        '<h2 id="mixes">Every mix</h2><details class="card" open><summary>methods, weights, '
        f"ranks</summary>{table(head, rows)}</details>"
    )


def _is_transductive(about: dict[str, Any]) -> bool:
    return about.get("prompts_of") == "scored_users"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
