from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError
from llama_adapter.weights import locations
from llama_adapter.weights.locations import list_weights, resolve, weights_folders

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty cache, and no variables in the environment."""
    monkeypatch.delenv("LLAMA_ADAPTER_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def make(folder: Path, *, marker: str) -> Path:
    folder.mkdir(parents=True)
    (folder / marker).write_text("{}")
    return folder


def test_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "llama-adapter"
    assert weights_folders() == [CHECKOUT / "weights", cache]
    monkeypatch.setenv("LLAMA_ADAPTER_WEIGHTS", str(tmp_path / "environment"))
    assert weights_folders() == [tmp_path / "environment"]
    assert weights_folders("given") == [tmp_path / "work" / "given"]
    monkeypatch.delenv("LLAMA_ADAPTER_WEIGHTS")
    # An installed package, not a checkout.
    package = tmp_path / "site-packages" / "llama_adapter"
    monkeypatch.setattr(locations, "__file__", str(package / "weights" / "locations.py"))
    assert weights_folders() == [cache, package / "shipped"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weights_folders()[0] == tmp_path / "home" / ".cache" / "llama-adapter"


def test_list_tells_adapters_from_bases_and_skips_what_is_half_made(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    adapter = make(weights / "an-adapter", marker="llama_adapter_config.json")
    base = make(weights / "a-base", marker="config.json")
    make(weights / ".a-base-being-made.tmp", marker="config.json")
    (weights / "notes.txt").write_text("")
    assert list_weights("adapter", weights) == {"an-adapter": adapter}
    assert list_weights("base", weights) == {"a-base": base}
    assert list_weights("base", tmp_path / "nowhere") == {}


def test_the_first_place_that_has_a_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(locations, "weights_folders", lambda _: [first, second])
    for name in (first / "both", second / "both", second / "only-second"):
        make(name, marker="config.json")
    assert list_weights("base") == {"both": first / "both", "only-second": second / "only-second"}


def test_a_folder_comes_before_a_name_and_a_name_before_the_hub(elsewhere: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    named = make(weights / "tiny", marker="config.json")
    assert resolve("tiny", kind="base", weights=weights) == str(named)
    assert resolve("meta-llama/Llama-3.2-1B", kind="base", weights=weights) == "meta-llama/Llama-3.2-1B"
    here = make(elsewhere / "tiny", marker="config.json")
    assert resolve("tiny", kind="base", weights=weights) == str(here)
    owned = make(elsewhere / "meta-llama" / "Llama-3.2-1B", marker="config.json")
    assert resolve("meta-llama/Llama-3.2-1B", kind="base", weights=weights) == str(owned)


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make(tmp_path / "mine", marker="config.json")
    assert resolve("~/mine", kind="base") == str(folder)


def test_an_unknown_name_is_told_with_what_there_is(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    make(weights / "one", marker="llama_adapter_config.json")
    make(weights / "two", marker="llama_adapter_config.json")
    make(weights / "a-base", marker="config.json")
    with pytest.raises(UsageError, match=rf"no adapter 'three'.*{re.escape(str(weights))}.*there: one, two$"):
        resolve("three", kind="adapter", weights=weights)
    with pytest.raises(
        UsageError, match=r"there: a-base \(and .*smollm2-135m-instruct after `llama-adapter fetch"
    ):
        resolve("three", kind="base", weights=weights)


def test_a_base_that_can_be_fetched_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `llama-adapter fetch smollm2-135m-instruct`"):
        resolve("smollm2-135m-instruct", kind="base", weights=tmp_path)
    with pytest.raises(UsageError, match="no adapter 'smollm2-135m-instruct'"):
        resolve("smollm2-135m-instruct", kind="adapter", weights=tmp_path)


def test_a_mistyped_path_is_no_hub_id(elsewhere: Path) -> None:
    (elsewhere / "runs").mkdir()
    for mistake in ("runs/missing", "./missing", "/missing/folder", "a/b/c", "owner/"):
        with pytest.raises(UsageError, match=re.escape(f"no adapter {mistake!r}")):
            resolve(mistake, kind="adapter")


def test_nothing_given_is_not_the_working_folder() -> None:
    with pytest.raises(UsageError, match="the adapter is empty"):
        resolve("", kind="adapter")


def test_a_file_is_refused(elsewhere: Path) -> None:
    (elsewhere / "adapter_model.safetensors").write_text("")
    with pytest.raises(UsageError, match=r"is a file: give the folder of the adapter"):
        resolve("adapter_model.safetensors", kind="adapter")


@given(name=st.text())
@example(name="~\0")
def test_whatever_is_given_is_a_folder_a_hub_id_or_a_mistake(name: str) -> None:
    try:
        found = resolve(name, kind="adapter", weights="/nonexistent")
    except UsageError:
        return
    assert Path(found).is_dir() or found == name
