"""How the page's events run: several at once, immediately, or in the queue for the model."""

from __future__ import annotations

from typing import Any

# Not listed among the endpoints.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# Also not in the queue.
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
# In the queue, since warnings need it, but beside all other events.
TAKING: dict[str, Any] = {**PRIVATE, "concurrency_limit": None, "show_progress": "hidden"}
# As many at once as are answered together. The others see their place in the queue.
PEOPLE = 8
BY_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": PEOPLE}
# A question may be asked while an answer is being made, so its event must not be dropped.
ANSWERING: dict[str, Any] = {**PRIVATE, **BY_MODEL, "trigger_mode": "multiple", "show_progress": "minimal"}
