"""Grids and draws of a sweep: which points they give, and what is refused in plain words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rc_ray import search_space
from rc_ray.merge_config import MergeConfig
from rc_ray.search_space import Distribution, read_space
from rc_ray.tune_config import TuneConfig


def config(**fields: Any) -> TuneConfig:
    return TuneConfig.model_validate({"num_steps": 90, **fields})


def test_a_distribution_maps_the_unit_interval_onto_its_range() -> None:
    """By hand: half way from 1e-4 to 1e-2 on a log scale is 1e-3; 4 to 7 are four numbers."""
    assert Distribution("loguniform", (1e-4, 1e-2)).at(0.5) == pytest.approx(1e-3)
    assert Distribution("uniform", (-1.0, 3.0)).at(0.25) == 0.0
    whole = Distribution("randint", (4, 7))
    assert [whole.at(place) for place in (0.0, 0.24, 0.26, 0.51, 0.999)] == [4, 4, 5, 6, 7]
    assert [Distribution("choice", "ab").at(place) for place in (0.0, 0.5)] == ["a", "b"]
    # Rounded to four digits, but never out of the range.
    assert Distribution("uniform", (0.12344, 1.0)).at(0.0) == 0.12344


def test_draws_are_the_same_on_every_start_and_more_keep_the_earlier() -> None:
    search = {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "lora.rank": {"randint": [2, 9]}}
    few, again = (config(search=search, num_samples=3).settings() for _ in range(2))
    assert few == again
    assert config(search=search, num_samples=5).settings()[:3] == few
    assert config(search=search, num_samples=3, search_seed=1).settings() != few
    assert len({setting.learning_rate for setting in few}) == 3
    assert all(1e-4 <= one.learning_rate <= 1e-2 and 2 <= one.lora.rank <= 9 for one in few)
    wider = config(search={**search, "num_steps": {"choice": [60, 70]}}, num_samples=3).settings()
    assert [one.learning_rate for one in wider] == [one.learning_rate for one in few]


def test_lists_stay_grids_around_the_draws() -> None:
    settings = config(
        search={"lora.rank": [2, 4], "learning_rate": {"uniform": [0.1, 0.2]}}, num_samples=2
    ).settings()
    assert [one.lora.rank for one in settings] == [2, 2, 4, 4]
    rates = [one.learning_rate for one in settings]
    assert rates[:2] == rates[2:]
    assert rates[0] != rates[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"search": {"learning_rate": {"normal": [0, 1]}}}, "unknown distribution normal"),
        ({"search": {"learning_rate": {"uniform": [2]}}}, "takes two numbers"),
        ({"search": {"learning_rate": {"uniform": [0.2, 0.1]}}}, "low first"),
        ({"search": {"learning_rate": {"loguniform": [0, 0.1]}}}, "low above 0"),
        ({"search": {"lora.rank": {"randint": [1.5, 4]}}}, "two whole numbers"),
        ({"search": {"lora.rank": {"choice": [4, 8, 4]}}}, "a value twice"),
        ({"search": {"lora.rank": 4}}, "write a list of values"),
        ({"search": {"speed": [1, 2]}}, "unknown field speed; known: num_steps, batch_size, learn"),
        ({"scheduler": "asha"}, "write {name: asha, grace_period: 50}"),
        ({"search": {"lora": [1, 2]}}, "unknown field lora"),
        ({"search": {"lora": {"rank": [4, 8]}}}, ", or lora.rank if that is the field's name"),
        ({"search": {"micro_batch_size": [1, 2]}}, "shapes no result"),
        ({"search": {"lora.rank": [4, 8]}, "num_samples": 3}, "`search` draws nothing"),
        ({"num_samples": 3}, "`search` draws nothing"),
        ({"search": {"lora.rank": {"choice": [4, 8]}}}, "set `num_samples`"),
        ({"search": {"lora.rank": {"choice": [4, 8]}}, "num_samples": 3}, "only 2 different"),
        (
            {"search": {"learning_rate": {"uniform": [-1.0, 0.1]}}, "num_samples": 1},
            "learning_rate: Input should be greater than 0",
        ),
        (
            {"search": {"lora.rank": {"uniform": [2, 9]}}, "num_samples": 1},
            "draw it with `randint`",
        ),
        (
            {"search": {"lora.rank": [4, 8]}, "search_algorithm": "optuna"},
            "needs a distribution",
        ),
        ({"num_workers": 3}, "`batch_size` 8 is not divisible by `num_workers` 3"),
        ({"num_workers": 2, "gpus_per_trial": 0.5}, "one whole GPU"),
        ({"gpus_per_trial": 2}, "a process uses one GPU"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**fields)
    (error,) = caught.value.errors()
    assert words in error["msg"]
    assert len(error["msg"].splitlines()) == 1


def test_optuna_is_asked_for_by_name_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_space, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"run `pip install optuna`"):
        config(
            search={"learning_rate": {"uniform": [0.1, 0.2]}},
            num_samples=2,
            search_algorithm="optuna",
        )


def test_what_optuna_may_choose_is_checked_at_its_ends() -> None:
    pytest.importorskip("optuna")
    fields = {
        "search": {"batch_size": {"randint": [4, 9]}, "lora.rank": {"choice": [2, 8, 32]}},
        "num_samples": 1,
        "search_algorithm": "optuna",
    }
    found = {(one.batch_size, one.lora.rank) for one in config(**fields).possible_settings()}
    assert found == {(size, rank) for size in (4, 9) for rank in (2, 8, 32)}
    with pytest.raises(ValidationError, match="`batch_size` 9 is not divisible by `num_workers` 2"):
        config(**fields, num_workers=2)


def test_the_examples_of_the_page_on_sweeps_hold() -> None:
    text = (Path(__file__).parents[1] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(body) for body in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    stages = [stage for example in examples for stage in example]
    assert sorted(stages) == ["merge", "tune"]
    given = {stage: fields for example in examples for stage, fields in example.items()}
    # As the comments beside them say.
    assert len(config(**given["tune"]).settings()) == 8
    assert len(MergeConfig(**given["merge"]).settings()) == 16
    spans = re.findall(r"`([a-z_.]+)(?:: [^`]*)?`", text)
    fields = {span.removeprefix("tune.") for span in spans if span.startswith("tune.")}
    assert fields
    assert fields <= TuneConfig.model_fields.keys()
    scheduler = re.search(r"`tune\.(scheduler: \{.*?\})`", text)
    assert scheduler is not None
    config(
        **yaml.safe_load(scheduler[1]),
        valid_every=25,
        search={"learning_rate": [0.1, 0.2]},
    )


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    space = read_space({"learning_rate": {"loguniform": ["1e-4", "1e-2"]}})
    assert space.distributions["learning_rate"].values == (1e-4, 1e-2)
