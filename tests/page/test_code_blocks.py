from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.page.code_blocks import fence_code, unfence
from llama_adapter.page.display import shown, typed

MARK = "\u2060"

PYTHON = """def mean(numbers):
    # of at least one
    total = 0
    for number in numbers:
        total += number

    return total / len(numbers)

print(mean([1, 2]))"""
C = """#include <stdio.h>

int main() {
    printf("hi");
    return 0;
}"""
JAVASCRIPT = """function add(a, b) {
  return a + b;
}"""
JAVA = """public class Main {
    public static void main(String[] args) {
        System.out.println("hi");
    }
}"""
SQL = """SELECT name FROM people
WHERE age > 30
ORDER BY name"""
HTML = """<ul>
  <li>One</li>
</ul>"""
CLASS = """class Point:
    def __init__(self, x):
        self.x = x

    def __repr__(self):
        return f"<{self.x}>\""""


@pytest.mark.parametrize(
    ("code", "language"),
    [
        (PYTHON, "python"),
        (CLASS, "python"),
        ('print("Hello")', "python"),
        (C, "c"),
        (JAVA, "c"),
        (JAVASCRIPT, "javascript"),
        ("const x = a * b * c;\nconsole.log(x);", "javascript"),
        (SQL, "sql"),
        (HTML, "html"),
        ("$ pip install torch", "bash"),
    ],
)
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("Here it is:\n\n", "\n\nIt works."), ("So:\n", "\nYes.")]
)
def test_code_without_a_fence_gets_one_around_it_and_nothing_else(
    code: str, language: str, before: str, after: str
) -> None:
    fenced = fence_code(before + code + after, MARK)
    assert fenced == f"{before}```{language} {MARK}\n{code}\n```{after}"
    assert unfence(fenced, MARK) == before + code + after


@pytest.mark.parametrize(
    "prose",
    [
        "The sky is blue.",
        "For example: do this.\n# Heading\nText",
        "1. One:\n   two lines\n2. Three",
        "Roses are red;\nviolets are blue;",
        "if you live in France:\nask there",
        "import taxes are high\nreturn the book to the library",
        "y = 2x + 3\nso x is 1",
        "I said <b>bold</b> (and meant it).",
        "A poem\n    with an indented line\nends",
        "with the following:\n- a\n- b",
        "int is a type (of number)",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "x" * 10_000 + "(" * 1000,
    ],
)
def test_prose_is_left_as_it_is(prose: str) -> None:
    assert fence_code(prose, MARK) == prose


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{PYTHON}\n```",
        f"~~~\n{PYTHON}\n~~~\nEnd.",
        f"````\n```\n{PYTHON}\n````",
        f"Cut off:\n```python\n{PYTHON}",
    ],
)
def test_code_with_a_fence_is_left_as_it_is(text: str) -> None:
    assert fence_code(text, MARK) == text


def test_code_after_a_fence_is_found() -> None:
    assert fence_code(f"```\nx\n```\n{JAVASCRIPT}", MARK).count("```") == 4


@given(
    st.lists(
        st.one_of(
            st.text(),
            st.sampled_from([*PYTHON.splitlines(), *C.splitlines(), "```", "~~~~", "", "```python", HTML]),
        )
    )
)
def test_what_is_shown_can_always_be_read_back(lines: list[str]) -> None:
    text = "\n".join(lines).replace(MARK, "")
    assert unfence(fence_code(text, MARK), MARK) == text
    assert typed(shown(text)) == text
