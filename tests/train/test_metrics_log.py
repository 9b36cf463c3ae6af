"""metrics.jsonl and TensorBoard through restarts, damage and full disks."""

import json
import multiprocessing
import random
import resource
import signal
import struct
import zlib

import pytest

from spknet.errors import UserError
from spknet.train import board
from spknet.train.growing import GrowingFile
from spknet.train.lock import RunError, hold
from spknet.train.metrics_log import MetricsLog, profiler, read_metrics
from tests.train.full_disk import on_a_small_disk

FORK = multiprocessing.get_context("fork")


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def png(width, height):
    """A grey picture, made by hand (PNG specification, 11.2)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + b"\x80" * width) * height))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


def test_metrics_beyond_the_step_and_a_torn_line_are_cut(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 8})
    log.write({"step": 2, "eval": {"eer": 5.0}})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    assert log.has_evaluation(2) and not log.has_evaluation(1)
    log.write({"step": 3, "loss": 9.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2, 3] and lines[-1]["loss"] == 9.0


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": float(step)})
    log.close()
    log = MetricsLog(tmp_path, 2, tensorboard=True)
    log.write({"step": 3, "loss": 30.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_files_follow_each_other_whatever_the_clocks_say(tmp_path, monkeypatch):
    clocks = iter([2_000_000_000, 1_000_000_000, 1_500_000_000])  # each start on another machine
    now = 0.0
    monkeypatch.setattr(board.time, "time", lambda: now)
    for first in (1, 3, 5):
        now = float(next(clocks))
        log = MetricsLog(tmp_path, first - 1, tensorboard=True)
        for step in (first, first + 1, first + 2, first + 3):  # two of them are lost with the kill
            log.write({"step": step, "loss": float(10 * first + step)})
        log.file.sync()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [
        *[(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0), (5, 55.0), (6, 56.0), (7, 57.0), (8, 58.0)]
    ]


@pytest.mark.parametrize("picture_was_shown", [True, False])
def test_an_evaluation_has_its_picture_once_after_a_kill_between_line_and_picture(picture_was_shown, tmp_path):
    picture = tmp_path / "eval/step-00000002/det.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(png(7, 5))
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 2.0})
    log.write({"step": 2, "eval": {"eer": 5.0, "lists": {}}})
    if picture_was_shown:
        log.add_picture("eval/det", picture, 2)
    log = MetricsLog(tmp_path, 2, tensorboard=True)  # the one before was killed
    log.write({"step": 3, "loss": 3.0})
    log.close()
    shown = events(tmp_path)
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(e.step, e.value) for e in shown.Scalars("eval/eer")] == [(2, 5.0)]
    assert [(e.step, e.width, e.height) for e in shown.Images("eval/det")] == [(2, 7, 5)]


def lines(*steps):
    return [json.dumps({"step": step, "loss": step / 8}).encode() for step in steps]


DAMAGE = {
    "garbage": (b"\x07\x08 garbage", [1, 2, 3, 4, 5, 6]),
    "not UTF-8": (b'{"step": 9, "text": "\xff\xfe"}', [1, 2, 3, 4, 5, 6]),
    "torn": (b'{"step": 9, "lo', [1, 2, 3, 4, 5, 6]),
    "torn, the next behind it": (b'{"step": 9, "lo' + lines(4)[0], [1, 2, 3, 4, 5, 6]),
    "no object": (b"[4]", [1, 2, 3, 4, 5, 6]),
    "no step": (b'{"loss": 3}', [1, 2, 3, 4, 5, 6]),
    "deep": (b"[" * 100_000, [1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_line_that_cannot_be_read_is_named_and_those_behind_it_are_kept(case, tmp_path):
    damage, steps = DAMAGE[case]
    content = lines(1, 2, 3) + [damage] + (lines(5, 6, 7) if "behind" in case else lines(4, 5, 6, 7))
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(content) + b"\n")
    said = []
    log = MetricsLog(tmp_path, 6, tensorboard=False, say=said.append)
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == steps
    assert len(said) == 1 and "metrics.jsonl, line 4 cannot be read" in said[0]
    MetricsLog(tmp_path, 6, tensorboard=False, say=said.append).close()
    assert len(said) == 1  # mended


def test_blank_lines_and_steps_that_stand_twice_are_read_as_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b"\n\n".join([*lines(1, 2), b'{"step": 2, "eval": {}}', b'{"step": 2, "loss": 9.0}']) + b"\n\xff\xff"
    )
    assert [(x["step"], x.get("loss")) for x in read_metrics(path)] == [(1, 1 / 8), (2, None), (2, 9.0)]


def test_a_log_without_damage_is_not_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines(1, 2)))
    before = path.stat()
    MetricsLog(tmp_path, 2, tensorboard=False).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_twenty_random_damages_lose_at_most_the_lines_they_hit(tmp_path):
    generator, path = random.Random(5), tmp_path / "metrics.jsonl"
    whole = b"".join(line + b"\n" for line in lines(*range(1, 41)))
    for _ in range(20):
        content = bytearray(whole)
        start = generator.randrange(len(content) - 30)
        hit = generator.randrange(1, 30)
        content[start : start + hit] = generator.randbytes(hit).replace(b"\n", b"x")
        path.write_bytes(content)
        said = []
        MetricsLog(tmp_path, 40, tensorboard=False, say=said.append).close()
        first, last = whole[:start].count(b"\n") + 1, whole[: start + hit].count(b"\n") + 1
        steps = {line["step"] for line in read_metrics(path)}
        assert set(range(1, first)) | set(range(last + 1, 41)) <= steps
        path.unlink()


def _grow(path, limits, results):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel then refuses bytes beyond a file's largest size
    said = []
    file = GrowingFile(path, said.append)
    for number, limit in enumerate(limits):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        file.append(b"%09d\n" % number)
        results.put((path.stat().st_size, len(said)))
    file.close()
    results.put(said)


def test_records_that_do_not_fit_are_taken_back_and_written_later(tmp_path):
    path, results = tmp_path / "log", FORK.Queue()
    process = FORK.Process(target=_grow, args=(path, [1000, 15, 15, 1000, 45, 1000], results))
    process.start()
    sizes = [results.get(timeout=30) for _ in range(6)]
    said = results.get(timeout=30)
    process.join(30)
    # 5 bytes of the second record fit: they are taken back. With room again, the second and the third come, then the fourth.
    assert sizes == [(10, 0), (10, 1), (10, 1), (40, 2), (40, 3), (60, 4)]
    assert path.read_bytes() == b"".join(b"%09d\n" % number for number in range(6))
    assert "waits in memory" in said[0] and "there is room again; nothing of it was lost" in said[1]


def test_a_disk_that_is_full_for_a_moment_loses_no_line_but_no_checkpoint_is_saved_then(tmp_path):
    said = on_a_small_disk(
        tmp_path,
        """
        from spknet.errors import UserError
        from spknet.train.metrics_log import MetricsLog, read_metrics
        said = []
        log = MetricsLog(disk, 0, tensorboard=True, say=said.append)
        log.write({"step": 1, "loss": 1.0})
        fill()
        for step in range(2, 2000):
            log.write({"step": step, "loss": float(step)})
        assert log.file.waiting and log.board.file.waiting and len(said) == 2, said
        try:
            log.sync()
        except UserError as error:
            print(error)
        free()
        log.write({"step": 2000, "loss": 2000.0})
        log.sync()
        log.close()
        assert [line["step"] for line in read_metrics(disk / "metrics.jsonl")] == list(range(1, 2001))
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(disk / "tensorboard"), {"scalars": 0})
        events.Reload()
        assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 2001))
        print(len(said), said[-1])
        """,
    )
    assert "metrics.jsonl: the disk is full" in said and "4 " in said and "nothing of it was lost" in said


def test_a_record_that_can_never_be_written_is_told_at_the_end():
    said = []
    file = GrowingFile("/dev/full", said.append)
    file.append(b"a line\n")
    with pytest.raises(UserError, match="/dev/full: the disk is full"):
        file.sync()
    file.close()
    assert len(said) == 2 and "1 records that waited in memory are lost" in said[1]


def test_a_log_of_a_folder_that_another_run_has_taken_is_not_written(tmp_path):
    with hold(tmp_path) as owner:
        log = MetricsLog(tmp_path, 0, tensorboard=False, owner=owner)
        log.write({"step": 1})
        (tmp_path / "lock").write_text('{"token": "x", "host": "elsewhere", "pid": 3, "job": null}')
        with pytest.raises(RunError, match="taken over by a run on elsewhere"):
            log.write({"step": 2})
        with pytest.raises(RunError, match="taken over"):
            MetricsLog(tmp_path, 0, tensorboard=False, owner=owner)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_the_profiler_writes_one_trace(tmp_path):
    with profiler(tmp_path, True) as trace:
        for _ in range(50):
            trace.step()
    assert len(list((tmp_path / "profile").iterdir())) == 1
