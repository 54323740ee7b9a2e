"""Values that are written as JSON and read again: a class says which keys there are and what they may hold."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from pipeline.plumbing.files import write_json

_Record = TypeVar("_Record", bound="Record")


class Record(BaseModel):
    """A frozen value. Unknown keys, values of another type, NaN and infinity are refused with pydantic's
    ValidationError (a ValueError), which names the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def write_record(path: Path, record: Record) -> None:
    """Write what ``record`` was made of: keys that it was not given are not in the file either."""
    write_json(path, record.model_dump(mode="json", exclude_unset=True))


def read_record(kind: type[_Record], path: Path) -> _Record:
    """Read what :func:`write_record` has written. Raises OSError, and ValueError for what is no ``kind``."""
    return kind.model_validate_json(path.read_bytes())


def find_record(kind: type[_Record], path: Path) -> _Record | None:
    """Read a record that may not be there: None for a file that is missing, damaged or no ``kind``."""
    try:
        return read_record(kind, path)
    except (OSError, ValueError):
        return None
