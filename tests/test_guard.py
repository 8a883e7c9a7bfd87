"""What the guard decides on scores made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rc_ray import artifacts
from rc_ray.calibration_config import CalibrationConfig
from rc_ray.errors import ArtifactError
from rc_ray.guard import Judged, decide, notes_on, read_guard
from rc_ray.merge_config import GuardConfig
from rc_ray.shards import Calibration


def judged(**ndcg: list[float]) -> dict[str, Judged]:
    """Users of each system repeated, so that a difference of all of them is no noise."""
    return {
        name: Judged(
            ndcg=np.tile(values, 10),
            hr1=np.tile(values, 10) > 0.9,
            entropy=np.full(10 * len(values), 1.5),
            calibration=Calibration(0.5, 1.0, True),
            chosen_by="clicks",
        )
        for name, values in ndcg.items()
    }


def surer(systems: dict[str, Judged], *cocktail: float, than: float = 2.0) -> dict[str, Judged]:
    """The systems with the entropies of the cocktail's users, and of each of the equal mix's."""
    num_users = len(systems["cocktail"].ndcg)
    given = {"cocktail": np.resize(cocktail, num_users), "uniform": np.full(num_users, than)}
    return {
        name: replace(one, entropy=given.get(name, one.entropy)) for name, one in systems.items()
    }


def decided(systems: dict[str, Judged], margin: float = 0.0) -> dict[str, object]:
    return decide(systems, GuardConfig(margin=margin), num_bootstrap=500, seed=0)


def test_the_best_control_is_served_where_it_is_ahead() -> None:
    systems = judged(
        cocktail=[0.5, 0.7], spirit=[0.4, 0.6], ingredient=[0.9, 0.7], uniform=[0.6, 0.7]
    )
    found = decided(systems)
    assert found["chosen"] == "ingredient"
    assert found["why"] == (
        "The ingredient is ahead of the cocktail by 0.200 NDCG on 20 validation users (0.800 "
        f"against 0.600, p = {found['systems']['ingredient']['p_value']:.2g}), more than the "
        "margin of 0."
    )
    assert found["systems"]["spirit"] == {
        "ndcg": pytest.approx(0.5),
        "hr1": 0.0,
        "entropy": 1.5,
        "alpha": 0.5,
        "gamma": 1.0,
        "prior_in_trie": True,
        "chosen_by": "clicks",
        "scope": "domain",
        "p_value": pytest.approx(1 / 501),  # every user loses as much
    }
    assert found["systems"]["cocktail"]["p_value"] is None
    assert found["collapse"] is None


@pytest.mark.parametrize(("margin", "chosen"), [(0.0, "uniform"), (0.04, "uniform"), (0.06, "")])
def test_a_control_must_be_ahead_by_more_than_the_margin(margin: float, chosen: str) -> None:
    found = decided(judged(cocktail=[0.5, 0.5], uniform=[0.5, 0.6]), margin)
    assert found["chosen"] == (chosen or "cocktail")


def test_equals_are_no_reason_to_refuse() -> None:
    same = [0.25, 0.75]
    found = decided(judged(cocktail=same, spirit=same, uniform=same))
    assert found["chosen"] == "cocktail"
    assert "No control is ahead of the cocktail (NDCG 0.500)" in str(found["why"])
    assert "the base spirit 0.500, the uniform average 0.500" in str(found["why"])


def test_of_equal_controls_the_first_is_served() -> None:
    found = decided(judged(cocktail=[0.1, 0.1], uniform=[0.3, 0.3], spirit=[0.3, 0.3]))
    assert found["chosen"] == "spirit"


def test_a_collapse_is_named_where_entropy_and_quality_fall_together() -> None:
    """On the guard's own lists, so that one epoch of learning is enough."""
    systems = judged(cocktail=[0.3, 0.5], uniform=[0.5, 0.7], spirit=[0.1, 0.1])
    found = decided(surer(systems, 1.0, 2.0))
    assert str(found["collapse"]).startswith(
        "Confident and wrong: on these users learning the weights lowered the entropy from 2.000 "
        "(equal weights) to 1.500 nats, and NDCG from 0.600 to 0.400 (p = "
    )
    assert [found["systems"][name]["entropy"] for name in ("cocktail", "uniform", "spirit")] == [
        1.5,
        2.0,
        1.5,
    ]
    assert decided(surer(systems, 1.0, 3.2))["collapse"] is None  # 2.1, less sure
    assert decided(surer(systems, 2.0))["collapse"] is None  # as sure
    better = judged(cocktail=[0.5, 0.7], uniform=[0.3, 0.5])
    assert decided(surer(better, 1.5))["collapse"] is None
    assert decided(judged(cocktail=[0.3, 0.5], spirit=[0.5, 0.7]))["collapse"] is None


def test_a_difference_that_is_noise_is_no_collapse() -> None:
    systems = judged(cocktail=[0.3, 0.7], uniform=[0.7, 0.31])
    found = decided(surer(systems, 1.5))
    assert found["chosen"] == "uniform"  # which the margin is for
    assert found["collapse"] is None


@pytest.mark.parametrize(("num_users", "least"), [(1, 1.0), (3, 0.25), (6, 2**-5)])
def test_a_few_users_prove_no_more_than_their_number_allows(num_users: int, least: float) -> None:
    """Each loses, which heads or tails would do with chance 2 / 2^N."""
    some = {
        name: replace(one, ndcg=one.ndcg[:num_users], hr1=one.hr1[:num_users])
        for name, one in judged(cocktail=[0.3], uniform=[0.9]).items()
    }
    found = decided(surer(some, 1.5))
    assert found["systems"]["uniform"]["p_value"] == pytest.approx(least)
    assert found["chosen"] == "uniform"
    assert (found["collapse"] is None) == (least > 0.05)


def test_nothing_to_compare_serves_the_cocktail() -> None:
    found = decided({})
    assert (found["chosen"], found["num_valid_users"], found["systems"]) == ("cocktail", 0, {})
    config = GuardConfig(enabled=False)
    off = decide(judged(cocktail=[0.1], spirit=[0.9]), config, num_bootstrap=9, seed=0)
    assert off["chosen"] == "cocktail"
    assert "`merge.guard.enabled` is false" in off["why"]


def test_what_was_written_is_read_and_damage_is_named(tmp_path: Path) -> None:
    assert read_guard(tmp_path) is None
    systems = surer(judged(cocktail=[0.3, 0.5], uniform=[0.5, 0.7]), 1.5)
    artifacts.write_json(tmp_path / "guard.json", decided(systems))
    verdict = read_guard(tmp_path)
    assert verdict is not None
    assert verdict.chosen == "uniform"
    assert verdict.sentences.startswith("The uniform average is ahead")
    assert "Confident and wrong" in verdict.sentences
    assert verdict.systems["cocktail"]["entropy"] == 1.5
    assert verdict.calibrated == (
        "Each system is calibrated as these users' clicks on this domain choose."
    )
    whole = {"chosen": "uniform", "why": "", "num_valid_users": 1, "systems": {}, "collapse": None}
    nothing_of_it = {"uniform": {"ndcg": 0.5}}
    odd = ("magic", [])
    texts = [json.dumps(whole | {"chosen": one}) for one in odd]
    unsure = {"uniform": {**verdict.systems["uniform"], "entropy": None}}
    texts += [json.dumps(whole | {"systems": unsure})]
    texts += ["{}", "[]", json.dumps(whole | {"systems": nothing_of_it}), json.dumps(whole)[:20]]
    for text in texts:
        (tmp_path / "guard.json").write_text(text)
        with pytest.raises(ArtifactError, match="guard.json: damaged; run `rc-ray merge --force`"):
            read_guard(tmp_path)


def test_a_verdict_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Without entropies, and without who chose the calibrations."""
    told = decided(judged(cocktail=[0.5], spirit=[0.4]))
    for one in told["systems"].values():  # type: ignore[attr-defined]
        for name in ("entropy", "chosen_by", "scope"):
            del one[name]
    artifacts.write_json(tmp_path / "guard.json", told)
    verdict = read_guard(tmp_path)
    assert verdict is not None
    assert verdict.systems["spirit"]["ndcg"] == pytest.approx(0.4)
    assert "entropy" not in verdict.systems["spirit"]
    assert verdict.calibrated == ""


def test_what_a_comparison_rests_on_is_told() -> None:
    shared = CalibrationConfig(scope="global")
    fixed = CalibrationConfig(
        scope="global", chosen_by="fixed", alpha=1.0, gamma=1.0, prior_in_trie=True
    )
    assert notes_on(0, CalibrationConfig()) == notes_on(0, fixed) == []
    lent, alone = notes_on(3, shared)
    assert lent.startswith("The test histories of 3 of these users, which hold their validation")
    assert alone.startswith("Each system was calibrated on this domain alone: the calibration for")
    told = decide(
        judged(cocktail=[0.5], spirit=[0.4]),
        GuardConfig(),
        notes=(lent, alone),
        num_bootstrap=50,
        seed=0,
    )
    assert told["why"].endswith(f"the base spirit 0.400. {lent} {alone}")


def test_a_lost_verdict_is_no_leave_to_serve_the_cocktail(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "manifest.json", {"metrics": {"guard": {"chosen": "spirit"}}})
    with pytest.raises(ArtifactError, match="guard.json: missing, so nothing says what to serve"):
        read_guard(tmp_path)
    # A cocktail of before there were guards.
    artifacts.write_json(tmp_path / "manifest.json", {"metrics": {"num_steps": 3}})
    assert read_guard(tmp_path) is None
