"""spknet info: sizes and costs of every network, against the facts; the page made by it."""

import json
from pathlib import Path

import pytest

from spknet.config import ModelConfig
from spknet.models import MODELS, describe
from spknet.models.published import CHOOSE, PUBLISHED, SOURCES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "networks.md"

# Of the official classes: parameters and 10^9 multiply-adds of 2 s, as counted by others.
COUNTED = {
    ("ResNet18", "wespeaker"): (4105440, 2.169),
    ("ResNet34", "wespeaker"): (6634336, 4.528),
    ("ResNet34", "3dspeaker"): (6700128, 4.528),
    ("ResNet50", "wespeaker"): (11131360, 5.07),
    ("ResNet101", "wespeaker"): (15892448, 9.81),
    ("ResNet152", "wespeaker"): (19814880, 14.54),
    ("ResNet221", "wespeaker"): (23792224, 20.95),
    ("ResNet293", "wespeaker"): (28626016, 27.63),
    ("ECAPA-512", "wespeaker"): (6190720, 1.037),
    ("ECAPA-512", "speechbrain"): (6194048, None),
    ("ECAPA-1024", "wespeaker"): (14657088, 2.649),
    ("ECAPA-1024", "speechbrain"): (20767552, 3.751),
    ("CAM++", "wespeaker"): (7176224, 1.126),
    ("ERes2NetV2", "w26s2e2"): (17859632, 8.297),
    ("ERes2NetV2", "w24s4e4"): (53513632, 24.55),
    ("Res2Net34", "wespeaker"): (4689024, 1.71),
    ("DF-ResNet60", "wespeaker"): (4047840, 2.79),
    ("DF-ResNet114", "wespeaker"): (6531552, 5.235),
    ("DF-ResNet183", "wespeaker"): (9196384, 8.03),
    ("DF-ResNet237", "wespeaker"): (11680096, 10.47),
    ("SimAM-ResNet34", "wespeaker"): (25213760, 18.13),
    ("SimAM-ResNet100", "wespeaker"): (50232896, 57.06),
    ("ReDimNet-B0", "redimnet"): (1004251, 0.413),
    ("ReDimNet-B1", "redimnet"): (2126937, 0.602),
    ("ReDimNet-B2", "redimnet"): (5067057, 1.040),
    ("ReDimNet-B3", "redimnet"): (3225021, 2.921),
    ("ReDimNet-B4", "redimnet"): (6441521, 4.738),
    ("ReDimNet-B5", "redimnet"): (7659761, 8.822),
    ("ReDimNet-B6", "redimnet"): (15015473, 20.126),
    ("ReDimNet2-B0", "redimnet2"): (1115220, 0.323),
    ("ReDimNet2-B1", "redimnet2"): (2161488, 0.556),
    ("ReDimNet2-B2", "redimnet2"): (3677760, 0.943),
    ("ReDimNet2-B3", "redimnet2"): (4181576, 2.699),
    ("ReDimNet2-B4", "redimnet2"): (6659744, 4.635),
    ("ReDimNet2-B5", "redimnet2"): (8959272, 9.677),
    ("ReDimNet2-B6", "redimnet2"): (12394784, 13.126),
    # By hand: gates 4 * 256 * ((40 + 256) + 2 * 512) for each of 160 frames, then 256 * 256; 2 s are two windows.
    ("GE2E-LSTM", "resemblyzer"): (1423616, 0.4327),
}
WITH_OPTIONS = [
    (ModelConfig("ECAPA-512", encoder="ASTP"), 5797504, 0.959),
    (ModelConfig("ECAPA-1024", encoder="ASTP"), 14263872, None),
    (ModelConfig("CAM++", embedding_size=192), 6848544, None),
    (ModelConfig("SimAM-ResNet34", width=0.5), 7292640, 4.54),
    (ModelConfig("ResNet34", variant="3dspeaker", embedding_size=192), 6343648, None),
    (ModelConfig("ReDimNet2-B6", agg_gnorm=True), 12459296, 13.126),
]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every network as `spknet info` describes it; counted once, for it takes a while."""
    return [describe.describe(model) for model in describe.configurations()]


def test_parameters_are_exact_and_multiply_adds_within_one_percent(rows):
    found = {(row["name"], row["variant"]): row for row in rows if not row["options"]["agg_gnorm"]}
    for key, (parameters, adds) in COUNTED.items():
        assert found[key]["parameters"] == parameters, key
        assert adds is None or found[key]["multiply_adds"] / 1e9 == pytest.approx(adds, rel=0.01), key


def test_counts_of_other_options():
    for model, parameters, adds in WITH_OPTIONS:
        row = describe.describe(model)
        assert row["parameters"] == parameters, model
        assert adds is None or row["multiply_adds"] / 1e9 == pytest.approx(adds, rel=0.01), model


def test_every_network_is_described_and_nothing_is_said_of_others(rows):
    names = set(MODELS) - {"VGGVox40"}
    assert {row["name"] for row in rows} == names == set(CHOOSE)
    assert all(row["choose"].endswith(".") and len(row["choose"].split()) > 2 for row in rows)
    variants = {(row["name"], row["variant"]) for row in rows}
    for row in PUBLISHED:
        assert row.network in names and row.source in SOURCES
        assert not row.variant or (row.network, row.variant) in variants, row


def test_the_command_prints_data_a_table_and_the_page(rows, capsys, monkeypatch):
    by_model = dict(zip(map(str, describe.configurations()), rows))
    monkeypatch.setattr(describe, "describe", lambda model, seconds: by_model[str(model)])
    assert describe.main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == rows
    b3 = next(row for row in printed if row["name"] == "ReDimNet2-B3")
    assert b3["options"]["embedding_size"] == 192 and b3["features"] == "tfmel"
    assert [(r["o"], r["e"], r["h"], r["data"], r["tuned"]) for r in b3["published"]] == [
        ("0.42", "0.66", "1.22", "Vox2", True)
    ]
    assert describe.main(["--markdown"]) == 0
    made = capsys.readouterr().out
    assert PAGE.read_text().endswith("makes all that follows.\n\n" + made)
    assert describe.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_attention_is_counted_with_its_two_products():
    frames, channels = 60, 864 // 36
    model = describe.build_model(ModelConfig("ReDimNet2-B0"))
    layer = model.backbone.stage0[7].tcm[4]
    output = layer.attention(describe.torch.zeros(1, frames, channels))
    assert layer.attention.multiply_adds(output) == 2 * frames * frames * channels
    # Longer input: what grows with the square of the frames is attention alone.
    costs = [describe.multiply_adds(model, seconds) for seconds in (2, 4, 6)]
    strides, squares = 1, 0.0
    for _, stride, _, _, narrowing in model.backbone.layout.stages:  # each attends to the frames that its stride leaves
        strides *= stride
        squares += 864 // narrowing / strides**2
    assert costs[2] - 2 * costs[1] + costs[0] == 2 * 2 * 200**2 * squares
