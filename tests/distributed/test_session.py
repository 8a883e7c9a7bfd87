"""A session of Ray: silent, its logs kept, what was asked for refused in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rc_ray.artifacts import RunFolder
from rc_ray.errors import ConfigError
from rc_ray.session import _start_local, ray_session, require_resources

pytestmark = pytest.mark.distributed

PROGRAM = """
import sys
from pathlib import Path
from rc_ray.artifacts import RunFolder
from rc_ray.progress import Progress
from rc_ray.session import ray_session

with Progress() as console:
    console.note("before")
    try:
        with ray_session(RunFolder(Path(sys.argv[1])), num_cpus=1):
            import ray

            @ray.remote
            def speak():
                print("a worker speaks")
                print("a worker complains", file=sys.stderr)
                return 7

            print("the driver speaks")
            console.note(f"answer {ray.get(speak.remote())}")
            raise KeyError("inside")
    except KeyError:
        console.note("ended")
    assert not ray.is_initialized()
    print("after")
"""


USED_BEFORE = """
import ray
from ray._raylet import get_authentication_mode

get_authentication_mode()  # read from the environment once, and kept
"""


@pytest.mark.parametrize("before", ["", USED_BEFORE])
def test_nothing_of_ray_reaches_the_terminal(tmp_path: Path, before: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", before + PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "  before\n  answer 7\n  ended\nafter\n"
    assert done.stderr == ""
    assert "the driver speaks" in (tmp_path / "logs" / "ray.log").read_text()
    logs = list((tmp_path / "logs" / "ray").glob("worker-*"))
    everything = "".join(path.read_text(errors="replace") for path in logs)
    assert "a worker speaks" in everything
    assert "a worker complains" in everything


def test_descriptors_come_back_after_an_error(ray_local, tmp_path: Path, capfd) -> None:
    def fail() -> None:
        with ray_session(RunFolder(tmp_path)):
            os.write(1, b"inside\n")
            os.write(2, b"inside too\n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    os.write(1, b"outside\n")
    captured = capfd.readouterr()
    assert captured.out == "outside\n"
    assert captured.err == ""
    assert (tmp_path / "logs" / "ray.log").read_text() == "inside\ninside too\n"


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    """In a program of its own: this one may use a Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there once it is closed
    for address in (f"127.0.0.1:{port}", "127.0.0.1:99999", f"http://127.0.0.1:{port}"):
        program = (
            "from rc_ray import session\n"
            f"try:\n    session._join({address!r}, False, 'ERROR')\n"
            "except Exception as error:\n    print(type(error).__name__, error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True
        )
        assert done.stdout.startswith(f"ConfigError no Ray cluster answers at {address} (")


def test_a_ray_in_use_is_left_running(
    ray_local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with ray_session(RunFolder(tmp_path), num_cpus=1):
        assert ray.cluster_resources()["CPU"] == 4
        # A node that joins from here has to agree with those that are there.
        assert "RAY_AUTH_MODE" not in os.environ
    assert ray.is_initialized()


def test_resources_are_counted_in_whole_processes(ray_local) -> None:
    require_resources("`x`", cpus=1, count=4)
    require_resources("`x`", cpus=0.5, count=8)
    require_resources("`x`", cpus=0)
    with pytest.raises(ConfigError, match=r"`x` ask for 2 x \(3 CPU\), the cluster has 4 CPU"):
        require_resources("`x`", cpus=3, count=2)
    with pytest.raises(ConfigError, match=r"1 x \(1 CPU, 0.5 GPU\).*0 GPU"):
        require_resources("`x`", cpus=1, gpus=0.5)


def test_a_ray_that_does_not_come_up_is_one_plain_line(monkeypatch) -> None:
    import ray

    def crawl(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", crawl)
    with pytest.raises(ConfigError, match="Ray did not come up on this machine in time"):
        _start_local(1, dashboard=False, verbose=False, logging_level="error")
