"""Folders in the layout of the Hugging Face cache."""

import hashlib
import os
import shutil
from pathlib import Path


def snapshot_of(folder: Path, cache: Path) -> Path:
    """A snapshot with the files of ``folder``: links into the ``blobs`` of its repository in ``cache``."""
    repository = cache / "models--someone--something"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
