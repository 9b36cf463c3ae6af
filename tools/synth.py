"""A small made-up speech corpus, so that everything can be tried without downloading anything.

Source and filter (Fant 1960; the cascade of resonators is Klatt's, JASA 67, 1980). Every speaker has a pitch, a vocal
tract length that scales all formants, habits of articulation, a spectral tilt, jitter, breathiness and two dips of the
spectrum; every session has its own channel, noise, level and mood. An utterance is a random row of vowels, fricatives and
pauses, so nothing but the voice is shared by two sessions of one speaker.

    OUT/id00000/s00/00000.wav   16 kHz, mono, 16 bit
    OUT/train_list.txt          `speaker path`
    OUT/test_list.txt           `label path path`: other speakers; targets always cross sessions
    OUT/synth.json              the options that made it, written last

    spknet synth --out corpus
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.commands import Parser
from shards.format import wav_header, write_file
from spknet.errors import run

RATE = 16000  # Hz
HOP, WINDOW, FFT = 256, 512, 1024  # samples
BINS = np.fft.rfftfreq(FFT, 1 / RATE)  # Hz
DELAY = np.exp(-2j * np.pi * BINS / RATE).astype(np.complex64)  # z^-1 on the unit circle

# First three formants in Hz of ten vowels, men's averages of Peterson and Barney (JASA 24, 1952).
VOWELS = np.array(
    [[270, 2290, 3010], [390, 1990, 2550], [530, 1840, 2480], [660, 1720, 2410], [730, 1090, 2440]]
    + [[570, 840, 2410], [440, 1020, 2240], [300, 870, 2240], [640, 1190, 2390], [490, 1350, 1690]],
    dtype=float,
)
UPPER_FORMANTS = np.array([3500.0, 4500.0])  # Hz
FRICATIVES = np.array([[5500.0, 1200.0], [3200.0, 900.0], [7000.0, 3000.0], [1500.0, 1500.0]])  # centre and width in Hz


def draw_speaker(rng: np.random.Generator) -> dict:
    """What stays with a person: pitch (Hz), tract scale, articulation, tilt, jitter, breath, dips."""
    high = rng.random() < 0.5
    return {
        "pitch": np.exp(rng.normal(np.log(200 if high else 118), 0.16)),
        "tract": rng.normal(1.12 if high else 1.0, 0.07),
        "articulation": rng.normal(1.0, 0.035, size=(len(VOWELS), 3)) * rng.normal(1.0, 0.06, size=3),
        "upper": UPPER_FORMANTS * rng.normal(1.0, 0.07, size=2),
        "bandwidth": rng.uniform(0.8, 1.5),
        "tilt": rng.uniform(0.2, 1.3),
        "jitter": rng.uniform(0.005, 0.025),
        "breath": 10 ** rng.uniform(-2.2, -1.0),
        "open": rng.uniform(0.45, 0.7),
        "dips": np.stack([rng.uniform([2400, 4200], [4200, 6500]), rng.uniform(3, 15, size=2)], axis=1),  # Hz, dB
        "pace": rng.uniform(0.8, 1.25),
    }


def draw_session(rng: np.random.Generator) -> dict:
    """What a recording adds: gain over frequency (dB per bin), noise colour and ratio (dB), level, mood."""
    ripples = np.arange(1, 7)
    ripple = np.cos(np.pi * np.outer(BINS / BINS[-1], ripples) + rng.uniform(0, 2 * np.pi, size=6))
    gain = ripple @ (rng.normal(0, 2.0, size=6) / np.sqrt(ripples))
    low, high = rng.uniform(40, 250), rng.uniform(4500, 8500)
    gain = gain - 10 * np.log10(1 + (low / np.maximum(BINS, 1)) ** 4) - 10 * np.log10(1 + (BINS / high) ** 8)
    return {
        "gain": gain,
        "noise_ratio": rng.uniform(12, 30),
        "noise_colour": rng.uniform(0.0, 1.2),
        "level": rng.uniform(0.03, 0.15),
        "mood": np.exp(rng.normal(0, 0.06)),
    }


def draw_phones(speaker: dict, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random row of sounds -> formants (frames, 5) in Hz, loudness of voice and friction (frames, 2), fricative (frames,)."""
    vowels, formants = VOWELS * speaker["articulation"], np.empty((frames, 5))
    loudness, fricative = np.zeros((frames, 2)), np.zeros(frames, int)
    begin, vowel = 0, rng.integers(len(VOWELS))
    while begin < frames:
        sound = rng.choice(["vowel", "fricative", "pause"], p=[0.6, 0.28, 0.12])
        seconds = rng.uniform(0.07, 0.22) if sound == "vowel" else rng.uniform(0.04, 0.12)
        span = slice(begin, begin + max(2, round(seconds / speaker["pace"] * RATE / HOP)))
        if sound == "vowel":
            vowel = rng.integers(len(VOWELS))
            loudness[span, 0] = rng.uniform(0.5, 1.0)
        elif sound == "fricative":
            fricative[span] = rng.integers(len(FRICATIVES))
            loudness[span] = rng.choice([0.0, 0.25]), rng.uniform(0.1, 0.5)
        formants[span] = np.concatenate([vowels[vowel], speaker["upper"]]) * speaker["tract"]
        begin = span.stop
    glide = np.array([0.25, 0.5, 0.25])  # about 50 ms from one target to the next
    formants = np.stack([np.convolve(np.pad(f, 1, mode="edge"), glide, mode="valid") for f in formants.T], axis=1)
    loudness = np.stack([np.convolve(np.pad(a, 1), glide, mode="valid") for a in loudness.T], axis=1)
    return formants, loudness, fricative


def tract_response(formants: np.ndarray, speaker: dict) -> np.ndarray:
    """Cascade of five resonators, each with gain 1 at 0 Hz: (frames, 5) Hz -> (frames, bins) complex64."""
    response = np.ones((len(formants), len(BINS)), np.complex64)
    for frequency, bandwidth in zip(formants.T, speaker["bandwidth"] * np.array([60.0, 90, 140, 200, 300])):
        radius = np.exp(-np.pi * bandwidth / RATE)
        first = (2 * radius * np.cos(2 * np.pi * np.minimum(frequency, 7600) / RATE)).astype(np.float32)[:, None]
        second = np.float32(radius**2)
        response *= (1 - first + second) / (1 - first * DELAY + second * DELAY**2)
    dips = sum(depth * np.exp(-0.5 * ((BINS - centre) / 250) ** 2) for centre, depth in speaker["dips"])
    return response * (10 ** (-dips / 20)).astype(np.float32)


def glottal_source(speaker: dict, mood: float, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Flow derivative of Rosenberg's pulse (JASA 49, 1971) with jitter and shimmer, plus breath: (samples,)."""
    seconds = np.arange(samples) / RATE
    melody = sum(
        rng.normal(0, 0.07) * np.sin(2 * np.pi * (rng.uniform(0.3, 2.5) * seconds + rng.random())) for _ in range(3)
    )
    pitch = speaker["pitch"] * mood * np.exp(melody - 0.03 * seconds)
    cycles = np.cumsum(pitch) / RATE
    periods = int(cycles[-1]) + 2
    shift = speaker["jitter"] * rng.standard_normal(periods + 1)
    edges = np.interp(np.arange(periods) + shift[:periods], cycles, np.arange(samples))  # in samples
    place = np.interp(np.arange(samples), edges, np.arange(periods))
    phase, shimmer = place % 1.0, 1 + 3 * speaker["jitter"] * rng.standard_normal(periods + 1)
    rise, fall = speaker["open"] * 2 / 3, speaker["open"] / 3
    opening = np.sin(np.pi * phase / rise) / rise * (phase < rise)
    closing = -np.sin(np.pi / 2 * (phase - rise) / fall) / fall * ((phase >= rise) & (phase < rise + fall))
    pulse = (opening + closing) * shimmer[place.astype(int)]
    return pulse + speaker["breath"] * rng.standard_normal(samples) * (1 + pulse)


def filter_frames(signal: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Hann frames times their response (frames, bins), overlapped and added: (samples,) -> (samples,)."""
    padded = np.pad(signal.astype(np.float32), (HOP, 2 * WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: len(response)]
    pieces = np.fft.irfft(np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1], FFT) * response, FFT)
    out = np.zeros((len(response) + FFT // HOP, HOP))
    for part in range(FFT // HOP):
        out[part : part + len(pieces)] += pieces[:, part * HOP : (part + 1) * HOP]
    return out.ravel()[HOP : HOP + len(signal)]


def draw_utterance(speaker: dict, session: dict, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """One recording as int16 (samples,)."""
    samples = round(seconds * RATE)
    frames = -(-samples // HOP) + 1
    formants, loudness, fricative = draw_phones(speaker, frames, rng)
    channel = 10 ** (session["gain"] / 20)
    tilt = (1 + (BINS / 500) ** 2) ** (-speaker["tilt"] / 2)
    centre, width = (FRICATIVES[fricative].T * speaker["tract"])[:, :, None]
    voice = glottal_source(speaker, session["mood"], samples, rng)
    voice = filter_frames(voice / np.std(voice), loudness[:, :1] * tract_response(formants, speaker) * (tilt * channel))
    friction = np.exp(-0.5 * ((BINS - centre) / width) ** 2) * loudness[:, 1:] * channel
    speech = voice + filter_frames(rng.standard_normal(samples), friction)
    colour = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 50) ** (-session["noise_colour"] / 2)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * colour, samples)
    speech += noise * np.std(speech) / np.std(noise) * 10 ** (-session["noise_ratio"] / 20)
    return np.round(np.clip(speech * session["level"] / np.std(speech), -1, 1) * 32767).astype(np.int16)


def speaker_name(number: int) -> str:
    return f"id{number:05d}"


def utterance_path(speaker: int, utterance: int, sessions: int) -> str:
    return f"{speaker_name(speaker)}/s{utterance % sessions:02d}/{utterance // sessions:05d}.wav"


def write_utterance(item: tuple[int, int], options: argparse.Namespace) -> None:
    """One file. Every draw depends on the seed and on the names of what is drawn, never on who draws it first."""
    speaker, utterance = item
    session = utterance % options.sessions
    voice = draw_speaker(np.random.default_rng([options.seed, 1, speaker, 0]))
    recording = draw_session(np.random.default_rng([options.seed, 2, speaker, session]))
    pcm = draw_utterance(
        voice, recording, options.seconds, np.random.default_rng([options.seed, 3, speaker, utterance])
    )
    path = options.out / utterance_path(speaker, utterance, options.sessions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, wav_header(len(pcm), RATE) + pcm.astype("<i2").tobytes())


def draw_trials(options: argparse.Namespace) -> list[str]:
    """All pairs of one test speaker across sessions, and `--nontargets` times as many of two speakers."""
    first = options.train_speakers
    items = list(itertools.product(range(first, first + options.test_speakers), range(options.utterances)))
    path = {item: utterance_path(*item, options.sessions) for item in items}
    pairs = list(itertools.combinations(items, 2))
    targets = [(a, b) for a, b in pairs if a[0] == b[0] and (a[1] - b[1]) % options.sessions]
    others = [(a, b) for a, b in pairs if a[0] != b[0]]
    rng = np.random.default_rng([options.seed, 4, 0, 0])
    count = min(len(others), options.nontargets * len(targets))
    chosen = [others[i] for i in rng.choice(len(others), count, replace=False)]
    lines = [f"1 {path[a]} {path[b]}" for a, b in targets] + [f"0 {path[a]} {path[b]}" for a, b in chosen]
    return [lines[i] for i in rng.permutation(len(lines))]


def make_corpus(options: argparse.Namespace) -> None:
    """Writes the corpus. ValueError where OUT holds one made with other options."""
    record = {name: value for name, value in vars(options).items() if name not in ("out", "workers")}
    receipt = options.out / "synth.json"
    if receipt.exists():
        found = json.loads(receipt.read_text())
        if found != record:
            raise ValueError(f"{options.out} holds a corpus made with {found}, not with {record}: choose another --out")
        print(f"{options.out} is there already")
        return
    speakers = options.train_speakers + options.test_speakers
    items = list(itertools.product(range(speakers), range(options.utterances)))
    with multiprocessing.Pool(options.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        work = pool.imap_unordered(partial(write_utterance, options=options), items, chunksize=8)
        for _ in tqdm(work, total=len(items), unit="file", desc="corpus", mininterval=0.5):
            pass
    train = [(s, u) for s, u in items if s < options.train_speakers]
    lines = [f"{speaker_name(s)} {utterance_path(s, u, options.sessions)}" for s, u in train]
    write_file(options.out / "train_list.txt", "\n".join(lines) + "\n")
    write_file(options.out / "test_list.txt", "\n".join(draw_trials(options)) + "\n")
    write_file(receipt, json.dumps(record) + "\n")
    print(f"{options.out}: {options.train_speakers} + {options.test_speakers} speakers, {len(items)} files")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="spknet synth", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--train-speakers", type=int, default=60, help="speakers of train_list.txt (60)")
    parser.add_argument("--test-speakers", type=int, default=20, help="other speakers, of test_list.txt (20)")
    parser.add_argument("--utterances", type=int, default=10, help="files of a speaker (10)")
    parser.add_argument("--sessions", type=int, default=5, help="sessions of a speaker (5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a file (4)")
    parser.add_argument("--nontargets", type=int, default=4, help="non-target trials for each target trial (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the voices and trials (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    options = parser.parse_args(argv)
    if options.test_speakers < 2 or options.sessions < 2 or options.utterances <= options.sessions:
        parser.error("trials need at least 2 test speakers, 2 sessions and more utterances than sessions")
    try:
        make_corpus(options)
    except ValueError as error:
        print(f"synth: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
