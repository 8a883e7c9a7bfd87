"""Ray Tune -> the best setting of every domain's cocktail: a trial per (domain, setting).

A trial makes one whole cocktail in a folder of its own under `cocktails.work/`, sealed with what
it was compared by, so whatever ended is never done twice. The domain's best goes on to the rest of
the merge stage, which makes the mixes beside it and asks the guard. Ray is imported inside the
functions, after the session has set it up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError, UserError
from rc_ray.merge_choice import MergeTrial, best_trial, told, write_trials
from rc_ray.merge_plan import make_order, open_order, plan_mix
from rc_ray.progress import Progress
from rc_ray.session import num_fitting, require_resources, resources_text
from rc_ray.sweep_plan import ERROR

RESOURCE_FIELDS = "`merge.cpus_per_task`, `merge.gpus_per_task` and `merge.memory_per_task_gb`"
_MEND = (
    "set `merge.micro_batch_size` or lower `merge.batch_size`, or with `merge.memory_per_task_gb` "
    "let fewer run side by side"
)


@dataclass
class Searched:
    """What a search found."""

    orders: list[dict[str, Any]] = field(default_factory=list)
    """Of the domains with a chosen setting, in place of those that were searched."""
    failed: dict[str, str] = field(default_factory=dict)
    """Domain -> why no setting could be chosen."""
    spent: dict[str, float] = field(default_factory=dict)
    """`wall_s` and `num_slots` of this session, `trials_s` seconds inside its trials."""


def search(
    experiment: Experiment,
    folder: RunFolder,
    orders: Sequence[Mapping[str, Any]],
    console: Progress,
) -> Searched:
    """Run what is left of the trials of some domains, and choose each domain's setting.

    Args:
        experiment: with `merge.search`.
        folder: the run's.
        orders: of the domains, see `merge_plan.make_order`.
        console: shows progress.

    Raises:
        ConfigError: the cluster has no room for a single trial.
    """
    result = Searched()
    trials: dict[str, list[MergeTrial]] = {}
    for order in orders:
        domain = order["domain"]
        try:
            found = plan_trials(experiment, folder, domain)
            _pending(found)  # a damaged record of a trial is a problem of this domain alone
            trials[domain] = found
        except ArtifactError as error:
            result.failed[domain] = str(error)
    start = time.monotonic()
    left = _pending(trial for found in trials.values() for trial in found)
    num_slots, problems = 0, dict[Path, str]()
    if left:
        num_slots, problems = _fit(experiment, folder, trials, left, console)
    result.spent = {
        "wall_s": round(time.monotonic() - start, 3),
        "num_slots": num_slots,
        "trials_s": round(sum(t.result["trial_seconds"] for t in left if t.is_finished), 3),
    }
    for order in orders:
        if order["domain"] in trials:
            try:
                result.orders.append(
                    _chosen(experiment, folder, order, trials[order["domain"]], problems, console)
                )
            except UserError as error:
                result.failed[order["domain"]] = str(error)
    return result


def plan_trials(experiment: Experiment, folder: RunFolder, domain: str) -> list[MergeTrial]:
    """The trials of one domain, one per setting; settings that come to the same mix count once.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    trials: dict[Path, MergeTrial] = {}
    for variant in experiment.variants():
        recipe = recipes.merge_trial(experiment, variant, domain)
        mix = plan_mix(variant, folder, domain, "cocktail")
        inputs = mix["inputs"]
        trial = MergeTrial(
            domain=domain,
            variant=variant,
            label=experiment.merge.label(variant.merge),
            # A mix's name holds no dash.
            folder=folder.mix_work_dir(domain) / f"trial-{mix['fingerprint'][:16]}",
            mix=mix,
            config=recipe.config,
            inputs=inputs,
            fingerprint=artifacts.fingerprint(
                config=recipe.config, seed=experiment.seed, inputs=inputs
            ),
        )
        trials.setdefault(trial.folder, trial)
    return list(trials.values())


def trial_order(
    experiment: Experiment, folder: RunFolder, trial: MergeTrial, model: Path
) -> dict[str, Any]:
    """What `rc_ray.merge_trial` needs to run a trial, on any node; all JSON-able.

    Args:
        experiment: the one that searches.
        folder: the run's.
        trial: which one.
        model: the base model's folder on the driver's node.
    """
    merge = trial.variant.merge
    opened = open_order(trial.variant, folder, trial.domain)
    return {
        "domain": trial.domain,
        "label": trial.label,
        "folder": str(trial.folder),
        # As many as there are where the domain has the prompts.
        "setting": {"num_steps": merge.num_epochs * -(-merge.num_prompts // merge.batch_size)},
        "opened": {**opened, "model_dir": str(model)},
        "mix": trial.mix,
        "choose_by": experiment.merge.choose_by,
        "model": experiment.model.model_dump(mode="json"),
        "model_dir": str(model),
        "num_cpus": merge.cpus_per_task,
        "use_gpu": merge.gpus_per_task > 0,
        "scheduler": None,
        "mend": _MEND,
        "seed": experiment.seed,
        "config": trial.config,
        "inputs": trial.inputs,
    }


def _pending(trials: Iterable[MergeTrial]) -> list[MergeTrial]:
    return [trial for trial in trials if not trial.is_finished]


def _fit(
    experiment: Experiment,
    folder: RunFolder,
    trials: Mapping[str, list[MergeTrial]],
    left: Sequence[MergeTrial],
    console: Progress,
) -> tuple[int, dict[Path, str]]:
    """Run the trials that are left.

    Returns:
        How many run side by side, and trial folder -> what went wrong.
    """
    from rc_ray.assets import model_dir
    from rc_ray.sweep import Request, fit
    from rc_ray.sweep_view import SweepView
    from rc_ray.trial_process import run_merge_trial

    merge = experiment.merge
    request = Request(
        merge.cpus_per_task, merge.gpus_per_task, int((merge.memory_per_task_gb or 0.0) * 1e9)
    )
    require_resources(RESOURCE_FIELDS, cpus=request.cpus, gpus=request.gpus, memory=request.memory)
    fitting = num_fitting(request.cpus, request.gpus, request.memory)
    num_slots = max(1, min(fitting, merge.max_concurrent_trials or fitting))
    model = model_dir(experiment.model.path, console.note)
    orders_dir = _orders_dir(experiment, folder)
    handed = []
    for trial in left:
        handed.append(orders_dir / f"{trial.domain}.{trial.folder.name}.json")
        artifacts.write_json(handed[-1], trial_order(experiment, folder, trial, model))
    console.note(
        f"{len(left)} trial(s), {min(num_slots, len(left))} at a time, each "
        f"{resources_text(request.cpus, request.gpus, request.memory)}"
    )
    view = SweepView(
        console,
        orders_dir,
        [trial.folder for trial in left],
        len(left),
        request,
        fields=RESOURCE_FIELDS.replace(" and ", " or "),
    )
    with view.shown():
        died = fit(
            folder.mix_work / ".tune" / _search_name(experiment, trials),
            handed,
            orders_dir,
            run_merge_trial,
            request,
            num_slots=num_slots,
            max_concurrent=merge.max_concurrent_trials,
            note=console.note,
        )
    problems = {
        Path(artifacts.read_json(path)["folder"]): (
            f"its process died again and again; if memory ran out, {_MEND} ({why})"
        )
        for path, why in died.items()
    }
    for trial in left:
        if (trial.folder / ERROR).exists():
            problems[trial.folder] = artifacts.read_json(trial.folder / ERROR)["error"]
    return num_slots, problems


def _orders_dir(experiment: Experiment, folder: RunFolder) -> Path:
    """Where the orders of this search lie; those of another one are not mixed with them."""
    known = [recipes.cocktail(experiment, "").config, experiment.seed, artifacts.METHOD]
    return folder.mix_work / ".orders" / artifacts.digest(known)[:16]


def _search_name(experiment: Experiment, trials: Mapping[str, list[MergeTrial]]) -> str:
    """Of Tune's books: another search, other adapters or other resources are another one."""
    planned = {domain: [t.fingerprint for t in found] for domain, found in trials.items()}
    settings = experiment.merge.model_dump(mode="json")
    return artifacts.digest([planned, settings, experiment.seed, artifacts.METHOD])[:16]


def _chosen(
    experiment: Experiment,
    folder: RunFolder,
    order: Mapping[str, Any],
    trials: list[MergeTrial],
    problems: Mapping[Path, str],
    console: Progress,
) -> dict[str, Any]:
    """The domain's order at its best setting, whose cocktail is taken from its trial.

    Raises:
        UserError: no trial has finished.
    """
    domain = order["domain"]
    for trial in trials:
        if not trial.is_finished:
            why = problems.get(trial.folder, "it did not finish")
            console.note(f"{domain}: the trial {trial.label} failed: {why}")
    best = best_trial(trials, experiment.merge.choose_by)
    if best is None:
        raise UserError(
            next((problems[t.folder] for t in trials if t.folder in problems), "no trial finished")
        )
    table = folder.mix_work_dir(domain) / "trials.parquet"
    write_trials(table, trials, best, problems)
    made = make_order(best.variant, folder, domain)
    made["mixes"]["cocktail"]["folder"] = str(best.mix_dir)
    # Known by the whole search, and read by it: the adapters of every setting.
    kept = ("config", "inputs", "fingerprint", "is_chosen_by_clicks")
    return {
        **made,
        **{name: order[name] for name in kept},
        "search": {"told": told(experiment, trials, best), "table": str(table)},
    }
