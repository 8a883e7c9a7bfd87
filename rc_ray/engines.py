"""One process that trains a LoRA: build its engine, step, save, resume. Shared by train and tune.

With DeepSpeed every rank is one `Learner`; with `TorchEngine` there is one. DeepSpeed is imported
when it is asked for: trials, tests and tools that do not train with it never pay for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from rc_ray.artifacts import read_json, write_json
from rc_ray.assets import model_dir
from rc_ray.core.adapters import Adapter, LoraPair, load_adapter, save_adapter
from rc_ray.core.domains import Domain
from rc_ray.core.fused_lora import fuse_lora
from rc_ray.core.model import LanguageModel, with_lora
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.training import (
    Engine,
    StepMetrics,
    TorchEngine,
    TrainingModule,
    TrainingPlan,
    make_optimizer,
    make_schedule,
    train_steps,
)
from rc_ray.core.validation import BestSoFar, HeldOutTitles
from rc_ray.errors import ArtifactError, ConfigError
from rc_ray.training_config import DeepSpeedConfig, TrainingConfig

_STATE = "state.json"
_TORCH_STATE = "optimizer.pt"


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


def load_deepspeed(*, use_gpu: bool) -> Any:
    """Import DeepSpeed, on the processor without compiling anything.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"`train.engine: deepspeed` needs DeepSpeed ({error}); install it or set "
            "`train.engine: torch` with one worker"
        ) from None
    if not use_gpu:
        # Its shared-memory all-reduce would be compiled with g++ for half a minute at first use;
        # gloo gives the same sums.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_settings(
    settings: DeepSpeedConfig, config: TrainingConfig, *, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration for a LoRA run."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    num_parts = config.num_parts(world_size)
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // world_size // num_parts,
        "gradient_accumulation_steps": num_parts,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # torch's AdamW: DeepSpeed's own is compiled at first use, and LoRA's states are small.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


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
    kind: str
    """Engine, sharding and precision; an optimiser state is of use to the same kind alone."""
    deepspeed: Any = None
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    """Steps that a loaded checkpoint had done."""
    note: str | None = None
    """What a person should know about how the run was resumed."""
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
        """The LoRA as it is now, gathered over the workers: every rank must call.

        Raises:
            ArtifactError: a matrix does not have its layer's shape.
        """
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        sharded = any(hasattr(parameter, "ds_id") for parameter in trainable)
        with self.deepspeed.zero.GatheredParameters(trainable) if sharded else nullcontext():
            return _read_adapter(self.peft_model)

    def save(self, folder: Path, num_steps_done: int) -> None:
        """Write a checkpoint: every rank calls, with a folder of its own or a shared one.

        Rank 0 writes the adapter (in PEFT form) and what describes the checkpoint, every rank its
        share of the optimiser state.
        """
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter()
        if self.rank == 0:
            save_adapter(folder / "adapter", adapter, self.base_name)
            if self.best.adapter is not None:
                save_adapter(folder / "best", self.best.adapter, self.base_name)
            write_json(
                folder / _STATE,
                {
                    "num_steps_done": num_steps_done,
                    "kind": self.kind,
                    "world_size": self.world_size,
                    "finished": self.finished,
                    "best_valid_loss": self.best.loss,
                    "best_num_steps": self.best.num_steps,
                    "num_validations_since_best": self.best.num_since,
                },
            )
        if isinstance(self.engine, TorchEngine):
            state = {
                "optimizer": self.engine.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            }
            torch.save(state, folder / _TORCH_STATE)
        else:
            engine: Any = self.engine
            engine.save_checkpoint(
                str(folder / "deepspeed"),
                tag="last",
                client_state={"num_steps_done": num_steps_done},
                exclude_frozen_parameters=True,
            )


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
        checkpoint: folder that `Learner.save` wrote, to go on from. The optimiser state is used if
            the engine and the number of workers are the same, else the weights alone.

    Raises:
        ArtifactError: the checkpoint is damaged.
        ValueError: the LoRA does not fit the model, or there is nothing to train on.
    """
    renderer = PromptRenderer(lm.tokenizer, config.style)
    plan = TrainingPlan(domains, renderer, config, seed, num_listed=num_listed)
    precision = str(lm.dtype).removeprefix("torch.")
    sharding = "torch"
    if deepspeed is not None:
        offloaded = " offloaded" if deepspeed.offload == "cpu" else ""
        sharding = f"deepspeed zero-{deepspeed.zero_stage}{offloaded}"
    kind = f"{sharding} in {precision}"
    peft_model = with_lora(lm.model, config.lora, seed)
    start_step, note, full = 0, None, False
    best, finished = BestSoFar(), False
    held_out = HeldOutTitles(plan, config.num_valid_histories) if config.valid_every else None
    if held_out is not None and not len(held_out):
        held_out, note = None, "no domain has a validation user: trains without validation"
    if checkpoint is not None:
        state = read_json(checkpoint / _STATE)
        start_step = int(state["num_steps_done"])
        full = (state["kind"], state["world_size"]) == (kind, world_size)
        finished = bool(state["finished"])
        best = BestSoFar(
            state["best_valid_loss"],
            state["best_num_steps"],
            state["num_validations_since_best"],
            load_adapter(checkpoint / "best") if state["best_valid_loss"] is not None else None,
        )
        _write_adapter(peft_model, load_adapter(checkpoint / "adapter"), checkpoint / "adapter")
        if not full and start_step < config.num_steps:
            note = (
                f"resumed at step {start_step} with the weights alone: the optimiser state is of "
                f"{state['world_size']} worker(s) with {state['kind']}, this run has {world_size} "
                f"with {kind}"
            )
    if deepspeed is None or deepspeed.zero_stage < 3:  # stage 3 gathers weights module by module
        fuse_lora(peft_model)
    module = TrainingModule(peft_model, plan.tries, config, world_size).to(lm.device)
    library = None
    engine: Engine
    if deepspeed is None:
        engine = TorchEngine(module, config)
        schedule = engine.schedule
    else:
        library = load_deepspeed(use_gpu=lm.device.type == "cuda")
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters, config)
        schedule = make_schedule(optimizer, config)
        engine, *_ = library.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_settings(deepspeed, config, dtype=lm.dtype, world_size=world_size),
            dist_init_required=False,
        )
    learner = Learner(
        peft_model=peft_model,
        engine=engine,
        module=module,
        schedule=schedule,
        plan=plan,
        device=lm.device,
        base_name=base_name,
        kind=kind,
        deepspeed=library,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        note=note,
        held_out=held_out,
        best=best,
        finished=finished,
    )
    if checkpoint is not None:
        if full:
            _load_optimizer(learner, checkpoint)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no optimiser step came before: it did, once
                for _ in range(start_step):
                    schedule.step()
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


def _load_optimizer(learner: Learner, checkpoint: Path) -> None:
    try:
        if isinstance(learner.engine, TorchEngine):
            state = torch.load(
                checkpoint / _TORCH_STATE, map_location=learner.device, weights_only=True
            )
            learner.engine.optimizer.load_state_dict(state["optimizer"])
            learner.schedule.load_state_dict(state["schedule"])
            return
        engine: Any = learner.engine
        path, _ = engine.load_checkpoint(
            str(checkpoint / "deepspeed"), tag="last", load_module_strict=False
        )
    except (OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{checkpoint}: damaged checkpoint ({error}); run the stage again with --force"
        ) from error
    if path is None:
        raise ArtifactError(f"{checkpoint}: no checkpoint of rank {learner.rank} in it")


def _read_adapter(peft_model: PeftModel) -> Adapter:
    """Copy the LoRA matrices off a PEFT model, in fp32, checking each against its layer."""
    modules = {}
    state: dict[str, Tensor] = get_peft_model_state_dict(peft_model)
    layers = dict(peft_model.get_base_model().named_modules())
    for key in sorted(key for key in state if key.endswith(".lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = state[key], state[key.replace(".lora_A.", ".lora_B.")]
        layer: Any = layers[name]
        rank = int(layer.r["default"])
        wanted = (rank, layer.in_features), (layer.out_features, rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise ArtifactError(
                f"layer {name}: LoRA matrices of shape {tuple(a.shape)} and {tuple(b.shape)}, "
                f"expected {wanted[0]} and {wanted[1]}"
            )
        modules[name] = LoraPair(
            a=a.detach().to("cpu", torch.float32, copy=True),
            b=b.detach().to("cpu", torch.float32, copy=True),
            scale=float(layer.scaling["default"]),
        )
    return Adapter(modules)


def _write_adapter(peft_model: PeftModel, adapter: Adapter, folder: Path) -> None:
    layers = dict(peft_model.get_base_model().named_modules())
    for name, pair in adapter.modules.items():
        layer: Any = layers.get(name)
        if not hasattr(layer, "lora_A"):
            raise ArtifactError(f"{folder}: has a LoRA for {name}, which this run does not adapt")
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(pair.a)
            layer.lora_B["default"].weight.copy_(pair.b)
