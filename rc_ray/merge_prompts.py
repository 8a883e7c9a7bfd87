"""Whose histories guide a merge, and what is told of their next items."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from rc_ray.core.domains import Domain, RankingCase, sample
from rc_ray.core.predictions import UnlabeledPrompt
from rc_ray.core.pseudo_users import pseudo_users
from rc_ray.errors import UserError
from rc_ray.mix_config import LearnedMix, SearchedMix


def prompts_for(
    domain: Domain,
    config: LearnedMix | SearchedMix,
    seed: int,
    *,
    num_test_users: int | None,
    split_seed: int,
) -> list[UnlabeledPrompt]:
    """The prompts that a mix is learned on; their next items only where the objective is of clicks.

    `objective: distillation` gets users made up from titles that are not held out, and reads no log
    at all.

    Args:
        domain: prepared.
        config: how many, of whom, and for which objective.
        seed: of the sample.
        num_test_users: of the evaluation, which `prompts_of: scored_users` draws from.
        split_seed: with which the evaluation draws them.

    Raises:
        UserError: the domain has no user of the kind.
        ValueError: the catalogue has too few titles to make users up.
    """
    with_target = isinstance(config, SearchedMix) or config.objective == "clicks"
    if isinstance(config, LearnedMix):
        if config.objective == "distillation":
            warm = np.flatnonzero(~domain.cold).astype(np.int32)
            return pseudo_users(domain.titles, config.num_prompts, seed, items=warm)
        if config.prompts_of == "scored_users":
            scored = transductive_cases(
                domain, config, seed, num_test_users=num_test_users, split_seed=split_seed
            )
            if not scored:
                raise UserError("it has no warm test user, whom `prompts_of: scored_users` needs")
            return prompts_of(domain, scored)
    prompts = unlabeled_prompts(domain, config.num_prompts, seed, with_target=with_target)
    if not prompts:
        raise UserError("it has no users for unlabeled prompts; raise `data.unlabeled_fraction`")
    return prompts


def scored_cases(domain: Domain, num_test_users: int | None, seed: int) -> list[RankingCase]:
    """The warm test cases that an evaluation ranks."""
    return sample(domain.cases("test", "warm"), num_test_users, seed)


def transductive_cases(
    domain: Domain,
    config: LearnedMix | SearchedMix,
    seed: int,
    *,
    num_test_users: int | None,
    split_seed: int,
) -> list[RankingCase]:
    """The test cases whose histories are a mix's prompts; none but with `scored_users`.

    Arguments as in `prompts_for`.
    """
    if not isinstance(config, LearnedMix) or config.objective == "distillation":
        return []
    if config.prompts_of != "scored_users":
        return []
    return sample(scored_cases(domain, num_test_users, split_seed), config.num_prompts, seed)


def guard_cases(
    cases: Sequence[RankingCase], num_users: int, seed: int, prompted: Collection[str] = ()
) -> list[RankingCase]:
    """Validation clicks that systems, or settings of a search, are compared on.

    A test history holds the validation click, so who lent one to the learning of the weights is
    asked only where there are too few others.

    Args:
        cases: of whom may be asked.
        num_users: at most.
        seed: of the samples.
        prompted: ids of the users whose test histories were prompts.
    """
    lent = set(prompted)
    others = sample([case for case in cases if case.user_id not in lent], num_users, seed)
    rest = [case for case in cases if case.user_id in lent]
    return others + sample(rest, num_users - len(others), seed)


def valid_parts(
    domain: Domain,
    num_users: int,
    seed: int,
    prompted: Collection[str] = (),
    spared: Collection[str] = (),
) -> tuple[list[RankingCase], list[RankingCase]]:
    """Validation users in two parts that share nobody: those who choose, and some of the others.

    Who has chosen a setting makes it look better than it is, so the guard asks the others then.

    Args:
        domain: prepared.
        num_users: in each part at most; where there are fewer than twice as many, half of them
            choose.
        seed: of the samples.
        prompted: see `guard_cases`, of the second part.
        spared: ids of the users who choose only where there are too few others.
    """
    cases = domain.cases("valid", "warm")
    choosing = guard_cases(cases, min(num_users, -(-len(cases) // 2)), seed, spared)
    taken = {case.user_id for case in choosing}
    others = [case for case in cases if case.user_id not in taken]
    return choosing, guard_cases(others, num_users, seed, prompted)


def unlabeled_prompts(
    domain: Domain, num_prompts: int, seed: int, *, with_target: bool = False
) -> list[UnlabeledPrompt]:
    """Histories and candidate lists of users who are never scored, before their validation click.

    No click is told unless `with_target`; it is the validation click then.
    """
    cases = domain.cases("valid", "warm", "unlabeled")
    return prompts_of(domain, sample(cases, num_prompts, seed), with_target=with_target)


def prompts_of(
    domain: Domain, cases: Sequence[RankingCase], *, with_target: bool = False
) -> list[UnlabeledPrompt]:
    """Histories and candidate lists of some cases."""
    return [
        UnlabeledPrompt(
            tuple(domain.titles[item] for item in case.history),
            case.candidates,
            target=case.candidates.index(case.target) if with_target else None,
        )
        for case in cases
    ]
