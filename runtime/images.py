"""Pictures in and out: reading with every doubt settled, resizing, canny edges, writing; OpenCV, no Pillow."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

MIN_SIDE = 16
MAX_ASPECT = 8
MAX_PIXELS = 50_000_000
MAX_BYTES = 500_000_000  # of a file; what a PNG of 50 megapixels, 16 bits and transparency can take uncompressed

JPEG_QUALITY = 95

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # those with a length; not stuffing and fill
JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# OpenCV reads its own limit when it is loaded: for files whose header says less to us than to its decoders.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
import cv2  # noqa: E402


class ImageError(ValueError):
    """A picture that cannot be read, used or written; the text is one sentence that names it."""


class Header(NamedTuple):
    """What a picture's file says before it is decoded; `whole` is False where its end is missing."""

    width: int
    height: int
    orientation: int
    whole: bool


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a PNG, JPEG or WebP picture as (H, W, 3) uint8 RGB, upright.

    Grey and palette pictures become RGB, 16 bits a channel become 8, transparency is laid on white, and the EXIF
    orientation is applied. Raises ImageError where the file is missing, no picture, truncated or damaged, and for a
    side under 16 pixels, an aspect ratio over 8 or more than 50 megapixels (by the header, before decoding).
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)  # enough to leave a large file that is no picture unread
            large = os.fstat(file.fileno()).st_size > MAX_BYTES
            data = start + file.read() if _reader(start) and not large else start
    except OSError as error:
        raise ImageError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    if large:
        raise ImageError(f"{os.fspath(path)} has more than {MAX_BYTES // 10**6} MB: take a smaller picture.")
    return decode_image(data, os.fspath(path))


def decode_image(data: bytes, name: str = "The picture") -> np.ndarray:
    """Decode the bytes of a PNG, JPEG or WebP file as `read_image` does; errors call it `name`."""
    read_header = _reader(data)
    if read_header is None:
        raise ImageError(f"{name} is not a PNG, JPEG or WebP picture.")
    try:
        header = read_header(data)
    except struct.error:
        raise ImageError(f"{name} is truncated: it ends before its size is known.") from None
    check_size(header.width, header.height, name)
    if not header.whole:
        raise ImageError(f"{name} is truncated or damaged: copy or download it again.")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise ImageError(f"{name} cannot be decoded: it is damaged or of a kind that OpenCV does not read.")
    return _turn_upright(_to_rgb(image), header.orientation)


def check_size(width: int, height: int, name: str = "The picture") -> None:
    """Raise ImageError for a picture too small, too long or too large to work on."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels: both sides must have at least {MIN_SIDE}.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name} is {width}x{height} pixels: one side may be at most {MAX_ASPECT} times the other.")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is {width}x{height} pixels: at most {MAX_PIXELS // 10**6} megapixels are read.")


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as .jpg (quality 95) or .png, under a temporary name that is then renamed.

    Raises ImageError for another array or ending, or where the folder cannot be written.
    """
    _check_array(image)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".jpg", ".jpeg", ".png"):
        raise ImageError(f"{path} cannot be written: its name must end in .jpg, .jpeg or .png.")
    options = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data.tobytes())
        part.replace(path)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone already where the renaming went well
            part.unlink()


def resize_image(image: np.ndarray, resolution: int) -> np.ndarray:
    """Scale the short side to `resolution` pixels and round both sides to multiples of 64.

    image: (H, W, 3) uint8, as the result. Lanczos where it grows, area averages where it shrinks.
    Raises ImageError where a side would round to 0 or the result have more than 50 megapixels.
    Source: the ControlNet repository's `resize_image`.
    """
    height, width = resized_size(image, resolution)
    grows = resolution > min(image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA)


def resized_size(image: np.ndarray, resolution: int) -> tuple[int, int]:
    """Height and width of what `resize_image` makes of a picture; raises ImageError as it does."""
    _check_array(image)
    height, width = image.shape[:2]
    if resolution > MAX_PIXELS:
        raise ImageError(f"The resolution is {resolution}, but the result may have {MAX_PIXELS} pixels at most.")
    k = resolution / min(height, width)
    new_height, new_width = (int(np.round(side * k / 64)) * 64 for side in (height, width))
    if min(new_height, new_width) < 64:
        raise ImageError(f"The resolution {resolution} would round a side of the picture to 0: take 64 or more.")
    if new_height * new_width > MAX_PIXELS:
        raise ImageError(
            f"The resolution {resolution} would give {new_width}x{new_height} pixels: "
            f"at most {MAX_PIXELS // 10**6} megapixels are made."
        )
    return new_height, new_width


def canny_hint(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """The canny edges of a picture, 255 on 0, as three equal channels.

    image: (H, W, 3) uint8, as the result. Raises ImageError unless 1 <= low < high <= 255 (Canny's hysteresis
    thresholds, in the range of the ControlNet repository's sliders).
    """
    _check_array(image)
    if not 1 <= low < high <= 255:
        raise ImageError(f"The canny thresholds are {low} and {high}, but 1 <= low < high <= 255 must hold.")
    return cv2.merge([cv2.Canny(image, low, high)] * 3)


def _check_array(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(f"A picture is an (H, W, 3) uint8 array, not {image.shape} {image.dtype}.")


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16, to (H, W, 3) uint8 RGB on white."""
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)  # 65535 / 255
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    rgb = cv2.cvtColor(image[..., :3], cv2.COLOR_BGR2RGB)
    if image.shape[2] == 3:
        return rgb
    alpha = cv2.merge([image[..., 3]] * 3)
    return cv2.add(cv2.multiply(rgb, alpha, scale=1 / 255), 255 - alpha)


def _turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 1 to 8 (others are ignored, as viewers do)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _reader(data: bytes) -> Callable[[bytes], Header] | None:
    """The function that reads this file's header, or None where it is no picture that we know."""
    if data.startswith(JPEG_MAGIC):
        return _jpeg_header
    if data.startswith(PNG_MAGIC):
        return _png_header
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_header
    return None


def _jpeg_header(data: bytes) -> Header:
    """Walk the segments to the end-of-image marker, which OpenCV does not miss where a file is cut short."""
    width = height = 0
    frames, orientation, at = 0, 1, 2
    while match := JPEG_MARKER.search(data, at):
        marker, at = match[1][0], match.end()
        if marker == 0xD9:
            return Header(width, height, orientation, frames == 1)
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        if marker in JPEG_FRAMES:
            frames += 1
            if frames == 1:  # the one that is decoded
                height, width = struct.unpack_from(">HH", body, 1)
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])
        at += length
    if not width:
        raise struct.error("the file ends before its frame header")
    return Header(width, height, orientation, False)


def _png_header(data: bytes) -> Header:
    """Walk the chunks to IEND; a chunk whose checksum is wrong counts as damage."""
    kind, width, height = struct.unpack_from(">4sII", data, 12)
    orientation, at = 1, 8
    if kind != b"IHDR":
        return Header(width, height, orientation, False)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        if checksum != zlib.crc32(kind + body).to_bytes(4, "big"):
            break
        if kind == b"eXIf":
            orientation = _exif_orientation(body)
        if kind == b"IEND":
            return Header(width, height, orientation, True)
        at += 12 + length
    return Header(width, height, orientation, False)


def _webp_header(data: bytes) -> Header:
    """Read the size from the first chunk (extended, lossless or lossy) and the orientation from the EXIF chunk."""
    (size,) = struct.unpack_from("<I", data, 4)
    kind = data[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        width, height = 1 + low_w + (high_w << 16), 1 + low_h + (high_h << 16)
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    whole = len(data) >= size + 8 and kind in (b"VP8X", b"VP8L", b"VP8 ")  # others hide a size from us
    orientation, at = 1, 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            orientation = _exif_orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    return Header(width, height, orientation, whole)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 (upright) where it has none or is damaged."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return int(value)
    except struct.error:
        pass  # broken metadata is no reason to refuse a good picture
    return 1
