"""Questions: one object for everything that asks, from `LlamaAdapter.chat` to the page, the API and scoring.

Shapes: I pictures, F features of one, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import Picture
from llama_adapter.data.turns import Turn, question_turn
from llama_adapter.decoding.sampling import Sampling

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from llama_adapter.methods.state import AdapterState

# A text, or one or more turns. A dictionary is a turn with "role" and "content", as in chat templates.
GivenTurns: TypeAlias = "str | Turn | Mapping[str, Any] | Sequence[Turn | Mapping[str, Any]]"


@dataclass(frozen=True, eq=False)
class Question:
    """A conversation that ends with a question, its pictures, the adapter that answers, and the sampling.

    Attributes:
        turns: the conversation. Its last turn is the question.
        image: one or more pictures: files, contents of files, opened images, or features, (I, F), from
            `LlamaAdapter.encode_images`. None: no picture.
        adapter: the adapter's name. None means the model's active one, ``"none"`` the bare base, ``"auto"``
            the adapter that sees where there is a picture, else the text adapter.
        sampling: how tokens are chosen, and how many at most.
        tokens: the turns as token ids in the adapter's text format, if they are known already.
    """

    turns: Sequence[Turn]
    image: Picture | Sequence[Picture] | Tensor | None = None
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tokens: Sequence[int] | None = None

    @classmethod
    def of(cls, asked: Question | GivenTurns, **options: Any) -> Question:
        """Make a question from a text, from turns, or from another question.

        Args:
            **options: the other attributes by name, and single fields of `Sampling`, such as
                ``max_new_tokens=8, temperature=0``. An attribute that is None changes nothing.

        Raises:
            UsageError: an empty question, something that is no turn, or an unknown option.
        """
        question = asked if isinstance(asked, Question) else cls(read_turns(asked))
        settings = [setting.name for setting in fields(Sampling)]
        others = [attribute.name for attribute in fields(cls) if attribute.name not in ("turns", "tokens")]
        known = (*others, *settings)
        if unknown := [name for name in options if name not in known]:
            raise UsageError(f"there is no option {unknown[0]!r} of a question; there are {', '.join(known)}")
        given = {name: options[name] for name in others if options.get(name) is not None}
        if given.get("adapter", question.adapter) != question.adapter:
            given["tokens"] = None  # another adapter may have another text format
        question = replace(question, **given)
        chosen = {name: options[name] for name in settings if name in options}
        return replace(question, sampling=replace(question.sampling, **chosen))


def read_turns(given: GivenTurns) -> list[Turn]:
    """Turns from any of the forms of `GivenTurns`.

    Raises:
        UsageError: an empty question, or something that is no turn.
    """
    if isinstance(given, str):
        return [question_turn(given)]
    turns = [_turn(turn) for turn in ([given] if isinstance(given, (Turn, Mapping)) else given)]
    if turns:
        question_turn(turns[-1].text)
    return turns


def _turn(turn: Turn | Mapping[str, Any]) -> Turn:
    """Make a turn. If a dictionary's content is a list, its texts are used."""
    if isinstance(turn, Turn):
        return turn
    if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
        raise UsageError(f"a turn is {turn!r:.80}; expected a Turn, or a dictionary with role and content")
    content = turn["content"]
    if isinstance(content, (list, tuple)):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise UsageError(f"a turn's content has a part of type {other[0]!r}; give pictures with image=")
        content = "\n".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise UsageError(f"a turn's content is {content!r:.80}; expected text")
    return Turn(str(turn["role"]), content)


@dataclass(frozen=True, eq=False)
class Request:
    """A question that is ready to be answered; `LlamaAdapter.prepare_request` makes it.

    Attributes:
        tokens: (1, T) token ids.
        adapter: the adapter's name, or a state that `LlamaAdapter.project` computed.
        features: (I, F), of its pictures. None: no picture.
        sampling: how tokens are chosen, and how many at most.
        end_ids: tokens that end the answer.
        stop_strings: texts that end it.
    """

    tokens: Tensor
    adapter: str | AdapterState
    features: Tensor | None
    sampling: Sampling
    end_ids: Collection[int]
    stop_strings: Sequence[str]
