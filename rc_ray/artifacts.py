"""Run folders: where each stage keeps its output, so written that a kill never loses finished work.

A stage folder is finished when it holds `manifest.json`. It is built in a sibling temporary folder
or file and renamed, so no reader ever sees half of one. The manifest names the config section, the
seed, the digests of what was read and of what was written; other inputs make the stage stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_ray.errors import ArtifactError

MANIFEST = "manifest.json"
METHOD = 3
"""Raise when the same settings give another result, or a file another form."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/<name>`; the only place that spells them."""

    root: Path

    @property
    def config_path(self) -> Path:
        return self.root / "config.yaml"

    @property
    def logs_dir(self) -> Path:
        return self.root / "logs"

    def domain_dir(self, domain: str) -> Path:
        return self.root / "data" / domain

    def held_out_dir(self, domain: str) -> Path:
        """What a tested domain keeps from other domains' ingredients that are mixed on it."""
        return self.root / "held_out" / domain

    def prior_dir(self, domain: str) -> Path:
        """A popularity prior that was refreshed from a newer log; absent where none was."""
        return self.root / "priors" / domain

    @property
    def spirit_dir(self) -> Path:
        return self.root / "spirit"

    def ingredient_dir(self, domain: str) -> Path:
        return self.root / "ingredients" / domain

    def joint_dir(self, domain: str) -> Path:
        return self.root / "controls" / "joint" / domain

    @property
    def sweep_path(self) -> Path:
        """Of all domains' trials in one table; `.json` beside it is for programs."""
        return self.root / "ingredients" / "sweep.md"

    @property
    def search_path(self) -> Path:
        """Of all domains' trials of a search over merge settings; `.json` is for programs."""
        return self.root / "cocktails" / "search.md"

    @property
    def mix_work(self) -> Path:
        return self.root / "cocktails.work"

    def cocktail_dir(self, domain: str) -> Path:
        return self.root / "cocktails" / domain

    def explanation_path(self, domain: str) -> Path:
        """The page on a domain's cocktail; `rc-ray merge --explain` writes it."""
        return self.root / "cocktails" / "explain" / f"{domain}.html"

    def mix_dir(self, domain: str, name: str) -> Path:
        """Of one of a domain's mixes, `cocktail` and `uniform` among them."""
        return self.cocktail_dir(domain) / mix_place(name)

    def adapter_dir(self, domain: str, system: str) -> Path | None:
        """Of the adapter that a system has on a domain; None for the bare base."""
        places = {
            "base": None,
            "spirit": self.spirit_dir,
            "ingredient": self.ingredient_dir(domain),
            "joint": self.joint_dir(domain),
        }
        return places[system] if system in places else self.mix_dir(domain, system)

    def mix_work_dir(self, domain: str) -> Path:
        """Single mixes with manifests of their own, so that none is ever made twice."""
        return self.mix_work / domain

    @property
    def evaluate_dir(self) -> Path:
        return self.root / "evaluate"

    @property
    def report_dir(self) -> Path:
        return self.root / "report"


def mix_place(name: str) -> str:
    """Where a mix lies inside its domain's folder of cocktails; "." is that folder itself."""
    return {"cocktail": ".", "uniform": "uniform"}.get(name, f"mixes/{name}")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(f"{path}: damaged; delete it and run the stage again") from None


@contextmanager
def replaced_dir(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place when the block succeeds.

    What stood there stays, or comes back, when anything fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    restored(target)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    work.chmod(0o755)
    try:
        yield work
        old = target.with_name(f"{_old_prefix(target)}{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)  # of a killed process that had the same id
        if target.exists():
            os.replace(target, old)
        os.replace(work, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        restored(target)
        shutil.rmtree(work, ignore_errors=True)
        raise


def _old_prefix(target: Path) -> str:
    return f".{target.name}.old-"


def restored(target: Path) -> bool:
    """Whether the folder is there, put back if a killed `replaced_dir` had moved it aside."""
    if target.exists():
        return True
    prefix = _old_prefix(target)
    old = [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    if old:
        os.replace(max(old, key=lambda path: path.stat().st_mtime_ns), target)
    return bool(old)


def write_manifest(
    folder: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, str],
    metrics: Mapping[str, Any],
) -> None:
    """Seal a finished stage folder.

    Args:
        folder: the stage folder, holding everything but the manifest; hidden files and folders
            are no part of it.
        stage: the CLI verb.
        config: the settings that shaped the result.
        seed: the seed in use.
        inputs: name -> digest of everything that was read.
        metrics: what the stage measured, JSON-able.
    """
    files = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    write_json(
        folder / MANIFEST,
        {
            "stage": stage,
            "fingerprint": fingerprint(config=config, seed=seed, inputs=inputs),
            "seed": seed,
            "config": dict(config),
            "inputs": dict(inputs),
            "outputs": files,
            "metrics": dict(metrics),
        },
    )


def fingerprint(*, config: Mapping[str, Any], seed: int, inputs: Mapping[str, str]) -> str:
    """What decides whether a finished stage can stand: same method, settings, seed and inputs."""
    return digest({"method": METHOD, "config": dict(config), "seed": seed, "inputs": dict(inputs)})


def is_finished(folder: Path, wanted: str) -> bool:
    """Whether `folder` holds a finished stage with this fingerprint."""
    if not (folder / MANIFEST).exists():
        return False
    return bool(read_json(folder / MANIFEST).get("fingerprint") == wanted)


def adapter_digest(folder: Path) -> str:
    """Digest of the adapter in a folder.

    Raises:
        ArtifactError: there is none.
    """
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise ArtifactError(f"{path}: missing; run the stage that makes it again with --force")
    return sha256_file(path)


def manifest_digest(folder: Path) -> str:
    """Digest of a finished stage, for the inputs of the next one.

    Raises:
        ArtifactError: the stage has not finished.
    """
    if not (folder / MANIFEST).exists():
        raise ArtifactError(f"{folder}: not there yet; run the stage that makes it first")
    return sha256_file(folder / MANIFEST)
