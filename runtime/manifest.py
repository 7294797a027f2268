"""The engine folder: one plan a stage and manifest.json, which says what they were built from and vouches for them.

A plan is a program for the GPU, so only bytes whose SHA-256 stands in the manifest are ever handed out.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import reprlib
import shlex
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

SCHEMA = 2
MADE_BY = "canny2image-trt trt_builder"
NAME = "manifest.json"
STAGE_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "float": (int, float), "str | None": (str, type(None)), "str | bool": (str, bool),
}  # fmt: skip
SHAPE = {"height", "width", "samples", "steps"}
LARGEST = 2**63  # of a number in a manifest, so that it can be computed with
MOST = 1 << 20  # bytes of a manifest; a build writes some 3,000
# What a command line can leave out: other switches are "auto" there, which may be something else another time.
USUAL = {"qkv": "joined", "boundary": "channels-last", "group_norm": "auto", "steps": 20}


class EngineError(ValueError):
    """An engine folder that cannot be used here; the text is one sentence that says what to run."""


@dataclass(frozen=True)
class StagePlan:
    """One plan: the key of what it was built from, its SHA-256, its size in bytes and the seconds that it took."""

    key: str
    sha256: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """What an engine folder was built from.

    `gpu` and `capability` ("8.9") are those of the building GPU; a flavour that builds for listed `targets` ("sm89")
    has these instead. `weights` is a path, or "random:<seed>". `plugins`: those that the plans need, by name,
    with the SHA-256 of their sources.
    """

    model: str
    flavour: str
    version: str
    gpu: str | None
    capability: str | None
    targets: list[str]
    weights: str
    weights_sha256: str
    shape: dict[str, int]
    options: dict[str, str | bool]
    plugins: dict[str, str] = field(default_factory=dict)
    stages: dict[str, StagePlan] = field(default_factory=dict)
    folder: Path = Path()

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of an engine folder; raises EngineError where there is none or it is not what a build wrote."""
        path = Path(folder) / NAME
        try:
            content = json.loads(read_file(path, MOST).decode())
        except FileNotFoundError:
            what = f"{folder} holds no engines ({NAME} is missing)"
            inside = [str(path) for path in folders_in(folder)]
            todo = f"name one of {', '.join(inside)}" if inside else "run `python -m trt_builder build`"
            raise EngineError(f"{what}: {todo}.") from None
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"it cannot be read ({str(error).splitlines()[0]})") from None
        if not isinstance(content, dict) or content.pop("made_by", None) != MADE_BY:
            raise damaged(path, "trt_builder did not write it")
        schema = content.pop("schema", None)
        if (type(schema), schema) != (int, SCHEMA):
            raise damaged(path, f"its schema is {schema!r} and this version reads {SCHEMA}")
        if content.pop("sha256", None) != seal(content):
            raise damaged(path, "it was changed after it was written (its SHA-256 is not that of its content)")
        check_types(path, "", content, cls)
        if content["shape"].keys() != SHAPE or min(content["shape"].values()) < 1:
            raise damaged(path, f"its shape is {reprlib.repr(content['shape'])}")
        if content["weights"].startswith("random:") and not re.fullmatch(r"random:\d+", content["weights"]):
            raise damaged(path, f"its weights are {content['weights']!r}")
        stages = {}
        for name, entry in content["stages"].items():
            if not STAGE_NAME.fullmatch(name):
                raise damaged(path, f"{reprlib.repr(name)} is no name of a stage")
            if not isinstance(entry, dict):
                raise damaged(path, f"stages.{name} is {reprlib.repr(entry)}")
            check_types(path, f"stages.{name}.", entry, StagePlan)
            stages[name] = StagePlan(**entry)
            if not SHA256.fullmatch(stages[name].sha256):
                raise damaged(path, f"stages.{name}.sha256 is {reprlib.repr(stages[name].sha256)}")
        return cls(**{**content, "stages": stages}, folder=Path(folder))

    def save(self) -> None:
        """Write manifest.json: whole or not at all."""
        content: dict[str, Any] = {"made_by": MADE_BY, "schema": SCHEMA, **asdict(self)}
        del content["folder"]
        content["sha256"] = seal({name: content[name] for name in content if name not in ("made_by", "schema")})
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.folder / NAME, text.encode("utf-8", "backslashreplace"))  # as JSON escapes odd file names

    def with_stage(self, stage: str, plan: StagePlan) -> Manifest:
        """The same manifest with one stage's plan added or replaced."""
        return replace(self, stages={**self.stages, stage: plan})

    def plan_path(self, stage: str) -> Path:
        """Where a stage's plan lies."""
        return self.folder / f"{stage}.plan"

    def plan_bytes(self, stage: str) -> bytes:
        """A stage's plan; raises EngineError where it is missing, changed or truncated."""
        if stage not in self.stages:
            raise EngineError(f"{self.folder} has no plan of the stage {stage!r}: run {self.command()}.")
        entry, path = self.stages[stage], self.plan_path(stage)
        try:
            size = path.stat().st_size
            if path.is_file() and size != entry.bytes:
                what = f"the plan {path} has {size} bytes instead of {entry.bytes}"
                raise EngineError(f"{what}: delete it and run {self.command()}.")
            plan = read_file(path, entry.bytes)
        except OSError as error:
            raise EngineError(f"the plan {path} cannot be read ({error.strerror}): run {self.command()}.") from None
        if hashlib.sha256(plan).hexdigest() != entry.sha256:
            what = f"the plan {path} was changed after it was built (its SHA-256 is not the manifest's)"
            raise EngineError(f"{what}: delete it and run {self.command()}.")
        return plan

    def check(
        self, flavour: str, version: str, gpu: str | None, capability: str | None, weights_sha: str | None = None
    ) -> None:
        """Raise EngineError unless the plans fit this TensorRT, this GPU (name, "8.9") and the weights, where given."""
        if (self.flavour, self.version) != (flavour, version):
            what = f"is for {self.flavour} {self.version}, but this is {flavour} {version}"
        elif self.targets and (capability is None or f"sm{capability.replace('.', '')}" not in self.targets):
            what = f"is for {', '.join(self.targets)}, but this GPU is {gpu} with compute capability {capability}"
        elif not self.targets and (self.gpu, self.capability) != (gpu, capability):
            what = f"is for the GPU {self.gpu} ({self.capability}), but this is {gpu} ({capability})"
        elif weights_sha is not None and self.weights_sha256 != weights_sha:
            what = f"was built from other weights ({self.weights}, SHA-256 {self.weights_sha256[:12]}…)"
        else:
            return
        raise EngineError(f"{self.folder} {what}: run {self.command()} here.")

    def command(self) -> str:
        """The command line that builds these engines again."""
        kind, _, seed = self.weights.partition(":")
        given = {"model": self.model, "flavour": self.flavour, "target": ",".join(self.targets)}
        given |= {"random-weights": seed} if kind == "random" else {"weights": self.weights}
        given |= {
            name.replace("_", "-"): str(value)
            for name, value in (self.shape | self.options).items()
            if not isinstance(value, bool) and USUAL.get(name) != value
        }
        words = [f"--{name} {shlex.quote(value)}" for name, value in given.items() if value]
        words += ["--cond"] if any(stage.endswith("_cond") for stage in self.stages) else []
        words += ["--no-shared-prefix"] if self.options.get("shared_prefix") is False else []
        return f"`python -m trt_builder build {' '.join(words)} --output {shlex.quote(str(self.folder.parent))}`"


def folder_name(model: str, height: int, width: int, samples: int, precision: str) -> str:
    """The usual name of an engine folder; `model` may be a yaml's path."""
    return f"{Path(model).stem}-{height}x{width}-n{samples}-{precision}"


def seal(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's fields, by which damage is noticed where it would still read as a manifest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a file; raises OSError for a pipe or device, which may never end, and for more than `most` bytes."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if about.st_size > most:
        raise OSError(errno.EFBIG, f"it has {about.st_size} bytes, and {most} are the most expected", str(path))
    return path.read_bytes()


def folders_in(place: str | Path) -> list[Path]:
    """The engine folders in a folder; none where it may not be read."""
    return sorted(Path(path).parent for path in glob.glob(f"{glob.escape(str(place))}/*/{NAME}"))


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it, so that the name never holds half of it.

    Raises OSError, with the file's name and without leaving anything, where it cannot.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk it would keep others from writing
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def check_types(path: Path, where: str, content: Mapping[str, Any], kind: type) -> None:
    """Raise EngineError unless `content` has exactly the fields of the dataclass `kind`, each of its type."""
    expected = {f.name: str(f.type) for f in fields(kind) if f.name != "folder"}
    for name in sorted(expected.keys() ^ content.keys()):
        raise damaged(path, f"{where}{name} is {'missing' if name in expected else 'unknown'}")
    for name, value in content.items():
        if not fits(value, expected[name]):
            raise damaged(path, f"{where}{name} is {reprlib.repr(value)} instead of {expected[name]}")


def fits(value: Any, kind: str) -> bool:
    """Whether a value out of JSON has the type that an annotation names."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(fits(one, kind[5:-1]) for one in value)
    if kind.startswith("dict[str, ") and kind != "dict[str, StagePlan]":  # those are checked one by one
        return isinstance(value, dict) and all(fits(one, kind[10:-1]) for one in value.values())
    types = TYPES.get(kind, (dict,))
    if isinstance(value, (int, float)) and not 0 <= value < LARGEST:  # nan, too
        return False
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def damaged(path: Path, why: str) -> EngineError:
    """The error of a manifest that no build wrote like this."""
    advice = "delete the folder and run `python -m trt_builder build`"
    return EngineError(f"{path} cannot be used, because {why}: {advice}.")
