"""What a request means: entries resolved to items of a domain, and refused where they cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rc_ray.core.baselines import log_popularity
from rc_ray.prior import Prior
from rc_ray.serve.schemas import DomainInfo, ItemExample, RankRequest, RequestError

_NUM_EXAMPLES = 20
_NUM_NAMED = 3


@dataclass(frozen=True)
class Limits:
    """Bounds of one request.

    Args:
        max_history: longer histories are refused.
        max_candidates: longer candidate lists are refused, and larger catalogues without a list.
        max_titles: the last so many history entries count.
        max_title_characters: free-text titles are cut here, as the catalogue's own titles are.
    """

    max_history: int
    max_candidates: int
    max_titles: int
    max_title_characters: int


@dataclass(frozen=True)
class Query:
    """A request in the terms of a catalogue."""

    domain: str
    titles: tuple[str, ...]
    """History titles that count, oldest first."""
    candidates: tuple[int, ...] | None
    """Item indices without repeats; None is the whole catalogue."""
    excluded: frozenset[int]
    """Items that are not to be returned."""
    k: int
    unknown_history: tuple[str, ...]


class DomainCatalogue:
    """The items of one domain, found by id or by title.

    Args:
        name: of the domain.
        item_ids: one per item.
        titles: one per item; repeats are allowed.
        num_train: (I,) training clicks of each item.
        prior: clicks of a newer log that take their place; None where none was read.
    """

    def __init__(
        self,
        name: str,
        item_ids: Sequence[str],
        titles: Sequence[str],
        num_train: np.ndarray,
        prior: Prior | None = None,
    ) -> None:
        self.name = name
        self.item_ids = tuple(item_ids)
        self.titles = tuple(titles)
        self.num_train = np.asarray(num_train, dtype=np.int64)
        self.clicks = np.asarray(self.num_train if prior is None else prior.clicks, dtype=float)
        """(I,) the popularity that is served, not smoothed."""
        self.prior_since = None if prior is None else prior.since
        self.log_prior = log_popularity(self.clicks)
        self._by_id = {item_id: index for index, item_id in enumerate(self.item_ids)}
        self._by_title: dict[str, list[int]] = {}
        self._by_folded: dict[str, list[int]] = {}
        # The most popular bearer of a title comes first, so that a title means it.
        for index in self._by_popularity():
            self._by_title.setdefault(self.titles[index], []).append(index)
            self._by_folded.setdefault(_folded(self.titles[index]), []).append(index)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def describe(
        self,
        *,
        system: str,
        alpha: float,
        gamma: float,
        prior_in_trie: bool,
        calibrated: bool,
        guard: str | None = None,
        chosen_by: str = "default",
        scope: str = "domain",
        calibration: str = "",
    ) -> DomainInfo:
        """The domain as `GET /v1/domains` shows it."""
        return DomainInfo(
            name=self.name,
            num_items=self.num_items,
            system=system,
            guard=guard,
            alpha=alpha,
            gamma=gamma,
            prior_in_trie=prior_in_trie,
            calibrated=calibrated,
            chosen_by=chosen_by,
            scope=scope,
            calibration=calibration,
            prior_since=self.prior_since,
            examples=[
                ItemExample(item_id=self.item_ids[index], title=self.titles[index])
                for index in self._by_popularity()[:_NUM_EXAMPLES]
            ],
        )

    def find(self, entry: str) -> tuple[int, ...]:
        """Items that an entry means, the most popular first; none where it is unknown.

        An item id is taken before an equal title, an exact title before one that differs in
        capitals or spaces. A title that several items bear means all of them.
        """
        if entry in self._by_id:
            return (self._by_id[entry],)
        return tuple(self._by_title.get(entry) or self._by_folded.get(_folded(entry)) or ())

    def resolve(self, request: RankRequest, limits: Limits) -> Query:
        """Check a request against the catalogue.

        Raises:
            RequestError: a list is too long, no entry of a non-empty history is known, a candidate
                is unknown, or nothing is left to rank.
        """
        if len(request.history) > limits.max_history:
            raise RequestError(
                f"`history` has {len(request.history)} entries, the limit is "
                f"{limits.max_history}; send the latest ones"
            )
        candidates = self._candidates(request.candidates, limits)
        titles: list[str] = []
        unknown: list[str] = []
        seen: set[int] = set()
        for entry in request.history:
            found = self.find(entry)
            seen.update(found)
            if found:
                titles.append(self.titles[found[0]])
            else:
                unknown.append(entry)
                titles.append(entry[: limits.max_title_characters])
        if request.history and len(unknown) == len(request.history):
            raise RequestError(
                f"no entry of `history` is known in the domain {self.name}: {_named(unknown)}; "
                f"an entry is an item id or a title of the catalogue, such as {self._example()}, "
                "and an empty list is a new user"
            )
        excluded = frozenset(seen) if candidates is None else frozenset()
        if len(excluded) == self.num_items:
            raise RequestError(
                f"`history` holds the whole catalogue of {self.name}, so nothing is left to rank; "
                "name the `candidates`"
            )
        return Query(
            domain=self.name,
            titles=tuple(titles[-limits.max_titles :]),
            candidates=candidates,
            excluded=excluded,
            k=request.k,
            unknown_history=tuple(unknown),
        )

    def _candidates(self, entries: Sequence[str] | None, limits: Limits) -> tuple[int, ...] | None:
        if entries is None:
            if self.num_items > limits.max_candidates:
                raise RequestError(
                    f"the catalogue of {self.name} has {self.num_items} items, more than the "
                    f"{limits.max_candidates} that one request may rank; name the `candidates`"
                )
            return None
        if not entries:
            raise RequestError("`candidates` is empty; leave it out to rank the whole catalogue")
        if len(entries) > limits.max_candidates:
            raise RequestError(
                f"`candidates` has {len(entries)} entries, the limit is {limits.max_candidates}; "
                "send fewer"
            )
        found = {entry: self.find(entry) for entry in dict.fromkeys(entries)}
        unknown = [entry for entry, items in found.items() if not items]
        if unknown:
            raise RequestError(
                f"`candidates` has {len(unknown)} unknown in the domain {self.name}: "
                f"{_named(unknown)}; an entry is an item id or a title of the catalogue, such as "
                f"{self._example()}"
            )
        return tuple(dict.fromkeys(items[0] for items in found.values()))

    def _by_popularity(self) -> list[int]:
        return sorted(
            range(self.num_items), key=lambda index: (-self.log_prior[index], self.item_ids[index])
        )

    def _example(self) -> str:
        best = self._by_popularity()[0]
        return f"{_quoted(self.item_ids[best])} or {_quoted(self.titles[best])}"


def find_domain(catalogues: Mapping[str, DomainCatalogue], name: str) -> DomainCatalogue:
    """The catalogue of a domain.

    Raises:
        RequestError: (404) naming the domains that there are.
    """
    if name not in catalogues:
        raise RequestError(
            f"unknown domain {_quoted(name)}; served: {', '.join(sorted(catalogues))}", status=404
        )
    return catalogues[name]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _named(entries: Sequence[str]) -> str:
    more = len(entries) - _NUM_NAMED
    named = ", ".join(_quoted(entry) for entry in entries[:_NUM_NAMED])
    return f"{named} and {more} more" if more > 0 else named
