"""Ray for the length of a stage: a quiet local one, or a cluster that is already there.

Ray is imported inside the functions: its settings are environment variables that it reads when it
is imported, and `rc-ray --help` should not wait for it.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rc_ray.artifacts import RunFolder
from rc_ray.errors import ConfigError

_KNOCK_S = 20.0
_LOG_TAIL_BYTES = 1_000_000
_LOG_TOTAL_BYTES = 20_000_000
_LOG_PATTERNS = ("worker-*.out", "worker-*.err", "raylet.*", "gcs_server.*", "train/*.log")


@contextmanager
def ray_session(
    run: RunFolder,
    *,
    address: str | None = None,
    num_cpus: int | None = None,
    dashboard: bool = False,
    verbose: bool = False,
) -> Iterator[None]:
    """Keep Ray up for the block, with what it prints in `logs/ray.log` of the run.

    Joins `address`, or the cluster that RAY_ADDRESS names (set inside `ray job submit`), or else
    starts Ray on this machine and ends it afterwards. A Ray that this process already uses is used
    and left running. The terminal is the block's `Progress` alone, which must be made before.

    Args:
        run: takes the logs: `ray.log`, and `ray/` with the workers' own when Ray was local.
        address: a cluster's address; None asks the environment.
        num_cpus: logical CPUs of a local Ray; None takes the machine's.
        dashboard: start the dashboard of a local Ray.
        verbose: leave Ray's output on the terminal.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    logs_dir = run.logs_dir.absolute()
    logs_dir.mkdir(parents=True, exist_ok=True)
    with _redirected(None if verbose else logs_dir / "ray.log"):
        # A Ray in use has its way of telling friends from strangers; nodes that this process adds
        # to it, or programs that it starts, could not join with another.
        in_use = "ray" in sys.modules and sys.modules["ray"].is_initialized()
        _set_environment(local=address is None and not in_use)
        import ray

        if ray.is_initialized():
            yield
            return
        logging_level = "INFO" if verbose else "ERROR"
        session_dir: Path | None = None
        try:
            if address is None:
                session_dir = _start_local(num_cpus, dashboard, verbose, logging_level)
            else:
                _join(address, verbose, logging_level)
            yield
        finally:
            ray.shutdown()
            if session_dir is not None:
                _copy_logs(session_dir / "logs", logs_dir / "ray")


def require_resources(
    what: str, *, cpus: float, gpus: float = 0.0, memory: float = 0.0, count: int = 1
) -> None:
    """Refuse at once what Ray would wait for without end.

    Args:
        what: the fields that ask, e.g. "`train.num_workers` and `train.cpus_per_worker`".
        cpus: logical CPUs of each process.
        gpus: GPUs of each process; shares of one count.
        memory: bytes of main memory of each process.
        count: processes that must run at the same time.

    Raises:
        ConfigError: the cluster, at its largest where it can grow, does not have them.
    """
    import ray
    import ray._private.state

    if num_fitting(cpus, gpus, memory) >= count:
        return
    num_nodes = len(_live_nodes())
    total = ray.cluster_resources()
    # An autoscaler writes what it may grow to into the cluster's own record.
    limits: dict[str, float] | None = (
        ray._private.state.state.get_max_resources_from_cluster_config()
    )
    if limits is not None and _fitting(limits, cpus, gpus, memory) >= count:
        return
    wanted = f"{count} x ({resources_text(cpus, gpus, memory)})"
    there = f"{total.get('CPU', 0.0):g} CPU and {total.get('GPU', 0.0):g} GPU"
    if memory:
        there += f", {total.get('memory', 0.0) / 1e9:.1f} GB"
    nodes_text = f" on {num_nodes} nodes" if num_nodes > 1 else ""
    raise ConfigError(
        f"{what} ask for {wanted}, the cluster has {there}{nodes_text}; "
        "lower these fields or join a larger cluster (`--address`)"
    )


def resources_text(cpus: float, gpus: float, memory: float = 0.0) -> str:
    """`2 CPU, 0.5 GPU, 3.0 GB`, without what is not asked for."""
    parts = [f"{cpus:g} CPU"]
    parts += [f"{gpus:g} GPU"] if gpus else []
    parts += [f"{memory / 1e9:.1f} GB"] if memory else []
    return ", ".join(parts)


def num_fitting(cpus: float, gpus: float, memory: float = 0.0) -> int:
    """How many processes of this size the live nodes hold together; none spans two nodes.

    Args:
        cpus: logical CPUs of each process.
        gpus: GPUs of each process; shares of one count.
        memory: bytes of main memory of each process.
    """
    return sum(_fitting(resources, cpus, gpus, memory) for resources in _live_nodes())


def _live_nodes() -> list[dict[str, Any]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(resources: dict[str, Any], cpus: float, gpus: float, memory: float = 0.0) -> int:
    """How many processes of this size fit into one node's resources together."""
    fits = []
    if cpus > 0:
        fits.append(float(resources.get("CPU", 0.0)) / cpus)
    if gpus >= 1:
        fits.append(float(resources.get("GPU", 0.0)) / gpus)
    elif gpus > 0:  # a share of a GPU never spans two of them
        fits.append(float(resources.get("GPU", 0.0)) * int(1 / gpus + 1e-9))
    if memory > 0:
        fits.append(float(resources.get("memory", 0.0)) / memory)
    return int(min(fits) + 1e-9) if fits else sys.maxsize


def _set_environment(*, local: bool) -> None:
    """Settings that Ray and the Hugging Face libraries read when they are imported.

    A local Ray's workers inherit them. What the user has set stands.
    """
    settings = {
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # A report waits for the controller's next look, which is 2 s away by default.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train|Reporting training result",
        # A worker that asked for no GPU sees none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DEEPSPEED_LOG_LEVEL": "error",
        # A sweep keeps its own records; Tune's books serve to go on after a killed driver.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
        "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    }
    if local:
        # Without a token any process on the network could run code in this Ray.
        settings["RAY_AUTH_MODE"] = "token"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _start_local(num_cpus: int | None, dashboard: bool, verbose: bool, logging_level: str) -> Path:
    """Start Ray on this machine; the folder in which it keeps its logs.

    Raises:
        ConfigError: the machine is too busy for Ray to come up.
    """
    import ray
    from ray._raylet import Config  # type: ignore[attr-defined]

    # Who has asked Ray anything before, in this process, made it read its settings then: the
    # driver would know of no token, and the Ray that it starts would want one.
    Config.initialize("")
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    # "local": without it Ray joins whatever cluster this machine last recorded, dead ones included.
    try:
        context = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            log_to_driver=verbose,
            logging_level=logging_level,
        )
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no class of its own for it
            raise
        raise ConfigError(
            "Ray did not come up on this machine in time, which is too busy or short of memory; "
            "start the same command again when less runs beside it"
        ) from error
    if not had_token and token.exists():
        token.chmod(0o600)  # Ray makes it readable by everyone
    return Path(context.address_info["session_dir"])


def _join(address: str, verbose: bool, logging_level: str) -> None:
    import ray

    try:
        _knock(address)
        ray.init(address=address, log_to_driver=verbose, logging_level=logging_level)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"no Ray cluster answers at {address} ({reason[0]}); check the address or RAY_ADDRESS, "
            "and RAY_AUTH_TOKEN if the cluster wants a token"
        ) from error


def _knock(address: str) -> None:
    """Raise ConnectionError where nobody listens at `host:port`: Ray would try for minutes."""
    if address.startswith(("http://", "https://")):
        raise ConnectionError("it is the Jobs API's; `ray job submit` takes it, a driver host:port")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(getattr(error, "strerror", None) or str(error)) from None


@contextmanager
def _redirected(path: Path | None) -> Iterator[None]:
    """Send descriptors 1 and 2 of this process, and of those it starts, to the end of `path`."""
    if path is None:
        yield
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, log):
            os.close(descriptor)


def _copy_logs(source: Path, target: Path) -> None:
    """Copy the ends of the newest logs; the logs of a run before in `target` go."""
    shutil.rmtree(target, ignore_errors=True)
    found = {path for pattern in _LOG_PATTERNS for path in source.glob(pattern) if path.is_file()}
    left = _LOG_TOTAL_BYTES
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        size = path.stat().st_size
        if size == 0 or left <= 0:
            continue
        copy = target / path.relative_to(source)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                file.seek(max(0, size - min(left, _LOG_TAIL_BYTES)))
                left -= copy.write_bytes(file.read(_LOG_TAIL_BYTES))
        except OSError as error:
            logging.getLogger(__name__).warning("%s: not copied: %s", path, error)
