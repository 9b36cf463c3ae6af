"""The plan of the evaluation room: no circles, numpy alone where figures are made, small files and functions, a short walk."""

import ast
import sys
import threading
from pathlib import Path

import pytest

from spknet import config
from spknet.checkpoints import file as checkpoint
from spknet.evaluate import __main__ as command
from spknet.evaluate import embed, evaluation, lists, metrics, scoring, systems, trials, utterances
from tests.evaluate.test_evaluate import network, settings

ROOM = Path(command.__file__).parent
FILES = {path.stem: ast.parse(path.read_text()) for path in ROOM.glob("*.py")}
NUMPY_ALONE = ("scoring", "cohort", "systems", "calibration", "metrics", "bootstrap", "thresholds")
WALK = [  # every function that is given the list, its utterances or its scores, in the order in which they are
    ("__main__", command, "main"),
    ("evaluation", evaluation, "evaluate"),
    ("lists", lists, "open_lists"),
    ("trials", trials, "read_trials"),
    ("utterances", utterances.Sources, "locate"),
    ("embed", embed, "embed"),
    ("utterances", utterances.Sources, "read"),
    ("systems", systems.System, "scores"),
    ("scoring", scoring, "cosine"),
    ("metrics", metrics, "figures"),
]


def imports(tree) -> set[str]:
    """Every module that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inside(stem: str) -> set[str]:
    names = {name.removeprefix("spknet.evaluate.").split(".")[0] for name in imports(FILES[stem])}
    return names & set(FILES) - {stem}


def test_no_file_of_the_room_imports_itself_round_a_corner():
    left = {stem: inside(stem) for stem in FILES}
    while left:
        free = [stem for stem, needs in left.items() if not needs & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {stem: needs for stem, needs in left.items() if stem not in free}


def test_the_room_imports_nothing_that_stands_above_it():
    above = ("spknet.train", "spknet.cli", "launch", "tools")
    assert [(s, n) for s, tree in FILES.items() for n in imports(tree) if n.startswith(above)] == []


def test_figures_are_made_with_numpy_alone():
    allowed = {"numpy", "threadpoolctl", "sklearn", "spknet", *sys.stdlib_module_names} - {"argparse"}
    for stem in NUMPY_ALONE:
        found = {name.split(".")[0] for name in imports(FILES[stem])}
        assert found <= allowed, f"{stem}: {found - allowed}"
        ours = {name for name in imports(FILES[stem]) if name.startswith("spknet.") and name.count(".") == 1}
        assert ours <= {"spknet.errors", "spknet.rng", "spknet.evaluate"}, f"{stem}: {ours}"
        assert inside(stem) <= set(NUMPY_ALONE), stem


def test_files_functions_and_parameters_are_small():
    for stem, tree in FILES.items():
        assert len((ROOM / f"{stem}.py").read_text().splitlines()) <= 400
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                count = len([p for p in a.posonlyargs + a.args + a.kwonlyargs if p.arg not in ("self", "cls")])
                assert count <= 6, f"{stem}.{node.name} has {count} parameters"
                assert node.end_lineno - node.lineno < 50, (
                    f"{stem}.{node.name} has {node.end_lineno - node.lineno + 1} lines"
                )


@pytest.fixture
def visits():
    """Starts to record which of WALK's functions are called; returns the files that they stand in, stay by stay."""
    codes = {getattr(owner, name).__code__: stem for stem, owner, name in WALK}
    seen: list[str] = []

    def note(frame, event, _argument):
        if event == "call" and (stem := codes.get(frame.f_code)) and seen[-1:] != [stem]:
            seen.append(stem)

    threading.setprofile(note)
    sys.setprofile(note)
    yield seen
    sys.setprofile(None)
    threading.setprofile(None)


def test_a_lists_way_to_the_eer_passes_nine_files_and_none_three_times(corpus, tmp_path, visits):
    state = {"step": 1, "epoch": 0.0, "config": config.to_dict(settings())}
    checkpoint.save(tmp_path / "run", state | {"model": network().state_dict()}, keep=0)
    words = ["--checkpoint", str(tmp_path / "run"), "--trials", str(corpus / "test_list.txt"), "--root", str(corpus)]
    words += ["--out", str(tmp_path / "out"), "--no_pictures", "--bootstrap", "0", "--device", "cpu", "--threads", "1"]
    assert command.main(words) == 0
    assert visits == [stem for stem, _, _ in WALK]
    assert len(set(visits)) <= 9 and max(map(visits.count, visits)) <= 2
