"""One process that trains a LoRA: build its engine, step, save, resume. Shared by train and tune.

With DeepSpeed every rank is one `Learner`; with `TorchEngine` there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rc_ray import zero
from rc_ray.assets import model_dir
from rc_ray.checkpoints import TrainingState, check_model, model_shape, read_state, write_state
from rc_ray.core.adapters import Adapter, adapter_of, copied, lora_layers, lora_matrices
from rc_ray.core.domains import Domain
from rc_ray.core.fused_lora import fuse_lora
from rc_ray.core.loading import dtype_name
from rc_ray.core.model import LanguageModel
from rc_ray.core.optimizer import (
    MOMENTS,
    advance_schedule,
    make_optimizer,
    make_schedule,
    moments_of,
    restore_optimizer,
)
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import Engine, StepMetrics, TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.core.validation import BestSoFar, HeldOutTitles
from rc_ray.errors import ArtifactError
from rc_ray.training_config import DeepSpeedConfig, TrainingConfig


def prepare_process(num_cpus: float) -> None:
    """Give this process its share of the processor."""
    torch.set_num_threads(max(1, int(num_cpus)))


def local_model_dir(driver_dir: str, path: str) -> Path:
    """The base model's folder: the driver's where this node sees it, else this node's own copy.

    Raises:
        ArtifactError: this node cannot get the model.
    """
    folder = Path(driver_dir)
    return folder if (folder / "config.json").exists() else model_dir(path)


@dataclass
class Learner:
    """One worker's share of a training run; see `build_learner`."""

    peft_model: PeftModel
    engine: Engine
    module: TrainingModule
    schedule: torch.optim.lr_scheduler.LambdaLR
    plan: TrainingPlan
    device: torch.device
    base_name: str
    dtype: str
    """Of the base, e.g. `bfloat16`; the LoRA is in fp32."""
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    """Steps that a loaded checkpoint had done."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of steps done, where the checkpoint had them; `save` writes them."""
    note: str | None = None
    """What a person should know about how the run goes."""
    held_out: HeldOutTitles | None = None
    """What is validated on; None without validation."""
    best: BestSoFar = field(default_factory=BestSoFar)
    finished: bool = False
    """Whether no step remains, by their number or by `patience`."""

    def steps(self) -> Iterator[StepMetrics]:
        """Run the remaining steps, validating where the settings say so."""
        config = self.plan.config
        if self.finished:
            return
        self.module.train()
        for metrics in train_steps(
            self.engine,
            self.plan,
            device=self.device,
            learning_rate=lambda: self.schedule.get_last_lr()[0],
            start_step=self.start_step,
            rank=self.rank,
            world_size=self.world_size,
        ):
            num_done = metrics["step"] + 1
            self.finished = num_done == config.num_steps
            due = self.finished or num_done % (config.valid_every or config.num_steps) == 0
            if self.held_out is not None and due:
                metrics["valid_loss"] = self._validate(self.held_out, num_done)
                self.finished |= self.best.exhausted(config.patience)
            yield metrics
            if self.finished:
                return

    def _validate(self, held_out: HeldOutTitles, num_done: int) -> float:
        """Validation loss, the same on every rank; a new best is remembered."""
        self.module.eval()
        share = held_out.loss(self.module, self.device, self.rank, self.world_size)
        self.module.train()
        (loss,) = sum_over_ranks([share], self.world_size, self.device)
        if self.best.improves(loss):
            self.best = BestSoFar(loss, num_done, adapter=self.adapter())
        else:
            self.best.num_since += 1
        return loss

    def result(self) -> Adapter:
        """The adapter that the run is for: the best one, the last without validation.

        Every rank must call.
        """
        return self.best.adapter or self.adapter()

    def adapter(self) -> Adapter:
        """The LoRA as it is now in fp32, gathered over the workers: every rank must call.

        Raises:
            ArtifactError: a matrix does not have its layer's shape.
        """
        return adapter_of(self.peft_model, self._master)

    def save(self, folder: Path | None, num_steps_done: int) -> None:
        """Write a checkpoint that any engine and number of workers can go on from.

        Every rank must call, after a step at least; rank 0 alone writes and needs the folder.
        """
        moments = {
            f"{name}.{matrix}.{key}": self._moment(parameter, key)
            for name, layer in lora_layers(self.peft_model).items()
            for matrix, parameter in lora_matrices(layer).items()
            for key in MOMENTS
        }
        state = TrainingState(
            num_steps_done=num_steps_done,
            base_name=self.base_name,
            base_shape=model_shape(self.peft_model.config),
            adapter=self.adapter(),
            moments=moments,
            best=self.best,
            finished=self.finished,
            rows=self.rows,
        )
        if folder is not None and self.rank == 0:
            write_state(folder, state)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if isinstance(self.engine, TorchEngine):
            return copied(parameter)
        return zero.read_master(self.engine, parameter)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if isinstance(self.engine, TorchEngine):
            moment: Tensor = self.engine.optimizer.state[parameter][key]
            return moment.detach().to("cpu", copy=True)
        return zero.read_moment(self.engine, parameter, key)

    def _resume(self, state: TrainingState) -> None:
        """Take over what a checkpoint says about the optimiser; the weights are in place."""
        written = []
        for name, layer in lora_layers(self.peft_model).items():
            for matrix, parameter in lora_matrices(layer).items():
                pair = state.adapter.modules[name]
                moments = moments_of(state.moments, f"{name}.{matrix}")
                written.append((parameter, pair.a if matrix == "lora_A" else pair.b, moments))
        if isinstance(self.engine, TorchEngine):
            restore_optimizer(
                self.engine.optimizer,
                [(parameter, moments) for parameter, _, moments in written],
                state.num_steps_done,
            )
        else:
            zero.write_back(self.engine, written, state.num_steps_done)
        advance_schedule(self.schedule, state.num_steps_done)
        self.start_step, self.finished = state.num_steps_done, state.finished
        self.best, self.rows = state.best, [dict(row) for row in state.rows]


def read_share(text: str | None) -> Fraction | None:
    """`own_share` of `build_learner` out of a worker's orders, which are JSON."""
    return Fraction(text) if text is not None else None


def build_learner(
    lm: LanguageModel,
    domains: Sequence[Domain],
    config: TrainingConfig,
    *,
    seed: int,
    num_listed: int,
    base_name: str,
    deepspeed: DeepSpeedConfig | None = None,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: Path | None = None,
    own_share: Fraction | None = None,
) -> Learner:
    """Put a LoRA on `lm` and make it ready to train.

    Args:
        lm: the base; its model carries the LoRA until `peft_model.unload()`.
        domains: whose training histories are pooled.
        config: of the run.
        seed: of the LoRA's first values and of every batch.
        num_listed: candidates beside the target in an `instruct` prompt.
        base_name: what the saved adapter calls its base.
        deepspeed: settings; None trains with `TorchEngine`.
        rank: of this worker.
        world_size: number of workers; above 1 `torch.distributed` must be up.
        checkpoint: folder that `Learner.save` wrote, under whatever engine and number of workers,
            to go on from.
        own_share: of all examples, what the first domain gives; None draws from all histories
            alike.

    Raises:
        ArtifactError: the checkpoint is damaged, or of another model.
        ValueError: the LoRA does not fit the model, or there is nothing to train on.
    """
    renderer = PromptRenderer(lm.tokenizer, config.style)
    plan = TrainingPlan(domains, renderer, config, seed, num_listed=num_listed, own_share=own_share)
    note = None
    held_out = HeldOutTitles(plan, config.num_valid_histories) if config.valid_every else None
    if held_out is not None and not len(held_out):
        held_out, note = None, "no domain has a validation user: trains without validation"
    state = None
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_model(vars(state), base_name, model_shape(lm.model.config))
    peft_model = with_lora(lm.model, config.lora, seed)
    if state is not None and checkpoint is not None:
        _write_adapter(peft_model, state.adapter, checkpoint)
    if deepspeed is None or deepspeed.zero_stage < 3:  # stage 3 gathers weights module by module
        fuse_lora(peft_model)
    with zero.gathered(_output_weights(lm)):
        module = TrainingModule(peft_model, plan.tries, config, world_size).to(lm.device)
    engine: Engine
    if deepspeed is None:
        engine = TorchEngine(module, config)
        schedule = engine.schedule
    else:
        library = zero.load_deepspeed(use_gpu=lm.device.type == "cuda")
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters, config)
        schedule = make_schedule(optimizer, config)
        engine, *_ = library.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=zero.deepspeed_settings(
                deepspeed, config, dtype=lm.dtype, world_size=world_size
            ),
            dist_init_required=False,
        )
        zero.start_clean(engine)
    learner = Learner(
        peft_model=peft_model,
        engine=engine,
        module=module,
        schedule=schedule,
        plan=plan,
        device=lm.device,
        base_name=base_name,
        dtype=dtype_name(lm.dtype),
        rank=rank,
        world_size=world_size,
        note=note,
        held_out=held_out,
    )
    if state is not None:
        learner._resume(state)
    return learner


def sum_over_ranks(values: list[float], world_size: int, device: torch.device) -> list[float]:
    """Element-wise sums over the workers, on every one of them."""
    if world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def check_trained(adapter: Adapter, folder: Path) -> None:
    """Refuse an adapter that changes nothing, which a run that lost its weights would save.

    Raises:
        ArtifactError: every `lora_B` is zero.
    """
    if not any(bool(pair.b.any()) for pair in adapter.modules.values()):
        raise ArtifactError(f"{folder}: every lora_B is zero; the run has trained nothing")


def _output_weights(lm: LanguageModel) -> list[nn.Parameter]:
    """What the catalogue's rows are copied from."""
    return list(lm.model.get_output_embeddings().parameters())


def _write_adapter(peft_model: PeftModel, adapter: Adapter, folder: Path) -> None:
    layers = lora_layers(peft_model)
    differing = sorted(layers.keys() ^ adapter.modules.keys())
    if differing:
        raise ArtifactError(
            f"{folder}: the checkpoint and this run differ in whether {differing[0]} is adapted"
        )
    for name, pair in adapter.modules.items():
        for matrix, value in zip(
            lora_matrices(layers[name]).values(), (pair.a, pair.b), strict=True
        ):
            if matrix.shape != value.shape:
                raise ArtifactError(
                    f"{folder}: {name} has a LoRA matrix of shape {tuple(value.shape)}, this run "
                    f"trains one of {tuple(matrix.shape)}"
                )
            with torch.no_grad():
                matrix.copy_(value)
