"""The page on one cocktail: the guard, the curves, the weights, and sample users' rankings."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from rc_ray import __version__, charts
from rc_ray.config import Experiment
from rc_ray.curves import Curve
from rc_ray.mixtures import Cocktail, Mixture
from rc_ray.page_parts import adapter_name, document, prose, table, weight_map

if TYPE_CHECKING:
    from rc_ray.sample_users import RankedTitle, SampleOrder, SampleUser, ShownSystem

NUM_HISTORY = 8
"""Titles of a history that are shown, the latest ones."""
_CURVES = {
    "entropy": (
        "Entropy",
        "entropy (nats)",
        "Mean entropy of the predictions on a batch of prompts.",
    ),
    "objective": ("Objective", "objective", "What the weights were learned by: lower is better."),
    "mean_prediction_entropy": (
        "Entropy of the mean prediction",
        "entropy (nats)",
        "Over all prompts of a batch together. It falls where everybody is told the same.",
    ),
    "num_reliable": (
        "Prompts that counted",
        "prompts",
        "Those of a batch whose entropy was low enough to learn from.",
    ),
}
_SETTINGS = (
    "objective",
    "over",
    "score",
    "granularity",
    "parametrisation",
    "prompts_of",
    "num_epochs",
    "learning_rate",
)
"""Settings of the merge that are shown, as far as the manifest has them."""
_METRICS = ("num_prompts", "num_steps", "seconds")


def render(
    experiment: Experiment,
    domain: str,
    cocktail: Cocktail,
    order: SampleOrder,
    users: list[SampleUser],
) -> str:
    """The whole page; everything that comes from data or settings is escaped.

    Args:
        experiment: the whole experiment.
        domain: whose cocktail.
        cocktail: what the merge left.
        order: which systems ranked for the users, and how they were calibrated.
        users: the sample's rankings; none where the domain has no validation users.
    """
    title = f"{experiment.name}: the cocktail of {domain}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{_summary(experiment, cocktail)}</p>',
        _guard(cocktail),
        _curves(cocktail),
        _weights(cocktail),
        _users(order, users, cocktail),
    ]
    return document(title, "".join(body))


def _summary(experiment: Experiment, cocktail: Cocktail) -> str:
    parts = [
        f"Base LLM {experiment.model.path}",
        f"adapters {', '.join(cocktail.mixture.adapters)}",
    ]
    parts.append(f"seed {experiment.seed}; rc_ray {__version__}.")
    return html.escape("; ".join(parts))


def _guard(cocktail: Cocktail) -> str:
    heading = '<h2 id="guard">What is served, and why</h2>'
    guard = cocktail.guard
    if guard is None:
        return (
            f'{heading}<div class="card"><p>No guard ran on this cocktail: it was not compared '
            "with its controls on validation clicks before it was kept. The tables of "
            "<code>rc-ray report</code> tell how it fares on test users.</p></div>"
        )
    head = (
        "<tr><th>system</th><th>NDCG</th><th>HR@1</th><th>p-value</th><th>entropy</th>"
        "<th>&alpha;</th><th>&gamma;</th><th>prior in trie</th></tr>"
    )
    rows = [
        (
            name,
            [
                f"{one['ndcg']:.3f}",
                f"{one['hr1']:.3f}",
                "" if one.get("p_value") is None else _p_value(one["p_value"]),
                f"{one['entropy']:.3f}" if "entropy" in one else "",
                f"{one['alpha']:g}",
                f"{one['gamma']:g}",
                "yes" if one["prior_in_trie"] else "no",
            ],
        )
        for name, one in guard.systems.items()
    ]
    warning = (
        ""
        if guard.collapse is None
        else f'<div class="card warning"><b>Entropy collapse.</b> {prose(guard.collapse)}</div>'
    )
    compared = (
        f'{table(head, rows)}<p class="soft">{guard.num_valid_users:,} validation users. '
        f"{html.escape(guard.calibrated)} The p-value is that of the paired difference from the "
        "cocktail in NDCG, before any correction; the entropy, in nats, is that of the likelihood "
        "over a user&#x27;s candidates, before any calibration.</p>"
    )
    return (
        f'{heading}{warning}<div class="card"><p><b>Served: {html.escape(guard.chosen)}.</b> '
        f"{prose(guard.why)}</p>{compared if rows else ''}</div>"
    )


def _p_value(value: float) -> str:
    return "&lt;0.001" if value < 0.001 else f"{value:.3f}"


def _curves(cocktail: Cocktail) -> str:
    cards = []
    for name, curve in _telling(cocktail).items():
        title, y_label, caption = _CURVES[name]
        drawn = charts.lines({name: curve}, x_label="step", y_label=y_label)
        note = caption + (_first_and_last(cocktail.about) if name == "entropy" else "")
        cards.append(
            f'<div class="card"><h3>{title}</h3><figure>{drawn}'
            f"<figcaption>{note}</figcaption></figure></div>"
        )
    cards.append(_settings(cocktail))
    heading = '<h2 id="curves">While the weights were learned</h2>'
    return f'{heading}<div class="grid">{"".join(cards)}</div>'


def _telling(cocktail: Cocktail) -> dict[str, Curve]:
    """The curves without those that repeat the entropy, or count prompts that nothing filters."""
    curves = cocktail.mixture.curves
    filters = cocktail.config.get("objective") == "anchored"
    return {
        name: curve
        for name, curve in curves.items()
        if not (name == "objective" and curve == curves.get("entropy"))
        and (name != "num_reliable" or filters)
    }


def _settings(cocktail: Cocktail) -> str:
    """How the weights were learned."""
    named = [(name, cocktail.config[name]) for name in _SETTINGS if name in cocktail.config]
    metrics = [(name, cocktail.about[name]) for name in _METRICS if name in cocktail.about]
    rows = [
        (name.replace("_", " "), [html.escape(_shown(value))]) for name, value in (*named, *metrics)
    ]
    if not rows:
        return ""
    return f'<div class="card"><h3>How they were learned</h3>{table("", rows)}</div>'


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_and_last(about: Any) -> str:
    """Batches differ, so two steps compare only where they hold the same prompts."""
    first, last = about.get("first_entropy"), about.get("last_entropy")
    if not isinstance(first, int | float) or not isinstance(last, int | float):
        return ""
    return (
        " Batches differ, so steps compare over whole epochs: "
        f"{first:.3f} in the first, {last:.3f} in the last."
    )


def _weights(cocktail: Cocktail) -> str:
    mixture = cocktail.mixture
    if not mixture.weights:
        return ""
    groups = "".join(_adapter(mixture, name) for name in mixture.added)
    return (
        f'<h2 id="weights">The weights</h2>{_means(mixture, cocktail.config)}{groups}'
        f"{_all_weights(mixture)}"
    )


def _means(mixture: Mixture, config: Any) -> str:
    head = "<tr><th>adapter</th><th>mean</th><th>lowest</th><th>highest</th></tr>"
    rows = []
    for name in mixture.adapters:
        values = mixture.of(name).values()
        cells = [f"{x:.3f}" for x in (mixture.mean(name), min(values), max(values))]
        rows.append((name, cells))
    sums = "They sum to 1 in every linear layer." if _is_softmax(config) else ""
    granularity = config.get("granularity")
    shared = (
        f" One weight was learned for each {html.escape(granularity)}, so cells repeat it."
        if isinstance(granularity, str) and granularity != "linear"
        else ""
    )
    return (
        f'<div class="card"><p>Weights by which the adapters are added. {sums} The equal mix '
        f"gives {mixture.uniform:.3f} to each; the colours show the distance from that."
        f"{shared}</p>{table(head, rows)}</div>"
    )


def _is_softmax(config: Any) -> bool:
    return bool(config.get("parametrisation", "softmax") == "softmax")


def _adapter(mixture: Mixture, name: str) -> str:
    """Heat map and means of one adapter."""
    charts_of = (
        ("by layer", mixture.by_layer(name)),
        ("by projection", mixture.by_projection(name)),
    )
    heading = f"<h3>Weight of {adapter_name(name)}</h3>"
    cards = [f'<div class="card">{heading}{weight_map(mixture, name)}</div>']
    drawn = "".join(
        f"<h3>Mean {words}</h3><figure>"
        f"{charts.bars(values, centre=mixture.uniform, what=f'mean weight {words}')}</figure>"
        for words, values in charts_of
    )
    cards.append(f'<div class="card">{drawn}</div>')
    return f'<div class="grid">{"".join(cards)}</div>'


def _all_weights(mixture: Mixture) -> str:
    """The heat maps as text."""
    columns = mixture.columns()
    layers = sorted({layer for layer, _ in mixture.weights})
    tables = []
    for name in mixture.added:
        values = mixture.of(name)
        rows = [
            (
                str(layer),
                [f"{values[layer, c]:.3f}" if (layer, c) in values else "" for c in columns],
            )
            for layer in layers
        ]
        names = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        tables.append(
            f"<h3>{adapter_name(name)}</h3>{table(f'<tr><th>layer</th>{names}</tr>', rows)}"
        )
    return (
        '<details class="card below"><summary>every weight as a table</summary>'
        f"{''.join(tables)}</details>"
    )


def _users(order: SampleOrder, users: list[SampleUser], cocktail: Cocktail) -> str:
    heading = '<h2 id="users">Sample users</h2>'
    if not users:
        return f'{heading}<div class="card"><p>The domain has no validation users.</p></div>'
    served = cocktail.guard.chosen if cocktail.guard is not None else None
    note = (
        f"{len(users)} validation users, drawn by the seed {order.seed}; no test click is shown or "
        "used. Their next item is a validation click. So few users show how the systems differ, "
        f"not which is better. A system reads the last {order.max_titles} titles of a history and "
        "ranks the user&#x27;s frozen candidates; a score compares within its own list only."
    )
    calibrations = "".join(f"<li>{_calibration(system)}</li>" for system in order.systems)
    cards = [_user(number, user, served) for number, user in enumerate(users, start=1)]
    return (
        f'{heading}<div class="card"><p>{note}</p><details><summary>how the scores are calibrated'
        f"</summary><ul>{calibrations}</ul></details></div>{''.join(cards)}"
    )


def _calibration(system: ShownSystem) -> str:
    chosen = system.calibration
    where = (
        "with the prior in the trie" if chosen.prior_in_trie else "without the prior in the trie"
    )
    who = f"chosen by {system.chosen_by}" if system.chosen_by else "as trained, nothing was chosen"
    return (
        f"<code>{html.escape(system.name)}</code>: &alpha; {chosen.alpha:g}, "
        f"&gamma; {chosen.gamma:g}, {where}; {html.escape(who)}"
    )


def _user(number: int, user: SampleUser, served: str | None) -> str:
    shown = user.history[-NUM_HISTORY:]
    num_earlier = len(user.history) - len(shown)
    earlier = f"{num_earlier} earlier, then " if num_earlier else ""
    history = "; ".join(html.escape(title) for title in shown) or "none"
    lists = []
    for name, ranking in user.rankings.items():
        tag = ' <span class="tag">served</span>' if name == served else ""
        lines = "".join(_line(line) for line in ranking.top)
        where = f"next item at rank {ranking.rank:g} of {user.num_candidates}"
        lists.append(
            f"<div><h4>{html.escape(name)}{tag}</h4><ol>{lines}</ol>"
            f'<p class="soft">{where}</p></div>'
        )
    return (
        f'<div class="card"><h3>User {number}</h3><p class="history"><b>History:</b> {earlier}'
        f"{history}<br><b>Next:</b> {html.escape(user.next_title)}</p>"
        f'<div class="lists">{"".join(lists)}</div></div>'
    )


def _line(line: RankedTitle) -> str:
    mark = ' class="next"' if line.is_next else ""
    tag = ' <span class="tag">next item</span>' if line.is_next else ""
    return (
        f'<li{mark}>{html.escape(line.title)} <span class="score">{line.score:.2f}</span>{tag}</li>'
    )
