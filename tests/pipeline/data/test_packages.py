"""Files of installed packages: found without importing the package, never outside it."""

from pathlib import Path

import pytest

import pipeline
from pipeline.data.packages import package_file, package_path
from pipeline.plumbing.errors import InputError

FOLDER = Path(pipeline.__file__).resolve().parent


def test_file_of_a_package() -> None:
    assert package_file("pipeline", "cli.py", "model") == FOLDER / "cli.py"
    assert package_file("pipeline", "data/../cli.py", "model") == FOLDER / "cli.py"


def test_namespace_packages_have_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("first", "second"):
        (tmp_path / place / "scattered_over_places").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / place))
    file = tmp_path / "first" / "scattered_over_places" / "a.json"
    file.write_text("{}", encoding="utf-8")
    assert package_file("scattered_over_places", "a.json", "data") == file


@pytest.mark.parametrize("key", ["model", "data"])
@pytest.mark.parametrize("package", ["no_such_package", "../x", "pipeline.nothing"])
def test_missing_package_says_what_to_install(package: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}\.package: .* not installed.*pip install 'fips-onnx\[samples\]'"):
        package_file(package, "a.json", key)


@pytest.mark.parametrize("file", ["nothing.onnx", "data"])
def test_missing_file(file: str) -> None:
    with pytest.raises(InputError, match=rf"^data\.file: package pipeline has no file {file}$"):
        package_file("pipeline", file, "data")
    assert package_path("pipeline", file, "data") == FOLDER / file


@pytest.mark.parametrize("file", ["../pipeline/../pyproject.toml", "/etc/hostname"])
def test_file_must_be_inside_the_package(file: str) -> None:
    with pytest.raises(InputError, match=r"^model\.file: .* is not inside package pipeline$"):
        package_path("pipeline", file, "model")
