"""The data section of an experiment: sources, roles of the domains, cleaning and splits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    model_validator,
)

DomainName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
ListName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Negatives = Literal["uniform", "popularity", "category"]

MAIN_LIST = "main"
"""Name of the list of candidates that `negatives` and `num_negatives` describe."""
RESERVED_LISTS = (MAIN_LIST, "catalogue")


def _of_one_gpu(num_gpus: float) -> float:
    if num_gpus > 1:
        raise ValueError(
            f"{num_gpus:g} is too many: a process uses one GPU; set it to 1, or to a fraction that "
            "shares one"
        )
    return num_gpus


GpuShare = Annotated[NonNegativeFloat, AfterValidator(_of_one_gpu)]
"""GPUs that Ray gives a process which knows what to do with one."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def refuse_repeats(field: str, names: Sequence[str]) -> None:
    """Raise where a field lists a domain more than once.

    Raises:
        ValueError: names the field and the domains.
    """
    twice = list(dict.fromkeys(name for name in names if names.count(name) > 1))
    if twice:
        each = "each " if len(twice) > 1 else "it "
        raise ValueError(f"`{field}` names {', '.join(twice)} more than once; name {each}once")


class ColumnMap(Section):
    """Which column of a CSV file holds what; a null column is absent from the file."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str | None = "timestamp"
    """Unix seconds or any sortable number; without it the order of rows is the order of time."""
    rating: str | None = None
    title: str = "title"
    category: str | None = None


class ParquetSource(Section):
    """A folder with `interactions.parquet` and `items.parquet` in the project's own form.

    `interactions.parquet` may be a folder of part files; they are read in the order of their names.
    """

    format: Literal["parquet"]
    domain: DomainName
    path: Path


class CsvSource(Section):
    """Two CSV files with a column map."""

    format: Literal["csv"]
    domain: DomainName
    interactions: Path
    items: Path
    columns: ColumnMap = ColumnMap()
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","


class MovieLensSource(Section):
    """MovieLens-100K, one domain or split into domains by genre."""

    format: Literal["movielens-100k"]
    path: Path | None = None
    """Folder with `ml-100k.inter` and `ml-100k.item`; null takes the embedded copy."""
    domain: DomainName | None = None
    """Name of the single domain; null with `genre_domains`."""
    genre_domains: dict[DomainName, tuple[str, ...]] | None = None
    """Domain -> genres. A film goes to the first domain that names one of its genres."""

    @model_validator(mode="after")
    def _one_of(self) -> MovieLensSource:
        if (self.domain is None) == (self.genre_domains is None):
            raise ValueError("give either `domain` or `genre_domains`")
        return self


Source = Annotated[ParquetSource | CsvSource | MovieLensSource, Field(discriminator="format")]


def domain_names(source: Source) -> tuple[str, ...]:
    """The domains that a source defines, in the order of its section."""
    if isinstance(source, MovieLensSource) and source.genre_domains is not None:
        return tuple(source.genre_domains)
    assert source.domain is not None
    return (source.domain,)


def _log(source: Source) -> str:
    """Where a source's log lies, as its section writes it.

    Of CSV files the items' belong to it: one log of several domains may be told apart by them.
    """
    if isinstance(source, CsvSource):
        return f"{os.path.normpath(source.interactions)} with {os.path.normpath(source.items)}"
    return os.path.normpath(source.path) if source.path else "the embedded MovieLens-100K"


class CandidateList(Section):
    """How the negatives of one list of candidates are drawn."""

    negatives: Negatives = "uniform"
    """`uniform`; `popularity`: by (training interactions + 1) ** 0.75; `category`: out of the
    categories of the user's history, uniform where these are used up."""
    num_negatives: PositiveInt = 19


class DataConfig(Section):
    sources: tuple[Source, ...] = Field(min_length=1)
    spirit: tuple[DomainName, ...] = ()
    """Domains that feed the base spirit; none where no compared system needs one."""
    ingredients: tuple[DomainName, ...] = Field(min_length=1)
    """Domains that get an ingredient and a cocktail; the spirit does not see them."""
    guests: tuple[DomainName, ...] = ()
    """Domains that get a cocktail but no ingredient of their own: the spirit is mixed with the
    ingredients of all others. They are held out and tested like ingredient domains."""
    min_user_interactions: Annotated[int, Field(ge=3)] = 5
    """Users with fewer interactions in a domain are dropped from it."""
    min_item_interactions: Annotated[int, Field(ge=0)] = 0
    """Items with fewer users are dropped from the domain, its catalogue included; both minima are
    applied again and again until they hold together. 0 keeps items that nobody met."""
    max_users: PositiveInt | None = None
    """Seeded sample of users per domain; null keeps all."""
    max_title_characters: PositiveInt = 120
    split: Literal["leave-one-out", "time"] = "leave-one-out"
    """`leave-one-out`: a user's last item is the test target, the one before it the validation
    target. `time`: two moments cut the whole domain; nothing after the first one trains."""
    valid_from: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """Share of a domain's interactions before the validation period; `split: time` only."""
    test_from: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Share of a domain's interactions before the test period; `split: time` only."""
    cold_item_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.15
    """Share of an ingredient domain's items held out of all training for the cold split."""
    cold_user_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Share of an ingredient domain's users held out of all training for a split of their own."""
    few_shot_user_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Share of an ingredient domain's users of whom training sees `num_few_shot` items."""
    num_few_shot: PositiveInt = 3
    num_training_users: dict[DomainName, PositiveInt] = Field(default_factory=dict)
    """Ingredient domains of which training sees so many users alone, a seeded sample; the others
    are validated and tested on as before."""
    negatives: Negatives = "uniform"
    """How the negatives of the main list of candidates are drawn, see `more_candidates`."""
    num_negatives: PositiveInt = 19
    more_candidates: dict[ListName, CandidateList] = Field(default_factory=dict)
    """Further lists of candidates for the same cases, by name."""
    unlabeled_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of an ingredient domain's users whose prompts guide the merge, never scored."""

    @model_validator(mode="after")
    def _shares(self) -> DataConfig:
        if self.valid_from >= self.test_from:
            raise ValueError(
                f"`valid_from` ({self.valid_from}) must be less than `test_from` ({self.test_from})"
            )
        drawn = self.cold_user_fraction + self.few_shot_user_fraction + self.unlabeled_fraction
        if drawn >= 1.0:
            raise ValueError(
                "`cold_user_fraction`, `few_shot_user_fraction` and `unlabeled_fraction` add up to "
                f"{drawn:g}; no user is left to validate and test on"
            )
        reserved = sorted(set(self.more_candidates) & set(RESERVED_LISTS))
        if reserved:
            raise ValueError(
                f"`more_candidates` names a list `{reserved[0]}`; the names "
                f"{' and '.join(RESERVED_LISTS)} are taken"
            )
        return self

    @model_validator(mode="after")
    def _roles(self) -> DataConfig:
        roles = ("spirit", "ingredients", "guests")
        for role in roles:
            refuse_repeats(role, getattr(self, role))
        for one, other in itertools.combinations(roles, 2):
            both = sorted(set(getattr(self, one)) & set(getattr(self, other)))
            if both:
                raise ValueError(
                    f"{', '.join(both)} stands under both `{one}` and `{other}`; a domain has one "
                    "role, or adapters would see what they are tested on"
                )
        known = [name for source in self.sources for name in domain_names(source)]
        twice = sorted({name for name in known if known.count(name) > 1})
        if twice:
            raise ValueError(f"`sources` define the domain {', '.join(twice)} more than once")
        unknown = sorted(set(self.domains) - set(known))
        if unknown:
            raise ValueError(
                f"no source defines the domain {', '.join(unknown)}; defined: {', '.join(known)}"
            )
        strange = sorted(set(self.num_training_users) - set(self.ingredients))
        if strange:
            raise ValueError(
                f"`num_training_users` names {', '.join(strange)}, which `ingredients` does not"
            )
        return self

    @model_validator(mode="after")
    def _spirit_of_other_logs(self) -> DataConfig:
        self.refuse_tested_logs()
        return self

    def refuse_tested_logs(self) -> None:
        """Refuse a spirit domain of the same log as a tested domain of another source.

        Two ways to write a path are told to be one only once paths are absolute, see `config.load`.

        Raises:
            ValueError: names both domains and the log.
        """
        for one, other in itertools.permutations(self.sources, 2):
            if _log(one) != _log(other):
                continue
            feeding = [name for name in self.spirit if name in domain_names(one)]
            tested = [name for name in self.tested if name in domain_names(other)]
            if feeding and tested:
                raise ValueError(
                    f"{feeding[0]} under `spirit` and {tested[0]}, which is tested, are one log "
                    f"({_log(one)}); the spirit would train on test targets, so take "
                    f"{feeding[0]} out of `spirit`"
                )

    @property
    def candidate_lists(self) -> dict[str, CandidateList]:
        """Every list of candidates by name, the main one first."""
        main = CandidateList(negatives=self.negatives, num_negatives=self.num_negatives)
        return {MAIN_LIST: main, **self.more_candidates}

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain in use, spirit first."""
        return (*self.spirit, *self.tested)

    @property
    def tested(self) -> tuple[str, ...]:
        """Domains with held-out items and users, on which systems are compared."""
        return (*self.ingredients, *self.guests)
