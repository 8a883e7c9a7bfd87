"""The choice among a domain's merge settings, and all of it in `cocktails/search.json` and `.md`.

Nothing here reads a result of the test: a trial knows its objective, or the validation clicks of
users whom the guard does not ask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.merge_config import MergeSetting
from rc_ray.sweep_summary import NDCG, read_trials, trials_page

_OF_CLICKS = (
    "The users who chose a setting make it look better than it is: the guard asks others, and no "
    "test click is read before the evaluation."
)

_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("setting", pa.string()),
        ("valid_ndcg", pa.float64()),
        ("num_valid_users", pa.int64()),
        ("final_objective", pa.float64()),
        ("first_entropy", pa.float64()),
        ("last_entropy", pa.float64()),
        ("num_steps", pa.int64()),
        ("seconds", pa.float64()),
        ("chosen", pa.bool_()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class MergeTrial:
    """The cocktail of one domain at one setting."""

    domain: str
    variant: Experiment
    """The experiment at this setting."""
    label: str
    folder: Path
    """Named after what shapes the mix: another comparison finds the mix there."""
    mix: dict[str, Any]
    """Its plan, see `merge_plan.plan_mix`."""
    config: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    """Of the mix and the comparison."""

    @property
    def mix_dir(self) -> Path:
        return self.folder / "mix"

    @property
    def is_finished(self) -> bool:
        return artifacts.is_finished(self.folder, self.fingerprint)

    @property
    def result(self) -> dict[str, Any]:
        """The metrics of a finished trial."""
        metrics: dict[str, Any] = artifacts.read_json(self.folder / artifacts.MANIFEST)["metrics"]
        return metrics

    @property
    def setting(self) -> dict[str, Any]:
        fields = set(MergeSetting.model_fields)
        return self.variant.merge.model_dump(mode="json", include=fields)


def best_trial(
    trials: Sequence[MergeTrial], choose_by: Literal["valid_ndcg", "objective"]
) -> MergeTrial | None:
    """The finished trial with the highest NDCG, or the lowest objective; of equals the first.

    None where no trial has finished. Without validation users all NDCGs are equal.
    """
    finished = [trial for trial in trials if trial.is_finished]
    if choose_by == "objective":
        return min(finished, key=lambda trial: trial.result["final_objective"], default=None)
    return max(finished, key=lambda trial: trial.result["valid_ndcg"] or 0.0, default=None)


def told(experiment: Experiment, trials: Sequence[MergeTrial], best: MergeTrial) -> dict[str, Any]:
    """What the cocktail's manifest says of the search."""
    result = best.result
    return {
        "choose_by": experiment.merge.choose_by,
        "chosen": best.label,
        "setting": best.setting,
        "valid_ndcg": result["valid_ndcg"],
        "num_valid_users": result["num_valid_users"],
        "final_objective": result["final_objective"],
        "num_trials": len(trials),
        "num_failed": sum(not trial.is_finished for trial in trials),
    }


def sentence(search: Mapping[str, Any]) -> str:
    """In words, from `told`: which setting was chosen, and by what."""
    of = f"`{search['chosen']}` was chosen among {search['num_trials']} settings"
    if search["final_objective"] is not None:
        by = f"by the unlabeled objective ({search['final_objective']:.4g})"
    elif search["valid_ndcg"] is not None:
        by = (
            f"by the clicks of {search['num_valid_users']} validation users "
            f"(NDCG {search['valid_ndcg']:.3f})"
        )
    else:
        by = "as the first: there is no validation user"
    failed = f"; {search['num_failed']} failed" if search["num_failed"] else ""
    return f"{of} {by}{failed}."


def write_trials(
    path: Path, trials: Sequence[MergeTrial], best: MergeTrial, problems: Mapping[Path, str]
) -> None:
    """Write a domain's table of trials, in the order of the search.

    Args:
        path: of the Parquet file.
        trials: all of the domain.
        best: the chosen one.
        problems: trial folder -> what went wrong.
    """
    rows = []
    for trial in trials:
        metrics = trial.result if trial.is_finished else {}
        known = {name: metrics.get(name) for name in _SCHEMA.names}
        rows.append(
            {
                **known,
                "label": trial.label,
                "setting": json.dumps(trial.setting, sort_keys=True),
                "seconds": metrics.get("trial_seconds"),
                "chosen": trial is best,
                "error": None if metrics else problems.get(trial.folder, "it did not finish"),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)


def write_summary(
    experiment: Experiment,
    run: RunFolder,
    failed: Mapping[str, str],
    spent: Mapping[str, float],
) -> Path:
    """Write `search.json` and `search.md` from the tables of trials beside the cocktails.

    Args:
        experiment: the one that searches.
        run: the run folder.
        failed: domain -> why it has no cocktail.
        spent: see `merge_search.Searched`.

    Returns:
        The path of the file for people.
    """
    of_best = ("valid_ndcg", "final_objective")
    domains = read_trials(experiment.data.tested, run.cocktail_dir, failed, of_best)
    found = {
        "choose_by": experiment.merge.choose_by,
        "last_session": dict(spent),
        "domains": domains,
    }
    artifacts.write_json(run.search_path.with_suffix(".json"), found)
    by_clicks = experiment.merge.choose_by == "valid_ndcg"
    page = trials_page(
        f"Search over the cocktails of {experiment.name}",
        domains,
        counts={"trials": "num_trials", "failed": "num_failed"},
        lacking="cocktail",
        measure=NDCG if by_clicks else ("objective", "final_objective"),
        note=_OF_CLICKS if by_clicks else "",
        spent=spent,
        on_what=f"; {spent['trials_s']:.0f} s inside trials",
    )
    artifacts.write_text(run.search_path, page)
    return run.search_path
