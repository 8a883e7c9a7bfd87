"""The actors of an evaluation and how work is handed to them; Ray is imported for work only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rc_ray.config import Experiment
from rc_ray.errors import UserError
from rc_ray.progress import Progress
from rc_ray.session import num_fitting, require_resources

if TYPE_CHECKING:
    from rc_ray.scorer import Work

_PATIENCE_S = 60.0


class EvaluationFailed(UserError):
    """Something could not be scored; finished scores are kept."""


class Crew:
    """Actors that start at the first work given to them.

    Args:
        experiment: model, resources of an actor, how many.
        console: shows progress.
    """

    def __init__(self, experiment: Experiment, console: Progress) -> None:
        self._experiment = experiment
        self._console = console
        self._actors: list[Any] = []

    def do(self, pending: Sequence[Work], what: str) -> int:
        """Have all of it done; returns the number of (user, system) pairs.

        Raises:
            ConfigError: the cluster has no room for a single actor.
            EvaluationFailed: a piece failed, or its actor died more than twice.
        """
        todo = [work for work in pending if work.missing]
        if not todo:
            return 0
        if not self._actors:
            self._actors = self._start(len(todo))
        return hand_out(self._actors, todo, self._console, what)

    def dismiss(self) -> None:
        """End the actors."""
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
            self._actors = []

    def _start(self, num_pieces: int) -> list[Any]:
        import ray

        from rc_ray.assets import model_dir
        from rc_ray.scorer import Scorer

        settings = self._experiment.evaluate
        require_resources(
            "`evaluate.cpus_per_actor` and `evaluate.gpus_per_actor`",
            cpus=settings.cpus_per_actor,
            gpus=settings.gpus_per_actor,
            count=settings.num_actors or 1,
        )
        num_actors = settings.num_actors or max(
            1, num_fitting(settings.cpus_per_actor, settings.gpus_per_actor)
        )
        path = self._experiment.model.path
        needs_llm = set(settings.systems) - {"popularity", "item_knn", "sasrec"}
        model = str(model_dir(path, self._console.note)) if needs_llm else ""
        actor_class = ray.remote(Scorer).options(
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            max_restarts=2,
            max_task_retries=2,
        )
        return [
            actor_class.remote(
                model,
                path,
                self._experiment.model.dtype,
                settings.cpus_per_actor,
                settings.gpus_per_actor > 0,
            )
            for _ in range(min(num_actors, num_pieces))
        ]


@contextmanager
def crew(experiment: Experiment, console: Progress) -> Iterator[Crew]:
    """Actors for the time of the block."""
    actors = Crew(experiment, console)
    try:
        yield actors
    finally:
        actors.dismiss()


def hand_out(actors: list[Any], pending: list[Work], console: Progress, what: str) -> int:
    """Give the work to the actors that live: one that finds no room must not hold any.

    Raises:
        EvaluationFailed: a piece failed, or its actor died more than twice.
    """
    import ray

    total = sum(work.num_scores for work in pending)
    task = console.task(what, total)
    done = 0
    is_told = False
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}
    running: dict[Any, tuple[Any, Work, int]] = {}

    def give(actor: Any) -> None:
        if pending:
            work = pending.pop(0)
            running[actor.score.remote(work)] = actor, work, work.num_scores

    while running or pending:
        waiting = [*running, *(starting if pending else ())]
        found, _ = ray.wait(waiting, num_returns=1, timeout=None if running else _PATIENCE_S)
        if not found:
            if not is_told:
                console.note("evaluate: its actors wait for resources that others of Ray hold")
                is_told = True
            continue
        ready = found[0]
        try:
            answer = ray.get(ready)
        except ray.exceptions.RayError as error:
            answer = f"its process died: {str(error).splitlines()[0]}"
            if ready in starting:
                raise EvaluationFailed(f"evaluate: an actor: {answer}") from None
        if ready in starting:
            give(starting.pop(ready))
            continue
        actor, work, num_scores = running.pop(ready)
        if answer:
            raise EvaluationFailed(f"evaluate: {work.label}: {answer}")
        done += num_scores
        task.update(done)
        give(actor)
    return total
