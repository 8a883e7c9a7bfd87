"""One domain's cocktails in one process: every mix made once, then judged, then put together.

Each mix has a folder of its own under `cocktails.work/`, whole or absent, with a manifest that says
what shaped it: a killed task, or a file with one mix more, costs only what is missing.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter

from rc_ray.artifacts import (
    MANIFEST,
    is_finished,
    mix_place,
    read_json,
    replaced_dir,
    restored,
    write_json,
    write_manifest,
)
from rc_ray.core.adapters import load_adapter
from rc_ray.core.loading import dtype_name
from rc_ray.engines import prepare_process
from rc_ray.errors import ArtifactError, UserError
from rc_ray.freed_memory import give_memory_back
from rc_ray.guard import CONTROLS, GUARD_FILE, Judged, decide, notes_on
from rc_ray.mix_config import MixConfig
from rc_ray.mix_making import make_mix
from rc_ray.open_domain import OpenDomain
from rc_ray.precision import joined
from rc_ray.shards import Stopwatch

TRIALS_FILE = "trials.parquet"
"""Beside a cocktail that a search has chosen: its trials."""
NEEDED = ("cocktail", "uniform")
"""Mixes without which a domain has no cocktail."""


def mix_domain(order: dict[str, Any]) -> dict[str, Any]:
    """The Ray task: the manifest's metrics, or `{"error": why}` where a retry would not help.

    Mixes other than the cocktail and the uniform one may be missing: `failed_mixes` says why.
    """
    try:
        return _mix(order)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        return {"error": f"{type(error).__name__}: {error}"}


def _mix(order: dict[str, Any]) -> dict[str, Any]:
    watch = Stopwatch()
    prepare_process(order["num_cpus"])
    opened = OpenDomain(order)
    failed = _make_missing(opened)
    for name in NEEDED:
        if name in failed:
            raise UserError(failed[name])
    made = {name: _work_dir(order, name) for name in order["mixes"] if name not in failed}
    about = {name: read_json(folder / MANIFEST)["metrics"] for name, folder in made.items()}
    guard = _judged(opened, made)
    judged_in = [dtype_name(opened.lm.dtype)] if guard["systems"] else []
    metrics = {
        **about["cocktail"],
        "mixes": {name: one for name, one in about.items() if name != "cocktail"},
        "failed_mixes": failed,
        "guard": {name: guard[name] for name in ("chosen", "why", "collapse")},
        "dtypes": joined(*(one.get("dtypes", ()) for one in about.values()), judged_in),
        "task_seconds": round(watch.lap(), 1),
    }
    search = order.get("search")  # what was chosen among the settings of a search
    if search is not None:
        metrics["search"] = search["told"]
    with replaced_dir(Path(order["target"])) as work:
        for name, folder in made.items():
            # The manifest of the whole folder takes the place of the cocktail's own.
            left_out = shutil.ignore_patterns(MANIFEST) if name == "cocktail" else None
            shutil.copytree(folder, work / mix_place(name), ignore=left_out, dirs_exist_ok=True)
        if search is not None:
            shutil.copyfile(search["table"], work / TRIALS_FILE)
        write_json(work / GUARD_FILE, guard)
        write_manifest(
            work,
            stage="merge",
            config=order["config"],
            seed=order["seed"],
            inputs=order["inputs"],
            metrics=metrics,
        )
    Path(order["curve_path"]).unlink(missing_ok=True)
    return metrics


def _make_missing(opened: OpenDomain) -> dict[str, str]:
    """Make the mixes that are not there yet; name -> why it failed."""
    order, failed = opened.order, {}
    curve_path = Path(order["curve_path"])
    curve_path.parent.mkdir(parents=True, exist_ok=True)
    with curve_path.open("w", encoding="utf-8") as log:
        for name, plan in order["mixes"].items():
            try:
                make_sealed(opened, name, plan, _work_dir(order, name), log)
                give_memory_back()
            except (UserError, ValueError) as error:  # of settings that do not fit the domain
                failed[name] = str(error)
            except Exception as error:
                traceback.print_exc()  # into the worker's log
                failed[name] = f"{type(error).__name__}: {error}"
    return failed


def make_sealed(
    opened: OpenDomain, name: str, plan: Mapping[str, Any], folder: Path, log: TextIO
) -> None:
    """Make a mix in a folder with a manifest of its own, unless it is there.

    Args:
        opened: the domain.
        name: of the mix.
        plan: of the mix, see `merge_plan.plan_mix`.
        folder: where it goes.
        log: takes a line per step, for who watches.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if restored(folder) and _is_made(folder, plan["fingerprint"]):
        return
    config: MixConfig = TypeAdapter(MixConfig).validate_python(plan["config"]["mix"])
    settings = {"rank": plan["config"]["rank"], "random": plan["config"].get("random", ())}
    with replaced_dir(folder) as work:
        metrics = make_mix(opened, name, settings, config, work, log)
        write_manifest(
            work,
            stage="merge",
            config=plan["config"],
            seed=opened.order["seed"],
            inputs=plan["inputs"],
            metrics=metrics,
        )


def _is_made(folder: Path, wanted: str) -> bool:
    """Whether a mix is there; one whose manifest is damaged is made anew like one that is not."""
    try:
        return is_finished(folder, wanted)
    except ArtifactError:
        return False


def _judged(opened: OpenDomain, made: Mapping[str, Path]) -> dict[str, Any]:
    """What `guard.json` says."""
    judged: dict[str, Judged] = {}
    notes: list[str] = []
    if opened.guard.enabled:
        mixed = {name: load_adapter(made[name]) for name in NEEDED}
        systems = {**opened.adapters, **mixed}
        asked = [name for name in (*CONTROLS, "cocktail") if name in systems]
        judged = opened.judged({name: systems[name] for name in asked})
        num_prompted = sum(case.user_id in opened.prompted for case in opened.valid_cases)
        notes = notes_on(num_prompted, opened.evaluate.calibration)
    return decide(judged, opened.guard, notes=notes, seed=opened.order["seed"])


def _work_dir(order: Mapping[str, Any], name: str) -> Path:
    """Where a mix is made; a cocktail that a search has chosen lies in its trial's folder."""
    return Path(order["mixes"][name].get("folder") or Path(order["work"]) / name)
