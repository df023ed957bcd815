"""SIGINT and SIGTERM stop a command, at once or when its state can be saved.

Terminals send SIGINT (Ctrl-C), batch systems SIGTERM some seconds before SIGKILL. Either one raises
a KeyboardInterrupt. Code that can save its state delays it and asks for the signal when ready, see
``held``. All files are written whole or not at all, so neither way leaves a half-written file.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
# A terminal signals all processes, and torchrun passes its signal on: one request arrives twice.
_SAME_WISH = 2.0  # seconds


class _Signals:
    """The first signal since ``caught`` began, and whether some code will ask for it (``held``)."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._at = 0.0
        self._held = 0

    def start(self) -> None:
        self.first, self._held = None, 0

    def arrive(self, number: int, _: Any) -> None:
        again = self.first is not None
        if not again:
            self.first, self._at = number, time.monotonic()
        if again and time.monotonic() - self._at < _SAME_WISH:
            return
        if self._held and not (again and number == signal.SIGINT):
            return  # only a second Ctrl-C does not wait
        raise KeyboardInterrupt

    def asked(self) -> bool:
        return self.first is not None

    @contextmanager
    def holding(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1


_SIGNALS = _Signals()


@contextmanager
def caught() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT raise a KeyboardInterrupt; an ignored one stays ignored.

    Only the main thread of a process receives signals; in other threads nothing changes.
    """
    _SIGNALS.start()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _SIGNALS.arrive) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored(number: int) -> Iterator[None]:
    """Within the block a signal is ignored, also by the processes that are started, for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Within the block, a signal only makes the yielded function return True.

    At the end of the block the signal raises a KeyboardInterrupt. A second SIGINT, some seconds
    after the first, raises one at once.
    """
    with _SIGNALS.holding():
        yield _SIGNALS.asked
    if _SIGNALS.asked():
        raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The signal that stopped the command, None if none did."""
    return None if _SIGNALS.first is None else signal.Signals(_SIGNALS.first)
