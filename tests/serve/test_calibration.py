"""A calibration serves the adapter that it was chosen for, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rc_ray.artifacts import RunFolder, write_json
from rc_ray.config import Experiment
from rc_ray.serve.calibration import open_calibration, told_by_calibrations
from rc_ray.serve.scoring import describe, open_catalogue
from rc_ray.serve.served import told_by_system
from tests.serve.fake_run import seal_anew, seal_evaluation

TOLD = {"alpha": 1.0, "gamma": 2.0, "prior_in_trie": False}
"""What the guard chose; the evaluation's are 0.5 and 0.25, with the prior in the trie."""
CHANGED = "has changed since `rc-ray evaluate` chose; run `rc-ray evaluate`."


@pytest.fixture
def run(experiment: Experiment, tmp_path: Path) -> RunFolder:
    shutil.copytree(experiment.run_dir, tmp_path / experiment.name)
    return RunFolder(tmp_path / experiment.name)


def served(experiment: Experiment, run: RunFolder, **serve: Any) -> Experiment:
    serving = experiment.serve.model_copy(update=serve)
    return experiment.model_copy(update={"output_dir": run.root.parent, "serve": serving})


def guard(run: RunFolder, chosen: str, domain: str = "tools") -> None:
    verdict = {
        "chosen": chosen,
        "why": "It is ahead.",
        "num_valid_users": 9,
        "systems": {chosen: {**TOLD, "ndcg": 0.6, "hr1": 0.5, "chosen_by": "clicks"}},
        "collapse": None,
    }
    write_json(run.cocktail_dir(domain) / "guard.json", verdict)


def entry(alpha: float, scope: str = "domain") -> dict[str, Any]:
    told = {"valid_ndcg": 0.3, "chosen_by": "clicks", "scope": scope}
    return {"alpha": alpha, "gamma": 0.0, "prior_in_trie": True, **told}


def test_a_cocktail_made_anew_is_not_served_with_the_old_one_s_calibration(
    experiment: Experiment, run: RunFolder
) -> None:
    """Merged again with another setting and served, before anybody evaluated it."""
    mine = served(experiment, run)
    guard(run, "cocktail")
    found = open_calibration(mine, "tools")
    assert (found.alpha, found.source, found.is_left) == (0.5, "evaluate", False)
    assert found.why == "The calibration is that of `rc-ray evaluate` for the cocktail."
    seal_anew(run, "cocktails/tools")
    found = open_calibration(mine, "tools")
    assert (found.alpha, found.gamma, found.prior_in_trie) == (1.0, 2.0, False)
    assert (found.source, found.is_left, found.measured) == ("guard", True, True)
    assert found.why == (
        f"The calibration is that of the merge's guard for the cocktail: the cocktail folder "
        f"{CHANGED}"
    )
    info = describe(mine, open_catalogue(mine, "tools"))
    assert (info.alpha, info.calibration) == (1.0, found.why)
    (run.cocktail_dir("tools") / "guard.json").unlink()
    found = open_calibration(mine, "tools")
    assert (found.alpha, found.source, found.is_left) == (0.0, "default", True)
    assert (found.measured, found.prior_in_trie) == (False, True)
    assert found.why == (
        "The likelihood ranks as it was trained, with no calibration for the cocktail: the "
        f"cocktail folder {CHANGED}"
    )
    seal_evaluation(run, "cocktails/tools")
    assert open_calibration(mine, "tools").alpha == 0.5


@pytest.mark.parametrize(
    ("system", "place", "words"),
    [
        ("spirit", "spirit", "the base spirit"),
        ("ingredient", "ingredients/tools", "the ingredient"),
        ("uniform", "cocktails/tools", "the cocktail folder"),
        ("ties", "cocktails/tools", "the cocktail folder"),
    ],
)
def test_every_system_has_a_stage_folder_of_its_own_to_be_known_by(
    experiment: Experiment, run: RunFolder, system: str, place: str, words: str
) -> None:
    mine = served(experiment, run, system=system)
    others = {"spirit", "ingredients/tools", "cocktails/tools"} - {place}
    for name in ("spirit", "ingredients/tools"):
        (run.root / name).mkdir(parents=True)
        seal_anew(run, name)
    write_json(run.evaluate_dir / "calibration.json", {"tools": {system: entry(0.75)}})
    seal_evaluation(run, place, *others)
    for other in others:
        seal_anew(run, other)
    assert open_calibration(mine, "tools").alpha == 0.75
    seal_anew(run, place)
    found = open_calibration(mine, "tools")
    assert (found.measured, found.is_left) == (False, True)
    assert f": {words} {CHANGED}" in found.why
    # An evaluation that never read the folder chose for something else.
    seal_evaluation(run, *others)
    assert not open_calibration(mine, "tools").measured


def test_what_the_guard_chose_is_for_the_adapter_that_it_judged(
    experiment: Experiment, run: RunFolder
) -> None:
    """A spirit that was trained anew after the merge was judged by no guard."""
    mine = served(experiment, run)
    run.spirit_dir.mkdir()
    seal_anew(run, "spirit")
    seal_anew(run, "cocktails/tools", "spirit")
    guard(run, "spirit")
    found = open_calibration(mine, "tools")
    assert (found.alpha, found.source, found.is_left) == (1.0, "guard", False)
    assert found.why == (
        "The calibration is that of the merge's guard for the base spirit; `rc-ray evaluate` has "
        "chosen none."
    )
    seal_anew(run, "spirit")
    assert not open_calibration(mine, "tools").measured


def test_what_is_loaded_is_told_as_the_guard_chose_it(
    experiment: Experiment, run: RunFolder
) -> None:
    guard(run, "spirit")
    mine = served(experiment, run)
    assert told_by_system(mine) == "rivers (cocktail); tools (spirit)"
    assert told_by_system(served(experiment, run, guard=False)) == "rivers, tools (cocktail)"


def test_what_was_compared_as_guarded_holds_while_the_guard_s_word_does(
    experiment: Experiment, run: RunFolder
) -> None:
    """`guarded` meant the uniform average; a new merge means the spirit, which is as it was."""
    mine = served(experiment, run)
    run.spirit_dir.mkdir()
    seal_anew(run, "spirit")
    guard(run, "uniform")
    write_json(run.evaluate_dir / "calibration.json", {"tools": {"guarded": entry(0.75)}})
    seal_evaluation(run, "spirit", "cocktails/tools")
    assert open_calibration(mine, "tools").alpha == 0.75
    guard(run, "spirit")
    seal_anew(run, "cocktails/tools", "spirit")
    found = open_calibration(mine, "tools")
    assert (found.alpha, found.source, found.is_left) == (1.0, "guard", True)


def test_one_setting_for_all_domains_holds_while_all_of_them_do(
    experiment: Experiment, run: RunFolder
) -> None:
    """`rivers` was not evaluated; `tools` and `lamps` were."""
    mine = served(experiment, run)
    run.cocktail_dir("lamps").mkdir()
    seal_anew(run, "cocktails/lamps")
    table = {name: {"cocktail": entry(0.75, "global")} for name in ("tools", "lamps")}
    write_json(run.evaluate_dir / "calibration.json", table)
    seal_evaluation(run, "cocktails/tools", "cocktails/lamps")
    found = open_calibration(mine, "rivers")
    assert (found.alpha, found.scope, found.source) == (0.75, "global", "evaluate")
    assert found.why == (
        "The calibration is that of `rc-ray evaluate` for the cocktail on all evaluated domains at "
        "once, of which this is none."
    )
    seal_anew(run, "cocktails/lamps")
    assert open_calibration(mine, "tools").alpha == 0.75  # its own cocktail is as it was
    found = open_calibration(mine, "rivers")
    assert (found.measured, found.is_left) == (False, True)
    shutil.rmtree(run.cocktail_dir("lamps"))
    assert not open_calibration(mine, "rivers").measured


def test_one_line_tells_of_all_domains_alike(experiment: Experiment, run: RunFolder) -> None:
    mine = served(experiment, run)
    assert list(told_by_calibrations(mine)) == [
        "rivers: The likelihood ranks as it was trained, with no calibration for the cocktail; "
        "`rc-ray evaluate` chooses one for each system and domain that it compares.",
        "tools: The calibration is that of `rc-ray evaluate` for the cocktail.",
    ]
    seal_evaluation(run)
    for domain in ("rivers", "tools"):
        guard(run, "cocktail", domain)
    write_json(run.evaluate_dir / "calibration.json", {})
    assert list(told_by_calibrations(mine)) == [
        "rivers, tools: The calibration is that of the merge's guard for the cocktail; "
        "`rc-ray evaluate` has chosen none."
    ]
    shutil.rmtree(run.cocktail_dir("tools"))
    assert [line.split(":")[0] for line in told_by_calibrations(mine)] == ["rivers"]
