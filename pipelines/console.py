"""What a person sees on stderr: short messages and one progress line. Results go to stdout, by the command itself."""

from __future__ import annotations

import sys
import threading
import time

_lock = threading.Lock()
_line_open = False


def say(message: str) -> None:
    """Print one line of information to stderr."""
    _print(message)


def warn(message: str) -> None:
    """Print one warning line to stderr."""
    _print(f"warning: {message}")


def duration(seconds: float) -> str:
    """`75` → `1m15s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def _print(text: str) -> None:
    global _line_open
    with _lock:
        if _line_open:
            sys.stderr.write("\n")
            _line_open = False
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Progress:
    """One progress line: rewritten in place on a terminal, printed every `period_s` seconds elsewhere.

    Args:
        label: what is under way.
        total: number of units; the line shows the share done and the time left.
        done: units done before the start (a resumed run).
    """

    def __init__(self, label: str, total: int, done: int = 0, period_s: float = 15.0) -> None:
        self.label, self.total, self.first = label, total, done
        self.started = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._next = 0.0
        self._period_s = 0.2 if self._tty else period_s

    def update(self, done: int, detail: str = "", force: bool = False) -> None:
        """Show `done` of `total` and `detail`; drawn at most every period unless `force`."""
        global _line_open
        now = time.monotonic()
        if not force and now < self._next:
            return
        self._next = now + self._period_s
        passed = now - self.started
        left = passed / max(done - self.first, 1) * (self.total - done) if done > self.first else None
        eta = "" if left is None else f"  {duration(left)} left"
        text = f"{self.label} {done}/{self.total}{'  ' + detail if detail else ''}{eta}"
        if self._tty:
            with _lock:
                sys.stderr.write("\r\x1b[2K" + text[:200])
                sys.stderr.flush()
                _line_open = True
        else:
            _print(text)

    def close(self) -> None:
        """Leave the last line standing."""
        global _line_open
        with _lock:
            if _line_open:
                sys.stderr.write("\n")
                sys.stderr.flush()
                _line_open = False
