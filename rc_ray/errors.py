"""Errors that are a person's to mend: each message names the file or field and the fix.

The command line prints them as one plain line, without a stack trace.
"""

import unicodedata


def printable(text: str) -> str:
    """The text without control characters but line breaks: quoted files must not steer a terminal.

    Each of them becomes a replacement character.
    """

    def shown(c: str) -> bool:
        return c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs"

    return "".join(c if shown(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


class UserError(ValueError):
    """Something to be mended outside the code."""


class ConfigError(UserError):
    """A mistake in an experiment file, or a request that the machine cannot meet."""


class ArtifactError(UserError):
    """A file of a run or an adapter is missing, damaged or belongs to something else."""
