"""SLURM's compressed node lists, read without SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from spknet.parallel.nodelist import NodeListError, endpoint, expand, rendezvous_port

# As `scontrol show hostnames` of SLURM 22.05 prints them; it refuses the fifth, which has text behind the bracket.
LISTS = {
    "login": ["login"],
    "gpu[01-03,7],login,a[1-2]b[3-4]": ["gpu01", "gpu02", "gpu03", "gpu7", "login", "a1b3", "a1b4", "a2b3", "a2b4"],
    "n[9-11]": ["n9", "n10", "n11"],  # a range may gain a digit
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "rack1-node[2,4-5].site.org": ["rack1-node2.site.org", "rack1-node4.site.org", "rack1-node5.site.org"],
    "a[1-2][3-4]": ["a13", "a14", "a23", "a24"],
}


@pytest.mark.parametrize("nodelist", LISTS)
def test_node_list_is_expanded_in_its_order(nodelist):
    assert expand(nodelist) == LISTS[nodelist]


@pytest.mark.parametrize(
    ("nodelist", "said"),
    [
        ("", "expected names as SLURM writes them"),
        ("gpu[01-03", "expected names as SLURM writes them"),
        ("a,,b", "expected names as SLURM writes them"),
        ("gpu[]", "expected names as SLURM writes them"),
        ("gpu[3-1]", "expected a number or a range such as 01-03, found '3-1'"),
        ("gpu[1-x]", "found '1-x'"),
        ("gpu[1-99999999999]", "found '1-99999999999'"),
    ],
)
def test_what_is_no_node_list_is_named(nodelist, said):
    with pytest.raises(NodeListError, match="node list .*" + said.replace("[", r"\[")):
        expand(nodelist)


def test_ranks_of_a_job_meet_at_its_first_host_on_a_port_below_the_ephemeral_range():
    assert endpoint({"SLURM_JOB_NODELIST": "gpu[07,09]", "SLURM_JOB_ID": "123456"}) == ("gpu07", 15000 + 123456 % 15000)
    assert all(15000 <= rendezvous_port(str(job)) < 30000 for job in (1, 14999, 15000, 67108863))
    with pytest.raises(NodeListError, match="SLURM_JOB_NODELIST is not set: this is no SLURM job"):
        endpoint({})
    with pytest.raises(NodeListError, match="SLURM_JOB_ID='a7' in the environment; expected a whole number"):
        endpoint({"SLURM_JOB_NODELIST": "gpu7", "SLURM_JOB_ID": "a7"})


def test_command_prints_one_host_a_line():
    command = [sys.executable, "-m", "spknet.parallel.nodelist"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([*command, "n[1-2]"], cwd=root, capture_output=True, text=True)
    assert done.stdout == "n1\nn2\n"
    done = subprocess.run([*command, "n[1-"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: node list 'n[1-'")
