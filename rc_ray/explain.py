"""`rc-ray merge --explain`: one page on a finished cocktail, with a few users' rankings.

The LLM runs in one Ray task (rc_ray/sample_users.py). Ray is imported inside the functions, after
the session has set it up; `check` tells a person's mistakes before there is a session.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rc_ray import artifacts, recipes
from rc_ray.artifacts import MANIFEST, RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError, ConfigError, UserError
from rc_ray.guard import Verdict
from rc_ray.mixtures import Cocktail, read_cocktail
from rc_ray.progress import Progress
from rc_ray.session import require_resources

if TYPE_CHECKING:
    from rc_ray.sample_users import SampleOrder, SampleUser, ShownSystem


class ExplanationFailed(UserError):
    """The sample users could not be ranked."""


def check(experiment: Experiment, domain: str, *, force: bool = False) -> Cocktail:
    """The cocktail that is to be explained.

    Args:
        experiment: the whole experiment.
        domain: whose cocktail.
        force: a wish to merge anew, which is no part of explaining.

    Raises:
        ConfigError: no cocktail is made for a domain of this name, or `force`.
        ArtifactError: it has not been made, it is not what today's settings would make, or one of
            its files is damaged.
    """
    if force:
        raise ConfigError("--explain merges nothing: run it after `rc-ray merge --force`")
    run = RunFolder(experiment.run_dir.absolute())
    finished = sorted(
        path.parent.name for path in (run.root / "cocktails").glob(f"[!.]*/{MANIFEST}")
    )
    known = list(dict.fromkeys([*experiment.data.tested, *finished]))
    if domain not in known:
        close = difflib.get_close_matches(domain, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"--explain: there is no cocktail for a domain {domain!r}; {hint}"
            f"domains: {', '.join(known)}"
        )
    folder = run.cocktail_dir(domain)
    if domain not in finished:
        raise ArtifactError(f"{folder}: no cocktail there yet; run `rc-ray merge` first")
    recipe = recipes.cocktail(experiment, domain)
    wanted = artifacts.fingerprint(
        config=recipe.config, seed=experiment.seed, inputs=recipe.inputs(run)
    )
    if not artifacts.is_finished(folder, wanted):
        raise ArtifactError(
            f"{folder}: of other settings or inputs than today's (`rc-ray show` says which); "
            "run `rc-ray merge` first"
        )
    return read_cocktail(folder)


def run(experiment: Experiment, domain: str, *, console: Progress) -> Path:
    """Write the page on a domain's cocktail; nothing is merged anew.

    Call inside `ray_session`.

    Args:
        experiment: the whole experiment.
        domain: whose cocktail.
        console: shows progress.

    Returns:
        The page.

    Raises:
        ConfigError: see `check`, or the cluster has no room for the task.
        ArtifactError: see `check`, or a system's calibration is damaged.
        ExplanationFailed: the sample users could not be ranked.
    """
    from rc_ray import explain_page

    cocktail = check(experiment, domain)
    console.stage(f"explain: the cocktail of {domain}")
    order = make_order(experiment, domain, cocktail, console.note)
    users = _rank(order, console)
    page = RunFolder(experiment.run_dir.absolute()).explanation_path(domain)
    artifacts.write_text(page, explain_page.render(experiment, domain, cocktail, order, users))
    return page


def make_order(
    experiment: Experiment, domain: str, cocktail: Cocktail, tell: Callable[[str], None]
) -> SampleOrder:
    """What the task needs to know.

    The equal mix is shown where spirit or ingredient is not there, and where the guard chose it.
    """
    from rc_ray.assets import model_dir
    from rc_ray.sample_users import SampleOrder

    run = RunFolder(experiment.run_dir.absolute())
    folders = {
        "spirit": run.spirit_dir,
        "ingredient": run.ingredient_dir(domain),
        "uniform": run.cocktail_dir(domain) / "uniform",
        "cocktail": run.cocktail_dir(domain),
    }
    guard = cocktail.guard
    single = {"spirit", "ingredient"} & set(cocktail.mixture.adapters)
    shown = {"cocktail", *single}
    if len(single) < 2 or (guard is not None and guard.chosen == "uniform"):
        shown.add("uniform")
    return SampleOrder(
        domain_dir=run.domain_dir(domain),
        systems=tuple(
            shown_system(experiment, domain, name, folder, guard)
            for name, folder in folders.items()
            if name in shown
        ),
        model_dir=str(model_dir(experiment.model.path, tell)),
        model_path=experiment.model.path,
        dtype=experiment.model.dtype,
        style=experiment.tune.style,
        max_titles=experiment.evaluate.max_titles,
        tokens_per_batch=experiment.evaluate.tokens_per_batch,
        seed=experiment.split_seed,
        num_cpus=experiment.merge.cpus_per_task,
        num_gpus=experiment.merge.gpus_per_task,
    )


def shown_system(
    experiment: Experiment, domain: str, name: str, folder: Path, guard: Verdict | None
) -> ShownSystem:
    """A system and how its scores are calibrated: by the guard, else as it would be served.

    Raises:
        ArtifactError: the file of `evaluate` is damaged.
    """
    from rc_ray.sample_users import ShownSystem
    from rc_ray.serve.calibration import open_calibration
    from rc_ray.shards import Calibration

    if guard is not None and name in guard.systems:
        one = guard.systems[name]
        guarded = Calibration(one["alpha"], one["gamma"], one["prior_in_trie"])
        is_fixed = one.get("chosen_by") == "fixed"
        who = "the experiment file" if is_fixed else "the guard"
        return ShownSystem(name, folder, guarded, chosen_by=who)
    serving = experiment.serve.model_copy(update={"system": name, "guard": False})
    served = open_calibration(experiment.model_copy(update={"serve": serving}), domain)
    calibration = Calibration(served.alpha, served.gamma, served.prior_in_trie)
    names = {"experiment": "the experiment file", "evaluate": "evaluate", "guard": "the guard"}
    return ShownSystem(name, folder, calibration, names.get(served.source, ""))


def _rank(order: SampleOrder, console: Progress) -> list[SampleUser]:
    """The rankings of the sample, out of one Ray task."""
    import ray

    from rc_ray.sample_users import NUM_USERS, rank_sample

    require_resources(
        "`merge.cpus_per_task` and `merge.gpus_per_task`",
        cpus=order.num_cpus,
        gpus=order.num_gpus,
    )
    console.note(f"ranking for {NUM_USERS} validation users under {len(order.systems)} systems")
    task = ray.remote(rank_sample).options(
        num_cpus=order.num_cpus, num_gpus=order.num_gpus, max_retries=2
    )
    try:
        sampled = ray.get(task.remote(order))
    except ray.exceptions.RayError as error:
        raise ExplanationFailed(
            f"explain: its process died: {str(error).splitlines()[0]}"
        ) from None
    if sampled.error is not None:
        raise ExplanationFailed(f"explain: {sampled.error}")
    users: list[SampleUser] = sampled.users
    return users
