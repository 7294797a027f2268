"""What the README tells a newcomer to type is what CI runs, and the files it shows are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^    (python3 -m venv .*-m pytest)$", README, re.MULTILINE)
    install = command.partition("activate && ")[2]
    steps = (ROOT / ".ci/run").read_text().splitlines()
    for step in install.split(" && "):
        wanted = step.replace("pip install ", "").replace("-e ", "")
        assert any(all(word in line for word in wanted.split()) for line in steps), step


def test_every_file_that_is_linked_exists() -> None:
    for folder in (".", "models/tiny", "pictures", "plugins"):
        page = ROOT / folder / "README.md"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{folder}: {link}"
