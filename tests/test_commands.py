"""Every command with wrong input: one sentence, exit status 2, no traceback, nothing half-written."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spknet import cli
from spknet.cli import COMMANDS
from tests.conftest import write_corpus
from tools.bench.__main__ import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for group in COMMANDS.values() for name in group]

# Of each command: its words, with IN where a file or folder that it reads stands, and OUT for what it writes.
READS = {
    "lists": ["--root", "CORPUS", "--csv", "IN", "--out", "OUT"],
    "pack": ["--list", "IN", "--root", "CORPUS", "--out", "OUT"],
    "check": ["IN"],
    "stats": ["IN"],
    "stage": ["IN", "OUT"],
    "train": ["--data.train_list", "IN", "--data.train_root", "CORPUS", "--run_dir", "OUT"],
    "convert": ["IN", "OUT.safetensors"],
    "export": ["IN", "OUT", "--to", "onnx"],
    "trials": ["--list", "IN", "--all_speakers", "--out", "OUT"],
    "evaluate": ["--checkpoint", "IN", "--trials", "CORPUS/test_list.txt", "--root", "CORPUS", "--out", "OUT"],
    "embed": ["--checkpoint", "IN", "--list", "CORPUS/train_list.txt", "--root", "CORPUS", "--out", "OUT"],
    "compare": ["IN", "IN"],
    "verify": ["CORPUS/voice.wav", "CORPUS/voice.wav", "--checkpoint", "IN"],
    "enroll": ["Anna", "CORPUS/voice.wav", "--checkpoint", "IN", "--to", "OUT"],
    "identify": ["CORPUS/voice.wav", "--checkpoint", "CORPUS", "--among", "IN"],
    "card": ["IN"],
    "info": ["IN"],
    "page": ["IN"],
    "sweep": ["IN", "--dry-run"],
    "status": ["IN"],
    "results": ["IN"],
    "logs": ["IN"],
    "cancel": ["IN"],
    "resubmit": ["IN"],
    "submit": ["--executor", "local", "--", "--config", "IN", "--run_dir", "OUT"],
}
KINDS = ["nowhere", "folder", "empty", "latin1", "page", "deep", "long", "utf16", "pipe", "circle", "device"]
NO_INPUT = {
    "musan",
    "voxceleb",
    "synth",
    "recipes",
    "bench",
    "voxceleb-trainer",
    "doctor",
}  # downloads, or nothing to read


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A small corpus, and inputs that are no good."""
    folder = tmp_path_factory.mktemp("wrong")
    write_corpus(folder / "corpus", speakers=2, utterances=2)
    (folder / "folder").mkdir()
    (folder / "empty").write_text("")
    (folder / "latin1").write_bytes("Müller a.wav\n".encode("latin-1"))
    (folder / "page").write_text("<!DOCTYPE html><html><body>404</body></html>\n")
    (folder / "deep").write_text("[" * 5000)  # no parser of JSON or YAML follows it
    (folder / "long").write_text("x" * 1_000_000)
    (folder / "utf16").write_bytes("speaker path\n".encode("utf-16"))
    os.mkfifo(folder / "pipe")
    os.symlink("circle", folder / "circle")
    os.symlink("/dev/zero", folder / "device")
    return folder


def words_of(name: str, files: Path, given: str, out: Path) -> list[str]:
    places = {"IN": given, "OUT": str(out)}
    return [places.get(word, word.replace("CORPUS", str(files / "corpus"))) for word in READS[name]]


def told(capsys, words: list[str]) -> tuple[int, str]:
    """Exit status and stderr of the command in this process."""
    capsys.readouterr()
    try:
        status = cli.main(words)
    except SystemExit as left:  # argparse's own way out
        status = left.code
    return status, capsys.readouterr().err


def test_each_command_is_walked_over():
    assert set(READS) | NO_INPUT == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_a_command_is_for(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr().out
    assert status == 0 and len(said) > 100 and "Traceback" not in said


@pytest.mark.parametrize("words", [[name] for name in NAMES] + [["bench", name] for name in BENCHMARKS], ids=" ".join)
def test_every_option_says_what_it_means_and_errors_name_the_command(words, monkeypatch):
    parsers = []

    def leave(parser, *_):
        parsers.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", leave)
    with contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    assert parsers or words in (["train"], ["voxceleb-trainer"], ["bench"], ["resubmit"])  # their help is their own
    for parser in parsers:
        assert not [action.option_strings or action.dest for action in parser._actions if not action.help]
        assert parser.prog == f"spknet {' '.join(words)}"


# Of the commands without a list of options of their own: an option that is none, and the one that is near.
TYPOS = {"train": "--data.train_shard", "voxceleb-trainer": "--trainfunk", "bench": "--gpuu", "resubmit": "runs"}


@pytest.mark.parametrize("words", [[name] for name in NAMES] + [["bench", name] for name in BENCHMARKS], ids=" ".join)
def test_a_mistyped_option_is_told_with_the_nearest(words, monkeypatch, capsys):
    options = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser: options.extend(parser._actions))
    with contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    long = [o for action in options for o in action.option_strings if o.startswith("--")]
    option = max(long, default=None, key=len)
    typo = option[:-2] + option[-1] + option[-2] if option else TYPOS[words[0]]
    status, said = told(capsys, [*words, typo])
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert f"did you mean {option or ''}" in said or words == ["resubmit"], said


def test_there_is_one_parser():
    files = [path for room in ("shards", "spknet", "launch", "tools") for path in (ROOT / room).rglob("*.py")]
    made = [str(path.relative_to(ROOT)) for path in files if "(argparse.ArgumentParser):\n" in path.read_text()]
    # The second reads another program's flags.
    assert sorted(made) == ["shards/commands.py", "spknet/train/voxceleb_trainer_flags.py"]
    assert not [path for path in files if "ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("name", ["train", "voxceleb-trainer"])
def test_a_recipe_that_is_no_yaml_is_one_sentence(name, tmp_path, capsys):
    (tmp_path / "page.md").write_text("key: value\n\n```\n")
    status, said = told(capsys, [name, "--config", str(tmp_path / "page.md"), "--run_dir", str(tmp_path / "run")])
    assert status == 2 and f"{tmp_path / 'page.md'}: cannot read this YAML" in said and "Traceback" not in said


def test_info_takes_the_name_of_a_network(capsys):
    assert cli.main(["info", "ResNet34"]) == 0 and "6,634,336" in capsys.readouterr().out  # WeSpeaker's parameters


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(READS))
def test_wrong_input_is_one_sentence_and_writes_nothing(name, kind, files, tmp_path, capsys):
    out = tmp_path / "out"
    status, said = told(capsys, [name, *words_of(name, files, str(files / kind), out)])
    if kind == "folder" and name in ("status", "results", "cancel", "resubmit") and status == 0:
        return  # a folder without runs is what they may be given
    if name == "check":  # what is no data set is a damaged one: status 1, told with the damage
        assert status == 1 and "Traceback" not in said
        return
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("usage:", "  "))]
    assert "Traceback" not in said and 1 <= len(lines) <= 2 and len(said) < 5000, said
    assert name == "train" or not out.exists() or not any(p.is_file() for p in out.rglob("*")), list(out.rglob("*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="a root-only file system is mounted")
@pytest.mark.parametrize("name", ["lists", "pack", "trials", "synth"])
def test_a_read_only_target_is_named(name, files, tmp_path, capsys):
    good = {
        "lists": ["--root", str(files / "corpus"), "--pattern", "{speaker}/*/*.wav"],
        "pack": ["--list", str(files / "corpus/train_list.txt"), "--root", str(files / "corpus")],
        "trials": ["--list", str(files / "corpus/train_list.txt"), "--all_speakers"],
        "synth": ["--train-speakers", "2", "--test-speakers", "2"],
    }[name]
    target = tmp_path / "read_only"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(target)], check=True)
    try:
        status, said = told(capsys, [name, *good, "--out", str(target / "out")])
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert status == 2 and "read-only" in said.lower() and "Traceback" not in said


def test_an_unknown_command_names_the_nearest(capsys):
    assert told(capsys, ["evalute"]) == (2, "error: unknown command 'evalute'; did you mean evaluate?\n")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"]], ids=" ".join)
def test_output_that_cannot_be_written_or_that_nobody_reads_is_no_traceback(words):
    command = [sys.executable, "-m", "spknet", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and not done.stderr


def test_version_and_module(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("spknet 0.")
    done = subprocess.run([sys.executable, "-m", "spknet", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("spknet 0.")


def test_ctrl_c_while_a_command_is_imported_is_told(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert told(capsys, ["evaluate"]) == (130, "stopped by Ctrl-C\n")


def test_ctrl_c_leaves_with_130_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "tools.synth", "--out", str(tmp_path / "made"), "--train-speakers", "2000"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True, "start_new_session": True}
    # A shell's background job, as these tests may be, has the signal ignored.
    process = subprocess.Popen(
        command, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **pipes
    )
    end = time.monotonic() + 60
    while not (tmp_path / "made").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said, said
