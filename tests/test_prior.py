"""The verb `prior`: logs in every form, an artifact of its own, and plain refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rc_ray import evaluate_plan, prepare, recipes
from rc_ray.artifacts import RunFolder, read_json
from rc_ray.cli import app
from rc_ray.config import Experiment, load
from rc_ray.core.domains import read_domain
from rc_ray.core.sources import SourceError
from rc_ray.errors import ArtifactError, ConfigError, UserError
from rc_ray.prior import Prior, read_prior, refresh, remove, summary
from rc_ray.serve.scoring import open_catalogue
from tests.conftest import Screen
from tests.tiny import make_experiment

DAY = 86_400
NOW = 1_700_000_000


def write_log(path: Path, *rows: tuple[str, str, float]) -> Path:
    users, items, times = zip(*rows, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_experiment(tmp_path)


@pytest.fixture
def experiment(path: Path, screen: Screen) -> Experiment:
    loaded = load(path)
    prepare.run(loaded, console=screen.console)
    return loaded


def found(experiment: Experiment, domain: str = "tools") -> Prior | None:
    run = RunFolder(experiment.run_dir)
    return read_prior(run, domain, read_domain(run.domain_dir(domain)).item_ids)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(one.relative_to(folder)): hashlib.sha256(one.read_bytes()).hexdigest()
        for one in sorted(folder.rglob("*"))
        if one.is_file()
    }


def test_clicks_are_kept_beside_the_domain_and_training_can_be_added(
    experiment: Experiment, tmp_path: Path
) -> None:
    log = write_log(
        tmp_path / "log.parquet",
        ("u", "Tools-01", NOW),
        ("v", "Tools-01", NOW - DAY),
        ("v", "Tools-05", NOW - 2 * DAY),
        ("v", "Tools-99", NOW),
    )
    told = refresh(experiment, "tools", log, half_life_days=1.0, now=NOW + 0.5)
    assert (told["rows"], told["counted"], told["weight"]) == (4, 3, 1.75)
    assert (told["unknown_rows"], told["unknown_items"]) == (1, 1)
    assert told["newest"] == told["made_at"] == "2023-11-14T22:13:20+00:00"
    prior = found(experiment)
    assert prior is not None
    expected = np.zeros(42)
    expected[[1, 5]] = 1.5, 0.25
    assert prior.clicks.tolist() == expected.tolist()
    assert prior.since == told["made_at"]
    manifest = read_json(RunFolder(experiment.run_dir).prior_dir("tools") / "manifest.json")
    assert manifest["inputs"]["log/log.parquet"] == hashlib.sha256(log.read_bytes()).hexdigest()
    assert manifest["config"] == {"half_life_days": 1.0, "add_training": False}
    assert "--add-training counts on top" in summary("tools", told)
    told = refresh(experiment, "tools", log, add_training=True)
    assert "--add-training" not in summary("tools", told)
    both = found(experiment)
    num_train = read_domain(RunFolder(experiment.run_dir).domain_dir("tools")).num_train
    expected[[1, 5]] = 2.0, 1.0
    assert both is not None
    assert both.clicks.tolist() == (num_train + expected).tolist()


def test_nothing_but_serving_knows_of_it(experiment: Experiment, tmp_path: Path) -> None:
    """The prepared domain, what evaluation reads and where its scores lie stay as they are."""
    run = RunFolder(experiment.run_dir)
    alone = experiment.model_copy(
        update={"evaluate": experiment.evaluate.model_copy(update={"systems": ("base",)})}
    )

    def seen() -> tuple[Any, ...]:
        domain = read_domain(run.domain_dir("tools"))
        recipe = recipes.evaluation(alone)
        llm, _ = evaluate_plan.plan(alone, run, domain, recipe.inputs(run))
        return (
            digests(run.root / "data"),
            recipe,
            recipe.inputs(run),
            [one.folder for one in llm.systems],
            domain.log_prior().tobytes(),
        )

    before = seen()
    trained = open_catalogue(experiment, "tools").log_prior
    log = write_log(tmp_path / "log.parquet", ("u", "Tools-07", 1), ("v", "Tools-07", 2))
    refresh(experiment, "tools", log)
    assert seen() == before
    catalogue = open_catalogue(experiment, "tools")
    # 2 clicks and 42 items, one more for each.
    assert np.exp(catalogue.log_prior[7]) == pytest.approx(3 / 44)
    assert np.exp(catalogue.log_prior[8]) == pytest.approx(1 / 44)
    assert catalogue.prior_since is not None
    assert remove(experiment, "tools")
    assert not remove(experiment, "tools")
    assert (open_catalogue(experiment, "tools").log_prior == trained).all()


def test_folders_of_parts_and_the_form_of_import_are_read(
    experiment: Experiment, tmp_path: Path
) -> None:
    one, two = ("u", "Tools-01", 1), ("v", "Tools-02", 2)
    write_log(tmp_path / "parts" / "0.parquet", one)
    write_log(tmp_path / "parts" / "1.parquet", two)
    write_log(tmp_path / "imported" / "interactions.parquet", one, two)
    write_log(tmp_path / "many" / "interactions.parquet" / "0.parquet", one, two)
    pq.write_table(pa.table({"item_id": ["x"]}), tmp_path / "imported" / "items.parquet")
    for name in ("parts", "imported", "many"):
        assert refresh(experiment, "tools", tmp_path / name)["counted"] == 2
    # Fractions tell an order; without a half-life nobody asks for more.
    fractions = write_log(tmp_path / "fractions.parquet", ("u", "Tools-01", 1.5))
    assert refresh(experiment, "tools", fractions)["newest"] is None
    with pytest.raises(SourceError, match="a half-life needs those"):
        refresh(experiment, "tools", fractions, half_life_days=1.0)


def test_a_csv_log_has_the_columns_of_its_source(tmp_path: Path, screen: Screen) -> None:
    rows = [(f"u{user}", f"i{(user + step) % 12}", step) for user in range(30) for step in range(6)]
    log = "who,what,when\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    (tmp_path / "shop.csv").write_text(log)
    (tmp_path / "items.csv").write_text(
        "what,title\n" + "".join(f"i{n},Thing {n}\n" for n in range(12))
    )
    source = {
        "format": "csv",
        "domain": "shop",
        "interactions": str(tmp_path / "shop.csv"),
        "items": str(tmp_path / "items.csv"),
        "columns": {"user_id": "who", "item_id": "what", "timestamp": "when"},
    }
    path = make_experiment(
        tmp_path / "run",
        data={
            "sources": [source],
            "spirit": [],
            "ingredients": ["shop"],
            "num_negatives": 2,
            "cold_item_fraction": 0.0,
        },
        evaluate={"systems": ["popularity"]},
    )
    loaded = load(path)
    prepare.run(loaded, console=screen.console)
    new = tmp_path / "new.csv"
    new.write_text(f"who,what,when\nz,i3,{NOW}\ny,i3,{NOW}\n")
    refresh(loaded, "shop", new, half_life_days=3)
    prior = found(loaded, "shop")
    items = read_domain(RunFolder(loaded.run_dir).domain_dir("shop")).item_ids
    assert prior is not None
    assert {i: n for i, n in zip(items, prior.clicks, strict=True) if n} == {"i3": 2.0}
    new.write_text("who,item,when\nz,i3,1\n")
    with pytest.raises(SourceError, match="the column `what` is missing"):
        refresh(loaded, "shop", new)


def test_what_cannot_be_used_is_refused_in_plain_words(
    experiment: Experiment, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log.parquet", ("u", "Tools-01", 5))
    for keywords, words in (
        ({"domain": "spoons"}, "no domain `spoons`; its domains: lamps, rivers, tools"),
        ({"half_life_days": 0.0}, "must be greater than 0"),
        ({"half_life_days": 2.0}, "no Unix seconds"),
        ({"log": tmp_path / "none.parquet"}, "no such file or folder"),
        ({"log": tmp_path / "log.csv"}, "`rc-ray import` makes Parquet"),
        ({"log": tmp_path / "empty"}, "holds neither"),
    ):
        (tmp_path / "log.csv").write_text("user_id,item_id\nu,a\n")
        (tmp_path / "empty").mkdir(exist_ok=True)
        asked: dict[str, Any] = {"domain": "tools", "log": log, **keywords}
        with pytest.raises(UserError) as caught:
            refresh(experiment, **asked)
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert found(experiment) is None  # nothing of this left a trace
    with pytest.raises(ConfigError):
        remove(experiment, "spoons")


def test_a_damaged_or_stale_prior_is_refused_and_told_how_to_mend(
    experiment: Experiment, tmp_path: Path, screen: Screen
) -> None:
    log = write_log(tmp_path / "log.parquet", ("u", "Tools-01", 5))
    folder = RunFolder(experiment.run_dir).prior_dir("tools")
    file, manifest = folder / "prior.parquet", folder / "manifest.json"

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-20])

    for harm in (
        lambda: cut(file),
        lambda: cut(manifest),
        file.unlink,
        manifest.unlink,
        lambda: manifest.write_text("[]"),
        lambda: manifest.write_text("{}"),
    ):
        refresh(experiment, "tools", log)
        harm()
        with pytest.raises(ArtifactError, match="damaged; run `rc-ray prior` for tools again"):
            open_catalogue(experiment, "tools")
    refresh(experiment, "tools", log)
    data = experiment.data.model_copy(update={"num_negatives": 5})
    prepare.run(experiment.model_copy(update={"data": data}), console=screen.console)
    with pytest.raises(ArtifactError, match="prepared anew since; run `rc-ray prior`"):
        open_catalogue(experiment, "tools")
    remove(experiment, "tools")
    assert open_catalogue(experiment, "tools").prior_since is None


def test_the_command_line(path: Path, experiment: Experiment, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.parquet", ("u", "Tools-01", 5), ("u", "Spoon", 5))
    call = CliRunner().invoke
    words = ["prior", str(path), "--domain", "tools"]
    done = call(app, [*words, "--log", str(log)])
    assert done.exit_code == 0, done.output
    assert "tools: 1 clicks of 2 rows on 1 of 42 items" in done.output
    assert "left out: 1 rows of 1 items outside the catalogue" in done.output
    assert "fewer clicks than items" in done.output
    assert call(app, [*words, "--remove"]).output == "tools: removed\n"
    assert call(app, [*words, "--remove"]).output == "tools: has no refreshed prior\n"
    for wrong in (words, [*words, "--remove", "--log", str(log)]):
        done = call(app, wrong)
        assert done.exit_code == 2
        assert done.stderr == "error: give either --log PATH, or --remove\n"
