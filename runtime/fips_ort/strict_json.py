"""JSON that means the same to every reader."""

import json
import math
from collections import Counter
from typing import Any, NoReturn

from fips_ort.errors import ArtifactError
from fips_ort.files import quoted, some_of


def parse_json(text: str, where: str) -> Any:
    """Parse JSON as the standard has it: no NaN, no infinity, no key twice; and with integers of 64 bits, texts that
    UTF-8 can hold. Raises ArtifactError for anything else."""

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"number {quoted(number)}")

    def integer(number: str) -> int:
        return int(number) if len(number) <= 19 else refuse(number)

    def real(number: str) -> float:
        return value if math.isfinite(value := float(number)) else refuse(number)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = (key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"keys twice: {some_of(twice)}")
        return content

    try:
        content = json.loads(text, parse_constant=refuse, parse_int=integer, parse_float=real, object_pairs_hook=unique)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # no lone surrogates
    except RecursionError:
        raise ArtifactError(f"{where}: not valid JSON: too many brackets in brackets") from None
    except ValueError as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}") from None
    return content
