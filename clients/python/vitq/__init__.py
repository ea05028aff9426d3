"""Client of vitq, which quantizes vision transformers on a server and classifies with them."""

from vitq import aio
from vitq._answers import Answer, Label, Prediction, Timings
from vitq._errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from vitq.client import Client

__all__ = [
    "AlreadyExists",
    "Answer",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Error",
    "FailedPrecondition",
    "FieldViolation",
    "InvalidArgument",
    "Label",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "Prediction",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "aio",
]
