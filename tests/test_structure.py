"""The rules that keep the code simple: imports point one way and never in a circle, files and functions stay short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Lowest first. A file imports from its own floor's room or from floors below; imports inside functions count.
FLOORS = [
    ["shards"],
    ["spknet.errors", "spknet.messages", "spknet.rng", "spknet.config", "spknet.options", "spknet.recipes"],
    ["spknet.parallel"],
    ["spknet.data", "spknet.models"],
    ["spknet.losses"],
    ["spknet.checkpoints"],
    ["spknet.evaluate"],
    ["spknet.use"],
    ["spknet.train"],
    ["spknet", "spknet.distributed", "spknet.cli", "spknet.__main__"],
    ["launch"],
    ["tools"],
]
LINES, FUNCTION_LINES, PARAMETERS, FILES = 400, 50, 6, 12
# Exceptions, each with its reason.
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS: dict[str, str] = {
    "spknet/data/sampler.py:__init__": "the settings of an epoch, each an option of its own, given by name",
}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package in ("shards", "spknet", "launch", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, anywhere in it but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in full}
    return names & set(known)


def floor_of(module: str) -> int:
    fits = [(len(room), i) for i, floor in enumerate(FLOORS) for room in floor if (module + ".").startswith(room + ".")]
    return max(fits)[1]


def test_imports_point_one_way():
    known = modules()
    wrong = [
        f"{module} imports {other}"
        for module, path in known.items()
        for other in imports(path, known)
        if floor_of(other) > floor_of(module)
    ]
    assert not wrong


def test_no_import_goes_in_a_circle():
    known = modules()
    arrows = {module: imports(path, known) - {module} for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        done.add(module)
        return next((circle for other in sorted(arrows[module]) if (circle := visit(other, [*way, module]))), [])

    circles = [" -> ".join(circle) for module in sorted(known) if (circle := visit(module, []))]
    assert not circles


def test_shards_never_imports_torch():
    roots = {"torch", "torchaudio"}
    for path in (ROOT / "shards").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} & roots, path


def test_the_command_starts_without_torch():
    code = "import sys, spknet, spknet.cli, spknet.options, shards.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_and_functions_stay_short():
    found = []
    for path in [
        p for folder in ("shards", "spknet", "launch", "tools", "tests") for p in (ROOT / folder).rglob("*.py")
    ]:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if len(text.splitlines()) > LINES:
            found.append(f"{name}: {len(text.splitlines())} lines")
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            where = f"{name}:{node.name}"
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES and where not in LONG_FUNCTIONS:
                found.append(f"{where}: {length} lines")
            a = node.args
            count = len([x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls", "ctx")])
            if count > PARAMETERS and where not in MANY_PARAMETERS:
                found.append(f"{where}: {count} parameters")
    assert not found, "\n".join(found)


def test_few_files_lie_directly_in_the_package():
    assert len(list((ROOT / "spknet").glob("*.py"))) <= FILES


def test_exceptions_are_still_needed():
    known = {
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(LONG_FUNCTIONS) | set(MANY_PARAMETERS) <= known


# Private names of other libraries, each with its reason.
PRIVATE = {
    "torch._C._distributed_c10d._dump_nccl_trace": "there is no public one; used where NCCL has stalled, and may fail",
    "nn.modules.batchnorm._BatchNorm": "what all of torch's BatchNorms are; torch's own pages name it",
}


def test_no_private_name_of_torch_is_used():
    found = set()
    for path in modules().values():
        tree = ast.parse(path.read_text())
        names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        private = re.compile(r"(torch|torchaudio|dist|F|nn)\.(\w+\.)*_(?!_)\w+(\.\w+)*")
        found |= {name for name in names if private.fullmatch(name)}
    longest = {name for name in found if not any(other.startswith(name + ".") for other in found)}
    assert longest == set(PRIVATE)
