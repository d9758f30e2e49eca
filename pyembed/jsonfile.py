"""JSON files of a checkpoint, read with errors that name the file, the field, what stood there and what was expected."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

T = TypeVar("T")
LARGEST_NUMBER = 10**30  # transformers writes a tokenizer without a limit as 10**30
LARGEST_JSON = 256 << 20  # bytes; the largest tokenizer.json in use are about 35 MB


def read_json(path: Path) -> Any:
    """The content of a JSON file. ValueError for what is not JSON, OSError for what cannot be read."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes; a JSON file of a model has at most {LARGEST_JSON}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again or fix it by hand.") from error


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose fields are read by type."""

    values: dict[str, Any]
    path: Path
    where: str = field(default="")  # names a nested object in errors, "text_config." for instance

    @classmethod
    def of(cls, path: Path) -> Fields:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a JSON {type(values).__name__}; an object was expected.")
        return cls(values, path)

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    @overload
    def get(self, name: str, kind: type[T]) -> T: ...
    @overload
    def get(self, name: str, kind: type[T], default: None) -> T | None: ...
    @overload
    def get(self, name: str, kind: type[T], default: T) -> T: ...
    def get(self, name: str, kind: type[T], default: Any = ...) -> Any:
        """A field of the given type (an int serves as float; null counts as absent). Without a default it must be there."""
        value = self.values.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.path} lacks the field {self.where}{name} ({kind.__name__}).")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) <= LARGEST_NUMBER else math.inf
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.path}: {self.where}{name} is {value!r}; expected {kind.__name__}.")
        if kind is int and isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise ValueError(f"{self.path}: {self.where}{name} is beyond 10**30; expected a number that something could have.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self.path}: {self.where}{name} is {value!r}; expected a finite number.")
        return value

    def positive(self, name: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """An int field of at least 1 and at most `most`, so that no size is taken at its word before memory is."""
        value = self.get(name, int) if default is None else self.get(name, int, default)
        if not 1 <= value <= most:
            raise ValueError(f"{self.path}: {self.where}{name} is {value}; expected a positive integer of at most {most}.")
        return value

    def sub(self, name: str) -> Fields | None:
        """A nested object, or None where it is absent."""
        value = self.get(name, dict, None)
        return None if value is None else Fields(value, self.path, f"{self.where}{name}.")
