"""Settings and fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import DEFAULT_BASE
from llama_adapter.weights.fetch import PROVENANCE

# If a shell starts the tests in the background (`nohup make test &`), they ignore Ctrl-C, and so does every
# process that they start. But the tests send Ctrl-C themselves, so it has to work as in a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHECKOUT = Path(__file__).resolve().parent.parent

# The files whose tests take longest. They come first, so that the workers of a parallel run end at about the
# same time: xdist gives whole files to workers (`--dist loadfile`), and a long one at the end would keep one
# waiting.
LONG_FILES = (
    "tests/page/test_browser.py",
    "tests/test_readme.py",
    "tests/page/test_suggestions.py",
    "tests/benchmarks/test_throughput.py",
    "tests/test_wheel.py",
    "tests/commands/test_eval_methods.py",
    "tests/test_model.py",
    "tests/common/test_processes.py",
    "tests/commands/test_train_vqa.py",
    "tests/commands/test_eval_vqa.py",
    "tests/commands/test_train_scienceqa.py",
    "tests/page/test_server.py",
    "tests/training/test_safety.py",
    "tests/vision/test_contrastive.py",
    "tests/methods/test_compile.py",
    "tests/benchmarks/test_families.py",
    "tests/commands/test_console.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {CHECKOUT / file: number for number, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


# Of answers to what the README and the page show: one seed in `make test`, three others in `make test-slow`.
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3)))

# A slow example means that the machine is busy, not that the code is wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """The fetched SmolLM2, for tests that need a real base."""
    folder = CHECKOUT / "weights" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("no base model: run `llama-adapter fetch smollm2-135m-instruct`")
    return folder


@pytest.fixture(scope="session")
def default_base() -> str:
    """The name of the default base, which `make test` downloads if it can."""
    if DEFAULT_BASE not in locations.list_weights("base"):
        pytest.skip("the default base is not here: run `llama-adapter fetch`")
    return DEFAULT_BASE


@pytest.fixture(scope="session")
def qwen_folder() -> Path:
    """The folder of the default base."""
    folder = CHECKOUT / "weights" / "qwen2.5-coder-0.5b-instruct"
    if not (folder / PROVENANCE).is_file():
        pytest.skip("no 0.5B base: run `llama-adapter fetch qwen2.5-coder-0.5b-instruct`")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets beside the checkout."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}")
    return folder


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for Gradio's uploads, one for each module: other pages delete theirs when they close."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture
def upload(uploads: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that puts a file where Gradio puts uploads."""

    def put(name: str, content: bytes) -> Path:
        folder = uploads / tmp_path.name
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return put
