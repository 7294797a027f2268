"""The output folder of a run: made beside its place, moved there whole, never left half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.report import MADE_BY, RESULTS


class OutputError(ValueError):
    """The output folder cannot be used."""


def check_output(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Make sure that a run may write to `output` and that replacing it would destroy none of `inputs`.

    Usable is a folder that does not exist yet, is empty, or holds an earlier run; raises OutputError for any other.
    """
    place = output.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise OutputError(f"the output folder '{output}' holds '{path}', which is needed: choose another --output.")
    if place.exists() and not place.is_dir():
        raise OutputError(f"the output '{output}' is a file: choose a folder.")
    if place.is_dir() and any(place.iterdir()) and not _is_earlier_run(place):
        raise OutputError(f"the folder '{output}' holds files of something else: choose an empty or new one.")
    parent = place if is_mount(place) else place.parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder '{output}' cannot be written, because '{existing}' does not allow it.")


def is_mount(place: Path) -> bool:
    """Whether something is mounted at a resolved path, also a folder of the same file system, which os.path misses."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return os.path.ismount(place)
    named = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines)
    return str(place) in named


def _is_earlier_run(folder: Path) -> bool:
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("made_by") == MADE_BY


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `output` when the block ends well and vanishes when it does not.

    Raises OutputError where it cannot be written or came to hold something else.
    """
    place = output.resolve()
    mounted = is_mount(place)  # such as a docker volume: it cannot be renamed, so its content is replaced
    parent = place if mounted else place.parent
    created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            beside = tempfile.TemporaryDirectory(prefix=f".{place.name}-partial-", dir=parent)
        except OSError as error:
            raise OutputError(f"the output folder '{output}' cannot be written: {error.strerror}.") from error
        with beside as temporary:
            staging = Path(temporary, "new")  # one level down: mkdtemp's own folder is closed to other users
            staging.mkdir()
            yield staging
            if mounted:
                _replace_content(place, staging)
            else:
                _replace_folder(place, staging, Path(temporary, "old"))
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(output)  # as where the disk is full
        for folder in created:  # innermost first
            with suppress(OSError):  # never made, or by now in use by someone else
                folder.rmdir()
        raise


def _replace_folder(place: Path, staging: Path, aside: Path) -> None:
    if not place.exists():
        staging.rename(place)
        return
    check_output(place)  # minutes have passed since the first look
    place.rename(aside)
    try:
        staging.rename(place)
    except BaseException:
        aside.rename(place)
        raise


def _replace_content(place: Path, staging: Path) -> None:
    temporary = staging.parent
    for entry in place.iterdir():
        if entry != temporary:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    # The results come last: where they are, everything is.
    for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == RESULTS):
        entry.rename(place / entry.name)


@contextmanager
def ignoring_signals() -> Iterator[Callable[[], None]]:
    """Yields a function after whose call Ctrl-C and SIGTERM are ignored until the block ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    here = threading.current_thread() is threading.main_thread()  # signals are of no other thread

    def ignore() -> None:
        for number in before if here else ():
            signal.signal(number, signal.SIG_IGN)

    try:
        yield ignore
    finally:
        for number, handler in before.items() if here else ():
            signal.signal(number, handler)
