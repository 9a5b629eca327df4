"""How the tokens of an answer are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_adapter.common.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is the paper's: temperature 0.1 and top-p 0.75.

    The commands make their options from these fields and their "help".

    Raises:
        UsageError: a value out of its range, with its name.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens", "metavar": "N"})
    temperature: float = field(
        default=0.1,
        metadata={"help": "0 always takes the most likely token; higher values vary more", "metavar": "X"},
    )
    top_p: float = field(
        default=0.75,
        metadata={
            "help": "draw among the most likely tokens with this total probability; 1 keeps all",
            "metavar": "X",
        },
    )
    top_k: int = field(
        default=0,
        metadata={"help": "draw among this many of the most likely tokens; 0 keeps all", "metavar": "N"},
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 makes repetitions less likely", "metavar": "X"}
    )
    seed: int | None = field(
        default=None, metadata={"help": "makes the answer the same every time", "metavar": "N"}
    )

    def __post_init__(self) -> None:
        _within("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        _within("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100")
        _within("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _within("top-k", self.top_k, self.top_k >= 0, "0 or more")
        _within("seed", self.seed or 0, 0 <= (self.seed or 0) < 2**64, "0 to 2**64 - 1")
        penalty = self.repetition_penalty
        _within("repetition-penalty", penalty, 0 < penalty <= 10, "above 0 and at most 10")


def _within(name: str, value: float, fine: bool, expected: str) -> None:
    if not fine:
        raise UsageError(f"{name} is {value}; expected {expected}")
