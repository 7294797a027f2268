"""The TensorRT pipeline in another interpreter: TensorRT 8.6 wants CPython 3.10 or older, PyTorch of today a newer one.

`Remote` starts that interpreter and talks to it over a pipe; there this module serves as `python -m bench.remote FD`.
Both run the same checkout, so that what one pickles the other knows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runtime.manifest import EngineError
from runtime.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent


class Remote:
    """A pipeline in the interpreter `python`, opened by `bench.candidate.tensorrt_pipeline` with the other arguments.

    Raises ValueError where it cannot be started or opened, EngineError where it fails or ends in the middle.
    """

    def __init__(
        self, python: Path, folder: Path, model: str, weights: Path | None, schedules: Sequence[Schedule],
        shapes: Iterable[tuple[int, int, int]],
    ) -> None:  # fmt: skip
        self.schedule = schedules[0]
        # As text, because a path of one Python version means nothing to another.
        paths = [str(path.resolve()) if path else None for path in (folder, weights)]
        self._connection, theirs = Pipe()
        try:
            command = [str(python), "-m", "bench.remote", str(theirs.fileno())]
            # In a session of its own, so that Ctrl-C stops this side, which then ends the other.
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True)
        except OSError as error:
            self._connection.close()
            raise ValueError(f"--engine-python {python} cannot be started: {error.strerror or error}.") from None
        finally:
            theirs.close()
        try:
            self._about = self._ask("open", paths[0], model, paths[1], list(schedules), list(shapes))
        except EngineError as error:
            self.close()
            raise ValueError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def process(self, *arguments: Any, **named: Any) -> list[Any]:
        """As `Canny2Image.process`, by `schedule`; the way there and back counts in the caller's time."""
        return list(self._ask("process", self.schedule, arguments, named))

    def about(self) -> dict[str, Any]:
        """As `Canny2Image.about`."""
        return dict(self._about)

    def close(self) -> None:
        """End the other process."""
        self._connection.close()
        self._process.wait()

    def _ask(self, what: str, *given: Any) -> Any:
        try:
            self._connection.send((what, given))
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise EngineError(f"the interpreter of --engine-python ended with status {status}.") from None
        if error is not None:
            raise error(answer)
        return answer


def serve(connection: Connection, make: Callable[..., Any]) -> None:
    """Answer until the other side closes: open the pipeline that `make` gives, then pictures."""
    pipeline: Any = None
    try:
        while True:
            try:
                what, given = connection.recv()
            except EOFError:
                return
            try:
                if what == "open":
                    folder, model, weights, *rest = given
                    pipeline = make(Path(folder), model, Path(weights) if weights else None, *rest)
                    connection.send((None, pipeline.about()))
                else:
                    pipeline.schedule, arguments, named = given
                    connection.send((None, pipeline.process(*arguments, **named)))
            except (ValueError, OSError) as error:  # an EngineError is a ValueError
                kind = EngineError if isinstance(error, EngineError) else ValueError
                connection.send((kind, str(error)))
    finally:
        if pipeline is not None:
            pipeline.close()


def main() -> int:
    """The other side of `Remote`."""
    from bench.candidate import tensorrt_pipeline

    with Connection(int(sys.argv[1])) as connection:
        serve(connection, tensorrt_pipeline)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
