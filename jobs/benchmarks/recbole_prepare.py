"""RecBole's own loading of a log; run by `prepare.py` with the Python that RecBole lives in.

    python jobs/benchmarks/recbole_prepare.py FOLDER MODEL

FOLDER holds `log/log.inter` in RecBole's atomic form. MODEL names the RecBole model whose loader is
meant: BPR for plain rows, SASRec for one row per position with the history before it. Prints one
line of JSON. It imports nothing of this project; RecBole 1.2.1 needs numpy < 2.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
import types
from pathlib import Path

SETTINGS = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp",
    "rm_dup_inter": "first",
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": "uni19",
    },
    "eval_batch_size": 4096,
    "use_gpu": False,
    "show_progress": False,
    "save_dataset": False,
    "save_dataloaders": False,
}


def main(folder: Path, model: str) -> None:
    if importlib.util.find_spec("ray") is None:  # imported for its search alone
        ray = types.ModuleType("ray")
        ray.tune = None  # type: ignore[attr-defined]
        sys.modules["ray"] = ray
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    settings = {"data_path": str(folder), **SETTINGS}
    if model == "SASRec":
        settings |= {"train_neg_sample_args": None, "loss_type": "CE"}
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    config = Config(model=model, dataset="log", config_dict=settings)
    init_seed(config["seed"], True)
    start, start_cpu = time.perf_counter(), time.process_time()
    dataset = create_dataset(config)
    _, valid, test = data_preparation(config, dataset)
    loaded = time.perf_counter() - start
    num_rows = 0
    for loader in (valid, test):
        for batch in loader:
            num_rows += len(batch[0])
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "loaded_s": loaded,
                "cpu_s": time.process_time() - start_cpu,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "users": int(dataset.user_num) - 1,
                "items": int(dataset.item_num) - 1,
                # A sequential dataset has one row for each position but a user's first one.
                "interactions": int(dataset.inter_num)
                + (int(dataset.user_num) - 1 if model == "SASRec" else 0),
                "candidates": num_rows,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
