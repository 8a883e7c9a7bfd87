"""The guard of a cocktail: what it has to beat on validation clicks before it is served.

Validation users choose each system's calibration too, so all compared systems have the same
advantage of having been fitted to them. No test click has a part in it.

Letters: N validation users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rc_ray.artifacts import MANIFEST, read_json
from rc_ray.calibration_config import CalibrationConfig
from rc_ray.core.bootstrap import compare_systems
from rc_ray.errors import ArtifactError
from rc_ray.merge_config import GuardConfig
from rc_ray.results import LEVEL
from rc_ray.shards import Calibration

NUM_BOOTSTRAP = 2000
GUARD_FILE = "guard.json"
COCKTAIL = "cocktail"
CONTROLS = ("spirit", "ingredient", "uniform")
"""What a cocktail is compared with, where the domain has it."""
ARTICLES = {
    "cocktail": "the cocktail",
    "spirit": "the base spirit",
    "ingredient": "the ingredient",
    "uniform": "the uniform average",
}
CALIBRATED = {
    "clicks": "Each system is calibrated as these users' clicks on this domain choose.",
    "unlabeled": "Each system is calibrated as these users' lists on this domain choose, without "
    "their clicks.",
    "fixed": "All systems are calibrated as the experiment file fixes it.",
}
"""By `chosen_by`: how the compared scores came by alpha, gamma and the prior in the trie."""

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Judged:
    """One system on the validation users, under the calibration that was chosen for it."""

    ndcg: Floats
    """(N,)"""
    hr1: Floats
    """(N,)"""
    entropy: Floats
    """(N,) in nats, of the likelihood over the list, as the adapters learned it: no calibration,
    since that of another system may be another."""
    calibration: Calibration
    chosen_by: str
    """As in `CalibrationConfig`."""


def decide(
    judged: Mapping[str, Judged],
    config: GuardConfig,
    *,
    notes: Sequence[str] = (),
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int,
) -> dict[str, Any]:
    """What is served on a domain and why, in the form of `guard.json`.

    The fallback is the control with the highest NDCG, where that is ahead of the cocktail by more
    than the margin; of equal controls the first in `CONTROLS`.

    Args:
        judged: the cocktail and its controls on the same users; empty where there are none.
        config: the margin, and whether the guard is on.
        notes: sentences on what the comparison rests on, told behind the reason.
        num_bootstrap: samples of the paired comparison.
        seed: of the resampling.
    """
    if not config.enabled:
        return _unjudged("`merge.guard.enabled` is false, so the cocktail was compared to nothing.")
    if COCKTAIL not in judged:
        return _unjudged("There is no validation user, so the cocktail was compared to nothing.")
    num_users = len(judged[COCKTAIL].ndcg)
    means = {name: float(one.ndcg.mean()) for name, one in judged.items()}
    p_values = _p_values(judged, num_bootstrap, seed)
    own = means[COCKTAIL]
    controls = [name for name in CONTROLS if name in judged]
    best = max(controls, key=lambda name: means[name], default=None)
    if best is not None and means[best] - own > config.margin:
        chosen = best
        why = (
            f"{_sentence(ARTICLES[best])} is ahead of the cocktail by {means[best] - own:.3f} NDCG "
            f"on {num_users} validation users ({means[best]:.3f} against {own:.3f}, "
            f"p = {p_values[best]:.2g}), more than the margin of {config.margin:g}."
        )
    else:
        chosen = COCKTAIL
        told = ", ".join(f"{ARTICLES[name]} {means[name]:.3f}" for name in controls)
        why = (
            f"No control is ahead of the cocktail (NDCG {own:.3f}) by more than the margin of "
            f"{config.margin:g} on {num_users} validation users: {told}."
        )
    return {
        "chosen": chosen,
        "why": " ".join([why, *notes]),
        "num_valid_users": num_users,
        "systems": {
            name: {
                "ndcg": means[name],
                "hr1": float(one.hr1.mean()),
                "entropy": float(one.entropy.mean()),
                "alpha": one.calibration.alpha,
                "gamma": one.calibration.gamma,
                "prior_in_trie": one.calibration.prior_in_trie,
                "chosen_by": one.chosen_by,
                # Whatever `evaluate.calibration.scope` says: a merge sees one domain.
                "scope": "domain",
                "p_value": p_values.get(name),
            }
            for name, one in judged.items()
        },
        "collapse": _collapse(judged, p_values),
    }


def notes_on(num_prompted: int, calibration: CalibrationConfig) -> list[str]:
    """What a reader has to know of the users of a comparison and of its calibrations.

    Args:
        num_prompted: of the users, whose test histories were prompts of the cocktail.
        calibration: the experiment's.
    """
    found = []
    if num_prompted:
        found.append(
            f"The test histories of {num_prompted} of these users, which hold their validation "
            "clicks, were prompts of the cocktail (`merge.prompts_of: scored_users`): the domain "
            "has too few others."
        )
    if calibration.scope == "global" and calibration.fixed is None:
        found.append(
            "Each system was calibrated on this domain alone: the calibration for all domains of "
            "`evaluate.calibration.scope: global` is chosen by `rc-ray evaluate`, and served from "
            "then on."
        )
    return found


def _unjudged(why: str) -> dict[str, Any]:
    return {
        "chosen": COCKTAIL,
        "why": why,
        "num_valid_users": 0,
        "systems": {},
        "collapse": None,
    }


def _p_values(judged: Mapping[str, Judged], num_bootstrap: int, seed: int) -> dict[str, float]:
    """Of each control's paired difference to the cocktail, not corrected for their number.

    Resampling a few users who all lose never finds one who does not: a single user would be proof.
    No p-value is below the least of a paired sign test, `2 ** (1 - N)`.
    """
    if len(judged) < 2:
        return {}
    least = 2.0 ** (1 - len(judged[COCKTAIL].ndcg))
    found = compare_systems({"": {n: one.ndcg for n, one in judged.items()}}, num_bootstrap, seed)
    return {
        pair.b if pair.a == COCKTAIL else pair.a: max(pair.p_value, least)
        for pair in found[""].pairs
        if COCKTAIL in (pair.a, pair.b)
    }


def _collapse(judged: Mapping[str, Judged], p_values: Mapping[str, float]) -> str | None:
    """Whether learning made the mix surer and worse than the equal weights that it began with."""
    if "uniform" not in judged:
        return None
    equal, learned = judged["uniform"], judged[COCKTAIL]
    first, last = float(equal.entropy.mean()), float(learned.entropy.mean())
    before, after = float(equal.ndcg.mean()), float(learned.ndcg.mean())
    if last >= first or after >= before or p_values["uniform"] >= LEVEL:
        return None
    return (
        f"Confident and wrong: on these users learning the weights lowered the entropy from "
        f"{first:.3f} (equal weights) to {last:.3f} nats, and NDCG from {before:.3f} to "
        f"{after:.3f} (p = {p_values['uniform']:.2g})."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Verdict:
    """A `guard.json` read back."""

    chosen: str
    why: str
    num_valid_users: int
    systems: Mapping[str, Mapping[str, Any]]
    collapse: str | None

    @property
    def sentences(self) -> str:
        """Why it chose so, and the collapse if there was one."""
        return self.why if self.collapse is None else f"{self.why} {self.collapse}"

    @property
    def calibrated(self) -> str:
        """How the compared scores were calibrated; empty in a file of before that was told."""
        named = {str(one.get("chosen_by")) for one in self.systems.values()}
        return " ".join(CALIBRATED[name] for name in sorted(named) if name in CALIBRATED)


def read_guard(cocktail_dir: Path) -> Verdict | None:
    """What the guard of a domain's cocktail said; None where none ever looked at it.

    Raises:
        ArtifactError: the file is damaged, or is gone although the manifest tells of a guard.
    """
    path, manifest = cocktail_dir / GUARD_FILE, cocktail_dir / MANIFEST
    fix = "run `rc-ray merge --force`"
    if not path.exists():
        if manifest.exists() and (read_json(manifest).get("metrics") or {}).get("guard"):
            raise ArtifactError(f"{path}: missing, so nothing says what to serve; {fix}")
        return None
    try:
        raw = read_json(path)
        verdict = Verdict(
            chosen=str(raw["chosen"]),
            why=str(raw["why"]),
            num_valid_users=int(raw["num_valid_users"]),
            systems={name: _entry(one) for name, one in dict(raw["systems"]).items()},
            collapse=raw["collapse"],
        )
    except (ArtifactError, KeyError, TypeError, ValueError, AttributeError):
        verdict = None
    if verdict is None or verdict.chosen not in ARTICLES:
        raise ArtifactError(f"{path}: damaged; {fix}")
    return verdict


def _entry(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One system of the file, its numbers checked; an earlier version told no entropy."""
    names = ("ndcg", "hr1", "alpha", "gamma", *(["entropy"] if "entropy" in raw else []))
    numbers = {name: float(raw[name]) for name in names}
    return {**raw, **numbers, "prior_in_trie": bool(raw["prior_in_trie"])}
