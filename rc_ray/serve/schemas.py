"""What goes over the wire: requests, responses and the one form of every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from rc_ray.errors import UserError

MAX_K = 1000
MAX_ENTRY_CHARACTERS = 500

Entry = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_ENTRY_CHARACTERS),
]


class RequestError(UserError):
    """A request that cannot be answered as it stands.

    Args:
        message: what to fix, in one line.
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class Message(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class RankRequest(Message):
    domain: Annotated[str, Field(min_length=1, max_length=64)]
    """One of `GET /v1/domains`."""
    history: list[Entry]
    """Item ids or titles, oldest first; an empty list is a new user."""
    candidates: list[Entry] | None = None
    """Item ids or titles to rank; left out: the whole catalogue without the history."""
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    """How many items to return."""


class RankedItem(Message):
    item_id: str
    title: str
    score: float
    """Higher is better; comparable within one response only."""
    rank: int
    """From 1."""


class RankResponse(Message):
    domain: str
    system: str
    items: list[RankedItem]
    """Best first; fewer than k where there are fewer candidates."""
    unknown_history: list[str]
    """Entries of the history that are not in the catalogue; they were read as free-text titles."""


class ItemExample(Message):
    item_id: str
    title: str


class DomainInfo(Message):
    name: str
    num_items: int
    system: str
    """What ranks: the cocktail, or what its guard chose instead."""
    guard: str | None
    """Why the guard of the merge chose it; null where no guard had a say."""
    alpha: float
    """Weight of log p(title | empty history), taken off."""
    gamma: float
    """Weight of the popularity prior."""
    prior_in_trie: bool
    """Whether the likelihood holds the prior at every branch of the trie."""
    calibrated: bool
    """Whether `evaluate` or the guard of the merge chose these three, or the experiment fixed them;
    else they are defaults."""
    chosen_by: str
    """`clicks` of validation users, their lists alone (`unlabeled`), `fixed`, or `default`."""
    scope: str
    """`domain`, or `global`: one setting for all domains."""
    calibration: str
    """Where these settings come from, and why from there, in words: those of `evaluate` are taken
    only where they were chosen for the adapter that is served."""
    prior_since: str | None
    """When the popularity was last counted from a newer log, in UTC; null: training clicks."""
    examples: list[ItemExample]
    """The most popular items."""


class DomainList(Message):
    domains: list[DomainInfo]


class Health(Message):
    status: str
    domains: list[str]


class ErrorBody(Message):
    error: str
    """What to fix."""


def explain(problem: Mapping[str, Any]) -> str:
    """One pydantic problem with a request in words; the input itself is never repeated."""
    where = [str(part) for part in problem["loc"] if part != "body"]
    if not where:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    field = "`" + ".".join(where) + "`"
    if problem["type"] == "extra_forbidden":
        return f"unknown field {field[:80]}; known: {', '.join(RankRequest.model_fields)}"
    if problem["type"] == "missing":
        return f"the field {field} is missing"
    return f"{field}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
