"""The sweep over all causal families of the installed transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers

from benchmarks.families import causal_families, examine, summary

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("family", "status", "reason"),
    [
        ("llama", "works", ""),
        ("phi3", "works", ""),
        ("gpt_oss", "works", "rows cannot be packed for this decoder: its attention uses s_aux"),
        ("bloom", "refused", "never received the prompts"),
        ("deepseek_v32", "refused", "takes 'indices'"),
        ("musicgen", "not_built", "AttributeError"),
    ],
)
def test_a_family_works_or_is_refused_or_cannot_be_built(family: str, status: str, reason: str) -> None:
    finding = examine(family)
    assert finding.status == status and reason in finding.reason
    results = summary({family: finding})
    assert results[status] == 1 and sum(results[key] for key in ("works", "refused", "not_built")) == 1
    assert json.loads(json.dumps(results))["families"][family]["status"] == status


@pytest.mark.slow
def test_as_many_families_work_as_the_readme_says_and_none_goes_wrong() -> None:
    said = re.search(r"(\d+) of (\d+) families .*transformers (\d+\.\d+)", README.read_text())
    assert said is not None
    if not transformers.__version__.startswith(said[3] + "."):
        pytest.skip(f"the README speaks of transformers {said[3]}")
    results = summary({family: examine(family) for family in causal_families()})
    assert results["wrong"] == 0
    assert (results["works"], len(results["families"])) == (int(said[1]), int(said[2]))
