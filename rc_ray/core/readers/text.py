"""A text file as blocks of whole lines: decompressed, in UTF-8, hashed and counted on the way."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rc_ray.core.readers.faults import fault, one_line

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20
_BITE_BYTES = 64
_BOM = b"\xef\xbb\xbf"
_CODECS = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))


@dataclass(frozen=True)
class Block:
    data: bytes
    """Whole lines in valid UTF-8; only the last line of a file may lack its newline."""
    first_line: int
    """Number of the first line, from 1."""


class TextFile:
    """Reads a text file once, from its start.

    What is compressed with gzip or zstd is told by the first bytes, not by the name: browsers
    unpack files and keep their names. Bytes that are no UTF-8 become U+FFFD.

    Args:
        path: the file.
        encoding: `utf-8`, or another that the publisher documents, such as `latin-1`.
        tick: told the number of bytes of the file (compressed) after every read.
    """

    def __init__(
        self,
        path: Path,
        *,
        encoding: str = "utf-8",
        tick: Callable[[int], None] | None = None,
    ) -> None:
        self.path = path
        self.replaced_lines = 0
        """Lines that held bytes or characters which cannot be text."""
        self._encoding = encoding
        self._tick = tick
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file's bytes as far as they were read."""
        return self._hash.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """Blocks of about 4 MB.

        Raises:
            ReaderError: empty, truncated, UTF-16, or a line that never ends.
        """
        first_line = 1
        for data in self._whole_lines():
            if first_line == 1:
                if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise fault(self.path, "", "is UTF-16; save it as UTF-8")
                data = data.removeprefix(_BOM)
            yield Block(self._as_utf8(data), first_line)
            first_line += data.count(b"\n")

    def _whole_lines(self) -> Iterator[bytes]:
        pieces: list[bytes] = []
        length = line = 0
        for chunk in self._chunks():
            cut = chunk.rfind(b"\n") + 1
            if cut:
                pieces.append(chunk[:cut])
                data = b"".join(pieces)
                line += data.count(b"\n")
                yield data
                pieces, length = [], 0
            pieces.append(chunk[cut:])
            length += len(chunk) - cut
            if length > MAX_LINE_BYTES:
                raise fault(
                    self.path,
                    f"line {line + 1}",
                    f"is longer than {MAX_LINE_BYTES >> 20} MB; is this a text file of one row "
                    "per line?",
                )
        rest = b"".join(pieces)
        if rest:
            yield rest

    def _chunks(self) -> Iterator[bytes]:
        """The file's text as bytes; a damaged stream is told with the line it breaks off in."""
        with self.path.open("rb", buffering=0) as file:
            head = file.read(4)
            file.seek(0)
            if not head:
                raise fault(self.path, "", "is empty; fetch it again")
            stream: Any = _Counted(file, self._note)
            codec = next((name for magic, name in _CODECS if head.startswith(magic)), None)
            if codec is not None:
                stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec)
            num_chunks = 0
            while True:
                try:
                    chunk: bytes = stream.read(BLOCK_BYTES)
                except OSError as error:
                    if codec is None:
                        raise
                    raise fault(
                        self.path,
                        f"line {self._broken_line(codec, num_chunks)}",
                        f"the {codec} data is cut off or damaged here ({one_line(error)}); "
                        "fetch the file again",
                    ) from None
                if not chunk:
                    break
                yield chunk
                num_chunks += 1

    def _broken_line(self, codec: str, num_chunks: int) -> int:
        """The line in which packed data breaks off, found by reading it again in small bites.

        Args:
            codec: how it is packed.
            num_chunks: chunks of `BLOCK_BYTES` that can be read.
        """
        line = 1
        with (
            self.path.open("rb") as file,
            pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec) as stream,
        ):
            for _ in range(num_chunks):
                line += stream.read(BLOCK_BYTES).count(b"\n")
            try:
                while bite := stream.read(_BITE_BYTES):
                    line += bite.count(b"\n")
            except OSError:
                pass
        return line

    def _note(self, data: bytes) -> None:
        self._hash.update(data)
        if self._tick is not None:
            self._tick(len(data))

    def _as_utf8(self, data: bytes) -> bytes:
        if self._encoding != "utf-8":
            return data.decode(self._encoding, "replace").encode()
        try:
            data.decode()
        except UnicodeDecodeError:
            self.replaced_lines += sum(not _is_utf8(line) for line in data.split(b"\n"))
            return data.decode(errors="replace").encode()
        return data


class _Counted(io.RawIOBase):
    """Hands on what it reads and tells of it."""

    def __init__(self, file: io.FileIO, note: Callable[[bytes], None]) -> None:
        self._file = file
        self._note = note

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size) or b""
        self._note(data)
        return data


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
