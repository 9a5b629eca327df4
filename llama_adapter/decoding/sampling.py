"""How the tokens of an answer are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from llama_adapter.common.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is the paper's: temperature 0.1 and top-p 0.75.

    Raises:
        UsageError: a value out of its range, with its name.
    """

    max_new_tokens: int = 256
    temperature: float = 0.1  # 0 always takes the most likely token
    top_p: float = 0.75  # 1 keeps all tokens
    top_k: int = 0  # 0 keeps all tokens
    repetition_penalty: float = 1.0  # 1 is no penalty
    seed: int | None = None

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
