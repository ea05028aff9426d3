"""Following a job through broken streams, without input or output of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
from vitq._errors import Error, from_code, from_status
from vitq.v1 import evaluation_pb2 as evaluation
from vitq.v1 import operation_pb2 as operation
from vitq.v1 import quantization_pb2 as quantization

# Broken streams in a row without an event after which following ends.
ATTEMPTS = 6
# Pause in seconds before a broken stream is continued, times the number of failures.
PAUSE = 0.5

Event: TypeAlias = quantization.QuantizeEvent | evaluation.EvaluateEvent
Progress: TypeAlias = bool | Callable[[operation.JobProgress], object]
Result = TypeVar("Result", quantization.QuantizeResult, evaluation.EvaluateResult)


class Job(Generic[Result]):
    """Where a job stands, by its events."""

    def __init__(self, result: type[Result], progress: Progress, name: str = "") -> None:
        self.name = name
        self.result: Result | None = None
        self._kind: type[Result] = result
        self._sequence = 0
        self._failures = 0
        self._bar = _Bar() if progress is True else None
        self._show = self._bar.show if self._bar else progress if callable(progress) else None

    def take(self, event: Event) -> bool:
        """Whether this was the last event. Raises the error of a job that failed."""
        self._failures = 0
        self.name = event.operation or self.name
        self._sequence = max(self._sequence, event.sequence)
        what = event.WhichOneof("event")
        if what == "error":
            raise from_status(event.error)
        if what == "result" and isinstance(event.result, self._kind):
            self.result = event.result
        if what == "progress" and self._show:
            step = event.progress
            self._show(step.progress if isinstance(step, evaluation.EvaluateProgress) else step)
        return self.result is not None

    def resume(self, error: Error | None) -> float:
        """Seconds after which the stream is worth continuing behind what was seen. Raises the error
        where it is not; none is a stream that ended early."""
        error = error or from_code(grpc.StatusCode.UNAVAILABLE, "the stream ended early")
        self._failures += 1
        passes = error.is_broken_connection or error.retry_after is not None
        if not passes or self._failures > ATTEMPTS:
            if self.name and hasattr(error, "add_note"):
                error.add_note(f"the job may go on: follow {self.name}")
            raise error
        return max(PAUSE * self._failures, error.retry_after or 0)

    def where(self) -> operation.WatchRequest:
        """Asks for the events behind those that were seen."""
        return operation.WatchRequest(name=self.name, after_sequence=self._sequence)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


class Start(Job[quantization.QuantizeResult]):
    """A job of which only the beginning is wanted."""

    def take(self, event: Event) -> bool:
        super().take(event)
        return True


class _Bar:
    """A tqdm bar for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def show(self, step: operation.JobProgress) -> None:
        from tqdm.auto import tqdm

        if self._bar is None or step.stage != self._stage:
            self.close()
            self._stage = step.stage
            known = (
                {"total": step.units, "unit": " units"} if step.units else {"bar_format": "{desc}"}
            )
            self._bar = tqdm(desc=step.stage, **known)
        self._bar.update(step.unit - self._bar.n)
        notes = {}
        if step.images_total:
            notes["images"] = f"{step.images}/{step.images_total}"
        if step.sites:
            notes["sqnr"] = f"{step.sites[-1].sqnr_db:.1f} dB"
        if step.HasField("loss"):
            notes["loss"] = f"{step.loss:.3e}"
        self._bar.set_postfix(notes)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
