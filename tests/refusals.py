"""What a user reads when something is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError


def refusal(action: Callable[[], Any]) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(UsageError) as error:
        action()
    message = str(error.value)
    assert message and "\n" not in message
    return message
