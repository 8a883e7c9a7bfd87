"""Bootstrap over users: intervals of means, paired differences between systems, their correction.

Letters: N users, S systems, B bootstrap samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BLOCK = 8_000_000
"""Numbers drawn at a time: bounds the memory."""


@dataclass(frozen=True)
class Mean:
    """Mean over users with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """System a minus system b over the same users."""

    a: str
    b: str
    difference: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    """Holm's, over all pairs of the comparison."""


@dataclass(frozen=True)
class Comparison:
    """Several systems on the same users by one metric."""

    means: Mapping[str, Mean]
    pairs: tuple[Pair, ...]
    """Every unordered pair once, in the order of the systems."""


def compare_systems(
    values: Mapping[str, Mapping[str, npt.ArrayLike]],
    num_samples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Comparison]:
    """Means, their intervals and all paired differences, from one resampling of the users.

    Users are resampled, so what makes a user hard for all systems cancels in a difference. The
    p-value is two-sided, of the resampled differences shifted to zero:
    `(1 + #{|d* - d| >= |d|}) / (B + 1)` (Efron and Tibshirani 1993, chapter 16; for retrieval:
    Sakai, SIGIR 2006).

    Args:
        values: metric -> system -> (N,), the same users in the same order, N >= 1.
        num_samples: B.
        seed: makes the result repeatable.
        level: covered share of the percentile intervals (Efron and Tibshirani 1993, chapter 13).

    Returns:
        By metric; p-values are corrected over the pairs of one metric.

    Raises:
        ValueError: there are no users, or not the same number everywhere.
    """
    columns = {(metric, name): one for metric, row in values.items() for name, one in row.items()}
    table = _table(list(columns.values()))
    drawn = _resampled_means(table, num_samples, seed)  # (B, S of all metrics)
    place = {key: index for index, key in enumerate(columns)}
    return {
        metric: _comparison(
            list(row),
            table[:, [place[metric, name] for name in row]].mean(axis=0),
            drawn[:, [place[metric, name] for name in row]],
            level,
        )
        for metric, row in values.items()
    }


def _comparison(names: Sequence[str], means: Floats, drawn: Floats, level: float) -> Comparison:
    """From (S,) means and (B, S) resampled means."""
    found = {
        name: Mean(float(means[place]), *_ends(drawn[:, place], level))
        for place, name in enumerate(names)
    }
    rows = []
    for i, j in itertools.combinations(range(len(names)), 2):
        difference = float(means[i] - means[j])
        samples = drawn[:, i] - drawn[:, j]
        # Sums in another order differ in their last bits: a hair of slack keeps equal values equal.
        extreme = np.abs(samples - difference) >= abs(difference) - 1e-12
        p = float((1 + extreme.sum()) / (len(drawn) + 1))
        rows.append((names[i], names[j], difference, *_ends(samples, level), p))
    adjusted = holm([row[-1] for row in rows])
    return Comparison(
        found, tuple(Pair(*row, p_adjusted=p) for row, p in zip(rows, adjusted, strict=True))
    )


def bootstrap_interval(
    values: npt.ArrayLike, num_samples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over users; see `compare_systems`."""
    drawn = _resampled_means(_table([values]), num_samples, seed)
    return _ends(drawn[:, 0], level)


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, num_samples: int, seed: int, level: float = 0.95
) -> tuple[float, float, float, float]:
    """`(mean(a - b), low, high, p_value)` over the same users; see `compare_systems`."""
    (pair,) = compare_systems({"": {"a": a, "b": b}}, num_samples, seed, level)[""].pairs
    return pair.difference, pair.low, pair.high, pair.p_value


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values that hold the family-wise error rate (Holm 1979).

    `max over the j-th smallest with j <= i of min(1, (m - j + 1) p_(j))`, in the order given.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for step, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - step) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _table(values: Sequence[npt.ArrayLike]) -> Floats:
    """(N, S)."""
    columns = [np.asarray(one, dtype=np.float64) for one in values]
    for column in columns:
        if column.ndim != 1 or not len(column):
            raise ValueError(f"expected one value per user, got the shape {column.shape}")
        if len(column) != len(columns[0]):
            raise ValueError(f"{len(columns[0])} and {len(column)} users cannot be paired")
    return np.stack(columns, axis=1)


def _resampled_means(table: Floats, num_samples: int, seed: int) -> Floats:
    """(B, S) means over resampled users, the same users for every system."""
    return np.concatenate(list(_blocks(table, num_samples, seed)))


def _blocks(table: Floats, num_samples: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    num_users = len(table)
    size = max(1, _BLOCK // num_users)
    for start in range(0, num_samples, size):
        num = min(size, num_samples - start)
        drawn = generator.integers(0, num_users, (num, num_users))
        drawn += num_users * np.arange(num)[:, None]
        # How often each user was drawn: one matrix product then serves all systems.
        counts = np.bincount(drawn.ravel(), minlength=num * num_users).reshape(num, num_users)
        yield counts.astype(np.float64) @ table / num_users


def _ends(samples: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
