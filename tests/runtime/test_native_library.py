from pathlib import Path

import pytest

import fips_ort


def test_the_library_is_found_in_whichever_folder_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = fips_ort.library_path()
    sources, built = tmp_path / "sources", tmp_path / "built"
    for folder in (sources, built):
        folder.mkdir()
    monkeypatch.setattr(fips_ort, "__path__", [str(sources), str(built)])
    with pytest.raises(FileNotFoundError, match="install the fips-ort distribution"):
        fips_ort.library_path()
    (built / installed.name).touch()
    assert fips_ort.library_path() == built / installed.name
