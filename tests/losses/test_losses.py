"""Losses against voxceleb_trainer's numbers and against small computations by hand."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spknet.checkpoints.voxceleb_trainer import fit
from spknet.config import ConfigError, LossConfig
from spknet.losses import CLASSIFIERS, LOSSES, build_loss
from tests.conftest import needed

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
CASES = [("losses.json", f"{name}-M{m}") for name, m in [("softmax", 1), ("amsoftmax", 1), ("aamsoftmax", 1)]]
CASES += [("losses.json", name) for name in ("ge2e-M4", "ge2e-M2", "proto-M2", "proto-M3", "angleproto-M2")]
CASES += [("losses.json", name) for name in ("angleproto-M4", "softmaxproto-M2", "triplet-M2")]
CASES += [("losses-seed.json", name) for name in ("contrastive-M2", "triplet-M2")]


def made(name: str, m: int, classes: int = 10, dimensions: int = 16, **options) -> torch.nn.Module:
    return build_loss(LossConfig(name=name, **options), dimensions, classes, m).double()


def draws(speakers: int, first: float = 0.0, second: float = 0.0) -> torch.Tensor:
    return torch.tensor([[first, second]] * speakers, dtype=torch.float64)


def entropy(rows, targets) -> float:
    """Mean cross entropy of logits, by numpy."""
    rows = np.asarray(rows, float)
    return float(np.mean([np.log(np.exp(row - row[t]).sum()) for row, t in zip(rows, targets)]))


def cosine(a, b) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("file, case", CASES)
def test_value_and_gradient_equal_those_of_voxceleb_trainer(file, case):
    facts, name = json.loads(needed(REFERENCE / file).read_text())[case], case.split("-")[0]
    floor = 1e-6 if name == "ge2e" else None
    loss = made(name, facts["M"], facts.get("classes", 10), cosine_floor=floor, **facts["options"])
    state = {}
    for key, entry in facts.get("state", {}).items():
        shape, draw = entry["shape"], np.random.default_rng(zlib.crc32(key.encode()))
        value = entry["value"]
        if value is None:
            spread = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
            value = (spread * draw.standard_normal(shape)).astype(np.float32)
        state[key] = torch.as_tensor(value, dtype=torch.float64)
    found, misfit = fit(loss, state)
    assert not misfit
    loss.load_state_dict(found)
    x = torch.tensor(facts["x"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(facts.get("label", list(range(len(x)))))
    value, accuracy = loss(x, labels, draws(len(x), 0.3, 0.3))
    value.backward()
    expected = torch.tensor(facts["grad_x"], dtype=torch.float64)
    assert value.item() == pytest.approx(facts["loss"], rel=1e-5)
    assert (x.grad - expected).norm() < 1e-5 * expected.norm()
    if name not in ("triplet", "contrastive"):  # there the reference reports an error rate
        assert accuracy.item() == pytest.approx(facts["metric"], abs=1e-4)
    for key, entry in (facts.get("grad_scalars") or {}).items():
        gradient = dict(loss.named_parameters())[key].grad.item()
        assert gradient == pytest.approx(entry, rel=1e-5, abs=1e-6)  # b's is zero but for rounding


TWO = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 2.0], [0.6, 0.8]]], dtype=torch.float64)  # 2 speakers x 2


def test_softmax_by_hand():
    loss = made("softmax", 1, classes=2, dimensions=2)
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        loss.bias.copy_(torch.tensor([0.0, 0.5]))
    value, accuracy = loss(TWO[:, :1], torch.tensor([0, 0]), draws(2))
    assert value.item() == pytest.approx(entropy([[1, 0.5], [0, 2.5]], [0, 0]))
    assert accuracy.item() == 50


def test_margins_by_hand():
    angle = math.acos(0.8)
    for name, right in (("amsoftmax", 0.8 - 0.2), ("aamsoftmax", math.cos(angle + 0.2))):
        loss = made(name, 1, classes=2, dimensions=2, margin=0.2, scale=10)
        with torch.no_grad():
            loss.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))  # lengths do not matter
        value, _ = loss(TWO[:1, 1:] * 7, torch.tensor([0]), draws(1))
        assert value.item() == pytest.approx(entropy([[10 * right, 10 * 0.6]], [0]))
        loss.margin = 0.0  # the trainer's margin warm-up
        value, _ = loss(TWO[:1, 1:], torch.tensor([0]), draws(1))
        assert value.item() == pytest.approx(entropy([[8, 6]], [0]))


def test_additive_angular_margin_goes_on_beyond_pi():
    loss = made("aamsoftmax", 1, classes=2, dimensions=2, margin=0.5, scale=10)
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[[-1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    value, _ = loss(x, torch.tensor([0]), draws(1))
    value.backward()
    assert value.item() == pytest.approx(entropy([[10 * (-1 - 0.5 * math.sin(0.5)), 0]], [0]))
    assert x.grad.isfinite().all()


def test_prototypes_by_hand():
    value, accuracy = made("proto", 2, dimensions=2)(TWO, torch.tensor([3, 1]), draws(2))
    q, p = TWO[:, 0].numpy(), TWO[:, 1].numpy()
    logits = [[-np.sum((a - b + 1e-6) ** 2) for b in p] for a in q]
    assert value.item() == pytest.approx(entropy(logits, [0, 1]))
    assert accuracy.item() == 100


def test_angular_prototypes_by_hand():
    loss = made("angleproto", 2, dimensions=2)
    assert loss.w.item() == 10 and loss.b.item() == -5
    value, _ = loss(TWO, torch.tensor([3, 1]), draws(2))
    assert value.item() == pytest.approx(entropy([[8 - 5, 6 - 5], [6 - 5, 8 - 5]], [0, 1]))


def test_ge2e_leaves_an_utterance_out_of_its_own_centroid():
    x = TWO.numpy()
    rows = []
    for i in range(2):
        for m in range(2):
            to = [x[j].mean(0) if j != i else x[i, 1 - m] for j in range(2)]
            rows.append([10 * cosine(x[i, m], c) - 5 for c in to])
    value, _ = made("ge2e", 2, dimensions=2)(TWO, torch.tensor([0, 1]), draws(2))
    assert value.item() == pytest.approx(entropy(rows, [0, 0, 1, 1]))


def test_cosine_floor_is_an_option():
    x = TWO * torch.tensor([[[1.0, 1.0]], [[-1.0, 1.0]]])
    floored, plain = (
        made("ge2e", 2, dimensions=2, cosine_floor=floor)(x, torch.tensor([0, 1]), draws(2))[0].item()
        for floor in (1e-6, None)
    )
    assert floored != pytest.approx(plain)


def test_normalised_embeddings_change_means_of_several():
    x = torch.randn(4, 3, 8, dtype=torch.float64) * torch.tensor([1.0, 3.0, 9.0])[:, None]
    labels = torch.arange(4)
    for name in ("angleproto", "ge2e", "proto"):
        plain = made(name, 3, dimensions=8)(x, labels, draws(4))[0]
        normal = made(name, 3, dimensions=8, normalize_embeddings=True)(x, labels, draws(4))[0]
        unit = made(name, 3, dimensions=8)(x / x.norm(dim=2, keepdim=True), labels, draws(4))[0]
        assert normal.item() == pytest.approx(unit.item()) and normal.item() != pytest.approx(plain.item())


def line(*angles) -> torch.Tensor:
    """Speakers on the unit circle: pairs of angles in degrees -> (speakers, 2, 2)."""
    radians = torch.tensor(angles, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=2)


def chord(a: float, b: float) -> float:
    return 2 * math.sin(math.radians(abs(a - b)) / 2)


FOUR = ((0, 10), (40, 60), (100, 110), (170, 175))  # anchor and positive of four speakers, degrees


def test_hard_mining_takes_the_nearest_other_speaker():
    value, accuracy = made("triplet", 2, margin=0.3, hard_rank=0, hard_prob=1.0)(
        line(*FOUR), torch.arange(4), draws(4, 0.99, 0.99)
    )
    nearest = [60, 10, 60, 110]
    terms = [max(0, chord(a, p) ** 2 - chord(a, n) ** 2 + 0.3) for (a, p), n in zip(FOUR, nearest)]
    assert value.item() == pytest.approx(np.mean(terms), abs=1e-5)
    assert accuracy.item() == 100


def test_a_draw_chooses_among_the_hardest_or_among_all():
    loss = made("triplet", 2, margin=9, hard_rank=1, hard_prob=0.5)
    positives = [p for _, p in FOUR]
    for first, second, place in ((0.4, 0.6, 1), (0.4, 0.4, 0), (0.6, 0.99, 2), (0.6, 0.5, 1)):
        value, _ = loss(line(*FOUR), torch.arange(4), draws(4, first, second))
        expected = []
        for i, (a, p) in enumerate(FOUR):
            others = sorted(chord(a, q) for j, q in enumerate(positives) if j != i)
            expected.append(chord(a, p) ** 2 - others[place] ** 2 + 9)
        assert value.item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_a_rank_beyond_the_batch_and_equal_labels_never_pick_the_own_speaker():
    loss = made("triplet", 2, margin=9, hard_rank=50, hard_prob=1.0)
    labels = torch.tensor([7, 7, 7, 2])  # three slots of one speaker: only the last is another
    value, _ = loss(line(*FOUR), labels, draws(4, 0.0, 0.999))
    to_last = [chord(a, p) ** 2 - chord(a, 175) ** 2 + 9 for a, p in FOUR[:3]]
    last = chord(170, 175) ** 2 - chord(170, 10) ** 2 + 9  # the farthest of the three others
    assert value.item() == pytest.approx(np.mean([*to_last, last]), abs=1e-4)


def test_semi_hard_negatives_are_farther_than_the_positive_but_within_the_margin():
    # Anchor at 0: positive at 30; others at 20 (harder), 35 (semi-hard), 120 (easy); the other anchors have none near.
    speakers = ((0, 30), (200, 20), (240, 35), (300, 120))
    labels, margin = torch.arange(4), 0.2
    chosen = {}
    for fallback in ("any", "skip"):
        loss = made("triplet", 2, margin=margin, hard_rank=-1, semi_hard_fallback=fallback)
        chosen[fallback] = loss(line(*speakers), labels, draws(4, 0.0, 0.0))[0].item()
    first = chord(0, 30) ** 2 - chord(0, 35) ** 2 + margin
    found = {0: first}
    positives = [p for _, p in speakers]
    for i, (a, p) in enumerate(speakers[1:], start=1):
        d = sorted(chord(a, q) for j, q in enumerate(positives) if j != i)
        near = [x for x in d if chord(a, p) < x < chord(a, p) + margin]
        found[i] = max(0, chord(a, p) ** 2 - (near or d)[0] ** 2 + margin) if near else None
    kept = [value for value in found.values() if value is not None]
    assert 0 < len(kept) < 4  # the denominator depends on the data
    assert chosen["skip"] == pytest.approx(np.mean(kept), abs=1e-4)
    fallen = []
    for i, (a, p) in enumerate(speakers):
        nearest = min(chord(a, q) for j, q in enumerate(positives) if j != i)
        fallen.append(found[i] if found[i] is not None else max(0, chord(a, p) ** 2 - nearest**2 + margin))
    assert chosen["any"] == pytest.approx(np.mean(fallen), abs=1e-4)


def test_contrastive_by_hand():
    value, _ = made("contrastive", 2, margin=1.0, hard_rank=0, hard_prob=1.0)(line(*FOUR), torch.arange(4), draws(4))
    near = [chord(a, p) ** 2 for a, p in FOUR]
    far = [max(0, 1 - chord(a, n)) ** 2 for (a, _), n in zip(FOUR, [60, 10, 60, 110])]
    assert value.item() == pytest.approx(np.mean(near + far), abs=1e-5)


def test_softmaxproto_is_the_sum_of_its_parts():
    loss, labels = made("softmaxproto", 2, classes=3, dimensions=2), torch.tensor([2, 0])
    value, accuracy = loss(TWO, labels, draws(2))
    softmax, expected = loss.softmax(TWO, labels, draws(2))
    assert value.item() == pytest.approx((softmax + loss.angleproto(TWO, labels, draws(2))[0]).item())
    assert accuracy == expected


def test_clamp_keeps_w_positive():
    for name in ("angleproto", "ge2e", "softmaxproto"):
        loss = made(name, 2)
        part = loss.angleproto if name == "softmaxproto" else loss
        with torch.no_grad():
            part.w.fill_(-3.0)
        loss.clamp_()
        assert part.w.item() == pytest.approx(1e-6)
    made("softmax", 1).clamp_()


def test_losses_take_bfloat16_embeddings_in_float32():
    x = torch.randn(4, 2, 16)
    for name in LOSSES:
        loss = build_loss(LossConfig(name=name), 16, 4, 2)
        with torch.autocast("cpu", torch.bfloat16):
            half, _ = loss(x.bfloat16(), torch.arange(4), draws(4))
            same, _ = loss(x.bfloat16().float(), torch.arange(4), draws(4))
        assert half.dtype == torch.float32 and half == same


def test_mining_is_the_same_for_the_same_draws():
    x, labels = torch.randn(8, 2, 16, dtype=torch.float64), torch.arange(8)
    chance = torch.rand(8, 2, dtype=torch.float64)
    loss = made("triplet", 2, margin=9)
    torch.manual_seed(0)
    one = loss(x, labels, chance)[0]
    torch.manual_seed(1)
    assert one == loss(x, labels, chance)[0]
    assert one != loss(x, labels, 1 - chance)[0]


@pytest.mark.parametrize(
    "name, m, fits",
    [("angleproto", 1, "2 or more"), ("ge2e", 1, "2 or more"), ("proto", 1, "2 or more")]
    + [("triplet", 3, "exactly 2"), ("contrastive", 1, "exactly 2"), ("softmaxproto", 1, "2 or more")]
    + [("softmax", 0, "1 or more")],
)
def test_a_wrong_number_of_utterances_is_an_error_that_says_what_fits(name, m, fits):
    with pytest.raises(ConfigError, match=f"data.utterances_per_speaker {m}: {name} takes {fits} utterances"):
        made(name, m)


def test_classes_that_do_not_fit_the_data():
    with pytest.raises(ConfigError, match="loss.n_classes 9: the data has 10 speakers; give at least 10"):
        made("softmax", 1, classes=10, n_classes=9)
    with pytest.warns(UserWarning, match="loss.n_classes 12: the data has 10 speakers"):
        assert made("amsoftmax", 1, classes=10, n_classes=12).weight.shape == (12, 16)
    assert made("aamsoftmax", 1, classes=10).weight.shape == (10, 16)


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(ConfigError, match="loss.name angelproto: no such loss; did you mean angleproto"):
        made("angelproto", 2)


def test_every_loss_has_fresh_parameters_from_the_generator():
    for name in CLASSIFIERS:
        values = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            values.append(torch.cat([p.flatten() for p in made(name, 2).parameters()]))
        assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
