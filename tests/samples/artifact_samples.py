"""Artefacts that tests damage."""

import json
from pathlib import Path
from typing import Any

from packed_samples import sample, write_sample

from fips_ort.manifest import MANIFEST, sha256

SHARD = 8192


def write_in_shards(folder: Path) -> Path:
    """Write a small image classifier's artefact, its weights in several files of at most ``SHARD`` bytes. Returns its
    folder."""
    write_sample(folder, sample("vit", "1:4"), max_shard_size=SHARD)
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Put ``changes`` in the place of the manifest's keys."""
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | changes))


def sign(folder: Path, *paths: str) -> None:
    """List the files ``paths`` with the size and SHA-256 that they have now: as one does who changes an artefact with a
    purpose."""
    files = {entry["path"]: entry for entry in json.loads((folder / MANIFEST).read_text())["files"]}
    for path in paths:
        file = folder / path
        files[path] = {"path": path, "bytes": file.stat().st_size, "sha256": sha256(file)}
    edit_manifest(folder, files=list(files.values()))
