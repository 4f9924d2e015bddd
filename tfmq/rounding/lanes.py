"""A forward pass that can be halted in the middle: it runs in a thread of its own, one at a time.

Reconstruction goes through a network once, from front to back, and works on one place at a time with all samples. A
pass that waits there keeps exactly what the rest of the network still needs (residual stream, skip connections); to
start it anew for every unit would cost as many passes as there are units.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import torch


class _Abandoned(BaseException):
    """Unwinds a lane that nobody will advance any more; no `except Exception` of a model swallows it."""


class Lane:
    """A forward pass. `advance` runs it to its next stop, `close` ends it wherever it is."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._error: BaseException | None = None
        self.place: str | None = None  # where it waits; None before the start and after the end
        self.done = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._main), name="tfmq lane", daemon=True)

    def advance(self) -> str | None:
        """Run to the next stop and tell its name, None at the end. An error inside is raised here."""
        if self.done:
            return None
        if self._thread.ident is None:
            self._thread.start()
        self.place = None
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.place

    def stop(self, place: str) -> None:
        """Called from inside the lane: wait here until the next `advance`."""
        self.place = place
        self._halted.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def close(self) -> None:
        """End the lane; what it holds is freed. Does nothing to one that has ended or never began."""
        if self._thread.ident is not None and self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()
        self.done = True

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():
                    self._work()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again in `advance`
            self._error = error
        finally:
            self.done, self.place = True, None
            del self._work
            self._halted.release()
