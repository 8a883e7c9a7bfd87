"""A checkpoint is whole or passed over, wherever it lies; no half of one is ever gone on with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config

from rc_ray.checkpoint_store import CheckpointStore
from rc_ray.checkpoints import TrainingState, check_files, model_shape, read_state, write_state
from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.validation import BestSoFar
from rc_ray.errors import ArtifactError, ConfigError


def state_after(num_steps: int) -> TrainingState:
    torch.manual_seed(num_steps)
    pair = LoraPair(a=torch.randn(2, 6), b=torch.randn(4, 2), scale=2.0)
    best = LoraPair(a=pair.a + 1, b=pair.b, scale=2.0)
    return TrainingState(
        num_steps_done=num_steps,
        base_name="tiny",
        base_shape={"hidden_size": 6},
        adapter=Adapter({"layer": pair}),
        moments={"layer.lora_A.exp_avg": torch.randn(2, 6)},
        best=BestSoFar(1.5, num_steps - 1, 1, Adapter({"layer": best})),
        rows=[{"step": step, "loss": 1.0 / (step + 1)} for step in range(num_steps)],
    )


@pytest.fixture(params=["path", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    prefix = "file://" if request.param == "uri" else ""
    made = CheckpointStore(f"{prefix}{tmp_path}/storage", "run")
    made.check_writable()
    return made


def put(store: CheckpointStore, num_steps: int) -> Path:
    folder = Path(store.path) / f"checkpoint_{num_steps}"
    write_state(folder, state_after(num_steps))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = state_after(3)
    write_state(tmp_path, written)
    read = read_state(tmp_path)
    pair, wanted = read.adapter.modules["layer"], written.adapter.modules["layer"]
    assert torch.equal(pair.a, wanted.a)
    assert torch.equal(pair.b, wanted.b)
    assert read.best.adapter is not None
    assert torch.equal(read.best.adapter.modules["layer"].a, wanted.a + 1)
    assert (read.best.loss, read.best.num_steps, read.best.num_since) == (1.5, 2, 1)
    assert torch.equal(
        read.moments["layer.lora_A.exp_avg"], written.moments["layer.lora_A.exp_avg"]
    )
    assert list(read.rows) == list(written.rows)
    assert read.num_steps_done == 3
    assert not read.finished


def test_the_whole_checkpoint_with_the_most_steps_is_found(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.newest() is None
    for num_steps in (10, 2, 9):
        put(store, num_steps)
    (Path(store.path) / "checkpoint_manager_snapshot.json").write_text('{"half')
    found = store.newest()
    assert found is not None
    assert (found.num_steps_done, found.notes) == (10, ())
    fetched: list[str] = []
    original = CheckpointStore.fetched
    monkeypatch.setattr(
        CheckpointStore,
        "fetched",
        lambda self, name: (fetched.append(name), original(self, name))[1],
    )
    store.newest()
    assert fetched == ["checkpoint_10"]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_an_upload_cut_off_anywhere_is_passed_over_for_the_one_before(
    store: CheckpointStore, damage: str
) -> None:
    put(store, 4)
    whole = put(store, 6)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        folder = put(store, 8)
        path = folder / file
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        found = store.newest()
        assert found is not None
        assert found.num_steps_done == 6, file
        (note,) = found.notes
        assert "passed over a checkpoint" in note
        assert "not whole" in note
        shutil.rmtree(folder)


def test_what_a_run_leaves_is_cleared_but_for_its_newest_whole_checkpoints(
    store: CheckpointStore,
) -> None:
    for num_steps in (2, 4, 6, 8):
        put(store, num_steps)
    (Path(store.path) / "checkpoint_8" / "optimizer.safetensors").unlink()
    (Path(store.path) / "checkpoint_manager_snapshot.json").write_text("{}")
    store.forget(keep=2)
    assert sorted(path.name for path in Path(store.path).iterdir()) == [
        "checkpoint_4",
        "checkpoint_6",
    ]
    store.forget(keep=None)
    assert list(Path(store.path).iterdir()) == []
    assert store.newest() is None


def test_what_a_killed_process_left_on_this_node_is_cleared(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put(store, 2)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, other = (
        tmp_path / f"rc-ray-checkpoint-{run}-{dead.pid}-abc" for run in ("run", "another")
    )
    for folder in (left, other):
        folder.mkdir()
    with store.fetched("checkpoint_2") as mine:
        assert mine.parent == tmp_path
        store.clear_scratch()
        assert not left.exists()
        assert other.exists()  # it may be of another machine's process
        assert (mine / "state.json").exists()
    assert not mine.exists()


def test_nothing_whole_is_said_so(store: CheckpointStore) -> None:
    (put(store, 2) / "state.json").unlink()
    found = store.newest()
    assert found is not None
    assert found.name is None
    assert found.num_steps_done == 0
    assert len(found.notes) == 1


def test_another_form_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path, state_after(1))
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ArtifactError, match="form 99, this version reads form 1"):
        check_files(tmp_path)


def test_a_text_model_is_that_of_the_folder_it_came_from() -> None:
    folder = Gemma3Config(text_config={"hidden_size": 24})
    assert model_shape(folder) == model_shape(folder.text_config)
    assert model_shape(folder)["hidden_size"] == 24


def test_storage_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`train.checkpoint_storage`: floppy://x/y cannot be"):
        CheckpointStore("floppy://x/y", "run")
    (tmp_path / "file").write_text("in the way")
    blocked = CheckpointStore(str(tmp_path / "file"), "run")
    with pytest.raises(ConfigError, match="`train.checkpoint_storage`.*cannot be used"):
        blocked.check_writable()
