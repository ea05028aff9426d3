"""What Classify answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from vitq._errors import Error, from_status
from vitq.v1 import inference_pb2 as inference


@dataclass(frozen=True)
class Label:
    """A class and its score; `probability` is from 0 to 1."""

    index: int
    name: str
    probability: float
    logit: float


@dataclass(frozen=True)
class Prediction:
    """The outcome for one image: labels, the most probable one first, or an error."""

    labels: tuple[Label, ...]
    error: Error | None = None
    cached: bool = False

    @property
    def best(self) -> Label:
        """The most probable label; raises the image's error if it has one."""
        if self.error is not None:
            raise self.error
        return self.labels[0]


@dataclass(frozen=True)
class Timings:
    """Where the time of a call went, in seconds."""

    queue: float
    decode: float
    compute: float
    total: float


@dataclass(frozen=True)
class Answer(Sequence[Prediction]):
    """A prediction for each image, in their order, and which model gave them."""

    predictions: tuple[Prediction, ...]
    model: str
    model_version: str
    batch_size: int
    timings: Timings

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | Sequence[Prediction]:
        return self.predictions[index]

    def __len__(self) -> int:
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)


def answer(response: inference.ClassifyResponse) -> Answer:
    times = response.timings
    seconds = (
        part.ToTimedelta().total_seconds()
        for part in (times.queue, times.decode, times.compute, times.total)
    )
    return Answer(
        predictions=tuple(_prediction(item) for item in response.items),
        model=response.model,
        model_version=response.model_version,
        batch_size=response.batch_size,
        timings=Timings(*seconds),
    )


def outcome(response: inference.ClassifyStreamResponse) -> Answer | Error:
    """Of one request of a stream."""
    if response.WhichOneof("outcome") == "error":
        return from_status(response.error)
    return answer(response.response)


def _prediction(item: inference.ClassifyItem) -> Prediction:
    if item.WhichOneof("outcome") == "error":
        return Prediction((), from_status(item.error))
    labels = tuple(
        Label(label.index, label.label, label.probability, label.logit)
        for label in item.result.labels
    )
    return Prediction(labels, cached=item.cached)
