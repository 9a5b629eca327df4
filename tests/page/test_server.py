"""The page's server, its endpoints, and the command that starts it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from llama_adapter.answering.engine import Engine
from llama_adapter.answering.records_answered import answer_likelihoods
from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import MAX_BYTES
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.config import ScienceQAConfig
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.page.chatting import ChatHandlers
from llama_adapter.page.checks import MAX_CHARACTERS
from llama_adapter.page.endpoints import Endpoints
from llama_adapter.page.layout import build_page
from llama_adapter.page.science import score, trained_for_it
from llama_adapter.page.server import check_port, serve
from llama_adapter.scienceqa.problem_texts import problem_records
from llama_adapter.scienceqa.problems import Problem
from tests.conftest import CHECKOUT
from tests.drawn import SVG, data_url, huge_png, png
from tests.scripted import ScriptedModel, build_scripted_model, open_eyes
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_base, build_tiny_model

pytestmark = pytest.mark.usefixtures("uploads")

SETTINGS = ("one", "", 0, 1, 0, 1, 12, None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def _served(model: LlamaAdapter, **options: Any) -> Iterator[str]:
    page = build_page(model, {name: f"About {name}." for name in [*model.adapters, NO_ADAPTER]})
    try:
        yield serve(page, host="127.0.0.1", port=_free_port(), **options)
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    """Two adapters for text, the second one active, and one that sees."""
    model = build_tiny_model(
        names=("one", "two"), tokenizer=build_tiny_tokenizer(), max_position_embeddings=1024
    )
    seeing = model.new_adapter("eyes", prompt_length=3, adapted_layers=2, vision=VISION, seed=3)
    torch.nn.init.normal_(seeing.prompts.gates, generator=torch.Generator().manual_seed(3))
    model.set_adapter("two")
    open_eyes(model)
    return model


@pytest.fixture(scope="module")
def address(model: LlamaAdapter) -> Iterator[str]:
    with _served(model) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


@pytest.mark.parametrize("adapter", ["one", "two", NO_ADAPTER])
def test_answer_is_what_the_model_says(adapter: str, client: Client, model: LlamaAdapter) -> None:
    found = client.predict("Name a colour.", None, adapter, "", 0, max_new_tokens=16, api_name="/answer")
    assert found == model.chat(
        "Name a colour.", adapter=adapter, sampling=Sampling(temperature=0, max_new_tokens=16)
    )


def test_ask_says_who_answered_and_why_the_answer_ended(
    client: Client, model: LlamaAdapter, picture: Path
) -> None:
    options = {"temperature": 0, "max_new_tokens": 6, "api_name": "/ask"}
    found = client.predict("Name a colour.", adapter="auto", **options)
    assert found["answer"] == model.chat("Name a colour.", adapter="one", temperature=0, max_new_tokens=6)
    assert (found["adapter"], found["finish_reason"], found["tokens"]) == ("one", "length", 6)
    assert found["base"] == model.base and found["tokens_per_second"] > 0
    found = client.predict("Which colour?", image=handle_file(picture), adapter="auto", **options)
    assert found["adapter"] == "eyes"
    seen = {"image": picture, "adapter": "eyes", "temperature": 0, "max_new_tokens": 6}
    assert found["answer"] == model.chat("Which colour?", **seen)


def test_eight_at_once_get_what_each_would_get_alone(
    address: str, model: LlamaAdapter, picture: Path
) -> None:
    """Their pictures and answers don't mix, by whatever endpoint they come."""
    red = picture.with_name("red.png")
    red.write_bytes(png("red"))
    asked: list[dict[str, Any]] = [
        {"adapter": "one", "message": "Name a colour."},
        {"adapter": "two", "message": "Name a colour."},
        {"adapter": NO_ADAPTER, "message": "Name a colour."},
        {"adapter": "eyes", "message": "Which colour?"},
        {"adapter": "eyes", "message": "Which colour?", "image": picture},
        {"adapter": "eyes", "message": "Which colour?", "image": red},
        {"adapter": "one", "message": "Name three colours of the sky in the evening, and say why.", "n": 60},
        {"adapter": "two", "message": "Hi", "n": 3},
    ]

    def ask(number: int) -> tuple[str, str]:
        values = dict(asked[number])
        length = values.pop("n", 20)
        if image := values.pop("image", None):
            values["image"] = handle_file(image)
        client = Client(address, verbose=False)
        settings = {"temperature": 0, "max_new_tokens": length, "api_name": ("/answer", "/chat")[number % 2]}
        answers = [client.submit(**values, **settings) for _ in range(2)]
        first, second = (answer.result(timeout=60) for answer in answers)
        return first, second

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(ask, range(len(asked))))
    expected = [
        model.chat(
            values["message"],
            image=values.get("image"),
            adapter=values["adapter"],
            sampling=Sampling(temperature=0, max_new_tokens=values.get("n", 20)),
        )
        for values in asked
    ]
    assert found == [(text, text) for text in expected]
    assert len(set(expected)) == len(asked)


def test_a_seed_makes_the_answer_the_same(client: Client) -> None:
    once, again, other = (
        client.predict("Hi", temperature=1.5, top_p=1, max_new_tokens=16, seed=seed, api_name="/answer")
        for seed in (1, 1, 2)
    )
    assert once == again != other


def test_chat_streams_and_reads_the_history(client: Client, model: LlamaAdapter) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    job = client.submit("And now?", history, None, "one", "Be brief.", 0, max_new_tokens=24, api_name="/chat")
    last = job.result()
    assert job.outputs()[-1] == last
    alone = client.predict("And now?", None, "one", "Be brief.", 0, max_new_tokens=24, api_name="/answer")
    assert last != alone


DOCS = (CHECKOUT / "docs" / "chat.md").read_text(encoding="utf-8")
DOCS_ADDRESS = "http://127.0.0.1:7860"


def test_the_docs_python_asks_the_page(address: str, picture: Path) -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
    there = {DOCS_ADDRESS: address, "photo.jpg": str(picture), "qwen-0.5b-vision": "eyes"}
    for ours, here in there.items():
        assert ours in code
        code = code.replace(ours, here)
    names: dict[str, Any] = {}
    results = []
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr):
            results.append(eval(ast.unparse(statement), names))
        else:
            exec(ast.unparse(statement), names)
    answer, story, told, shares = results
    assert isinstance(answer, str) and answer
    fields = {"answer", "tokens", "tokens_per_second", "finish_reason", "adapter", "base"}
    assert set(told) == fields  # those of `ask --json`
    assert isinstance(story.result(timeout=60), str)
    assert len(shares) == 2 and sum(shares) == pytest.approx(1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_docs_curl_asks_the_page(address: str) -> None:
    first, second = re.findall(r"^    (curl .*?[^\\])$", DOCS, flags=re.MULTILINE | re.DOTALL)

    def run(command: str) -> str:
        command = command.partition("   #")[0].replace(f"{DOCS_ADDRESS}/", address)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    event = json.loads(run(first))["event_id"]
    assert "event: complete" in run(second.replace("/ID", f"/{event}"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"message": ""}, "the question is empty"),
        ({"message": "x" * (MAX_CHARACTERS + 1)}, "shorten it"),
        ({"message": 5}, "no text"),
        ({"message": "Hi", "adapter": "../../etc/passwd"}, "no adapter"),
        ({"message": "Hi", "temperature": "hot"}, "temperature"),
        ({"message": "Hi", "temperature": -1}, "temperature"),
        ({"message": "Hi", "max_new_tokens": 10**9}, "max-new-tokens"),
        ({"message": "Hi", "system": {"a": 1}}, "no text"),
        ({"message": "two words " * 700}, "the base reads 1024"),
    ],
)
def test_bad_values_are_told_to_the_caller(values: dict[str, Any], told: str, client: Client) -> None:
    with pytest.raises(AppError, match=re.escape(told)):
        client.predict(**values, api_name="/answer")


@pytest.mark.parametrize(
    "history",
    ["text", [1], [{"role": "user"}], [{"role": "root", "content": "x"}], [{"role": "user", "content": 1}]],
)
def test_a_bad_history_is_told_to_the_caller(history: Any, client: Client) -> None:
    with pytest.raises(AppError):
        client.predict("Hi", history, api_name="/chat")


def test_hostile_text_comes_back_to_a_program_as_it_is() -> None:
    hostile = "<script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt; ![](http://x.invalid/y.png)"
    *_, answer = Endpoints(Engine(build_scripted_model())).answer(hostile, max_new_tokens=1000)
    assert hostile in answer


def test_only_the_endpoints_are_public(client: Client) -> None:
    described: Any = client.view_api(return_format="dict")
    assert set(described["named_endpoints"]) == {"/answer", "/ask", "/chat", "/score"}
    assert not described["unnamed_endpoints"]


def test_the_browser_is_told_to_ask_nobody_else(address: str) -> None:
    policy = httpx.get(address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "teal.png"
    path.write_bytes(png("teal"))
    return path


def _called(address: str, endpoint: str, **values: Any) -> tuple[str, Any]:
    """The last event of a call, as curl gets it: its name and what it brings."""
    posted = httpx.post(f"{address}gradio_api/call/v2/{endpoint}", json=values)
    found = httpx.get(f"{address}gradio_api/call/{endpoint}/{posted.json()['event_id']}").text
    event, data = found.strip().splitlines()[-2:]
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def _sent(address: str, name: str, content: bytes) -> str:
    """The path of a file that was uploaded as curl does it."""
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)})
    (path,) = sent.json()
    return str(path)


def test_a_program_asks_about_a_picture(
    client: Client, address: str, model: LlamaAdapter, picture: Path
) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=16)
    expected = model.chat("Which colour?", image=picture, adapter="eyes", sampling=greedy)
    assert expected != model.chat("Which colour?", adapter="eyes", sampling=greedy)
    asked = {"message": "Which colour?", "adapter": "eyes", "temperature": 0, "max_new_tokens": 16}
    for image in (handle_file(picture), [handle_file(picture)], data_url(picture.read_bytes())):
        assert client.predict(**asked, image=image, api_name="/answer") == expected
        assert client.predict(**asked, image=image, api_name="/chat") == expected
    path = _sent(address, "teal.png", picture.read_bytes())
    for image in (path, {"path": path}, data_url(picture.read_bytes())):
        assert _called(address, "answer", **asked, image=image) == ("complete", [expected])


@pytest.mark.parametrize(
    ("adapter", "image", "told"),
    [
        ("one", data_url(png("red")), "can't see pictures"),
        (NO_ADAPTER, data_url(png("red")), "the bare base can't see pictures"),
        ("eyes", data_url(SVG), "SVG"),
        ("eyes", data_url(huge_png()), "more than the"),
        ("eyes", "/etc/passwd", "not uploaded"),
        ("eyes", {"path": "/etc/passwd"}, "not uploaded"),
        ("eyes", {"path": "http://192.0.2.1/x.png"}, "not uploaded"),
        ("eyes", {"path": "http://192.0.2.1/x.png", "meta": {"_type": "gradio.FileData"}}, "not fetched"),
        # Gradio's own refusal, which it keeps to itself.
        ("eyes", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None),
        ("eyes", {"path": "x", "url": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None),
    ],
)
def test_a_bad_picture_is_told_to_the_caller(adapter: str, image: Any, told: str, address: str) -> None:
    event, data = _called(address, "answer", message="Hi", adapter=adapter, image=image)
    assert event == "error"
    assert data["error"] is None if told is None else told in data["error"]


def test_nothing_is_fetched_in_the_place_of_a_text_either(address: str) -> None:
    url = {"path": "http://192.0.2.1/x", "meta": {"_type": "gradio.FileData"}}
    event, data = _called(address, "answer", message=url)
    assert (event, data["error"]) == (
        "error",
        "URLs are not fetched; download the picture and send the file",
    )


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
@pytest.mark.parametrize("path", ["/etc/passwd", f"{CHECKOUT}/pyproject.toml", "http://192.0.2.1/x.png"])
def test_the_box_takes_no_path_from_outside(
    path: str, meta: dict[str, Any], address: str, model: LlamaAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the browser sends by itself, but with another path."""
    asked: list[Any] = []
    monkeypatch.setattr(ChatHandlers, "ask", lambda *values: asked.append(values))
    config = httpx.get(f"{address}config").json()
    box = next(part["id"] for part in config["components"] if part["type"] == "multimodaltextbox")
    call = next(each for each in config["dependencies"] if [box, "submit"] in each["targets"])
    data: list[Any] = [{"text": "Hi", "files": [{"path": path, **meta}]}, None, *SETTINGS]
    posted = {"fn_index": call["id"], "data": data, "session_hash": "a"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=posted).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=a") as stream:
        lines = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    (done,) = (line for line in lines if line["msg"] == "process_completed")
    assert not done["success"]
    assert asked == []


def test_an_upload_is_limited_and_never_shown_as_a_page(address: str) -> None:
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", bytes(MAX_BYTES + 1))})
    assert sent.status_code in (400, 413)
    for name, content in (("x.html", b"<script>alert(1)</script>"), ("x.svg", SVG)):
        found = httpx.get(f"{address}gradio_api/file={_sent(address, name, content)}")
        assert found.headers["content-disposition"].startswith("attachment")


def test_no_file_can_be_read(address: str) -> None:
    for path in ("/etc/passwd", f"{CHECKOUT}/pyproject.toml", "../pyproject.toml"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_no_connection_leaves_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            hosts.append(address[0])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    with _served(build_scripted_model()) as address:
        Client(address, verbose=False).predict("Hi", max_new_tokens=4, api_name="/answer")
    assert set(hosts) == {"127.0.0.1"}


def test_who_does_not_know_the_password_stays_outside() -> None:
    with _served(build_scripted_model(), auth=("me", "secret")) as address:
        posted = httpx.post(f"{address}gradio_api/call/v2/answer", json={"message": "Hi"})
        assert posted.status_code == 401
        client = Client(address, auth=("me", "secret"), verbose=False)
        assert client.predict("Hi", max_new_tokens=3, api_name="/answer")


@pytest.mark.parametrize("endpoint", ["answer", "chat"])
def test_a_caller_who_leaves_stops_the_work(endpoint: str) -> None:
    model = build_scripted_model(delay=0.02)
    with _served(model) as address:
        call = f"{address}gradio_api/call"
        asked = {"message": "Hi", "max_new_tokens": 1000}
        event = httpx.post(f"{call}/v2/{endpoint}", json=asked).json()["event_id"]
        with httpx.stream("GET", f"{call}/{endpoint}/{event}") as stream:
            for line in stream.iter_lines():
                if line.startswith("event: generating"):
                    break
        _assert_settles(model)


def _assert_settles(model: ScriptedModel) -> None:
    """No token is made any more after a while, though there would be many to come."""
    before = -1
    while model.made != before:
        before = model.made
        time.sleep(0.2)
    assert 0 < before < 400


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(UsageError, match="--host"):
        check_port("192.0.2.1", port)
    with pytest.raises(UsageError, match="--port"):
        check_port("127.0.0.1", 70_000)


# --- ScienceQA ----------------------------------------------------------------------------------------------


def _scored(model: LlamaAdapter, adapter: str, image: Path | None = None) -> list[float]:
    """What `eval.scienceqa` compares, as shares."""
    problem = Problem("7", "Which?", ("hen", "cat", "cow"), 1, hint="It lays eggs.", image=image)
    features: Any = {} if image is None else {image: model.encode_images(image, adapter=adapter)[0]}
    records = problem_records([problem])
    answers = [[f"The answer is {letter}." for letter in "ABC"]]
    (found,) = answer_likelihoods(model, records, answers, features=features, adapter=adapter)
    return torch.tensor(found).softmax(0).tolist()


@pytest.mark.parametrize("adapter", ["one", "two", NO_ADAPTER])
def test_score_gives_the_options_probabilities(adapter: str, client: Client, model: LlamaAdapter) -> None:
    asked = ("Which?", ["hen", "cat", "cow"], "It lays eggs.", None, adapter)
    found = client.predict(*asked, api_name="/score")
    assert found == pytest.approx(_scored(model, adapter), rel=1e-4)
    assert sum(found) == pytest.approx(1)


def test_score_sees_a_picture(client: Client, model: LlamaAdapter, picture: Path) -> None:
    asked = ("Which?", ["hen", "cat", "cow"], "It lays eggs.", handle_file(picture), "eyes")
    found = client.predict(*asked, api_name="/score")
    assert found == pytest.approx(_scored(model, "eyes", picture), rel=1e-4)
    assert found != pytest.approx(_scored(model, "eyes"), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"options": ["a"]}, "1 options; expected 2 to 5"),
        ({"options": ["a"] * 6}, "6 options"),
        ({"options": ["a", " "]}, "none of them empty"),
        ({"options": "a, b"}, "no list of texts"),
        ({"options": ["a", 5]}, "no text"),
        ({"question": ""}, "the question is empty"),
        ({"question": "x " * 3000}, "the base reads 1024"),
        ({"context": "x" * (MAX_CHARACTERS + 1)}, "shorten it"),
        ({"image": data_url(png("red"))}, "can't see pictures"),
        ({"image": [data_url(png("red"))] * 2, "adapter": "eyes"}, "2 pictures"),
        ({"image": "/etc/passwd", "adapter": "eyes"}, "not uploaded"),
        ({"adapter": "nobody"}, "no adapter"),
    ],
)
def test_a_bad_problem_is_told_to_the_caller(values: dict[str, Any], told: str, address: str) -> None:
    asked = {"question": "Which?", "options": ["a", "b"], **values}
    event, data = _called(address, "score", **asked)
    assert event == "error" and told in data["error"]


def test_an_adapter_trained_on_scienceqa_answers_in_its_own_way_and_is_named(model: LlamaAdapter) -> None:
    assert trained_for_it(model) == []
    adapter, asked = model.get_adapter("two"), ("Which?", ["a hen", "a cat"], "It lays eggs.", None, "two")
    before, letters = adapter.config, score(model, *asked)
    adapter.config = replace(before, scienceqa=ScienceQAConfig("QCM-O", answer="option"))
    try:
        assert trained_for_it(model) == ["two"]
        problem = Problem("7", "Which?", ("a hen", "a cat"), 1, hint="It lays eggs.")
        records = problem_records([problem], "QCM-O")
        (found,) = answer_likelihoods(model, records, [["a hen", "a cat"]], adapter="two")
        shares = score(model, *asked).shares
        assert list(shares) == pytest.approx(torch.tensor(found).softmax(0).tolist(), rel=1e-4)
        assert shares != pytest.approx(letters.shares, rel=1e-3)
    finally:
        adapter.config = before


# --- the command --------------------------------------------------------------------------------------------


def _demo(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *options],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )


def test_the_command_serves_the_page_until_ctrl_c(tmp_path: Path) -> None:
    base = build_tiny_base(tmp_path / "base", max_position_embeddings=128)
    port = _free_port()
    process = _demo("--base", str(base), "--weights", str(tmp_path), "--port", str(port))
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        with pytest.raises(OSError):  # another address of the same machine
            socket.create_connection(("127.0.0.2", port), timeout=1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped"
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--auth", "me"], "--auth"), (["--nothing"], "--nothing"), (["--port", "x"], "--port")],
)
def test_a_mistyped_option_is_told_in_one_line(options: list[str], told: str) -> None:
    process = _demo(*options)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told in errors
    assert errors.count("\n") == 1
