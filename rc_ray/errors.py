"""Errors that are a person's to mend: each message names the file or field and the fix.

The command line prints them as one plain line, without a stack trace.
"""


class UserError(ValueError):
    """Something to be mended outside the code."""


class ConfigError(UserError):
    """A mistake in an experiment file, or a request that the machine cannot meet."""


class ArtifactError(UserError):
    """A file of a run or an adapter is missing, damaged or belongs to something else."""
