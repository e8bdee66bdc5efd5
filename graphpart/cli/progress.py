"""Progress of stages that may take long: a spinner on a terminal, lines elsewhere if asked for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE_S = 1.0
"""A stage shows nothing for so long, and leaves nothing behind if it was shorter."""

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_TICK_S = 0.1


class Progress:
    """Says on a stream what is being done.

    Args:
        wanted: True shows lines even where the stream is no terminal, False shows nothing, None asks the stream.
        stream: where to; standard error by default.
    """

    def __init__(self, wanted: bool | None = None, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty() and wanted is not False
        self.shown = self.is_terminal or bool(wanted)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show that something is being done, and for how long already."""
        start_s, stop = time.monotonic(), threading.Event()
        spinner = threading.Thread(target=self._spin, args=(text, start_s, stop), daemon=True)
        if self.is_terminal:
            spinner.start()
        elif self.shown:
            self._write(f"{text} …\n")
        try:
            yield
        finally:
            stop.set()
            if self.is_terminal:
                spinner.join()
        took_s = time.monotonic() - start_s
        if self.shown and (took_s >= PATIENCE_S or not self.is_terminal):
            self._write(f"{text}: {took_s:.1f} s\n")

    def _spin(self, text: str, start_s: float, stop: threading.Event) -> None:
        if stop.wait(PATIENCE_S):
            return
        tick = 0
        while not stop.wait(_TICK_S):
            self._write(f"\r{_FRAMES[tick % len(_FRAMES)]} {text} … {time.monotonic() - start_s:.0f} s\x1b[K")
            tick += 1
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
