"""Pictures that were damaged or made to do harm: an error sentence or a picture, in bounded memory, never a crash.

The pictures are read in a process of its own, as a judge's would be: what a decoder in C does wrong kills only it.
"""

import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
MOST = 2_000_000_000  # bytes of memory
# Reads every file of a folder: a line each, "ok HxW" or the sentence; at last the peak of its memory in kilobytes.
READ = """
import resource, sys
from pathlib import Path
from runtime.images import ImageError, read_image
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        picture = read_image(path)
        assert picture.dtype == "uint8" and picture.ndim == 3 and picture.shape[2] == 3
        print("ok", *picture.shape[:2], flush=True)
    except ImageError as error:
        print(error, flush=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def read_all(folder: Path, tally, kind: str) -> list[str]:
    """What reading each file of a folder said; peak memory and exit status are checked."""
    one, count = tally(kind), len(list(folder.iterdir()))
    one.injected += count
    process = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, (sorted(folder.iterdir())[process.stdout.count("\n")], process.stderr[-2000:])
    *said, peak = process.stdout.splitlines()
    assert len(said) == count
    for line in said:
        assert line.startswith("ok ") or (line.startswith(str(folder)) and line.endswith(".")), line
        one.survive("a picture" if line.startswith("ok ") else line.replace(str(folder), "").partition(" ")[2])
    assert int(peak) * 1024 < MOST, f"{peak} kB"
    return said


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk whose checksum is right."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and body of every chunk of a whole PNG."""
    found, at = [], 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        found.append((kind, png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def seeds() -> list[tuple[str, bytes]]:
    """Whole pictures of the kinds that are read, small ones."""
    draw = np.random.default_rng(0)
    rgb = np.kron(draw.integers(0, 256, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    rgba = np.dstack([rgb, rgb[..., 0]])
    made = [
        (".png", rgb, []), (".png", rgba, []), (".png", rgb[..., 0], []), (".png", rgba.astype(np.uint16) * 257, []),
        (".jpg", rgb, []), (".jpg", rgb, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]), (".jpg", rgb[..., 0], []),
        (".jpg", rgb, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
    ]  # fmt: skip
    return [(suffix, cv2.imencode(suffix, image, options)[1].tobytes()) for suffix, image, options in made]


def mutate(data: bytes, suffix: str, others: list[bytes], draw: random.Random) -> bytes:
    """A picture with flipped bits, cut short, spliced with another, or with other numbers where they matter."""
    changed = bytearray(data)
    how = draw.randrange(6)
    if how == 0:
        for _ in range(draw.choice([1, 1, 3, 20])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del changed[draw.randrange(len(changed)) :]
    elif how == 2:
        other, at = draw.choice(others), draw.randrange(len(changed))
        changed[at:] = other[draw.randrange(len(other)) :]
    elif how == 3:
        begin = draw.randrange(len(changed))
        changed[begin:begin] = changed[begin : begin + draw.randrange(1, 200)] * draw.choice([1, 2, 50])
    elif how == 4 and suffix == ".png":  # so that what is wrong passes the checksums
        parts = chunks(data)
        for _ in range(draw.choice([1, 2])):
            i = draw.randrange(len(parts))
            kind, body = parts[i][0], bytearray(parts[i][1])
            for _ in range(draw.choice([1, 4])):
                if body:
                    body[draw.randrange(len(body))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
            parts[i] = kind, bytes(body)
            if draw.random() < 0.3:
                draw.shuffle(parts)
        return PNG + b"".join(chunk(*part) for part in parts)
    else:  # sizes in headers are big-endian words
        place = draw.randrange(min(len(changed) - 4, 300))
        struct.pack_into(">I", changed, place, draw.choice([0, 1, 2**31, 2**32 - 1, 65_500, 50_000_000]))
    return bytes(changed)


def fuzz(folder: Path, count: int, seed: int) -> None:
    """Write mutated pictures."""
    draw, whole = random.Random(seed), seeds()
    for number in range(count):
        suffix, data = whole[number % len(whole)]
        others = [other for kind, other in whole if kind == suffix]
        (folder / f"{number:04}{suffix}").write_bytes(mutate(data, suffix, others, draw))


def test_fuzzed_pictures(tmp_path, tally):
    fuzz(tmp_path, 1000, 11)
    said = read_all(tmp_path, tally, "a mutated PNG or JPEG")
    assert 100 < sum(line.startswith("ok ") for line in said) < 900, (
        "mutations that always or never matter test nothing"
    )


@pytest.mark.slow
def test_fuzzed_pictures_20_000(tmp_path, tally):
    fuzz(tmp_path, 20_000, 12)
    read_all(tmp_path, tally, "a mutated PNG or JPEG")


def png(width: int, height: int, depth: int, color: int, data: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with these pixels, not yet compressed."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return PNG + head + before + chunk(b"IDAT", zlib.compress(data, 9)) + after + chunk(b"IEND", b"")


def zeros(width: int, height: int, channels: int, depth: int) -> bytes:
    """The compressed rows of a black PNG."""
    pack, row = zlib.compressobj(9), bytes(1 + width * channels * depth // 8)
    return b"".join(pack.compress(row) for _ in range(height)) + pack.flush()


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that say or decode to something huge, by name."""
    yield "png-100000x100000.png", png(100_000, 100_000, 8, 2, b"")
    yield "png-2g.png", png(2**31 - 1, 2**31 - 1, 16, 6, b"")
    yield "png-0.png", png(0, 0, 8, 2, b"")
    yield "png-16x16-with-256-MB-of-pixels.png", png(16, 16, 8, 2, bytes(1 << 28))
    small = png(64, 64, 8, 2, bytes(64 * 193))
    huge_head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    yield "png-two-heads.png", small[:33] + huge_head + small[33:]
    yield (
        "png-hidden-head.png",
        PNG + chunk(b"IHdR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)) + huge_head + small[33:],
    )
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 27), 9))
    yield "png-text.png", png(64, 64, 8, 2, bytes(64 * 193), before=text * 8)
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(struct.pack(">I", 1 << 27) + bytes((1 << 27) - 4), 9))
    yield "png-profile.png", png(64, 64, 8, 2, bytes(64 * 193), before=profile)
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 60_000, 60_000, 0, 0, 1, 1, 0, 0))
    animated = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + frame
    yield "png-animated.png", png(64, 64, 8, 2, bytes(64 * 193), before=animated)
    jpeg = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    at = jpeg.index(b"\xff\xc0")
    frame = jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
    huge = frame[:5] + struct.pack(">HH", 32_000, 32_000) + frame[9:]
    yield "jpeg-32000x32000.jpg", jpeg.replace(frame, huge)
    yield "jpeg-then-a-small-frame.jpg", jpeg.replace(frame, huge)[:-2] + frame + b"\xff\xd9"
    yield (
        "jpeg-behind-a-marker-without-length.jpg",
        jpeg.replace(frame, b"\xff\x01" + huge + frame),
    )  # which we must not skip as if it had one
    lossless = cv2.imencode(".webp", np.zeros((16, 16, 3), np.uint8), [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    stream = bytearray(lossless[20:]) + bytes(40)
    bits = struct.unpack_from("<I", stream, 1)[0] & ~0xFFFFFFF | 16_382 | 16_382 << 14
    struct.pack_into("<I", stream, 1, bits)
    struct.pack_into("<HH", stream, 14, 20, 20)
    yield "webp-without-a-chunk.webp", b"RIFF" + struct.pack("<I", 4 + len(stream)) + b"WEBP" + bytes(stream)
    yield "webp-16383x16383.webp", lossless[:20] + bytes(stream)
    yield "nothing.png", b""
    yield "magic.png", PNG
    yield "magic.jpg", b"\xff\xd8\xff"
    yield "fill.jpg", b"\xff\xd8" + b"\xff" * 1_000_000
    yield "markers.jpg", b"\xff\xd8" + b"\xff\xe0\x00\x02" * 100_000


def test_small_files_that_are_huge(tmp_path, tally):
    for name, data in bombs():
        assert len(data) < 5_000_000
        (tmp_path / name).write_bytes(data)
    said = dict(zip(sorted(os.listdir(tmp_path)), read_all(tmp_path, tally, "a decompression bomb"), strict=True))
    fine = {name for name, line in said.items() if line.startswith("ok")}
    assert fine <= {"png-text.png", "png-profile.png", "png-animated.png", "png-16x16-with-256-MB-of-pixels.png"}, fine


@pytest.mark.slow
def test_the_largest_picture_that_is_read_stays_within_2_gb(tmp_path, tally):
    turned = chunk(b"eXIf", b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0) + bytes(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 7_071, 7_071, 16, 6, 0, 0, 0))
    body = chunk(b"IDAT", zeros(7_071, 7_071, 4, 16))
    (tmp_path / "largest.png").write_bytes(PNG + head + turned + body + chunk(b"IEND", b""))
    assert read_all(tmp_path, tally, "the largest picture that is read") == ["ok 7071 7071"]


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path, tally):
    path = tmp_path / "large.png"
    path.write_bytes(PNG)
    os.truncate(path, 10**12)  # it takes no room on the disk
    (said,) = read_all(tmp_path, tally, "a file of a terabyte that begins as a picture")
    assert "more than 500 MB" in said


def test_pictures_are_read_in_an_address_space_of_2_gb(tmp_path):
    fuzz(tmp_path, 40, 13)
    process = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST)),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
