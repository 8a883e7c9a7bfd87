"""What stands around the service on Ray Serve.

Ray reads its settings when it is imported, so it is imported once the session's Ray is up.
"""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from rc_ray.config import Experiment
from rc_ray.errors import ConfigError
from rc_ray.serve.catalogue import Query
from rc_ray.serve.schemas import RequestError

pytestmark = [
    pytest.mark.serve,
    pytest.mark.distributed,
    pytest.mark.usefixtures("ray_local"),
]

QUERY = Query(
    domain="tools",
    titles=("a",),
    candidates=None,
    excluded=frozenset(),
    k=1,
    unknown_history=(),
)


class Handle:
    """Stands for a deployment handle whose calls end in one way."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.rank = self

    async def remote(self, _: Query) -> Any:
        if isinstance(self.outcome, RequestError):
            return self.outcome
        raise self.outcome


def test_the_state_of_the_model_reaches_the_caller(experiment: Experiment) -> None:
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    from rc_ray.serve.deployments import Ingress

    for outcome, status in (
        (BackPressureError(num_queued_requests=9, max_queued_requests=8), 503),
        (RayActorError(), 503),
        (DeploymentUnavailableError(None), 503),
        (RequestError("too long", status=422), 422),
    ):
        ingress = Ingress(experiment, (), Handle(outcome))
        with pytest.raises(RequestError) as caught:
            asyncio.run(ingress._rank(QUERY))
        assert caught.value.status == status


def test_a_refusal_keeps_its_status_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RequestError("busy", status=503)))
    assert (str(error), error.status) == ("busy", 503)


def test_replicas_are_bounded_as_the_experiment_says(experiment: Experiment) -> None:
    from rc_ray.serve.deployments import make_application

    serve = experiment.serve.model_copy(update={"max_replicas": 3, "max_batch_size": 4})
    ingress = make_application(experiment.model_copy(update={"serve": serve}))
    model = ingress._bound_deployment.init_args[2]._bound_deployment
    config = model._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (
        1,
        3,
    )
    assert config.max_ongoing_requests >= 4
    assert config.max_queued_requests > 0, "-1 would queue without end"
    assert model.ray_actor_options["num_cpus"] == 0.5


def test_a_serve_config_file_builds_the_application(experiment: Experiment, tmp_path: Path) -> None:
    from ray.serve.schema import ServeApplicationSchema

    from rc_ray.serve.deployments import build

    path = experiment.run_dir.parent.parent / "experiment.yaml"
    text = f"""
      name: rc_ray
      import_path: rc_ray.serve.deployments:build
      args: {{experiment: {path}, overrides: [serve.max_replicas=2]}}
    """
    schema = ServeApplicationSchema.model_validate(yaml.safe_load(text))
    served = build(schema.args)._bound_deployment.init_args[0]
    assert served.serve.max_replicas == 2
    assert served.run_dir == experiment.run_dir
    with pytest.raises(ConfigError, match="`args.replicas`.*known: experiment, overrides"):
        build({"experiment": str(path), "replicas": 2})
