"""What projects publish of the networks that stand here: error rates, and when a network is the one to choose.

Equal error rates in percent on the cleaned lists Vox1-O, -E and -H (`old`: on the list of 2017, `veri_test.txt`). A row says what it
was trained on, whether it was fine-tuned on long crops with a large margin (LM), and what was done to the cosine: `mean` is the
subtraction of the training data's mean embedding, `AS-norm` adaptive score normalisation, `QMF` calibration with quality
measures. Nothing of this was measured here. Figures stand as printed by their source; where none is known there is no row.

    rows_of("ResNet34", "wespeaker")  # [Published(...), ...]
"""

from __future__ import annotations

from typing import NamedTuple

SOURCES = {
    "WS": "github.com/wenet-e2e/wespeaker, examples/voxceleb/v2/README.md",
    "3DS": "github.com/modelscope/3D-Speaker, README.md and egs/voxceleb",
    "SB": "huggingface.co/speechbrain/spkrec-ecapa-voxceleb",
    "TR": "github.com/TaoRuijie/ECAPA-TDNN, README.md",
    "GG": "github.com/Liu-Tianchi/Golden-Gemini-for-Speaker-Verification, README.md",
    "RDN": "github.com/IDRnD/redimnet, and arXiv 2407.18223",
    "RDN2": "github.com/PalabraAI/redimnet2, README.md, and arXiv 2603.11841",
    "VT": "github.com/clovaai/voxceleb_trainer, README.md",
    "RN": "github.com/Jungjee/RawNet, python/RawNet3/README.md, which does not say which edition of the list",
}


class Published(NamedTuple):
    network: str
    variant: str  # the network's; "": it has one only
    o: str  # percent
    e: str
    h: str
    data: str = "Vox2"  # Vox2: VoxCeleb2 dev, 5994 speakers
    tuned: bool = False  # large-margin fine-tuning
    score: str = "mean"
    source: str = "WS"


def _wespeaker(network: str, *rows: str) -> list[Published]:
    """Rows `O E H` in the order plain, AS-norm, LM, LM and AS-norm, LM and AS-norm and QMF; - where there is none."""
    kinds = [(False, "mean"), (False, "AS-norm"), (True, "mean"), (True, "AS-norm"), (True, "QMF")]
    variant = (
        "wespeaker" if network in ("ResNet34", "ResNet221", "ResNet293", "ECAPA-512", "ECAPA-1024", "CAM++") else ""
    )
    return [
        Published(network, variant, *row.split(), tuned=tuned, score=score)
        for row, (tuned, score) in zip(rows, kinds)
        if row != "-"
    ]


def _redimnet(network: str, plain: str, normed: str) -> list[Published]:
    """Both with LM: `O E H` without and with AS-norm."""
    return [
        Published(network, "", *row.split(), tuned=True, score=score, source="RDN")
        for row, score in ((plain, "none"), (normed, "AS-norm"))
    ]


PUBLISHED = [
    Published("ResNetSE34L", "", "2.18 old", "-", "-", score="none, 10 crops", source="VT"),
    Published("ResNetSE34V2", "", "1.18 old", "-", "-", score="none, 10 crops", source="VT"),
    Published("RawNet3", "", "0.89", "-", "-", data="not said", score="none", source="RN"),
    *_wespeaker(
        "ResNet34",
        "0.867 1.049 1.959",
        "0.787 0.964 1.726",
        "0.797 0.937 1.695",
        "0.723 0.867 1.532",
        "0.659 0.821 1.437",
    ),
    Published("ResNet34", "3dspeaker", "1.05", "-", "-", score="none", source="3DS"),
    *_wespeaker("ResNet221", "0.569 0.774 1.464", "0.479 0.707 1.290", "0.580 0.729 1.351", "0.505 0.676 1.213"),
    *_wespeaker(
        "ResNet293",
        "0.595 0.756 1.433",
        "0.537 0.701 1.276",
        "0.532 0.707 1.311",
        "0.447 0.657 1.183",
        "0.425 0.641 1.146",
    ),
    *_wespeaker("Res2Net34", "1.351 1.347 2.478", "1.234 1.232 2.162"),
    *_wespeaker("ECAPA-512", "1.069 1.209 2.310", "0.957 1.128 2.105", "0.878 1.072 2.007", "0.782 1.005 1.824"),
    *_wespeaker(
        "ECAPA-1024",
        "0.856 1.072 2.059",
        "0.808 0.990 1.874",
        "0.798 0.993 1.883",
        "0.728 0.929 1.721",
        "0.707 0.894 1.615",
    ),
    Published("ECAPA-1024", "speechbrain", "0.80", "-", "-", "Vox1+2", score="S-norm", source="SB"),
    Published("ECAPA-1024", "speechbrain", "0.86", "-", "-", score="none", source="3DS"),
    Published("ECAPA-1024", "taoruijie", "0.96", "-", "-", score="none", source="TR"),
    Published("ECAPA-1024", "taoruijie", "0.86", "1.18", "2.17", score="AS-norm", source="TR"),
    *_wespeaker("CAM++", "0.803 0.932 1.860", "0.718 0.879 1.735", "0.707 0.845 1.664", "0.659 0.803 1.569"),
    Published("CAM++", "3dspeaker", "0.73", "-", "-", score="none", source="3DS"),
    Published("ERes2NetV2", "w26s2e2", "0.68", "-", "-", score="none", source="3DS"),
    Published("ERes2NetV2", "w26s2e2", "0.61", "0.76", "1.45", tuned=True, score="none", source="3DS"),
    Published("DF-ResNet60", "", "0.941", "1.051", "1.799", score="not said", source="GG"),
    *_wespeaker("DF-ResNet114", "0.787 0.963 1.760", "0.707 0.889 1.546", "0.771 0.906 1.599", "0.638 0.839 1.427"),
    Published("DF-ResNet183", "", "0.596", "0.806", "1.440", score="not said", source="GG"),
    Published("DF-ResNet183", "", "0.569", "0.768", "1.342", tuned=True, score="not said", source="GG"),
    Published("SimAM-ResNet34", "", "0.415", "0.615", "1.121", "VB2, Vox2", tuned=True),
    Published("SimAM-ResNet34", "", "0.372", "0.559", "0.997", "VB2, Vox2", tuned=True, score="QMF"),
    Published("SimAM-ResNet100", "", "0.229", "0.458", "0.868", "VB2, Vox2", tuned=True),
    Published("SimAM-ResNet100", "", "0.202", "0.421", "0.795", "VB2, Vox2", tuned=True, score="QMF"),
    *_redimnet("ReDimNet-B0", "1.16 1.25 2.20", "1.07 1.18 2.01"),
    *_redimnet("ReDimNet-B1", "0.85 0.97 1.73", "0.73 0.89 1.57"),
    *_redimnet("ReDimNet-B2", "0.57 0.76 1.32", "0.52 0.74 1.27"),
    *_redimnet("ReDimNet-B3", "0.50 0.73 1.33", "0.47 0.69 1.23"),
    *_redimnet("ReDimNet-B4", "0.51 0.68 1.26", "0.44 0.64 1.17"),
    *_redimnet("ReDimNet-B5", "0.43 0.61 1.08", "0.39 0.59 1.05"),
    *_redimnet("ReDimNet-B6", "0.40 0.55 1.05", "0.37 0.53 1.00"),
    Published("ReDimNet2-B0", "", "1.04", "1.16", "1.97", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B1", "", "0.78", "0.96", "1.72", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B2", "", "0.57", "0.76", "1.41", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B3", "", "0.42", "0.66", "1.22", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B4", "", "0.37", "0.58", "1.07", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B5", "", "0.33", "0.56", "1.07", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B6", "", "0.29", "0.52", "0.99", tuned=True, score="none", source="RDN2"),
    Published("ReDimNet2-B6", "", "0.276", "0.518", "1.003", tuned=True, score="mean"),
    Published("ReDimNet2-B6", "", "0.23", "0.35", "0.67", "VB2+Vox2", tuned=True, score="none", source="RDN2"),
]

CHOOSE = {
    "ResNetSE34": "to repeat the Thin ResNet-34 of the paper of 2020.",
    "ResNetSE34L": "for a first run on a laptop, and to compare with results of 2020 (Fast ResNet-34).",
    "ResNetSE34V2": "to fine-tune voxceleb_trainer's larger checkpoints.",
    "VGGVox": "to repeat VGG-M-40 of the paper of 2020.",
    "RawNet3": "to learn the filters from waves instead of taking mel bands.",
    "ResNet18": "for the simplest of today's networks at half of ResNet34's cost; no figures are known here.",
    "ResNet34": "as the default: the most used checkpoints are of it, and its published figures are the most complete.",
    "ResNet50": "for bottleneck blocks at nearly ResNet34's cost; no figures are published.",
    "ResNet101": "for a step between ResNet34 and ResNet221; no figures are known here.",
    "ResNet152": "to use or fine-tune WeSpeaker's checkpoint of it; no figures are known here.",
    "ResNet221": "for low error from VoxCeleb2 alone where time for embedding does not count.",
    "ResNet293": "for the last tenth of a percent after ResNet221, at a third more cost.",
    "Res2Net34": "to compare with; ResNet34 and CAM++ err less.",
    "ECAPA-512": "where few multiply-adds and short code count; ReDimNet2-B2 errs less at the same cost.",
    "ECAPA-1024": "to use or fine-tune SpeechBrain's checkpoint, the most asked for.",
    "CAM++": "for embedding on CPUs: the least error of the networks under 1.2 10^9 multiply-adds but for ReDimNet2-B2.",
    "ERes2NetV2": "for short utterances of 2 to 3 s, or 3D-Speaker's checkpoints of 200,000 speakers.",
    "DF-ResNet60": "for fewer parameters than ResNet34 at nearly its error.",
    "DF-ResNet114": "for ResNet34's size with less error.",
    "DF-ResNet183": "for ResNet221's error at 40 % of its cost.",
    "DF-ResNet237": "for the largest of its family; no figures are known here.",
    "SimAM-ResNet34": "to fine-tune the checkpoint trained on VoxBlink2's 110,000 speakers.",
    "SimAM-ResNet100": "to fine-tune the larger checkpoint of these 110,000 speakers; the most costly network here.",
    "GE2E-LSTM": "to use Resemblyzer's checkpoint, or Real-Time-Voice-Cloning's; train another one instead.",
    "ReDimNet-B0": "to use the released checkpoint; train ReDimNet2-B0 instead.",
    "ReDimNet-B1": "to use the released checkpoint; train ReDimNet2-B1 instead.",
    "ReDimNet-B2": "to use the released checkpoint; train ReDimNet2-B2 instead.",
    "ReDimNet-B3": "to use the released checkpoint; train ReDimNet2-B3 instead.",
    "ReDimNet-B4": "to use the released checkpoint; train ReDimNet2-B4 instead.",
    "ReDimNet-B5": "to use the released checkpoint; train ReDimNet2-B5 instead.",
    "ReDimNet-B6": "to use the released checkpoint; train ReDimNet2-B6 instead.",
    "ReDimNet2-B0": "where a million parameters must do, on a phone or a small board.",
    "ReDimNet2-B1": "between B0 and B2.",
    "ReDimNet2-B2": "for the least error under 10^9 multiply-adds.",
    "ReDimNet2-B3": "for new training on one GPU: ResNet293's error at a tenth of its cost.",
    "ReDimNet2-B4": "for less error than any ResNet here at ResNet34's cost.",
    "ReDimNet2-B5": "between B4 and B6.",
    "ReDimNet2-B6": "for the least error from VoxCeleb2 alone, at half of ResNet293's cost.",
}


def rows_of(network: str, variant: str) -> list[Published]:
    """The published figures of a network; variant as in ModelConfig, "" for networks of one variant."""
    return [row for row in PUBLISHED if row.network == network and row.variant in ("", variant)]
