"""What pyproject.toml asks for, a line each: `python docker/requirements.py torch,rtx`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(extras: str) -> None:
    """Print the requirements of the project and of these extras, comma-separated."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name in ["dependencies", *filter(None, extras.split(","))]:
        found = re.search(rf"^{re.escape(name)} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)  # no tomllib before 3.11
        if not found:
            sys.exit(f"requirements: pyproject.toml has no extra {name!r}.")
        print("\n".join(re.findall(r'"([^"]+)"', found[1])))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
