"""What came out of a run, in one table: `python -m tools.summary RUN [EVALUATION]`, the end of tools/demo.sh.

EVALUATION is the folder that `spknet.evaluate --untrained --out` wrote (default RUN/evaluation).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shards.commands import Parser
from spknet.errors import run
from spknet.train.metrics_log import read_metrics


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.summary", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("evaluation", type=Path, nargs="?")
    chosen = parser.parse_args(argv)
    evaluation = chosen.evaluation or chosen.run / "evaluation"
    report = json.loads((evaluation / "report.json").read_text())
    lines = [line for line in read_metrics(chosen.run / "metrics.jsonl") if "loss" in line]
    speeds = sorted(line["utterances_per_second"] for line in lines)
    newest = max((chosen.run / "checkpoints").glob("step-*.pt"))

    print(f"{'list':14} {'system':16} {'EER %':>6} {'95 % interval':>15} {'minDCF(0.01)':>13} {'minDCF(0.05)':>13}")
    for one in report["lists"]:
        for name, system in one["systems"].items():
            interval = (system.get("interval") or {}).get("eer")
            between = f"{interval[0]:.2f} - {interval[1]:.2f}" if interval else ""
            costs = f"{system['min_dcf_p01']:13.3f} {system['min_dcf_p05']:13.3f}"
            print(f"{one['name']:14} {name:16} {system['eer']:6.2f} {between:>15} {costs}")
    rows = {
        "steps": f"{lines[-1]['step']}, {lines[-1]['seconds']:.0f} s of training",
        "utterances/s": f"{speeds[len(speeds) // 2]:.0f} (median)",
        "TensorBoard": f"tensorboard --logdir {chosen.run.parent}",
        "checkpoint": newest,
        "DET picture": evaluation / "det.png",
        "report": evaluation / "report.html",
        # Not in the same folder: the learning rate of small_corpus falls to the last step.
        "train longer": f"the same options ({chosen.run}/config.yaml), --train.max_steps {2 * lines[-1]['step']}, another --run_dir",
        "use it": f"spknet card {chosen.run} --dev_trials LIST --root FOLDER; spknet verify A B --checkpoint {chosen.run}",
        "embed files": f"spknet embed --checkpoint {chosen.run} --list FILES.txt --root FOLDER --out embeddings",
    }
    print()
    for name, value in rows.items():
        print(f"{name:15} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
