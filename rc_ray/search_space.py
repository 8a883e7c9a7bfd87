"""What `search` of a section says, as points: grids in full, distributions drawn in advance.

A draw depends on the seed, the field and its number alone, so the same experiment plans the same
points on every start, and more samples keep those that were drawn before.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

Kind = Literal["uniform", "loguniform", "randint", "choice"]
KINDS: tuple[Kind, ...] = ("uniform", "loguniform", "randint", "choice")
_MAX_DRAWS = 1000
"""For one new point, in a space that may have no more of them."""


@dataclass(frozen=True)
class Distribution:
    """How the values of one field are drawn."""

    kind: Kind
    values: tuple[Any, ...]
    """Low and high, both included; of `choice`, everything there is to choose from."""

    def at(self, place: float) -> Any:
        """The value at `place` in [0, 1) of the distribution; fractions have 4 digits."""
        if self.kind == "choice":
            return self.values[int(place * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return low + int(place * (high - low + 1))
        if self.kind == "uniform":
            value = low + place * (high - low)
        else:
            value = low * (high / low) ** place
        return min(max(float(f"{value:.4g}"), low), high)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that have to be valid for every draw to be."""
        return self.values


@dataclass(frozen=True)
class SearchSpace:
    """Grids and distributions by field, in the order of the experiment file."""

    grids: dict[str, tuple[Any, ...]]
    distributions: dict[str, Distribution]

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The values of the fields that are drawn from a list."""
        return {
            field: one.values for field, one in self.distributions.items() if one.kind == "choice"
        }

    def points(self, num_samples: int, seed: int) -> list[dict[str, Any]]:
        """Each point of the grid with `num_samples` draws of the rest, no point twice.

        Raises:
            ValueError: the same value twice in a grid, or fewer different points than asked for.
        """
        points: list[dict[str, Any]] = []
        for values in itertools.product(*self.grids.values()):
            fixed = dict(zip(self.grids, values, strict=True))
            if not self.distributions:
                if fixed in points:
                    raise ValueError("`search` has the same point twice; give each value once")
                points.append(fixed)
                continue
            drawn: list[dict[str, Any]] = []
            for number in range(num_samples + _MAX_DRAWS):
                point = self.draw(seed, number)
                if point not in drawn:
                    drawn.append(point)
                if len(drawn) == num_samples:
                    break
            else:
                raise ValueError(
                    f"`num_samples` is {num_samples}, but `search` draws only {len(drawn)} "
                    "different points; lower it or widen the search"
                )
            if any({**fixed, **point} in points for point in drawn):
                raise ValueError("`search` has the same point twice; give each value once")
            points += [{**fixed, **point} for point in drawn]
        return points

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """Draw number `number` of every distribution."""
        return {
            field: one.at(random.Random(f"{seed} {field} {number}").random())
            for field, one in self.distributions.items()
        }


def read_space(search: Mapping[str, Any]) -> SearchSpace:
    """Read `search` of a section.

    Args:
        search: field -> a list of values, or a mapping of one distribution to its arguments.

    Raises:
        ValueError: names the field and what is wrong with it.
    """
    grids: dict[str, tuple[Any, ...]] = {}
    distributions: dict[str, Distribution] = {}
    for field, entry in search.items():
        if isinstance(entry, Mapping):
            distributions[field] = _read_distribution(field, entry)
        elif isinstance(entry, list | tuple):
            if not entry:
                raise ValueError(f"`search` gives no value for {field}; list at least one")
            grids[field] = tuple(entry)
        else:
            raise ValueError(
                f"`search` has {entry!r} for {field}; write a list of values, or one of {_forms()}"
            )
    return SearchSpace(grids, distributions)


def check_for_optuna(space: SearchSpace) -> None:
    """Refuse a space that Optuna cannot draw from here.

    Raises:
        ValueError: it has a grid or nothing to draw, or Optuna is not installed.
    """
    if not space.distributions:
        raise ValueError("`search_algorithm: optuna` needs a distribution in `search`")
    if space.grids:
        raise ValueError(
            f"`search_algorithm: optuna` draws every field; write {next(iter(space.grids))} "
            "as {choice: [...]}"
        )
    if find_spec("optuna") is None:
        raise ValueError(
            "`search_algorithm: optuna` needs the package optuna; run `pip install optuna`, "
            "or set `search_algorithm: random`"
        )


def _read_distribution(field: str, entry: Mapping[str, Any]) -> Distribution:
    if len(entry) != 1 or next(iter(entry)) not in KINDS:
        names = ", ".join(map(str, entry)) or "of no name"
        inner = f", or {field}.{next(iter(entry))} if that is the field's name" if entry else ""
        raise ValueError(
            f"`search` has the unknown distribution {names} for {field}; write one of {_forms()}"
            f"{inner}"
        )
    kind: Kind
    kind, values = next(iter(entry.items()))  # type: ignore[assignment]
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"`search`: `{kind}` of {field} takes a list, as in {_forms(kind)}")
    if kind == "choice":
        if any(values.index(value) != place for place, value in enumerate(values)):
            raise ValueError(f"`search`: `choice` of {field} has a value twice; give each once")
        return Distribution(kind, tuple(values))
    if len(values) != 2 or not all(_is_number(_number(v), kind == "randint") for v in values):
        what = "whole numbers" if kind == "randint" else "numbers"
        raise ValueError(
            f"`search`: `{kind}` of {field} takes two {what}, low and high, as in {_forms(kind)}"
        )
    low, high = map(_number, values)
    if not low < high:
        raise ValueError(f"`search`: `{kind}` of {field} runs from {low:g} to {high:g}; low first")
    if kind == "loguniform" and low <= 0:
        raise ValueError(
            f"`search`: `loguniform` of {field} starts at {low:g}; it needs a low above 0"
        )
    return Distribution(kind, (low, high))


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (isinstance(value, int) or not whole)


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text; a number all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _forms(kind: str | None = None) -> str:
    forms = {
        "uniform": "{uniform: [0.0, 0.1]}",
        "loguniform": "{loguniform: [1.0e-4, 1.0e-2]}",
        "randint": "{randint: [4, 32]}",
        "choice": "{choice: [4, 8, 16]}",
    }
    return forms[kind] if kind else ", ".join(forms.values())


def apply_point(
    fields: dict[str, Any], point: Mapping[str, Any], known: Callable[[], str]
) -> dict[str, Any]:
    """Put a point's values in a copy of the settings; dotted fields go into their section.

    Args:
        fields: settings, with their sections as dictionaries.
        point: field -> value.
        known: names the fields there are, for the error.

    Raises:
        ValueError: a field is unknown.
    """
    result = {
        name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()
    }
    for key, value in point.items():
        section, _, leaf = key.rpartition(".")
        target = result.get(section) if section else result
        if not isinstance(target, dict) or leaf not in target or isinstance(target[leaf], dict):
            raise ValueError(f"`search` names the unknown field {key}; known: {known()}")
        target[leaf] = value
    return result
