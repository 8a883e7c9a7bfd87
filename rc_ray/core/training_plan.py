"""What a training step sees: examples from the histories of some domains, packed into batches.

The global batch at step n is a function of the seed and n alone, whatever the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from rc_ray.core.batches import Batch, Example, count_targets, pack
from rc_ray.core.domains import Domain
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trie import CatalogueTrie
from rc_ray.training_config import TrainingConfig


class _Pool:
    """The training histories of some domains, drawn without end in seeded epochs.

    Args:
        domains: prepared domains.
        seed: of the permutations.

    Raises:
        ValueError: no domain has a training history of two titles.
    """

    def __init__(self, domains: Sequence[Domain], seed: tuple[int, int]) -> None:
        self.histories = [
            (domain.name, history)
            for domain in domains
            for history in domain.train
            if len(history) > 1
        ]
        if not self.histories:
            names = ", ".join(domain.name for domain in domains)
            raise ValueError(f"no domain of {names} has a training history of two titles or more")
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def drawn(self, number: int) -> tuple[str, Sequence[int]]:
        """Domain and history of the draw with this number."""
        epoch, place = divmod(number, len(self.histories))
        if epoch not in self._epochs:
            rng = np.random.default_rng((*self._seed, epoch))
            # A batch may straddle two epochs, seldom more.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = rng.permutation(len(self.histories))
        return self.histories[int(self._epochs[epoch][place])]


class TrainingPlan:
    """The examples of every step, drawn from the training histories of some domains.

    Histories of all domains are pooled; each epoch is one seeded permutation of them. With
    `own_share`, the first domain and the others are two pools, drawn from in that proportion, each
    in epochs of its own: a small domain does not drown in large ones.

    Args:
        domains: prepared domains.
        renderer: of the style in `config`.
        config: style, batch size and length limits.
        seed: of permutations, crops and listed candidates.
        num_listed: candidates beside the target that an `instruct` prompt lists, as far as the
            domain has so many.
        own_share: of all examples, what the first domain gives; in (0, 1).

    Raises:
        ValueError: no domain has a training history of two titles; with `own_share`, either the
            first has none or all others have none.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        renderer: PromptRenderer,
        config: TrainingConfig,
        seed: int,
        *,
        num_listed: int,
        own_share: Fraction | None = None,
    ) -> None:
        self.config = config
        self.num_listed = num_listed
        self.renderer = renderer
        self.seed = seed
        self.domains = {domain.name: domain for domain in domains}
        self.title_tokens = {
            domain.name: [renderer.title(title) for title in domain.titles] for domain in domains
        }
        self.tries = {
            domain.name: CatalogueTrie(self.title_tokens[domain.name], domain.num_train)
            for domain in domains
        }
        self.shown = {
            name: [
                renderer.shown(title, self.tries[name].telling_depth(item))
                for item, title in enumerate(titles)
            ]
            for name, titles in self.title_tokens.items()
        }
        """By domain, the tokens of each title as a history shows it."""
        self.own_share = own_share
        if own_share is None:
            self._pools = [_Pool(domains, (seed, 0))]
        else:
            self._pools = [_Pool(domains[:1], (seed, 2)), _Pool(domains[1:], (seed, 3))]

    @property
    def num_histories(self) -> int:
        return sum(len(pool.histories) for pool in self._pools)

    def examples(self, step: int) -> list[Example]:
        """The global batch of a step."""
        size = self.config.batch_size
        found = []
        for slot in range(size):
            name, history = self._drawn(step * size + slot)
            rng = np.random.default_rng((self.seed, 1, step, slot))
            make = self._instruct if self.config.style == "instruct" else self._sequence
            found.append(make(name, history, rng))
        return found

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """One worker's share of a step: every `world_size`-th example by falling length.

        Cut in parts of `micro_batch_size` neighbours, the longest first; each part counts the
        targets of the whole global batch.
        """
        examples = sorted(self.examples(step), key=lambda example: -len(example.tokens))
        num_titles = count_targets(examples, self.tries)
        num_tokens = sum(
            len(self.title_tokens[example.catalogue][item])
            for example in examples
            for item, _ in example.titles
        )
        share = examples[rank::world_size]
        size = self.config.micro_batch_size or len(share)
        return [
            replace(
                pack(share[start : start + size], self.tries, self.title_tokens),
                num_global_titles=num_titles,
                num_global_tokens=num_tokens,
            )
            for start in range(0, len(share), size)
        ]

    def _drawn(self, number: int) -> tuple[str, Sequence[int]]:
        """Domain and history of the example with this number, counted from the first step on."""
        if self.own_share is None:
            return self._pools[0].drawn(number)
        # Spread evenly: of the first n examples, floor(n * share) are the first domain's.
        num_own = math.floor(number * self.own_share)
        if math.floor((number + 1) * self.own_share) > num_own:
            return self._pools[0].drawn(num_own)
        return self._pools[1].drawn(number - num_own)

    def _sequence(self, name: str, history: Sequence[int], rng: np.random.Generator) -> Example:
        start = int(rng.integers(max(0, len(history) - self.config.max_titles) + 1))
        return self.titles_example(name, history, start)

    def titles_example(self, name: str, history: Sequence[int], start: int) -> Example:
        """Up to `max_titles` titles from `start` on, each a target; the oldest go if too long."""
        end = start + self.config.max_titles
        header = self.renderer.header(name)
        budget = self.config.max_tokens - len(header)
        sizes = [len(self.shown[name][item]) for item in history[start:end]]
        while sum(sizes) > budget and sizes:
            start += 1
            sizes.pop(0)
        tokens, titles = list(header), []
        for item in history[start:end]:
            titles.append((item, len(tokens)))
            tokens.extend(self.shown[name][item])
        return Example(name, tuple(tokens), tuple(titles), earlier=tuple(history[:start]))

    def _instruct(self, name: str, history: Sequence[int], rng: np.random.Generator) -> Example:
        domain = self.domains[name]
        place = int(rng.integers(1, len(history)))
        target = history[place]
        seen = set(history)
        others = [item for item in range(len(domain.titles)) if item not in seen]
        is_kept_out = domain.cold | domain.held_out_elsewhere
        others = [item for item in others if not is_kept_out[item]]
        count = min(self.num_listed, len(others))
        listed = [int(i) for i in rng.choice(others, size=count, replace=False)] + [target]
        listed = [listed[int(i)] for i in rng.permutation(len(listed))]
        return self.answer_example(name, history[:place], target, listed)

    def answer_example(
        self, name: str, history: Sequence[int], target: int, listed: Sequence[int]
    ) -> Example:
        """The prompt that lists candidates, answered with the target's title."""
        domain = self.domains[name]
        shown = list(history[-self.config.max_titles :])
        answer = self.title_tokens[name][target]
        while True:
            tokens = self.renderer.prompt(
                name,
                [domain.titles[item] for item in shown],
                [domain.titles[item] for item in listed],
            )
            if len(tokens) + len(answer) <= self.config.max_tokens or not shown:
                break
            shown.pop(0)
        return Example(name, (*tokens, *answer), ((target, len(tokens)),), earlier=tuple(history))
