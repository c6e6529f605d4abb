"""Training files: YAML to settings and back, with errors that name the file, the line and the key."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.fields import FieldInfo

from gemini.errors import ConfigError, naming_file
from gemini.recipe.settings import Settings, section_in

__all__ = ["parse_settings", "read_settings", "write_template"]

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""


def read_settings(path: Path) -> Settings:
    """Read a training file.

    Args:
        path: a YAML file.

    Returns:
        The settings; paths in them are unchanged.

    Raises:
        ConfigError: a setting is wrong; the message names the place, the expected value and a likely correction.
        OffloadIOError: the file cannot be read.
    """
    try:
        with naming_file("read", path):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8: {error.reason} at byte {error.start}") from None
    return parse_settings(text, source=str(path))


def parse_settings(text: str, *, source: str) -> Settings:
    """Parse a training file's text; see `read_settings`.

    Args:
        text: YAML.
        source: name of the text in messages.

    Returns:
        The settings.

    Raises:
        ConfigError: a setting is wrong.
    """
    try:
        lines, values = _read_yaml(text, source)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ConfigError(f"{source}:{line}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # invalid numbers and dates
        raise ConfigError(f"{source}: this is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: expected sections and settings, got endlessly nested values") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}:1: expected keys with values, such as model:, got {type(values).__name__}")
    try:
        return Settings.model_validate(values)
    except pydantic.ValidationError as error:
        first, *others = [_describe(each, lines, source) for each in error.errors()]
        raise ConfigError("\n".join([first, *others])) from None


def _read_yaml(text: str, source: str) -> tuple[dict[Place, int], Any]:
    """Return the line of each value, and the values."""
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return {}, {}
    lines = dict(_lines_of(root, (), source))
    return lines, loader.construct_document(root)


def _lines_of(node: yaml.Node, place: Place, source: str) -> Iterator[tuple[Place, int]]:
    """Yield the line of each value, from 1; refuse duplicate keys, which YAML allows."""
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{source}:{key.start_mark.line + 1}: expected the name of a setting before the colon"
                )
            if key.value in seen:
                raise ConfigError(f"{source}:{key.start_mark.line + 1}: {key.value} is given twice; remove one")
            seen.add(key.value)
            yield (*place, key.value), key.start_mark.line + 1
            for inner, line in _lines_of(value, (*place, key.value), source):
                if inner != (*place, key.value):
                    yield inner, line
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _lines_of(item, (*place, i), source)


def _describe(error: Any, lines: dict[Place, int], source: str) -> str:
    """Return one line for one of pydantic's errors."""
    place = tuple(error["loc"])
    while place not in lines and place:  # pydantic adds the members of unions
        place = place[:-1]
    name = ".".join(str(part) for part in place)
    kind, where = error["type"], f"{source}:{lines.get(place, 1)}"
    if kind == "extra_forbidden":
        section = _section_of(place[:-1])
        meant = difflib.get_close_matches(str(place[-1]), section, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"expected one of {', '.join(section)}"
        return f"{where}: {name}: there is no such setting; {hint}"
    if kind == "missing" and isinstance(error["input"], dict):
        missing = tuple(error["loc"])
        description = _section_of(missing[:-1])[missing[-1]].description
        return f"{where}: {'.'.join(missing)} is missing: {description}"
    message = error["msg"].removeprefix("Value error, ")
    is_told = isinstance(error["input"], dict) or "got " in message or "read " in message
    return f"{where}: {name}: {message}" + ("" if is_told else f", got {reprlib.repr(error['input'])}")


def _section_of(place: Place) -> dict[str, FieldInfo]:
    """Return the fields of the section at a place."""
    section: type[pydantic.BaseModel] = Settings
    for part in place:
        found = section_in(section.model_fields[str(part)].annotation)
        assert found is not None, place
        section = found
    return dict(section.model_fields)


def write_template(known: dict[str, dict[str, Any]]) -> str:
    """Return a training file with every setting, its default and its description.

    Args:
        known: known values by section and key; the other settings are written as comments.

    Returns:
        YAML that `parse_settings` accepts, if `known` contains everything without a default.
    """
    lines = [
        "# A training file: python -m gemini train THIS",
        "# Lines that are commented out show defaults, or examples for sections that are off.",
    ]
    for name, field in Settings.model_fields.items():
        section = section_in(field.annotation)
        assert section is not None
        lines += ["", f"{name}:  # {field.description}", *_template_of(section, known.get(name, {}), indent=2)]
    return "\n".join(lines) + "\n"


def _template_of(section: type[pydantic.BaseModel], known: dict[str, Any], *, indent: int) -> Iterator[str]:
    margin = " " * indent
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not None and name not in known:
            yield f"{margin}# {name}:  # {field.description}"
            yield from (
                f"{margin}# {line[indent:]}" for line in _template_of(inner, _examples(inner), indent=indent + 2)
            )
        elif inner is not None:
            yield f"{margin}{name}:  # {field.description}"
            yield from _template_of(inner, known[name], indent=indent + 2)
        else:
            value = known.get(name, None if field.is_required() else field.default)
            mark = "" if name in known else "# "
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6).splitlines()[0]
            yield f"{margin}{mark}{name}: {text}  # {field.description}"


def _examples(section: type[pydantic.BaseModel]) -> dict[str, Any]:
    """Return values for an optional section's required settings, so that it can be uncommented unchanged."""
    examples = {"path": "/nvme/swap", "budget": "100GiB"}
    return {name: examples[name] for name, field in section.model_fields.items() if field.is_required()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
