"""What a server refuses, with everything that it says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

import grpc

# Statuses of broken connections, if no details come with them.
_OF_CONNECTIONS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request, and what is wrong with it."""

    field: str
    description: str


class Error(Exception):
    """A call, a job or an image failed.

    `reason` is a constant like `QUEUE_FULL` and `metadata` its particulars; both are empty if the
    server was not reached. `retry_after` is in seconds, where trying again helps.
    """

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    violations: list[FieldViolation]
    retry_after: float | None
    request_id: str

    def __init__(self, status: Status) -> None:
        self.code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        self.message = status.message
        self.reason, self.request_id, self.retry_after = "", "", None
        self.metadata, self.violations = {}, []
        self._has_details = bool(status.details)
        for detail in status.details:
            self._read(detail)
        super().__init__(self._text())

    def _read(self, detail: Any) -> None:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad = error_details_pb2.BadRequest()
        request = error_details_pb2.RequestInfo()
        if detail.Unpack(info):
            self.reason, self.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            self.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(bad):
            self.violations = [
                FieldViolation(violation.field, violation.description)
                for violation in bad.field_violations
            ]
        elif detail.Unpack(request):
            self.request_id = request.request_id

    def _text(self) -> str:
        name = self.code.name
        text = f"{self.message} ({name}" + (
            f", {self.reason})" if self.reason not in ("", name) else ")"
        )
        for violation in self.violations:
            if violation.description in self.message:
                continue
            text += f"\n  {violation.field}: {violation.description}"
        if self.retry_after is not None:
            text += f"\n  try again in {self.retry_after:g} s"
        return text

    @property
    def is_broken_connection(self) -> bool:
        """Whether the connection, not the request, is the problem."""
        return self.code == grpc.StatusCode.UNAVAILABLE or (
            self.code in _OF_CONNECTIONS and not self._has_details
        )


class InvalidArgument(Error):
    """The request cannot be carried out as it is; see `violations`."""


class NotFound(Error):
    """There is no model, data set, checkpoint or job of that name."""


class AlreadyExists(Error):
    """The name is taken by something else."""


class FailedPrecondition(Error):
    """Not in this state."""


class Overloaded(Error):
    """A queue is full or a quota used up."""


class Unavailable(Error):
    """The server cannot be reached, or is stopping."""


class Unauthenticated(Error):
    """No credentials, or none that count."""


class PermissionDenied(Error):
    """The credentials are not for this."""


class DeadlineExceeded(Error):
    """The answer did not come in time."""


class Cancelled(Error):
    """Somebody cancelled the job or the call."""


_KINDS: dict[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_status(status: Status) -> Error:
    """The error of a google.rpc.Status."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _KINDS.get(code, Error)(status)


def from_code(code: grpc.StatusCode, message: str) -> Error:
    """An error that no server sent."""
    return from_status(Status(code=code.value[0], message=message))


def from_rpc(error: grpc.RpcError) -> Error:
    """The error of a failed call, blocking or not."""
    call: Any = error  # what is raised is the call, too
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details of another status: not our server's
        status = None
    return from_status(status) if status else from_code(call.code(), call.details() or "")
