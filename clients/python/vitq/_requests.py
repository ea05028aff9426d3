"""Requests from keyword arguments, the same for both clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from vitq._arguments import only_known
from vitq._images import encode_all
from vitq.v1 import evaluation_pb2 as evaluation
from vitq.v1 import inference_pb2 as inference
from vitq.v1 import model_pb2 as model
from vitq.v1 import quantization_pb2 as quantization

if TYPE_CHECKING:
    from vitq._images import ImageLike

Bits: TypeAlias = int | Literal["float"]
Priority: TypeAlias = Literal["interactive", "bulk"]
# How requests write "float".
_FLOAT = 32

_STEM_HEAD = {
    "float": model.STEM_HEAD_FLOAT,
    "int8": model.STEM_HEAD_INT8,
    "same": model.STEM_HEAD_SAME,
}
_PRIORITY = {
    "interactive": inference.CLASSIFY_PRIORITY_INTERACTIVE,
    "bulk": inference.CLASSIFY_PRIORITY_BULK,
}


class QuantizeOptions(TypedDict, total=False):
    """What `quantize` takes beside checkpoint and method; `name`, bits and images must be there."""

    name: str  # id of the new model
    bits: Bits  # of weights and activations, 3 to 8
    weight_bits: Bits
    activation_bits: Bits
    role_bits: Mapping[str, Bits | tuple[Bits, Bits]]  # {"fc2": (4, "float"), "query_key": 8}
    stem_head: Literal["float", "int8", "same"]
    options: Mapping[str, object]  # of the method
    dataset: str  # calibration images: a data set of the server, ...
    count: int  # ... how many of it (32), ...
    files: Sequence[str]  # ... or exactly which ones,
    images: Iterable[ImageLike]  # or images of one's own
    seed: int
    labels: Mapping[str, str]
    load: bool  # on a device once it is stored
    priority: int  # -100 to 100, the largest first
    request_id: str  # equal ones start one job


class EvaluateOptions(TypedDict, total=False):
    """What `evaluate` takes beside model and data set."""

    limit: int  # images, drawn by the seed; 0: all
    seed: int
    priority: int
    request_id: str


def quantize(checkpoint: str, method: str, given: QuantizeOptions) -> quantization.QuantizeRequest:
    only_known(given, QuantizeOptions)
    if "name" not in given:
        raise TypeError("give name, the id of the new model")
    both = given.get("bits")
    if both is not None and ("weight_bits" in given or "activation_bits" in given):
        raise ValueError("give bits, or weight_bits and activation_bits, not both")
    weights, activations = given.get("weight_bits", both), given.get("activation_bits", both)
    if weights is None or activations is None:
        raise TypeError("give bits, or both weight_bits and activation_bits")
    if ("dataset" in given) == ("images" in given):
        raise TypeError("give either dataset or images to calibrate with")
    request = quantization.QuantizeRequest(
        checkpoint=checkpoint,
        method=method,
        options={key: _text(value) for key, value in given.get("options", {}).items()},
        weight_bits=_bits(weights),
        activation_bits=_bits(activations),
        stem_head=_STEM_HEAD[given.get("stem_head", "float")],
        seed=given.get("seed", 0),
        model_id=given["name"],
        labels=given.get("labels", {}),
        load_after=given.get("load", False),
        # A call that is repeated after a broken connection finds the first one's job.
        request_id=given.get("request_id") or str(uuid.uuid4()),
        role_bits=[_role(role, bits) for role, bits in given.get("role_bits", {}).items()],
        priority=given.get("priority", 0),
    )
    if "images" in given:
        request.images.images.extend(encode_all(given["images"]))
    else:
        files = given.get("files", ())
        request.dataset.name = given["dataset"]
        request.dataset.count = 0 if files else given.get("count", 32)
        request.dataset.files.extend(files)
    return request


def evaluate(model_id: str, dataset: str, given: EvaluateOptions) -> evaluation.EvaluateRequest:
    only_known(given, EvaluateOptions)
    return evaluation.EvaluateRequest(
        model=model_id,
        dataset=dataset,
        limit=given.get("limit", 0),
        seed=given.get("seed", 0),
        request_id=given.get("request_id") or str(uuid.uuid4()),
        priority=given.get("priority", 0),
    )


def classify(
    model_id: str, images: Iterable[ImageLike], top_k: int, priority: Priority
) -> inference.ClassifyRequest:
    return inference.ClassifyRequest(
        model=model_id, images=encode_all(images), top_k=top_k, priority=_PRIORITY[priority]
    )


def _role(role: str, bits: Bits | tuple[Bits, Bits]) -> model.RoleBits:
    if isinstance(bits, tuple):
        weights, activations = bits
        return model.RoleBits(
            role=role, weight_bits=_bits(weights), activation_bits=_bits(activations)
        )
    return model.RoleBits(role=role, activation_bits=_bits(bits))


def _bits(bits: Bits) -> int:
    return _FLOAT if bits == "float" else bits


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
