"""Trials of several domains in one process: trained together on one copy of the base.

The trials have one setting. Each keeps the folder, the loss curve and the checkpoint that it would
have alone, so it may go on alone, together with others, or be finished already. A domain that fails
leaves the group; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rc_ray.artifacts import replaced_dir, restored
from rc_ray.checkpoints import TrainingState, check_model, model_shape, read_state, write_state
from rc_ray.core.adapters import Adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.joint_training import JointTraining, Member, make_member
from rc_ray.core.loading import dtype_name
from rc_ray.core.lora_bank import LoraBank
from rc_ray.core.model import LanguageModel
from rc_ray.core.optimizer import MOMENTS, advance_schedule, moments_of, restore_optimizer
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.training import StepMetrics
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.engines import prepare_process
from rc_ray.sweep_plan import is_finished
from rc_ray.tracking import Log, tracked_trial
from rc_ray.training_config import TrainingConfig
from rc_ray.trial import (
    CHECKPOINT,
    base_of,
    forget_base,
    sealed_adapter,
    train_ingredient,
    write_step,
)
from rc_ray.trial_process import write_error

Order = dict[str, Any]
"""What a worker needs for a trial, see `rc_ray.sweep_plan`."""


def train_group(orders: Sequence[Order]) -> list[Path]:
    """Train together what is not trained yet, rank the validation users of each, seal each folder.

    What went wrong with a trial stands in its `error.json`; nothing is raised.

    Args:
        orders: of one setting, each with a folder of its own.

    Returns:
        The folders of trials that failed.
    """
    failed: list[Path] = []

    def fail(order: Order, error: Exception) -> None:
        failed.append(Path(order["folder"]))
        write_error(failed[-1], error, num_together=len(orders))

    adapters: dict[str, Adapter] = {}
    ready: list[Order] = []
    unfinished = [order for order in orders if not is_finished(order)]
    for order in unfinished:
        folder = Path(order["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if sealed_adapter(order, folder) is None:
                ready.append(order)
        except Exception as error:
            fail(order, error)
    if ready:
        group = _Group(ready, fail)
        try:
            adapters = group.train()
        except Exception as error:  # of the process or the setting, no single domain's
            forget_base()  # it may still carry the LoRAs
            for order in group.left:
                fail(order, error)
    for order in unfinished:
        if Path(order["folder"]) in failed:
            continue
        try:
            train_ingredient(order, adapter=adapters.get(order["folder"]))
        except Exception as error:
            forget_base()
            fail(order, error)
    return failed


class _Group:
    """The trials that have to be trained, by folder."""

    def __init__(self, orders: Sequence[Order], fail: Any) -> None:
        self._orders = {order["folder"]: order for order in orders}
        self._fail_order = fail
        self._setting = TrainingConfig.model_validate(orders[0]["setting"])
        self._curves: dict[str, tuple[ExitStack, Log]] = {}

    @property
    def left(self) -> list[Order]:
        """Trials that have not failed."""
        return list(self._orders.values())

    def train(self) -> dict[str, Adapter]:
        """Run the remaining steps; folder -> trained adapter. The base is bare again afterwards."""
        first = self.left[0]
        prepare_process(first["num_cpus"])
        lm = base_of(first)
        plans = {}
        for name, order in list(self._orders.items()):
            try:
                plans[name] = self._plan(lm, order)
            except Exception as error:
                self._fail(name, error)
        if not plans:
            return {}
        seeds = {name: self._orders[name]["seed"] for name in plans}
        bank = LoraBank(lm.model, self._setting.lora, seeds)
        try:
            members: dict[str, Member] = {}
            for name, plan in plans.items():
                try:
                    member = make_member(lm, bank, name, plan)
                    self._resume(lm, bank, name, member)
                except Exception as error:
                    self._fail(name, error)
                    bank.remove(name)
                else:
                    members[name] = member
                    self._open_curve(name, member.num_steps_done)
            training = JointTraining(lm, bank, members, tokens_per_pass=first["tokens_per_pass"])
            while training.active:
                for name, metrics in training.step().items():
                    try:
                        self._after_step(training, name, metrics)
                    except Exception as error:
                        self._fail(name, error)
                        training.drop(name)
            for name in list(self._curves):
                self._close_curve(name)
            return {name: training.result(name) for name in training.members}
        except BaseException as error:
            for name in list(self._curves):
                self._close_curve(name, error)
            raise
        finally:
            bank.unload()
            lm.model.eval()

    def _fail(self, name: str, error: Exception) -> None:
        self._close_curve(name, error)
        self._fail_order(self._orders.pop(name), error)

    def _open_curve(self, name: str, start_step: int) -> None:
        stack = ExitStack()
        log = stack.enter_context(tracked_trial(self._orders[name], start_step))
        self._curves[name] = stack, log

    def _close_curve(self, name: str, error: BaseException | None = None) -> None:
        """End a curve, as failed where there is an error."""
        if name in self._curves:
            stack, _ = self._curves.pop(name)
            if error is None:
                stack.close()
            else:
                stack.__exit__(type(error), error, error.__traceback__)

    def _plan(self, lm: LanguageModel, order: Order) -> TrainingPlan:
        return TrainingPlan(
            [read_domain(Path(order["domain_dir"]))],
            PromptRenderer(lm.tokenizer, self._setting.style),
            self._setting,
            order["seed"],
            num_listed=order["num_listed"],
        )

    def _after_step(
        self, training: JointTraining, name: str, metrics: StepMetrics | Exception
    ) -> None:
        if isinstance(metrics, Exception):
            raise metrics
        order, member = self._orders[name], training.members[name]
        with (Path(name) / "metrics.jsonl").open("a", encoding="utf-8") as log:
            write_step(log, metrics, self._setting, dtype_name(training.lm.dtype))
        self._curves[name][1](metrics)
        if member.finished or member.num_steps_done % order["checkpoint_every"] == 0:
            with replaced_dir(Path(name) / CHECKPOINT) as work:
                write_state(work, _state(training, name, order["model"]["path"]))

    def _resume(self, lm: LanguageModel, bank: LoraBank, name: str, member: Member) -> None:
        checkpoint = Path(name) / CHECKPOINT
        if not restored(checkpoint):
            (Path(name) / "metrics.jsonl").unlink(missing_ok=True)
            return
        state = read_state(checkpoint)
        base_name = self._orders[name]["model"]["path"]
        check_model(vars(state), base_name, model_shape(lm.model.config))
        bank.load(name, state.adapter)
        moments = [
            (matrix, moments_of(state.moments, key)) for key, matrix in bank.matrices(name).items()
        ]
        restore_optimizer(member.engine.optimizer, moments, state.num_steps_done)
        advance_schedule(member.engine.schedule, state.num_steps_done)
        member.num_steps_done, member.finished = state.num_steps_done, state.finished
        member.best = state.best


def _state(training: JointTraining, name: str, base_name: str) -> TrainingState:
    member = training.members[name]
    moments = {
        f"{key}.{moment}": member.engine.optimizer.state[matrix][moment].detach().cpu()
        for key, matrix in training.bank.matrices(name).items()
        for moment in MOMENTS
    }
    return TrainingState(
        num_steps_done=member.num_steps_done,
        base_name=base_name,
        base_shape=model_shape(training.lm.model.config),
        adapter=training.bank.adapter(name),
        moments=moments,
        best=member.best,
        finished=member.finished,
    )
