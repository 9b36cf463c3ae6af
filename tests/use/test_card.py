"""A card says what development trials bear out, belongs to weights and not to a path, and is refused where it is damaged."""

import json
import shutil

import numpy as np
import pytest
from scipy.optimize import minimize

import spknet
from spknet import cli
from spknet.checkpoints import card as cards
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.card import CardError
from spknet.evaluate.lists import open_lists
from spknet.evaluate.trials import read_trials
from spknet.use import make_card


def scores_of(net, run_dir, corpus) -> tuple[np.ndarray, np.ndarray]:
    trials = read_trials(str(run_dir.parent / "dev.txt"))
    names = sorted(trials.utterances())
    rows = dict(zip(names, net.embed([str(corpus / name) for name in names]).astype(float)))
    scores = [rows[trials.models[a]] @ rows[trials.tests[b]] for a, b in zip(trials.left, trials.right)]
    return np.array(scores), trials.labels


def test_calibration_is_the_most_likely_one_and_the_threshold_follows(net, run_dir, corpus):
    scores, labels = scores_of(net, run_dir, corpus)
    mean, deviation = scores.mean(), scores.std()
    prior = np.log(labels.sum() / (1 - labels).sum())

    def loss(x):
        logit = x[0] * (scores - mean) / deviation + x[1]
        return np.logaddexp(0, np.where(labels == 1, -logit, logit)).sum()

    a, b = minimize(loss, [1.0, 0.0], tol=1e-12).x
    card = net.card
    assert card.calibration.weight == pytest.approx(a / deviation, rel=1e-2)
    assert card.llr(mean) == pytest.approx(b - prior, abs=1e-2)
    assert card.probability(card.threshold) == pytest.approx(0.5)
    assert sum(card.histogram.targets) == labels.sum() and sum(card.histogram.nontargets) == (1 - labels).sum()
    assert card.histogram.edges[0] == pytest.approx(scores.min(), abs=1e-6)
    dev = card.lists[0]
    assert (dev.role, dev.trials, dev.targets, dev.speakers) == ("dev", 190, 40, 4)
    assert dev.intervals["eer"][0] <= dev.figures["eer"] <= dev.intervals["eer"][1]


def test_another_prior_is_another_threshold(net):
    learned = net.card.calibration
    threshold = cards.threshold_of(learned, 0.01)
    assert learned.weight * threshold + learned.bias == pytest.approx(np.log(99))


def test_a_card_is_plain_values_and_comes_back_as_it_was(net, tmp_path):
    cards.write(tmp_path / "card.json", net.card)
    assert cards.read(tmp_path / "card.json") == net.card == cards.from_dict(cards.to_dict(net.card))
    for path, found in (
        ("run", "run/card.json"),
        ("run/checkpoints/step-1.pt", "run/card.json"),
        ("a.pt", "a.pt.card.json"),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        assert cards.place(tmp_path / path) == tmp_path / found


def test_the_page_has_figures_limits_and_a_licence(run_dir):
    page = (run_dir / "card.md").read_text()
    for said in (
        "| dev (dev) |",
        "licence | CC BY 4.0",
        "## Limits",
        "on 4 speakers (40 target and 150 non-target",
        "aamsoftmax",
    ):
        assert said in page


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text[:50], "card.json: not JSON"),
        (lambda text: "[]", "card.json: no card of this version: the whole"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "no card of this version: version"),
        (lambda text: text.replace('"weight": ', '"weight": -'), "no card of this version: calibration.weight"),
        (lambda text: text.replace('"threshold"', '"threshold_"'), "no card of this version: threshold"),
    ],
)
def test_a_damaged_card_is_named(run_dir, tmp_path, damage, message):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "card.json").write_text(damage((run_dir / "card.json").read_text()))
    with pytest.raises(CardError, match=message):
        spknet.load(tmp_path / "run", "cpu")


def test_the_card_of_other_weights_is_not_used(run_dir, wavs, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    state = checkpoint.read(checkpoint.path_of(run_dir, 7))
    next(value for value in state["model"].values() if value.is_floating_point()).add_(1)
    checkpoint.save(tmp_path / "run", state | {"step": 9}, keep=0)
    network = spknet.load(tmp_path / "run", "cpu")
    verdict = network.verify(*wavs[:2])
    assert (verdict.probability, verdict.threshold, verdict.same) == (None, None, None)
    assert "its card is that of other weights (step 7); make it anew with `spknet card" in verdict.why[-1]
    assert spknet.load(checkpoint.path_of(tmp_path / "run", 7), "cpu").card  # which it still fits


def test_a_network_without_a_card_says_so(run_dir, wavs, tmp_path, capsys):
    path = shutil.copy(checkpoint.path_of(run_dir, 7), tmp_path / "a.pt")
    verdict = spknet.load(path, "cpu").verify(*wavs[:2])
    assert verdict.same is None and "never calibrated: it has no card; make one with `spknet card" in verdict.why[-1]
    words = ["verify", *wavs[:2], "--checkpoint", str(path), "--device", "cpu"]
    voices = str(tmp_path / "voices")
    assert cli.main(["enroll", "Ann", wavs[0], "--to", voices, *words[3:]]) == 0 and capsys.readouterr()
    for command in (words, ["identify", wavs[1], "--among", voices, *words[3:]]):
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert out.count("never calibrated") == 1 and "never calibrated" not in err and "give --threshold" in err
        assert cli.main([*command, "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["why"][-1] == verdict.why[-1]
    assert cli.main([*words, "--threshold", "-1"]) == 0 and cli.main([*words, "--threshold", "1"]) == 1
    assert cli.main(["card", str(path), "--device", "cpu"]) == 0
    assert spknet.load(path, "cpu").card == cards.read(tmp_path / "a.pt.card.json")


def test_speakers_of_training_calibrate_nothing(net, corpus):
    lists = open_lists(None, str(corpus / "test_list.txt"), root=str(corpus))
    with pytest.raises(CardError, match="test_list.txt: the network was trained on 8 of its speakers"):
        make_card.make(net, lists)
    with pytest.raises(CardError, match="a card is learned on development trials with labels; give --dev_trials"):
        make_card.make(net, open_lists(str(corpus / "test_list.txt"), root=str(corpus)))


def test_info_tells_what_a_checkpoint_is(run_dir, capsys):
    assert cli.main(["info", str(run_dir), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["network"], said["step"], said["sample_rate"], said["training_speakers"]) == (
        "ResNetSE34L",
        7,
        16000,
        8,
    )
    assert said["options"]["model.width"] == 0.25 and said["card"]["license"] == "CC BY 4.0"
    assert cli.main(["info", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "features: log_mel" in text and "  model.width: 0.25" in text and "same speaker from a cosine of" in text
