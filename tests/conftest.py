"""What several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from llama_adapter.weights.fetch import PROVENANCE

# A shell that starts the tests in the background (`nohup make test &`) lets them ignore Ctrl-C, and every
# process that they start inherits that. The tests send Ctrl-C themselves, so it has to work as in a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHECKOUT = Path(__file__).resolve().parent.parent

# A slow example says that the machine is busy, not that the code is wrong.
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
def qwen_folder() -> Path:
    """The fetched base of half a billion parameters, which `make test` does not download."""
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
    """Gradio's folder for uploads, of one module's own: other pages clear theirs away when they close."""
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture
def upload(uploads: Path, tmp_path: Path) -> Callable[..., Path]:
    """Puts a file where Gradio puts what is uploaded."""

    def put(name: str, content: bytes) -> Path:
        folder = uploads / tmp_path.name
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return put
