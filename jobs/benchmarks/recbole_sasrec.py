"""RecBole's SASRec on a given split; run by `baselines.py` with the Python that RecBole lives in.

    python jobs/benchmarks/recbole_sasrec.py FOLDER settings.json

FOLDER holds `NAME/NAME.{train,valid,test}.inter` in RecBole's atomic form, already one row per
position, and `NAME/seen.json` with the items to leave out of each user's ranking. Writes
`scores.npy`, `items.json` and `result.json` into FOLDER. It imports nothing of this project.
RecBole 1.2.1 needs numpy < 2; ray and tensorboard, which it imports for its search and its logs
alone, are replaced where they are missing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


def _replace_unused_imports() -> None:
    if importlib.util.find_spec("ray") is None:
        ray = types.ModuleType("ray")
        ray.tune = None  # type: ignore[attr-defined]
        sys.modules["ray"] = ray
    if importlib.util.find_spec("tensorboard") is None:
        board = types.ModuleType("torch.utils.tensorboard")

        class SummaryWriter:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def __getattr__(self, _: str) -> Any:
                return lambda *_, **__: None

        board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        sys.modules["torch.utils.tensorboard"] = board


def main(folder: Path, settings_path: Path) -> None:
    torch.set_num_threads(1)
    _replace_unused_imports()
    load = torch.load
    # torch >= 2.6 refuses RecBole's own checkpoint, written a minute ago, unless told.
    torch.load = lambda *args, **kwargs: load(*args, **{"weights_only": False, **kwargs})
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    name = settings.pop("dataset")
    config = Config(
        model="SASRec",
        dataset=name,
        config_dict={
            "data_path": str(folder),
            "benchmark_filename": ["train", "valid", "test"],
            "alias_of_item_id": ["item_id_list"],
            "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
            "USER_ID_FIELD": "user_id",
            "ITEM_ID_FIELD": "item_id",
            "TIME_FIELD": None,
            "train_neg_sample_args": None,
            "loss_type": "CE",
            "eval_args": {"mode": "full", "order": "TO", "group_by": "user"},
            "metrics": ["Hit", "NDCG", "MRR"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "metric_decimal_place": 6,
            "eval_batch_size": 512,
            "checkpoint_dir": str(folder / "saved"),
            "use_gpu": False,
            "show_progress": False,
            **settings,
        },
    )
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    seen_tokens = json.loads((folder / name / "seen.json").read_text(encoding="utf-8"))
    user_tokens = dataset.field2id_token["user_id"]
    item_ids = dataset.field2token_id["item_id"]

    class MaskingTrainer(Trainer):
        """RecBole leaves out no history in sequential recommendation; here both sides do."""

        phase = "valid"

        def _full_sort_batch_eval(self, batched_data: Any) -> Any:
            interaction, scores, users, items = super()._full_sort_batch_eval(batched_data)
            for row, user in enumerate(interaction["user_id"].tolist()):
                seen = seen_tokens[self.phase][user_tokens[user]]
                scores[row, [item_ids[item] for item in seen]] = -np.inf
            if self.phase == "test":
                collected.append((interaction["user_id"].clone(), scores.clone()))
            return interaction, scores, users, items

    collected: list[tuple[torch.Tensor, torch.Tensor]] = []
    # The weights' own stream, like RecBole's quick start.
    init_seed(config["seed"], True)
    model = SASRec(config, train.dataset)
    trainer = MaskingTrainer(config, model)
    start = time.perf_counter()
    epochs: list[tuple[float, float]] = []

    def note(epoch: int, score: float) -> None:
        epochs.append((time.perf_counter() - start, float(score)))
        print(f"epoch {epoch} {epochs[-1][0]:.0f} s valid NDCG@10 {score:.4f}", flush=True)

    best, _ = trainer.fit(train, valid, show_progress=False, verbose=False, callback_fn=note)
    seconds = time.perf_counter() - start
    trainer.phase = "test"
    result = trainer.evaluate(test, load_best_model=True, show_progress=False)
    users = torch.cat([users for users, _ in collected])
    np.save(folder / "scores.npy", torch.cat([scores for _, scores in collected]).numpy())
    (folder / "items.json").write_text(
        json.dumps(
            {
                "users": [str(user_tokens[user]) for user in users.tolist()],
                "items": [str(token) for token in dataset.field2id_token["item_id"]],
            }
        ),
        encoding="utf-8",
    )
    (folder / "result.json").write_text(
        json.dumps(
            {
                "seconds": seconds,
                "epochs": epochs,
                "valid_ndcg": float(best),
                "test": {key: float(value) for key, value in result.items()},
                "num_parameters": sum(p.numel() for p in model.parameters()),
            }
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
