"""Images on the wire: PNG files, or the bare bytes of uint8 RGB arrays. Sizes are known before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from crd.errors import CRDError

Encoding = Literal["raw", "png"]
ENCODINGS: tuple[Encoding, ...] = ("raw", "png")

# A PNG begins with its signature and the chunk IHDR: width, height, bit depth, color type, then three more bytes.
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_IHDR = struct.Struct(">IIBB")
_RGB_8 = (8, 2)  # bit depth and color type
# What Pillow raises for files that are cut off or damaged in some place.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class WireImage:
    """One image as it was sent; `height` and `width`, px, are those that its first bytes or its shape tell."""

    encoding: Encoding
    data: bytes
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def entry(self) -> dict[str, Any]:
        """What a header says about it."""
        if self.encoding == "png":
            return {"encoding": "png", "bytes": len(self.data)}
        return {"encoding": "raw", "bytes": len(self.data), "shape": [self.height, self.width, 3], "dtype": "uint8"}

    def decode(self) -> Image.Image:
        """The image, RGB.

        Raises:
            CRDError: a damaged PNG, or one that is not what its first bytes say.
        """
        size = (self.width, self.height)
        if self.encoding == "raw":
            return Image.frombytes("RGB", size, self.data)
        try:
            image = Image.open(io.BytesIO(self.data), formats=["PNG"])
            # Before anything is decoded: a later header may tell of a size that no limit has seen.
            if (image.mode, image.size) != ("RGB", size):
                raise CRDError(f"PNG of {size[0]} x {size[1]} px, RGB, is of {image.size}, {image.mode}, in a later "
                               "header; send one image")  # fmt: skip
            image.load()
        except _DAMAGED as error:
            raise CRDError(f"damaged PNG: {type(error).__name__}: {error}; send the file whole") from error
        return image


def encode(image: Image.Image, encoding: Encoding) -> WireImage:
    """An image for the wire, without loss.

    Raises:
        CRDError: it is not RGB.
    """
    if image.mode != "RGB":
        raise CRDError(f'images for a reward server must be RGB, got {image.mode}; use image.convert("RGB")')
    if encoding == "raw":
        data = image.tobytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    return WireImage(encoding, data, image.height, image.width)


def byte_count(entry: Any) -> int:
    """How many bytes of a body an entry of its header says are its own.

    Raises:
        CRDError: it does not say.
    """
    count = entry.get("bytes") if isinstance(entry, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise CRDError(f"an image needs `bytes`, a whole number of at least 1, got {entry!r:.100}")
    return count


def received(entry: dict[str, Any], data: bytes) -> WireImage:
    """The image that an entry of a header and its own bytes of the body make; nothing is decoded.

    Raises:
        CRDError: an unknown encoding, key or type, a shape that the bytes do not have, or bytes that are no RGB PNG.
    """
    encoding = entry.get("encoding")
    if encoding == "png":
        _check_keys(entry, {"encoding", "bytes"})
        height, width = _png_size(data)
        return WireImage("png", data, height, width)
    if encoding != "raw":
        raise CRDError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r:.40}")
    _check_keys(entry, {"encoding", "bytes", "shape", "dtype"})
    shape = entry["shape"]
    if entry["dtype"] != "uint8":
        raise CRDError(f"dtype of raw images must be uint8, got {entry['dtype']!r:.40}; convert them")
    whole = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not whole or len(shape) != 3 or shape[2] != 3:
        raise CRDError(f"shape of raw images must be [height, width, 3], got {shape!r:.60}; send RGB arrays")
    if shape[0] * shape[1] * 3 != len(data):
        raise CRDError(f"a raw image of shape {shape} has {shape[0] * shape[1] * 3} bytes, got {len(data)}")
    return WireImage("raw", data, shape[0], shape[1])


def _check_keys(entry: dict[str, Any], keys: set[str]) -> None:
    if set(entry) != keys:
        raise CRDError(
            f"a {entry['encoding']} image needs the keys {', '.join(sorted(keys))}, got {sorted(entry)!r:.100}"
        )


def _png_size(data: bytes) -> tuple[int, int]:
    """Height and width, px, from the first bytes of an 8-bit RGB PNG."""
    if not data.startswith(_PNG_START) or len(data) < len(_PNG_START) + _IHDR.size:
        raise CRDError("an image of encoding png is no PNG file; send one, or raw arrays")
    width, height, *kind = _IHDR.unpack_from(data, len(_PNG_START))
    if tuple(kind) != _RGB_8:
        raise CRDError(f"PNG files must be 8-bit RGB, got bit depth {kind[0]}, color type {kind[1]}; convert the image")
    if not width or not height:
        raise CRDError(f"a PNG must have pixels, got {width} x {height}")
    return height, width
