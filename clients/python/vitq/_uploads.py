"""Checkpoints and data sets of this machine, in pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import grpc
from vitq._errors import Error, from_code
from vitq.v1 import upload_pb2 as upload

# Size of a message in bytes.
CHUNK = 1 << 20
# Broken streams in a row without progress after which an upload ends, and the pause in seconds
# before each is continued.
ATTEMPTS = 5
PAUSE = 1.0

_IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Load:
    """What is brought: a file, or images one by one."""

    header: upload.UploadHeader
    file: Path | None
    images: tuple[Path, ...] = ()

    def asked(self) -> upload.GetUploadRequest:
        return upload.GetUploadRequest(kind=self.header.kind, name=self.header.name)

    def offset(self, found: upload.Upload) -> int:
        """What the server has of exactly this."""
        if (found.sha256, found.images) != (self.header.sha256, self.header.images):
            return 0
        return found.received_bytes if self.file else found.received_images

    def parts(self, offset: int) -> Iterator[upload.UploadRequest]:
        """The header and all behind the offset."""
        header = upload.UploadHeader()
        header.CopyFrom(self.header)
        header.offset = offset
        yield upload.UploadRequest(header=header)
        if self.file is None:
            for path in self.images[offset:]:
                image = upload.UploadImage(name=_label(path), content=path.read_bytes())
                yield upload.UploadRequest(image=image)
            return
        with self.file.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield upload.UploadRequest(chunk=chunk)


class Upload:
    """Where an upload stands, without input or output of its own."""

    def __init__(self, load: Load) -> None:
        self.found = upload.Upload()
        self._load = load
        self._offset = 0
        self._failures = 0

    def is_whole(self, found: upload.Upload) -> bool:
        """Takes note of what the server has."""
        offset = self._load.offset(found)
        if offset > self._offset:
            self._failures = 0
        self._offset, self.found = offset, found
        return found.complete and offset > 0

    def parts(self) -> Iterator[upload.UploadRequest]:
        return self._load.parts(self._offset)

    def end(self, answer: upload.Upload) -> upload.Upload:
        """The answer of a stream that did not break."""
        if not answer.complete:
            raise from_code(grpc.StatusCode.ABORTED, "the file changed while it was uploaded")
        return answer

    def resume(self, error: Error) -> float:
        """Seconds after which to go on. Raises the error where that is of no use."""
        self._failures += 1
        if not error.is_broken_connection or self._failures == ATTEMPTS:
            raise error
        return max(PAUSE * self._failures, error.retry_after or 0)


def checkpoint(folder: str | PathLike[str], name: str | None) -> Load:
    """A folder with config.json and model.safetensors."""
    folder = Path(folder)
    config = (folder / "config.json").read_text()
    kind = upload.UPLOAD_KIND_CHECKPOINT
    return _file(kind, name or folder.resolve().name, folder / "model.safetensors", config)


def dataset(path: str | PathLike[str], name: str | None) -> Load:
    """A folder of class folders, or a tar file of one."""
    path = Path(path)
    kind = upload.UPLOAD_KIND_DATASET
    if path.is_file():
        return _file(kind, name or path.resolve().stem, path)
    if (path / "classes.txt").exists():
        raise ValueError(f"{path} has a classes.txt: put it into a tar file with its class folders")
    images = tuple(sorted(file for file in path.glob("*/*") if file.suffix.lower() in _IMAGES))
    if not images:
        raise ValueError(f"{path} has no class folders with JPEG, PNG or WebP files")
    header = upload.UploadHeader(kind=kind, name=name or path.resolve().name, images=len(images))
    return Load(header, None, images)


def _file(kind: upload.UploadKind, name: str, path: Path, config: str = "") -> Load:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    header = upload.UploadHeader(
        kind=kind,
        name=name,
        config=config,
        bytes=path.stat().st_size,
        sha256=digest.hexdigest(),
    )
    return Load(header, path)


def _label(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
