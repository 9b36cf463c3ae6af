"""The commands of docs/cluster.md, run in a shell with names and sizes of the sandbox; and what became of their jobs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tools import cluster_trials as trials

ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT.parent / "shared" / "speech"
STEPS = 30
RUN = set()  # lines of docs/cluster.md that a test has run


def page_commands() -> list[str]:
    """The commands of docs/cluster.md: the lines of its plain code blocks, continued lines joined, comments left out."""
    parts = re.split(r"^```(.*)\n", (ROOT / "docs" / "cluster.md").read_text(), flags=re.MULTILINE)
    blocks = [
        block for kind, block in zip(parts[1::4], parts[2::4]) if not kind
    ]  # text, kind, block, empty kind of its end, text, ...
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip() for line in lines if line.strip()]


def documented(beginning: str) -> str:
    """The command of the page that is this one, or begins so; noted as run."""
    lines = page_commands()
    (found,) = [beginning] if beginning in lines else [line for line in lines if line.startswith(beginning)]
    RUN.add(found)
    return found


def run_words(run: Path, listed: Path, steps: int = STEPS) -> list[str]:
    return trials.words(SPEECH, run, steps, listed)


# Names and sizes of the page, and what stands for them here.
HERE = {
    **{
        "--nodes 4": "--nodes 2",
        "--gpus-per-node 8": "",
        "--gpus-per-node 4": "",
        "--gpus-per-node 1": "",
        "--partition gpu": "",
    },
    **{
        "--hours 48": "--hours 0.5",
        "--hours 72": "--hours 0.4",
        "--account lab": "",
        "--slurm qos=high": "--signal-delay 60",
    },
    **{
        "--slurm constraint=a100": "",
        '"module load cuda"': '"export LOADED=cuda"',
        "-- --config": "--cpus-per-rank 1 -- --config",
    },
    **{"--config fast_resnet34_angleproto": "--config RECIPE", "--config RECIPE": "--config RECIPE.yaml"},
    **{
        "--cpus-per-task 48": "--cpus-per-task 1",
        "--cpus-per-task 24": "--cpus-per-task 1",
        "--ntasks-per-node 8": "--ntasks-per-node 2",
    },
    **{
        "--cpus-per-task 6": "--cpus-per-task 1",
        "voxceleb1/test/wav": str(SPEECH),
        "--root DIR": f"--root {SPEECH}",
        "LIST": "veri_test.txt",
    },
    **{
        "/local/cache": "cache",
        "gpu[01-04]": "node[1-2]",
        "--array=0-15": "--array=0-1",
        "TASKS=16": "TASKS=2",
        "--array=3,7": "--array=1",
    },
}


def shell(checkout: Path, line: str, **changed: str) -> str:
    """Runs a command of the page in the checkout; what it prints. changed: values of the shell's variables."""
    for name, here in HERE.items():
        line = re.sub(
            rf"(?<![\w.]){re.escape(name)}(?![\w.])" if name[0].isalnum() else re.escape(name),
            lambda _, here=here: here,
            line,
        )
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    spknet = f'spknet() {{ {shlex.quote(sys.executable)} -m spknet.cli "$@"; }}; python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    line = line.replace("$job", changed.get("job", "$job"))
    done = subprocess.run(["bash", "-c", spknet + line], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def job_of(run: Path) -> str:
    return json.loads((run / "job.json").read_text())["job"]


def wait_until_gone(job: str, seconds: float = 180) -> None:
    trials.wait_for(f"the end of job {job}", seconds, lambda: not trials.in_queue(job))
    # What sacct says lags behind the queue.
    trials.wait_for("sacct", 30, lambda: trials.lives(job)[-1] not in ("RUNNING", "PENDING", "COMPLETING", "REQUEUED"))


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["accuracy"]) for line in trials.trained(run)]


def log_of(run: Path, ending: str = ".err") -> str:
    return Path(json.loads((run / "job.json").read_text())["log"]).with_suffix(ending).read_text()
