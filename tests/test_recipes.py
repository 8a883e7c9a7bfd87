"""What a finished stage is known by: all that shapes it, and nothing that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rc_ray import recipes
from rc_ray.artifacts import fingerprint
from rc_ray.config import Experiment, load
from rc_ray.recipes import Recipe
from tests.tiny import make_experiment

COMMON = (
    "data.spirit=[]",
    "evaluate.systems=[base, cocktail, weighed, ties]",
    "merge.mixes={weighed: {method: linear, weights: [0.6, 0.3, 0.1]}, ties: {method: ties}}",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experiment(tmp_path_factory.mktemp("recipes"))


def known_by(recipe: Recipe) -> str:
    """The fingerprint where every folder that is read has its name for a digest."""
    return fingerprint(config=recipe.config, seed=0, inputs={name: name for name in recipe.reads})


def mixed(path: Path, ingredients: str, neighbours: str) -> Experiment:
    return load(
        path, (*COMMON, f"data.ingredients={ingredients}", f"merge.neighbours={neighbours}")
    )


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (("[tools, lamps, rivers]", "all"), ("[tools, rivers, lamps]", "all")),
        (
            ("[tools, lamps, rivers]", "[tools, lamps, rivers]"),
            ("[tools, lamps, rivers]", "[tools, rivers, lamps]"),
        ),
    ],
)
def test_given_weights_belong_to_adapters_in_their_order(
    path: Path, first: tuple[str, str], other: tuple[str, str]
) -> None:
    """With weights .6, .3 and .1 it matters which neighbour comes first; to TIES it does not."""
    one, two = (mixed(path, *settings) for settings in (first, other))
    adapters = [list(recipes.adapters(experiment, "tools")) for experiment in (one, two)]
    assert adapters == [["ingredient", "lamps", "rivers"], ["ingredient", "rivers", "lamps"]]
    weighed, again = (recipes.mix(experiment, "tools", "weighed") for experiment in (one, two))
    assert known_by(weighed) != known_by(again)
    whole, again = (recipes.cocktail(experiment, "tools") for experiment in (one, two))
    assert known_by(whole) != known_by(again)
    for name in ("ties", "cocktail", "uniform"):
        alike, again = (recipes.mix(experiment, "tools", name) for experiment in (one, two))
        assert known_by(alike) == known_by(again)


def test_only_mixes_of_made_up_users_say_what_these_are_made_up_from(path: Path) -> None:
    """A key of their own: sealed before it was there, they are stale, and no other mix is."""
    mixes = "merge.mixes={taught: {method: learned, objective: distillation}, ties: {method: ties}}"
    experiment = load(path, (mixes,))
    said = {"made_up_from": "titles that are not held out"}
    told = {
        name: recipes.mix(experiment, "tools", name).config for name in recipes.mixes(experiment)
    }
    assert {name for name, config in told.items() if said.items() <= config.items()} == {"taught"}
    assert said.items() <= recipes.cocktail(experiment, "tools").config.items()
    without = load(path, ("merge.mixes={ties: {method: ties}}",))
    assert "made_up_from" not in recipes.cocktail(without, "tools").config
    searched = load(path, ("merge.search={objective: [entropy, distillation]}",))
    assert said.items() <= recipes.cocktail(searched, "tools").config.items()
    trials = [recipes.merge_trial(searched, one, "tools").config for one in searched.variants()]
    assert ["made_up_from" in config for config in trials] == [False, True]


def test_only_joint_loras_that_validate_say_on_whom(path: Path) -> None:
    """Those of before were validated on a sample of all users, and are stale; others stand."""

    def said(of: Callable[[Experiment, str], Recipe], *overrides: str) -> list[object]:
        trials = of(load(path, overrides), "tools").config["trials"]
        return [trial.get("validated_on") for trial in trials]

    assert said(recipes.joint) == said(recipes.ingredient) == [None]
    assert said(recipes.joint, "tune.valid_every=2") == ["first domain"]
    assert said(recipes.ingredient, "tune.valid_every=2") == [None]
