"""Train the shipped adapters of the 0.5B base in a few minutes on a large GPU: python -m train.shipped

    python -m train.shipped pack --data ../shared/data --gguf base.gguf --output parcel   # where the data are
    python -m train.shipped run parcel --output runs/shipped --minutes 4                  # where the GPU is
    python -m train.shipped rows --data ../shared/data --output mix                       # without a GPU

`pack` writes what the other machine needs besides this checkout and its packages: the base, the rows, and the
features of the pictures. It writes them in pieces, in case only small files can be sent there.

`run` joins the pieces and trains the three adapters side by side, since one training of short rows leaves
most of a large GPU idle. Each goes on from a shipped adapter. Its schedule is fitted to the time, and it
leaves an adapter in float16 that can be used. The same command goes on with what is not finished.

`rows` writes only the rows, a file for each source. Then `train.vqa --image-root ../shared/data` reads those
that you choose, such as `--data mix/coco.json`. The cards of the shipped adapters say which.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_adapter.commands.arguments import Parser, positive_float, positive_int
from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import replace_folder, sha256_file, write_json
from llama_adapter.common.progress import RowProgress
from llama_adapter.data.drawings import drawing_rows
from llama_adapter.data.mixtures import Row, picture_sources, share_scienceqa, text_sources
from llama_adapter.methods.checkpoint import CONFIG_FILE, load_adapter, save_adapter
from llama_adapter.vision.features import FeatureCache
from llama_adapter.vision.tower import VisionTower, load_tower
from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import DEFAULT_TOWER, SHIPPED
from llama_adapter.weights.fetch import PROVENANCE

BASE = "qwen2.5-coder-0.5b-instruct"
DEPTHS = (-1, 0, 3, 4, 5, 6)
DRAWINGS = {"drawings": "drawings:20000", "colours": "drawings:1500:colours"}
SETS = ("alpaca", "text", "coco", "daquar", "flickr8k", "imagenet_names", "scienceqa")
GGUF_FILE, WEIGHTS_FILE = "base.gguf", "model.safetensors"
CONTENTS = "contents.json"  # the pieces in their order, with their hashes
KEPT_PROBLEMS = 5  # one in so many problems of ScienceQA's split val stays there
_PICTURES = (".jpg", ".jpeg", ".png")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Stage:
    """A training.

    Attributes:
        options: its command line; "{data}" is the folder with the rows.
    """

    name: str
    script: str
    options: str


TEXT = Stage(
    SHIPPED[BASE].text,
    "train.vqa",
    f"--start-from {SHIPPED[BASE].text} --data {{data}}/alpaca.json --data {{data}}/dolly.json=0.5 "
    "--data {data}/lima.json --data {data}/gsm8k.json=0.5 --data {data}/yes_no.json=0.5 "
    "--data {data}/choices.json=0.5 --data {data}/sums.json --learning-rate 0.0008 --batch-size 128 "
    "--max-length 400 --validation-rows 60",
)
VISION = Stage(
    SHIPPED[BASE].vision,
    "train.vqa",
    f"--start-from {SHIPPED[BASE].vision} --reader-epochs 6 --data {{data}}/coco.json=2 "
    "--data {data}/daquar.json --data {data}/cococaps.json --data {data}/flickr.json "
    "--data {data}/names.json --data objects:{data}/cococaps.json --data {data}/some_text.json "
    "--data {data}/drawings.json --data {data}/colours.json --balance-yes-no --learning-rate 0.0006 "
    "--rate prompts=0.008 --rate gates=0.008 --rate projection=0.003 --mean-over rows --batch-size 128 "
    "--max-length 300 --validation-rows 120",
)
SCIENCEQA = Stage(
    SHIPPED[BASE].scienceqa,
    "train.scienceqa",
    f"--start-from {SHIPPED[BASE].vision} --template chat --data {{data}}/scienceqa --format QCM-O "
    "--rivals --picture-weight 2 --learning-rate 0.0006 --rate prompts=0.005 --rate gates=0.002 "
    "--rate projection=0.001 --mean-over rows --batch-size 64 --max-length 300 --validation-rows 200",
)
STAGES = (TEXT, VISION, SCIENCEQA)
COMMON = (
    "--epochs 20 --warmup-epochs 0.8 --max-grad-norm 1 --max-tokens 16384 --checkpoint-every 100000 "
    "--validate-every 250"
)
STARTING = 90  # seconds of a stage that go by before its first step, also in a reader, and after its last


def main(words: Sequence[str] | None = None, *, program: str = "python -m train.shipped") -> None:
    parser = Parser(prog=program, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the rows, the photos and the base, in pieces")
    writing = commands.add_parser("rows", help="write only the rows, a file for each source")
    for reading in (packing, writing):
        reading.add_argument("--data", required=True, type=Path, help=f"folder that has {', '.join(SETS)}")
    packing.add_argument("--gguf", required=True, type=Path, help="the file that the base is fetched as")
    packing.add_argument("--output", required=True, type=Path, help="folder for the pieces")
    packing.add_argument("--piece-mb", type=positive_int, default=60, help="largest piece, in MiB (60)")
    writing.add_argument("--output", required=True, type=Path, help="folder for the files")
    running = commands.add_parser("run", help="join the pieces and train")
    running.add_argument("pieces", type=Path, help="folder that has the pieces")
    running.add_argument("--output", required=True, type=Path, help="folder for the runs and the adapters")
    running.add_argument("--minutes", type=positive_float, required=True, help="end after this time")
    arguments = parser.parse_args(words)
    if arguments.command == "pack":
        pack(arguments.data, arguments.gguf, arguments.output, arguments.piece_mb * 2**20)
    elif arguments.command == "rows":
        write_all_rows(arguments.data, arguments.output)
    else:
        run(arguments.pieces, arguments.output, arguments.minutes)


# --- packing ------------------------------------------------------------------------------------------------


def write_all_rows(data: Path, output: Path) -> dict[str, list[Row]]:
    """Write the rows of all sources, a JSON file each. Returns them by their names.

    Raises UsageError for a folder without the data.
    """
    if missing := [name for name in SETS if not (data / name).is_dir()]:
        raise UsageError(f"{data} has no folder {missing[0]!r}; expected {', '.join(SETS)}")
    sources = {**text_sources(data), **picture_sources(data)}
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in sources.items():
        (output / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return sources


def pack(data: Path, gguf: Path, output: Path, piece_bytes: int) -> None:
    """Write the pieces of the data and of the base.

    Raises UsageError for a folder without the data.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = write_all_rows(data, folder)
        used = {Path(row["image"]).name for rows in sources.values() for row in rows if "image" in row}
        for name in SETS[2:]:
            _copy(data / name, folder / name)
        for name, drawings in DRAWINGS.items():
            _write_drawings(folder, name, drawings)
        share_scienceqa(folder / "scienceqa", KEPT_PROBLEMS)
        for path in (folder / "flickr8k").rglob("*"):
            if path.suffix in _PICTURES and path.name not in used:
                path.unlink()
        replace_pictures(folder, FeatureCache(load_tower(DEFAULT_TOWER, depths=DEPTHS)))
        write_pieces(folder, output / "data", piece_bytes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in Path(locations.resolve(BASE, kind="base")).iterdir():
            if path.is_file() and path.name not in (WEIGHTS_FILE, PROVENANCE):
                shutil.copyfile(path, folder / path.name)
        write_tied(gguf, folder / GGUF_FILE)
        write_pieces(folder, output / "base", piece_bytes)
    print(f"{output}: carry over all of it, then `python -m train.shipped run`")


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
    """Fill a cache with the features that `replace_pictures` wrote with this tower. Returns its folder."""
    pictures = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _PICTURES]
    features = torch.from_numpy(np.load(folder / "features.npy")).float()
    FeatureCache(tower, folder / "cache").store(pictures, features)
    return folder / "cache"


def write_tied(source: Path, target: Path) -> None:
    """Copy a GGUF file without its embeddings: the head, which has the same matrix, takes their place."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name != "token_embd.weight":
            name = "token_embd.weight" if tensor.name == "output.weight" else tensor.name
            writer.add_tensor(name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_pieces(folder: Path, output: Path, piece_bytes: int) -> None:
    """Write a folder as one archive, cut into files of at most `piece_bytes`."""
    with tempfile.TemporaryFile() as joined:
        with tarfile.open(fileobj=joined, mode="w:gz", compresslevel=6) as archive:
            archive.add(folder, arcname=".")
        joined.seek(0)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(output) as place:
            hashes: dict[str, str] = {}
            while content := joined.read(piece_bytes):
                name = f"piece-{len(hashes):03}"
                (place / name).write_bytes(content)
                hashes[name] = hashlib.sha256(content).hexdigest()
            write_json(place / CONTENTS, {"pieces": hashes})


# --- running ------------------------------------------------------------------------------------------------


def read_pieces(pieces: Path, folder: Path) -> Path:
    """Join the pieces and unpack them into a new folder, unless that is done. Returns the folder.

    Raises UsageError for a piece that is missing or damaged, before anything is unpacked.
    """
    if folder.is_dir():
        return folder
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as joined:
        for name in hashes:
            with open(pieces / name, "rb") as piece:
                shutil.copyfileobj(piece, joined, _BLOCK)
        joined.seek(0)
        with replace_folder(folder) as place, tarfile.open(fileobj=joined, mode="r:gz") as archive:
            archive.extractall(place, filter="data")
    return folder


def run(pieces: Path, output: Path, minutes: float) -> None:
    """Train the adapters, as far as the minutes reach."""
    ends = time.monotonic() + 60 * minutes
    restore_base(read_pieces(pieces / "base", output / "base"), locations.weights_folders()[0] / BASE)
    data = read_pieces(pieces / "data", output / "data")
    cache = restore_features(data, load_tower(DEFAULT_TOWER, depths=DEPTHS))
    with ExitStack() as stack:
        started = [
            (stage, stack.enter_context(_training(stage, output, data, cache, ends))) for stage in STAGES
        ]
        failures = [_end(stage, training, output, ends) for stage, training in started]
    if missing := [failure for failure in failures if failure]:
        raise UsageError("; ".join(missing))


def restore_base(unpacked: Path, folder: Path) -> None:
    """Make the base's folder again, unless that is done: the same files that were packed."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if folder.is_dir():
        return
    with replace_folder(folder) as place:
        decoder = AutoModelForCausalLM.from_pretrained(
            unpacked,
            gguf_file=GGUF_FILE,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        decoder.tie_weights()
        decoder.half().save_pretrained(place)
        for path in unpacked.iterdir():
            if path.name != GGUF_FILE:
                shutil.copyfile(path, place / path.name)


def _command(script: str, options: str, output: Path) -> list[str]:
    command = [sys.executable, "-m", script, *options.split(), "--output", str(output)]
    return [*command, "--resume"] if (output / "run.json").exists() else command


@contextmanager
def _training(
    stage: Stage, output: Path, data: Path, cache: Path, ends: float
) -> Iterator[subprocess.Popen[bytes] | None]:
    """A stage's training, which runs at the same time. None: it is finished already."""
    place = output / "runs" / stage.name
    if (place / "finished").exists():
        yield None
        return
    if (place / "run.json").exists():  # a run goes on with the minutes that it was started with
        minutes = json.loads((place / "run.json").read_text())["settings"]["max_minutes"]
    else:
        minutes = round(max(0.1, (ends - time.monotonic() - STARTING) / 60), 2)
    options = f"{stage.options} {COMMON} --max-minutes {minutes}".format(data=data)
    if stage is not TEXT:
        options += f" --cache {cache}"
    training = subprocess.Popen(_command(stage.script, options, place))
    try:
        yield training
    finally:
        if training.poll() is None:
            training.kill()


def _end(stage: Stage, training: subprocess.Popen[bytes] | None, output: Path, ends: float) -> str:
    """Wait for a training, stop it with a checkpoint when its time is over, and write its adapter.

    Returns why there is no adapter; "" if there is one.
    """
    if training is None:
        return ""
    try:
        code: int | None = training.wait(max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        training.send_signal(signal.SIGTERM)
        training.wait()
        code = None
    if code:
        return f"{stage.name}: the training ended with exit code {code}"
    place = output / "runs" / stage.name
    if not (place / CONFIG_FILE).is_file():
        return f"{stage.name}: the time was too short for a first adapter; call again"
    shutil.rmtree(output / stage.name, ignore_errors=True)
    save_adapter(load_adapter(place), output / stage.name, dtype=torch.float16)
    if code == 0:
        (place / "finished").touch()
    print(f"{output / stage.name}: {'the best so far' if code is None else 'finished'}", flush=True)
    return ""
