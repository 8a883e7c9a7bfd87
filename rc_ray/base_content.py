"""What the base LLM is known by: its name, and of a folder of one's own also what lies in it.

The embedded model is pinned by SHA-256, and a hub id names what its owner has published. A folder
holds whatever was last put there, so that an overwritten checkpoint must not pass for the old one.

Hashing gigabytes whenever a stage starts would cost more than most stages save. So the texts beside
the weights (settings, tokenizer) are hashed whole; of the weights the size, the header, and of each
tensor its first, middle and last block. Training, merging or rounding moves values all over a
tensor. A change of a few values between these blocks alone is not seen: `--force` is for that.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rc_ray.artifacts import digest, sha256_file
from rc_ray.assets import EMBEDDED_MODEL
from rc_ray.config import ModelConfig
from rc_ray.errors import ArtifactError

_TEXTS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_WEIGHTS = (".safetensors", ".bin")
_BLOCK = 4096
"""Bytes; 2,048 values in bf16."""
_NUM_SLICES = 256
"""Of a file whose tensors are not told, in place of them."""


def known_base(model: ModelConfig) -> dict[str, Any]:
    """The settings of the base LLM, and `content` where they name a folder.

    Raises:
        ArtifactError: a file of the folder cannot be read.
    """
    known = model.model_dump(mode="json")
    folder = Path(model.path).expanduser()
    if model.path != EMBEDDED_MODEL and folder.is_dir():
        known["content"] = content_digest(folder)
    return known


def content_digest(folder: Path) -> str:
    """Hex digest of a model's folder, wherever it lies and whenever it was written.

    Raises:
        ArtifactError: a file cannot be read.
    """
    try:
        paths = sorted(
            path
            for path in folder.iterdir()
            if path.suffix in (*_TEXTS, *_WEIGHTS) and not path.name.startswith(".")
        )
        stats = [(path, path.stat()) for path in paths if path.is_file()]
        return _digest_of(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    except OSError as error:
        raise ArtifactError(
            f"{error.filename or folder}: {error.strerror or error}; `model.path` needs a folder "
            "that can be read"
        ) from None


@functools.lru_cache(maxsize=8)
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files that are known by path, size and time: a stage asks once for each of its parts."""
    return digest(
        {
            path.name: sha256_file(path) if path.suffix in _TEXTS else _sampled(path, size)
            for path, size, _ in files
        }
    )


def _sampled(path: Path, size: int) -> str:
    """Hex SHA-256 of a file of weights: its size, its header and some blocks of each part."""
    state = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        for start, end in _parts(file, size):
            for offset, length in _blocks(start, end):
                file.seek(offset)
                state.update(file.read(length))
    return state.hexdigest()


def _parts(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Where the header and the tensors begin and end; slices of a file of another form.

    A safetensors file begins with the length of its header, 8 bytes, and the header, JSON.
    """
    length = int.from_bytes(file.read(8), "little")
    data = 8 + length
    try:
        header = json.loads(file.read(length)) if data <= size else {}
        spans = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
        parts = [(data + int(start), data + int(end)) for start, end in spans]
    except (AttributeError, KeyError, TypeError, ValueError):
        parts = []
    if not parts:
        step = max(1, -(-size // _NUM_SLICES))
        yield from ((start, min(start + step, size)) for start in range(0, size, step))
        return
    # Small blocks, so that what a tensor is called and where it lies is read to the last byte.
    yield from ((start, min(start + _BLOCK, data)) for start in range(0, data, _BLOCK))
    yield from parts


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """First, middle and last block of a part, or all of it: (offset, bytes)."""
    if end - start <= 3 * _BLOCK:
        yield start, end - start
        return
    for place in range(3):
        yield start + (end - start - _BLOCK) * place // 2, _BLOCK
