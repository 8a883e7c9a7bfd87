"""The service on Ray Serve: an HTTP ingress in front of autoscaled replicas of one base LLM.

The ingress checks keys and requests against the catalogues, so a mistake never reaches a model. A
model replica holds the base LLM once and the adapters of all domains, which are megabytes, and
scores requests that arrive together in one batch.

Import this module inside `ray_session`: Ray reads its settings when it is imported.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from rc_ray.assets import model_dir
from rc_ray.config import Experiment, ServeConfig, load
from rc_ray.errors import ConfigError
from rc_ray.progress import Progress
from rc_ray.serve.api import API_KEYS_VARIABLE, api_key_digests, make_api
from rc_ray.serve.calibration import told_by_calibrations
from rc_ray.serve.catalogue import Query
from rc_ray.serve.schemas import RankResponse, RequestError
from rc_ray.serve.scoring import (
    RankService,
    check_adapter_files,
    describe,
    limits_of,
    open_catalogue,
    open_language_model,
)
from rc_ray.serve.served import served_domains, told_by_system
from rc_ray.session import require_resources

APPLICATION = "rc_ray"
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_QUEUED_BATCHES = 16
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class ServeArguments(BaseModel):
    """What a Serve config file passes to `build`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    experiment: Path
    """The experiment file, on storage that the cluster's nodes see."""
    overrides: tuple[str, ...] = ()
    """`dotted.key=value` settings."""


class RankModel:
    """A model replica; ready once every domain's adapter has scored its catalogue."""

    def __init__(self, experiment: Experiment) -> None:
        self._service = RankService(experiment, open_language_model(experiment))
        config = experiment.serve
        self._batched: Callable[[Query], Awaitable[RankResponse | RequestError]] = serve.batch(
            self._rank_batch,
            max_batch_size=config.max_batch_size,
            batch_wait_timeout_s=config.batch_wait_timeout_s,
        )

    async def rank(self, query: Query) -> RankResponse | RequestError:
        """Answer one query, in a batch with whatever else is waiting."""
        return await self._batched(query)

    async def _rank_batch(self, queries: list[Query]) -> Sequence[RankResponse | RequestError]:
        # In a thread: the event loop must go on answering health checks.
        return await asyncio.to_thread(self._service.rank, queries)


class Ingress:
    """The HTTP application of one ingress replica."""

    def __init__(self, experiment: Experiment, key_digests: Sequence[bytes], model: Any) -> None:
        self._model = model
        domains = served_domains(experiment)
        self._catalogues = {domain: open_catalogue(experiment, domain) for domain in domains}
        self._infos = [describe(experiment, self._catalogues[domain]) for domain in domains]
        self._limits = limits_of(experiment)
        self._key_digests = key_digests

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(
            catalogues=self._catalogues,
            infos=self._infos,
            limits=self._limits,
            rank=self._rank,
            key_digests=self._key_digests,
        )

    async def _rank(self, query: Query) -> RankResponse:
        try:
            answer: RankResponse | RequestError = await self._model.rank.remote(query)
        except BackPressureError:
            raise RequestError("too many requests are waiting; try again", status=503) from None
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
            raise RequestError("a replica was lost; try again", status=503) from None
        if isinstance(answer, RequestError):
            raise answer
        return answer


def build(args: dict[str, Any]) -> Any:
    """Application builder for a Serve config file (`import_path: rc_ray.serve.deployments:build`).

    A config file listens on every interface unless it says otherwise: set `RC_RAY_API_KEYS` in the
    environment of the application.

    Args:
        args: the fields of `ServeArguments`.

    Raises:
        ConfigError: a field is missing or unknown, or the experiment file has a mistake.
    """
    try:
        arguments = ServeArguments.model_validate(args)
    except ValidationError as error:
        problems = (f"`args.{p['loc'][0]}`: {p['msg']}" for p in error.errors())
        known = ", ".join(ServeArguments.model_fields)
        raise ConfigError(f"Serve config: {'; '.join(problems)}; known: {known}") from None
    return make_application(load(arguments.experiment, arguments.overrides))


def make_application(experiment: Experiment) -> Any:
    """Bind both deployments of an experiment, with the API keys of this environment."""
    config = experiment.serve
    model = serve.deployment(
        RankModel,
        name="model",
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
        max_ongoing_requests=2 * config.max_batch_size,  # the next batch gathers meanwhile
        max_queued_requests=_QUEUED_BATCHES * config.max_batch_size * config.max_replicas,
        autoscaling_config=_autoscaling(config),
        logging_config=_LOGGING,
    ).bind(experiment)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        ray_actor_options={"num_cpus": 0},  # it waits for the model
        max_ongoing_requests=1000,
        logging_config=_LOGGING,
    )
    return ingress.bind(experiment, api_key_digests(), model)


def deploy(experiment: Experiment, console: Progress, *, blocking: bool) -> str:
    """Serve a finished run and return its address.

    Ray must be up. With `blocking` it returns after Ctrl-C or SIGTERM, when the service is down.

    Raises:
        ConfigError: the port is taken, the cluster is too small, or the service would be open to
            other machines without API keys.
        ArtifactError: the run lacks something that is to be served, or it is damaged.
        AssetError: the base LLM is not to be had.
    """
    config = experiment.serve
    console.stage("Serve")
    if config.host not in _LOOPBACK_HOSTS and not api_key_digests():
        raise ConfigError(
            f"`serve.host` {config.host} is open to other machines: set {API_KEYS_VARIABLE} "
            "(comma-separated keys) in the environment, or serve.host=127.0.0.1"
        )
    for domain in served_domains(experiment):
        open_catalogue(experiment, domain)
        check_adapter_files(experiment, domain)
    for line in told_by_calibrations(experiment):
        console.note(line)
    model_dir(experiment.model.path, console.note)  # unpacked here, with a word, not in a replica
    require_resources(
        "`serve.min_replicas` and `serve.cpus_per_replica`/`serve.gpus_per_replica`",
        cpus=config.cpus_per_replica,
        gpus=config.gpus_per_replica,
        count=config.min_replicas,
    )
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        host, port = config.host, _free_port(config.host, config.port)
        serve.start(http_options={"host": host, "port": port}, logging_config=_LOGGING)
    else:  # a cluster has one Serve, whose address was settled when it started
        host, port = running.http_config.host, running.http_config.port
    console.note(f"loading {told_by_system(experiment)}")
    try:
        serve.run(make_application(experiment), name=APPLICATION, route_prefix="/")
    except BaseException:
        if running is None:
            serve.shutdown()
        raise
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.note(f"ready at {url} (console /, interface /docs, health /healthz)")
    if blocking:
        console.note("Ctrl-C ends it")
        try:
            _wait_for_end()
        finally:
            shutdown()
    return url


def shutdown() -> None:
    """End the service; Ray stays."""
    serve.shutdown()


def _autoscaling(config: ServeConfig) -> dict[str, Any]:
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "initial_replicas": config.min_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
    }


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one where it is 0.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another "
            "`serve.port`, or 0 for a free one"
        ) from None


def _wait_for_end() -> None:
    ended = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended.wait(0.5):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
