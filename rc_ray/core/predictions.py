"""What a mix predicts for prompts, and the way back: slopes of a loss by the adapters' weights.

A prediction is the trie likelihood of a prompt's options, or the calibrated score, normalised over
them. The options are the prompt's candidates, or all titles of the catalogue that can still come.

Letters: X prompts of a batch, O options of a prompt, I items, K adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rc_ray.core.objectives import Outcome
from rc_ray.core.ranking import WITH_PRIOR, Prepared, Ranker


@dataclass(frozen=True)
class UnlabeledPrompt:
    """A history and a candidate list; nobody has to say which candidate was chosen."""

    history: tuple[str, ...]
    candidates: tuple[int, ...]
    target: int | None = None
    """Position in `candidates` of the item that came next; read where clicks are the objective."""


@dataclass(frozen=True)
class CalibratedScore:
    """log p(title | history) - alpha log p(title | empty history) + gamma log prior(title)."""

    alpha: float
    gamma: float
    log_prior: np.ndarray
    """(I,) by item, in nats; a constant added to all changes nothing."""


@dataclass(frozen=True)
class Predictions:
    """Of the prompts of one batch, or of a part of it."""

    prompts: list[int]
    """Which prompts, in the order of the batch."""
    log_p: list[Tensor]
    """Per prompt (O,), in nats; sums to 1."""
    places: list[Tensor]
    """Per prompt (O,): position in its candidate list, or number of the title."""


@dataclass(frozen=True)
class _Part:
    """Requests that are run together."""

    prepared: Prepared
    requests: list[int]
    """Which of the batch's requests: a prompt each, the one after the last is the empty history."""


Loss = Callable[[Predictions], Outcome]


class PromptBatch:
    """Prompts of one step of the optimiser, packed once for all steps that see them.

    Args:
        ranker: of the domain.
        prompts: at least one.
        over_catalogue: the options are the catalogue's titles, else the candidates.
        with_prior: take the likelihood with the prior inside the trie.
        calibration: take the calibrated score; its empty-history term depends on the adapters too
            and is one more request, over the union of the prompts' options.
        micro_batch_size: prompts of a part; None, all. Over the catalogue a part is one forward
            pass at most, since one prompt may take several.
        shared_layers: decoder layers that no adapter changes.
    """

    def __init__(
        self,
        ranker: Ranker,
        prompts: Sequence[UnlabeledPrompt],
        *,
        over_catalogue: bool,
        with_prior: bool,
        calibration: CalibratedScore | None,
        micro_batch_size: int | None,
        shared_layers: int,
    ) -> None:
        self._ranker = ranker
        self._prompts = list(prompts)
        self._over_catalogue = over_catalogue
        self._row = WITH_PRIOR if with_prior else 0
        self._calibration = calibration
        self._micro_batch_size = micro_batch_size or len(prompts)
        self._shared_layers = shared_layers
        self._kept: list[_Part] | None = None
        everything = range(len(ranker.titles))
        self._listed: list[Sequence[int]] = [
            everything if over_catalogue else prompt.candidates for prompt in prompts
        ]
        self._titles = _one_item_per_title(ranker, calibration) if over_catalogue else []
        if over_catalogue:
            self.num_places = len(self._titles)
            self._union: list[int] = list(everything)
        else:
            self.num_places = max(len(prompt.candidates) for prompt in prompts)
            self._union = sorted({item for items in self._listed for item in items})
        place_of = {item: place for place, item in enumerate(self._union)}
        self._empty_places: list[Tensor] = []
        self._prior: list[Tensor] = []
        for x in range(0 if calibration is None else len(prompts)):
            items = list(self._items(x))
            places = torch.tensor([place_of[item] for item in items], dtype=torch.long)
            self._empty_places.append(places.to(ranker.lm.device))
            prior = torch.tensor(calibration.log_prior[items], dtype=torch.float32)  # type: ignore[union-attr]
            self._prior.append(prior.to(ranker.lm.device))

    def _items(self, prompt: int) -> Sequence[int]:
        """The item that stands for each option, those that cannot come included."""
        return self._titles if self._over_catalogue else self._prompts[prompt].candidates

    def _parts(self) -> list[_Part]:
        if self._kept is not None:
            return self._kept
        ranker, size = self._ranker, self._micro_batch_size
        lengths = [
            len(ranker.prompt_tokens(prompt.history, ())) for prompt in self._prompts
        ]  # prompts of like length share a part: less padding
        order = sorted(range(len(self._prompts)), key=lambda x: lengths[x])
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        histories: list[Sequence[str]] = [prompt.history for prompt in self._prompts]
        listed = list(self._listed)
        if self._calibration is not None:
            histories.append(())
            listed.append(self._union)
            if len(groups) == 1:
                groups[0] = [*groups[0], len(self._prompts)]
            else:
                groups.append([len(self._prompts)])
        parts = []
        for group in groups:
            prepared = ranker.prepare(
                [histories[request] for request in group],
                [listed[request] for request in group],
                shared_layers=self._shared_layers,
            )
            passes = [prepared]
            if self._over_catalogue:
                passes = [Prepared([one], prepared.num_candidates) for one in prepared.batches]
            parts += [_Part(one, group) for one in passes]
        if not self._over_catalogue:  # a catalogue's trees behind every prompt would fill memory
            self._kept = parts
        return parts

    def _likelihoods(self, parts: Sequence[_Part]) -> list[Tensor]:
        """Per request the log likelihoods of all it lists, the sum over parts that hold some."""
        num_requests = len(self._prompts) + (self._calibration is not None)
        found: list[Tensor | None] = [None] * num_requests
        for part in parts:
            for request, score in zip(
                part.requests, self._ranker.score(part.prepared), strict=True
            ):
                known, own = found[request], score[self._row]
                found[request] = own if known is None else known + own
        # A request that none of these parts holds is asked for by nobody.
        return [torch.empty(0) if scores is None else scores for scores in found]

    def _predictions(self, likelihoods: Sequence[Tensor], prompts: Sequence[int]) -> Predictions:
        log_p, places = [], []
        for x in prompts:
            scores = likelihoods[x]
            if self._over_catalogue:
                scores = scores[torch.tensor(self._titles, device=scores.device)]
            # What is no number stays, or a mix without a prediction would have no doubt.
            can_come = (scores.detach() != -torch.inf).nonzero().flatten()
            if self._calibration is not None:
                empty = likelihoods[-1][self._empty_places[x]]
                scores = scores - self._calibration.alpha * empty
                scores = scores + self._calibration.gamma * self._prior[x]
            log_p.append(torch.log_softmax(scores[can_come], dim=-1))
            places.append(can_come)
        return Predictions(list(prompts), log_p, places)

    def target_indices(self, found: Predictions) -> list[int]:
        """Where each prompt's next item stands in its prediction: the only use of labels.

        Raises:
            ValueError: it is not told, or cannot come since the history has it.
        """
        indices = []
        for x, places in zip(found.prompts, found.places, strict=True):
            prompt = self._prompts[x]
            if prompt.target is None:
                raise ValueError("clicks need prompts whose next item is known")
            place = prompt.target
            if self._over_catalogue:
                leaves = self._ranker.trie.leaf_of_item
                leaf = leaves[prompt.candidates[prompt.target]]
                place = [leaves[item] for item in self._titles].index(leaf)
            at = (places == place).nonzero().flatten().tolist()
            if not at:
                raise ValueError("a prompt's next item is in its history already")
            indices.append(int(at[0]))
        return indices

    @torch.no_grad()
    def predict(self) -> Predictions:
        """Predictions of all prompts under the adapters that are active now."""
        everything = range(len(self._prompts))
        return self._predictions(self._likelihoods(self._parts()), everything)

    def backward(self, loss: Loss, *, is_mean: bool) -> Outcome:
        """Add the slopes of a loss to the weights of the adapters that are active now.

        Where the batch has several parts, only the graph of one is held at a time. A loss that
        couples the prompts, or scores that span parts, takes a first pass without graphs, which
        gives the loss and its slopes by the likelihoods, and a second one that carries these
        further (gradient caching, arXiv 2101.06983).

        Args:
            loss: of the predictions of the batch.
            is_mean: the loss is a mean over prompts, so that parts can be run one by one.
        """
        parts = self._parts()
        everything = list(range(len(self._prompts)))
        if len(parts) == 1:
            with torch.enable_grad():
                outcome = loss(self._predictions(self._likelihoods(parts), everything))
                outcome.loss.backward()
            return outcome
        if is_mean and self._calibration is None and not self._over_catalogue:
            return self._backward_of_mean(parts, loss)
        with torch.no_grad():
            likelihoods = self._likelihoods(parts)
        for scores in likelihoods:
            scores.requires_grad_(True)
        with torch.enable_grad():
            outcome = loss(self._predictions(likelihoods, everything))
            outcome.loss.backward()
            for part in parts:
                again = [score[self._row] for score in self._ranker.score(part.prepared)]
                slopes = [likelihoods[request].grad for request in part.requests]
                kept = [place for place, one in enumerate(again) if one.requires_grad]
                torch.autograd.backward([again[n] for n in kept], [slopes[n] for n in kept])
        return outcome

    def _backward_of_mean(self, parts: Sequence[_Part], loss: Loss) -> Outcome:
        log_p: dict[int, Tensor] = {}
        places: dict[int, Tensor] = {}
        for part in parts:
            with torch.enable_grad():
                own = self._predictions(self._likelihoods([part]), part.requests)
                share = len(part.requests) / len(self._prompts)
                (loss(own).loss * share).backward()
            log_p.update(zip(own.prompts, [one.detach() for one in own.log_p], strict=True))
            places.update(zip(own.prompts, own.places, strict=True))
        order = sorted(log_p)
        return loss(Predictions(order, [log_p[x] for x in order], [places[x] for x in order]))


def _one_item_per_title(ranker: Ranker, calibration: CalibratedScore | None) -> list[int]:
    """For each distinct title the item that ranks first among those that bear it."""
    best: dict[int, int] = {}
    for item, leaf in enumerate(ranker.trie.leaf_of_item):
        known = best.setdefault(leaf, item)
        if calibration is not None and calibration.log_prior[item] > calibration.log_prior[known]:
            best[leaf] = item
    return sorted(best.values())
