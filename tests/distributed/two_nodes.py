"""A driver of its own for test_two_nodes.py: trains over two raylets and takes one away.

python -m tests.distributed.two_nodes EXPERIMENT.yaml PREPARED_DATA_DIR {fixed,elastic}
"""

from __future__ import annotations

import io
import shutil
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from rc_ray import train
from rc_ray.artifacts import RunFolder
from rc_ray.config import load
from rc_ray.progress import JsonlTail, Progress
from rc_ray.session import ray_session


def main(experiment_path: str, data_dir: str, kind: str) -> None:
    overrides = (
        "train.num_workers=2",
        "train.batch_size=5" if kind == "elastic" else "train.batch_size=4",
        "train.num_steps=200",
        "train.checkpoint_every=5",
        "train.deepspeed.zero_stage=2",
        "train.cpus_per_worker=2",
        f"output_dir={Path(data_dir).parent / kind}",
        *(("train.min_workers=1",) if kind == "elastic" else ()),
    )
    experiment = load(Path(experiment_path), overrides)
    shutil.copytree(data_dir, experiment.run_dir / "data")
    # The controller and Ray's own actors live on the head, beside one of the workers.
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False}
    )
    other = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, logging_level="ERROR")
    cluster.wait_for_nodes()
    screen = io.StringIO()
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            train.run(experiment, console=Progress(stream=screen, interval_s=0.0))
        except BaseException as error:
            failure.append(error)

    # Nodes come and go in the main thread alone.
    with ray_session(RunFolder(experiment.run_dir), verbose=True):
        thread = threading.Thread(target=fit)
        thread.start()
        removed = False
        tails: dict[Path, JsonlTail] = {}
        while thread.is_alive():
            time.sleep(0.05)
            for path in (experiment.run_dir / ".spirit.work").glob("*.jsonl"):
                seen = tails.setdefault(path, JsonlTail(path)).read_new()
                if not removed and any(row.get("step", 0) >= 10 for row in seen):
                    cluster.remove_node(other, allow_graceful=False)
                    removed = True
                    if kind == "fixed":
                        cluster.add_node(num_cpus=2)
        thread.join()
    ray.shutdown()
    cluster.shutdown()
    print(screen.getvalue())
    if failure:
        raise failure[0]
    print("removed a node" if removed else "no node was removed")


if __name__ == "__main__":
    main(*sys.argv[1:])
