"""Losses, gradients, margins and rates against WeSpeaker's, 3D-Speaker's and SpeechBrain's own code.

tests/reference/losses_modern.json: numbers of their code (commits in it), trimmed to four rows of each gradient.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spknet.config import ConfigError, LossConfig, OptimConfig, from_dict
from spknet.losses import build_loss
from spknet.losses.classification import AMSoftmax, cosines_of
from spknet.train.optim import build_optimizer, learning_rate, margin

FACTS = json.loads((Path(__file__).resolve().parents[1] / "reference" / "losses_modern.json").read_text())
CASES = FACTS["cases"]


def drawn(key: str, rows: int) -> np.ndarray:
    """The reference's rule for weights: a generator of the key's own."""
    return (np.random.default_rng(zlib.crc32(key.encode())).standard_normal((rows, 16)) / 4).astype(np.float32)


def weights(kind: str) -> np.ndarray:
    if kind == "single":
        return drawn("weight", 20)
    spread = np.where(np.arange(20) % 2 == 0, 0.02, 0.3).astype(np.float32).repeat(3)[:, None]
    return drawn("base", 20).repeat(3, axis=0) + spread * drawn("weight", 60)


def options(case: str) -> LossConfig:
    given = CASES[case]["options"]
    common = {"scale": given["scale"], "margin": given["margin"]}
    if case.startswith("sphereface2"):
        special = {"margin_type": given["margin_type"], "curve": given["t"], "positive_weight": given["lanbuda"]}
        return LossConfig(name="sphereface2", **common, **special)
    if case == "am":
        return LossConfig(name="amsoftmax", **common)
    beyond = "jump" if case.startswith("speechbrain") else "continuous"
    top = {} if given.get("do_lm") else {"top_k": given.get("k_top", 0), "top_k_margin": given.get("mp", 0.06)}
    return LossConfig(name="aamsoftmax", beyond_pi=beyond, sub_centers=given.get("K", 1), **top, **common)


def built(case: str, dtype: torch.dtype):
    facts, loss = CASES[case], build_loss(options(case), 16, 20, 1).to(dtype)
    with torch.no_grad():
        loss.weight.copy_(torch.from_numpy(weights(facts["set"])))
        if "bias" in facts:
            loss.offset.fill_(facts["bias"])
    x = torch.tensor(FACTS["x"][facts["set"]], dtype=dtype)[:, None].requires_grad_()
    return loss, x, torch.tensor(FACTS["label"][facts["set"]])


NO_DRAWS = torch.zeros(12, 2, dtype=torch.float64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_those_of_the_official_code(case, dtype, tolerance):
    facts = CASES[case]
    if case.startswith("speechbrain"):
        tolerance = 1e-6  # it computes in float32 whatever it is given
    loss, x, labels = built(case, dtype)
    value, _ = loss(x, labels, NO_DRAWS)
    value.backward()
    assert value.item() == pytest.approx(facts["loss_float64"], rel=tolerance)
    gradient = x.grad[FACTS["grad_rows"], 0].double().numpy()
    assert gradient == pytest.approx(
        np.array(facts["grad_x_float64"]), abs=tolerance, rel=5e-9
    )  # nine digits are given
    norms = np.array(facts["grad_weight_norms_float64"])
    found = loss.weight.grad.double().norm(dim=1).numpy()
    assert found == pytest.approx(norms, abs=3 * tolerance, rel=max(tolerance, 5e-8))  # eight digits are given
    if "grad_bias_float64" in facts:
        assert loss.offset.grad.item() == pytest.approx(facts["grad_bias_float64"], rel=10 * tolerance)


@pytest.mark.parametrize("case", [c for c in CASES if "target_logits_float64" in CASES[c]])
def test_target_logits_equal_those_of_the_official_code(case):
    loss, x, labels = built(case, torch.float64)
    logits = loss.logits(x[:, 0], loss.weight, None, labels)
    assert logits.gather(1, labels[:, None])[:, 0].tolist() == pytest.approx(
        CASES[case]["target_logits_float64"], rel=2e-9
    )


@pytest.mark.parametrize("case", [c for c in CASES if "logits_row0_float64" in CASES[c]])
def test_logits_of_sphereface2_for_the_accuracy(case):
    loss, x, labels = built(case, torch.float64)
    logits = loss.logits(x[:, 0], loss.weight, None, labels)
    assert logits[0].tolist() == pytest.approx(CASES[case]["logits_row0_float64"], rel=2e-7)


@pytest.mark.parametrize("name", ["amsoftmax", "aamsoftmax", "sphereface2"])
@pytest.mark.parametrize("more", [{}, {"top_k": 2, "sub_centers": 2}, {"margin_type": "A", "curve": 2.5}])
def test_a_cosine_rounded_above_one_gives_no_nan(name, more):
    loss = build_loss(LossConfig(name=name, beyond_pi="continuous", margin=0.2, **more), 3, 4, 1)
    centers = loss.centers
    # A vector whose float32 cosine with itself is 1.0000001, so that its opposite's is below -1.
    every = torch.nn.functional.normalize(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    x = next(v for v in every if float(cosines_of(v[None], v[None])) > 1)
    with torch.no_grad():
        loss.weight.copy_(torch.stack([x, -x, 2 * x, torch.tensor([1.0, 0.0, 0.0])]).repeat_interleave(centers, 0))
    x = torch.stack([x, x, -x])[:, None].requires_grad_()
    value, _ = loss(x, torch.tensor([0, 1, 0]), NO_DRAWS[:3])
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all() and loss.weight.grad.isfinite().all()


def test_hardest_classes_are_chosen_without_the_right_one_and_off_at_small_margins():
    loss = build_loss(LossConfig(name="amsoftmax", top_k=1, margin=0.2, scale=1, sub_centers=1), 2, 3, 1).double()
    angles = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        loss.weight.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    logits = loss.logits(x, loss.weight, None, torch.tensor([0]))[0].tolist()
    assert logits == pytest.approx([1 - 0.2, math.cos(1 - 0.06), math.cos(2)])  # class 1 is the nearest other one
    loss.margin = 0.1
    assert loss.logits(x, loss.weight, None, torch.tensor([0]))[0, 1].item() == pytest.approx(math.cos(1 - 0.03))
    loss.margin = 0.001
    assert loss.logits(x, loss.weight, None, torch.tensor([0]))[0, 1].item() == pytest.approx(math.cos(1))


def test_supervised_contrastive_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 2.0], [0.6, 0.8]]], dtype=torch.float64)
    value, accuracy = build_loss(LossConfig(name="supcon", temperature=0.5), 2, 2, 2)(
        x, torch.tensor([0, 1]), NO_DRAWS[:2]
    )
    unit = [np.array(v) for v in ([1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8])]
    terms = []
    for i, own in enumerate((1, 0, 3, 2)):
        others = [math.exp(unit[i] @ unit[j] / 0.5) for j in range(4) if j != i]
        terms.append(-math.log(math.exp(unit[i] @ unit[own] / 0.5) / sum(others)))
    assert value.item() == pytest.approx(np.mean(terms))
    # cosines of row 1: 0.8 with its own, 0.6, 0.96; of row 3: 0.6, 0.96, 0.8 with its own: two of four are right
    assert accuracy.item() == 50


def test_two_slots_of_one_speaker_are_positives_of_each_other():
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = build_loss(LossConfig(name="supcon", temperature=1.0), 4, 3, 2)
    unit = torch.nn.functional.normalize(x.flatten(0, 1), dim=1).numpy()
    labels, terms = [7, 7, 7, 7, 2, 2], []
    for i in range(6):
        log_sum = math.log(sum(math.exp(unit[i] @ unit[j]) for j in range(6) if j != i))
        own = [unit[i] @ unit[j] - log_sum for j in range(6) if j != i and labels[j] == labels[i]]
        terms.append(-np.mean(own))
    assert loss(x, torch.tensor([7, 7, 2]), NO_DRAWS[:3])[0].item() == pytest.approx(np.mean(terms))


@pytest.mark.parametrize(
    "facts", FACTS["rates"], ids=lambda f: f"{f['reference']}-{f['options'].get('warm_from_zero')}"
)
def test_rates_equal_those_of_the_official_schedules(facts):
    given = facts["options"]
    if facts["reference"].startswith("wespeaker"):
        per_epoch, epochs = given["epoch_iter"], given["num_epochs"]
        config = OptimConfig(
            lr=given["initial_lr"],
            schedule="exponential",
            final_lr_fraction=given["final_lr"] / given["initial_lr"],
            warmup_epochs=given["warm_up_epoch"],
            warm_from_zero=given["warm_from_zero"],
            lr_batch=64,
        )
        utterances = round(64 * given["scale_ratio"])  # theirs: GPUs x batch / 64
    else:
        per_epoch, epochs, utterances = given["step_per_epoch"], given["fix_epoch"], 0
        low = given["min_lr"] / given["max_lr"]
        config = OptimConfig(
            lr=given["max_lr"], schedule="warmup_cosine", final_lr_fraction=low, warmup_epochs=given["warmup_epoch"]
        )
    rates = [learning_rate(config, t, per_epoch, epochs * per_epoch, utterances) for t in facts["iteration"]]
    assert rates == pytest.approx(facts["rate"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("facts", FACTS["margins"], ids=lambda f: f"{f['reference']}-{f['options']['increase_type']}")
def test_margins_equal_those_of_the_official_schedules(facts):
    given = facts["options"]
    counted_from = 1 if facts["reference"].startswith("wespeaker") else 0
    last = given["fix_start_epoch"] if "fix_start_epoch" in given else given["fix_epoch"]
    config = LossConfig(
        margin=given["final_margin"],
        margin_start=given["initial_margin"],
        margin_schedule="exponential" if given["increase_type"] == "exp" else "linear",
        margin_start_epoch=given["increase_start_epoch"] - counted_from,
        margin_end_epoch=last - counted_from,
    )
    per_epoch = given.get("epoch_iter") or given["step_per_epoch"]
    margins = [margin(config, t, per_epoch) for t in facts["iteration"]]
    assert margins == pytest.approx(facts["margin"], rel=1e-9, abs=1e-15)


def test_a_rate_per_batch_size_counts_utterances_whatever_the_schedule():
    for schedule in ("constant", "step", "cosine", "exponential", "warmup_cosine"):
        config = OptimConfig(lr=0.1, lr_batch=64, schedule=schedule)
        assert learning_rate(config, 3, 5, 10, 256) == pytest.approx(4 * learning_rate(config, 3, 5, 10, 64))
        assert learning_rate(config, 3, 5, 10, 64) == learning_rate(OptimConfig(lr=0.1, schedule=schedule), 3, 5, 10)


def test_decay_of_the_head_is_its_own_and_nesterov_is_torchs():
    network, head = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    config = OptimConfig(name="sgd", lr=0.1, weight_decay=0.1, head_weight_decay=0.5, nesterov=True)
    optimizer = build_optimizer(config, [network], [head])
    for p in (network, head):
        p.grad = torch.zeros(2)
    optimizer.step()
    # buf = g = decay w; the step is g + 0.9 buf = 1.9 decay
    assert network.tolist() == pytest.approx([1 - 0.1 * 1.9 * 0.1] * 2)
    assert head.tolist() == pytest.approx([1 - 0.1 * 1.9 * 0.5] * 2)
    with pytest.raises(ConfigError, match="optim.nesterov true: expected optim.name sgd"):
        build_optimizer(OptimConfig(name="adam", nesterov=True), [network])


@pytest.mark.parametrize(
    "option, value, expected",
    [("sub_centers", 0, "greater than or equal to 1"), ("top_k", -1, "greater than or equal to 0")]
    + [("temperature", 0.0, "greater than 0"), ("curve", 0.0, "greater than 0")]
    + [("positive_weight", 1.5, "less than or equal to 1"), ("sample", 0.0, "greater than 0")],
)
def test_a_value_out_of_range_is_an_error_that_says_what_fits(option, value, expected):
    with pytest.raises(ConfigError, match=f"loss.{option}: {value} given, expected {expected}"):
        from_dict({"loss": {option: value}})


def test_options_that_do_not_fit_each_other():
    with pytest.raises(ConfigError, match="margin_end_epoch 2: the margin begins to grow at epoch 5"):
        config = LossConfig(name="softmax", margin_schedule="linear", margin_start_epoch=5.0, margin_end_epoch=2.0)
        build_loss(config, 4, 4, 1)
    with pytest.raises(ConfigError, match="loss.shards 48: expected a power of 2"):
        build_loss(LossConfig(name="softmax", shards=48), 4, 4, 1)


def test_penalties_on_some_columns_are_those_of_a_choice_by_hand():
    """Rows with all, some and none of their entries: values and gradients of cos(theta - p) at the chosen columns alone."""
    head = AMSoftmax(LossConfig(margin=0.2, top_k=3, top_k_margin=0.1), 4, None)
    hardest = torch.tensor([[4, 0, 2], [-1, 3, -1], [-1, -1, -1], [1, -1, 0]])
    cosines = torch.linspace(-0.8, 0.9, 20, dtype=torch.float64).reshape(4, 5).requires_grad_()
    weights = torch.arange(20, dtype=torch.float64).reshape(4, 5)
    found = head.with_penalties(cosines, hardest)
    (gradient,) = torch.autograd.grad((found * weights).sum(), cosines)
    for row in range(4):
        for column in range(5):
            c, w = cosines[row, column].item(), weights[row, column].item()
            chosen = column in hardest[row].tolist()
            value = math.cos(math.acos(c) - 0.1) if chosen else c
            slope = math.sin(math.acos(c) - 0.1) / math.sqrt(1 - c * c) if chosen else 1
            assert found[row, column].item() == pytest.approx(value, abs=1e-9)
            assert gradient[row, column].item() == pytest.approx(w * slope, abs=1e-9)
