"""How the page's events are run: beside each other, at once, or in the queue for the model."""

from __future__ import annotations

from typing import Any

# On no list of endpoints.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# Not in the queue either.
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
# In the queue, or there would be no warnings, but next to whatever else is there.
TAKING: dict[str, Any] = {**PRIVATE, "concurrency_limit": None, "show_progress": "hidden"}
# As many as are answered at once; the others see their place in the queue.
PEOPLE = 8
BY_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": PEOPLE}
# A question may be asked while an answer is made, so its event must not be dropped.
ANSWERING: dict[str, Any] = {**PRIVATE, **BY_MODEL, "trigger_mode": "multiple", "show_progress": "minimal"}
