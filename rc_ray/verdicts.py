"""What a run showed, in sentences: every claim rests on a corrected test between paired users."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rc_ray.requests import CATALOGUE, MAIN
from rc_ray.results import LEVEL, Difference, Outcome, Results
from rc_ray.systems import BASELINES, SYSTEMS

HEADLINE = "HR@1"
NAMES = {
    "popularity": "popularity",
    "item_knn": "item kNN",
    "sasrec": "SASRec",
    "title_embedding": "the title embedding",
    "base": "the base LLM",
    "spirit": "the base spirit",
    "ingredient": "the ingredient",
    "joint": "the jointly trained LoRA",
    "random_spirit": "the mix with a random spirit",
    "uniform": "the uniform average",
    "cocktail": "the cocktail",
    "guarded": "what the guard serves",
}
"""Systems as sentences name them; mixes are called by their own names."""
MERGE_CONTROLS = ("ingredient", "uniform", "spirit", "joint", "random_spirit")
"""What a learned merge has to beat to be worth its while."""
SUBJECTS = {
    "warm": "",
    "cold": "and items absent from all training ",
    "cold_user": "and users absent from all training ",
    "few_shot": "and users with few items ",
}
"""How sentences name a split, after the domain."""
PROBES = {
    "shuffled_history": "With the history shuffled",
    "permuted_candidates": "With the candidates in another order",
    "popularity_negatives": "Against popular negatives",
    "masked_titles": "With made-up names for titles",
}


def name_of(system: str) -> str:
    """A system as a sentence names it."""
    return NAMES.get(system, f"the mix `{system}`")


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
    results: Results,
    domain: str,
    system: str,
    others: Sequence[str],
    *,
    split: str = "warm",
    candidates: str = MAIN,
    metric: str = HEADLINE,
) -> str | None:
    """One system against others on a metric, e.g. "On `x` the cocktail (...) beats ...".

    Returns None where the system was not scored or nothing was compared with it.
    """
    score = results.score(domain, split, system, metric, candidates)
    if score is None:
        return None
    groups: dict[Outcome, list[str]] = {"beats": [], "ties": [], "loses": []}
    for other in others:
        found = results.difference(domain, split, metric, system, other, candidates)
        if found is not None:
            text = f"{name_of(other)} ({_signed(found)})"
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
    subject = SUBJECTS[split] + name_of(system)
    if candidates == CATALOGUE:
        subject = f"and its whole catalogue of {score.num_candidates:,} items {subject}"
    value = f"{metric} {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
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


def beside_mixes(results: Results, domain: str, mixes: Sequence[str]) -> str | None:
    """The cocktail against the mixes of the file, by name alone: there may be a dozen of them."""
    groups: dict[Outcome, list[str]] = {"beats": [], "loses": [], "ties": []}
    for mix in mixes:
        found = results.difference(domain, "warm", HEADLINE, "cocktail", mix)
        if found is not None:
            groups[found.outcome].append(f"`{mix}`")
    verbs = {"beats": "beats", "loses": "loses to", "ties": "shows no difference from"}
    clauses = [
        f"{verbs[outcome]} the mix{'es' if len(names) > 1 else ''} {_listed(names)}"
        for outcome, names in groups.items()
        if names
    ]
    if not clauses:
        return None
    return f"On `{domain}` and {HEADLINE} the cocktail {'; it '.join(clauses)}."


def best_system(
    results: Results, domain: str, systems: Sequence[str], metric: str, candidates: str = MAIN
) -> str | None:
    """The system with the highest value on warm test users, whether or not that means anything."""
    found = {
        system: score.value
        for system in systems
        if (score := results.score(domain, "warm", system, metric, candidates)) is not None
    }
    return max(found, key=lambda system: found[system]) if found else None


def probe_sentences(results: Results, domain: str) -> list[str]:
    """What each probe did to one system: the cocktail, or what stands nearest to it."""
    found = []
    for probe, words in PROBES.items():
        asked = [
            system
            for system in results.systems(domain)
            if system != "guarded" and (domain, system, probe, HEADLINE) in results.probes
        ]
        if not asked:
            continue
        one = results.probes[domain, asked[-1], probe, HEADLINE]
        name = name_of(asked[-1])
        told = {"beats": "gains", "loses": "loses", "ties": "shows no difference"}
        verb = told[one.difference.outcome]
        found.append(f"{words} {name} {verb} on `{domain}` ({HEADLINE} {_signed(one.difference)}).")
    return found


def sentences(results: Results, domains: Sequence[str]) -> list[str]:
    """The findings on the ingredient domains, the most important first."""
    scored = [domain for domain in domains if domain in results.domains()]
    if not scored:
        return ["No ingredient domain was scored."]
    if set(results.systems()) <= set(BASELINES):
        return _of_baselines(results, scored)
    found: list[str | None] = [overall(results, scored)]
    others = ("popularity", "item_knn", "sasrec", "title_embedding", "base", "spirit")
    controls = (*others, "ingredient", "joint", "random_spirit", "uniform")
    for domain in scored:
        mixes = [one for one in results.systems(domain) if one not in SYSTEMS]
        found.append(standing(results, domain, "cocktail", controls))
        found.append(merge_verdict(results, domain))
        found.append(beside_mixes(results, domain, mixes))
        found.append(standing(results, domain, "ingredient", others))
        for split in ("cold", "cold_user", "few_shot"):
            found.append(standing(results, domain, "cocktail", controls[:-1], split=split))
        found.append(_of_catalogue(results, domain))
        found += probe_sentences(results, domain)
    return [sentence for sentence in found if sentence is not None]


def too_few_samples(results: Results, num_bootstrap: int) -> str | None:
    """Whether the bootstrap is too coarse for any pair of systems to differ after the correction.

    Of B samples the smallest p-value is 1 / (B + 1), and Holm multiplies it by the number of pairs.
    """
    # What a guard serves is one of the others under another name, and tested with them.
    named = [set(results.systems(one)) - {"guarded"} for one in results.domains()]
    num_systems = max(map(len, named), default=0)
    num_pairs = num_systems * (num_systems - 1) // 2
    if num_pairs / (num_bootstrap + 1) < LEVEL:
        return None
    return (
        f"{num_bootstrap:,} bootstrap samples are too few for {num_pairs} pairs of systems: no "
        f"corrected p-value can fall below .05. Set `evaluate.num_bootstrap` to at least "
        f"{math.ceil(num_pairs / LEVEL):,}."
    )


def in_short(results: Results, domains: Sequence[str]) -> list[str]:
    """Whether tuning paid and which merges won, without the figures."""
    scored = [domain for domain in domains if domain in results.domains()]
    if not scored or set(results.systems()) <= set(BASELINES):
        return sentences(results, domains)
    found: list[str | None] = [overall(results, scored)]
    found += [_against_baselines(results, domain) for domain in scored]
    found += [merge_verdict(results, domain) for domain in scored]
    return [sentence for sentence in found if sentence is not None]


def _against_baselines(results: Results, domain: str) -> str | None:
    """Whether the best LLM system beats the best baseline, without the figures."""
    own = [system for system in results.systems(domain) if system not in BASELINES]
    best = best_system(results, domain, own, HEADLINE)
    rival = best_system(results, domain, ("item_knn", "sasrec", "title_embedding"), HEADLINE)
    if best is None or rival is None:
        return None
    found = results.difference(domain, "warm", HEADLINE, best, rival)
    if found is None:
        return None
    verb = {"beats": "beats", "loses": "loses to", "ties": "shows no difference from"}
    return (
        f"On `{domain}` the best LLM system, {name_of(best)}, {verb[found.outcome]} the best "
        f"baseline that learns, {name_of(rival)}."
    )


def _of_catalogue(results: Results, domain: str) -> str | None:
    """The best LLM system on the whole catalogue against the baselines."""
    metric = results.deep_metric()
    own = [system for system in results.systems(domain) if system not in BASELINES]
    best = best_system(results, domain, own, metric, CATALOGUE)
    if best is None:
        return None
    return standing(results, domain, best, BASELINES, candidates=CATALOGUE, metric=metric)


def _of_baselines(results: Results, domains: Sequence[str]) -> list[str]:
    """The best of each domain against the others; nothing here was trained on many domains."""
    found: list[str | None] = []
    metric = results.deep_metric()
    for domain in domains:
        systems = results.systems(domain)
        for candidates in (MAIN, CATALOGUE):
            best = best_system(results, domain, systems, metric, candidates)
            others = [system for system in systems if system != best]
            if best is not None:
                found.append(
                    standing(results, domain, best, others, candidates=candidates, metric=metric)
                )
    told = [sentence for sentence in found if sentence is not None]
    return told or ["One system was scored, so nothing was compared."]


def _signed(difference: Difference) -> str:
    text = f"{difference.value:+z.3f} [{difference.low:+z.3f}, {difference.high:+z.3f}]"
    if difference.is_told_by_too_few:
        return f"{text}, too few users: {difference.num_users}"
    return text


def _quoted(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
