"""The sweep in one place: its table holds whatever an error quotes, and old tables of trials."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.artifacts import RunFolder, read_json
from rc_ray.sweep_summary import write_summary
from tests.conftest import Factory

SPENT = {"wall_s": 10.0, "num_slots": 2, "training_s": 15.0}


def test_what_an_error_quotes_stays_in_its_cell_and_steers_no_terminal(make_run: Factory) -> None:
    experiment = make_run("data.ingredients=[tools,lamps]", "data.spirit=[rivers]")
    run = RunFolder(experiment.run_dir)
    rows = [
        {"label": "lora.rank=4", "valid_ndcg": 0.5, "seconds": 1.5, "chosen": True, "error": None},
        {"label": "lora.rank=8", "valid_ndcg": None, "seconds": 0.5, "chosen": False}
        | {"error": "the title \x1b[2J\nis odd"},
    ]
    run.ingredient_dir("tools").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), run.ingredient_dir("tools") / "trials.parquet")
    path = write_summary(experiment, run, {"lamps": "a | b\nc \x1b[31m"}, SPENT)
    lines = path.read_text().splitlines()
    assert "| tools | 2 | 0 | 1 | lora.rank=4 | 0.5000 | 2.0 |" in lines
    assert "| lamps | | | | no ingredient: a \\| b c \N{REPLACEMENT CHARACTER}[31m | | |" in lines
    assert "- tools, lora.rank=8: the title \N{REPLACEMENT CHARACTER}[2J is odd" in lines
    told = read_json(path.with_suffix(".json"))
    assert told["last_session"]["training_share"] == 0.75  # 15 of 2 x 10 seconds
    assert told["domains"]["lamps"] == {"failed": "a | b\nc \x1b[31m", "trials": []}


def test_a_table_of_trials_without_labels_is_read(make_run: Factory) -> None:
    experiment = make_run()
    run = RunFolder(experiment.run_dir)
    rows = [
        {"valid_ndcg": 0.5, "seconds": 1.5, "chosen": True, "error": None},
        {"valid_ndcg": None, "seconds": None, "chosen": False, "error": "broken"},
    ]
    run.ingredient_dir("tools").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), run.ingredient_dir("tools") / "trials.parquet")
    text = write_summary(experiment, run, {}, SPENT).read_text()
    assert "| tools | 2 | 0 | 1 | the only one | 0.5000 | 1.5 |" in text
    assert "- tools, the only trial: broken" in text
