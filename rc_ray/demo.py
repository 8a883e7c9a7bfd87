"""What the verb `demo` adds to a run: a request to the living endpoint, and the last screen."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.domains import read_domain
from rc_ray.errors import UserError
from rc_ray.progress import Progress

NUM_HISTORY = 5
NUM_ITEMS = 5


class EndpointError(UserError):
    """The endpoint that was just deployed did not answer as it should."""


def ask_the_endpoint(experiment: Experiment, console: Progress) -> None:
    """Deploy on a free port, rank the catalogue for one test user of two domains, take it down.

    Raises:
        EndpointError: a request failed.
    """
    from rc_ray.serve.deployments import deploy, shutdown

    port_of_its_own = experiment.serve.model_copy(update={"port": 0, "host": "127.0.0.1"})
    url = deploy(experiment.model_copy(update={"serve": port_of_its_own}), console, blocking=False)
    try:
        for domain in experiment.data.ingredients[:2]:
            _ask(url, experiment, domain, console)
    finally:
        shutdown()


def _ask(url: str, experiment: Experiment, domain: str, console: Progress) -> None:
    prepared = read_domain(RunFolder(experiment.run_dir).domain_dir(domain))
    cases = prepared.cases("test")[:50]
    if not cases:
        console.note(f"{domain}: no test user to ask for")
        return
    case = max(cases, key=lambda case: len(case.history))
    history = [prepared.titles[item] for item in case.history[-NUM_HISTORY:]]
    start = time.monotonic()
    answer = _post(f"{url}/v1/rank", {"domain": domain, "history": history, "k": NUM_ITEMS})
    milliseconds = 1000 * (time.monotonic() - start)
    console.note(f"POST /v1/rank, {domain}, after {'; '.join(history)}")
    for item in answer["items"]:
        console.note(f"  {item['rank']}. {item['title']}")
    console.note(f"  {milliseconds:.0f} ms for {len(prepared.titles)} titles, {answer['system']}")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    keys = os.environ.get("RC_RAY_API_KEYS", "").split(",")
    if keys[0].strip():
        headers["Authorization"] = f"Bearer {keys[0].strip()}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # A proxy of the environment must not be asked for an address of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise EndpointError(f"{url}: {error.code}: {error.read().decode()[:300]}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise EndpointError(f"{url}: {error}") from None


def last_screen(experiment: Experiment, path: Path) -> None:
    """What was learned, where the report lies and what to try next, on stdout."""
    from rc_ray.report import summary_table
    from rc_ray.results import read_results
    from rc_ray.verdicts import in_short

    run = RunFolder(experiment.run_dir)
    results = read_results(run.evaluate_dir)
    console = Console(highlight=False)
    # A pipe has no width of its own; 80 columns would fold the table of a third domain.
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print()
    console.print(summary_table(results))
    for sentence in in_short(results, experiment.data.tested):
        console.print(f"- {escape(sentence)}", soft_wrap=True)
    program = Path(sys.argv[0]).name
    if Path(sys.argv[0]).absolute().parent == Path(sys.executable).absolute().parent:
        program = os.path.relpath(sys.argv[0])
    domain = read_domain(run.domain_dir(experiment.data.ingredients[0]))
    popular = [domain.titles[item] for item in np.argsort(-domain.num_train)[:2]]
    history = " ".join(f"--history {shlex.quote(title)}" for title in popular)
    console.print(f"\nReport: {escape(str(run.report_dir / 'index.html'))}", soft_wrap=True)
    console.print("Try next:")
    for arguments in (
        f"serve {path}",
        f"rank {path} --domain {domain.name} {history}",
        f"show {path}",
    ):
        console.print(f"  {escape(program)} {escape(arguments)}", soft_wrap=True)
