"""A folder that is being replaced is whole at every moment, or comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rc_ray import artifacts
from rc_ray.artifacts import replaced_dir


def text_of(folder: Path) -> str:
    return (folder / "text").read_text()


def write(folder: Path, text: str) -> None:
    with replaced_dir(folder) as work:
        (work / "text").write_text(text)


def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "stage"
    write(target, "old")
    original = os.replace
    calls = []

    def fails_once(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) == 2:  # the old one is aside, the new one not yet there
            raise OSError("no")
        original(source, place)

    monkeypatch.setattr("rc_ray.artifacts.os.replace", fails_once)
    with pytest.raises(OSError, match="no"):
        write(target, "new")
    assert text_of(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    write(target, "old")
    target.rename(tmp_path / ".stage.old-1")
    with pytest.raises(KeyboardInterrupt), replaced_dir(target):
        raise KeyboardInterrupt
    assert text_of(target) == "old"


def test_an_old_folder_of_the_same_process_id_is_no_obstacle(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    write(target, "old")
    write(tmp_path / f".stage.old-{os.getpid()}", "older")
    write(target, "new")
    assert text_of(target) == "new"


def test_another_method_is_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def mark() -> str:
        return artifacts.fingerprint(config={}, seed=1, inputs={})

    before = mark()
    monkeypatch.setattr(artifacts, "METHOD", artifacts.METHOD + 1)
    assert mark() != before


def test_a_hidden_folder_is_not_sealed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint").mkdir()
    (tmp_path / ".checkpoint" / "state").write_text("")
    (tmp_path / "kept").write_text("")
    artifacts.write_manifest(tmp_path, stage="tune", config={}, seed=1, inputs={}, metrics={})
    assert artifacts.read_json(tmp_path / artifacts.MANIFEST)["outputs"].keys() == {"kept"}
