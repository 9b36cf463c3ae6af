"""Evaluation of a network on trial lists: embed every utterance once, score every list, report.

python -m spknet.evaluate --checkpoint runs/a --trials veri_test.txt --root voxceleb1/test/wav      (or under torchrun)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from spknet.checkpoints.network import load_network
from spknet.config import Config, EvalConfig, LossConfig
from spknet.errors import run
from spknet.evaluate import embeddings as kept
from spknet.evaluate import evaluation, groups, report
from spknet.evaluate.bootstrap import REPLICATES
from spknet.evaluate.calibration import MEASURES, QUALITIES
from spknet.evaluate.commands import Parser, at_least, check_file, check_writable
from spknet.evaluate.embed import BATCH_HELP
from spknet.evaluate.evaluation import Asked, evaluate, how_of, system_of, untrained
from spknet.evaluate.lists import Cohort, Lists, open_lists, read_lists
from spknet.evaluate.report import Report
from spknet.evaluate.systems import PRESETS, System
from spknet.evaluate.trials import read_speakers
from spknet.parallel.ranks import ranks
from spknet.parallel.together import on_first

EVAL_OPTIONS = {  # of the config's group eval; --eval.NAME is taken, too
    "weights": {"choices": ("averaged", "trained"), "help": "of a run that averages"},
    "trials": {"nargs": "+", "help": "test lists"},
    "dev_trials": {"help": "development list: calibration and thresholds are learned on it"},
    "root": {"nargs": "+", "help": "folders that the paths in the lists start from; absolute paths need none"},
    "shards": {"nargs": "+", "help": "packed data sets that hold the utterances"},
    "crop_seconds": {"type": at_least(0.0), "help": "length of a crop; 0: whole utterances"},
    "crops": {"type": at_least(1), "help": "crops spread evenly over an utterance"},
    "score": {"choices": ("cosine", "mean_distance"), "help": "of mean embeddings, or the mean distance of crops"},
    "normalize_embeddings": {
        "choices": ("auto", "always", "never"),
        "help": "give every crop's embedding length 1 first",
    },
    "batch_seconds": {"type": at_least(0.0), "help": BATCH_HELP},
    "padding": {"choices": ("repeat", "zeros"), "help": "of utterances shorter than a crop"},
    "metrics": {"choices": ("default", "voxceleb_trainer"), "help": "arithmetic of EER and minDCF"},
    "scores": {"help": "file for the scores of the first list, besides --out"},
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Options of the config's group eval may be written --eval.NAME too."""
    parser = Parser("spknet evaluate", __doc__)
    add = parser.add
    add("--checkpoint", help="run folder, checkpoint file, or one of voxceleb_trainer's")
    add("--embeddings", help="score again from a folder that --keep_embeddings wrote; nothing is extracted")
    add("--out", default="evaluation", help="folder for scores, report.json, report.html and pictures")
    for name, options in EVAL_OPTIONS.items():
        given = {"help": f"{options['help']} (default: the run's)"}
        add(f"--{name}", f"--eval.{name}", dest=name, **(options | given | {"default": argparse.SUPPRESS}))
    add("--enrolment", help="list of models of several utterances: `model utterance ...` a line")
    add("--utt2spk", help="list `utterance speaker` or `model speaker`, where names do not tell the speaker")
    add("--precision", choices=("float32", "bf16"), default="float32", help="of the network")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
    add("--threads", type=at_least(0), default=0, help="CPU threads of a rank; 0: an equal share of the cores")
    add("--untrained", action="store_true", help="the same network with its initial weights beside")
    add("--preset", choices=PRESETS, help="scoring as published: sets --score, --subtract_mean, --as_norm, --quality")
    add("--subtract_mean", action="store_true", help="subtract the cohort's mean")
    add("--as_norm", type=at_least(0), metavar="K", help="normalise by the K highest cohort scores; 0: no AS-norm")
    add("--cohort", help="list `speaker path` of cohort utterances (default: the run's training data)")
    add("--cohort_root", help="folder that the cohort's paths start from")
    add("--cohort_shards", nargs="+", help="packed data sets of cohort utterances")
    add("--cohort_utterances", type=at_least(1), default=10, help="utterances averaged for a cohort speaker")
    add("--calibrate", action="store_true", help="log-likelihood ratios, learned on --dev_trials")
    add("--quality", nargs="+", choices=(*QUALITIES, "qmf"), default=[], help="inputs of calibration beside the score")
    add("--metadata", help="CSV whose first column names a speaker or an utterance")
    add("--by", nargs="+", default=[], help="columns of --metadata to break figures down by")
    add("--bootstrap", type=at_least(0), default=REPLICATES, help="replicates of the intervals; 0: none")
    add("--keep_embeddings", action="store_true", help="write embeddings.npy and their names to --out")
    add("--no_pictures", action="store_true", help="no report.html, no pictures but det.png")
    add("--tensorboard", help="folder to write the figures and pictures to as well")
    chosen = parser.parse_args(argv)
    if bool(chosen.checkpoint) == bool(chosen.embeddings):
        parser.error("give --checkpoint RUN_OR_FILE, or --embeddings FOLDER to score again; one of the two")
    if chosen.untrained and chosen.embeddings:
        parser.error("--untrained embeds with the network's initial weights; it needs --checkpoint")
    return chosen


def with_options(config: Config, chosen: argparse.Namespace) -> Config:
    """The run's config with the evaluation options of the command line."""
    given = {name: getattr(chosen, name) for name in EVAL_OPTIONS if hasattr(chosen, name)}
    if "root" in given or "shards" in given:  # other places for the audio replace the run's
        given = {"root": None, "shards": None} | given
        if "trials" in given or "dev_trials" in given:  # and the run's other lists would be looked for there
            given = {"trials": None, "dev_trials": None} | given
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **given))


def system(chosen: argparse.Namespace, config: Config, cohort) -> System:
    """How the command line asks to score: a preset, or the config's way, and what is added to it."""
    base = PRESETS[chosen.preset] if chosen.preset else system_of(config)
    qualities = tuple(q for name in chosen.quality for q in (MEASURES if name == "qmf" else (name,)))
    return dataclasses.replace(
        base,
        score=getattr(chosen, "score", base.score),
        cohort=cohort,
        top=base.top if chosen.as_norm is None else chosen.as_norm,
        subtract_mean=base.subtract_mean or chosen.subtract_mean,
        qualities=qualities or base.qualities,
        calibration=base.calibration or chosen.calibrate,
    )


def asked(chosen: argparse.Namespace, config: Config, facts: dict) -> Asked:
    """What the report is to contain; before anything is embedded, can the results be written at all?"""

    def look(_lists) -> None:
        check_writable(chosen.out)
        if config.eval.scores:
            check_file(config.eval.scores)

    return Asked(
        metrics=config.eval.metrics,
        bootstrap=chosen.bootstrap,
        by=tuple(chosen.by),
        metadata=groups.read_metadata(chosen.metadata) if chosen.metadata else None,
        speakers=read_speakers(chosen.utt2spk) if chosen.utt2spk else None,
        ready=look,
        keep=(lambda rows, cohort: kept.keep(chosen.out, rows, facts, cohort)) if chosen.keep_embeddings else None,
    )


def cohort(chosen: argparse.Namespace, config: Config, meta: dict) -> Cohort:
    """Where the cohort comes from: what the command line names, else the run's training data."""
    if chosen.cohort or chosen.cohort_shards:
        return Cohort(chosen.cohort_shards, chosen.cohort, chosen.cohort_root, utterances=chosen.cohort_utterances)
    return Cohort.of_run(config, meta, chosen.cohort_utterances)


def facts_of(chosen: argparse.Namespace, config: Config, meta: dict) -> dict:
    """What stands at the head of report.json: which network, trained on what, evaluated how."""
    data = config.data.train_shards or config.data.train_list or "unknown"
    named = data if isinstance(data, str) else ", ".join(data)
    speakers = f", {len(meta['speakers'])} speakers" if "speakers" in meta else ""
    facts = kept.identity(meta) | {"training_data": named + speakers, "loss": config.loss.name}
    options = {"model": dataclasses.asdict(config.model), "eval": dataclasses.asdict(config.eval)}
    return facts | {"precision": chosen.precision, "normalize": system_of(config).normalize} | options


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    chosen = arguments(argv)
    with ranks(chosen.device, chosen.threads) as me:
        if chosen.embeddings:
            on_first("scoring", lambda: _score_again(chosen, argv), share=False)
        else:
            _extract_and_score(chosen, argv, me.device)
    return 0


def _score_again(chosen: argparse.Namespace, argv: list[str] | None) -> None:
    """Scores lists from kept embeddings."""
    embedded, means, facts = kept.load(chosen.embeddings)
    settings = {name: facts["eval"][name] for name in ("score", "crops", "crop_seconds")}
    if "normalize" in facts:
        settings["normalize_embeddings"] = "always" if facts["normalize"] else "never"
    loss = dataclasses.replace(LossConfig(), name=facts["loss"])
    config = with_options(Config(loss=loss, eval=EvalConfig(**settings)), chosen)
    lists = read_lists(config.eval.trials, config.eval.dev_trials, chosen.enrolment)
    result = evaluate(embedded, lists, system(chosen, config, means), asked=asked(chosen, config, facts))
    _tell(chosen, argv, config, facts, result)


def _extract_and_score(chosen: argparse.Namespace, argv: list[str] | None, device: torch.device) -> None:
    """Embeds what the lists need, on all ranks, and scores on rank 0."""
    model, config, meta = load_network(chosen.checkpoint, device, weights=getattr(chosen, "weights", None))
    config, rate = with_options(config, chosen), model.sample_rate
    facts = on_first("reading the checkpoint", lambda: facts_of(chosen, config, meta) | {"sample_rate": rate})
    asks = on_first("reading the options", lambda: asked(chosen, config, facts), share=False)
    beside = {"untrained": untrained(model, config.train.seed)} if chosen.untrained else {}
    how = dataclasses.replace(how_of(config, rate), bf16=chosen.precision == "bf16")
    scoring = system(chosen, config, cohort(chosen, config, meta))
    where = {"root": config.eval.root, "shards": config.eval.shards, "sample_rate": rate}

    def opens() -> Lists:
        return open_lists(config.eval.trials, config.eval.dev_trials, **where, enrolment=chosen.enrolment)

    result = evaluate(model, opens, scoring, how, asks, beside)
    on_first("reporting", lambda: _tell(chosen, argv, config, facts, result), share=False)


def _tell(chosen: argparse.Namespace, argv: list[str] | None, config: Config, facts: dict, result: Report) -> None:
    """Writes and prints the report, on rank 0."""
    out_dir = Path(chosen.out)
    result.facts, result.made = facts | result.facts, report.made(argv)
    result.write(out_dir, pictures=not chosen.no_pictures)
    evaluation.keep_scores(config, out_dir)
    content = result.content()
    if chosen.tensorboard:
        report.to_tensorboard(chosen.tensorboard, content, out_dir, facts.get("step") or 0)
    print(report.text(content))
    print(f"\nin {out_dir}: " + ", ".join(sorted(p.name for p in out_dir.iterdir() if not p.name.startswith("."))))


if __name__ == "__main__":
    sys.exit(run(main))
