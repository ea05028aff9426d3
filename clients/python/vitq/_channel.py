"""The connection: where the server is, whom it must be, who we are, and what is tried again."""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit

import grpc
from vitq._arguments import only_known
from vitq._errors import Error

DEFAULT_SERVER = "http://127.0.0.1:50051"
# Largest answer in bytes: a long list of models with their reports.
MAX_ANSWER = 64 << 20
# Pause before a call that the server refused for a time is repeated, at most.
MAX_PAUSE = 30.0

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


class ConnectionOptions(TypedDict, total=False):
    """Whom the server must be, and who we are."""

    token: str
    token_file: str | os.PathLike[str]
    tls_ca: str | os.PathLike[str]  # PEM file of the server's CAs; without one, gRPC's own
    tls_cert: str | os.PathLike[str]  # of this client
    tls_key: str | os.PathLike[str]
    tls_server_name: str  # in the server's certificate, if it is not the URL's host
    insecure: bool  # sends the token over plain http:// to another machine, too


class Connection:
    """How to reach a server. What is not given comes from the variables of `vitq`'s commands."""

    def __init__(self, server: str | None, options: ConnectionOptions) -> None:
        only_known(options, ConnectionOptions)
        self._given = options
        text = server or os.environ.get("VITQ_SERVER") or DEFAULT_SERVER
        self._url = urlsplit(text)
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"server {text!r}: expected http://HOST:PORT or https://HOST:PORT")
        self.metadata()  # an unusable token is told at once

    def target(self) -> str:
        """The server as gRPC writes it."""
        host, port = self._url.hostname or "", self._url.port
        if ":" in host:
            host = f"[{host}]"
        return f"dns:///{host}:{port or (443 if self._is_encrypted() else 80)}"

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plain http://."""
        if not self._is_encrypted():
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self._given.get("tls_ca") or os.environ.get("VITQ_TLS_CA")),
            private_key=_read(self._given.get("tls_key") or os.environ.get("VITQ_CLIENT_KEY")),
            certificate_chain=_read(
                self._given.get("tls_cert") or os.environ.get("VITQ_CLIENT_CERT")
            ),
        )

    def settings(self) -> list[tuple[str, str | int]]:
        """gRPC's own options."""
        settings: list[tuple[str, str | int]] = [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.enable_retries", 1),
            ("grpc.max_receive_message_length", MAX_ANSWER),
            ("grpc.max_send_message_length", -1),
            # Streams of jobs may be silent for long: pings keep routers from forgetting them.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.primary_user_agent", "vitq-python"),
        ]
        name = self._given.get("tls_server_name") or os.environ.get("VITQ_TLS_SERVER_NAME")
        if name:
            settings.append(("grpc.ssl_target_name_override", name))
        return settings

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The token. Its file is read for every call: tokens are renewed there."""
        token = self._token()
        if token is None:
            return ()
        insecure = self._given.get("insecure") or os.environ.get("VITQ_CLIENT_INSECURE") == "true"
        if not (self._is_encrypted() or insecure or self._is_local()):
            raise ValueError(
                "the token would cross the network in the clear: use https://, or insecure=True"
            )
        return (("authorization", f"Bearer {token.strip()}"),)

    def _token(self) -> str | None:
        if "token" in self._given:
            return self._given["token"]
        file = self._given.get("token_file")
        if file is None and "VITQ_TOKEN" in os.environ:
            return os.environ["VITQ_TOKEN"]
        file = file or os.environ.get("VITQ_TOKEN_FILE")
        return Path(file).read_text() if file else None

    def _is_encrypted(self) -> bool:
        return self._url.scheme == "https"

    def _is_local(self) -> bool:
        host = self._url.hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def pause(error: Error, attempt: int, left: float) -> float:
    """Seconds until a refused call is worth another attempt, if the server named a time.

    Raises the error otherwise. UNAVAILABLE without a time is gRPC's to repeat, by its service
    configuration.
    """
    seconds = error.retry_after
    if seconds is None or attempt >= 5 or min(left, MAX_PAUSE) <= seconds:
        raise error
    return seconds


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return Path(path).read_bytes() if path else None
