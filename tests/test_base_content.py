"""What was made with a model's folder is stale once another model lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rc_ray import evaluate_plan, recipes
from rc_ray.artifacts import RunFolder, write_manifest
from rc_ray.base_content import content_digest, known_base
from rc_ray.config import Experiment, ModelConfig, load
from rc_ray.core.domains import read_domain
from rc_ray.evaluate_plan import plan
from rc_ray.recipes import Recipe
from rc_ray.status import read_status
from tests.serve.fake_run import make_run
from tests.tiny import make_experiment, make_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_experiment(tmp_path)


def all_known(experiment: Experiment) -> dict[str, object]:
    found: dict[str, Recipe] = {
        "spirit": recipes.spirit(experiment),
        "ingredient": recipes.ingredient(experiment, "tools"),
        "joint": recipes.joint(experiment, "tools"),
        "mix": recipes.mix(experiment, "tools", "uniform"),
        "trial": recipes.merge_trial(experiment, experiment, "tools"),
        "cocktail": recipes.cocktail(experiment, "tools"),
        "evaluation": recipes.evaluation(experiment),
    }
    return {
        **{name: recipe.config for name, recipe in found.items()},
        "titles": evaluate_plan.baseline_config(experiment, "title_embedding"),
    }


def test_another_checkpoint_in_the_folder_is_another_base(path: Path) -> None:
    """Equal names, shapes and sizes: only the values differ."""
    experiment = load(path)
    before = all_known(experiment)
    make_model(Path(experiment.model.path), seed=1)
    after = all_known(experiment)
    assert len(before) == 8
    assert [name for name in before if before[name] == after[name]] == []
    make_model(Path(experiment.model.path), seed=0)
    assert all_known(experiment) == before


def test_scores_on_disk_are_of_the_base_as_it_is(tmp_path: Path) -> None:
    experiment = make_run(tmp_path)
    run = RunFolder(experiment.run_dir)
    settings = experiment.evaluate.model_copy(update={"systems": ("base", "cocktail")})
    experiment = experiment.model_copy(update={"evaluate": settings})
    domain = read_domain(run.domain_dir("tools"))

    def folders() -> set[Path]:
        llm, _ = plan(experiment, run, domain, {"data/tools": "0"})
        return {system.folder for system in llm.systems}

    before = folders()
    assert len(before) == 2
    make_model(Path(experiment.model.path), seed=1)
    assert not before & folders()


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "owner/name"])
def test_a_named_model_is_known_by_its_name(path: Path, name: str) -> None:
    """As it always was, so that no finished stage of such an experiment becomes stale."""
    experiment = load(path, (f"model.path={name}",))
    as_ever = {"path": name, "dtype": "float32"}
    assert known_base(experiment.model) == as_ever
    assert recipes.form(experiment)["model"] == as_ever
    assert recipes.spirit(experiment).config["model"] == as_ever


def test_a_copy_elsewhere_has_the_same_content(tmp_path: Path) -> None:
    """Only what a model is loaded from counts, not when it was written."""
    first = make_model(tmp_path / "first")
    known = content_digest(first)
    second = tmp_path / "second"
    shutil.copytree(first, second, copy_function=shutil.copyfile)
    (second / "README.md").write_text("mine")
    (second / ".lock.json").write_text("{}")
    assert content_digest(second) == known
    model = known_base(ModelConfig(path=str(second)))
    assert model == {"path": str(second), "dtype": "auto", "content": known}
    settings = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**settings, "rope_theta": 500.0}))
    assert content_digest(second) != known


def test_a_tensor_is_known_by_its_first_middle_and_last_block(tmp_path: Path) -> None:
    """One of 65,536 bytes, another of 8: blocks of 4,096 begin at 0, 30,720 and 61,440."""
    spans = {"wide": [0, 65536], "short": [65536, 65544]}
    header = json.dumps(
        {
            n: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
            for n, (a, b) in spans.items()
        }
    ).encode()
    start = 8 + len(header)
    plain = len(header).to_bytes(8, "little") + header + bytes(65544)

    def known(content: bytes) -> str:
        (tmp_path / "model.safetensors").write_bytes(content)
        return content_digest(tmp_path)

    def with_one(place: int) -> str:
        changed = bytearray(plain)
        changed[start + place] = 1
        return known(bytes(changed))

    before = known(plain)
    for place in (0, 4095, 30720, 34815, 61440, 65535, 65543):
        assert with_one(place) != before, place
    for place in (4096, 30719, 34816, 61439):  # the price of not reading it all
        assert with_one(place) == before, place
    assert known(plain.replace(b"short", b"abort")) != before
    assert known(plain + b"0") != before
    # Another form of file has no tensors to tell: 256 slices, here of 257 bytes, all read.
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    known_bin = content_digest(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff" * 65600)
    assert content_digest(tmp_path) != known_bin


def test_show_says_that_the_model_s_folder_is_not_what_it_was(path: Path) -> None:
    experiment = load(path)
    run = RunFolder(experiment.run_dir)
    recipe = recipes.spirit(experiment)
    run.spirit_dir.mkdir(parents=True)
    write_manifest(
        run.spirit_dir,
        stage="train",
        config=recipe.config,
        seed=experiment.seed,
        inputs=dict.fromkeys(recipe.reads, "of folders that are not there"),
        metrics={},
    )

    def told() -> str:
        return next(one.detail for one in read_status(experiment) if one.stage == "train")

    assert told() == ""
    make_model(Path(experiment.model.path), seed=1)
    noted = "what is noted of the files in the model's folder has changed"
    assert told() == f"spirit ({noted})"
    run.ingredient_dir("tools").mkdir(parents=True)
    recipe = recipes.ingredient(experiment, "tools")
    assert len(recipe.config["trials"]) == 1
    write_manifest(
        run.ingredient_dir("tools"),
        stage="tune",
        config={"trials": [{**recipe.config["trials"][0], "model": {"path": "x"}}]},
        seed=experiment.seed,
        inputs=dict.fromkeys(recipe.reads, "of folders that are not there"),
        metrics={},
    )
    details = {one.stage: one.detail for one in read_status(experiment)}
    assert details["tune"] == f"ingredients/tools ({noted})"
