"""What is wrong with a raw file, in one line that names the file, the row and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rc_ray.errors import UserError


class ReaderError(UserError):
    """A raw file cannot be imported."""


def fault(path: Path, where: str, what: str) -> ReaderError:
    """The error for a place in a file.

    Args:
        path: the file.
        where: "line 17", "row 17" or "" for the whole file.
        what: the mistake and its fix.
    """
    return ReaderError(": ".join(part for part in (str(path), where, what) if part))


def shown(value: object) -> str:
    """A value from a file, short enough for an error line."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str]) -> str:
    """Names of columns; one that begins or ends with a space stands in quotes, to be seen."""
    return ", ".join(shown(name) if name == name.strip() else repr(name)[:60] for name in names)


def one_line(error: BaseException) -> str:
    """A library's message on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
