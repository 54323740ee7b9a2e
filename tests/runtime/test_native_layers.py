"""Includes of the native code go one way: from a layer of runtime/src to those below it, and never in a circle."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

from places import ROOT

SOURCE = ROOT / "runtime/src"
LAYERS = ({"simd"}, {"weight"}, {"task"}, {"decode"}, {"integer", "float", "attention"}, {"."}, {"ort"})
"""Folders, the lowest first; those of one layer know nothing of each other. ".": what lies in runtime/src itself."""


def includes() -> dict[str, set[str]]:
    files = sorted([*SOURCE.rglob("*.h"), *SOURCE.rglob("*.cpp")])
    return {
        file.relative_to(SOURCE).as_posix(): set(re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE))
        for file in files
    }


def folder(path: str) -> str:
    return Path(path).parent.as_posix()


def test_includes_name_files_from_the_source_folder_on() -> None:
    files = includes()
    assert not {name for names in files.values() for name in names} - set(files)


def test_includes_go_down() -> None:
    level = {name: height for height, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{file} includes {name}"
        for file, names in includes().items()
        for name in names
        if folder(file) != folder(name) and level[folder(file)] <= level[folder(name)]
    ]
    assert not wrong


def test_includes_have_no_circle() -> None:
    TopologicalSorter(includes()).prepare()
