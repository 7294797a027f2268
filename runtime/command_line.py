"""What every program of the project does with its command line, its errors and the signals that end it."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import NoReturn


class UsageError(ValueError):
    """A command line that cannot be understood; the text is one sentence."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one sentence, by raising UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help).")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options of a command line; argparse itself takes "--steps=--" for an empty list."""
        words = sys.argv[1:] if argv is None else list(argv)
        for word in words:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word}: expected one argument")
        return self.parse_args(words)


def escape_output() -> None:
    """Let what the terminal cannot show, such as an odd file name, be printed as an escape instead of end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def sentence(error: BaseException) -> str:
    """An error as one line that ends in a full stop."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split())
    return text if text.endswith(".") else f"{text}."


def stop(*_: object) -> NoReturn:
    """A handler of SIGTERM that ends the program as Ctrl-C does, so that nothing half-written stays."""
    raise KeyboardInterrupt
