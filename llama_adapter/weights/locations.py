"""Where weights are looked for, and how a name on a command line becomes a folder or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from llama_adapter.common.errors import UsageError
from llama_adapter.weights.catalogue import CATALOGUE

Kind = Literal["adapter", "base", "tower"]

# A folder's kind is told by which of these files it holds.
_MARKERS: dict[Kind, tuple[str, ...]] = {
    "adapter": ("llama_adapter_config.json", "adapter_config.json"),  # the second is its older name
    "base": ("config.json",),
    "tower": ("open_clip_config.json",),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def cache_folder() -> Path:
    """This library's folder in the user's cache: $XDG_CACHE_HOME, else ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache.expanduser().absolute() / "llama-adapter"


def weights_folders(explicit: str | Path | None = None) -> list[Path]:
    """The folders in which names are looked up, in order. `fetch` writes to the first.

    They are `explicit` (--weights) if given; else the environment variable LLAMA_ADAPTER_WEIGHTS; else
    weights/ of the checkout, then the user's cache folder; else, when installed from a wheel, the cache
    folder, then the adapters in the package. None of them has to exist.
    """
    chosen = explicit or os.environ.get("LLAMA_ADAPTER_WEIGHTS")
    if chosen:
        return [Path(chosen).expanduser().absolute()]
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return [checkout / "weights", cache_folder()]
    return [cache_folder(), Path(__file__).resolve().parents[1] / "shipped"]


def list_weights(kind: Kind, weights: str | Path | None = None) -> dict[str, Path]:
    """All adapters or all bases in the weights folders: name to folder, sorted by name."""
    found: dict[str, Path] = {}
    for folder in weights_folders(weights):
        for path in folder.iterdir() if folder.is_dir() else ():
            if not path.name.startswith(".") and any((path / name).is_file() for name in _MARKERS[kind]):
                found.setdefault(path.name, path)
    return dict(sorted(found.items()))


def resolve(name_or_path: str, *, kind: Kind, weights: str | Path | None = None) -> str:
    """The absolute path of the folder or GGUF file, or the hub id, that `name_or_path` stands for.

    A folder that exists comes before a name in the weights folders, and that before a hub id. Whether the
    folder holds such weights, or the hub has that id, is only checked when they are loaded.
    Raises UsageError, listing what is available, if it can be none of these.
    """
    if not name_or_path:
        raise UsageError(f"the {kind} is empty: give a name, a folder or a hub id")
    if "\0" in name_or_path:  # expanduser fails on "~\0"
        raise UsageError(f"the {kind} {name_or_path!r} holds a null: give a name, a folder or a hub id")
    path = os.path.abspath(os.path.expanduser(name_or_path))
    if os.path.isdir(path):
        return path
    known = list_weights(kind, weights)
    if name_or_path in known:
        return str(known[name_or_path])
    if kind == "base" and path.endswith(".gguf") and os.path.isfile(path):
        return path
    if os.path.exists(path):
        raise UsageError(f"{name_or_path!r} is a file: give the folder of the {kind}")
    # weights/typo looks like a hub id too. But where a folder weights/ exists, it was meant as a path.
    if _HUB_ID.fullmatch(name_or_path) and not os.path.isdir(name_or_path.split("/")[0]):
        return name_or_path

    if CATALOGUE.get(name_or_path) and CATALOGUE[name_or_path].kind == kind:
        raise UsageError(
            f"the {kind} {name_or_path!r} is not here yet: run `llama-adapter fetch {name_or_path}`"
        )
    fetchable = [name for name, entry in CATALOGUE.items() if entry.kind == kind and name not in known]
    places = " or ".join(str(folder) for folder in weights_folders(weights))
    available = ", ".join(known) or "none"
    if fetchable:
        available += f" (and {', '.join(fetchable)} after `llama-adapter fetch NAME`)"
    for other in ("base", "tower", "adapter"):
        if other != kind and name_or_path in list_weights(other, weights):
            raise UsageError(
                f"{name_or_path!r} is the name of {'an' if other == 'adapter' else 'a'} {other}; expected "
                f"{'an' if kind == 'adapter' else 'a'} {kind}: {available}"
            )
    raise UsageError(
        f"no {kind} {name_or_path!r}: it is no folder, no name in {places} and no hub id (owner/name); "
        f"there: {available}"
    )


def gguf_in(base: str) -> Path | None:
    """The GGUF file that a base is, or the one in its folder, if no other weights are there; else None.

    Args:
        base: what `resolve` found.

    Raises:
        UsageError: a folder with several.
    """
    path = Path(base)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(file.suffix in (".safetensors", ".bin") for file in path.iterdir()):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UsageError(f"{base!r} holds several GGUF files ({names}); give the path of one of them")
    return found[0] if found else None


def name_of(found: str, *, kind: Kind, weights: str | Path | None = None) -> str:
    """The name in the weights folders of what `resolve` found; if it has none, the path or hub id itself."""
    names = [name for name, folder in list_weights(kind, weights).items() if str(folder) == found]
    return names[0] if names else found
