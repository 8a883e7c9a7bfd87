"""The verb `import`: raw files of a publisher -> a folder that `format: parquet` reads.

Each raw file is streamed once. Several files of interactions become as many part files; they are
read one after another, or in parallel as tasks of Ray Data, one per file.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import yaml

from rc_ray.artifacts import MANIFEST, RunFolder, read_json, replaced_dir, write_manifest
from rc_ray.core.readers.faults import ReaderError
from rc_ray.core.readers.finding import find
from rc_ray.core.readers.formats import format_named
from rc_ray.core.readers.shard import Shard, ShardReader
from rc_ray.core.sources import INTERACTIONS, ITEMS
from rc_ray.data_config import DomainName
from rc_ray.errors import UserError
from rc_ray.progress import Progress, TaskHandle
from rc_ray.session import ray_session

STAGE = "import"
PARALLEL_SHARDS = 8
PARALLEL_BYTES = 256 << 20
"""More files of interactions than this, and larger ones, are read in parallel without being asked:
smaller ones are read before Ray has started."""
_ROW_GROUP_ROWS = 1 << 18


@dataclass(frozen=True)
class Request:
    """What to import, as the command line says it."""

    format: str
    domain: str
    out: Path
    paths: Sequence[Path] = ()
    interactions: Sequence[Path] = ()
    items: Sequence[Path] = ()
    columns: Sequence[str] = ()
    """Each `field=column`."""
    delimiter: str | None = None
    time_unit: str | None = None
    parallel: bool = False
    address: str | None = None
    verbose: bool = False


def run(request: Request, console: Progress) -> dict[str, Any]:
    """Import the files; the folder `request.out` appears whole or not at all.

    Returns:
        What was counted, by role.

    Raises:
        ReaderError: a file, a row of it, or the request cannot be used.
    """
    console.stage(f"{STAGE} {request.format}")
    columns = _columns(request.columns)
    found = format_named(
        request.format,
        columns=columns,
        delimiter="\t" if request.delimiter == "tab" else request.delimiter,
        time_unit=request.time_unit,
    )
    _check_domain(request.domain)
    shards = find(found, request.paths, interactions=request.interactions, items=request.items)
    _check_out(request.out, [shard for of_role in shards.values() for shard in of_role])
    with _without_a_trace(request.out), replaced_dir(request.out) as work:
        items, item_digests = _write_items(shards["items"], work / "items.parquet", console)
        parallel = request.parallel or _are_large(shards["interactions"])
        target = work / "interactions.parquet"
        if len(shards["interactions"]) == 1:
            interactions, digests = _write_one(shards["interactions"][0], target, console)
        elif not parallel:
            interactions, digests = _write_parts(shards["interactions"], target, console)
        else:
            interactions, digests = _write_parallel(
                shards["interactions"], target, request, work / ".ray", console
            )
        counts = {"interactions": interactions, "items": items}
        write_manifest(
            work,
            stage=STAGE,
            config={
                "format": request.format,
                "domain": request.domain,
                "columns": columns,
                "delimiter": request.delimiter,
                "time_unit": request.time_unit,
            },
            seed=0,
            inputs=digests | item_digests,
            metrics=counts,
        )
    return counts


def summary(request: Request, counts: dict[str, dict[str, int]]) -> str:
    """What was read, and the line for an experiment file."""
    lines = []
    for role, of_role in counts.items():
        told = [f"{of_role['rows']:,} rows"]
        told += [
            f"{name.replace('_', ' ')} {count:,}"
            for name, count in of_role.items()
            if count and name != "rows"
        ]
        lines.append(f"{role}: {', '.join(told)}")
    source = {"format": "parquet", "domain": request.domain, "path": str(request.out.absolute())}
    entry = yaml.safe_dump(source, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return "\n".join(
        [*lines, "Under `data.sources` of an experiment file (see README.md):", f"    - {entry}"]
    )


def _columns(assignments: Sequence[str]) -> dict[str, str]:
    columns = {}
    for assignment in assignments:
        field, sign, column = assignment.partition("=")
        if not sign or not field or not column:
            raise ReaderError(f"--column {assignment}: must be FIELD=COLUMN, as in title=name")
        columns[field] = column
    return columns


def _check_domain(domain: str) -> None:
    try:
        pydantic.TypeAdapter(DomainName).validate_python(domain)
    except pydantic.ValidationError:
        raise ReaderError(
            f"--domain {domain}: must be lower-case letters, digits, `-` and `_`, 64 at most"
        ) from None


def _check_out(out: Path, shards: Sequence[Shard]) -> None:
    """Refuse to replace what is no earlier import, or what is about to be read."""
    if out.exists():
        if not out.is_dir():
            raise ReaderError(f"--out {out}: is a file; name a folder")
        ours = (out / MANIFEST).exists() and read_json(out / MANIFEST).get("stage") == STAGE
        if not ours and any(out.iterdir()):
            raise ReaderError(
                f"--out {out}: holds files that are no import; name another folder or empty it"
            )
    for shard in shards:
        if out.resolve() in shard.path.resolve().parents:
            raise ReaderError(f"--out {out}: holds the input {shard.path}; name another folder")


@contextmanager
def _without_a_trace(out: Path) -> Iterator[None]:
    """Remove the folders above `out` that are made in the block where the block fails."""
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else writes there too
                folder.rmdir()
        raise


def _are_large(shards: Sequence[Shard]) -> bool:
    num_bytes = sum(shard.path.stat().st_size for shard in shards)
    return len(shards) > PARALLEL_SHARDS and num_bytes > PARALLEL_BYTES


def _write_items(
    shards: Sequence[Shard], target: Path, console: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    meter = _Meter(console, "items, MB", shards)
    counts: Counter[str] = Counter()
    digests = {}
    with pq.ParquetWriter(target, ITEMS, compression="zstd") as writer:
        for shard in shards:
            reader = ShardReader(shard, meter.tick)
            for group in _row_groups(reader.batches()):
                writer.write_table(group)
            counts.update(reader.counts)
            digests[str(shard.path)] = reader.digest
    meter.finish()
    return dict(counts), digests


def _write_one(
    shard: Shard, target: Path, console: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    meter = _Meter(console, "interactions, MB", [shard])
    counts, digest = _write_shard(shard, target, meter)
    meter.finish()
    return counts, {str(shard.path): digest}


def _write_parts(
    shards: Sequence[Shard], folder: Path, console: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    folder.mkdir()
    meter = _Meter(console, "interactions, MB", shards)
    counts: Counter[str] = Counter()
    digests = {}
    for index, shard in enumerate(shards):
        of_shard, digests[str(shard.path)] = _write_shard(shard, _part(folder, index), meter)
        counts.update(of_shard)
    meter.finish()
    return dict(counts), digests


def _write_parallel(
    shards: Sequence[Shard], folder: Path, request: Request, log_dir: Path, console: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    """One Ray Data task per shard; each writes its own part, so only counts travel."""
    folder.mkdir()
    console.note(f"{len(shards)} files in parallel")
    task = console.task("interactions, files", len(shards))
    counts: Counter[str] = Counter()
    digests = {}
    # A task's working folder is not this one's.
    target = folder.absolute()
    absolute = [replace(shard, path=shard.path.absolute()) for shard in shards]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        # A mistake in a file comes back as a value: Ray would wrap it in a trace and try again.
        index = int(row["index"])
        try:
            of_shard, digest = _write_shard(absolute[index], _part(target, index), None)
        except (UserError, OSError) as error:
            return {"index": index, "counts": "{}", "digest": "", "error": str(error)}
        return {"index": index, "counts": json.dumps(of_shard), "digest": digest, "error": ""}

    with ray_session(RunFolder(log_dir), address=request.address, verbose=request.verbose):
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"index": index} for index in range(len(shards))]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(convert)
        for done, row in enumerate(results.iter_rows(), start=1):
            if row["error"]:
                raise ReaderError(row["error"])
            counts.update(json.loads(row["counts"]))
            digests[str(shards[row["index"]].path)] = row["digest"]
            task.update(done, rows=f"{counts['rows']:,}")
    shutil.rmtree(log_dir, ignore_errors=True)  # of no use where all went well
    return dict(counts), digests


def _write_shard(shard: Shard, target: Path, meter: _Meter | None) -> tuple[dict[str, int], str]:
    """Write one file of interactions; its counts and its digest."""
    reader = ShardReader(shard, meter.tick if meter else None)
    with pq.ParquetWriter(target, INTERACTIONS, compression="zstd") as writer:
        for group in _row_groups(reader.batches()):
            writer.write_table(group)
    return reader.counts, reader.digest


def _row_groups(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches joined to tables of a size that Parquet compresses and reads well."""
    held: list[Any] = []
    for batch in batches:
        held.append(batch)
        if sum(one.num_rows for one in held) >= _ROW_GROUP_ROWS:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _part(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


class _Meter:
    """One bar over the bytes of several files, with the rows read so far."""

    def __init__(self, console: Progress, description: str, shards: Sequence[Shard]) -> None:
        size = sum(shard.path.stat().st_size for shard in shards)
        self._total = max(1, size >> 20)
        self._task: TaskHandle = console.task(description, self._total)
        self._num_bytes = 0
        self._num_rows = 0

    def tick(self, num_bytes: int, num_rows: int) -> None:
        self._num_bytes += num_bytes
        self._num_rows += num_rows
        # The last megabyte counts as read only when its rows are written.
        self._task.update(min(self._num_bytes >> 20, self._total - 1), rows=f"{self._num_rows:,}")

    def finish(self) -> None:
        self._task.update(self._total, rows=f"{self._num_rows:,}")
