"""Images in whatever form the caller has them, as the bytes of a file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vitq.v1 import inference_pb2 as inference

if TYPE_CHECKING:
    import numpy
    import PIL.Image

    ImageLike: TypeAlias = (
        str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image | numpy.ndarray
    )


def encode_all(images: Iterable[ImageLike]) -> list[inference.Image]:
    """JPEG, PNG and WebP files as they are; pixels as PNG files, which lose nothing."""
    if isinstance(images, (str, bytes, os.PathLike)):
        raise TypeError("images must be a list: [image] for a single one")
    return [inference.Image(content=_encode(image)) for image in images]


def _encode(image: Any) -> bytes:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    try:
        import PIL.Image
    except ImportError:
        raise TypeError(
            f"{type(image).__name__} needs Pillow: pip install 'vitq[images]'"
        ) from None
    if not isinstance(image, PIL.Image.Image):
        if getattr(image, "dtype", None) != "uint8":
            raise TypeError(
                f"expected a path, bytes, a PIL image or an array of uint8 [h, w, 3] or [h, w], "
                f"not {type(image).__name__} of {getattr(image, 'dtype', 'no dtype')}"
            )
        image = PIL.Image.fromarray(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
