"""The command line: quick help, and mistakes told in plain lines before anything starts."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from rc_ray import demo, recipes
from rc_ray.artifacts import RunFolder, write_manifest
from rc_ray.cli import app
from rc_ray.config import Experiment, load
from rc_ray.errors import ArtifactError
from rc_ray.recipes import Recipe
from rc_ray.status import dump, read_status, refuse_without_inputs
from tests.conftest import Screen
from tests.tiny import make_experiment

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    "import prepare train tune merge evaluate report run serve rank prior show assets demo".split()  # noqa: SIM905
)
BROKEN = {
    "an unknown key": ("train: {lerning_rate: 0.1}", "unknown field `train.lerning_rate`"),
    "a wrong value": ("train: {num_steps: none}", "`train.num_steps`"),
    "an odd batch": ("train: {batch_size: 5, num_workers: 2}", "not divisible"),
    "no YAML": ("train: [", "not valid YAML"),
    "no system": ("evaluate: {systems: []}", "`evaluate.systems`: Input should name at least 1"),
    "no path": ("output_dir: 5", "`output_dir`: Input should be a path"),
    "cut-offs out of order": ("evaluate: {ks: [5, 1]}", "`ks` must rise"),
    "a probe without its list": (
        "evaluate: {probes: [popularity_negatives]}",
        "add `data.more_candidates: {popular: {negatives: popularity, num_negatives: 19}}`",
    ),
}
BASELINES_ALONE = ("data.spirit=[]", "evaluate.systems=[popularity,item_knn]")


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
        (("show", "jobs/demo.yaml", "--set", "train.=5"), "dotted.key=value"),
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


def test_a_run_folder_that_cannot_be_made_names_its_field(tmp_path: Path) -> None:
    path = make_experiment(tmp_path)
    result = call("prepare", str(path), "--set", f"output_dir={path}")
    assert result.exit_code == 2
    assert "experiment.yaml" in result.stderr
    assert "`output_dir` names the folder" in result.stderr
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


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", "data/lamps: not there yet; run `rc-ray prepare` first"),
        ("tune", "data/tools: not there yet; run `rc-ray prepare` first"),
        ("merge", "spirit: not there yet; run `rc-ray train` first"),
        ("evaluate", "spirit: not there yet; run `rc-ray train` first"),
        ("report", "evaluate: not there yet; run `rc-ray evaluate` first"),
        ("serve", "data/tools: not there yet; run `rc-ray prepare` first"),
    ],
)
def test_a_stage_without_its_forerunner_says_which_and_starts_no_ray(
    verb: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("rc_ray.chain.session", session)
    monkeypatch.setattr("rc_ray.cli.session", session)
    result = call(verb, str(make_experiment(tmp_path)))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_ingredient_that_failed_does_not_keep_the_others_from_being_mixed(
    finished: Path,
) -> None:
    """One of two domains lacks its ingredient: the stage runs and names it."""
    both = load(finished, ("data.spirit=[lamps]", "data.ingredients=[rivers, tools]"))
    with pytest.raises(ArtifactError, match="ingredients/rivers: not there yet"):
        recipes.cocktail(both, "rivers").inputs(RunFolder(both.run_dir))
    refuse_without_inputs(both, "merge")


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
        ("train.activation_checkpointing=true", ""),
        ("tune.activation_checkpointing=true", ""),
        ("merge.micro_batch_size=1", ""),
        ("train.num_steps=9", "train merge evaluate report"),
        ("data.spirit=[lamps]", "train merge evaluate report"),
        ("tune.num_valid_users=9", "tune merge evaluate report"),
        ("tune.num_steps=9", "tune merge evaluate report"),
        ("tune.search={learning_rate: [0.1]}", "tune merge evaluate report"),
        ("tune.search={learning_rate: [0.1, 0.2]}", "tune merge evaluate report"),
        ("evaluate.max_titles=4", "tune merge evaluate report"),
        ("merge.num_epochs=2", "merge evaluate report"),
        ("merge.mixes={sum: {method: linear}}", "merge evaluate report"),
        ("evaluate.num_bootstrap=9", "evaluate report"),
    ],
)
def test_show_says_what_the_stages_would_do(finished: Path, override: str, stale: str) -> None:
    assert {one.state for one in read_status(load(finished))} == {"finished"}
    found = [one.stage for one in read_status(load(finished, (override,))) if one.state == "stale"]
    assert found == stale.split()


@pytest.mark.parametrize(
    ("override", "stage", "field"),
    [
        ("data.num_negatives=8", "prepare", "data.num_negatives"),
        ("train.lora.rank=5", "train", "train.lora.rank"),
        ("tune.num_steps=9", "tune", "tune.num_steps"),
        ("tune.num_valid_users=9", "tune", "tune.num_valid_users"),
        ("evaluate.max_titles=4", "tune", "evaluate.max_titles"),
        ("evaluate.gammas=[0.0]", "merge", "evaluate.gammas"),
        ("merge.num_epochs=2", "merge", "merge.num_epochs"),
        ("evaluate.num_bootstrap=9", "evaluate", "evaluate.num_bootstrap"),
    ],
)
def test_show_names_the_field_as_the_file_does(
    finished: Path, override: str, stage: str, field: str
) -> None:
    told = {one.stage: one.detail for one in read_status(load(finished, (override,)))}
    assert f"(`{field}` has changed)" in told[stage]


def test_show_names_what_a_person_set(finished: Path) -> None:
    with_random = "evaluate.systems=[base, spirit, ingredient, random_spirit, cocktail]"
    told = {one.stage: one.detail for one in read_status(load(finished, (with_random,)))}
    assert "the set of mixes that `merge.mixes` and `evaluate.systems` ask for" in told["merge"]


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
        (PermissionError("\x1b[31mred\a"), "error: \ufffd[31mred\ufffd"),
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tolls",), "no cocktail for a domain 'tolls'; did you mean tools? domains: tools"),
        (("lamps",), "no cocktail for a domain 'lamps'; domains: tools"),
        (("tools", "--force"), "--explain merges nothing: run it after `rc-ray merge --force`"),
        (("tools", "--set", "merge.num_epochs=2"), "of other settings or inputs than today's"),
        (("tools",), "weights.json: missing"),
    ],
)
def test_a_cocktail_that_cannot_be_explained_starts_no_ray(
    finished: Path, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("rc_ray.cli.session", session)
    cocktail = RunFolder(load(finished).run_dir).cocktail_dir("tools")
    shutil.copytree(cocktail, cocktail.with_name(".tools.half"))  # of a killed merge
    result = call("merge", str(finished), "--explain", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_was_never_merged_cannot_be_explained(tmp_path: Path) -> None:
    result = call("merge", str(make_experiment(tmp_path)), "--explain", "tools")
    assert result.exit_code == 2
    assert "no cocktail there yet; run `rc-ray merge` first" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_run_leaves_out_what_no_system_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_experiment(tmp_path)
    ran: list[str] = []
    monkeypatch.setattr("rc_ray.chain.session", lambda *_: nullcontext())
    monkeypatch.setattr("rc_ray.chain.run_each", lambda stages, *_: ran.extend(stages))
    overrides = [word for one in BASELINES_ALONE for word in ("--set", one)]
    result = call("run", str(path), *overrides)
    assert result.exit_code == 0, result.output
    assert ran == ["prepare", "evaluate", "report"]
    ran.clear()
    assert call("run", str(path), "--set", "evaluate.systems=[base,ingredient]").exit_code == 0
    assert ran == ["prepare", "tune", "evaluate", "report"]
    ran.clear()
    assert call("run", str(path)).exit_code == 0
    assert ran == ["prepare", "train", "tune", "merge", "evaluate", "report"]


def test_a_spirit_cannot_be_trained_on_nothing(tmp_path: Path) -> None:
    overrides = [word for one in BASELINES_ALONE for word in ("--set", one)]
    result = call("train", str(make_experiment(tmp_path)), *overrides)
    assert result.exit_code == 2
    assert result.stderr == "error: `data.spirit` names no domain, so there is nothing to train\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.spirit=[]",
            "names spirit, uniform, cocktail, guarded, made from a base spirit",
        ),
        ("data.more_candidates={main: {num_negatives: 3}}", "names main and catalogue are taken"),
        ("evaluate.num_catalogue_users=null", "set `evaluate.num_catalogue_users: 0`"),
    ],
)
def test_fields_that_do_not_fit_together_are_told(
    override: str, words: str, tmp_path: Path
) -> None:
    path = make_experiment(tmp_path, train={"style": "instruct"}, tune={"style": "instruct"})
    result = call("run", str(path), "--set", override)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) == 1


def test_show_knows_what_nobody_needs(tmp_path: Path) -> None:
    experiment = load(make_experiment(tmp_path), BASELINES_ALONE)
    states = {one.stage: one.state for one in read_status(experiment)}
    assert states["train"] == states["tune"] == states["merge"] == "unneeded"
    assert states["prepare"] == states["evaluate"] == "missing"


def test_seeds_share_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds, three runs, one split; the summary is worked by hand."""
    path = make_experiment(tmp_path)
    seen: list[Experiment] = []

    def run_each(stages: list[str], experiment: Experiment, *_: object) -> None:
        if stages == ["report"]:
            seen.append(experiment)
            value = {3: 0.1, 4: 0.4, 5: 0.1}[experiment.seed]
            write_results(RunFolder(experiment.run_dir).evaluate_dir, value, experiment.seed)

    monkeypatch.setattr("rc_ray.chain.session", lambda *_: nullcontext())
    monkeypatch.setattr("rc_ray.chain.run_each", run_each)
    result = call("run", str(path), "--seeds", "3")
    assert result.exit_code == 0, result.output
    assert [(one.seed, one.split_seed, one.name) for one in seen] == [
        (3, 3, "tiny-seed3"),
        (4, 3, "tiny-seed4"),
        (5, 3, "tiny-seed5"),
    ]
    folder = tmp_path / "runs" / "tiny-seeds"
    (row,) = pq.read_table(folder / "summary.parquet").to_pylist()
    assert row["mean"] == pytest.approx(0.2)
    assert row["standard_deviation"] == pytest.approx(0.3 / 3**0.5)
    assert (row["lowest"], row["highest"], row["num_seeds"]) == (0.1, 0.4, 3)
    assert "| cocktail | 0.200 ± 0.173 [0.100, 0.400] |" in (folder / "summary.md").read_text()


def write_results(folder: Path, value: float, seed: int) -> None:
    folder.mkdir(parents=True)
    row = {
        "domain": "tools",
        "split": "warm",
        "candidates": "main",
        "system": "cocktail",
        "metric": "HR@1",
        "value": value,
        "ci_low": value,
        "ci_high": value,
        "num_users": 30,
        "num_candidates": 10,
        "seed": seed,
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "results.parquet")
    pair = dict.fromkeys(("system_a", "system_b", "difference", "p_value", "p_adjusted"), None)
    empty = pa.Table.from_pylist([{**row, **pair}]).slice(0, 0)
    pq.write_table(empty, folder / "differences.parquet")
    write_manifest(folder, stage="evaluate", config={}, seed=seed, inputs={}, metrics={})


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
