"""Two hosts on this machine: each with processes, an address, a name and a /tmp of its own, and a link that can be cut.

The link is a thread between two TUN devices. A cut is that of a cable: packets vanish, and nobody is told. Needs root.

    with two_hosts(shared=[folder]) as (hosts, link):
        process = hosts[1].start(["python", "-m", "spknet.train", ...])
        link.delay = 0.02; link.cut = True; hosts[1].lose()
"""

import collections
import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.213.66.1", "10.213.66.2")
NAMES = ("host-a", "host-b")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # linux/if_tun.h
MTU = 60000  # few packets: each passes through Python

# Runs as the host's first process. Folders that both hosts see are kept aside while /tmp is covered.
FIRST = """
hostname "$1"; hosts=$2; shift 2
mount -t tmpfs tmpfs /mnt
for folder; do n=$((n + 1)); mkdir /mnt/$n; mount --bind "$folder" /mnt/$n; done
mount --bind "$hosts" /etc/hosts
mount -t tmpfs tmpfs /tmp
n=0
for folder; do n=$((n + 1)); mkdir -p "$folder"; mount --bind /mnt/$n "$folder"; done
ip link set lo up
echo ready; exec sleep infinity
"""


def child_of(pid: int) -> int:
    """The one child of a process: what unshare and nsenter have started."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


class Link(threading.Thread):
    """Hands packets from one host to the other, `delay` seconds later; drops them while it is cut."""

    def __init__(self, ends: list[int]):
        super().__init__(daemon=True)
        self.ends, self.delay, self.cut, self.closed = ends, 0.0, False, False
        self.under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()

    def run(self) -> None:
        alive = list(self.ends)
        while not self.closed:
            for end in select.select(alive, [], [], 0.005 if self.under_way else 0.1)[0]:
                try:
                    packet = os.read(end, MTU + 100)
                except OSError:  # its host is gone, and the device with it
                    alive.remove(end)
                    continue
                other = self.ends[1 - self.ends.index(end)]
                self.under_way.append((time.monotonic() + self.delay, other, packet))
            while self.under_way and self.under_way[0][0] <= time.monotonic():
                _, other, packet = self.under_way.popleft()
                if not self.cut:
                    with contextlib.suppress(OSError):
                        os.write(other, packet)


class Host:
    """A set of namespaces, which live as long as their first process."""

    def __init__(self, name: str, hosts: Path, shared: list[Path]):
        self.name = name
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        command += ["sh", "-c", FIRST, "sh", name, str(hosts), *map(str, shared)]
        self.first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.first.stdout.readline() == "ready\n"
        self.pid = str(child_of(self.first.pid))

    def start(self, command: list[str], log: Path, **variables: str) -> subprocess.Popen:
        """A process on this host; what it says goes to the file `log`."""
        inside = ["nsenter", "--target", self.pid, "--net", "--uts", "--mount", "--pid", "--ipc", f"--wd={ROOT}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        with open(log, "ab") as file:
            return subprocess.Popen([*inside, *command], env=environment, stdout=file, stderr=file, text=True)

    def lose(self) -> None:
        """All that runs here ends at once, without a word on the network where the link is cut first."""
        self.first.send_signal(signal.SIGKILL)
        self.first.wait()


@contextlib.contextmanager
def two_hosts(folder: Path, shared: list[Path]) -> Iterator[tuple[list[Host], Link]]:
    """(the two hosts, the link between them). folder: for /etc/hosts; shared: folders that both see under their own names."""
    hosts_file = folder / "hosts"
    hosts_file.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES)))
    seen = [*shared, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    hosts = [Host(name, hosts_file, seen) for name in NAMES]
    ends = [_plug(host, i) for i, host in enumerate(hosts)]
    link = Link(ends)
    link.start()
    try:
        yield hosts, link
    finally:
        for host in hosts:
            host.lose()
        link.closed = True
        link.join()
        for end in ends:
            os.close(end)


def _plug(host: Host, number: int) -> int:
    """A TUN device made here and moved to the host; returns this end of it."""
    end, device = os.open("/dev/net/tun", os.O_RDWR), f"spk{os.getpid()}-{number}"
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
    inside = ["nsenter", "--target", host.pid, "--net", "ip"]
    for command in (
        ["ip", "link", "set", device, "netns", host.pid],
        [*inside, "addr", "add", f"{ADDRESSES[number]}/30", "dev", device],
        [*inside, "link", "set", device, "mtu", str(MTU), "up"],
    ):
        subprocess.run(command, check=True)
    return end
