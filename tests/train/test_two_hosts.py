"""Two hosts with a link between them: it is slow, it is cut, a host is lost. Each side ends with the reason, and goes on.

Each host has processes, address, name and /tmp of its own (tests/hosts.py); the run folder is on a common file system.

SPKNET_LONG_CUTS=1 python -m pytest -s --timeout 1800 tests/train/test_two_hosts.py      with cuts of 4 and 1 minutes
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.conftest import tiny_options
from tests.hosts import ADDRESSES, child_of, two_hosts
from tests.ranks import train
from tools.cluster_trials import equal_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/net/tun").exists() or not shutil.which("unshare"),
        reason="hosts of their own need root, /dev/net/tun and unshare",
    ),
]
STEPS, LIMIT = 24, 20
END_SECONDS = 60  # until both sides have ended
# How long the link is cut: more than the time-out LIMIT, then less than the time-out PATIENCE.
LONG, SHORT, PATIENCE = (240, 60, 90) if "SPKNET_LONG_CUTS" in os.environ else (0, LIMIT / 4, LIMIT)


SFTP = "/usr/lib/openssh/sftp-server"  # what sshfs talks to, here without ssh between them


class Trial:
    """A run on the two hosts, one rank each."""

    def __init__(self, hosts, folder: Path, words: list[str]):
        self.hosts, self.folder, self.run = hosts, folder, folder / "run"
        self.words = [*words, "--run_dir", str(self.run)]

    def start(self, join: str, order=(0, 1)) -> list:
        """order: the hosts, that of rank 0 first."""
        return [self.hosts[i].start(self.command(order, i, join), self.folder / f"log-{i}") for i in order]

    def command(self, order: tuple[int, int], host: int, join: str) -> list[str]:
        """static: node numbers and a master; c10d: a rendezvous, on its host below launch.node, as spknet submit starts it,
        and on the other one as it is."""
        number = order.index(host)
        ways = {
            "static": ["--node-rank", number, "--master-addr", ADDRESSES[order[0]], "--master-port", 15000],
            "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:15000", "--rdzv-id", "a",
                     "--rdzv-conf", f"is_host={int(number == 0)}"],
        }  # fmt: skip
        parent = [sys.executable, "-m", "launch.node", self.run] if (join, number) == ("c10d", 0) else []
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        restarts = ["--max-restarts", 1] if join == "c10d" else []
        return [*map(str, [*parent, *agent, *ways[join], *restarts, "-m", "spknet.train", *self.words])]

    def alone(self) -> list[str]:
        agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "15001"]
        return [*agent, "-m", "spknet.train", *self.words]

    def reach(self, step: int) -> None:
        self.until(240, lambda: len(self.lines()) >= step)

    def lines(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def until(self, seconds: float, reached) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, "".join(p.read_text() for p in sorted(self.folder.glob("log-*")))
            time.sleep(0.1)

    def ends(self, processes: list, seconds: float) -> list[int]:
        self.until(seconds, lambda: all(process.poll() is not None for process in processes))
        return [process.returncode for process in processes]


@pytest.fixture(scope="module")
def words(corpus) -> list[str]:
    options = tiny_options(corpus)
    return [*options, "--train.max_steps", str(STEPS), "--train.save_every_steps", "5",
            "--train.timeout_seconds", str(LIMIT)]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> Path:
    """The same run on two ranks of one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, [*words, "--run_dir", str(folder)])
    return folder


@pytest.fixture
def shared_folder(tmp_path) -> Path:
    return tmp_path.parent  # the corpus lies beside the tests' own folders


def assert_as(undisturbed: Path, trial: Trial) -> None:
    assert read_state(trial.run)["state"] == "done"
    trace = [(line["step"], line["loss"]) for line in trial.lines() if "eval" not in line]
    assert trace == [(line["step"], line["loss"]) for line in read_metrics(undisturbed / "metrics.jsonl")]
    assert equal_weights(trial.run, undisturbed, STEPS)


def test_a_cut_link_and_a_lost_host_end_both_sides_with_the_reason_and_a_slow_link_is_only_slow(
    words, undisturbed, shared_folder, tmp_path
):
    """Cut for longer than the time-out; then a link of 20 ms with a shorter cut; then a host is lost; then the other alone."""
    with two_hosts(tmp_path, [shared_folder]) as (hosts, link):
        trial = Trial(hosts, tmp_path, words)
        processes = trial.start("c10d")
        trial.reach(7)
        link.cut, begun = True, time.monotonic()
        trial.ends(processes, END_SECONDS)
        print(f"both sides have ended {time.monotonic() - begun:.0f} s after the cut")
        time.sleep(max(0, begun + LONG - time.monotonic()))
        said = read_state(trial.run)
        assert said["state"] == "requeue" and "rank 1 (host-b) is behind" in said["reason"]
        assert "or the network between them, is gone" in said["reason"]
        told = (tmp_path / "log-1").read_text()
        assert f"rank 1 has not reached the other ranks ({hosts[0].name}:" in told
        assert "the network between them is cut" in told and f"which would wait for {ADDRESSES[0]}:15000" in told
        assert len(list(trial.run.glob("jobs/none/stacks-rank-*.txt"))) == 1

        link.cut, link.delay = False, 0.02
        trial.words += ["--train.timeout_seconds", str(PATIENCE)]
        first, second = trial.start("static")
        trial.reach(12)
        link.cut = True
        time.sleep(SHORT)
        link.cut, before = False, len(trial.lines())
        trial.reach(before + 2)
        assert first.poll() is None and second.poll() is None
        link.cut, begun = True, time.monotonic()  # a dead machine closes no connection
        hosts[1].lose()
        assert trial.ends([first], END_SECONDS - LIMIT + PATIENCE) != [0]
        print(f"the host that is left has ended {time.monotonic() - begun:.0f} s after the loss")
        said = read_state(trial.run)
        assert said["state"] == "requeue" and "rank 1 (host-b) is" in said["reason"]
        # On the host that is left, with both ranks; the lock of the dead one there is no obstacle.
        assert trial.ends([hosts[0].start(trial.alone(), tmp_path / "log-0")], 240) == [0]
    assert_as(undisturbed, trial)


@pytest.mark.skipif(not shutil.which("sshfs") or not Path(SFTP).exists(), reason="needs sshfs and openssh-sftp-server")
def test_a_mount_without_hard_links_that_shows_late_what_the_other_host_wrote(corpus, words, undisturbed, tmp_path):
    """Data, lists and run folder on it. Stopped in the middle, the run goes on with rank 0 on the other host."""
    server, share, ssh = tmp_path / "server", tmp_path / "share", tmp_path / "ssh"
    shutil.copytree(corpus, server)
    share.mkdir()
    ssh.write_text(f"#!/bin/sh\nexec {SFTP}\n")
    ssh.chmod(0o755)
    words = [word.replace(str(corpus), str(share)) for word in words]
    words += ["--eval.trials", f"{share}/test_list.txt", "--eval.root", str(share)]
    mount = ["sshfs", "-f", "-o", f"ssh_command={ssh},disable_hardlink,cache_timeout=5", f"server:{server}", str(share)]
    with two_hosts(tmp_path, [tmp_path]) as (hosts, _):
        for host in hosts:
            host.start(mount, tmp_path / "log-mounts")
        trial = Trial(hosts, tmp_path, words)
        trial.run, trial.words = server / "run", [*words, "--run_dir", str(share / "run")]
        trial.until(
            60, lambda: all(host.start(["mountpoint", "-q", str(share)], tmp_path / "m").wait() == 0 for host in hosts)
        )
        processes = trial.start("static")
        trial.reach(7)
        for process in processes:
            os.kill(child_of(process.pid), signal.SIGTERM)
        trial.ends(processes, 60)
        assert read_state(trial.run)["state"] == "requeue" and read_state(trial.run)["step"] >= 7
        assert trial.ends(trial.start("static", order=(1, 0)), 240) == [0, 0]
    assert "EER" in (tmp_path / "log-1").read_text()
    assert_as(undisturbed, trial)
