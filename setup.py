"""What pyproject.toml cannot say: a wheel carries the shipped adapters and the small CLIP."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = Path("weights")
CARD = "README.md"  # only what is shipped has one; fetched base models lie beside it


class BuildWithWeights(build_py):
    """Copies weights/NAME to llama_adapter/shipped/NAME, where an installed package looks for it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has its own weights/
            return
        for card in sorted(SHIPPED.glob(f"*/{CARD}")):
            target = Path(self.build_lib) / "llama_adapter" / "shipped" / card.parent.name
            shutil.copytree(card.parent, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithWeights})
