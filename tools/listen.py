"""What the network hears: the augmented crops of one training batch as WAVs, a picture, and a line for each.

    python -m tools.listen --config wespeaker.yaml --data.train_shards SHARDS --augment.noise_shards NOISE --out heard

Takes the words of a training command, and --out, --number (crops written), --step (global). In OUT: 000.wav ... (what
goes into the network, 16 bits), 000-clean.wav (the same crop before), spectrograms.png (left before, right after, masks
included, 80 mel bands) and drawn.txt, one line a crop: file, utterance, class, what was drawn. Samples beyond full scale,
which the network does see, are clipped in the files; their number is said.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from shards.commands import Parser
from shards.format import atomic_write, wav_header, write_file
from spknet.config import Config
from spknet.data.batches import Steps
from spknet.data.corpus import Corpus
from spknet.data.mixing import mix
from spknet.errors import UserError, run
from spknet.models.features import FLOOR, Spectrum
from spknet.options import parse
from spknet.parallel.ranks import Ranks

BANDS = 80  # mel bands of the picture
RANGE_DB = 70  # below the picture's brightest point


def heard(config: Config, step: int, number: int) -> list[dict]:
    """The first crops of the global batch of a step: {key, label, text, clean, wave, masks}; waves float32 in [-1, 1]."""
    corpus = Corpus.open(config.data, config.train.seed, config.augment)
    steps = Steps(config, corpus, Ranks())
    batch = steps[step]
    if isinstance(batch, UserError):
        raise batch
    crops, augment, labels, _ = batch.to(torch.device("cpu"))
    waves = mix(crops, augment, steps.samples, torch.float32)
    epoch, m = step // corpus.sampler.steps, config.data.utterances_per_speaker
    speed_slots = np.repeat(batch.slots[::m], m) if steps.speed_labels else None
    texts = steps.augmenter.describe(epoch, batch.slots, speed_slots)
    masks = augment.get("masks")
    return [
        {
            "key": corpus.utterances.key(batch.rows[i]),
            "label": int(labels[i // m]),
            "text": texts[i],
            "clean": crops[i, : steps.samples].float() / 32768,
            "wave": waves[i],
            "masks": None if masks is None else masks[i],
            "rate": corpus.utterances.sample_rate,
        }
        for i in range(min(number, len(crops)))
    ]


def write_wav(path: Path, wave: torch.Tensor, rate: int) -> int:
    """16 bits, whole or not at all; returns how many samples were clipped."""
    samples = (wave.double().numpy() * 32768).round()
    pcm = samples.clip(-32768, 32767).astype("<i2")
    write_file(path, wav_header(len(pcm), rate) + pcm.tobytes())
    return int((np.abs(samples) > 32768).sum())


def spectrogram(wave: torch.Tensor, rate: int, masks: torch.Tensor | None) -> np.ndarray:
    """(BANDS, frames) in dB; masked bands and spans NaN."""
    spectrum = Spectrum(rate, BANDS)
    energies = spectrum.power(wave[None].float(), center=True)[0] @ spectrum.filters  # (frames, BANDS)
    out = 10 * (energies.mT + FLOOR).log10().numpy()
    if masks is not None and len(masks):
        half, centres = len(masks) // 2, [(np.arange(n) + 0.5) / n for n in out.shape]
        for spans, axis in ((masks[:half], 0), (masks[half:], 1)):
            for start, end in spans.tolist():
                inside = (centres[axis] >= start) & (centres[axis] < end)
                out[inside if axis == 0 else slice(None), slice(None) if axis == 0 else inside] = np.nan
    return out


def draw(path: Path, crops: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(crops), 2, figsize=(11, 1.7 * len(crops)), squeeze=False, sharex=True)
    for number, (row, crop) in enumerate(zip(axes, crops)):
        seconds = len(crop["wave"]) / crop["rate"]
        pictures = [spectrogram(crop["clean"], crop["rate"], None)]
        pictures.append(spectrogram(crop["wave"], crop["rate"], crop["masks"]))
        top = max(np.nanmax(picture) for picture in pictures)
        for axis, picture, title in zip(row, pictures, (f"{number:03d}  {crop['key']}", crop["text"])):
            shown = {"vmin": top - RANGE_DB, "vmax": top, "cmap": "magma", "extent": (0, seconds, 0, BANDS)}
            axis.imshow(picture, origin="lower", aspect="auto", **shown)
            axis.set_facecolor("lightgrey")  # masked
            axis.set_title(textwrap.fill(title, 95), fontsize=7, parse_math=False)
            axis.tick_params(labelsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=7)
    axes[0][0].set_ylabel("mel band", fontsize=7)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m tools.listen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--number", type=int, default=8, help="crops to write (8)")
    parser.add_argument("--step", type=int, default=0, help="global step whose batch is heard (0)")
    chosen, words = parser.parse_known_args(argv)
    if chosen.number < 1 or chosen.step < 0:
        parser.error("--number is at least 1, --step at least 0")
    crops = heard(parse(words), chosen.step, chosen.number)
    chosen.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, crop in enumerate(crops):
        write_wav(chosen.out / f"{number:03d}-clean.wav", crop["clean"], crop["rate"])
        clipped = write_wav(chosen.out / f"{number:03d}.wav", crop["wave"], crop["rate"])
        text = crop["text"] + (f"; {clipped} samples clipped in this file" if clipped else "")
        lines.append(f"{number:03d}.wav  {crop['key']}  class {crop['label']}  {text}")
    write_file(chosen.out / "drawn.txt", "\n".join(lines) + "\n")
    draw(chosen.out / "spectrograms.png", crops)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
