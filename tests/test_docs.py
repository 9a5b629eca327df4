"""The site builds without a warning, and the Python in the documents imports what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sphinx.cmd.build import build_main

from tests.conftest import CHECKOUT

DOCUMENTS = sorted(
    [CHECKOUT / "README.md", *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("weights/*/README.md")]
)


def test_the_site_builds_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-q", "-W", "--keep-going", "-d", str(tmp_path / "cache")]
    code = build_main([*options, str(CHECKOUT / "docs"), str(tmp_path / "site")])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "site" / "reference.html").read_text(encoding="utf-8").count("LlamaAdapter") > 5


def test_the_python_in_the_documents_imports_what_is_there() -> None:
    imports = {
        line.strip()
        for document in DOCUMENTS
        for line in re.findall(
            r"^ *from llama_adapter\S* import .+$", document.read_text("utf-8"), re.MULTILINE
        )
    }
    assert len(imports) > 2
    for line in sorted(imports):
        exec(line, {})
