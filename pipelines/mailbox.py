"""An actor through which a training worker tells the driver how far it is, and the driver asks it to stop."""

from __future__ import annotations

from typing import Any


class Mailbox:
    """Holds events until the driver takes them. To be made into a Ray actor by the driver."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False
        self._failure: tuple[str, str, str, str | None] | None = None

    def put(self, event: dict[str, Any]) -> bool:
        """Add an event; whether the run is asked to stop."""
        self._events.append(event)
        return self._stop

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def fail(self, kind: str, message: str, code: str, hint: str | None) -> None:
        """Note an error that another attempt would meet again; the first one counts."""
        self._failure = self._failure or (kind, message, code, hint)

    def failure(self) -> tuple[str, str, str, str | None] | None:
        """What `fail` was given: name of the class, message, code, hint."""
        return self._failure

    def ask_to_stop(self) -> None:
        """Let the next `put` answer True."""
        self._stop = True
