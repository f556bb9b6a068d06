"""Validated configuration from YAML: frozen dataclasses whose fields declare what they may be.

One way for profiles, recipes, workloads and the gateway: an unknown key, a missing one, a wrong type or a value out of
range is an error of the class's own type that names the path of the key.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import reprlib
import typing
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cxr_triton.errors import CxrError, InvalidConfig, unknown_key

MAX_YAML_BYTES = 1 << 20


def in_range(low: float, high: float, **kwargs) -> typing.Any:
    """A field whose value lies between `low` and `high`, both allowed."""
    return field(metadata={"range": (low, high)}, **kwargs)


def one_of(values: tuple[str, ...], **kwargs) -> typing.Any:
    """A field whose value is one of `values`."""
    return field(metadata={"one_of": values}, **kwargs)


@dataclass(frozen=True, eq=False)
class Checked:
    """Base of frozen data whose fields declare what they may be, by `in_range` and `one_of`."""

    error: typing.ClassVar[type[CxrError]] = InvalidConfig
    """What is raised for a value, or a key, that may not be."""

    @classmethod
    @functools.cache
    def field_types(cls) -> dict[str, typing.Any]:
        """Types of the fields by name."""
        return typing.get_type_hints(cls)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if "range" in f.metadata:
                low, high = f.metadata["range"]
                if not low <= value <= high:
                    raise self.error(f"{f.name}: {value!r} is outside {low} to {high}")
            if "one_of" in f.metadata and value not in f.metadata["one_of"]:
                raise self.error(f"{f.name}: {value!r} is none of {', '.join(f.metadata['one_of'])}")


C = typing.TypeVar("C", bound=Checked)


def build(cls: type[C], data: object, where: str) -> C:
    """An instance of a `Checked` dataclass from parsed YAML; errors, of its own type, carry the path of the key."""
    if not isinstance(data, dict):
        raise cls.error(f"{where}: is {type(data).__name__}, expected a mapping of keys")
    hints = cls.field_types()
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise cls.error(unknown_key(str(key), names, where))
    for f in dataclasses.fields(cls):
        if f.name not in data and f.default is f.default_factory is dataclasses.MISSING:
            raise cls.error(f"{where}.{f.name}: is missing; add it")
    values = {key: value_of(hints[key], value, f"{where}.{key}", cls.error) for key, value in data.items()}
    try:
        return cls(**values)
    except cls.error as error:
        raise cls.error(f"{where}.{error.message}") from None


def value_of(kind, value: object, where: str, error: type[CxrError]):
    """`value` as a field of type `kind` takes it: a whole number where a float is asked for becomes one."""
    if type(None) in typing.get_args(kind):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, Checked):
        return build(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if not isinstance(value, dict) or not value:
            raise error(f"{where}: is {_shown(value)}, expected a mapping with at least one name")
        return {str(key): value_of(args[1], item, f"{where}.{key}", error) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise error(f"{where}: is {_shown(value)}, expected a list")
        return tuple(value_of(args[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise error(f"{where}: is {_shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    return value


def _shown(value: object) -> str:
    """The beginning of a value, which may name itself over and over: YAML's aliases make much of little."""
    return reprlib.repr(value)[:60]


class _GivenTwice(Exception):
    pass


def _safe_loader():
    """libyaml's, which is ten times as fast; an old one is taken down by a file that nests deep."""
    try:
        libyaml = importlib.import_module("yaml._yaml").get_version()
    except ImportError:
        return yaml.SafeLoader
    return yaml.CSafeLoader if libyaml >= (0, 2, 6) else yaml.SafeLoader


class _Loader(_safe_loader()):  # type: ignore[misc]
    """Safe loader that refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise _GivenTwice(f"line {node.start_mark.line + 1}: key {key!r:.80} is given twice; keep one")
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, error: type[CxrError]) -> object:
    """What a YAML file holds; raises `error` where it cannot be read, is no YAML or gives a key twice."""
    try:
        if (size := path.stat().st_size) > MAX_YAML_BYTES:
            raise error(f"{path.name}: has {size} bytes, allowed {MAX_YAML_BYTES}; give a smaller file")
        return yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 - it is a safe loader
    except _GivenTwice as reason:
        raise error(f"{path.name}: {reason}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError, TypeError) as reason:
        raise error(f"{path.name}: not readable as YAML: {reason or type(reason).__name__}") from None
