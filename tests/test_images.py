import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime import images
from runtime.images import ImageError, canny_hint, decode_image, read_image, resize_image, write_image

RNG = np.random.default_rng(0)
BLOCKS = np.kron(RNG.integers(0, 256, (5, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))  # (40, 64, 3) RGB
ALPHA = np.kron(RNG.integers(0, 256, (5, 8), np.uint8), np.ones((8, 8), np.uint8))


def encode(image: np.ndarray, suffix: str = ".png", *options: int) -> bytes:
    """RGB, RGBA or grey to a file's bytes."""
    if image.ndim == 3:
        image = image[..., [2, 1, 0, 3][: image.shape[2]]]
    return cv2.imencode(suffix, image, options)[1].tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, color: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return images.PNG_MAGIC + head + b"".join(chunks) + chunk(b"IEND", b"")


def exif(orientation: int, order: str) -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "IHHHIHH", 8, 1, 0x0112, 3, 1, orientation, 0) + bytes(4)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(rgb * share) + np.round(255 * (1 - share))


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return a.shape == b.shape and a.dtype == np.uint8 and float(np.abs(a.astype(float) - b).max()) <= tolerance


def test_rgb_comes_back_as_it_was() -> None:
    assert close(decode_image(encode(BLOCKS)), BLOCKS, 0)
    assert close(decode_image(encode(BLOCKS, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)), BLOCKS, 0)
    smooth = cv2.resize(BLOCKS[::8, ::8], (64, 40), interpolation=cv2.INTER_LINEAR)
    for suffix in (".jpg", ".webp"):
        assert np.abs(decode_image(encode(smooth, suffix)).astype(float) - smooth).mean() < 5


def test_grey_and_16_bit() -> None:
    grey = BLOCKS[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, 2)
    assert close(decode_image(encode(grey)), as_rgb, 0)
    assert close(decode_image(encode(grey.astype(np.uint16) * 257)), as_rgb, 0)
    assert close(decode_image(encode(BLOCKS.astype(np.uint16) * 257 + 100)), BLOCKS, 0)
    assert close(decode_image(encode(grey, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100)), as_rgb, 3)


def test_transparency_is_laid_on_white() -> None:
    rgba = np.dstack([BLOCKS, ALPHA])
    assert close(decode_image(encode(rgba)), on_white(BLOCKS, ALPHA), 1)
    assert close(decode_image(encode(rgba.astype(np.uint16) * 257)), on_white(BLOCKS, ALPHA), 1)
    assert close(decode_image(encode(rgba, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)), on_white(BLOCKS, ALPHA), 1)
    clear = decode_image(encode(np.zeros((16, 16, 4), np.uint8)))
    assert (clear == 255).all()


def test_grey_with_alpha() -> None:
    rows = b"".join(b"\0" + np.dstack([BLOCKS[y, :, 0], ALPHA[y]]).tobytes() for y in range(40))
    picture = decode_image(png(64, 40, 8, 4, chunk(b"IDAT", zlib.compress(rows))))
    assert close(picture, on_white(np.repeat(BLOCKS[..., :1], 3, 2), ALPHA), 1)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(transparent: bool) -> None:
    palette = RNG.integers(0, 256, (16, 3), np.uint8)
    alpha = np.full(16, 255, np.uint8)
    indices = RNG.integers(0, 16, (20, 32), np.uint8)
    rows = b"".join(b"\0" + (row[::2] * 16 + row[1::2]).tobytes() for row in indices)  # 4 bits a pixel
    chunks = [chunk(b"PLTE", palette.tobytes()), chunk(b"IDAT", zlib.compress(rows))]
    if transparent:
        alpha[:5] = [0, 50, 100, 200, 250]
        chunks.insert(1, chunk(b"tRNS", alpha[:5].tobytes()))
    picture = decode_image(png(32, 20, 4, 3, *chunks))
    assert close(picture, on_white(palette[indices], alpha[indices]), 1)


# What to do to a picture stored with each orientation, in the words of the EXIF standard's table.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: np.rot90(x, 2),
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
    0: lambda x: x,
    9: lambda x: x,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("order", "<>")
def test_exif_orientation(orientation: int, order: str) -> None:
    tag = exif(orientation, order)
    plain = {suffix: encode(BLOCKS, suffix) for suffix in (".jpg", ".png", ".webp")}
    app1 = b"\xff\xe1" + struct.pack(">H", len(tag) + 8) + b"Exif\0\0" + tag
    jpeg = plain[".jpg"][:2] + app1 + plain[".jpg"][2:]
    with_chunk = plain[".png"][:33] + chunk(b"eXIf", tag) + plain[".png"][33:]
    canvas = struct.pack("<4sIIHBHB", b"VP8X", 10, 0x08, 63, 0, 39, 0)
    if order == "<":
        tag = b"Exif\0\0" + tag  # which some programs write into WebP too
    body = b"WEBP" + canvas + plain[".webp"][12:] + struct.pack("<4sI", b"EXIF", len(tag)) + tag
    webp = b"RIFF" + struct.pack("<I", len(body)) + body
    for before, after in zip(plain.values(), (jpeg, with_chunk, webp), strict=True):
        np.testing.assert_array_equal(decode_image(after), UPRIGHT[orientation](decode_image(before)))


def test_broken_exif_is_ignored() -> None:
    data = encode(BLOCKS)
    for tag in (b"", b"II*\0", b"II*\0\xff\xff\xff\xff", exif(6, "<")[:12]):
        np.testing.assert_array_equal(decode_image(data[:33] + chunk(b"eXIf", tag) + data[33:]), BLOCKS)


PROGRESSIVE = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
FILES = [
    encode(BLOCKS),
    encode(BLOCKS, ".jpg"),
    encode(BLOCKS, ".jpg", *PROGRESSIVE),
    encode(BLOCKS, ".webp"),
    encode(BLOCKS, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
    encode(np.dstack([BLOCKS, ALPHA]), ".webp"),
]


@pytest.mark.parametrize("data", FILES, ids=["png", "jpeg", "progressive", "webp", "webp lossless", "webp alpha"])
def test_every_truncation_is_refused(data: bytes) -> None:
    decode_image(data)
    for end in range(len(data)):
        with pytest.raises(ImageError, match="^x (is truncated|is not a PNG, JPEG or WebP picture)"):
            decode_image(data[:end], "x")


def test_end_of_an_embedded_thumbnail_is_not_the_end_of_the_picture() -> None:
    data = encode(BLOCKS, ".jpg")
    thumbnail = encode(BLOCKS[:16, :16], ".jpg")
    whole = data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    np.testing.assert_array_equal(decode_image(whole), decode_image(data))
    np.testing.assert_array_equal(decode_image(whole + b"trailing bytes"), decode_image(data))
    with pytest.raises(ImageError, match="truncated"):
        decode_image(whole[:-100])


def test_damaged_png_is_refused() -> None:
    data = bytearray(encode(BLOCKS))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode_image(bytes(data))
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(png(64, 40, 8, 2, chunk(b"IDAT", b"no zlib stream")))


@pytest.mark.parametrize(
    "width, height, sentence",
    [
        (1, 1, "1x1 pixels: both sides must have at least 16"),
        (20000, 10, "20000x10 pixels: both sides must have at least 16"),
        (15, 100, "15x100 pixels: both sides"),
        (16, 129, "16x129 pixels: one side may be at most 8 times the other"),
        (60000, 50000, "60000x50000 pixels: at most 50 megapixels"),
    ],
)
def test_sizes_are_refused_by_the_header(
    width: int, height: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(images.cv2, "imdecode")
    jpeg = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0\xff\xd9"
    body = b"WEBP" + struct.pack("<4sIIHBHB", b"VP8X", 10, 0, *divmod24(width - 1), *divmod24(height - 1))
    webp = b"RIFF" + struct.pack("<I", len(body)) + body
    for data in (png(width, height, 8, 2), jpeg, webp):
        with pytest.raises(ImageError, match=f"^bomb is {sentence}"):
            decode_image(data, "bomb")


def divmod24(number: int) -> tuple[int, int]:
    return number % 2**16, number // 2**16


def test_smallest_and_longest_sizes_are_read() -> None:
    assert decode_image(encode(np.zeros((16, 128, 3), np.uint8))).shape == (16, 128, 3)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"not a picture", b"GIF89a" + bytes(100), b"RIFF\0\0\0\0WAVE"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a file.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="a file.jpg is not a PNG, JPEG or WebP picture.$"):
        read_image(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="none.png cannot be read: No such file or directory.$"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path)


def test_write_and_read_back(tmp_path: Path) -> None:
    write_image(tmp_path / "ünïcode 鳥.png", BLOCKS)
    np.testing.assert_array_equal(read_image(tmp_path / "ünïcode 鳥.png"), BLOCKS)
    write_image(str(tmp_path / "b.JPG"), BLOCKS)
    assert (tmp_path / "b.JPG").read_bytes() == encode(BLOCKS, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 95)
    assert sorted(os.listdir(tmp_path)) == ["b.JPG", "ünïcode 鳥.png"]


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", BLOCKS)

    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ImageError, match="a.png cannot be written: No space left on device.$"):
        write_image(tmp_path / "a.png", BLOCKS[::-1])
    assert os.listdir(tmp_path) == ["a.png"]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), BLOCKS)


def test_write_refusals(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="a.bmp cannot be written: its name must end in"):
        write_image(tmp_path / "a.bmp", BLOCKS)
    with pytest.raises(ImageError, match="a.png cannot be written: No such file or directory"):
        write_image(tmp_path / "missing" / "a.png", BLOCKS)
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="a.png cannot be written: Not a directory"):
        write_image(tmp_path / "file" / "a.png", BLOCKS)
    with pytest.raises(ImageError, match=r"not \(40, 64, 3\) float64"):
        write_image(tmp_path / "a.png", BLOCKS / 255)


@pytest.mark.parametrize(
    "size, resolution, result",
    [
        ((512, 768), 256, (256, 384)),
        ((1000, 1500), 256, (256, 384)),
        ((40, 64), 128, (128, 192)),  # 204.8
        ((100, 200), 33, (64, 64)),  # 33 and 66
        ((480, 480), 480, (512, 512)),  # 7.5 rounds to even, as numpy does
        ((416, 416), 416, (384, 384)),  # and so does 6.5
        ((256, 384), 256, (256, 384)),
    ],
)
def test_resize_arithmetic(size: tuple[int, int], resolution: int, result: tuple[int, int]) -> None:
    assert resize_image(np.zeros((*size, 3), np.uint8), resolution).shape == (*result, 3)


def test_resize_filters() -> None:
    noise = RNG.integers(0, 256, (128, 128, 3), np.uint8)
    mean = noise.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert close(resize_image(noise, 64), mean, 0.5)
    np.testing.assert_array_equal(resize_image(noise, 128), noise)
    up = cv2.resize(noise, (256, 256), interpolation=cv2.INTER_LANCZOS4)
    np.testing.assert_array_equal(resize_image(noise, 256), up)


def test_resize_refusals() -> None:
    for resolution in (32, 1, 0, -256):
        with pytest.raises(ImageError, match=f"resolution {resolution} would round a side of the picture to 0"):
            resize_image(BLOCKS, resolution)
    with pytest.raises(ImageError, match="at most 50 megapixels"):
        resize_image(BLOCKS, 10000)


def test_canny_marks_the_edge_of_a_square() -> None:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[16:48, 32:64] = 255
    edges = canny_hint(picture, 100, 200)
    assert edges.shape == picture.shape and edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    assert (edges[..., 0] == edges[..., 1]).all() and (edges[..., 0] == edges[..., 2]).all()
    band = np.zeros((64, 96), bool)
    band[14:50, 30:66] = True
    band[18:46, 34:62] = False
    assert not edges[~band].any()
    assert 100 < np.count_nonzero(edges[..., 0]) < 150  # the outline has 124 pixels


def test_canny_thresholds_matter() -> None:
    step = np.zeros((32, 32, 3), np.uint8)
    step[:, 16:] = 40  # a gradient of 160 by Sobel
    assert canny_hint(step, 50, 100).any()
    assert not canny_hint(step, 200, 250).any()


@pytest.mark.parametrize("low, high", [(200, 100), (100, 100), (0, 100), (100, 256), (-1, 5), (float("nan"), 100)])
def test_canny_refusals(low: float, high: float) -> None:
    with pytest.raises(ImageError, match=f"thresholds are {low} and {high}, but 1 <= low < high <= 255 must hold"):
        canny_hint(BLOCKS, low, high)
