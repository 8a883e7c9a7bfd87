"""The text of an experiment file: read it, override fields, and tell what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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
    if not separator or not all(key.split(".")):
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
    lines: dict[str, None] = {}
    misfits: dict[str, list[str]] = {}
    located = [(_located(model, problem["loc"]), problem) for problem in error.errors()]
    places = [place for (place, _), _ in located]
    for (place, section), problem in located:
        if any(len(one) > len(place) and one[: len(place)] == place for one in places):
            continue  # what is wrong inside says more
        where = ".".join(place)
        line, misfit = _told(problem, where, section)
        if line:
            lines[f"{path}: {line}"] = None
        else:
            misfits.setdefault(where, []).append(misfit)
    for where, told in misfits.items():  # several: it fits no member of a union
        lines[f"{path}: `{where}`: {' or '.join(told)}"] = None
    return "\n".join(lines)


def _told(problem: Any, where: str, section: Any) -> tuple[str, str]:
    """A whole line on a mistake, or else what is wrong with the field that it names."""
    outer, _, last = where.rpartition(".")
    context = problem.get("ctx", {})
    field = f"{where}.{str(context.get('discriminator', '')).strip(chr(39))}"
    match problem["type"]:
        case "extra_forbidden":
            known = sorted(getattr(section, "model_fields", {}))
            hint = f"; known fields: {', '.join(known)}" if known else ""
            return f"unknown field `{where}`{hint}", ""
        case "missing":
            return f"the field `{where}` is missing", ""
        case "union_tag_not_found":
            return f"the field `{field}` is missing", ""
        case "union_tag_invalid":
            tags = context["expected_tags"].replace("'", "")
            return f"`{field}` is {context['tag']}, which is none of {tags}", ""
        case "string_pattern_mismatch" if problem["loc"][-1] == "[key]":
            return f"`{outer}`: the name {last} does not match {context['pattern']}", ""
        case "tuple_type" | "list_type":
            return "", "Input should be a list, such as [a, b]"
        case "too_short":
            return "", f"Input should name at least {context['min_length']}"
        case "path_type":
            return "", "Input should be a path"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "", "Input should be a section of fields"
    message = str(problem["msg"]).removeprefix("Value error, ")
    # A rule across sections names the fields itself.
    return ("", message) if where else (message, "")


def _located(model: Any, location: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """A place in a `model` as a person writes it, and the section that its last part is a field of.

    What pydantic puts between for itself, the member of a union that it tried, is left out.
    """
    place: list[str] = []
    section, here = None, model
    for part in location:
        if part == "[key]":
            continue
        outer, members = here, _members(here)
        models = [one for one in members if hasattr(one, "model_fields")]
        named = [one for one in models if part in one.model_fields]
        tagged = [one for one in models if len(models) > 1 and _has_tag(one, part)]
        if tagged:
            here = tagged[0]
            continue
        if named:
            here = named[0].model_fields[part].annotation
        elif models:
            here = None
        else:
            kind = tuple if isinstance(part, int) else dict
            boxes = [one for one in members if get_origin(one) is kind]
            if not boxes:
                continue
            here = get_args(boxes[0])[1 if kind is dict else 0]
        section = models[0] if models else outer
        place.append(str(part))
    return place, section


def _members(annotation: Any) -> list[Any]:
    """The types that a field may have, without the marks around them."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in _members(part)]
    return [annotation]


def _has_tag(model: Any, tag: int | str) -> bool:
    fields = model.model_fields.values()
    return any(tag in get_args(one.annotation) for one in fields if _is_literal(one.annotation))


def _is_literal(annotation: Any) -> bool:
    return get_origin(annotation) is Literal
