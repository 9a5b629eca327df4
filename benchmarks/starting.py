"""The suite "demo" of benchmarks.throughput: the time until the page's first answer, and its memory."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import
    from llama_adapter.model import LlamaAdapter

QUESTION = "What do plants need to grow?"
PATIENCE = 300  # seconds; after that something is wrong


def demo(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """Start the page in a process of its own, as a person does, and ask it one question at `/answer`."""
    from gradio_client import Client

    if not sys.platform.startswith("linux"):
        print("left out: only Linux reports the memory of another process")
        return {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "demo", "--base", model.base, "--port", str(port)]
    command += ["--weights", str(arguments.weights)] if arguments.weights else []
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    command += ["--quantize", arguments.quantize] if arguments.quantize else []
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            address = page.stdout.readline().split(" ")[0]  # empty if the process has ended
            if not address.startswith("http"):
                raise UsageError("the page did not start; its output is above")
            served = time.perf_counter() - started
            client = Client(address, verbose=False)
            job = client.submit(
                QUESTION, temperature=0, max_new_tokens=arguments.new_tokens, api_name="/answer"
            )
            answer = job.result(timeout=PATIENCE)
            answered = time.perf_counter() - started
            status = Path(f"/proc/{page.pid}/status").read_text(encoding="utf-8").splitlines()
            kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        finally:
            page.terminate()
    memory = 1024 * kilobytes / 1e6
    words = len(answer.split())
    print(f"  served after {served:.1f} s; the first answer, of {words} words, after {answered:.1f} s")
    print(f"  peak memory {memory:,.0f} MB")
    return {"demo_seconds_to_page": served, "demo_seconds_to_answer": answered, "demo_memory_mb": memory}
