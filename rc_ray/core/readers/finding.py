"""Which files a command line means, and what each of them holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rc_ray.core.readers.faults import ReaderError, fault
from rc_ray.core.readers.layout import ROLES, Format, Layout, Role, medium_of
from rc_ray.core.readers.shard import Shard


def find(
    found: Format,
    paths: Sequence[Path],
    *,
    interactions: Sequence[Path] = (),
    items: Sequence[Path] = (),
) -> dict[Role, tuple[Shard, ...]]:
    """The shards of every role, in the order of their names.

    Args:
        found: the format.
        paths: files, and folders that are searched for the format's file names.
        interactions: files, and folders of nothing but files, that hold interactions.
        items: the same for items.

    Raises:
        ReaderError: no such file, nothing found for a role, or several that do not belong together.
    """
    shards: dict[Role, list[Shard]] = {role: [] for role in ROLES}
    for path in paths:
        for shard in _search(found, path) if _is_dir(path) else (_by_name(found, path),):
            shards[shard.role].append(shard)
    for role, named in zip(ROLES, (interactions, items), strict=True):
        for path in named:
            files = _files_below(path) if _is_dir(path) else [path]
            if not files:
                raise fault(path, "", "holds no CSV, TSV, JSON lines or Parquet file")
            shards[role].extend(Shard(file, _forced(found, role, file)) for file in files)
    for role, of_role in shards.items():
        if not of_role:
            given = ", ".join(map(str, (*paths, *interactions, *items))) or "no PATH given"
            raise ReaderError(
                f"{given}: no file of {role} found; `{found.name}` expects "
                f"{found.expected()}; or name the file with `--{role} PATH`"
            )
    return {role: _ordered(of_role) for role, of_role in shards.items()}


def _ordered(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    unique = {shard.path.resolve(): shard for shard in shards}
    return tuple(sorted(unique.values(), key=lambda shard: _natural(shard.path)))


def _is_dir(path: Path) -> bool:
    if not path.exists():
        raise fault(path, "", "no such file or folder")
    return path.is_dir()


def _by_name(found: Format, path: Path) -> Shard:
    layout = found.layout_of(path)
    if layout is None:
        raise fault(
            path,
            "",
            f"its name is none of `{found.name}` ({found.expected()}); say what it holds with "
            "`--interactions PATH` or `--items PATH`",
        )
    return Shard(path, layout)


def _search(found: Format, folder: Path) -> list[Shard]:
    """Files in the folder that bear a name of the format; of one role all parts of one table."""
    shards = []
    for path in _files_below(folder, any_name=True):
        layout = found.layout_of(path)
        if layout is not None:
            shards.append(Shard(path, layout))
    if not shards:
        raise fault(folder, "", f"holds no file that `{found.name}` expects ({found.expected()})")
    for role in ROLES:
        tables: dict[str, Path] = {}
        for shard in shards:
            if shard.role == role:
                tables.setdefault(_table(shard.path.relative_to(folder)), shard.path)
        if len(tables) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in tables.values())
            raise fault(
                folder,
                "",
                f"holds several tables of {role}: {names}; a domain has one, so name the files",
            )
    return shards


def _files_below(folder: Path, *, any_name: bool = False) -> list[Path]:
    """Files below a folder in the order of their names, hidden ones and markers left out."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        and (any_name or medium_of(path) is not None)
    ]
    return sorted(files, key=_natural)


def _forced(found: Format, role: Role, path: Path) -> Layout:
    """The layout of a file whose role was given: the one its name tells, else the role's first."""
    by_name = found.layout_of(path)
    if by_name is not None and by_name.role == role:
        return by_name
    return next(layout for layout in found.layouts if layout.role == role)


def _table(path: Path) -> str:
    """What the parts of one table have in common: the path without its numbers."""
    return re.sub(r"\d+", "#", str(path))


def _natural(path: Path) -> str:
    return re.sub(r"\d+", lambda match: match[0].zfill(12), str(path))
