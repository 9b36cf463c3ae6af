"""Evaluation of a network on trial lists: embed every utterance once, score every list, report.

RUN/eval/step-00001200/scores.txt    `score left right target|nontarget` a trial of the first list, in its order
                       scores-NAME.txt  the same for each further list
                       report.json   every figure with its interval (spknet.evaluate.report)
                       det.png       miss against false-alarm rate (spknet.evaluate.plots)

python -m spknet.evaluate --checkpoint runs/a --trials veri_test.txt --root voxceleb1/test/wav      (or under torchrun)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from shards.format import ShardError, atomic_write
from spknet import rng
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.network import load_network
from spknet.config import Config, ConfigError, DataConfig, EvalConfig, LossConfig
from spknet.evaluate import embeddings as kept
from spknet.evaluate import groups as breakdown
from spknet.evaluate import report, scoring
from spknet.evaluate.assess import Ask, assess, flat
from spknet.evaluate.calibration import QUALITIES, CalibrationError
from spknet.evaluate.embed import embed
from spknet.evaluate.lists import Prepared, check, crops_of, embed_lists, on_first, read_lists, require, utterances
from spknet.evaluate.scoring import ScoringError
from spknet.evaluate.systems import Backend, Embedded, cohort_places, speaker_means, trained_speakers
from spknet.evaluate.trials import TrialError, read_speakers
from spknet.evaluate.utterances import Sources
from spknet.parallel.ranks import RankError, ranks

USER_ERRORS = (TrialError, ShardError, ScoringError, CalibrationError, ConfigError, CheckpointError, RankError)


def evaluate_network(
    model: torch.nn.Module,
    config: Config,
    *,
    out_dir: str | Path,
    step: int = 0,
    device: torch.device | str = "cpu",
    trials: Prepared | None = None,
) -> dict:
    """Evaluates on config.eval.trials and dev_trials; called on all ranks; writes out_dir on rank 0.

    trials: what `check(config)` gave, to save checking again. Returns on rank 0 {"eer" (percent), "min_dcf_p01",
    "min_dcf_p05", ...} of the first test list (of the development list where there is no other), the same of the
    development list as "dev_eer", ..., and of every list under "lists"; {} on other ranks.
    """
    prepared = on_first(lambda: trials or check(config, sample_rate=model.sample_rate), share=False)
    embedded = embed_lists(model, config, prepared, device, what="evaluation")
    ask = Ask(metrics=config.eval.metrics, pictures=False, breakdown=False)

    def finish() -> dict:
        lists = prepared.lists, prepared.roles
        found = flat(assess(*lists, embedded, backend_of(config), Path(out_dir), {"step": step}, ask))
        keep_scores(config, Path(out_dir))
        return found

    return on_first(finish, share=False) or {}


def keep_scores(config: Config, out_dir: Path) -> None:
    """Writes the first list's scores to the file that eval.scores names, too."""
    if config.eval.scores:
        with atomic_write(config.eval.scores) as file:
            file.write((out_dir / "scores.txt").read_bytes())


def backend_of(config: Config, **options) -> Backend:
    """The plain scoring that config.eval asks for, with the options of spknet.evaluate.systems.Backend."""
    # voxceleb_trainer does not length-normalise the embeddings of a network trained with proto.
    return Backend(config.eval.score, normalize=config.loss.name != "proto", **options)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Options of the config's group eval may be written --eval.NAME too."""
    parser = argparse.ArgumentParser(prog="python -m spknet.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", help="run folder, checkpoint file, or one of voxceleb_trainer's")
    add("--embeddings", help="score again from a folder that --keep_embeddings wrote; nothing is extracted")
    add(
        "--out",
        help="folder for scores, report.json, report.html and pictures (default: evaluation)",
        default="evaluation",
    )
    for name, options in EVAL_OPTIONS.items():
        add(f"--{name}", f"--eval.{name}", dest=name, **options)
    add("--enrolment", help="list of models of several utterances: `model utterance ...` a line")
    add("--utt2spk", help="list `utterance speaker`, where names do not begin with the speaker")
    add("--precision", choices=("float32", "bf16"), default="float32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=0, help="CPU threads of a rank; 0: an equal share of the cores")
    add("--untrained", action="store_true", help="the same network with its initial weights beside")
    add("--subtract_mean", action="store_true", help="subtract the cohort's mean")
    add("--as_norm", type=int, default=0, metavar="K", help="normalise by the K highest cohort scores; 0: no AS-norm")
    add("--cohort", help="list `speaker path` of cohort utterances (default: the run's training data)")
    add("--cohort_root", help="folder that the cohort's paths start from")
    add("--cohort_shards", nargs="+", help="packed data sets of cohort utterances")
    add("--cohort_utterances", type=int, default=10, help="utterances averaged for a cohort speaker")
    add("--calibrate", action="store_true", help="log-likelihood ratios, learned on --dev_trials")
    add("--quality", nargs="+", choices=QUALITIES, default=[], help="quality measures that calibration uses")
    add("--metadata", help="CSV whose first column names a speaker or an utterance")
    add("--by", nargs="+", default=[], help="columns of --metadata to break figures down by")
    add("--bootstrap", type=int, default=report.REPLICATES, help="replicates of the intervals; 0: none")
    add("--keep_embeddings", action="store_true", help="write embeddings.npy and their names to --out")
    add("--no_pictures", action="store_true", help="no report.html, no pictures but det.png")
    add("--tensorboard", help="folder to write the figures and pictures to as well")
    chosen = parser.parse_args(argv)
    if bool(chosen.checkpoint) == bool(chosen.embeddings):
        parser.error("give --checkpoint RUN_OR_FILE, or --embeddings FOLDER to score again; one of the two")
    if chosen.untrained and chosen.embeddings:
        parser.error("--untrained embeds with the network's initial weights; it needs --checkpoint")
    return chosen


EVAL_OPTIONS = {
    "weights": {"choices": ("averaged", "trained"), "help": "of a run that averages (default: averaged)"},
    "trials": {"nargs": "+", "help": "test lists"},
    "dev_trials": {"help": "development list: calibration and thresholds are learned on it"},
    "root": {"nargs": "+", "help": "folders that the paths in the lists start from"},
    "shards": {"nargs": "+", "help": "packed data sets that hold the utterances"},
    "crop_seconds": {"type": float, "help": "length of a crop; 0: whole utterances"},
    "crops": {"type": int, "help": "crops spread evenly over an utterance"},
    "score": {"choices": ("cosine", "mean_distance")},
    "batch_seconds": {"type": float, "help": "audio in one forward pass"},
    "padding": {"choices": ("repeat", "zeros"), "help": "of utterances shorter than a crop"},
    "metrics": {"choices": ("default", "voxceleb_trainer"), "help": "arithmetic of EER and minDCF"},
    "scores": {"help": "file for the scores of the first list, besides --out"},
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status (2: something the user gave is wrong)."""
    chosen = arguments(argv)
    try:
        with ranks(chosen.device, chosen.threads) as me:
            if chosen.embeddings:
                on_first(lambda: _score_again(chosen), share=False)
            else:
                _extract_and_score(chosen, me.device)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _score_again(chosen: argparse.Namespace) -> None:
    """Scores lists from kept embeddings."""
    embedded, cohort, facts = kept.load(chosen.embeddings)
    settings = {name: facts["eval"][name] for name in ("score", "crops", "crop_seconds")}
    loss = dataclasses.replace(LossConfig(), name=facts["loss"])
    config = with_options(Config(loss=loss, eval=EvalConfig(**settings)), chosen)
    backend_of(config, subtract_mean=chosen.subtract_mean, as_norm=chosen.as_norm).check()
    lists, roles = read_lists(config, chosen.enrolment)
    require(lists, set(utterances(lists)) - set(embedded.rows), chosen.embeddings)
    if cohort is None and (chosen.as_norm or chosen.subtract_mean):
        raise ScoringError(
            f"{chosen.embeddings} holds no cohort.npy; extract once more with --as_norm and --keep_embeddings"
        )
    _finish(chosen, config, facts, (lists, roles), embedded, cohort, {})


def _extract_and_score(chosen: argparse.Namespace, device: torch.device) -> None:
    """Embeds what the lists need, on all ranks, and scores on rank 0."""
    model, config, meta = load_network(chosen.checkpoint, device, weights=chosen.weights)
    config, bf16, cohort, beside = with_options(config, chosen), chosen.precision == "bf16", None, {}
    prepared = on_first(lambda: _checked(chosen, config, model.sample_rate), share=False)
    use_cohort = bool(chosen.as_norm or chosen.subtract_mean)
    found = on_first(lambda: _cohort_places(chosen, config, meta, model.sample_rate)) if use_cohort else None
    embedded = embed_lists(model, config, prepared, device, bf16)
    if use_cohort:
        data, places, speakers = found
        options = {"device": device, "batch_seconds": config.eval.batch_seconds, "bf16": bf16, "what": "cohort"}
        sources = Sources(data.train_shards, data.train_root, model.sample_rate)
        rows = embed(model, sources, places, crops_of(config, model.sample_rate), **options)
        cohort = None if rows is None else speaker_means(rows, speakers)
    if chosen.untrained:
        rng.initialize(model, config.train.seed)
        beside["untrained"] = embed_lists(model, config, prepared, device, bf16, "untrained")
    facts = {name: meta.get(name) for name in ("path", "step", "epoch")} | {"model": dataclasses.asdict(config.model)}
    facts |= {"loss": config.loss.name, "eval": dataclasses.asdict(config.eval), "precision": chosen.precision}
    facts["sample_rate"] = model.sample_rate
    lists = prepared and (prepared.lists, prepared.roles)
    on_first(lambda: _finish(chosen, config, facts, lists, embedded, cohort, beside), share=False)


def _checked(chosen: argparse.Namespace, config: Config, sample_rate: int) -> Prepared:
    """Everything that can be wrong, before any extraction starts."""
    backend_of(config, subtract_mean=chosen.subtract_mean, as_norm=chosen.as_norm).check()
    prepared, asked = check(config, chosen.enrolment, sample_rate), _asked(chosen, config)
    if prepared is None:
        raise TrialError("no list to evaluate: the run names none; give --trials LIST --root FOLDER")
    for trials in prepared.lists:
        for column in asked.by:
            breakdown.groups_of(trials, column, asked.metadata, asked.speakers)
    if chosen.calibrate and not any(
        r == "dev" and t.labels is not None for t, r in zip(prepared.lists, prepared.roles)
    ):
        raise ScoringError("calibration is learned on development trials with labels; give --dev_trials LIST")
    return prepared


def _asked(chosen: argparse.Namespace, config: Config) -> Ask:
    if chosen.by and not chosen.metadata:
        raise TrialError("--by names columns of a CSV; give it as --metadata FILE")
    return Ask(
        metrics=config.eval.metrics,
        bootstrap=chosen.bootstrap,
        calibrate=chosen.calibrate,
        pictures=not chosen.no_pictures,
        by=tuple(chosen.by),
        metadata=breakdown.read_metadata(chosen.metadata) if chosen.metadata else None,
        speakers=read_speakers(chosen.utt2spk) if chosen.utt2spk else None,
    )


def _cohort_places(chosen: argparse.Namespace, config: Config, meta: dict, sample_rate: int) -> tuple:
    """(where the cohort lies, its utterances, the speaker of each); checked, so that --as_norm K fits it."""
    data, speakers = config.data, trained_speakers(config, meta)
    if chosen.cohort or chosen.cohort_shards:
        data, speakers = (
            DataConfig(train_list=chosen.cohort, train_root=chosen.cohort_root, train_shards=chosen.cohort_shards),
            None,
        )
    places, of = cohort_places(data, chosen.cohort_utterances, speakers, sample_rate)
    if chosen.as_norm:
        scoring.check_top(chosen.as_norm, len(set(of.tolist())))
    return data, places, of


def _finish(chosen, config: Config, facts: dict, lists, embedded: Embedded, cohort, beside: dict) -> None:
    """Scores, reports and prints, on rank 0."""
    out_dir = Path(chosen.out)
    backend = backend_of(
        config,
        subtract_mean=chosen.subtract_mean,
        as_norm=chosen.as_norm,
        qualities=tuple(chosen.quality),
        cohort=cohort,
    )
    if chosen.keep_embeddings:
        kept.keep(out_dir, embedded, facts, cohort)
    result = assess(*lists, embedded, backend, out_dir, facts, _asked(chosen, config), beside)
    keep_scores(config, out_dir)
    if chosen.tensorboard:
        report.to_tensorboard(chosen.tensorboard, flat(result), out_dir, facts.get("step") or 0)
    print(report.text(report.rows(result)))
    print(f"\nin {out_dir}: " + ", ".join(sorted(p.name for p in out_dir.iterdir() if not p.name.startswith("."))))


def with_options(config: Config, chosen: argparse.Namespace) -> Config:
    """The run's config with the evaluation options of the command line."""
    given = {name: getattr(chosen, name) for name in EVAL_OPTIONS if getattr(chosen, name) is not None}
    if "root" in given or "shards" in given:  # other places for the audio replace the run's
        given = {"root": None, "shards": None} | given
        if "trials" in given or "dev_trials" in given:  # and the run's other lists would be looked for there
            given = {"trials": None, "dev_trials": None} | given
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **given))


if __name__ == "__main__":
    sys.exit(main())
