"""The command line: quick help, and mistakes told in plain lines before anything starts."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from rc_ray import demo, recipes
from rc_ray.artifacts import RunFolder, write_manifest
from rc_ray.cli import app
from rc_ray.config import Experiment, load
from rc_ray.recipes import Recipe
from rc_ray.status import dump, read_status
from tests.conftest import Screen
from tests.tiny import make_experiment

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    "prepare train tune merge evaluate report run serve rank show assets demo".split()  # noqa: SIM905
)
BROKEN = {
    "an unknown key": ("train: {lerning_rate: 0.1}", "unknown field `train.lerning_rate`"),
    "a wrong value": ("train: {num_steps: none}", "`train.num_steps`"),
    "an odd batch": ("train: {batch_size: 5, num_workers: 2}", "not divisible"),
    "no YAML": ("train: [", "not valid YAML"),
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_is_instant() -> None:
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "rc_ray.cli", "--help"], check=True, capture_output=True, cwd=ROOT
    )
    # Torch alone takes longer than this on the same machine.
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_experiment_is_one_plain_line(case: str, tmp_path: Path) -> None:
    text, words = BROKEN[case]
    path = tmp_path / "broken.yaml"
    path.write_text(
        "name: broken\n"
        "data:\n"
        "  sources: [{format: movielens-100k, genre_domains: {a: [A], b: [B]}}]\n"
        "  spirit: [a]\n"
        "  ingredients: [b]\n"
        f"{text}\n"
    )
    result = call("run", str(path))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml: no such experiment file"),
        (("run", "."), "is a folder"),
        (("show", "jobs/demo.yaml", "--set", "train.num_steps"), "dotted.key=value"),
        (("show", "jobs/demo.yaml", "--set", "data.spirit=[comedy, action]"), "action"),
    ],
)
def test_a_wrong_request_is_one_plain_line(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_file_starts_no_ray(tmp_path: Path) -> None:
    path = make_experiment(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["data"]["sources"][0]["path"] = str(tmp_path / "nowhere")
    path.write_text(yaml.safe_dump(raw))
    program = (
        "import sys\n"
        "from rc_ray.cli import app\n"
        "try:\n"
        f"    app(['run', {str(path)!r}])\n"
        "except SystemExit as end:\n"
        "    print('code', end.code, 'ray' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "code 2 False" in done.stdout
    assert "nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_stage_without_its_forerunner_says_which(tmp_path: Path) -> None:
    path = make_experiment(tmp_path)
    result = call("report", str(path))
    assert result.exit_code == 2
    assert "evaluate" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_ends_with_130(
    raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("rc_ray.prepare.run", interrupted)
    result = call("prepare", str(make_experiment(tmp_path)))
    assert result.exit_code == 130
    assert "stopped" in result.stderr


def test_show_tells_missing_finished_and_stale(tmp_path: Path) -> None:
    path = make_experiment(tmp_path)

    def states(*overrides: str) -> dict[str, str]:
        return {one.stage: one.state for one in read_status(load(path, overrides))}

    assert set(states().values()) == {"missing"}
    assert call("prepare", str(path)).exit_code == 0
    assert states()["prepare"] == "finished"
    assert states("seed=4")["prepare"] == "stale"
    assert states("data.num_negatives=8")["prepare"] == "stale"
    assert states("train.num_steps=9")["prepare"] == "finished"
    shown = call("show", str(path)).stdout
    assert "# prepare   finished" in shown
    assert "# train     missing" in shown


def sealed(folder: Path, stage: str, experiment: Experiment, recipe: Recipe) -> None:
    """A stage folder as the stage would seal it, without its files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(
        folder,
        stage=stage,
        config=recipe.config,
        seed=experiment.seed,
        inputs=recipe.inputs(RunFolder(experiment.run_dir)),
        metrics={},
    )


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The experiment file of a run whose stages all have a manifest."""
    path = make_experiment(tmp_path)
    assert call("prepare", str(path)).exit_code == 0
    experiment = load(path)
    run = RunFolder(experiment.run_dir)
    sealed(run.spirit_dir, "train", experiment, recipes.spirit(experiment))
    tools = recipes.ingredient(experiment, "tools")
    sealed(run.ingredient_dir("tools"), "tune", experiment, tools)
    cocktail = recipes.cocktail(experiment, "tools")
    sealed(run.cocktail_dir("tools"), "merge", experiment, cocktail)
    sealed(run.evaluate_dir, "evaluate", experiment, recipes.evaluation(experiment))
    sealed(run.report_dir, "report", experiment, recipes.report(experiment))
    return path


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("train.num_workers=2", ""),
        ("evaluate.tokens_per_batch=64", ""),
        ("serve.port=9", ""),
        ("train.micro_batch_size=2", ""),
        ("tune.micro_batch_size=2", ""),
        ("merge.micro_batch_size=1", ""),
        ("train.num_steps=9", "train merge evaluate report"),
        ("data.spirit=[lamps]", "train merge evaluate report"),
        ("tune.num_valid_users=9", "tune merge evaluate report"),
        ("tune.num_steps=9", "tune merge evaluate report"),
        ("tune.search={learning_rate: [0.1]}", "tune merge evaluate report"),
        ("tune.search={learning_rate: [0.1, 0.2]}", "tune merge evaluate report"),
        ("evaluate.max_titles=4", "tune merge evaluate report"),
        ("merge.num_epochs=2", "merge evaluate report"),
        ("evaluate.num_bootstrap=9", "evaluate report"),
    ],
)
def test_show_says_what_the_stages_would_do(finished: Path, override: str, stale: str) -> None:
    assert {one.state for one in read_status(load(finished))} == {"finished"}
    found = [one.stage for one in read_status(load(finished, (override,))) if one.state == "stale"]
    assert found == stale.split()


def test_show_knows_another_method(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rc_ray.artifacts.METHOD", 99)
    assert {one.state for one in read_status(load(finished))} == {"stale"}
    assert "another version of the method" in read_status(load(finished))[0].detail


def test_no_stage_builds_on_a_stale_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("rc_ray.report.run", lambda *_, **__: ran.append("report"))
    monkeypatch.setattr("rc_ray.prepare.run", lambda *_, **__: ran.append("prepare"))
    config = load(finished).run_dir / "config.yaml"
    kept = config.read_text()
    result = call("report", str(finished), "--set", "tune.num_steps=9")
    assert result.exit_code == 2
    assert "`tune` in" in result.stderr
    assert f"run `rc-ray tune {finished}`" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert config.read_text() == kept
    # A stage that is made anew, or is not built on, may be stale.
    assert call("report", str(finished)).exit_code == 0
    assert call("report", str(finished), "--set", "evaluate.tokens_per_batch=64").exit_code == 0
    assert call("prepare", str(finished), "--set", "seed=4").exit_code == 0
    assert ran == ["report", "report", "prepare"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.npy"), "x.npy: No space left on dev"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory"),
        (PermissionError("not\nallowed"), "error: not"),
    ],
)
def test_what_the_system_refuses_is_one_plain_line(
    error: OSError, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("rc_ray.prepare.run", refused)
    path = make_experiment(tmp_path)
    result = call("prepare", str(path))
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert call("prepare", str(path), "--verbose").exception is error


def test_the_demo_asks_nothing_where_nobody_is_tested(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Nobody:
        def cases(self, _: str) -> list[object]:
            return []

    monkeypatch.setattr(demo, "read_domain", lambda _: Nobody())
    demo._ask("http://nowhere", load(make_experiment(tmp_path)), "tools", screen.console)
    assert "tools: no test user" in screen.text


def test_the_written_config_reads_back_as_the_same_experiment(tmp_path: Path) -> None:
    path = make_experiment(tmp_path)
    assert call("prepare", str(path), "--set", "seed=11").exit_code == 0
    experiment = load(path, ("seed=11",))
    assert load(experiment.run_dir / "config.yaml") == experiment
    assert "seed: 11" in dump(experiment)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    assert load(path).name == path.stem


def test_the_demo_has_the_seven_domains_in_their_order() -> None:
    source = load(ROOT / "jobs/demo.yaml").data.sources[0]
    assert list(getattr(source, "genre_domains", {})) == [
        "family",
        "scifi_fantasy",
        "horror_thriller",
        "action",
        "romance",
        "comedy",
        "drama_documentary",
    ]
