"""The recipes of the package: they parse, fit their ranks, and mean what their sources say."""

import functools

import pytest
import torch

from spknet.errors import UserError
from spknet.models import build_model
from spknet.models.describe import multiply_adds
from spknet.options import RECIPES, parse
from spknet.train.optim import learning_rate, margin
from spknet.train.recipes import aim, cost, main, names

NETWORKS = ["resnet34", "resnet221", "resnet293", "ecapa512", "ecapa1024", "campplus", "eres2netv2"]
NETWORKS += [f"redimnet2_b{i}" for i in range(7)]
MODERN = [*NETWORKS, *(f"{name}_lm" for name in NETWORKS), "finetune"]


@pytest.mark.parametrize("name", names())
def test_every_recipe_parses(name):
    assert parse(["--config", name])


@pytest.mark.parametrize("name", MODERN)
def test_todays_recipes_fit_8_to_64_ranks_and_name_their_aim(name):
    config = parse(["--config", name])
    assert [config.data.speakers_per_batch % ranks for ranks in (8, 16, 32, 64)] == [0, 0, 0, 0]
    text = (RECIPES / f"{name}.yaml").read_text()
    assert f"--config {name}" in text and "ours" in text
    if name != "finetune":
        assert "VoxCeleb1-O / E / H cleaned" in " ".join(text.split()) and len(aim(name)) > 10
        with torch.device("meta"):  # the network exists in this variant
            build_model(config.model, features=config.features)


@pytest.mark.parametrize("name", NETWORKS)
def test_fine_tuning_with_a_large_margin_goes_on_with_the_same_network(name):
    first, second = parse(["--config", name]), parse(["--config", f"{name}_lm"])
    assert first.model == second.model and first.features.name == second.features.name
    assert second.data.crop_seconds > 1.9 * first.data.crop_seconds and second.loss.margin > first.loss.margin
    assert first.augment.speed_labels and not second.augment.speed and second.optim.lr <= 1e-4


def test_resnet34_has_the_rates_and_margins_of_wespeaker():
    c, spe = parse(["--config", "resnet34"]), 4000
    rates = [learning_rate(c.optim, epoch * spe, spe, 150 * spe, 256) for epoch in (0, 3, 6, 150)]
    # By hand: R = 256 / 64, 0.1 exp(x ln(5e-5 / 0.1)) with x the part of the run, a ramp over 6 epochs.
    assert rates == pytest.approx([0, 0.5 * 0.4 * 5e-4**0.02, 0.4 * 5e-4**0.04, 0.4 * 5e-4], rel=1e-9)
    assert rates[2] == pytest.approx(0.295, abs=0.001)
    margins = [margin(c.loss, round(epoch * spe), spe) for epoch in (0, 19, 21, 39, 100)]
    assert margins == pytest.approx([0, 0, 0.2 * (1 - (1e-3 / (1 + 1e-6)) ** 0.1), 0.2, 0.2], abs=1e-9)


def test_redimnet2_decays_its_head_more():
    for i, (decay, times) in enumerate([(2e-5, 5), (5e-6, 2), (1.5e-5, 4), (2e-5, 5), (2e-5, 5), (2e-5, 5), (2e-5, 5)]):
        optim = parse(["--config", f"redimnet2_b{i}"]).optim
        assert (optim.weight_decay, optim.head_weight_decay) == pytest.approx((decay, decay * times))


def test_the_list_tells_cost_and_aim(capsys):
    assert main(["resnet34"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # WeSpeaker's ResNet34 has 4.528e9 multiply-adds for 200 frames; VoxCeleb2-dev 1,092,009 utterances, 150 times.
    assert "0.659 / 0.821 / 1.437 with QMF" in said and "resnet34 ResNet34 4.528 163.8 0.742" in said
    with pytest.raises(UserError, match="resnet34_lm"):
        main(["nonsense"])


@functools.cache  # of many losses with one network
def counted(model, features, crop_seconds: float) -> float:
    with torch.device("meta"):
        # A window of 25 ms reaches 15 ms beyond its 10 ms: n frames are 10 n + 15 ms.
        return multiply_adds(build_model(model, features=features), crop_seconds - 0.015)


@pytest.mark.parametrize("name", names())
def test_the_cost_in_the_head_of_a_recipe_is_that_of_its_network(name):
    config = parse(["--config", name])
    assert f"{cost(name):.4f}" == f"{counted(config.model, config.features, config.data.crop_seconds) / 1e9:.4f}"


def test_an_aim_is_a_whole_sentence():
    assert aim("loss_triplet").startswith(
        '"In defence of metric learning for speaker recognition" (Chung et al., 2020), '
    )
