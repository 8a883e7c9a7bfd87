"""A domain while its adapters are mixed: model, catalogue, adapters and validation users."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rc_ray.core.adapters import Adapter, load_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.merging import merge_fixed_measured
from rc_ray.core.model import LanguageModel
from rc_ray.core.predictions import CalibratedScore
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.engines import local_model_dir
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.guard import Judged
from rc_ray.guard_scores import judge
from rc_ray.merge_config import GuardConfig
from rc_ray.merge_prompts import (
    guard_cases,
    scored_cases,
    transductive_cases,
    unlabeled_prompts,
    valid_parts,
)
from rc_ray.mix_config import FixedMix, LearnedMix, MixConfig

_NUM_CHECK_PROMPTS = 4


class OpenDomain:
    """What all mixes of one domain share; each part is loaded once, when it is first asked for.

    Args:
        order: of the domain, see `merge_plan.make_order`.
        lm: the base LLM, where the process has it already.
    """

    def __init__(self, order: Mapping[str, Any], lm: LanguageModel | None = None) -> None:
        self.order = order
        self._lm = lm
        self.model_name: str = order["config"]["model"]["path"]
        self.with_prior: bool = order["config"]["with_prior"]
        self.evaluate = EvaluateConfig.model_validate(order["evaluate"])
        self.guard = GuardConfig.model_validate(order["guard"])

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """By name: spirit, ingredient, then other domains'."""
        return {
            name: load_adapter(Path(folder), self.model_name)
            for name, folder in self.order["adapters"].items()
        }

    @cached_property
    def domain(self) -> Domain:
        return read_domain(Path(self.order["domain_dir"]))

    @cached_property
    def lm(self) -> LanguageModel:
        if self._lm is not None:
            return self._lm
        device = "cuda" if self.order["use_gpu"] else "cpu"
        return load_language_model(
            local_model_dir(self.order["model_dir"], self.model_name),
            choose_dtype(self.order["config"]["model"]["dtype"], device),
            device,
        )

    def seed_of(self, config: MixConfig) -> int:
        """What a mix is made by: its own seed, or the experiment's."""
        return int(self.order["seed"] if config.seed is None else config.seed)

    def ranker(self, max_titles: int) -> Ranker:
        """Of the domain's catalogue; all of them share its trie."""
        made = copy.copy(self._ranker)
        made.max_titles = max_titles
        return made

    @cached_property
    def _ranker(self) -> Ranker:
        return Ranker(
            self.lm,
            self.domain.name,
            self.domain.titles,
            self.domain.num_train,
            PromptRenderer(self.lm.tokenizer, self.order["config"]["style"]),
            tokens_per_batch=self.order["tokens_per_batch"],
        )

    @cached_property
    def check_texts(self) -> list[list[int]]:
        """Prompts whose next token is compared after folding, as tokens."""
        found = unlabeled_prompts(self.domain, _NUM_CHECK_PROMPTS, self.order["seed"])
        ranker = self.ranker(self.evaluate.max_titles)
        return [
            ranker.renderer.prompt(ranker.domain, history[-ranker.max_titles :])
            for history in [prompt.history for prompt in found] or [()]
        ]

    @cached_property
    def valid_cases(self) -> list[RankingCase]:
        """Validation clicks that the guard compares systems on; of none who chose a setting."""
        num_users, seed = self.guard.num_valid_users, self.order["split_seed"]
        if self.order["is_chosen_by_clicks"]:
            return valid_parts(self.domain, num_users, seed, self.prompted, self.spared)[1]
        cases = self.domain.cases("valid", "warm")
        return guard_cases(cases, num_users, seed, self.prompted)

    @cached_property
    def prompted(self) -> frozenset[str]:
        """Users whose test histories, validation click included, taught the cocktail's weights."""
        config = LearnedMix.model_validate(self.order["mixes"]["cocktail"]["config"]["mix"])
        cases = transductive_cases(
            self.domain,
            config,
            self.seed_of(config),
            num_test_users=self.evaluate.num_test_users,
            split_seed=self.order["split_seed"],
        )
        return frozenset(case.user_id for case in cases)

    @cached_property
    def choosing_cases(self) -> list[RankingCase]:
        """Validation clicks that choose before the guard is asked."""
        num_users, seed = self.guard.num_valid_users, self.order["split_seed"]
        return valid_parts(self.domain, num_users, seed, spared=self.spared)[0]

    @cached_property
    def spared(self) -> frozenset[str]:
        """Users whose test histories, validation click included, may teach some setting's weights.

        All who are scored, so that trials of any setting and the guard know the same ones.
        """
        if not self.order["spares_scored_users"]:
            return frozenset()
        num_users, seed = self.evaluate.num_test_users, self.order["split_seed"]
        return frozenset(case.user_id for case in scored_cases(self.domain, num_users, seed))

    def judged(
        self, adapters: Mapping[str, Adapter], cases: Sequence[RankingCase] | None = None
    ) -> dict[str, Judged]:
        """Systems on validation users, the guard's if no others are given; empty for nobody."""
        return judge(
            self.ranker(self.evaluate.max_titles),
            adapters,
            self.valid_cases if cases is None else cases,
            self.domain.log_prior(),
            self.evaluate,
            with_prior=self.with_prior,
            negatives=self.order["negatives"],
        )

    def calibration(self, adapters: Sequence[Adapter]) -> tuple[CalibratedScore, bool]:
        """Settings of the score under equal weights, and whether the prior is in the trie."""
        equal = merge_fixed_measured(adapters, FixedMix(method="linear"), 0)[0]
        found = self.judged({"uniform": equal}, self.choosing_cases)
        if not found:
            return CalibratedScore(0.0, 0.0, self.domain.log_prior()), self.with_prior
        chosen = found["uniform"].calibration
        score = CalibratedScore(chosen.alpha, chosen.gamma, self.domain.log_prior())
        return score, chosen.prior_in_trie
