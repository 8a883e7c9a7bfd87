"""What a run showed, in sentences: every claim rests on a paired interval that excludes 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["beats", "ties", "loses"]

HEADLINE = "HR@1"
MIN_USERS = 20
"""With fewer no difference is called one."""
NAMES = {
    "popularity": "popularity",
    "base": "the base LLM",
    "spirit": "the base spirit",
    "ingredient": "the ingredient",
    "uniform": "the uniform average",
    "cocktail": "the cocktail",
}
"""Systems as sentences name them."""
MERGE_CONTROLS = ("ingredient", "uniform", "spirit")
"""What a learned merge has to beat to be worth its while."""


@dataclass(frozen=True)
class Score:
    """A metric of one system on one split, with its bootstrap interval over users."""

    value: float
    low: float
    high: float
    num_users: int
    num_candidates: int


@dataclass(frozen=True)
class Difference:
    """System a minus system b over the same users."""

    value: float
    low: float
    high: float
    num_users: int

    @property
    def is_told_by_too_few(self) -> bool:
        """Whether a bootstrap over so few users promises more than it can hold."""
        return self.num_users < MIN_USERS

    @property
    def outcome(self) -> Outcome:
        """`ties` when the interval holds 0, or users are too few: no difference was shown."""
        if self.is_told_by_too_few:
            return "ties"
        if self.low > 0:
            return "beats"
        return "loses" if self.high < 0 else "ties"

    def reversed(self) -> Difference:
        """System b minus system a."""
        return Difference(-self.value, -self.high, -self.low, self.num_users)


@dataclass(frozen=True)
class Results:
    """All scores and paired differences of one run."""

    scores: Mapping[tuple[str, str, str, str], Score]
    """By (domain, split, system, metric); raw scores under `<system> (raw)`."""
    differences: Mapping[tuple[str, str, str, str, str], Difference]
    """By (domain, split, metric, system a, system b)."""

    def score(self, domain: str, split: str, system: str, metric: str) -> Score | None:
        """One score, or None where it was not measured."""
        return self.scores.get((domain, split, system, metric))

    def difference(self, domain: str, split: str, metric: str, a: str, b: str) -> Difference | None:
        """A minus b, whichever way round it was stored, or None where it was not measured."""
        found = self.differences.get((domain, split, metric, a, b))
        if found is not None:
            return found
        found = self.differences.get((domain, split, metric, b, a))
        return found.reversed() if found is not None else None

    def domains(self) -> list[str]:
        """Scored domains in order of first appearance."""
        return list(dict.fromkeys(key[0] for key in self.scores))


def overall(results: Results, domains: Sequence[str]) -> str:
    """Whether domain tuning paid: on how many domains a tuned system beats both plain ones."""
    won = [domain for domain in domains if _tuned_beats_plain(results, domain)]
    claim = "the ingredient or the cocktail beats popularity and the base LLM on HR@1"
    if won and len(won) == len(domains):
        where = "both ingredient domains" if len(won) == 2 else f"all {len(won)} ingredient domains"
        where = f"`{won[0]}`, the one ingredient domain" if len(won) == 1 else where
        return f"On {where} {claim}."
    missed = [domain for domain in domains if domain not in won]
    if won:
        return f"On {_listed(_quoted(won))} {claim}; on {_listed(_quoted(missed))} not."
    return f"On no ingredient domain was it shown that {claim}."


def _tuned_beats_plain(results: Results, domain: str) -> bool:
    for system in ("ingredient", "cocktail"):
        found = [
            results.difference(domain, "warm", HEADLINE, system, plain)
            for plain in ("popularity", "base")
        ]
        if all(one is not None and one.outcome == "beats" for one in found):
            return True
    return False


def standing(
    results: Results, domain: str, system: str, others: Sequence[str], *, split: str = "warm"
) -> str | None:
    """One system against others on the headline metric, e.g. "On `x` the cocktail (...) beats ...".

    Returns None where the system was not scored or nothing was compared with it.
    """
    score = results.score(domain, split, system, HEADLINE)
    if score is None:
        return None
    groups: dict[Outcome, list[str]] = {"beats": [], "ties": [], "loses": []}
    for other in others:
        found = results.difference(domain, split, HEADLINE, system, other)
        if found is not None:
            text = f"{NAMES.get(other, other)} ({_signed(found)})"
            groups[found.outcome].append(text)
    clauses = []
    if groups["beats"]:
        clauses.append(f"beats {_listed(groups['beats'])}")
    if groups["loses"]:
        clauses.append(f"loses to {_listed(groups['loses'])}")
    if groups["ties"]:
        clauses.append(f"shows no difference from {_listed(groups['ties'])}")
    if not clauses:
        return None
    subject = NAMES.get(system, system)
    if split == "cold":
        subject = f"and items absent from all training {subject}"
    value = f"HR@1 {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
    return f"On `{domain}` {subject} ({value}) {'; it '.join(clauses)}."


def merge_verdict(results: Results, domain: str) -> str | None:
    """Whether the learned merge won on a domain; None without a cocktail to judge."""
    found = {
        other: difference
        for other in MERGE_CONTROLS
        if (difference := results.difference(domain, "warm", HEADLINE, "cocktail", other))
    }
    if not found:
        return None
    lost = [NAMES[other] for other, one in found.items() if one.outcome == "loses"]
    won = [NAMES[other] for other, one in found.items() if one.outcome == "beats"]
    tied = [NAMES[other] for other, one in found.items() if one.outcome == "ties"]
    if lost:
        return f"The merge lost on `{domain}`: the cocktail ranks below {_listed(lost)}."
    if not tied:
        return f"The merge won on `{domain}`: the cocktail beats {_listed(won)}."
    if won:
        return (
            f"The merge won in part on `{domain}`: the cocktail beats {_listed(won)}, "
            f"but no gain over {_listed(tied)} is shown."
        )
    return f"The merge did not win on `{domain}`: no gain over {_listed(tied)} is shown."


def sentences(results: Results, domains: Sequence[str]) -> list[str]:
    """The findings on the ingredient domains, the most important first."""
    scored = [domain for domain in domains if domain in results.domains()]
    if not scored:
        return ["No ingredient domain was scored."]
    found: list[str | None] = [overall(results, scored)]
    for domain in scored:
        others = ("popularity", "base", "spirit", "ingredient", "uniform")
        found.append(standing(results, domain, "cocktail", others))
        found.append(merge_verdict(results, domain))
        found.append(standing(results, domain, "ingredient", ("popularity", "base", "spirit")))
        found.append(standing(results, domain, "cocktail", others[:4], split="cold"))
    return [sentence for sentence in found if sentence is not None]


def in_short(results: Results, domains: Sequence[str]) -> list[str]:
    """Whether tuning paid and which merges won, without the figures."""
    scored = [domain for domain in domains if domain in results.domains()]
    if not scored:
        return sentences(results, domains)
    found = [overall(results, scored), *(merge_verdict(results, domain) for domain in scored)]
    return [sentence for sentence in found if sentence is not None]


def _signed(difference: Difference) -> str:
    text = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    if difference.is_told_by_too_few:
        return f"{text}, too few users: {difference.num_users}"
    return text


def _quoted(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
