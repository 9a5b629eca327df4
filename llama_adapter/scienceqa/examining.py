"""Let a model answer ScienceQA's problems: by generating text, or by the likelihood of each choice.

Results can be written to a file as they come, in the official layout. A later call continues from that file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.answering.records_answered import answer_likelihoods, answer_records
from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import write_json
from llama_adapter.data.records import PictureFile
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.scienceqa.grading import UNREAD, official_results, read_answer
from llama_adapter.scienceqa.problem_texts import DEFAULT_FORMAT, answer_text, problem_records
from llama_adapter.scienceqa.problems import Problem, rotate_choices

WAYS = ("generate", "letter", "option")
KEPT_EVERY = 64  # problems between two writes of the results


def trained_on_scienceqa(model: LlamaAdapter, adapter: str) -> bool:
    """Whether train.scienceqa made the adapter. False for the bare base."""
    return adapter != NO_ADAPTER and model.get_adapter(adapter).config.scienceqa is not None


def best_way(right: Mapping[str, float]) -> str:
    """The way with the highest share of right answers.

    Among equals it is one by likelihood if there is one: its mean over rotations may be better still.
    """
    return max(right, key=lambda way: (right[way], way != "generate"))


@dataclass(frozen=True)
class Examination:
    """How problems are asked and answers are read.

    Attributes:
        way: "generate" generates text and finds the answer in it with the official regular expression.
            "letter" takes the letter whose "The answer is X." is most likely, "option" the choice whose own
            text is most likely.
        format: an official name, such as QCM-A. The part after "-" matters only for "generate".
        caption: add a machine's caption of the picture to the context.
        rotations: ask with each rotation of the choices, and take the mean of their probabilities, so that a
            preference for a place cancels out (Zheng et al. 2024, arXiv 2309.03882). It takes as many times
            the work as there are choices, and is not for "generate".
    """

    way: str = "letter"
    format: str = DEFAULT_FORMAT
    caption: bool = False
    rotations: bool = False

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UsageError(f"no way to answer {self.way!r}; expected one of {', '.join(WAYS)}")
        if self.rotations and self.way == "generate":
            raise UsageError("a generated answer has no mean over rotations; answer by letter or by option")

    @classmethod
    def best_for(cls, model: LlamaAdapter, adapter: str | None = None) -> Examination:
        """The way and format that train.scienceqa recorded with an adapter, as the best on validation.

        The defaults for the bare base, and for an adapter that was trained on something else.
        """
        name = model.answering_adapter(adapter, pictured=True)
        learnt = None if name == NO_ADAPTER else model.get_adapter(name).config.scienceqa
        if learnt is None:
            return cls()
        return cls(learnt.answer or cls.way, learnt.format, learnt.caption, learnt.rotations)

    def answer(
        self,
        model: LlamaAdapter,
        problems: Sequence[Problem],
        *,
        features: Mapping[PictureFile, Tensor] | None = None,
        adapter: str | None = None,
        batch_size: int = 16,
    ) -> dict[str, tuple[int, str]]:
        """The index of the chosen choice (or `UNREAD`) for each pid, and the text of each answer.

        A picture that has no entry in ``features`` is left out.

        Args:
            features: (F,) for each picture. None leaves out all pictures.
            batch_size: how many problems are answered at once. It does not change the answers.
        """
        if self.way == "generate":
            records = problem_records(
                problems, self.format, caption=self.caption, images=features is not None
            )
            # Enough tokens: few for a letter, more for an option, most for a lecture before the answer.
            wanted = self.format.partition("-")[2]
            longest = 16 if wanted.startswith("A") else 64 if wanted == "O" else 512
            said = answer_records(
                model,
                records,
                features=features,
                adapter=adapter,
                max_new_tokens=longest,
                batch_size=batch_size,
            )
            return {p.pid: (_read(text, p), text) for p, text in zip(problems, said, strict=True)}
        found = self.likelihoods(model, problems, features=features, adapter=adapter, batch_size=batch_size)
        chosen = {}
        for problem, likelihoods in zip(problems, found, strict=True):
            best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
            chosen[problem.pid] = (best, self._texts(problem)[best])
        return chosen

    def likelihoods(
        self,
        model: LlamaAdapter,
        problems: Sequence[Problem],
        *,
        features: Mapping[PictureFile, Tensor] | None = None,
        adapter: str | None = None,
        batch_size: int = 16,
    ) -> list[list[float]]:
        """The log-probability of each choice of each problem, by its letter or its text. See `answer`.

        With `rotations` they are the logarithms of mean probabilities, which add up to 1.
        """
        if self.rotations:
            found = self.rotated_shares(
                model, problems, features=features, adapter=adapter, batch_size=batch_size
            )
            return [torch.tensor(shares).mean(0).log().tolist() for shares in found]
        records = problem_records(problems, self.format, caption=self.caption, images=features is not None)
        texts = [self._texts(problem) for problem in problems]
        return answer_likelihoods(
            model, records, texts, features=features, adapter=adapter, max_tokens=128 * batch_size
        )

    def rotated_shares(
        self,
        model: LlamaAdapter,
        problems: Sequence[Problem],
        *,
        features: Mapping[PictureFile, Tensor] | None = None,
        adapter: str | None = None,
        batch_size: int = 16,
    ) -> list[list[list[float]]]:
        """For each problem, and each rotation of its choices, the probability of each choice. See `answer`.

        The first rotation is the choices as they are. Whatever the rotation, the probabilities are in the
        order of the problem's own choices, and add up to 1.
        """
        rotated = [rotate_choices(p, places) for p in problems for places in range(len(p.choices))]
        found = iter(
            replace(self, rotations=False).likelihoods(
                model, rotated, features=features, adapter=adapter, batch_size=batch_size
            )
        )
        shares = []
        for problem in problems:
            count = len(problem.choices)
            own = [torch.tensor(next(found), dtype=torch.double).softmax(0) for _ in range(count)]
            shares.append([share.roll(places).tolist() for places, share in enumerate(own)])
        return shares

    def _texts(self, problem: Problem) -> list[str]:
        """The answers whose likelihoods are compared, one for each choice."""
        wanted = f"{self.format.partition('-')[0]}-{'O' if self.way == 'option' else 'A'}"
        return [answer_text(problem, wanted, choice=number) for number in range(len(problem.choices))]


def _read(text: str, problem: Problem) -> int:
    found = read_answer(text, len(problem.choices))
    if found == UNREAD and text.strip() in problem.choices:  # an adapter may have learnt to answer so
        return problem.choices.index(text.strip())
    return found


def examine(
    model: LlamaAdapter,
    problems: Sequence[Problem],
    examination: Examination,
    *,
    features: Mapping[PictureFile, Tensor] | None = None,
    adapter: str | None = None,
    batch_size: int = 16,
    output: Path | None = None,
    made_from: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, int], dict[str, str]]:
    """Predictions and generated texts for each pid, continuing from what ``output`` already holds.

    Args:
        output: a results file, updated as results come. None writes no file.
        made_from: identifies adapter, data and settings. A file is continued only if it was made from the
            same.

    Raises:
        UsageError: ``output`` is no results file, or was made from something else.
    """
    made_from = dict(
        made_from or {}, way=examination.way, format=examination.format, caption=examination.caption
    )
    if examination.rotations:
        made_from["rotations"] = True
    results, outputs = _take_up(output, made_from, problems)
    left = [problem for problem in problems if problem.pid not in results]
    # Problems of about equal length together, among those written at once.
    for start in range(0, len(left), KEPT_EVERY):
        progress(len(results))
        some = left[start : start + KEPT_EVERY]
        answers = examination.answer(model, some, features=features, adapter=adapter, batch_size=batch_size)
        results |= {pid: prediction for pid, (prediction, _) in answers.items()}
        outputs |= {pid: text for pid, (_, text) in answers.items()}
        if output is not None:
            done = [problem for problem in problems if problem.pid in results]
            write_json(output, {**official_results(done, results, outputs), "args": made_from})
    progress(len(results))
    return results, outputs


def _take_up(
    output: Path | None, made_from: dict[str, Any], problems: Sequence[Problem]
) -> tuple[dict[str, int], dict[str, str]]:
    if output is None or not output.exists():
        return {}, {}
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        results, outputs, before = found["results"], found["outputs"], found["args"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{output} exists and is no results file; choose another --output") from None
    other = [name for name in {**made_from, **before} if before.get(name) != made_from.get(name)]
    if other or not set(results) <= {problem.pid for problem in problems}:
        what = f"another {other[0]}" if other else "other problems"
        raise UsageError(f"{output} has results of {what}; choose another --output, or remove it")
    return results, outputs
