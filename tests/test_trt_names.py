"""What `trt_builder` and `runtime` use of TensorRT exists in TensorRT 11.4, with the arguments given.

TensorRT 10 and 11 need a GPU even to define a network, and here there is none. So their Python bindings are imported
over empty libraries: every class, member and signature can be looked up then, and nothing called. The networks
themselves are built with TensorRT-RTX: where a member's signature is the same in both, what the one accepts the other
takes as well.

Not proved here: what TensorRT does with a network once it has accepted its layers; that a method's C++ side has not
been removed while its binding stayed; the types of arguments in calls that only a GPU run makes (their number and
names are checked, and mypy sees those that have a type).
"""

import ast
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BINDINGS = "tensorrt-cu13-bindings==11.4.0.106"
STUBS = "tensorrt-stubs==10.13.0.35.1"

# Of TensorRT 8.6 alone; only flavour.py may name them, where a network is weakly typed.
ONLY_8_6 = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
    "TacticSource.EDGE_MASK_CONVOLUTIONS", "TacticSource.JIT_CONVOLUTIONS", "get_plugin_creator", "create_plugin",
    "add_plugin_v2",
}  # fmt: skip
# Of TensorRT-RTX alone, which builds for GPUs that the machine does not have; only flavour.py may name them.
ONLY_RTX = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip

# Runs in an interpreter of its own: two TensorRT bindings in one process clash over the names of their C++ classes.
# Of a property it keeps its setter's signature, so that one that cannot be set is told from one that can.
DESCRIBE = """
import importlib, json, sys

def text(member):
    if isinstance(member, property):
        return "property " + ((member.fset and member.fset.__doc__) or "read-only").strip()
    return getattr(member, "__doc__", None) or ""

module = importlib.import_module(sys.argv[1])
classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
print(json.dumps({
    "names": sorted(vars(module)),
    "functions": {name: text(value) for name, value in vars(module).items() if callable(value)},
    "classes": {
        name: {m: text(getattr(value, m)) for m in dir(value) if not m.startswith("_") or m == "__init__"}
        for name, value in classes.items()
    },
}))
"""

Api = dict[str, Any]


def describe(module: str, **environment: str) -> Api:
    """Names, functions and classes of an installed TensorRT module, looked up in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, module], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    api: Api = json.loads(re.sub(r"tensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\.", "", done.stdout))
    return api


@pytest.fixture(scope="module")
def trt11(tmp_path_factory: pytest.TempPathFactory) -> Api:
    """The API of TensorRT 11.4, its bindings imported over libraries whose functions all return null."""
    if find_spec("tensorrt_bindings") is None or installed("tensorrt-cu13-bindings") < (11, 4):
        pytest.skip(f"the Python bindings of TensorRT 11.4 are not installed: pip install --no-deps {BINDINGS}")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the empty libraries with that TensorRT's bindings load")
    folder = tmp_path_factory.mktemp("empty")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for library in ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / library, source], check=True)
    return describe("tensorrt_bindings", LD_LIBRARY_PATH=str(folder))


@pytest.fixture(scope="module")
def rtx() -> Api:
    """The API of TensorRT-RTX, with which the other tests build every network."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    return describe("tensorrt_rtx")


def installed(package: str) -> tuple[int, ...]:
    """A package's version; empty where it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".") if part.isdigit())
    except importlib.metadata.PackageNotFoundError:
        return ()


# -- what the code uses -----------------------------------------------------------------------------------------------


@lru_cache
def sources() -> dict[str, ast.Module]:
    files = sorted([*ROOT.glob("trt_builder/*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("plugins/*.py")])
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}


def chain(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """ "X.Y" for an expression `trt.X.Y`, in which `trt` may be an attribute (`self.trt`) or another name for it."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        before = chain(node.value, aliases)
        if before is not None:
            return f"{before}.{node.attr}".lstrip(".")
        return "" if node.attr in ("trt", "_trt") else None
    return None


def aliases_in(function: ast.AST) -> dict[str, str]:
    """Local names of the module and of its parts: `trt_, kinds = self.trt, self.trt.PluginFieldType`."""
    aliases = {"trt": "", "trt_": ""}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
            for target, value in pairs:
                named = chain(value, aliases)
                if isinstance(target, ast.Name) and named is not None:
                    aliases[target.id] = named
    return aliases


def functions(tree: ast.Module) -> Iterator[tuple[ast.AST, dict[str, str]]]:
    """Every function of a file with its names for parts of the module, and the file itself."""
    yield tree, {"trt": "", "trt_": ""}
    yield from ((node, aliases_in(node)) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def module_names() -> dict[str, str]:
    """Every "X" and "X.Y" that is used of the module, and a place where it is; no dunders."""
    names = {}
    for file, tree in sources().items():
        for function, aliases in functions(tree):
            for node in ast.walk(function):
                name = chain(node, aliases) if isinstance(node, ast.Attribute) else None
                if name and "__" not in name:
                    names[name] = f"{file}:{node.lineno}"  # type: ignore[attr-defined]
    return names


def member_names() -> dict[str, str]:
    """Every name that stands after a dot or, for `getattr`, in quotes, and a place where it does."""
    return {
        name: f"{file}:{node.lineno}"
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Constant)
        and isinstance(name := node.attr if isinstance(node, ast.Attribute) else node.value, str)
        and name.isidentifier()
        and not name.startswith("_")
    }


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File, name and call, of everything called by a name after a dot; "X" for `trt.X(…)`, ".x" for others."""
    for file, tree in sources().items():
        for function, aliases in functions(tree):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    yield file, chain(node.func, aliases) or f".{node.func.attr}", node


# -- what TensorRT has ------------------------------------------------------------------------------------------------


def signatures(text: str) -> list[str]:
    """The signatures in a binding's docstring: one, or one for each overload; a property's setter, or "read-only"."""
    if text.startswith("property"):
        return text.splitlines()[:1]
    found = re.findall(r"^(?:\d+\. )?(\w+\(.*\) -> .*)$", text, re.MULTILINE)
    return [line for line in found if "*args" not in line]


def parameters(signature: str) -> list[tuple[str, bool]]:
    """Name of each parameter of a signature, less `self`, and whether it has a default."""
    inside, depth, parts = signature[signature.index("(") + 1 : signature.rindex(") -> ")], 0, [""]
    for letter in inside:
        depth += (letter in "([<") - (letter in ")]>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    named = [(part.partition(":")[0].strip(), " = " in part) for part in parts if part.strip()]
    return [parameter for parameter in named if parameter[0] != "self"]


def accepts(signature: str, call: ast.Call) -> bool:
    """Whether a call has neither too many arguments nor too few, and only keywords that there are."""
    names = parameters(signature)
    given = [name for name, _ in names[: len(call.args)]] + [str(k.arg) for k in call.keywords]
    if len(call.args) > len(names) or len(set(given)) < len(given):
        return False
    needed = {name for name, default in names if not default}
    return needed <= set(given) <= {name for name, _ in names}


def members(api: Api, name: str) -> dict[str, str]:
    """The classes that have a member, with its docstring."""
    return {cls: of[name] for cls, of in api["classes"].items() if name in of}


# -- the proof --------------------------------------------------------------------------------------------------------


def missing_from(api: Api) -> list[str]:
    """What is used of the module and not in it."""
    found = []
    for name, place in module_names().items():
        owner, _, member = name.partition(".")
        there = owner in api["names"] and (not member or member.partition(".")[0] in api["classes"].get(owner, ()))
        if not there:
            found.append(f"{place}: {name}")
    return found


def test_everything_used_of_the_module_exists(trt11: Api) -> None:
    found = [line for line in missing_from(trt11) if line.split(": ")[1] not in ONLY_8_6 | ONLY_RTX]
    assert not found
    assert len(module_names()) > 20, "the search for names is broken"


def test_names_of_one_version_stay_in_the_flavour() -> None:
    special = {name.rpartition(".")[2] for name in ONLY_8_6 | ONLY_RTX}
    for file, tree in sources().items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert file in ("trt_builder/flavour.py", "trt_builder/plugin_layers.py") or not used & special, file


def test_members_are_the_same_as_in_the_version_that_is_tested(trt11: Api, rtx: Api) -> None:
    different, special = [], ONLY_RTX | ONLY_8_6
    for name, place in member_names().items():
        ours, theirs = members(rtx, name), members(trt11, name)
        if ours and not theirs and name not in special:
            different.append(f"{place}: {name}")
        for cls in ours.keys() & trt11["classes"].keys():
            same = cls in theirs and set(signatures(ours[cls])) <= set(signatures(theirs[cls]))
            if not same and name not in special:
                different.append(f"{place}: {cls}.{name} {signatures(ours[cls])} {signatures(theirs.get(cls, ''))}")
    assert not different


# What some expressions are, wherever they stand.
RECEIVERS = {
    "network": "INetworkDefinition", "builder": "Builder", "_engine": "ICudaEngine", "_context": "IExecutionContext",
    "_runtime": "Runtime", "inspector": "EngineInspector",
}  # fmt: skip


def test_members_of_known_objects_exist(trt11: Api) -> None:
    checked, missing = 0, []
    for file, tree in sources().items():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Attribute)):
            receiver = node.value
            last = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", None)
            if last in RECEIVERS:
                checked += 1
                if node.attr not in trt11["classes"][RECEIVERS[last]]:
                    missing.append(f"{file}:{node.lineno}: {RECEIVERS[last]}.{node.attr}")
    assert not missing
    assert checked > 20, "the search for members is broken"


PLAIN = {name for kind in (str, bytes, list, dict, set, tuple, int, float, Path, io.BytesIO) for name in dir(kind)}


def wrong_calls(api: Api) -> list[str]:
    """Calls whose arguments fit no signature of that name; calls of Python's or the code's own names are not seen."""
    wrong = []
    own = {n.name for tree in sources().values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for file, name, call in calls():
        if (
            name[1:] in own
            or any(isinstance(a, ast.Starred) for a in call.args)
            or any(k.arg is None for k in call.keywords)
        ):
            continue
        if name.startswith("."):
            found = {} if name[1:] in PLAIN else members(api, name[1:])
            texts = [text for text in found.values() if not text.startswith("property")]
        else:
            texts = [api["classes"].get(name, {}).get("__init__") or api["functions"].get(name, "")]
        known = [signature for text in texts for signature in signatures(text)]
        if known and not any(accepts(signature, call) for signature in known):
            wrong.append(f"{file}:{call.lineno}: {name} takes {known}")
    return wrong


def test_calls_have_the_arguments_that_signatures_name(trt11: Api) -> None:
    assert not wrong_calls(trt11)


def test_the_proof_can_fail(trt11: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
def define(self, network, tensor):
    kinds = self.trt.ElementWiseOperation
    network.add_elementwise(tensor, tensor, kinds.SUM)
    network.add_elementwise(tensor, kinds.PLUS)
    network.add_shuffle(tensor, order=(0, 1))
    self.trt.Nonsense()
"""
    monkeypatch.setitem(globals(), "sources", lambda: {"code.py": ast.parse(code)})
    assert sorted(missing_from(trt11)) == ["code.py:5: ElementWiseOperation.PLUS", "code.py:7: Nonsense"]
    assert [line.split(" takes")[0] for line in dict.fromkeys(wrong_calls(trt11))] == [
        "code.py:5: .add_elementwise", "code.py:6: .add_shuffle",
    ]  # fmt: skip


@pytest.mark.slow
def test_types_against_the_stubs_of_tensorrt_10(tmp_path: Path) -> None:
    """mypy over both packages, with the signatures of TensorRT 10.13 for what is typed as TensorRT's."""
    stubs = tmp_path / "stubs"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(stubs), STUBS]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{STUBS} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    mend_stubs(stubs / "tensorrt_bindings" / "tensorrt.pyi")
    assert mypy_errors(stubs, ["trt_builder", "runtime"]) == []
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import tensorrt as trt\n\ndef f(n: trt.INetworkDefinition) -> None:\n    n.add_shufle(3)\n")
    assert len(mypy_errors(stubs, [str(wrong)])) == 1


def mend_stubs(path: Path) -> None:
    """Make the stubs valid Python, and say what the bindings convert by themselves: sequences and numpy arrays."""
    text = path.read_text().replace(", in: list[", ", in_: list[")
    text = text.replace("power: Weights = None, channel_axis: int)", "power: Weights = None, channel_axis: int = 0)")
    text = re.sub(r"(?<=: |> )(Dims|Permutation)\b", "typing.Sequence[int]", text)
    text = re.sub(r"(?<=: |> )list\[", "typing.Sequence[", text)
    path.write_text(re.sub(r"(?<=: |> )Weights\b", "Weights | numpy.ndarray | None", text))


def mypy_errors(stubs: Path, what: list[str]) -> list[str]:
    """mypy's errors in the given files and packages, those of the stubs themselves left out."""
    options = ["--cache-dir", str(stubs / "cache"), "--follow-imports", "silent", "--ignore-missing-imports"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *what],
        env=os.environ | {"MYPYPATH": str(stubs)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " error: " in line]
    assert not any(line.endswith("[syntax]") for line in lines), lines
    return [line for line in lines if not line.startswith(str(stubs))]
