"""The site builds without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
from sphinx.cmd.build import build_main

from tests.conftest import CHECKOUT


def test_the_site_builds_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-q", "-W", "--keep-going", "-d", str(tmp_path / "cache")]
    code = build_main([*options, str(CHECKOUT / "docs"), str(tmp_path / "site")])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "site" / "reference.html").read_text(encoding="utf-8").count("LlamaAdapter") > 5
