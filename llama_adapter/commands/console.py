"""The console command: llama-adapter list, fetch, ask, chat, info, convert, average, merge.

torch and transformers take seconds to import, so each command imports them only when it needs them. Help, a
mistyped option and an empty question are answered at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_adapter
from llama_adapter.answering.conversation import Conversation
from llama_adapter.commands.arguments import (
    Parser,
    add_adapter_option,
    add_model_options,
    add_weights_option,
    load_model,
)
from llama_adapter.commands.conversion import (
    add_average_options,
    add_convert_options,
    add_merge_options,
    average,
    convert,
    merge,
)
from llama_adapter.commands.field_options import add_fields, given_fields
from llama_adapter.commands.scripts import SCRIPTS, run_script
from llama_adapter.commands.weights_shown import print_base_or_tower, print_list
from llama_adapter.common.errors import UsageError
from llama_adapter.common.progress import ProgressLine
from llama_adapter.data.pictures import open_picture
from llama_adapter.data.templates import Turn, question_turn
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import CATALOGUE, DEFAULT_BASE

if TYPE_CHECKING:
    from PIL import Image

    from llama_adapter.decoding.answer import Answer
    from llama_adapter.methods.projection import VisionConfig

MAX_QUESTION_BYTES = 4 << 20  # more than any decoder can read, and still easy to hold in memory


def run() -> None:
    """Carry out the command line. `llama_adapter.__main__` is the entry point. Raises UsageError."""
    # A stream is None if the caller closed it.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - open as long as the command runs
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # show "?" for a character that the terminal does not have
            stream.reconfigure(errors="replace")
    if run_script(sys.argv[1:]):
        return
    arguments = _parser().parse_args()
    command: Callable[[argparse.Namespace], None] = arguments.command
    command(arguments)


class _ShowVersion(argparse.Action):
    """--version. argparse's own action would look the version up for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"llama-adapter {llama_adapter.__version__}")
        parser.exit()


def _parser() -> Parser:
    parser = Parser(
        prog="llama-adapter",
        description="A frozen decoder of the LLaMA family that learnt to follow instructions.",
        epilog="llama-adapter COMMAND --help lists a command's options.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(command=function)
        return added

    # `run_script` carries these out. They are listed here for the help.
    for name, text in (
        ("demo", "serve the page: a chat in the browser"),
        ("train", f"train: {', '.join(SCRIPTS['train'])}"),
        ("eval", f"score: {', '.join(SCRIPTS['eval'])}"),
    ):
        commands.add_parser(name, help=text, add_help=False)

    added = command("list", print_list, "list bases, towers and adapters, here or to be fetched")
    added.add_argument("--json", action="store_true", help="print them as JSON")
    add_weights_option(added)

    added = command("fetch", _fetch, "fetch a base model or a vision tower into the weights folder, once")
    added.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help=f"one of {', '.join(CATALOGUE)} ({DEFAULT_BASE}); `llama-adapter list` shows all",
    )
    added.add_argument(
        "--else", dest="other", metavar="OTHER", help="fetch OTHER, and say so, if NAME can't be had"
    )
    add_weights_option(added)

    added = command("ask", _ask, "answer one question")
    added.add_argument("question", metavar="QUESTION", nargs="+", help="- reads it from standard input")
    added.add_argument("--json", action="store_true", help="print one JSON object when the answer ends")
    added.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture to ask about; may be repeated"
    )
    _add_answering_options(added)

    added = command("chat", _chat, "chat in the terminal")
    _add_answering_options(added)

    added = command("info", _info, "describe an adapter, a base or a tower")
    added.add_argument("adapter", metavar="NAME", nargs="?", help="name, or an adapter's folder or hub id")
    add_weights_option(added)

    added = command("convert", convert, "convert an adapter: the authors' .pth, PEFT's folders, and back")
    add_convert_options(added)

    added = command("average", average, "write the mean of adapters, such as stages of one training")
    add_average_options(added)

    added = command("merge", merge, "write an adapter's base with the adapter folded in, as a plain decoder")
    add_merge_options(added)
    return parser


def _add_answering_options(parser: argparse.ArgumentParser) -> None:
    add_adapter_option(parser)
    add_model_options(parser, answers=True)
    parser.add_argument("--system", default="", metavar="TEXT", help="a system text before the conversation")
    parser.add_argument(
        "--allow-urls", action="store_true", help="allow pictures to be fetched from public web addresses"
    )
    add_fields(parser, Sampling)


def _fetch(arguments: argparse.Namespace) -> None:
    from llama_adapter.weights.fetch import fetch

    line = ProgressLine()
    wanted = arguments.name
    if wanted is None:
        wanted = DEFAULT_BASE
        line.say(
            f"no name given, so the default base {wanted}; `llama-adapter list` shows what else there is"
        )

    def get(name: str) -> Path:
        return fetch(name, arguments.weights, progress=line.say, passing=line.show)

    try:
        print(get(wanted))
    except UsageError as error:
        if arguments.other in (None, wanted) or wanted not in CATALOGUE:
            raise
        line.say(f"{error}; going on with {arguments.other}")
        print(get(arguments.other))


# --- ask ----------------------------------------------------------------------------------------------------


def _ask(arguments: argparse.Namespace) -> None:
    sampling = Sampling(**given_fields(arguments, Sampling))
    system = Turn("system", arguments.system).text
    question = " ".join(arguments.question)
    question = question_turn(_read_question() if question == "-" else question).text
    images = [open_picture(name, allow_urls=arguments.allow_urls) for name in arguments.image]
    model = load_model(arguments)
    chat = Conversation(model, system=system, sampling=sampling)
    answer = chat.ask(question, images)
    if not arguments.json:
        _show(answer)
        _say_if_cut_off(answer)
        return
    for _ in answer:
        pass
    result = {
        "answer": answer.text,
        "tokens": answer.tokens,
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "finish_reason": answer.finish_reason,
        "adapter": chat.exchanges[-1].adapter,
        "base": model.base,
    }
    print(json.dumps(result))


def _read_question() -> str:
    """The question from standard input."""
    content = sys.stdin.buffer.read(MAX_QUESTION_BYTES + 1)
    if len(content) > MAX_QUESTION_BYTES:
        raise UsageError(f"the question has more than {MAX_QUESTION_BYTES >> 20} MiB; shorten it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {content[error.start]:#04x} at {error.start}; "
            "give the question as text"
        ) from None


def _say_if_cut_off(answer: Answer) -> None:
    if answer.finish_reason == "length":
        print(f"(cut off at the length limit, after {answer.tokens} tokens)", file=sys.stderr)


def _show(pieces: Iterable[str]) -> None:
    """Print an answer while it is made. End its line even if it is interrupted."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


# --- chat ---------------------------------------------------------------------------------------------------

CHAT_HELP = """\
/image FILE    add a picture to the next question; it stays known after that
/retry         answer the last question again
/undo          take the last question and its answer back
/clear         start anew
/adapter NAME  let another adapter answer, by name, folder or hub id; none is the bare base, auto the one that
               sees once there is a picture, else the text adapter
/exit          end, as /quit and Ctrl-D do
Ctrl-C stops an answer; at the prompt it ends the chat."""


def _chat(arguments: argparse.Namespace) -> None:
    sampling = Sampling(**given_fields(arguments, Sampling))
    system = Turn("system", arguments.system).text
    model = load_model(arguments)
    chat = Conversation(model, adapter=model.active_adapter, system=system, sampling=sampling)
    prompt = ""
    images: list[Image.Image] = []  # for the next question
    if isinstance(sys.stdin, io.TextIOWrapper):  # so bytes that are not text are refused later
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - input() then edits its line and brings earlier ones back
        prompt = "> "
        who = f"{chat.adapter} on" if model.adapters else "the bare base"
        print(f"{who} {model.base}; /help lists the commands")
    while True:
        dropped = chat.dropped
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        if line and not prompt:  # print lines of a file or pipe, which otherwise are not visible
            print(f"> {''.join(letter if letter.isprintable() else '?' for letter in line)}", flush=True)
        try:
            if line:
                _act(chat, line, images, arguments)
        except _ChatEnd:
            return
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
        if chat.dropped > dropped:
            print(f"(no room for the first {chat.dropped} exchanges: not read any more)", file=sys.stderr)


class _ChatEnd(Exception):
    """The person has typed /exit."""


def _act(chat: Conversation, line: str, images: list[Image.Image], arguments: argparse.Namespace) -> None:
    """Ask the question, or carry out the command, that was typed."""
    command, _, rest = line.partition(" ")
    if not re.fullmatch("/[a-z]+", command):  # a path is not a command
        answer = chat.ask(line, images)
        images.clear()
        _show_and_tell(chat, answer)
    elif command == "/image":
        if not rest.strip():
            raise UsageError("/image needs a picture's file: /image photo.jpg")
        chat.model.tower(chat.adapter)  # raises UsageError now if the adapter can't see
        images.append(open_picture(rest.strip(), allow_urls=arguments.allow_urls))
        print(f"{len(images)} picture{'s' if len(images) > 1 else ''} for the next question")
    elif command == "/retry":
        _show_and_tell(chat, chat.retry())
    elif command == "/undo":
        print(f"taken back: {chat.undo()}")
    elif command == "/clear":
        chat.clear()
        images.clear()
        print("everything said is forgotten")
    elif command == "/adapter":
        _choose_adapter(chat, rest.strip(), arguments.weights)
        if images and not chat.model.sees(chat.adapter):
            images.clear()
            print(f"{chat.adapter} can't see pictures: those for the next question are dropped")
    elif command == "/help":
        print(CHAT_HELP)
    elif command in ("/exit", "/quit"):
        raise _ChatEnd
    else:
        raise UsageError(f"no command {command}; /help lists them")


def _show_and_tell(chat: Conversation, answer: Answer) -> None:
    from llama_adapter.surface.named_adapters import AUTO

    _show(answer)
    _say_if_cut_off(answer)
    if chat.adapter == AUTO:
        print(f"({chat.exchanges[-1].adapter} answered)", file=sys.stderr)
    if chat.unseen:
        who = chat.exchanges[-1].adapter
        print(f"({who} can't see pictures: yours was not looked at)", file=sys.stderr)


def _choose_adapter(chat: Conversation, name: str, weights: str | None) -> None:
    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.surface.named_adapters import AUTO

    loaded = [NO_ADAPTER, *([AUTO] if chat.model.adapters else []), *chat.model.adapters]
    if not name:
        there = dict.fromkeys([*loaded, *locations.list_weights("adapter", weights)])
        print(f"{chat.adapter} answers; there are {', '.join(there)}")
        return
    if name not in loaded:
        name = chat.model.load_adapter(name, weights=weights)
    chat.adapter = name
    print(f"{name} answers")


# --- info ---------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> None:
    from llama_adapter.methods.checkpoint import (
        CONFIG_FILE,
        FORMER_CONFIG_FILE,
        STATE_FILE,
        WEIGHTS_FILE,
        adapter_folder,
        load_adapter,
    )

    if arguments.adapter is None:
        raise UsageError("give a name: `llama-adapter list` shows what there is")
    try:
        found = locations.resolve(arguments.adapter, kind="adapter", weights=arguments.weights)
    except UsageError:
        if print_base_or_tower(arguments.adapter, arguments.weights):
            return
        raise
    folder = adapter_folder(found)
    adapter = load_adapter(folder, weights=arguments.weights)
    config = adapter.config
    files = [folder / name for name in (CONFIG_FILE, FORMER_CONFIG_FILE, WEIGHTS_FILE, STATE_FILE)]
    size = sum(file.stat().st_size for file in files if file.is_file())
    facts: dict[str, Any] = {
        "adapter": folder,
        "base": config.base,
        "shape": config.shape,
        "fingerprint": config.shape.fingerprint(),
        "method": f"{config.method} in the top L = {config.adapted_layers} layers",
        **{name.replace("_", " "): value for name, value in config.options.items()},
        "parameters": f"{sum(parameter.numel() for parameter in adapter.parameters()):,} trainable",
        "size": f"{size / 2**20:.2f} MiB",
        "template": config.template,
        "pictures": _sight(config.vision),
        "training": config.training or "not recorded",
    }
    lines = list(_fact_lines(facts))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        line = f"{name:{width}}  {value}".rstrip()
        # An adapter may come from anyone: its texts must not control the terminal.
        print("".join(letter if letter.isprintable() else "?" for letter in line))


def _fact_lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Names and values, line by line. A flat dictionary is one line; one with others inside is indented."""
    for name, value in facts.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {f"{number}": one for number, one in enumerate(value, start=1)}
        if not isinstance(value, Mapping):
            yield f"{indent}{name}", str(value)
        elif indent and not any(map(_nested, value.values())):
            yield f"{indent}{name}", ", ".join(f"{key} {inner}" for key, inner in value.items())
        else:
            yield f"{indent}{name}", ""
            yield from _fact_lines(value, indent + "  ")


def _nested(value: Any) -> bool:
    """Whether it is a dictionary, or a list that contains one."""
    return isinstance(value, Mapping) or (isinstance(value, list) and any(map(_nested, value)))


def _sight(vision: VisionConfig | None) -> str:
    if vision is None:
        return "none: text alone"
    depths = ", ".join(map(str, vision.depths))
    return (
        f"by the tower {vision.tower} ({vision.tower_fingerprint}), depths {depths}: {vision.feature_width} "
        f"features, {vision.image_tokens} image token{'s' if vision.image_tokens > 1 else ''}"
    )
