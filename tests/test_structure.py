"""The rules that keep the code simple: imports point one way, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"shards": {"shards"}, "spknet": {"shards", "spknet"}, "launch": {"shards", "spknet", "launch"}}
OURS = {"shards", "spknet", "launch", "tools", "tests"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_one_way():
    wrong = []
    for package, allowed in MAY_IMPORT.items():
        for path in (ROOT / package).rglob("*.py"):
            wrong += [f"{path}: {name}" for name in (imported(path) & OURS) - allowed]
    assert not wrong


def test_shards_never_imports_torch():
    assert [p for p in (ROOT / "shards").rglob("*.py") if imported(p) & {"torch", "torchaudio"}] == []


def test_the_command_starts_without_torch():
    code = "import sys, spknet.cli, shards.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_have_at_most_400_lines():
    files = [p for p in ROOT.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    assert [f"{p}: {n}" for p in files if (n := len(p.read_text().splitlines())) > 400] == []
