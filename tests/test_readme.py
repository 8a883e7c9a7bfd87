"""The README against the project: its commands, paths, fields, files and own-logs example."""

from __future__ import annotations

import csv
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from rc_ray.artifacts import RunFolder
from rc_ray.cli import app
from rc_ray.config import Experiment, ServeConfig, load
from rc_ray.core.adapters import save_adapter
from rc_ray.data_config import ColumnMap, CsvSource
from tests.core.test_model import random_adapter
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
OWN_LOGS = "shop.yaml"
"""The file name that the README gives to its own-logs example."""
NUM_ITEMS = 40


def blocks(*languages: str) -> list[str]:
    """Bodies of the README's fenced code blocks in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands() -> list[tuple[dict[str, str], list[str]]]:
    """Every shell command: the variables it sets, and its words."""
    found = []
    for body in blocks("bash", "console", "sh", "shell"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            variables = {}
            while words and re.fullmatch(r"[A-Z][A-Z_]*=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[name] = value
            if words:
                found.append((variables, words))
    return found


COMMANDS = commands()


def of(*program: str) -> list[list[str]]:
    """What follows the program (and its first verbs) in each of its commands."""
    number = len(program)
    return [words[number:] for _, words in COMMANDS if tuple(words[:number]) == program]


def parse(command: Any, words: list[str]) -> dict[str, Any]:
    """Parameters of the innermost command; works on click and on Typer's own copy of it."""
    name = command.name or "top"
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no such verb: {name}"
        command = command.commands[name]
    values: dict[str, Any] = command.make_context(name, list(words)).params
    return values


def rc_ray(words: list[str]) -> None:
    """Parse a command line; where it names an experiment of the repository, its fields too."""
    values = parse(typer.main.get_command(app), words)
    path = values.get("experiment")
    if path is None:
        return
    if str(path) == OWN_LOGS:
        (text,) = own_logs()
        raw = yaml.safe_load(text)
        for override in values.get("overrides") or ():
            key, _, value = override.partition("=")
            section, _, leaf = key.rpartition(".")
            (raw.setdefault(section, {}) if section else raw)[leaf] = yaml.safe_load(value)
        Experiment.model_validate(raw)
    else:
        experiment = load(ROOT / path, tuple(values.get("overrides") or ()))
        if "domain" in values:
            assert values["domain"] in experiment.data.ingredients


def own_logs() -> list[str]:
    return [body for body in blocks("yaml") if body.startswith("name: shop")]


def code_spans(text: str) -> Iterator[str]:
    """Inline code outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", prose)


def test_every_command_is_of_a_kind_that_is_checked_below() -> None:
    checked = {"rc-ray", "make", "ray", "kubectl", "docker", "curl", "source", "export", "vllm"}
    assert {words[0] for _, words in COMMANDS} == checked
    assert [words for words in of("source")] == [[".venv/bin/activate"]]


@pytest.mark.parametrize("words", of("rc-ray"), ids=shlex.join)
def test_rc_ray_takes_the_command(words: list[str]) -> None:
    rc_ray(words)


def test_the_table_of_verbs_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (?:`\w+/` )?\|$", README, re.MULTILINE)
    assert sorted(rows) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {word for words in of("make") for word in words}
    named |= {span.split()[1] for span in code_spans(README) if span.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("words", of("ray"), ids=shlex.join)
def test_ray_takes_the_command(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    values = parse(cli, words)
    if "cluster_config_file" in values:
        assert (ROOT / values["cluster_config_file"]).is_file()
    if "entrypoint" in values:
        python, script, *arguments = values["entrypoint"]
        assert (python, script) == ("python", "jobs/pipeline.py")
        rc_ray(["run", *arguments])


def test_a_job_is_submitted_to_an_address() -> None:
    """Where none is given or exported, Ray looks for a cluster on this machine and finds none."""
    texts = [*blocks("bash"), *(path.read_text() for path in (ROOT / "cluster").rglob("*.yaml"))]
    submitting = [text for text in texts if "ray job submit" in text]
    assert submitting
    for text in submitting:
        exported = "export RAY_ADDRESS=http" in text
        for line in re.findall(r"ray job submit.*", text):
            assert exported or "--address http://" in line, line


def test_kubectl_applies_what_is_there() -> None:
    for words in of("kubectl"):
        if words[:2] == ["apply", "-f"]:
            assert (ROOT / words[2]).is_file()
            continue
        # The secret is the one that the service reads.
        assert words[:3] == ["create", "secret", "generic"]
        key = words[4].removeprefix("--from-literal=").partition("=")[0]
        service = (ROOT / "cluster/kuberay/rayservice.yaml").read_text()
        assert f"{{name: {words[3]}, key: {key}}}" in service


def test_docker_uses_the_names_of_makefile_and_manifests() -> None:
    (tag,), (push,) = of("docker", "tag"), of("docker", "push")
    local, remote = tag
    assert push == [remote]
    assert f"--tag {local} " in (ROOT / "Makefile").read_text()
    manifests = [*(ROOT / "cluster").rglob("*.yaml")]
    assert manifests
    for path in manifests:
        assert f"image: {remote}\n" in path.read_text(), path


def test_curl_asks_what_the_service_answers() -> None:
    from rc_ray.serve.api import make_api
    from rc_ray.serve.catalogue import Limits
    from rc_ray.serve.schemas import RankRequest, RankResponse

    limits = Limits(max_history=1, max_candidates=1, max_titles=1, max_title_characters=1)
    api = make_api(catalogues={}, infos=[], limits=limits, rank=None)  # type: ignore[arg-type]
    demo = load(ROOT / "jobs/demo.yaml")
    base = f"http://{ServeConfig().host}:{ServeConfig().port}"
    bodies = 0
    assert of("curl")
    for url, *options in of("curl"):
        assert url.startswith(base)
        assert set(options[::2]) <= {"-H", "-d"}
        method = "get"
        for option, value in zip(options[::2], options[1::2], strict=True):
            if option == "-d":
                method, bodies = "post", bodies + 1
                request = RankRequest.model_validate_json(value)
                assert request.domain in demo.data.ingredients
        assert method in api.openapi()["paths"][url.removeprefix(base)]
    assert bodies
    for body in blocks("json"):
        RankResponse.model_validate_json(body)


def test_vllm_is_given_the_paper_runs_cocktails_and_their_rank() -> None:
    paper = load(ROOT / "jobs/paper.yaml")
    ((base, *options),) = of("vllm", "serve")
    assert base == paper.model.path
    modules = options[options.index("--lora-modules") + 1 :]
    assert len(modules) > 1
    for module in modules:
        domain, _, path = module.partition("=")
        assert domain in paper.data.ingredients
        assert path == str(RunFolder(paper.run_dir).cocktail_dir(domain))
    rank = paper.train.lora.rank + paper.tune.lora.rank
    assert options[options.index("--max-lora-rank") + 1] == str(rank)


def test_plain_peft_loads_an_adapter_as_written(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", random_adapter(1), "tiny")
    (code,) = blocks("python")
    paper = load(ROOT / "jobs/paper.yaml")
    cocktail_dir = str(RunFolder(paper.run_dir).cocktail_dir("beauty"))
    for there, here in ((paper.model.path, model_dir), (cocktail_dir, tmp_path / "adapter")):
        assert f'"{there}"' in code
        code = code.replace(there, str(here))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].peft_config["default"].r == 3


def test_variables_are_those_that_the_code_reads() -> None:
    from rc_ray.assets import CACHE_VARIABLE
    from rc_ray.serve.api import API_KEYS_VARIABLE

    known = {CACHE_VARIABLE, API_KEYS_VARIABLE}
    assert set(re.findall(r"\bRC_RAY_\w+", README)) <= known
    named = {name for variables, _ in COMMANDS for name in variables}
    named |= {words[0].partition("=")[0] for words in of("export")}
    assert named <= known | {"RAY_ADDRESS", "RAY_AUTH_MODE"}


@pytest.mark.parametrize("text", [README, METHOD], ids=["README", "method"])
def test_paths_exist(text: str) -> None:
    folder = ROOT if text is README else ROOT / "docs"
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for link in links:
        assert (folder / link).exists(), link
    tops = r"(?:rc_ray|jobs|cluster|tests|docs|\.ci)"
    paths = set(re.findall(rf"(?<![\w./]){tops}/[\w./-]*\w", text))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("text", [README, METHOD], ids=["README", "method"])
def test_fields_exist(text: str) -> None:
    sections = "|".join(Experiment.model_fields)
    for span in code_spans(text):
        found = re.fullmatch(rf"((?:{sections})\.[a-z_.]+)(?:=\S+)?", span)
        model: Any = Experiment
        for part in found[1].split(".") if found else ():
            assert issubclass(model, BaseModel), span
            assert part in model.model_fields, span
            model = model.model_fields[part].annotation


def test_the_column_map_is_complete() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \| .* \|$", README, re.MULTILINE))
    defaults = {name: field.default for name, field in ColumnMap.model_fields.items()}
    assert {name: None if text == "null" else text for name, text in rows.items()} == defaults


def entries(block: str) -> Iterator[str]:
    """Paths of a drawn tree: two blanks a level, a slash after a folder, then a description."""
    folders: list[str] = []
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        del folders[len(indent) // 2 :]
        yield "/".join([*folders, name.rstrip("/")])
        if name.endswith("/"):
            folders.append(name.rstrip("/"))


def test_the_tree_lists_every_file_of_the_package() -> None:
    (tree,) = (body for body in blocks("text") if body.startswith("rc_ray/\n"))
    listed = list(entries(tree))
    assert len(listed) == len(set(listed))
    for path in listed:
        assert (ROOT / path).exists(), path
    for line in tree.splitlines():
        # Only a folder whose files follow may go without words.
        assert len(line.split(maxsplit=1)) == 2 or line.endswith("/"), line
    there = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.html", "*.css", "*.js")
        for path in (ROOT / "rc_ray").rglob(pattern)
    }
    assert {path for path in listed if path.startswith("rc_ray/") and "." in path} == there
    for folder in ("jobs", "cluster", "docs"):
        files = {path for path in listed if path.startswith(f"{folder}/")}
        assert files >= {str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*.*")}


def test_the_run_folder_is_as_drawn() -> None:
    (drawn,) = (body for body in blocks("text") if body.startswith("runs/demo/\n"))
    run = RunFolder(ROOT / "runs/demo")
    paths = [run.config_path, run.logs_dir, run.spirit_dir, run.evaluate_dir, run.report_dir]
    paths += [run.sweep_path, run.search_path, run.explanation_path("<domain>")]
    of_domain = [run.domain_dir, run.held_out_dir, run.ingredient_dir, run.joint_dir]
    of_domain += [run.cocktail_dir, run.prior_dir]
    paths += [make("<domain>") for make in of_domain]
    expected = {str(path.relative_to(ROOT)) for path in paths}
    assert set(entries(drawn)) - {"runs/demo"} == expected


def test_every_yaml_block_is_an_experiment(tmp_path: Path) -> None:
    found = blocks("yaml", "yml")
    assert own_logs()
    for body in found:
        path = tmp_path / "experiment.yaml"
        path.write_text(body)
        load(path)


def test_own_logs_are_prepared_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML of the README over logs with the columns of its CSV examples, through its command.

    `rc-ray run` is the other command there: the same file, parsed above, through stages that tests
    of their own run.
    """
    assert [words for words in of("rc-ray", "prepare")] == [[OWN_LOGS]]
    (text,) = own_logs()
    assert len(text.splitlines()) <= 12
    path = tmp_path / OWN_LOGS
    path.write_text(text)
    log, items = (next(csv.reader(io.StringIO(body))) for body in blocks("csv"))
    experiment = load(path)
    for source in experiment.data.sources:
        assert isinstance(source, CsvSource)
        assert source.interactions.is_relative_to(tmp_path)
        write_csv(source, log, items)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["prepare", OWN_LOGS])
    assert result.exit_code == 0, result.output
    data = tmp_path / "runs" / "shop" / "data"
    assert sorted(one.name for one in data.iterdir()) == ["books", "toys"]
    assert (data / "toys" / "candidates.parquet").is_file()


def write_csv(source: CsvSource, log: list[str], items: list[str]) -> None:
    """Both files of a source: 30 users who take every seventh item, from a place of their own."""
    columns = source.columns
    source.interactions.parent.mkdir(exist_ok=True)
    with source.items.open("w", newline="") as file:
        table = csv.DictWriter(file, items)
        table.writeheader()
        for item in range(NUM_ITEMS):
            row = {columns.item_id: f"i{item}", columns.title: f"{source.domain} no. {item}"}
            table.writerow(row)
    with source.interactions.open("w", newline="") as file:
        table = csv.DictWriter(file, log)
        table.writeheader()
        for user in range(30):
            for step in range(8):
                row = {
                    columns.user_id: f"u{user}",
                    columns.item_id: f"i{(user + 7 * step) % NUM_ITEMS}",
                    str(columns.timestamp): str(1_700_000_000 + 60 * step),
                }
                table.writerow(row)


@pytest.mark.parametrize("text", [README, METHOD], ids=["README", "method"])
def test_nothing_of_one_machine_stands_in_it(text: str) -> None:
    assert not re.search(r"/(work|home|root|tmp|Users)/", text)
    hosts = set(re.findall(r"https?://([^/:)\s]+)", text))
    assert hosts <= {"arxiv.org", "doi.org", "127.0.0.1"}
