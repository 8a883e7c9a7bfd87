"""The command line: quick help, and mistakes told in plain lines before anything starts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from rc_ray.cli import app
from rc_ray.config import load
from rc_ray.status import dump, read_status
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
