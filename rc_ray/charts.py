"""Small SVG charts for the report: plain strings, coloured by the page's CSS classes.

All are `WIDTH` units wide and scale with the page; text stays readable on a phone because the
drawing is as narrow as one. Labels are escaped here, so callers pass them as they are.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH = 420
LABEL_CHARACTER = 6.8
"""Width of a character of a row's label, with some to spare."""
NUM_SERIES_COLOURS = 7
"""The page's CSS defines `.s0` to `.s6`."""


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a value and its confidence interval."""

    label: str
    value: float
    low: float
    high: float
    highlight: bool = False


def intervals(rows: Sequence[Interval], *, reference: tuple[str, float] | None = None) -> str:
    """Dots with whiskers, one row each, on an axis that starts at 0.

    Args:
        rows: what to draw, top row first; at least one.
        reference: a name and a value for a dashed vertical line, e.g. chance.
    """
    longest = max(len(row.label) for row in rows)
    left, right, top, step = max(92, round(12 + LABEL_CHARACTER * longest)), 14, 8, 26
    highest = max([row.high for row in rows] + ([reference[1]] if reference else []))
    ticks = _ticks(0.0, max(highest, 1e-6), 4)
    height = top + step * len(rows) + 34

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * value / ticks[-1]

    parts = []
    bottom = top + step * len(rows)
    for tick in ticks:
        parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 14, _number(tick), anchor="middle"))
    if reference is not None:
        name, value = reference
        parts.append(_line(x(value), top, x(value), bottom, "reference"))
        parts.append(_text(x(value), bottom + 28, name, anchor="middle"))
    for index, row in enumerate(rows):
        y = top + step * (index + 0.5)
        kind = "strong" if row.highlight else "plain"
        parts.append(_text(left - 8, y + 4, row.label, anchor="end", kind=f"label {kind}"))
        parts.append(_line(x(max(row.low, 0.0)), y, x(row.high), y, f"whisker {kind}"))
        hint = f"{row.label}: {row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
        parts.append(
            f'<circle class="dot {kind}" cx="{x(row.value):.1f}" cy="{y:.1f}" r="5">'
            f"<title>{html.escape(hint)}</title></circle>"
        )
    return _svg(height, parts, "values with confidence intervals: " + _names(r.label for r in rows))


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str
) -> str:
    """One curve per series of (x, y) points, with a legend below; points that are not finite drop.

    Returns "" when no series has a finite point.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    left, right, top, plot = 46, 12, 26, 170
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 5), _ticks(min(ys), max(ys), 4)

    def px(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return left + (WIDTH - left - right) * share

    def py(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return top + plot * (1 - share)

    parts = [_text(left - 38, 12, y_label)]
    for tick in y_ticks:
        parts.append(_line(left, py(tick), WIDTH - right, py(tick), "grid"))
        parts.append(_text(left - 6, py(tick) + 4, _number(tick), anchor="end"))
    for tick in x_ticks:
        parts.append(_text(px(tick), top + plot + 16, _number(tick), anchor="middle"))
    parts.append(_text(WIDTH - right, top + plot + 32, x_label, anchor="end"))
    for index, (name, points) in enumerate(kept.items()):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        colour = f"s{index % NUM_SERIES_COLOURS}"
        parts.append(
            f'<polyline class="curve {colour}" points="{path}">'
            f"<title>{html.escape(name)}</title></polyline>"
        )
    legend, bottom = _legend(list(kept), left, top + plot + 50)
    return _svg(bottom, [*parts, *legend], f"{y_label} by {x_label}: {_names(kept)}")


def heat_map(
    values: Mapping[tuple[int, str], float], columns: Sequence[str], *, centre: float
) -> str:
    """Cells by row number and column name, coloured by their distance from `centre`.

    Two hues stand for above and below; the depth of colour is relative to the largest distance,
    which the legend names. Absent cells stay empty. A cell that is pointed at, tapped or focused
    shows its value below the legend, by the page's CSS.
    """
    rows = sorted({row for row, _ in values})
    left, top, legend_height = 34, 20, 60
    cell = (WIDTH - left - 8) / max(len(columns), 1)
    tall = 12 if len(rows) > 12 else 18
    reach = max((abs(value - centre) for value in values.values()), default=0.0)
    parts = []
    for index, name in enumerate(columns):
        parts.append(_text(left + cell * (index + 0.5), 13, name, anchor="middle"))
    bottom = top + tall * len(rows) + 14
    for position, row in enumerate(rows):
        y = top + tall * position
        if len(rows) <= 12 or row % 5 == 0:
            parts.append(_text(left - 6, y + tall - 3, str(row), anchor="end"))
        for index, name in enumerate(columns):
            value = values.get((row, name))
            if value is None:
                continue
            depth = abs(value - centre) / reach if reach else 0.0
            hint = f"layer {row}, {name}: {value:.3f}"
            # A tap may focus a cell; the Tab key would have to pass through all of them.
            parts.append(
                f'<g class="spot" tabindex="-1"><rect class="cell {_hue(value, centre)}" '
                f'x="{left + cell * index + 0.5:.1f}" y="{y + 0.5:.1f}" '
                f'width="{cell - 1:.1f}" height="{tall - 1}" fill-opacity="{depth:.2f}">'
                f"<title>{html.escape(hint)}</title></rect>"
                f"{_text(left, bottom + 40, hint, kind='tip')}</g>"
            )
    num_steps = 40
    strip = (WIDTH - left - 8) / (2 * num_steps + 1)
    for index in range(-num_steps, num_steps + 1):
        hue = "above" if index >= 0 else "below"
        parts.append(
            f'<rect class="strip {hue}" x="{left + strip * (index + num_steps):.2f}" y="{bottom}" '
            f'width="{strip + 0.2:.2f}" height="8" fill-opacity="{abs(index) / num_steps:.2f}"/>'
        )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = f"{centre + (2 * share - 1) * reach:.{_num_digits(reach)}f}"
        place = left + (WIDTH - left - 8) * share
        parts.append(_text(place, bottom + 22, label, anchor=anchor))
    height = top + tall * len(rows) + legend_height
    return _svg(height, parts, f"weights of {len(rows)} layers by {_names(columns)}")


def bars(values: Mapping[str, float], *, centre: float, what: str) -> str:
    """One bar per name, to the left or right of `centre`, in the two hues of `heat_map`.

    Args:
        values: name -> value, top row first.
        centre: where the bars begin.
        what: names the chart to a screen reader.
    """
    longest = max((len(name) for name in values), default=0)
    left, right, top = round(12 + LABEL_CHARACTER * longest), 46, 8
    tall = 15 if len(values) > 12 else 20
    low, high = min([centre, *values.values()]), max([centre, *values.values()])
    unit = (WIDTH - left - right) / max(high - low, 1e-9)
    middle, bottom = left + unit * (centre - low), top + tall * len(values)
    parts = [_text(middle, bottom + 15, f"{centre:.3g}", anchor="middle")]
    for position, (name, value) in enumerate(values.items()):
        y = top + tall * position
        start = left + unit * (min(value, centre) - low)
        parts.append(_text(left - 8, y + tall - 5, name, anchor="end"))
        parts.append(
            f'<rect class="bar {_hue(value, centre)}" x="{start:.1f}" y="{y + 2:.1f}" '
            f'width="{unit * abs(value - centre):.1f}" height="{tall - 4}">'
            f"<title>{html.escape(f'{name}: {value:.4f}')}</title></rect>"
        )
        parts.append(_text(WIDTH, y + tall - 5, f"{value:.3f}", anchor="end"))
    parts.append(_line(middle, top, middle, bottom, "reference"))
    return _svg(bottom + 22, parts, f"{what}: {_names(values)}")


def _hue(value: float, centre: float) -> str:
    return "above" if value >= centre else "below"


def _num_digits(reach: float) -> int:
    """Decimals at which the ends of a scale differ from its centre."""
    return 2 if reach >= 0.05 else 3 if reach >= 0.005 else 4


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers that cover [low, high], about `wanted` steps apart; at least two."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def _legend(names: Sequence[str], left: float, y: float) -> tuple[list[str], float]:
    """Coloured marks with names, wrapped to the width; and the height used up."""
    parts, x = [], left
    for index, name in enumerate(names):
        width = 22 + 6.6 * len(name)
        if x > left and x + width > WIDTH:
            x, y = left, y + 18
        colour = f"s{index % NUM_SERIES_COLOURS}"
        parts.append(f'<rect class="mark {colour}" x="{x}" y="{y - 9}" width="12" height="9"/>')
        parts.append(_text(x + 16, y, name))
        x += width
    return parts, y + 10


def _svg(height: float, parts: Iterable[str], description: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(description, quote=True)}">' + "".join(parts) + "</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
