"""The wheel, installed outside of the checkout and used in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT
from tests.tiny_models import build_tiny_base

TRAINING = [
    *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "2", "--learning-rate", "0.01"),
    *("--max-steps", "3", "--validation-rows", "4"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(CHECKOUT)], check=True, stdin=subprocess.DEVNULL)
    (path,) = folder.glob("llama_adapter-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(folder), str(wheel)], check=True, stdin=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder that holds a base called "tiny"."""
    cache = tmp_path_factory.mktemp("cache")
    build_tiny_base(cache / "llama-adapter" / "tiny")
    return cache


class Command:
    """Runs the installed console command in an empty folder."""

    def __init__(self, installed: Path, cache: Path, folder: Path) -> None:
        self.script = installed / "bin" / "llama-adapter"
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(cache)}
        self.environment.pop("LLAMA_ADAPTER_WEIGHTS", None)

    def __call__(self, *words: str, lacking: str | None = None) -> subprocess.CompletedProcess[str]:
        call = [str(self.script)]
        if lacking is not None:  # as if the package of an extra were not installed
            call = ["-c", f"import sys; sys.modules[{lacking!r}] = None; sys.argv[0] = {str(self.script)!r}"]
            call[1] += "; from llama_adapter.__main__ import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, *call, *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def command(installed: Path, cache: Path, tmp_path: Path) -> Command:
    return Command(installed, cache, tmp_path)


def test_it_holds_one_package_with_what_is_shipped(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"llama_adapter"}
    assert {"llama_adapter/py.typed", "llama_adapter/page/photos/cat.jpg"} <= set(names)
    shipped = {name.split("/")[2] for name in names if name.startswith("llama_adapter/shipped/")}
    carded = {card.parent.name for card in (CHECKOUT / "weights").glob("*/README.md")}
    assert shipped == carded and len(shipped) >= 4
    assert not [name for name in names if "instruct/" in name]  # base models are fetched instead


def test_a_user_trains_asks_and_scores(command: Command) -> None:
    data = str(CHECKOUT / "examples" / "instructions.jsonl")
    trained = command("train", "alpaca", "--base", "tiny", "--data", data, "--output", "mine", *TRAINING)
    assert trained.returncode == 0, trained.stderr
    asked = command("ask", "Hello", "--adapter", "mine", "--max-new-tokens", "4")
    assert asked.returncode == 0, asked.stderr
    scored = command("eval", "alpaca", "--adapter", "mine", "--data", data, "--samples", "0")
    assert scored.returncode == 0 and "nats" in scored.stdout, scored.stderr


def test_the_shipped_adapters_have_their_names(command: Command) -> None:
    told = command("info", "smollm2-135m-alpaca")
    assert told.returncode == 0 and "prompts" in told.stdout, told.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train",), "takes one of alpaca, vqa, scienceqa, clip, teacher; found nothing"),
        (("eval", "nothing"), "takes one of alpaca, methods, questions, captions, vqa, scienceqa, clip"),
        (("train", "alpaca"), "see `llama-adapter train alpaca --help`"),
    ],
)
def test_a_mistake_is_told_in_a_line(command: Command, words: tuple[str, ...], said: str) -> None:
    refused = command(*words)
    assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("lacking", "extra", "words"),
    [
        ("gradio", "demo", ("demo", "--base", "tiny", "--adapter", "none")),
        (
            "datasets",
            "train",
            ("train", "alpaca", "--base", "tiny", "--data", "rows.parquet", "--output", "x"),
        ),
    ],
)
def test_a_missing_extra_is_named(command: Command, lacking: str, extra: str, words: tuple[str, ...]) -> None:
    (command.folder / "rows.parquet").write_bytes(b"PAR1")
    refused = command(*words, lacking=lacking)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.endswith(f"pip install 'llama-adapter[{extra}]'`\n")
    assert "Traceback" not in refused.stderr


def test_the_core_imports_no_extra(command: Command) -> None:
    program = (
        "import sys; import llama_adapter.model, llama_adapter.answering.conversation\n"
        "assert not {'gradio', 'datasets', 'tensorboard'} & set(sys.modules), 'an extra was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=command.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
