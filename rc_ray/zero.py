"""What DeepSpeed shards: its settings, loading in shards, and tensors put together and apart again.

DeepSpeed is imported when it is asked for: trials, tests and tools that do not train with it never
pay for it.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rc_ray.core.optimizer import MOMENTS
from rc_ray.errors import ConfigError
from rc_ray.training_config import DeepSpeedConfig, TrainingConfig


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
    if settings.zero_stage == 3:
        # DeepSpeed's own values keep a billion parameters gathered once they were needed: all of
        # a small LLM on every worker.
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_max_live_parameters"] = 300_000_000
        zero["stage3_prefetch_bucket_size"] = 20_000_000
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


@contextmanager
def sharded_loading(
    settings: DeepSpeedConfig | None,
    config: TrainingConfig,
    *,
    dtype: torch.dtype,
    world_size: int,
    use_gpu: bool,
) -> Iterator[None]:
    """Under ZeRO-3, a model loaded in the block keeps this worker's share of every matrix alone.

    Every worker must load the same model. Any other engine loads as always.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if settings is None or settings.zero_stage < 3:
        yield
        return
    load_deepspeed(use_gpu=use_gpu)
    if not use_gpu:
        _give_back_freed_memory()
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    made = deepspeed_settings(settings, config, dtype=dtype, world_size=world_size)
    # transformers keeps a weak reference: it loads in shards as long as this object lives.
    alive = HfDeepSpeedConfig(made)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _give_back_freed_memory() -> None:
    """Let a gathered matrix leave the process when it is freed.

    glibc soon serves tensors of up to 32 MiB from its heap, where what is kept lies between what is
    freed, and the heap would hold most of the model after all.
    """
    m_mmap_threshold = -3  # of malloc.h
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole matrices inside the block, where ZeRO-3 has sharded them; every worker must enter."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return context


def read_master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The trained matrix, whole and in fp32; every worker must call.

    Args:
        engine: a DeepSpeed engine.
        parameter: that it trains.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    if _is_linked(parameter):
        found: Tensor = safe_get_full_fp32_param(parameter)
    else:
        found = _master(engine, parameter)
    return found.detach().to("cpu", torch.float32, copy=True)


def read_moment(engine: Any, parameter: nn.Parameter, key: str) -> Tensor:
    """One of AdamW's moments of a matrix, whole; every worker must call, after a step at least."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if _is_linked(parameter):
        found: Tensor = safe_get_full_optimizer_state(parameter, key)
    else:
        found = _torch_optimizer(engine).state[_master(engine, parameter)][key]
    return found.detach().to("cpu", torch.float32, copy=True)


def start_clean(engine: Any) -> None:
    """Undo the step on zero gradients by which DeepSpeed makes the state of a bf16 AdamW.

    It would count as one of the run's steps, and decay the weights once more.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "fp16_groups", None) is None or not hasattr(optimizer, "fp32_groups"):
        return
    _torch_optimizer(engine).state.clear()
    with torch.no_grad():
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for own, master in zip(group, masters, strict=True):
                master.copy_(own)
                master.grad = None


def write_back(
    engine: Any,
    parameters: Sequence[tuple[nn.Parameter, Tensor, dict[str, Tensor]]],
    num_steps_done: int,
) -> None:
    """Give the engine what `read_master` and `read_moment` read of another one.

    Args:
        engine: a DeepSpeed engine that has not stepped yet; its parameters hold the values already.
        parameters: (parameter, its value in fp32, its moments by name), values whole.
        num_steps_done: the optimiser's count of steps.
    """
    optimizer = _torch_optimizer(engine)
    # AdamW makes its state at the first step; here it has to be there before.
    shares = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if shares is None:
        shares = [owned for group in optimizer.param_groups for owned in group["params"]]
    for owned in shares:
        optimizer.state[owned] = {
            "step": torch.tensor(float(num_steps_done)),
            **{key: torch.zeros_like(owned, requires_grad=False) for key in MOMENTS},
        }
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
    with torch.no_grad():
        for parameter, value, moments in parameters:
            for key, tensor in {"": value, **moments}.items():
                _write(engine, parameter, key, tensor)


def _write(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_id"):
        # Not DeepSpeed's own setter of whole tensors: it cannot pad the last worker's share.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = size * optimizer._get_param_partition_rank(parameter)
        share = torch.zeros(size)
        given = value.flatten()[start : start + size]
        share[: given.numel()] = given
        optimizer.set_local_hp_param(share, parameter, key or None)
    elif _is_linked(parameter):
        parameter.set_full_hp_param(value.to(parameter.device), key or None)  # type: ignore[attr-defined]
    else:
        master = _master(engine, parameter)
        target = _torch_optimizer(engine).state[master][key] if key else master
        target.copy_(value)


def _is_linked(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps the matrix in a flat fp32 copy, in shares."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside."""
    found: torch.optim.Optimizer = engine.basic_optimizer
    return found


def _master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Without ZeRO: the fp32 copy that a bf16 matrix has, or the matrix itself."""
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if groups is None:
        return parameter
    for group, masters in zip(groups, engine.optimizer.fp32_groups, strict=True):
        for own, master in zip(group, masters, strict=True):
            if own is parameter:
                found: Tensor = master
                return found
    raise KeyError("the engine does not train this parameter")
