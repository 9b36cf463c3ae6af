"""spknet doctor: what it finds on this machine, and what it says of machines where something is missing."""

import json
import platform
import resource

import pytest

from spknet import cli
from spknet.use import doctor


def test_two_ranks_meet_over_gloo():
    assert doctor.gloo() == doctor.Finding("gloo", "ok", "an all-reduce of 2 ranks")


def test_a_rank_that_fails_is_quoted():
    found = doctor.all_reduce("no_such_backend", 2, "do this")
    assert found.state == "error" and "no_such_backend" in found.found and found.remedy == "do this"


def test_ranks_that_do_not_meet_end_in_time(monkeypatch):
    monkeypatch.setattr(doctor, "RANK", "import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "PATIENCE", 0.1)
    assert doctor.all_reduce("gloo", 2, "").found == "2 ranks have not met within 0.1 s"


def test_every_check_of_this_machine_and_the_exit_status(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", [check for check in doctor.CHECKS if check.__name__ not in ("gloo", "nccl")])
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["python", "torch", "torchaudio", "GPUs", "/dev/shm", "open files", "git", "SLURM", "ffmpeg", "disk"]
    assert [one["name"] for one in found] == names
    assert all(bool(one["remedy"]) == (one["state"] != "ok") for one in found)
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.2")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "error    python      3.9.2\n" in said and "-> install Python 3.10 or later" in said


@pytest.mark.parametrize(
    "version, cuda, said",
    [
        ("2.11.0+cu130", "13.0", None),
        ("2.11.0+cpu", None, None),
        ("2.11.0", None, None),
        ("2.11.0+cu130", "12.8", "2.11.0+cu130 is for CUDA 13.0, torch for 12.8"),
        ("2.9.1+cu128", "12.8", "2.9.1+cu128; expected 2.11"),
    ],
)
def test_torchaudio_goes_with_torch(version, cuda, said):
    found = doctor.audio_fits(version, cuda, "do this")
    assert (found.state, found.remedy) == (("error", "do this") if said else ("ok", "")) and found.found == (
        said or version
    )


def test_without_torch_the_rest_is_still_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    found = {one.name: one for one in doctor.examine()}
    assert found["torch"].state == "error" and found["torch"].remedy == "pip install 'torch>=2.11,<2.15'"
    assert not {"torchaudio", "GPUs", "gloo", "nccl"} & set(found) and found["python"].state == "ok"


def test_missing_and_broken_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in (doctor.git, doctor.ffmpeg, doctor.slurm):
        found = check()
        assert (found.state, found.found) == ("warning", "not on the PATH") and found.remedy
    for name, text in {"git": "#!/bin/sh\necho broken >&2; exit 3\n", "ffmpeg": "no program"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    assert doctor.git().found == f"{tmp_path}/git does not work: broken"
    assert f"{tmp_path}/ffmpeg does not run" in doctor.ffmpeg().found


def test_little_room_and_few_files(tmp_path):
    assert doctor.shared_memory(str(tmp_path), least=2**70).state == "warning"
    assert "--shm-size 8g" in doctor.shared_memory(str(tmp_path / "none")).remedy
    assert doctor.disk(str(tmp_path), least=2**70).state == "warning" and doctor.disk(str(tmp_path), 1).state == "ok"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        found = doctor.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.state, found.found) == ("warning", "at most 1024") and found.remedy.startswith("ulimit -n 4096")


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(doctor, "CHECKS", [broken])
    (found,) = doctor.examine()
    assert (found.name, found.state, found.found) == ("broken", "error", "ZeroDivisionError: by zero")
