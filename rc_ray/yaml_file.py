"""The text of an experiment file: read it, override fields, and tell what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rc_ray.errors import ConfigError


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds no sections.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such experiment file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the experiment's YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `name:` and `data:` at top level")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one field of `raw` by `dotted.key=value`, the value parsed as YAML.

    Raises:
        ConfigError: it is not of that form, or names a field inside of what has none.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write it as dotted.key=value")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} has no fields")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {text!r} is not valid YAML") from None


def explain(path: Path, error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with a file that should hold a `model`, one line for each mistake."""
    lines = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1])
            hint = f"; known fields: {', '.join(known)}" if known else ""
            lines.append(f"{path}: unknown field `{location}`{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: the field `{location}` is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            # A rule across sections names the fields itself.
            lines.append(f"{path}: `{location}`: {message}" if location else f"{path}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `location`, where it is a plain section."""
    section: Any = model
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field is not None else None
    return sorted(getattr(section, "model_fields", {}))
