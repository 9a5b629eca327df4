"""The tab "Look inside": where the chosen adapter acts, and its effect on the chat's latest answer."""

from __future__ import annotations

import html
from collections.abc import Sequence

from torch import Tensor

from llama_adapter.answering.conversation import Conversation
from llama_adapter.answering.influence import effective_gates, measure_influence
from llama_adapter.common.errors import UsageError
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.page.heatmap import draw_heatmap

OPEN_GATE = 0.05  # the share of the prompts' part that a gate lets through; less has hardly any effect
MAX_TOKENS = 96  # of an answer; more would be too narrow to tell apart

GATES = (
    "Each head of each adapted layer has one gate, and what the head reads from the adapter's prompts is "
    "multiplied with its tanh: left out where that is 0 (faint), added where it is positive (green), "
    "subtracted where it is negative (orange)."
)
ANSWER = (
    "How far each layer's prompts moved each token of the answer: the length of what the layer read from its "
    "prompts, gated, as a share of the length of what it read from the text. What the scales and biases of "
    "an adapter with such did is not in it."
)


def show_gates(model: LlamaAdapter, adapter: str) -> str:
    """HTML: a heat map of an adapter's gates, or the reason why there is none.

    For "auto" they are those of the text adapter.
    """
    adapter = model.answering_adapter(adapter)
    if adapter == NO_ADAPTER:
        return _line("The bare base has no prompts and no gates; choose an adapter above.")
    try:
        gates = effective_gates(model, adapter)
    except UsageError as error:
        return _line(f"{str(error)[:1].upper()}{str(error)[1:]}.")
    first = model.get_adapter(adapter).config.first_layer
    layer, head = divmod(int(gates.abs().argmax()), gates.shape[1])
    strongest = f"strongest: layer {first + layer}, head {head}, {gates[layer, head]:.2f}"
    # The topmost layer is drawn at the top.
    return draw_heatmap(
        gates.flip(0).tolist(),
        rows=[str(first + number) for number in reversed(range(len(gates)))],
        columns=[str(number) for number in range(gates.shape[1])],
        names=("layer", "head"),
        summary=f"Heat map of tanh(gate) of {len(gates)} layers with {gates.shape[1]} heads; {strongest}",
    ) + _line(
        f"Layers upwards, heads to the right; {strongest}.",
        f"In plain words: {explain_gates(gates, first)}",
    )


def show_answer(model: LlamaAdapter, chat: Conversation | None) -> str:
    """HTML: a heat map of the prompts' effect on the latest answer of a chat, or why there is none."""
    if chat is None or not chat.exchanges:
        return _line("Ask something in the chat, then come back.")
    latest = chat.exchanges[-1]
    try:
        found = measure_influence(
            model,
            latest.read,
            latest.answer.text,
            features=chat.latest_features(),
            adapter=latest.adapter,
            max_tokens=MAX_TOKENS,
        )
    except UsageError as error:
        return _line(f"{str(error)[:1].upper()}{str(error)[1:]}.")
    shares = found.shares
    layer, token = divmod(int(shares.argmax()), shares.shape[1])
    strongest = f"layer {found.first_layer + layer}, {found.tokens[token]!r}, {shares[layer, token]:.0%}"
    question = latest.question.text
    asked = question if len(question) <= 80 else f"{question[:79]}…"
    return (
        _line(f"{latest.adapter} answered “{asked}”; most: {strongest}.")
        + draw_heatmap(
            shares.flip(0).tolist(),
            rows=[str(found.first_layer + number) for number in reversed(range(len(shares)))],
            columns=[_visible(text) for text in found.tokens],
            names=("layer", "token"),
            summary=f"Heat map of {len(shares)} layers and {len(found.tokens)} tokens; most: {strongest}",
            upright=False,
        )
        + _line(
            f"The answer's first {MAX_TOKENS} tokens." if len(found.tokens) == MAX_TOKENS else "",
            f"In plain words: {explain_influence(shares, found.tokens)}",
        )
    )


def explain_gates(gates: Tensor, first_layer: int) -> str:
    """A sentence in plain words about an adapter's gates, (L, H)."""
    strength = gates.abs()
    if not strength.any():
        return "every gate is shut, so the adapter changes nothing yet."
    opened = int((strength >= OPEN_GATE).sum())
    by_layer = strength.sum(1)
    most = int(by_layer.argmax())
    share = float(by_layer[most] / by_layer.sum())
    upper = float(by_layer[len(by_layer) // 2 :].sum() / by_layer.sum())
    where = "early, while words are still being put together" if upper < 0.4 else "on the way all along"
    where = "late, just before the next word is chosen" if upper > 0.6 else where
    return (
        f"{opened} of the {gates.numel()} places where the adapter can have its say are open by at least "
        f"{OPEN_GATE:.0%}; it speaks loudest in layer {first_layer + most} ({share:.0%} of its whole voice), "
        f"and mostly {where}."
    )


def explain_influence(shares: Tensor, tokens: Sequence[str]) -> str:
    """A sentence in plain words about the shares of an answer's tokens, (L, T)."""
    by_token = shares.mean(0)
    sentence = (
        f"what the adapter added was on average {float(by_token.mean()):.0%} as strong as what was read"
    )
    if len(tokens) < 2:
        return f"{sentence}."
    most, least = int(by_token.argmax()), int(by_token.argmin())
    sentence += (
        f"; it steered most where the model wrote “{_visible(tokens[most])}” ({float(by_token[most]):.0%}) "
        f"and least at “{_visible(tokens[least])}” ({float(by_token[least]):.0%})"
    )
    third = len(tokens) // 3
    if not third:
        return f"{sentence}."
    begin, end = float(by_token[:third].mean()), float(by_token[-third:].mean())
    if begin > end * 1.1:
        return f"{sentence}. The beginning of the answer was steered more than its end."
    if end > begin * 1.1:
        return f"{sentence}. The end of the answer was steered more than its beginning."
    return f"{sentence}. Beginning and end of the answer were steered about as much."


def _visible(token: str) -> str:
    """A token's text as a label, with white space made visible."""
    text = token.strip().replace("\n", "↵") or ("↵" if "\n" in token else "␣")
    return text if len(text) <= 12 else f"{text[:11]}…"


def _line(*sentences: str) -> str:
    return "".join(f'<p class="line">{html.escape(text)}</p>' for text in sentences if text)
