"""Finds code in a text that is not fenced, line by line, so that the page can show it as code.

Without a fence, Markdown loses the indentation of such lines and their `*` and `_`. A small model often
forgets the fence, and people paste code as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")

# Patterns that no sentence matches, by language.
_STATEMENTS = {
    "python": (
        r"(async )?def \w+\(.*\)( ->.+)?:",
        r"class \w+(\(.*\))?:",
        r"from [\w.]+ import [\w*, ()]+",
        r"import \w+(\.\w+)*( as \w+)?(, \w+)*",
        r"(async )?for \w+(, \w+)* in .+:",
        r"(if|elif|while) .*(==|!=|<|>|\bnot\b|\bin\b|\bis\b|\(|True).*:",
        r"with .+\(.*\)( as \w+)?:",
        r"(else|try|finally|except( \w+)?( as \w+)?):",
        r"print\(.*\)",
        r"@\w+(\.\w+)*(\(.*\))?",
        r"return [\w.]+\(.*\)",
    ),
    "c": (
        r"#include\s*[<\"].+[>\"]",
        r"((public|private|protected|static|unsigned|const) )*(int|void|char|float|double|bool|long|String)"
        r"[*&\[\]]* [\w*&:]+(\[.*\])?(\(.*\)\s*[;{]?|( = .+)?;)",
        r"(public|private|protected|abstract)( \w+)* (class|interface|enum) \w+.*",
    ),
    "javascript": (
        r"(async )?function\s*\w*\(.*\)\s*\{?",
        r"(const|let|var) \w+ = .+",
        r"(export|import) .+ from ['\"].+['\"];?",
        r"console\.\w+\(.*\);?",
    ),
    "sql": (
        r"SELECT\s.+\sFROM\s.+",
        r"(INSERT INTO|CREATE TABLE|DELETE FROM|ALTER TABLE|DROP TABLE)\s\w+.*",
        r"UPDATE \w+ SET .+",
    ),
    "bash": (r"#!/\S+", r"\$ \w.+", r"(sudo|pip|npm|git|apt-get) (install|clone|add|commit|push|update)\b.*"),
    "html": (r"<!DOCTYPE html>", r"</?[a-zA-Z]\w*( [\w-]+=\"[^\"]*\")*\s*/?>.*"),
    "": (r".+\)\s*\{", r"[\w.\[\]]+(\(.*\)| [-+*/]?= .+);", r"\} ?else ?\{"),
}
# Patterns that a sentence or a list might match too. They count as code only next to the lines above.
_CONTINUATIONS = (
    r"[\w.\[\]'\"]+(, [\w.\[\]]+)* [-+*/|&]?= .+",
    r"(return|break|continue|pass|raise|yield|assert|del|global)\b.*",
    r"(FROM|WHERE|GROUP BY|ORDER BY|HAVING|LIMIT|VALUES|SET|(LEFT |INNER |RIGHT )?JOIN)\b.*",
    r"[\w.]+\(.*\);?( *#.*)?",
    r"(#|//|/\*|\*/|--) ?.*",
    r"[\]\[{}()]+[;,]?",
    r"(\"\"\"|''').*",
)
_MAX_LINE = 500  # characters. On a longer line a pattern may take very long.
_BY_LANGUAGE = {
    language: re.compile(rf"\s*(?:{'|'.join(patterns)})\s*(?:#.*|//.*)?")
    for language, patterns in _STATEMENTS.items()
}
_CONTINUATION = re.compile(rf"\s*(?:{'|'.join(_CONTINUATIONS)})\s*")


def fence_code(text: str, mark: str) -> str:
    """The text with a fence around each piece of code that has none. `unfence` reverses it.

    Args:
        mark: a character that occurs in no text. It distinguishes our fences from the writer's.
    """
    if "\n" not in text and not _language(text):
        return text
    lines = text.split("\n")
    fenced: list[str] = []
    at = 0
    for start, end in _stretches(lines):
        language = next(filter(None, map(_language, lines[start:end])), "").strip("?")
        fenced += [*lines[at:start], f"```{language} {mark}", *lines[start:end], "```"]
        at = end
    return "\n".join([*fenced, *lines[at:]])


def unfence(text: str, mark: str) -> str:
    """The text that `fence_code` was given."""
    return re.sub(rf"```\w* {mark}\n(.*?)\n```(?=\n|\Z)", r"\1", text, flags=re.DOTALL)


def _stretches(lines: list[str]) -> Iterator[tuple[int, int]]:
    """The first line of each piece of code outside of fences, and the line after its last."""
    fence = ""
    at = 0
    while at < len(lines):
        line = lines[at]
        if found := _FENCE.match(line):
            marks = found[1]
            if not fence:
                fence = marks
            elif marks.startswith(fence) and not line.strip(" `~"):
                fence = ""
            at += 1
            continue
        end = at if fence else _end(lines, at)
        if end > at:
            yield at, end
        at = max(end, at + 1)


def _end(lines: list[str], start: int) -> int:
    """The line after the piece of code that starts at a line. ``start`` if no code starts there."""
    if not (_language(lines[start]) or _continues(lines[start])):
        return start
    end, sure = start, False
    for number in range(start, len(lines)):
        line = lines[number]
        if not line.strip():
            continue  # it belongs to the code if more code follows
        if _FENCE.match(line):
            break
        statement = bool(_language(line))
        indented = line[0] in " \t" and number > start
        if not (statement or indented or _continues(line)):
            break
        # A comment after an empty line may be a heading, and an indented line may be a quotation.
        if number > end and not statement and not _belongs(lines, number, end):
            break
        # A line with a colon opens a block only if a block follows: "if you are in doubt:" may be prose.
        opens = line.rstrip().endswith(":")
        sure = sure or (statement and (not opens or _indent(lines, number + 1) > _indent(lines, number)))
        end = number + 1
    return end if sure else start


def _belongs(lines: list[str], number: int, end: int) -> bool:
    """Whether a line after an empty one still belongs to the code: more code follows at once, or an indented
    block continues."""
    if lines[number][0] in " \t" and lines[end - 1][:1] in (" ", "\t"):
        return True
    following = lines[number + 1] if number + 1 < len(lines) else ""
    return bool(_language(following)) or not lines[number].lstrip().startswith(("#", "-"))


def _indent(lines: list[str], number: int) -> int:
    """How far a line is indented; 0 after the last line."""
    line = lines[number] if number < len(lines) else ""
    return len(line) - len(line.lstrip())


def _continues(line: str) -> bool:
    return len(line) <= _MAX_LINE and bool(_CONTINUATION.fullmatch(line))


def _language(line: str) -> str:
    """The language that a line is a statement of: "?" for an unknown one, "" if it is no code."""
    if len(line) > _MAX_LINE:
        return ""
    return next((name or "?" for name, pattern in _BY_LANGUAGE.items() if pattern.fullmatch(line)), "")
