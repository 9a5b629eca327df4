from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.common.files import replace_folder, sha256_file, write_atomically, write_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomically_replaces_the_file_when_the_body_is_done(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    file.write_text("old")
    with write_atomically(file) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and file.read_text() == "old"
    assert file.read_text() == "new" and names(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["old", None])
def test_write_atomically_leaves_what_was_there_when_cut_off(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    file = tmp_path / "metrics.json"
    if before:
        file.write_text(before)
    with pytest.raises(error), write_atomically(file) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == (["metrics.json"] if before else [])
    assert not before or file.read_text() == before


def test_a_link_keeps_leading_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("data/real.json")
    write_json(link, [1])
    assert link.is_symlink() and json.loads((tmp_path / "data" / "real.json").read_text()) == [1]


def test_a_device_is_written_not_replaced() -> None:
    write_json(os.devnull, {"loss": 1.0})
    assert Path(os.devnull).is_char_device()


def test_standard_output_can_be_the_file() -> None:
    code = "from llama_adapter.common.files import write_json; write_json('/dev/stdout', [1])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [1]


def test_errors_name_the_path_the_user_gave(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        write_json(tmp_path, {})
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError) as missing:
        write_json(tmp_path / "no" / "file.json", {})
    assert missing.value.filename == str(tmp_path / "no" / "file.json")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), Exception("I/O error: No space left on device (os error 28)")],
    ids=["python", "rust"],
)
def test_a_full_disk_names_the_path(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "adapter.safetensors"
    with pytest.raises(OSError) as caught, write_atomically(file) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(file)
    with pytest.raises(OSError) as caught, replace_folder(tmp_path / "adapter"):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "adapter")
    assert names(tmp_path) == []


@given(value=JSON)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    file = tmp_path_factory.getbasetemp() / "value.json"
    write_json(file, value)
    assert json.loads(file.read_text(encoding="utf-8")) == value


def test_json_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"tensor": object()})
    assert names(tmp_path) == []


@given(data=st.binary(max_size=3000))
def test_sha256_is_the_standard_one(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "data.bin"
    file.write_bytes(data)
    assert sha256_file(file) == hashlib.sha256(data).hexdigest()


def test_replace_folder_makes_and_replaces(tmp_path: Path) -> None:
    final = tmp_path / "weights" / "adapter"
    for text, file in [("one", "a"), ("two", "b")]:
        with replace_folder(final) as folder:
            (folder / file).write_text(text)
    assert names(final) == ["b"] and names(tmp_path / "weights") == ["adapter"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False])
def test_replace_folder_leaves_what_was_there_when_cut_off(
    tmp_path: Path, error: type[BaseException], before: bool
) -> None:
    final = tmp_path / "adapter"
    if before:
        final.mkdir()
        (final / "old").write_text("old")
    with pytest.raises(error), replace_folder(final) as folder:
        (folder / "half").write_text("half")
        raise error
    assert names(tmp_path) == (["adapter"] if before else [])
    assert not before or names(final) == ["old"]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """A folder whose earlier writer was killed half-way, and could not clean up."""
    final = tmp_path / "adapter"
    code = (
        "import os, sys; from llama_adapter.common.files import replace_folder\n"
        "with replace_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(final)]).returncode == 9
    yield final


def test_what_a_killed_writer_left_is_cleared_by_the_next(killed: Path) -> None:
    assert not killed.exists() and len(names(killed.parent)) == 1
    with replace_folder(killed) as folder:
        assert names(folder) == []
        (folder / "whole").write_text("whole")
    assert names(killed.parent) == ["adapter"] and names(killed) == ["whole"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "adapter"
    final.mkdir()
    (final / "old").write_text("old")
    replace = os.replace

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name == ".adapter.tmp":
            raise OSError(errno.EIO, "broken", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(OSError), replace_folder(final) as folder:
        (folder / "new").write_text("new")
    assert names(final) == ["old"] and names(tmp_path) == ["adapter"]


def test_replace_folder_refuses_to_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("precious")
    with pytest.raises(NotADirectoryError), replace_folder(tmp_path / "adapter"):
        pass
    assert (tmp_path / "adapter").read_text() == "precious"
