"""Serves the page on a port of this machine. A browser never has to ask any other machine for anything."""

from __future__ import annotations

import os
import socket
from typing import Any

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import MAX_BYTES
from llama_adapter.page.look import CSS, THEME
from llama_adapter.page.script import SCRIPT

# Gradio's page has inline scripts and styles and compiles some. All of it comes from this server.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"


class SameOrigin:
    """Adds the Content-Security-Policy to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("URLs are not fetched; download the picture and send the file", print_exception=False)


def check_port(host: str, port: int) -> None:
    """Raise UsageError if the page can't be served on this host and port."""
    try:
        socket.create_server((host, port)).close()
    except OverflowError:
        raise UsageError(f"--port is {port}; expected 1 to 65535") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"port {port} of {host} can't be used ({reason}); choose another with --port, or --host"
        ) from None


def serve(
    page: gr.Blocks, *, host: str, port: int, share: bool = False, auth: tuple[str, str] | None = None
) -> str:
    """Serve the page until `page.close()` is called. Returns its address."""
    # Gradio checks that its page answers. A proxy for outside addresses can't reach it.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", host]))
    # If a caller gives a URL where a file is expected, or elsewhere, Gradio would fetch it.
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    options: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "share": share,
        "auth": auth,
        "prevent_thread_lock": True,
        "quiet": True,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "max_file_size": MAX_BYTES,
        "footer_links": ["api", "settings"],
        "theme": THEME,
        "css": CSS,
        "head": f"<script>{SCRIPT}</script>",
        "app_kwargs": {"middleware": [Middleware(SameOrigin)]},
    }
    _, local, public = page.launch(**options)
    return public or local
