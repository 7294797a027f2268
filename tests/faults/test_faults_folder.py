"""Engine folders that were damaged, edited or closed: refused with a sentence, or harmless; never a crash."""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no engine can be built")

import runtime.pipeline  # noqa: E402
from runtime.engine import Gpu  # noqa: E402
from runtime.manifest import EngineError, Manifest, seal, write_whole  # noqa: E402
from runtime.pipeline import Canny2Image  # noqa: E402
from runtime.session import STAGES  # noqa: E402
from trt_builder.__main__ import main, sentence  # noqa: E402
from trt_builder.flavour import FlavourError, get_flavour  # noqa: E402

NOBODY = 65534
# What of a manifest does not decide which plan is loaded: names, options, seconds, the key for the next build.
HARMLESS = ("model", "plugins", "weights", "weights_sha256", "options", "shape", "stages", "gpu", "capability",
            "targets")  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """All engines of the small model, for the GPU of `loading`, and every other file that a folder may hold."""
    output = tmp_path_factory.mktemp("engines")
    assert main(["build", "--model", "tiny", "--target", "sm89", "--output", str(output)]) == 0
    folder = output / "tiny-128x128-n1-fp16"
    for name in ("timing.cache", "timings.json"):
        (folder / name).write_bytes(b'{"stages": {}}' * 50)
    return folder


@pytest.fixture
def loading(monkeypatch) -> Callable[[Path], None]:
    """Load a folder as `Canny2Image` does, up to what TensorRT deserialises."""

    class Session:
        def __init__(self, manifest: Manifest, flavour: object, options: object) -> None:
            for stage in STAGES:
                manifest.plan_bytes(stage)

        def close(self) -> None:
            pass

    monkeypatch.setattr(runtime.pipeline, "gpu", lambda: Gpu("RTX 4090", "8.9"))
    monkeypatch.setattr(runtime.pipeline, "Session", Session)
    return lambda folder: Canny2Image(folder).close()


def refusal(action: Callable[[], object]) -> str:
    """The sentence of an EngineError."""
    with pytest.raises(EngineError) as error:
        action()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 1000
    return text


@contextmanager
def flipped(path: Path, place: int, by: int) -> Iterator[None]:
    """A file with one byte changed."""
    byte = path.read_bytes()[place]
    for value in (byte ^ by, byte):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([value]))
        if value != byte:
            yield


def test_a_flipped_byte_at_some_places(built, loading, tally, capsys):
    flip(built, loading, tally, capsys, 6)


@pytest.mark.slow
def test_a_flipped_byte_at_200_places(built, loading, tally, capsys):
    flip(built, loading, tally, capsys, 200)


def flip(folder: Path, loading, tally, capsys, places: int) -> None:
    """Flip bytes of every file, one at a time, and load the folder; what was not read by then is shown."""
    loading(folder)
    draw = random.Random(7)
    for path in sorted(path for path in folder.iterdir() if path.stat().st_size):
        kind = (
            "".join(path.suffixes) if path.suffix in (".plan", ".json") and path.name != "manifest.json" else path.name
        )
        one = tally(f"a flipped byte in {kind}")
        for _ in range(places):
            one.inject()
            with flipped(path, draw.randrange(path.stat().st_size), draw.randrange(1, 256)):
                if path.suffix == ".plan" and path.stem != "vae_encoder" or path.name == "manifest.json":
                    one.survive(refusal(lambda: loading(folder)))
                elif path.suffix == ".plan":  # of a stage that no picture needs
                    stage = path.stem
                    one.survive(refusal(lambda: Manifest.load(folder).plan_bytes(stage)))  # noqa: B023
                else:
                    loading(folder)  # it is no part of an engine: a report, a log, TensorRT's notes for the next build
                    status = main(["inspect", str(folder)])
                    out, err = capsys.readouterr()
                    assert (status == 0 and out) or (status == 2 and err.count("\n") == 1 and err.endswith(".\n")), err
                    one.survive(err or "nothing: it is not part of an engine, and still legible or not read")
    loading(folder)


def test_a_damaged_timing_cache_is_replaced(caplog):
    class Config:
        """TensorRT 8.6's: of a damaged cache it makes None, and one of another GPU it does not take."""

        def __init__(self) -> None:
            self.taken: list[bytes] = []

        def create_timing_cache(self, content: bytes) -> bytes | None:
            return None if content == b"damaged" else content

        def set_timing_cache(self, cache: bytes | None, ignore: bool) -> bool:
            assert cache is not None and not ignore
            self.taken += [] if cache == b"foreign" else [cache]
            return cache != b"foreign"

    for content, taken in ((b"damaged", b""), (b"foreign", b""), (b"good", b"good"), (b"", b"")):
        config = Config()
        get_flavour("tensorrt_rtx").take_timing_cache(config, content)
        assert config.taken == [taken]
    assert len(caplog.messages) == 2


BY_HAND: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{]",
    "no UTF-8": b"\xff\xfe\x00",
    "deeply nested": b"[" * 200_000,
    "deeply nested objects": b'{"a":' * 100_000,
    "a number of 5000 digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "another program's": b'{"made_by": "me"}',
    "too large": b" " * (2 << 20),
    "null bytes": bytes(1000),
}


@pytest.mark.parametrize("content", BY_HAND.values(), ids=BY_HAND)
def test_a_manifest_that_is_none(built, loading, tally, tmp_path, content):
    one = tally("a manifest.json that is none")
    (tmp_path / "manifest.json").write_bytes(content)
    one.inject()
    one.survive(refusal(lambda: loading(tmp_path)))


def test_a_manifest_edited_by_hand(built, loading, tally, tmp_path):
    """Every field left out, and replaced by every kind of value; with and without a SHA-256 that fits."""
    one = tally("a manifest.json edited by hand")
    whole = json.loads((built / "manifest.json").read_text())
    for path in built.glob("*.plan"):
        (tmp_path / path.name).symlink_to(path)
    values = [None, True, -1, 0, 1.5, 10**400, float("nan"), "", "../../etc/passwd", "a\0b", "\ud800", [], [None], {},
              {"../x": 1}, [[[]]], "x" * 10_000]  # fmt: skip
    fields = [(name,) for name in whole] + [("shape", name) for name in whole["shape"]]
    fields += [("options", "precision"), ("stages", "hint"), ("stages", "../hint"), ("stages", "hint", "sha256")]
    fields += [("stages", "hint", name) for name in ("key", "bytes", "seconds", "path")]
    for place in fields:
        for value in ["left out", *values]:
            content = json.loads(json.dumps(whole))
            inner = content
            for name in place[:-1]:
                inner = inner[name]
            if value == "left out":
                inner.pop(place[-1], None)
            else:
                inner[place[-1]] = value
            if place != ("sha256",):
                outside = ("made_by", "schema", "sha256")
                content["sha256"] = seal({k: v for k, v in content.items() if k not in outside})
            (tmp_path / "manifest.json").write_text(json.dumps(content))
            one.inject()
            try:
                loading(tmp_path)
            except (EngineError, FlavourError) as error:
                text = sentence(error)
                assert text == str(error) or isinstance(error, FlavourError)
                assert "\n" not in text and len(text) < 11_000
                one.survive("refused: " + text.partition(":")[0])
            else:
                one.survive("loads the plans that the manifest vouches for")
                assert place[0] in HARMLESS, (place, value)


def test_plans_that_are_no_plain_files(built, loading, tally, tmp_path):
    one = tally("a plan that is a link to a device, a pipe, a folder or nothing")
    (tmp_path / "manifest.json").write_bytes((built / "manifest.json").read_bytes())
    for stage in STAGES:
        (tmp_path / f"{stage}.plan").symlink_to(built / f"{stage}.plan")
    loading(tmp_path)  # a link to the right bytes is as good as the bytes
    plan = tmp_path / "hint.plan"
    for make in (
        lambda: plan.symlink_to("/dev/zero"),
        lambda: os.mkfifo(plan),
        lambda: plan.mkdir(),
        lambda: plan.symlink_to(plan),
        lambda: plan.symlink_to("/etc/hostname"),
        lambda: plan.symlink_to(tmp_path / "nowhere"),
        lambda: plan.symlink_to("/dev/stdin"),
    ):
        plan.rmdir() if plan.is_dir() else plan.unlink(missing_ok=True)
        make()
        one.inject()
        one.survive(refusal(lambda: loading(tmp_path)))


@pytest.fixture
def above() -> Iterator[Path]:
    """A folder that every user may read, as none of pytest's is."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("closed", ["folder", "manifest.json", "hint.plan", "above"])
def test_folders_that_may_not_be_read(built, loading, tally, above, capsys, closed):
    one = tally("a folder or file that may not be read (as another user)")
    folder = above / "engines"
    folder.mkdir()
    for name in ("manifest.json", *(f"{stage}.plan" for stage in STAGES)):
        write_whole(folder / name, (built / name).read_bytes())
    get_flavour("tensorrt_rtx")  # imported while everything may be read
    place = {"folder": folder, "above": above}.get(closed, folder / closed)
    place.chmod(0)
    one.inject()
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        text = refusal(lambda: loading(folder))
        status = main(["inspect", str(folder)])
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o755)
    assert "Permission denied" in text and status in (0, 2)
    assert status == (0 if closed == "hint.plan" else 2) and "Traceback" not in capsys.readouterr().err
    one.survive(text)
