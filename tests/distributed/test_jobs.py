"""The pipeline as a job, submitted over HTTP to a cluster of its own that asks for a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rc_ray.config import load
from rc_ray.status import read_status
from tests.tiny import make_experiment

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
START_LIMIT_S = 90.0
JOB_LIMIT_S = 420.0


@dataclass(frozen=True)
class Cluster:
    url: str
    token: str


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def status_of(url: str, token: str | None) -> int | None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with OPENER.open(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node with a dashboard in processes of its own; ended by its process group alone."""
    token = secrets.token_hex(32)
    gcs, dashboard, agent, agent_grpc, runtime_env, client, metrics = free_ports(7)
    # Short: the path of a Unix socket lies below it, and 107 characters are all it may have.
    temporary = Path(tempfile.mkdtemp(prefix="rcj", dir="/tmp"))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log_path = temporary / "start.log"
    with log_path.open("w") as log:
        head = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "ray"),
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                f"--temp-dir={temporary}",
                "--node-ip-address=127.0.0.1",
                f"--port={gcs}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}",
                f"--dashboard-agent-grpc-port={agent_grpc}",
                f"--runtime-env-agent-port={runtime_env}",
                f"--ray-client-server-port={client}",
                f"--metrics-export-port={metrics}",
                "--disable-usage-stats",
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while status_of(f"{url}/api/jobs/", token) != 200:
            assert head.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.5)
        yield Cluster(url, token)
    finally:
        # With --block the first process ends all others that it started.
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_submitted_job_leaves_a_finished_run(cluster: Cluster, tmp_path: Path) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    assert status_of(f"{cluster.url}/api/jobs/", None) == 401
    path = make_experiment(tmp_path, train={"num_steps": 3, "batch_size": 4, "max_titles": 8})
    client = JobSubmissionClient(cluster.url, headers={"Authorization": f"Bearer {cluster.token}"})
    job = client.submit_job(
        entrypoint=f"python jobs/pipeline.py {path} --set evaluate.num_test_users=5",
        runtime_env={
            "working_dir": str(ROOT),
            "excludes": ["/.git", "/.venv", "/runs", "/docs", "/tests"],
        },
    )
    deadline = time.monotonic() + JOB_LIMIT_S
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(1.0)
    logs = client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs
    experiment = load(path, ("evaluate.num_test_users=5",))
    assert {one.stage: one.state for one in read_status(experiment)} == dict.fromkeys(
        ("prepare", "train", "tune", "merge", "evaluate", "report"), "finished"
    )
    page = (experiment.run_dir / "report" / "index.html").read_text()
    assert "Systems on <code>tools</code>" in page
    # Ours, not Ray's, is what the job's log tells.
    assert "merge: the cocktails" in logs
    assert "ray::" not in logs
