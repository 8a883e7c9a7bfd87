"""What the verbs of the command line share: options, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ExperimentFile = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT", help="a YAML file, see jobs/")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a field, e.g. train.num_steps=20"),
]
Force = Annotated[bool, typer.Option("--force", help="redo what is finished")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="show Ray's own output, and stack traces of errors")
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="a Ray cluster; else RAY_ADDRESS, else Ray on this machine"),
]


@contextmanager
def plain_errors(verbose: bool) -> Iterator[None]:
    """Tell a person's mistakes in one line with exit code 2; a fault of ours keeps its trace."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray Train turns the one into the other
        typer.echo("stopped; what is finished stays, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        from rc_ray.errors import UserError

        if verbose or not isinstance(error, UserError | OSError):
            raise
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(2) from None


def told(error: Exception) -> str:
    """What an error says; of the system's own (a full disk, no permission), which file it met."""
    from rc_ray.errors import printable

    text = str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or text.strip() or type(error).__name__
        text = f"{where}{what.splitlines()[0]}"
    return printable(text)
