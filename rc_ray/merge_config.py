"""Settings of the merge stage: the cocktail, what guards it, its search, what is made beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from rc_ray.data_config import DomainName, GpuShare, Section
from rc_ray.mix_config import (
    OF_LEARNING,
    FixedMethod,
    LearnedMix,
    MixConfig,
    check_parts,
    is_changed,
)
from rc_ray.search_space import SearchSpace, apply_point, check_for_optuna, read_space

MixName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class GuardConfig(Section):
    """What a cocktail has to prove on validation clicks before it is served."""

    enabled: bool = True
    num_valid_users: PositiveInt = 100
    margin: Annotated[float, Field(ge=0.0, allow_inf_nan=True)] = 0.0
    """NDCG by which a control must be ahead for the cocktail to be refused; infinite: never."""


class MergeSetting(LearnedMix):
    """The cocktail: how it is learned, from whose adapters, and in which rank it is saved."""

    neighbours: tuple[DomainName, ...] | Literal["all"] = ()
    """Other domains whose ingredients are mixed in too; a domain's own never counts twice."""
    rank: PositiveInt | None = None
    """Rank of the mixes as they are saved; null keeps the sum of ranks, which is exact."""


_SAME_MEASURE = (
    "granularity",
    "parametrisation",
    "temperature",
    "num_epochs",
    "batch_size",
    "optimizer",
    "learning_rate",
    "pull",
    "neighbours",
)
"""Settings that change what is found, but not what `choose_by: objective` measures of it."""
_MAX_POINTS = 1000
"""Of a search; each is learned on every domain."""


class MergeConfig(MergeSetting):
    """The cocktail, which is a learned mix, and everything that is made beside it."""

    mixes: dict[MixName, MixConfig] = Field(default_factory=dict)
    """Further mixes by name, to compare; `evaluate.systems` may name them."""
    guard: GuardConfig = GuardConfig()
    search: dict[str, Any] | None = None
    """Settings of the cocktail to try on every domain, by field of this section (`learning_rate`,
    `granularity`, `neighbours`, `rank` ...), written as in `tune.search`."""
    num_samples: PositiveInt = 1
    """Settings that a search with distributions draws, for each point of the grid."""
    search_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the draws; the same for every domain."""
    search_algorithm: Literal["random", "optuna"] = "random"
    """`optuna`: each domain's later draws learn from what its earlier ones came to."""
    choose_by: Literal["valid_ndcg", "objective"] = "valid_ndcg"
    """What a search is decided by: validation clicks of users whom the guard does not ask, or the
    unlabeled objective at the learned weights."""
    micro_batch_size: PositiveInt | None = None
    """Prompts whose gradients are held at once; changes memory, not the result. Null: all."""
    cpus_per_task: PositiveFloat = 1.0
    gpus_per_task: GpuShare = 0.0
    """At most one; a fraction shares a GPU among tasks."""
    memory_per_task_gb: PositiveFloat | None = None
    """Main memory that a task or trial is given on its node, in 10^9 bytes; null: as many run side
    by side as CPUs and GPUs allow."""
    max_concurrent_trials: PositiveInt | None = None
    """Of a search; null: as many as the cluster has resources for."""

    @field_validator("method", mode="before")
    @classmethod
    def _is_learned(cls, value: Any) -> Any:
        if value in (*get_args(FixedMethod), "lorahub"):
            raise ValueError(
                f"the cocktail is learned; name a mix by `{value}` under `merge.mixes`, as in "
                f"{{{value}: {{method: {value}}}}}, and `evaluate.systems` or `serve.system` may "
                "name it"
            )
        return value

    @model_validator(mode="after")
    def _of_the_learning(self) -> MergeConfig:
        """Of a search each point is checked by itself, see `setting`."""
        if self.search is None:
            check_parts(self, OF_LEARNING)
        return self

    @model_validator(mode="after")
    def _search_holds_together(self) -> MergeConfig:
        if self.search is None:
            if self.num_samples != 1:
                raise ValueError("`num_samples` is set, but there is no `search` that draws")
            if not self.is_planned:
                raise ValueError(
                    "`search_algorithm: optuna` is set, but there is no `search` whose values it "
                    "could draw; add one, or leave `search_algorithm` out"
                )
            if self.choose_by != "valid_ndcg":
                raise ValueError(
                    "`choose_by` is set, but there is no `search` whose settings it could compare; "
                    "add one, or leave `choose_by` out"
                )
            return self
        if not self.search:
            raise ValueError("`search` names no setting; name one, or leave `search` out")
        for field in self.search:
            if field not in MergeSetting.model_fields or field == "method":
                raise ValueError(
                    f"`search` names the unknown field {field}; known: {_known_fields()}"
                )
        space = self.space
        if self.num_samples != 1 and not space.distributions:
            raise ValueError(
                "`num_samples` is set, but `search` draws nothing; add a distribution such as "
                "{loguniform: [0.01, 1.0]}, or leave `num_samples` out"
            )
        num_points = math.prod(len(values) for values in space.grids.values())
        num_points *= self.num_samples if space.distributions else 1
        if num_points > _MAX_POINTS:
            raise ValueError(
                f"`search` has {num_points:,} points, each learned on every domain; list fewer "
                f"values or draw them, at most {_MAX_POINTS:,} points"
            )
        if not self.is_planned:
            self._check_optuna(space)
        for field, distribution in space.distributions.items():
            for value in distribution.ends:
                self.setting({**space.draw(self.search_seed, 0), field: value})
        settings = self.settings()
        for field, (other, values) in OF_LEARNING.items():
            is_beside = field not in self.search and is_changed(self, field)
            if is_beside and all(getattr(one, other) not in values for one in settings):
                raise ValueError(
                    f"`{field}` has no part in any setting of `search`; leave it out, or let "
                    f"`{other}` be one of {', '.join(values)}"
                )
        if self.choose_by == "objective":
            self._check_comparable(settings)
        return self

    def _check_optuna(self, space: SearchSpace) -> None:
        check_for_optuna(space)
        if self.num_samples == 1:
            raise ValueError(
                "`search_algorithm: optuna` learns from one draw for the next, and `num_samples` "
                "is 1; raise it, or set `search_algorithm: random`"
            )
        num_choices = math.prod(len(values) for values in space.choices.values())
        if num_choices > _MAX_POINTS:
            raise ValueError(
                f"`search` has {num_choices:,} combinations of choices, each checked in advance; "
                f"list fewer values, at most {_MAX_POINTS:,} combinations"
            )

    def _check_comparable(self, settings: tuple[MergeSetting, ...]) -> None:
        """Refuse to compare objectives that do not measure the same."""
        by_clicks = "take `choose_by: valid_ndcg`"
        if any(setting.objective == "clicks" for setting in settings):
            raise ValueError(
                "`choose_by: objective` chooses without labels, and `objective: clicks` is one; "
                f"{by_clicks}"
            )
        for field in self.search or {}:
            if field == "rank":
                raise ValueError(
                    "`choose_by: objective` measures the mix before it is compressed, so it cannot "
                    f"tell one `rank` from another; {by_clicks}"
                )
            if field not in _SAME_MEASURE:
                raise ValueError(
                    f"`choose_by: objective` cannot compare settings that differ in `{field}`, "
                    f"which changes what the objective measures; {by_clicks}, or leave `{field}` "
                    "out of `search`"
                )
        first = settings[0]
        if "batch_size" in (self.search or {}) and first.objective == "anchored":
            raise ValueError(
                "`objective: anchored` measures the mean prediction of a batch, so `choose_by: "
                f"objective` cannot compare settings that differ in `batch_size`; {by_clicks}"
            )
        anchored = first.objective in ("anchored", "distillation")
        if "neighbours" in (self.search or {}) and (anchored or first.score == "calibrated"):
            why = f"objective: {first.objective}" if anchored else "score: calibrated"
            raise ValueError(
                f"`{why}` measures against the adapters that are mixed, so `choose_by: objective` "
                f"cannot compare settings that differ in `neighbours`; {by_clicks}"
            )

    @property
    def space(self) -> SearchSpace:
        return read_space(self.search or {})

    @property
    def is_planned(self) -> bool:
        """Whether all settings are known in advance; Optuna finds them on the way."""
        return self.search_algorithm == "random"

    @property
    def is_chosen_by_clicks(self) -> bool:
        """Whether validation users choose a setting, who then cannot be the guard's."""
        return self.search is not None and self.choose_by == "valid_ndcg"

    @property
    def spares_scored_users(self) -> bool:
        """Whether clicks choose among settings of which some learn on histories with these clicks.

        Who is scored then chooses only where there are too few others.
        """
        space = self.space
        values = {**space.grids, **space.choices}.get("prompts_of", (self.prompts_of,))
        if not self.is_chosen_by_clicks or "scored_users" not in values:
            return False  # asked for every trial, which must not make all settings anew
        if "prompts_of" not in space.choices:  # some setting has it, or it was refused
            return True
        return any(setting.prompts_of == "scored_users" for setting in self.settings())

    def settings(self) -> tuple[MergeSetting, ...]:
        """One per point of the grid and draw of `search`; the only one where there is no search.

        Where Optuna draws, these stand for what it may ask for: every combination of what is
        chosen from a list, with one draw of everything else.
        """
        space = self.space
        points = (
            space.points(self.num_samples, self.search_seed)
            if self.is_planned
            else [
                {**space.draw(self.search_seed, 0), **dict(zip(space.choices, values, strict=True))}
                for values in itertools.product(*space.choices.values())
            ]
        )
        settings = tuple(self.setting(point) for point in points)
        if len(set(settings)) < len(settings):
            raise ValueError("`search` has the same point twice; give each value once")
        return settings

    def at(self, setting: MergeSetting) -> MergeConfig:
        """This section with one setting in place and nothing to search."""
        fields = {name: getattr(setting, name) for name in MergeSetting.model_fields}
        nothing = {
            name: MergeConfig.model_fields[name].default
            for name in ("search", "num_samples", "search_algorithm", "choose_by")
        }
        return self.model_copy(update={**fields, **nothing})

    def label(self, setting: MergeSetting) -> str:
        """The searched fields' values: `granularity=model learning_rate=0.1`."""
        parts = []
        for name in self.search or {}:
            value = getattr(setting, name)
            if isinstance(value, tuple):
                value = "+".join(value) or "none"
            parts.append(f"{name}={value}")
        return " ".join(parts)

    def setting(self, point: Mapping[str, Any]) -> MergeSetting:
        """The setting at one point, field -> value.

        What stands beside the search and has no part at this point is at its default there, so
        that equal mixes are known by equal settings.

        Raises:
            ValueError: a value does not hold, or not beside the others.
        """
        fields = {name: getattr(self, name) for name in MergeSetting.model_fields}
        fields = apply_point(fields, point, _known_fields)
        for field, (other, values) in OF_LEARNING.items():
            if field not in point and fields[other] not in values:
                fields[field] = MergeSetting.model_fields[field].default
        try:
            return MergeSetting.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = str(first["loc"][0]) if first["loc"] else ""
            what = first["msg"].removeprefix("Value error, ")
            if place == "neighbours":
                what = "each value is a list of domains, or all, as in [[], [books, games], all]"
            if "integer" in what and place in self.space.distributions:
                what += "; draw it with `randint` or `choice`"
            raise ValueError(
                f"`search` has a value that does not hold: {place or 'a point'}: {what}"
            ) from None


def _known_fields() -> str:
    return ", ".join(field for field in MergeSetting.model_fields if field != "method")
