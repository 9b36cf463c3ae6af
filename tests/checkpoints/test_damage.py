"""Damaged checkpoints, and what lies in a checkpoint's place: named, never used, never a traceback."""

import gzip
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.file import CheckpointError, newest, read, save
from spknet.checkpoints.network import load_network
from spknet.errors import UserError
from spknet.train.lock import RunError, hold
from tests.train.full_disk import on_a_small_disk

BEFORE = Path(__file__).parents[1] / "reference/before/run/checkpoints/step-00000003.pt"
SEED = int(os.environ.get("SPKNET_DAMAGE_SEED", "7"))


def damaged(content, generator):
    """The content after one of eight accidents; always another content."""
    size = len(content)
    at, n = generator.randrange(size), generator.choice([1, 3, 64, 4096])
    other = generator.randrange(size)
    kinds = [
        lambda: content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :],  # a bit
        lambda: content[:at] + bytes(n) + content[at + n :],  # a block that was never written
        lambda: content[:at] + generator.randbytes(n) + content[at + n :],
        lambda: content[:at],  # cut
        lambda: content[:at] + content[at + n :],  # bytes lost
        lambda: content[:at] + generator.randbytes(n) + content[at:],  # bytes added
        lambda: content + generator.randbytes(n),
        lambda: content[:at] + content[other : other + n] + content[at + n :],  # a block in the wrong place
    ]
    result = generator.choice(kinds)()
    return result if result != content else damaged(content, generator)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_a_hundred_random_damages_are_all_named_and_the_checkpoint_before_is_used(tmp_path):
    state = read(BEFORE)
    save(tmp_path, state | {"step": 1}, keep=0)
    path = save(tmp_path, state, keep=0)
    content, generator = path.read_bytes(), random.Random(SEED)
    for _ in range(100):
        path.write_bytes(damaged(content, generator))
        with pytest.raises(CheckpointError, match=r"step-00000003\.pt is (damaged|not a checkpoint)") as error:
            read(path)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    said = []
    used, found = newest(tmp_path, said.append)
    assert used.name == "step-00000001.pt" and found["step"] == 1 and len(said) == 1
    path.write_bytes(content)
    assert equal(read(path), {"format": checkpoint.FORMAT, **state})


def test_a_hundred_random_damages_to_a_checkpoint_without_a_seal_change_no_number_unnoticed(tmp_path):
    whole, content, path = read(BEFORE), BEFORE.read_bytes(), tmp_path / "a.pt"
    generator, noticed = random.Random(SEED), 0
    for _ in range(100):
        path.write_bytes(damaged(content, generator))
        try:
            assert equal(read(path), whole)  # a byte of the archive that means nothing
        except CheckpointError as error:
            noticed += 1
            assert "weights_only" not in str(error) and "\n" not in str(error)
    assert noticed > 50  # the rest hit bytes that mean nothing: padding, times


def test_a_checkpoint_that_somebody_has_written_anew_has_no_seal_and_is_read(tmp_path):
    path = save(tmp_path, {"step": 1}, keep=0)
    torch.save(read(path) | {"step": 2}, path)
    assert read(path)["step"] == 2


def test_every_byte_of_the_seal_counts(tmp_path):
    path = save(tmp_path, {"step": 1}, keep=0)
    content = path.read_bytes()
    for place in range(1, checkpoint.SEAL_BYTES + 3):  # the seal and the two bytes of its length
        path.write_bytes(content[:-place] + bytes([content[-place] ^ 1]) + content[len(content) - place + 1 :])
        with pytest.raises(CheckpointError, match="its checksum does not fit"):
            read(path)


class Program:
    def __reduce__(self):
        return (print, ("ran",))


IMPOSTORS = {
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "it is a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page"),
    "gzip": (gzip.compress(b"weights"), "gzip archive; unpack it"),
    "an empty file": (b"", "it is empty"),
    "zeros": (bytes(5000), "torch cannot read its content"),
    "text": (b"weights: none", "torch cannot read its content"),
    "another zip": (b"PK\x05\x06" + bytes(18), "torch cannot read its content"),
}


@pytest.mark.parametrize("case", IMPOSTORS)
def test_what_lies_in_a_checkpoints_place_is_named(case, tmp_path):
    content, expected = IMPOSTORS[case]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    for use in (read, load_network):
        with pytest.raises(CheckpointError) as error:
            use(path)
        assert expected in str(error.value) and str(path) in str(error.value)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_with_code_is_refused_without_torchs_advice(old_format, tmp_path, capfd):
    path = tmp_path / "evil.pt"
    torch.save({"model": Program()}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(
        CheckpointError, match=r"evil.pt is damaged or not a checkpoint: it holds a Python object \(print\)"
    ) as error:
        read(path)
    assert "weights_only" not in str(error.value) and "ran" not in capfd.readouterr().out


def test_folders_pipes_and_missing_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, expected in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a pipe"),
        (tmp_path / "no", "no such checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            read(path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read(tmp_path / "file/below")


def test_a_file_that_cannot_be_read_at_all_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    path = save(tmp_path, {"step": 1}, keep=0)
    before = save(tmp_path, {"step": 2}, keep=0)

    def fail(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "check_sums", fail)
    with pytest.raises(UserError, match="permission denied") as error:
        newest(tmp_path, print)
    assert not isinstance(error.value, CheckpointError) and before.exists()


def test_a_full_disk_before_and_after_the_first_checkpoint_is_one_sentence(tmp_path):
    said = on_a_small_disk(
        tmp_path,
        """
        import torch
        from spknet.checkpoints.file import CheckpointError, save, read
        small, large = {"step": 1}, {"step": 2, "model": torch.zeros(200_000)}
        for state in (large, small, large):
            try:
                save(disk, state, keep=3)
            except CheckpointError as error:
                print(error)
        fill()
        (disk / "other").mkdir() if not (disk / "other").exists() else None
        try:
            save(disk / "other", small, keep=3)
        except CheckpointError as error:
            print(error)
        print(read(disk / "checkpoints/step-00000001.pt")["step"], [p.name for p in (disk / "checkpoints").iterdir()])
        """,
    )
    first, second, third, last = said.splitlines()
    assert (
        "the disk is full" in first
        and "there is no earlier one" in first
        and "make room and start the same command" in first
    )
    assert "the disk is full" in second and "earlier checkpoints are intact" in second
    assert "the disk is full" in third and last == "1 ['step-00000001.pt']"


def test_rows_of_a_head_that_a_full_disk_does_not_take_leave_the_room_free(tmp_path):
    said = on_a_small_disk(
        tmp_path,
        """
        import torch
        from spknet.checkpoints.file import CheckpointError, path_of, save
        from spknet.checkpoints.pieces import write
        from spknet.config import LossConfig
        from spknet.losses import build_loss
        def written(step, classes):
            head = build_loss(LossConfig(name="amsoftmax", sharded=True, shards=4), 32, classes, 1)
            path = path_of(disk, step)
            try:
                save(disk, {"step": step, "head": write(path, head, torch.optim.SGD(head.shards(), lr=1))}, keep=0)
            except CheckpointError as error:
                print(error)
        written(1, 400)  # 50 kB
        written(2, 1600)  # 200 kB: the second or third piece is too much
        fill()
        written(3, 4)
        free()
        written(4, 400)
        print(sorted(str(p.relative_to(disk / "checkpoints")) for p in (disk / "checkpoints").rglob("*") if p.suffix != ".json"))
        """,
    )
    second, third, last = said.splitlines()
    for message, step in ((second, 2), (third, 3)):
        assert f"cannot write checkpoint {tmp_path}/checkpoints/step-0000000{step}.pt: the disk is full" in message
        assert "earlier checkpoints are intact: make room and start the same command again" in message
    rows = [f"rows-{first:09d}-{first + 100:09d}.pt" for first in range(0, 400, 100)]
    expected = [f"step-0000000{step}{name}" for step in (1, 4) for name in ("", ".pt", *(f"/{row}" for row in rows))]
    assert last == str(sorted(expected))


def test_a_checkpoint_is_not_put_into_a_folder_that_another_run_has_taken(tmp_path):
    with hold(tmp_path) as owner:
        save(tmp_path, {"step": 1}, keep=1, check=owner.check)
        (tmp_path / "lock").write_text('{"token": "x", "host": "elsewhere", "pid": 3, "job": null}')
        with pytest.raises(RunError, match="taken over by a run on elsewhere"):
            save(tmp_path, {"step": 2}, keep=1, check=owner.check)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_torch_alone_reads_a_sealed_checkpoint(tmp_path):
    path = save(tmp_path, {"step": 3, "model": {"w": torch.arange(5)}}, keep=0)
    assert torch.load(path, weights_only=True, mmap=True)["model"]["w"].tolist() == [0, 1, 2, 3, 4]
    assert shutil.which("unzip") is None or os.system(f"unzip -tq {path} >/dev/null") == 0
