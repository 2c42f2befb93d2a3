"""The one thread that runs the engine, so that a slow client never holds up the model, nor the model the clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anarcho_model.generate.batching import Engine, NewToken, Request
    from anarcho_model.generate.sampling import SamplingConfig

STALLED_SECONDS = 120.0
"""A single step that takes longer than this is taken for a hang."""
IDLE_SECONDS = 0.5
"""How often the idle thread shows that it lives."""


class Worker:
    """Steps the engine while there is anything to do, and says whether it still can."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        """What ended the thread before its time."""
        self._beat = time.monotonic()
        self._work = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve what is submitted."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way; what is being generated then is cancelled."""
        self._stopping = True
        self._work.set()
        self._thread.join(timeout=10)

    def trouble(self) -> str | None:
        """Why nothing can be generated, or None while all is well."""
        if self.failure is not None:
            return f"the generating thread has failed: {type(self.failure).__name__}: {self.failure}"
        if not self._thread.is_alive():
            return "the generating thread is not running"
        silent = time.monotonic() - self._beat
        return f"the generating thread has been silent for {silent:.0f} s" if silent > STALLED_SECONDS else None

    def submit(
        self,
        prompt: Sequence[int],
        *,
        config: SamplingConfig,
        top_logprobs: int,
        on_token: Callable[[NewToken | None], None],
    ) -> Request:
        """As `Engine.submit`, from any thread; after a failure the callback is given None with `ended_by` unset."""
        request = self.engine.submit(prompt, config=config, top_logprobs=top_logprobs, on_token=on_token)
        self._work.set()
        # Both are set before the thread looks for the last time at what is waiting.
        if self.failure is not None or self._stopping:
            on_token(None)
        return request

    def _forget_cancelled(self) -> None:
        """Drop cancelled requests from the queue at once, or clients that come and go would fill it while all slots are taken."""
        waiting = self.engine.waiting
        for request in [request for request in tuple(waiting) if request.cancelled]:
            waiting.remove(request)
            request.ended_by = "cancelled"
            if request.on_token is not None:
                request.on_token(None)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._beat = time.monotonic()
                if self.engine.busy:
                    self._forget_cancelled()
                    self.engine.step()
                else:
                    self._work.wait(timeout=IDLE_SECONDS)
                    self._work.clear()
        except BaseException as error:
            self.failure = error
        finally:
            # Nobody may wait for a thread that is gone.
            for request in [*self.engine.waiting, *(slot.request for slot in self.engine.slots)]:
                if request is not None and request.on_token is not None:
                    request.on_token(None)
