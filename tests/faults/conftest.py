"""Faults are counted, and the table of what was injected, survived and said is printed at the end of a test run.

Of a run in one process: those that `-n` starts print nothing.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest


@dataclass
class Tally:
    """The faults of one kind: how many were injected and survived, and what was said."""

    kind: str
    injected: int = 0
    survived: int = 0
    said: Counter[str] = field(default_factory=Counter)

    def inject(self) -> None:
        """One more fault is about to be injected."""
        self.injected += 1

    def survive(self, said: object) -> None:
        """It was survived, and this was said; paths and numbers are left out, so that equal sentences count as one."""
        self.survived += 1
        text = re.sub(r"(?<![\w'])\.?/[\w./-]*\w", "…", str(said).strip())
        text = re.sub(r"\(.*\)", "(…)", re.sub(r"`[^`]*`", "`…`", text))
        self.said[re.sub(r"'[^']*'|\b[0-9a-f]{12,}\b|(?<!-)\b\d+(\.\d+)?", "#", text)[:120]] += 1


TALLIES = pytest.StashKey[dict[str, Tally]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str], Tally]:
    """The tally of a kind of fault."""
    tallies = request.config.stash.setdefault(TALLIES, {})
    return lambda kind: tallies.setdefault(kind, Tally(kind))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, in Markdown."""
    tallies = config.stash.get(TALLIES, {})
    if not tallies:
        return
    terminalreporter.section("faults")
    terminalreporter.line("| fault | injected | survived | said (how often) |\n| --- | --- | --- | --- |")
    for one in tallies.values():
        said = "; ".join(f"{text} ({count})" for text, count in one.said.most_common(3))
        more = f"; {len(one.said) - 3} other sentences" if len(one.said) > 3 else ""
        terminalreporter.line(f"| {one.kind} | {one.injected} | {one.survived} | {said}{more} |")
