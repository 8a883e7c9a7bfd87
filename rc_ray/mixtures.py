"""What the merge of one domain left beside its cocktail, read and checked.

Letters: K adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rc_ray.artifacts import MANIFEST, read_json
from rc_ray.curves import Curve, read_curve
from rc_ray.errors import ArtifactError
from rc_ray.guard import Verdict, read_guard

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Columns of the weight map, in the order in which a layer computes."""
CURVES = ("entropy", "objective", "mean_prediction_entropy", "num_reliable")
"""What may be recorded at every step of learning the weights."""

Place = tuple[int, str]
"""A decoder layer and a projection."""


@dataclass(frozen=True)
class Mixture:
    """The learned weights of one domain and how they came about."""

    adapters: tuple[str, ...]
    """K names, the spirit first."""
    weights: Mapping[Place, tuple[float, ...]]
    """(K,) by place."""
    curves: Mapping[str, Curve]
    """Those of `CURVES` that were recorded: (step, value)."""

    @property
    def uniform(self) -> float:
        """The weight of every adapter in the equal mix."""
        return 1.0 / len(self.adapters)

    @property
    def added(self) -> tuple[str, ...]:
        """The adapters beyond the first."""
        return self.adapters[1:]

    def columns(self) -> list[str]:
        """Projections that occur, known ones first."""
        found = {projection for _, projection in self.weights}
        known = [name for name in PROJECTIONS if name in found]
        return known + sorted(found - set(known))

    def of(self, adapter: str) -> dict[Place, float]:
        """The weights of one adapter."""
        k = self.adapters.index(adapter)
        return {place: row[k] for place, row in self.weights.items()}

    def mean(self, adapter: str) -> float:
        """Over all places; the equal mix's weight where there are none."""
        values = self.of(adapter).values()
        return fmean(values) if values else self.uniform

    def by_layer(self, adapter: str) -> dict[str, float]:
        """Mean weight of each layer, from the input up."""
        means = self._means(adapter, lambda place: place[0])
        return {f"layer {layer}": means[layer] for layer in sorted(means)}

    def by_projection(self, adapter: str) -> dict[str, float]:
        """Mean weight of each projection."""
        means = self._means(adapter, lambda place: place[1])
        return {name: means[name] for name in self.columns()}

    def _means(self, adapter: str, key: Callable[[Place], Any]) -> dict[Any, float]:
        groups: dict[Any, list[float]] = {}
        for place, value in self.of(adapter).items():
            groups.setdefault(key(place), []).append(value)
        return {name: fmean(values) for name, values in groups.items()}


@dataclass(frozen=True)
class Cocktail:
    """All that can be told of a finished cocktail without the LLM."""

    mixture: Mixture
    guard: Verdict | None
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the merge."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the merge measured."""


def read_cocktail(folder: Path) -> Cocktail:
    """Read a finished cocktail's folder.

    Raises:
        ArtifactError: a file is missing, damaged or of another form.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise _of_another_form(folder / MANIFEST)
    return Cocktail(
        mixture=read_mixture(folder),
        guard=read_guard(folder),
        config=(manifest.get("config") or {}).get("merge") or {},
        about=manifest.get("metrics") or {},
    )


def read_mixture(folder: Path) -> Mixture:
    """Read `weights.json` and `entropy.jsonl`; linears that share a place count by their mean.

    Raises:
        ArtifactError: a file is missing, damaged or of another form.
    """
    path = folder / "weights.json"
    try:
        raw = read_json(path)
    except ArtifactError:
        raise ArtifactError(f"{path}: missing or damaged; run `rc-ray merge --force`") from None
    rows: dict[Place, list[list[float]]] = {}
    try:
        adapters = tuple(str(name) for name in raw["adapters"])
        for module, weights in zip(raw["modules"], raw["weights"], strict=True):
            row = [float(weight) for weight in weights]
            if len(row) != len(adapters) or not all(map(math.isfinite, row)):
                raise ValueError
            rows.setdefault(_place(module), []).append(row)
        if not adapters:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _of_another_form(path) from None
    curves = {name: read_curve(folder / "entropy.jsonl", name) for name in CURVES}
    return Mixture(
        adapters=adapters,
        weights={
            place: tuple(fmean(column) for column in zip(*found, strict=True))
            for place, found in rows.items()
        },
        curves={name: curve for name, curve in curves.items() if curve},
    )


def _place(module: str) -> Place:
    """Layer and projection of a linear's name, e.g. `model.layers.3.mlp.up_proj` -> (3, `up`)."""
    number = re.search(r"\.(\d+)\.", module)
    return (int(number.group(1)) if number else 0), module.rpartition(".")[2].removesuffix("_proj")


def _of_another_form(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path}: is not in the form that `rc-ray merge` writes; run it with --force"
    )
