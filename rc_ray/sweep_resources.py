"""What a sweep asks of the cluster, and what is refused before its first trial starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ConfigError
from rc_ray.session import num_fitting, require_resources
from rc_ray.sweep import Request
from rc_ray.sweep_plan import Trial
from rc_ray.trial_memory import estimate_bytes, read_shape, tokens_per_title
from rc_ray.tune_config import TuneConfig


def check_request(config: TuneConfig, model: Path) -> None:
    """Refuse what no trial could do, before one starts.

    Args:
        config: of the sweep.
        model: the base model's folder.

    Raises:
        ConfigError: with the field and the fix.
        ArtifactError: the folder is no model.
    """
    if config.num_workers > 1 and find_spec("deepspeed") is None:
        raise ConfigError(
            "`tune.num_workers` above 1 needs the package deepspeed; run `pip install deepspeed`, "
            "or set it to 1"
        )
    unsure = [
        lora
        for lora in {setting.lora for setting in config.possible_settings()}
        if lora.target_modules != "all-linear"
        or (lora.first_layer and lora.first_layer >= read_shape(model).num_layers)
    ]
    if unsure:  # only then: PyTorch takes seconds to import
        from rc_ray.core.loading import model_without_weights
        from rc_ray.core.trainable_lora import lora_targets

        layers = model_without_weights(model)
        try:
            for lora in unsure:
                lora_targets(layers, lora)
        except ValueError as error:
            raise ConfigError(str(error).replace("`lora.", "`tune.lora.")) from None


def make_request(
    experiment: Experiment,
    folder: RunFolder,
    model: Path,
    left: Sequence[Trial],
    domains: Iterable[str],
) -> Request:
    """What each process of a trial asks for; the largest setting and titles decide for all.

    Args:
        experiment: the whole experiment.
        folder: the run's.
        model: the base model's folder.
        left: trials that are to run.
        domains: of these trials, and of those that Optuna will ask for.
    """
    config = experiment.tune
    if config.memory_per_trial_gb is not None:
        memory = int(config.memory_per_trial_gb * 1e9)
    else:
        shape = read_shape(model)
        titles = tokens_per_title(folder.domain_dir(domain) for domain in domains)
        asked = () if config.is_planned else config.possible_settings()
        memory = max(
            estimate_bytes(
                shape,
                setting,
                dtype=experiment.model.dtype,
                use_gpu=config.gpus_per_trial > 0,
                tokens_per_title=titles,
                tokens_per_batch=experiment.evaluate.tokens_per_batch,
                num_listed=experiment.data.num_negatives,
                num_domains=config.domains_per_trial,
                tokens_per_pass=config.tokens_per_pass,
            )
            for setting in {*(trial.setting for trial in left), *asked}
        )
    return Request(config.cpus_per_trial, config.gpus_per_trial, memory, config.num_workers)


def slots(config: TuneConfig, request: Request) -> int:
    """How many trials run side by side.

    Raises:
        ConfigError: not one fits.
    """
    if config.memory_per_trial_gb is None:
        memory_text = "the memory estimated for a trial (`tune.memory_per_trial_gb` overrules it)"
    else:
        memory_text = "`tune.memory_per_trial_gb`"
    workers_text = "`tune.num_workers`, " if request.num_workers > 1 else ""
    require_resources(
        f"{workers_text}`tune.cpus_per_trial`, `tune.gpus_per_trial` and {memory_text}",
        cpus=request.cpus,
        gpus=request.gpus,
        memory=request.memory,
        count=request.num_workers,
    )
    fitting = num_fitting(request.cpus, request.gpus, request.memory) // request.num_workers
    return max(1, min(fitting, config.max_concurrent_trials or fitting))
