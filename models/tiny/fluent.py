"""Fluent 3D emoji from the npm registry: pictures, labels, and which of them are held out of all training.

Both packages are pinned: `@lobehub/fluent-emoji-3d` (pictures, MIT) and `emojibase-data` (labels and tags, MIT).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

log = logging.getLogger(__name__)

# fmt: off
# npm name, pinned version, tarball as `npm pack` names it, SHA-256 of the tarball
PICTURES = ("@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58")
LABELS = ("emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz",
          "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")

TONE = re.compile(r"(medium-light|medium-dark|light|medium|dark) skin tone")
HUES = r"(red|pink|orange|yellow|green|blue|light blue|purple|brown|black|grey|white)"
# Labels that differ only in a gender, an hour, a phase, a side or a colour share a base.
FAMILIES = [(re.compile(pattern), base) for pattern, base in (
    (r"^(kiss|couple with heart|family|keycap)(:.*)?$", r"\1"), (r".*holding hands$", "holding hands"),
    (r"^(boy|girl|child)$", "child"), (r"^(old man|old woman|older person)$", "older person"),
    (r"^mer(man|maid|person)$", "merperson"), (r".* Claus$", "Claus"), (r"^deaf .*", "deaf person"),
    (r"^(prince|princess|person with crown)$", "royal person"), (r"^pregnant .*", "pregnant person"),
    (r".*feeding.*", "feeding baby"), (r".*(o’clock|-thirty)$", "clock face"), (r".* moon$", "moon"),
    (r".* moon face$", "moon face"), (rf"^{HUES} (heart|book|apple)$", r"\2"), (r"^closed book$", "book"),
    (rf".*\b{HUES} (?:large |medium |medium-small |small )?(circle|square|diamond)$", r"\2"),
    (rf"^{HUES} (triangle|square button|question mark|exclamation mark)\b.*", r"\2"),
    (r"^(up|down|left|right|BACK|END|ON!|SOON|TOP)[-a-z ]*\barrow\b.*", "arrow"), (r"^Japanese “.*", "Japanese button"),
    (r"^backhand index.*", "backhand index"), (r"^(?:left|right)wards (hand|pushing hand)$", r"\1"),
    (r"^(left|right)-facing fist$", "facing fist"), (r"^(.*) tilted (left|right)$", r"\1"),
    (r".* mailbox .*", "mailbox"),
    (r"^(speaker|globe|thumbs|cloud) .*", r"\1"), (r"^sun behind .*", "sun behind cloud"), (r"^oncoming (.*)", r"\1"),
    (r"^\d.. place medal$", "place medal"), (r".*-no-evil monkey$", "no-evil monkey"), (r"^(un)?locked$", "padlock"),
    (r"^hourglass.*", "hourglass"), (r".* banknote$", "banknote"), (r"^palm (up|down) hand$", "palm hand"),
    (r"^snowman.*", "snowman"), (r"^(grinning cat.*|cat face)$", "cat face"),  # these are drawn almost alike
    (r"^(face without mouth|kissing face)$", "kissing face"))]
GENDER = re.compile(r"^(person|people|man|men|woman|women) (?=\S)")
# fmt: on

# Birds on the held-out side. Every other bird is trained on, whatever its hash says, so that "a bird" is learnt.
HELD_OUT_BIRDS = ("owl", "parrot", "duck", "swan")
HELD_OUT_SHARE = 0.1
BIRD_PARTS = ("feather", "wing")

NO_FLIP_GROUPS = ("symbols", "flags")
NO_FLIP_SUBGROUPS = ("time", "arrow", "alphanum", "keycap")
NO_FLIP_LABEL = re.compile(
    r"\b(left|right|leftwards|rightwards|increasing|decreasing|waxing|waning|quarter|8 ball|"
    r"card|calendar|newspaper|place medal|musical|hundred|ZZZ)\b"
)


@dataclass(frozen=True)
class Emoji:
    """One emoji; `base` is its label without skin tone and gender, and the whole base is on one side of the split."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    base: str
    held_out: bool
    webp: bytes

    @property
    def image(self) -> np.ndarray:
        """The picture, decoded on each access: (256, 256, 4) uint8 RGBA, alpha not premultiplied."""
        picture = cv2.imdecode(np.frombuffer(self.webp, np.uint8), cv2.IMREAD_UNCHANGED)
        if picture is None or picture.ndim != 3 or picture.shape[2] != 4:
            raise ValueError(f"the picture of {self.label!r} ({self.hexcode}) is not RGBA; fetch the data again")
        if picture.shape[:2] != (256, 256):  # one file is 264 high
            picture = cv2.resize(picture, (256, 256), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(picture, cv2.COLOR_BGRA2RGBA)

    @property
    def may_flip(self) -> bool:
        """Whether the mirror image shows the same thing (no writing, clocks, arrows, flags, sides)."""
        return (
            self.group not in NO_FLIP_GROUPS
            and self.subgroup not in NO_FLIP_SUBGROUPS
            and not NO_FLIP_LABEL.search(self.label)
        )

    @property
    def may_turn_hue(self) -> bool:
        """Whether other colours show the same thing (no flag, and the label names no colour)."""
        return self.group != "flags" and not re.search(rf"\b{HUES}\b", self.label)


def fetch_package(root: Path | str, package: tuple[str, str, str, str]) -> Path:
    """Find an npm tarball in `root`, or download it with `npm pack`; package is (name, version, file, SHA-256).

    Raises RuntimeError where npm is missing or fails, ValueError where the tarball is not the pinned one.
    """
    name, version, file, sha256 = package
    path = Path(root) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                f"{path} is missing and npm is not installed; install Node.js (npm) or download "
                f"{name}@{version} from the npm registry to {path}"
            )
        command = [npm, "pack", f"{name}@{version}", "--silent"]
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            raise RuntimeError(f"`npm pack {name}@{version}` failed: {done.stderr.strip() or 'no file written'}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, not {sha256}; delete it and run again")
    return path


def fetch(root: Path | str) -> tuple[Path, Path]:
    """Find or download the two tarballs, pictures and labels; errors as `fetch_package`."""
    return fetch_package(root, PICTURES), fetch_package(root, LABELS)


def members(tarball: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffixes):
                data = archive.extractfile(member)
                assert data is not None  # a regular file always has one
                yield member.name, data.read()


def _key(hexcode: str) -> str:
    """One spelling of a hexcode: lower case, no variation selector or cancel tag, no leading zeros, dashes."""
    parts = hexcode.lower().replace("_", "-").split("-")
    return "-".join(p.lstrip("0") for p in parts if p not in ("fe0f", "e007f"))


def base_name(label: str) -> str:
    """The label without skin tone, gender, hour, phase, side or plain colour: 'running' for all who run."""
    head, _, rest = label.partition(": ")
    rest = ", ".join(part for part in rest.split(", ") if part and not TONE.fullmatch(part))
    name = f"{head}: {rest}" if rest else head
    for pattern, base in FAMILIES:
        if pattern.match(name):
            return pattern.sub(base, name)
    if head in ("man", "woman", "person"):
        return f"person: {rest}" if rest else "person"
    return GENDER.sub("", name)


def stable_fraction(text: str) -> float:
    """A stable number in [0, 1) from text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def is_held_out(base: str, subgroup: str) -> bool:
    """Whether a base is kept out of all training: a tenth by hash; of the birds, `HELD_OUT_BIRDS` and no other."""
    if subgroup == "animal-bird" and base not in BIRD_PARTS:
        return base in HELD_OUT_BIRDS
    return stable_fraction(f"split:{base}") < HELD_OUT_SHARE


def read_emoji(pictures: Path, labels: Path) -> list[Emoji]:
    """Read the emoji in the two tarballs, ordered by hexcode; ValueError where under 99% of the files have a label."""
    texts = {
        Path(name).parent.name: json.loads(data)
        for name, data in members(labels, ("/en/data.json", "/meta/groups.json"))
    }
    names = texts["meta"]
    entries = {
        _key(entry["hexcode"]): (entry, parent)
        for parent in texts["en"]
        for entry in (parent, *parent.get("skins", ()))
    }
    found: dict[str, Emoji] = {}
    unmatched = []
    for name, webp in sorted(members(pictures, (".webp",))):
        stem = Path(name).stem
        key = _key(stem)
        if key not in entries:
            unmatched.append(stem)
        elif key not in found:  # a few emoji are there twice, under two spellings
            entry, parent = entries[key]
            base = base_name(parent["label"])
            subgroup = names["subgroups"].get(str(parent.get("subgroup")), "")
            found[key] = Emoji(
                stem,
                entry["label"],
                tuple(parent.get("tags", ())),
                names["groups"].get(str(parent.get("group")), ""),
                subgroup,
                base,
                is_held_out(base, subgroup),
                webp,
            )
    if len(unmatched) > 0.01 * (len(found) + len(unmatched)):
        raise ValueError(f"{len(unmatched)} pictures of {pictures} have no label in {labels}, e.g. {unmatched[:5]}")
    log.info("%d emoji with labels, %d without: %s", len(found), len(unmatched), unmatched)
    return [found[key] for key in sorted(found)]


def load_emoji(root: Path | str) -> list[Emoji]:
    """Fetch where needed and read all emoji; see `fetch` and `read_emoji` for errors."""
    return read_emoji(*fetch(root))
