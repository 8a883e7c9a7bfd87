"""What an experiment file may not say, and which model's folder it means."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from rc_ray import recipes
from rc_ray.config import load
from rc_ray.data_config import DataConfig
from rc_ray.errors import ConfigError
from rc_ray.mix_config import LearnedMix
from tests.tiny import make_experiment, make_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experiment(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tune.search={style: [instruct]}", "`search` names `style`"),
        ("tune.search={loss: [trie]}", "`search` names `loss`"),
        ("tune.search={prior_in_loss: [true]}", "`search` names `prior_in_loss`"),
        ("tune.search={learning_rate: []}", "no value for learning_rate"),
        ("tune.search={learning_rate: [0.1, 0.2, 0.1]}", "same point twice"),
        ("train.style=instruct", "mixed and scored in one form"),
        ("tune.prior_in_loss=false", "mixed and scored in one form"),
        ("evaluate.calibration={chosen_by: fixed, alpha: 1.0, gamma: 0}", "`prior_in_trie` beside"),
        ("evaluate.calibration={gamma: 0.5}", "`gamma` needs `chosen_by: fixed`"),
        ("evaluate.calibration={chosen_by: luck}", "'clicks', 'unlabeled' or 'fixed'"),
        ("data.unlabeled_fraction=0", "greater than 0"),
        ("data.unlabeled_fraction=1", "less than 1"),
        ("data.guests=[tools]", "tools stands under both `ingredients` and `guests`"),
        ("data.guests=[lamps]", "lamps stands under both `spirit` and `guests`"),
        ("data.guests=[moon]", "no source defines the domain moon"),
        ("data.spirit=[lamps, rivers, lamps]", "`spirit` names lamps more than once; name it once"),
        ("data.ingredients=[tools, tools]", "`ingredients` names tools more than once; name it"),
        ("data.guests=[x, x, y, y]", "`guests` names x, y more than once; name each once"),
        ("merge.neighbours=[tools, tools]", "`merge.neighbours` names tools more than once; name"),
        (
            "merge.search={neighbours: [[], [tools, tools]]}",
            "`merge.search.neighbours` names tools more than once; name it once",
        ),
        ("merge.neighbours=[lamps]", "names lamps, which has no ingredient; take some of"),
        ("merge.mixes={spirit: {method: ties}}", "`spirit`, which is a system of its own"),
        ("merge.mixes={guarded: {method: ties}}", "`guarded`, which is a system of its own"),
        (
            "merge.mixes={a: {method: linear, weights: [1]}}",
            "has 1 values, but on tools",
        ),
        ("evaluate.systems=[base, ties]", "names ties, which is neither one of popularity"),
        ("serve.system=guarded", "names guarded, which is neither one of spirit"),
        (
            "merge.mixes={a: {method: learned, objective: clicks, prompts_of: scored_users}}",
            "those of `prompts_of: scored_users` are what is tested",
        ),
        (
            "merge.mixes={a: {method: learned, objective: vocabulary_entropy, over: catalogue}}",
            "is of the LLM's own tokens; leave out `over`",
        ),
        (
            "merge.mixes={a: {method: tie}}",
            "`merge.mixes.a.method` is tie, which is none of linear",
        ),
        ("merge.mixes={a: {density: 0.5}}", "the field `merge.mixes.a.method` is missing"),
        ("merge.mixes={a: ties}", "`merge.mixes.a`: Input should be a section of fields"),
        ("merge.mixes={a: {method: ties, density: 0}}", "`merge.mixes.a.density`: Input should"),
        (
            "merge.mixes={a: {method: ties, densty: 1}}",
            "unknown field `merge.mixes.a.densty`; known fields: density, majority_sign, method",
        ),
        ("merge.mixes={A: {method: ties}}", "`merge.mixes`: the name A does not match"),
        ("merge.mixes={a: {method: linear, density: 0.2}}", "`density` has no part in `method: li"),
        (
            "merge.mixes={a: {method: linear, weights: [.nan, 1]}}",
            "weights.0`: Input should be a f",
        ),
        ("merge.mixes={a: {method: peft_linear}}", "`train.lora.rank` is 4 and `tune.lora.rank` 2"),
        ("merge.neighbours=tools", "`: Input should be a list, such as [a, b] or Input should be "),
        ("merge.neighbours=[Tools]", "`merge.neighbours.0`: String should match"),
        ("evaluate.systems=[base, base]", "`systems` names base more than once"),
        ("data.sources=[{format: csvv}]", "`data.sources.0.format` is csvv, which is none of par"),
        (
            "merge.memory_per_task_gb=.inf",
            "`merge.memory_per_task_gb`: Input should be a finite nu",
        ),
        ("evaluate.gammas=[.inf]", "`evaluate.gammas.0`: Input should be a finite number"),
        ("evaluate.alphas=[0, .nan]", "`evaluate.alphas.1`: Input should be a finite number"),
        ("merge.learning_rate=.inf", "`merge.learning_rate`: Input should be a finite number"),
        ("merge.temperature=.inf", "`merge.temperature`: Input should be a finite number"),
        ("train.learning_rate=.inf", "`train.learning_rate`: Input should be a finite number"),
        ("merge.search={pull: [0, .inf]}", "does not hold: pull: Input should be a finite number"),
        (
            "merge.gpus_per_task=1.5",
            "`merge.gpus_per_task`: 1.5 is too many: a process uses one GPU",
        ),
        ("evaluate.gpus_per_actor=2", "`evaluate.gpus_per_actor`: 2 is too many"),
        ("serve.gpus_per_replica=2", "`serve.gpus_per_replica`: 2 is too many"),
        ("merge.method=ties", "`merge.method`: the cocktail is learned; name a mix by `ties`"),
        ("merge.method=lorahub", "under `merge.mixes`, as in {lorahub: {method: lorahub}}, and"),
        ("merge.method=learnt", "`merge.method`: Input should be 'learned'"),
        (
            "merge.mixes={a: {method: lorahub, max_weight: 0.4}}",
            "`merge.mixes.a.max_weight` is 0.4, but on tools the search begins with the weight 1/2",
        ),
        ("merge.mixes={a: {method: ties, seed: 1}}", "`seed` has no part in `method: ties`; leave"),
        ("merge.choose_by=objective", "`choose_by` is set, but there is no `search`"),
    ],
)
def test_what_cannot_work_is_refused(path: Path, override: str, words: str) -> None:
    ranks = ("tune.lora.rank=2",) if "peft_linear" in override else ()
    with pytest.raises(ConfigError) as caught:
        load(path, (override, *ranks))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_where_infinity_means_something_it_stands(path: Path) -> None:
    """No gradient is cut, no cocktail is refused; what is no number is."""
    made = load(path, ("train.max_grad_norm=.inf", "merge.guard.margin=.inf"))
    assert made.train.max_grad_norm == made.merge.guard.margin == math.inf
    for field in ("train.max_grad_norm", "merge.guard.margin"):
        with pytest.raises(ConfigError, match=f"`{field}`: Input should be greater than"):
            load(path, (f"{field}=.nan",))


IDLE = [
    ({"parametrisation": "free", "temperature": 0.5}, "one of softmax, sigmoid"),
    ({"objective": "entropy", "num_tokens": 3}, "one of vocabulary_entropy"),
    ({"objective": "clicks", "divergence_weight": 0.0}, "one of anchored"),
    ({"objective": "entropy", "spread_weight": 2.0}, "one of anchored"),
    ({"objective": "distillation", "max_entropy_share": 1.0}, "one of anchored"),
    (
        {"objective": "distillation", "prompts_of": "scored_users"},
        "one of entropy, vocabulary_entropy, anchored, clicks",
    ),
]


@pytest.mark.parametrize(("fields", "takers"), IDLE, ids=lambda one: str(one))
def test_a_setting_without_a_part_is_refused(
    path: Path, fields: dict[str, object], takers: str
) -> None:
    """Of the cocktail, of a mix by its side, and at a point of a search; not at its default."""
    (by, value), (name, _) = fields.items()
    words = f"`{name}` has no part in `{by}: {value}`; leave it out, or take {takers}"
    given = ", ".join(f"{key}: {one}" for key, one in fields.items())
    point = ", ".join(f"{key}: [{one}]" for key, one in fields.items())
    of_a_mix = f"merge.mixes={{a: {{method: learned, {given}}}}}"
    for override in (of_a_mix, f"merge.search={{{point}}}"):
        with pytest.raises(ConfigError) as caught:
            load(path, (override,))
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError) as caught:
        load(path, tuple(f"merge.{key}={one}" for key, one in fields.items()))
    assert str(caught.value) == f"{path}: `merge`: {words}"
    default = LearnedMix.model_fields[name].default
    load(path, (f"merge.{by}={value}", f"merge.{name}={default}"))


def test_a_setting_beside_a_search_needs_a_part_in_some_of_it(path: Path) -> None:
    """Where it has none it stands at its default, so that equal mixes are one."""
    search = "merge.search={objective: [entropy, anchored], num_epochs: [1, 2]}"
    made = load(path, (search, "merge.spread_weight=2"))
    found = {(one.merge.objective, one.merge.spread_weight) for one in made.variants()}
    assert found == {("entropy", 1.0), ("anchored", 2.0)}
    assert recipes.mixes(made)["cocktail"] == LearnedMix(
        num_prompts=6, num_epochs=1, batch_size=3, max_titles=5
    )
    with pytest.raises(ConfigError, match="`num_tokens` has no part in any setting of `search`"):
        load(path, (search, "merge.num_tokens=3"))


def test_a_mix_needs_two_adapters_and_not_a_spirit(path: Path) -> None:
    alone = ("data.spirit=[]", "data.ingredients=[tools,rivers]")
    with pytest.raises(ConfigError) as caught:
        load(path, (*alone, "merge.neighbours=all"))
    assert str(caught.value) == (
        f"{path}: `evaluate.systems` names spirit, made from a base spirit, but `data.spirit` "
        "names no domain; name one, or leave out what needs it"
    )
    with pytest.raises(ConfigError) as caught:
        load(path, alone)
    assert str(caught.value) == (
        f"{path}: `evaluate.systems` names spirit, uniform, cocktail, guarded, made from a base "
        "spirit, but `data.spirit` names no domain; name one, or name `merge.neighbours` to mix "
        "ingredients alone, or leave out what needs it"
    )
    lone = ("data.spirit=[]", "data.guests=[rivers]", "evaluate.systems=[cocktail]")
    with pytest.raises(ConfigError, match="name one, or leave out what needs it$"):
        load(path, lone)  # one ingredient alone has no neighbour


def test_a_mix_over_the_catalogue_needs_another_style(path: Path) -> None:
    style = ("train.style=instruct", "tune.style=instruct")
    for field in ("merge", "merge.mixes.all"):
        mix = (f"{field}.method=learned", f"{field}.over=catalogue")
        with pytest.raises(ConfigError, match=f"`{field}.over: catalogue` does not go with"):
            load(path, (*style, *mix))


def test_what_is_mixed_follows_from_the_roles(path: Path) -> None:
    guest = ("data.spirit=[lamps]", "data.guests=[rivers]")
    made = load(path, guest)
    assert made.adapter_names("tools") == ("spirit", "ingredient")
    assert made.adapter_names("rivers") == ("spirit", "tools")
    both = ("data.spirit=[]", "data.ingredients=[tools,rivers,lamps]")
    made = load(path, (*both, "merge.neighbours=all", "evaluate.systems=[cocktail]"))
    assert made.adapter_names("rivers") == ("ingredient", "tools", "lamps")
    made = load(path, (*both, "merge.neighbours=[tools]", "evaluate.systems=[base]"))
    assert made.adapter_names("rivers") == ("ingredient", "tools")
    assert made.adapter_names("tools") == ("ingredient",)
    with pytest.raises(ConfigError, match="`data.spirit` names no domain"):
        load(path, (*both, "merge.neighbours=[tools]", "evaluate.systems=[cocktail]"))


def _data(sources: list[dict[str, object]], spirit: list[str]) -> DataConfig:
    return DataConfig.model_validate(
        {"sources": sources, "spirit": spirit, "ingredients": ["tools"]}
    )


def test_the_spirit_never_learns_from_a_tested_log_under_another_name() -> None:
    tools = {"format": "parquet", "domain": "tools", "path": "raw/tools"}
    same = {"format": "parquet", "domain": "all", "path": "raw/../raw/tools/"}
    with pytest.raises(ValidationError) as caught:
        _data([same, tools], ["all"])
    assert (
        "all under `spirit` and tools, which is tested, are one log (raw/tools); the spirit would "
        "train on test targets, so take all out of `spirit`"
    ) in str(caught.value)
    _data([same, tools], [])  # without a role it is never read
    _data([{**same, "path": "raw/all"}, tools], ["all"])
    csv = {"format": "csv", "domain": "tools", "interactions": "log.csv", "items": "a.csv"}
    with pytest.raises(ValidationError, match=r"are one log \(log\.csv with a\.csv\)"):
        _data([csv, {**csv, "domain": "all"}], ["all"])
    _data([csv, {**csv, "domain": "all", "items": "b.csv"}], ["all"])  # of other items


@pytest.mark.parametrize("way", ["absolute", "through a link"])
def test_one_log_is_one_however_its_path_is_written(path: Path, way: str) -> None:
    """Beside a path that is relative to the file."""
    place = path.parent / "raw" / "tools"
    if way == "through a link":
        (path.parent / "linked").symlink_to(place)
    named = {"absolute": str(place), "through a link": "linked"}[way]
    sources = ", ".join(
        f"{{format: parquet, domain: {domain}, path: {one}}}"
        for domain, one in (("tools", "raw/tools"), ("all", named))
    )
    spirit = (f"data.sources=[{sources}]", "data.spirit=[all]")
    with pytest.raises(ConfigError) as caught:
        load(path, spirit)
    assert str(caught.value) == (
        f"{path}: `data`: all under `spirit` and tools, which is tested, are one log ({place}); "
        "the spirit would train on test targets, so take all out of `spirit`"
    )


def test_genres_of_one_source_may_feed_and_test_but_not_those_of_two() -> None:
    films = {"format": "movielens-100k", "path": "films"}
    split = {**films, "genre_domains": {"tools": ["Crime"], "fun": ["Comedy"]}}
    _data([split], ["fun"])
    with pytest.raises(ValidationError, match=r"fun under `spirit` and tools, .* \(films\)"):
        _data(
            [{**films, "domain": "tools"}, {**films, "genre_domains": {"fun": ["Comedy"]}}], ["fun"]
        )
    embedded = {"format": "movielens-100k"}
    with pytest.raises(ValidationError, match=r"\(the embedded MovieLens-100K\)"):
        _data([{**embedded, "domain": "tools"}, {**embedded, "domain": "all"}], ["all"])


def test_who_holds_out_from_whom_follows_from_what_is_mixed(path: Path) -> None:
    both = ("data.spirit=[]", "data.ingredients=[tools,rivers,lamps]", "evaluate.systems=[base]")
    guest = ("data.spirit=[]", "data.ingredients=[tools,lamps]", "data.guests=[rivers]")
    searched = "merge.search={neighbours: [[], [tools]]}"
    drawn = "merge.search={neighbours: {choice: [[], [lamps]]}, pull: {uniform: [0.0, 1.0]}}"
    optuna = (drawn, "merge.num_samples=2", "merge.search_algorithm=optuna")
    for overrides, expected in (
        ((), {"lamps": ("tools",), "rivers": ("tools",)}),
        (both, {}),
        (
            (*both, "merge.neighbours=all"),
            {
                "lamps": ("rivers", "tools"),
                "rivers": ("lamps", "tools"),
                "tools": ("lamps", "rivers"),
            },
        ),
        ((*both, "merge.neighbours=[tools]"), {"tools": ("lamps", "rivers")}),
        ((*both, searched), {"tools": ("lamps", "rivers")}),
        ((*both, *optuna), {"lamps": ("rivers", "tools")}),
        ((*both, "merge.neighbours=all", searched), {"tools": ("lamps", "rivers")}),
        ((*guest, "evaluate.systems=[base]"), {"lamps": ("rivers",), "tools": ("rivers",)}),
    ):
        made = load(path, overrides)
        found = {name: made.held_out_by(name) for name in made.data.domains}
        assert {name: names for name, names in found.items() if names} == expected
        # The other way round: every adapter of another tested domain, at every setting.
        for domain in made.data.ingredients:
            mixing = {
                other
                for one in made.variants()
                for other in made.data.tested
                if domain in one.adapter_names(other)
            }
            assert set(found[domain]) == mixing


def test_train_and_tune_may_say_the_same_form_in_two_ways(path: Path) -> None:
    both = ("train.loss=vocabulary", "tune.loss=vocabulary", "tune.prior_in_loss=false")
    assert not load(path, both).tune.learns_with_prior


def test_a_models_folder_is_found_and_absolute(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = path.parent / "model"
    assert load(path, ("model.path=model",)).model.path == str(beside.resolve())
    here = make_model(tmp_path / "model")  # the working folder's goes first
    assert load(path, ("model.path=model",)).model.path == str(here.resolve())
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert load(path, ("model.path=~/model",)).model.path == str(here.resolve())


def test_a_name_stays_a_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m-instruct").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "owner/name"):
        assert load(path, (f"model.path={name}",)).model.path == name


def test_a_rule_across_sections_names_its_fields_alone(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path, ("evaluate.probes=[popularity_negatives]",))
    assert str(caught.value).startswith(f"{path}: `evaluate.probes` names popularity_negatives")


def test_a_choice_without_labels_must_know_how_negatives_were_drawn(path: Path) -> None:
    wanted = "evaluate.calibration={chosen_by: unlabeled, scope: global}"
    assert load(path, (wanted, "data.negatives=popularity")).evaluate.calibration.scope == "global"
    with pytest.raises(ConfigError) as caught:
        load(path, (wanted, "data.negatives=category"))
    assert "`data.negatives: category` draws by the history" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_of_the_repository_is_one(path: Path) -> None:
    assert load(path).name == path.stem


def test_a_calibration_without_clicks_needs_negatives_drawn_by_what_it_knows(path: Path) -> None:
    """An ingredient's popularity lacks what guests hold out; its negatives were drawn by all.

    Of two items without a training click one may have been drawn thirty times as often.
    """
    unlabeled = ("evaluate.calibration={chosen_by: unlabeled}", "data.negatives=popularity")
    load(path, unlabeled)
    guest = ("data.spirit=[lamps]", "data.guests=[rivers]")
    with pytest.raises(ConfigError) as caught:
        load(path, (*guest, *unlabeled))
    assert "`data.negatives: popularity` draws on tools by clicks that" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    load(path, (*guest, *unlabeled[:1]))
    load(path, (*guest, *unlabeled[1:]))
