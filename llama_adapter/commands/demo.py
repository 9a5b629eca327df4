"""Serve the page: chat with an adapter in a browser, switch adapters, compare with the bare base."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.commands.arguments import Parser, add_adapter_option, add_model_options, load_model
from llama_adapter.common.errors import UsageError


def main(words: Sequence[str] | None = None, *, program: str = "python -m demo") -> None:
    arguments = build_parser(program).parse_args(words)
    auth = _auth(arguments.auth)
    if arguments.max_queue < 1:
        raise UsageError(f"--max-queue is {arguments.max_queue}; expected 1 or more")
    # Slow to import, and not needed for help or a mistyped option.
    from llama_adapter.page.compare_tab import read_comparison
    from llama_adapter.page.experts import load_experts
    from llama_adapter.page.layout import build_page
    from llama_adapter.page.server import check_port, serve

    check_port(arguments.host, arguments.port)
    comparison = None if arguments.comparison is None else read_comparison(arguments.comparison)
    model = load_model(arguments)
    experts = load_experts(
        model,
        adapter=arguments.adapter,
        weights=arguments.weights,
        adapters=arguments.adapters,
        compared={} if comparison is None else comparison.adapters,
    )
    comparison = None if comparison is None else comparison.loaded(model)
    page = build_page(model, experts, comparison=comparison, max_queue=arguments.max_queue)
    try:
        address = serve(page, host=arguments.host, port=arguments.port, share=arguments.share, auth=auth)
        print(f"{address} is the page; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser of the page's options."""
    parser = Parser(prog=program, description=__doc__)
    add_adapter_option(parser)
    add_model_options(parser, answers=True)
    group = parser.add_argument_group("page")
    group.add_argument("--adapters", type=Path, metavar="DIR", help="one more folder of adapters to offer")
    group.add_argument(
        "--comparison", type=Path, metavar="DIR", help="show what eval.methods wrote there in a tab"
    )
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (127.0.0.1)")
    group.add_argument("--port", type=int, default=7860, metavar="N", help="port of the page (7860)")
    group.add_argument("--share", action="store_true", help="also serve it at a public address of Gradio")
    group.add_argument("--auth", metavar="USER:PASSWORD", help="require this user name and password")
    group.add_argument("--max-queue", type=int, default=20, metavar="N", help="how many may wait (20)")
    return parser


def _auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise UsageError("--auth takes USER:PASSWORD, neither of them empty")
    return user, password
