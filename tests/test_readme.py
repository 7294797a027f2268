"""What the README tells a newcomer to type is what CI runs, and the files it shows are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/tiny/README.md", "pictures/README.md",
         "docker/README.md", "plugins/README.md")  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^    (python3 -m venv .*-m pytest)$", README, re.MULTILINE)
    install = command.partition("activate && ")[2]
    steps = (ROOT / ".ci/run").read_text().splitlines()
    for step in install.split(" && "):
        wanted = step.replace("pip install ", "").replace("-e ", "")
        assert any(all(word in line for word in wanted.split()) for line in steps), step
    (options,) = re.findall(r"`(-n [^`]*)` runs the tests in two processes, as CI does", README)
    assert steps[-1] == f"python -m pytest -q {options}"


def test_what_ci_installs_is_pinned_by_hash_and_from_nowhere_in_particular() -> None:
    text = (ROOT / "constraints/ci.txt").read_text() + (ROOT / "constraints/inception.txt").read_text()
    entries = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    assert len(entries) > 50
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [^#\\]*?)?( +--hash=sha256:[0-9a-f]{64})+", entry), entry[:80]


def test_every_file_that_is_linked_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / name for name in PAGES)):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
