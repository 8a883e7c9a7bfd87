"""Every setting of an experiment: one frozen model per stage, one YAML file per experiment.

Nothing is read from the environment and no section refers to another; what a run used is therefore
exactly what `config.yaml` in its run folder says.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rc_ray.data_config import DataConfig, GpuShare, Section, refuse_repeats
from rc_ray.errors import ConfigError
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.merge_config import MergeConfig
from rc_ray.mix_config import FixedMix, LearnedMix, SearchedMix
from rc_ray.systems import BASELINES, MIXED, OF_THE_SPIRIT, SERVED, SYSTEMS, System
from rc_ray.tracking import TrackingConfig
from rc_ray.training_config import TrainConfig
from rc_ray.tune_config import TuneConfig
from rc_ray.yaml_file import apply_override, explain, read_mapping


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """`smollm2-135m-instruct` (embedded), a folder in transformers form, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` times one matrix product in each and takes the faster."""


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    system: System = "cocktail"
    """`spirit`, `ingredient`, `uniform`, `cocktail` or a mix of `merge.mixes`."""
    guard: bool = True
    """Where the guard of the merge refused a domain's cocktail, serve what it chose instead; false
    serves the cocktail as it was learned."""
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 4.0
    max_batch_size: PositiveInt = 8
    batch_wait_timeout_s: NonNegativeFloat = 0.01
    max_candidates: PositiveInt = 5000
    """Longer candidate lists, and larger catalogues when none is given, are refused."""
    max_history: PositiveInt = 500
    """Longer histories are refused; of those taken, the last `evaluate.max_titles` count."""
    cpus_per_replica: PositiveFloat = 1.0
    gpus_per_replica: GpuShare = 0.0

    @model_validator(mode="after")
    def _replicas(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError("`min_replicas` is above `max_replicas`")
        return self


class Experiment(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 7
    data_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of splits, candidates and sampled users; null: `seed`."""
    output_dir: Path = Path("runs")
    """Run folders lie here; on a cluster, storage that all nodes share."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    merge: MergeConfig = MergeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_form(self) -> Experiment:
        forms = [(one.style, one.learns_with_prior) for one in (self.train, self.tune)]
        if forms[0] != forms[1]:
            raise ValueError(
                "`train` and `tune` differ in `style`, or in whether they learn with the prior "
                "(`loss`, `prior_in_loss`); spirit and ingredient are mixed and scored in one form"
            )
        return self

    @model_validator(mode="after")
    def _named_mixes(self) -> Experiment:
        mixes = self.merge.mixes
        taken = sorted(set(mixes) & set(SYSTEMS))
        if taken:
            raise ValueError(
                f"`merge.mixes` names a mix `{taken[0]}`, which is a system of its own; "
                "give it another name"
            )
        known = {"evaluate.systems": (*SYSTEMS, *mixes), "serve.system": (*SERVED, *mixes)}
        asked = {"evaluate.systems": self.evaluate.systems, "serve.system": (self.serve.system,)}
        for field, systems in asked.items():
            unknown = [one for one in systems if one not in known[field]]
            if unknown:
                raise ValueError(
                    f"`{field}` names {unknown[0]}, which is neither one of "
                    f"{', '.join(known[field][: len(known[field]) - len(mixes)])} nor a mix of "
                    f"`merge.mixes` ({', '.join(mixes) or 'it has none'})"
                )
        return self

    @model_validator(mode="after")
    def _adapters_to_mix(self) -> Experiment:
        if self.data.spirit:
            return self
        needing = [one for one in self.evaluate.systems if one in OF_THE_SPIRIT]
        or_neighbours = ""
        mixed = [one for one in self.evaluate.systems if self.is_mixed(one)]
        if mixed and not self.can_mix:
            needing += [one for one in mixed if one not in needing]
            if len(self.data.ingredients) > 1:
                or_neighbours = ", or name `merge.neighbours` to mix ingredients alone"
        if needing:
            raise ValueError(
                f"`evaluate.systems` names {', '.join(needing)}, made from a base spirit, but "
                f"`data.spirit` names no domain; name one{or_neighbours}, or leave out what needs "
                "it"
            )
        return self

    @model_validator(mode="after")
    def _planned_joint_trials(self) -> Experiment:
        if "joint" in self.evaluate.systems and not self.tune.is_planned:
            raise ValueError(
                "`evaluate.systems` names joint, whose trials are those of `tune.search`, but "
                "`tune.search_algorithm: optuna` finds them on the way; take `random`, or leave "
                "joint out"
            )
        return self

    @model_validator(mode="after")
    def _neighbours(self) -> Experiment:
        field = "merge.neighbours" if self.merge.search is None else "merge.search.neighbours"
        settings = [one.merge for one in self.variants()]
        for named in (setting.neighbours for setting in settings):
            refuse_repeats(field, () if named == "all" else named)
            strangers = [one for one in named if one not in self.data.ingredients]
            if named != "all" and strangers:
                raise ValueError(
                    f"`{field}` names {', '.join(strangers)}, which has no ingredient; take "
                    f"some of `data.ingredients` ({', '.join(self.data.ingredients)})"
                )
        if any(setting.neighbours for setting in settings) or self.data.guests:
            taken = sorted({"spirit", "ingredient"} & set(self.data.ingredients))
            if taken:
                raise ValueError(
                    f"a domain is called `{taken[0]}`, as an adapter of every mix is; rename it, "
                    "or leave out `merge.neighbours` and `data.guests`"
                )
        return self

    @model_validator(mode="after")
    def _no_catalogue_to_learn_on(self) -> Experiment:
        mixes = [("merge", one.merge) for one in self.variants()]
        named = [(f"merge.mixes.{name}", mix) for name, mix in self.merge.mixes.items()]
        for field, mix in (*mixes, *named):
            over_all = isinstance(mix, LearnedMix) and mix.over == "catalogue"
            if over_all and self.tune.style == "instruct":
                raise ValueError(
                    f"`{field}.over: catalogue` does not go with `style: instruct`, which lists "
                    "the candidates in the prompt; take `over: candidates`, or another style"
                )
        return self

    @model_validator(mode="after")
    def _weights_for_all(self) -> Experiment:
        for name, mix in self.merge.mixes.items():
            if not isinstance(mix, FixedMix) or mix.weights is None:
                continue
            for one, domain in itertools.product(self.variants(), self.data.tested):
                adapters = one.adapter_names(domain)
                if len(adapters) != len(mix.weights):
                    raise ValueError(
                        f"`merge.mixes.{name}.weights` has {len(mix.weights)} values, but on "
                        f"{domain} {len(adapters)} adapters are mixed ({', '.join(adapters)}); "
                        "give one weight for each, or leave `weights` out"
                    )
        return self

    @model_validator(mode="after")
    def _room_for_the_equal_mix(self) -> Experiment:
        for name, mix in self.merge.mixes.items():
            if not isinstance(mix, SearchedMix):
                continue
            for one, domain in itertools.product(self.variants(), self.data.tested):
                num_adapters = len(one.adapter_names(domain))
                if num_adapters > 1 and mix.max_weight < 1 / num_adapters:
                    raise ValueError(
                        f"`merge.mixes.{name}.max_weight` is {mix.max_weight:g}, but on {domain} "
                        f"the search begins with the weight 1/{num_adapters} for each adapter; "
                        f"raise it to {math.ceil(1e4 / num_adapters) / 1e4:g} or more"
                    )
        return self

    @model_validator(mode="after")
    def _one_rank_for_peft(self) -> Experiment:
        named = [n for n, m in self.merge.mixes.items() if m.method == "peft_linear"]
        if not named or "lora.rank" in self.tune.search or not self.data.spirit:
            return self
        ranks = (self.train.lora.rank, self.tune.lora.rank)
        if ranks[0] != ranks[1]:
            raise ValueError(
                f"`merge.mixes.{named[0]}` is of `method: peft_linear`, which needs "
                f"adapters of one rank, but `train.lora.rank` is {ranks[0]} and `tune.lora.rank` "
                f"{ranks[1]}; take `method: linear`, which is exact, or equal ranks"
            )
        return self

    @model_validator(mode="after")
    def _no_catalogue_in_a_prompt(self) -> Experiment:
        llm = [system for system in self.evaluate.systems if system not in BASELINES]
        if llm and self.tune.style == "instruct" and self.evaluate.num_catalogue_users != 0:
            raise ValueError(
                "`style: instruct` lists the candidates in the prompt, and a whole catalogue is "
                "too long for one; set `evaluate.num_catalogue_users: 0`, or another style"
            )
        return self

    @model_validator(mode="after")
    def _known_draw_for_calibration(self) -> Experiment:
        chosen_by = self.evaluate.calibration.chosen_by
        if chosen_by == "unlabeled" and self.data.negatives == "category":
            raise ValueError(
                "`evaluate.calibration.chosen_by: unlabeled` compares the lists' popularity with "
                "the log's, and `data.negatives: category` draws by the history; take "
                "`chosen_by: clicks`, or `uniform` or `popularity` negatives in the main list"
            )
        apart = [name for name in self.data.ingredients if self.held_out_by(name)]
        if chosen_by == "unlabeled" and self.data.negatives == "popularity" and apart:
            raise ValueError(
                "`evaluate.calibration.chosen_by: unlabeled` compares the lists' popularity with "
                f"the log's, and `data.negatives: popularity` draws on {', '.join(apart)} by "
                "clicks that `merge.neighbours` or `data.guests` keep from the popularity; take "
                "`chosen_by: clicks`, or `uniform` negatives in the main list"
            )
        return self

    @model_validator(mode="after")
    def _list_for_the_probe(self) -> Experiment:
        if "popularity_negatives" in self.evaluate.probes and self.popularity_list is None:
            raise ValueError(
                "`evaluate.probes` names popularity_negatives, but no list has them; add "
                f"`data.more_candidates: {{popular: {{negatives: popularity, num_negatives: "
                f"{self.data.num_negatives}}}}}`"
            )
        return self

    def adapter_names(self, domain: str) -> tuple[str, ...]:
        """What is mixed on a tested domain: `spirit`, `ingredient`, then names of other domains."""
        data = self.data
        others = [name for name in data.ingredients if name != domain]
        if domain in data.ingredients:
            named = others if self.merge.neighbours == "all" else self.merge.neighbours
            others = [name for name in named if name != domain]
        own = ("ingredient",) if domain in data.ingredients else ()
        return (*(("spirit",) if data.spirit else ()), *own, *others)

    def held_out_by(self, domain: str) -> tuple[str, ...]:
        """The tested domains whose held-out titles and users a domain must not train on.

        All of them for a domain of the spirit, which is mixed and compared everywhere. For an
        ingredient domain those on which its ingredient is mixed beside or in place of their own: as
        a neighbour, at any setting of a search, or for a guest.
        """
        data, merge = self.data, self.merge
        if domain in data.spirit:
            return data.tested
        if domain not in data.ingredients:
            return ()
        named = {merge.neighbours}
        if merge.search is not None and "neighbours" in merge.search:
            named = {one.neighbours for one in merge.settings()}
        is_neighbour = any(one == "all" or domain in one for one in named)
        mixing = (*(data.ingredients if is_neighbour else ()), *data.guests)
        return tuple(sorted(set(mixing) - {domain}))

    @property
    def can_mix(self) -> bool:
        """Whether every tested domain has two adapters or more, at each setting of a search."""
        return all(
            len(one.adapter_names(domain)) > 1
            for one in self.variants()
            for domain in self.data.tested
        )

    def variants(self) -> tuple[Experiment, ...]:
        """The experiment at each setting of `merge.search`; itself where nothing is searched."""
        merge = self.merge
        if merge.search is None:
            return (self,)
        return tuple(self.model_copy(update={"merge": merge.at(one)}) for one in merge.settings())

    def is_mixed(self, system: System) -> bool:
        """Whether a system is made by the merge."""
        return system in MIXED or system in self.merge.mixes

    @property
    def split_seed(self) -> int:
        """What splits, candidates and samples of users are drawn with."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def popularity_list(self) -> str | None:
        """The list of candidates that matches the main one, but in how negatives are drawn."""
        for name, one in self.data.more_candidates.items():
            if one.negatives == "popularity" and one.num_negatives == self.data.num_negatives:
                return name
        return None

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name


def load(path: Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment file and apply `dotted.key=value` overrides, values parsed as YAML.

    Relative source paths are taken from the file's folder, `output_dir` from the working folder,
    a model's folder from the one or the other, whichever has it.

    Raises:
        ConfigError: the file is missing, is not YAML, or a field is unknown or out of range.
    """
    path = Path(path)
    raw = read_mapping(path)
    for override in overrides:
        apply_override(raw, override)
    try:
        experiment = Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(path, error, Experiment)) from None
    experiment = _with_absolute_paths(experiment, path.resolve().parent)
    try:
        experiment.data.refuse_tested_logs()  # one log may have been named in two ways
    except ValueError as error:
        raise ConfigError(f"{path}: `data`: {error}") from None
    return experiment


def _with_absolute_paths(experiment: Experiment, folder: Path) -> Experiment:
    sources = []
    for source in experiment.data.sources:
        paths = {
            name: (folder / value).resolve() for name, value in source if isinstance(value, Path)
        }
        sources.append(source.model_copy(update=paths))
    data = experiment.data.model_copy(update={"sources": tuple(sources)})
    output_dir = experiment.output_dir.expanduser().resolve()
    model = experiment.model.model_copy(update={"path": _model_path(experiment.model.path, folder)})
    return experiment.model_copy(update={"model": model, "data": data, "output_dir": output_dir})


def _model_path(path: str, folder: Path) -> str:
    """A model's folder in full, for workers have other working folders; else the name as it is."""
    if path == ModelConfig.model_fields["path"].default:
        return path
    given = Path(path).expanduser()
    for place in (given, folder / given):
        if place.is_dir():
            return str(place.resolve())
    return path
