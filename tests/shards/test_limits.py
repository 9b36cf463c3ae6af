"""docs/limits.md is made by trying everything that stands in it: `python -m tests.shards.test_limits` writes it.

The test fails where the page and the behaviour differ. Audio of 0.2 s; what needs ffmpeg is made and read by it.
"""

import codecs
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from shards import audio
from shards.format import ShardError
from shards.lists import read_list
from tests.shards.test_headers import FORM, KINDS, LIST, PCM, chunk, ffmpeg, riff, stream

PAGE = Path(__file__).resolve().parents[2] / "docs" / "limits.md"
TONE = 0.5 * np.sin(2 * np.pi * 300 * np.arange(3200) / 16000)
HEAD = """# What audio and what lists are taken

This page is made by a test (`tests/shards/test_limits.py`) that tries each line, and fails where it is no longer true.
"Taken" means that every sample arrives as the decoder gives it. Whatever is converted, clipped, silent or cancelled is
counted and named by `spknet pack --report FILE.txt`. What is refused stops a pack with the file's name;
`--skip-bad FILE` leaves it out and lists it with the reason.

What a file is, its content says, not its ending. Loose training files and evaluation take the same files as packing
without `--convert`, archives excepted. Bytes that depend on a program's version stand as `...`.
"""
NOT_SEEN = """
## What cannot be seen

- A WAV from a pipe (no size in its header) that was cut looks whole. So does an MP3 without a count of its frames (no
  Info or Xing frame, or one written to a pipe) that was cut exactly between two frames.
- A flipped bit inside the audio of WAV, AIFF, AU, CAF, W64, SPHERE, MP3, AAC, WebM, WMA or AMR changes the audio: these
  containers have no sums. FLAC (MD5) and Ogg (page sums) have.
- A flipped sample inside a WAV shard is not seen by a crop: the sum is of the whole utterance. `spknet check` sees it,
  and so does whoever reads the whole utterance.
- A loose FLAC is not decoded when a list is opened: its MD5 is not compared, and of two streams in one file of equal
  length the first is read. Packing refuses both.
- A loose file that is replaced by another of the same length and format is read.
- A copy in a node's cache is believed as long as nobody wrote to it; bits that change by themselves are not seen.
- Data sets packed before November 2026 carry no identity: a tar of equal size with an equal first header is not
  noticed at the first touch. `spknet check` sees it.
"""


def wav(samples=TONE, rate: int = 16000, subtype: str = "PCM_16", form: str = "WAV") -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        soundfile.write(folder / "x", samples, rate, subtype=subtype, format=form)
        return (folder / "x").read_bytes()

    return make


def by_ffmpeg(ending: str, cut: int = 0) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        soundfile.write(folder / "s.wav", TONE, 16000, subtype="PCM_16")
        words, pipe, _ = KINDS.get(ending, (EXTRA.get(ending), False, False))
        data = ffmpeg(folder / "s.wav", *words, pipe=pipe)
        return data[: len(data) - cut]

    return make


def twice(make: Callable[[Path], bytes]) -> Callable[[Path], bytes]:
    return lambda folder: make(folder) * 2


EXTRA = {
    "wma": ["-c:a", "wmav2", "-f", "asf"],
    "opus.webm": ["-c:a", "libopus", "-ar", "48000", "-f", "webm"],
    "adpcm": ["-c:a", "adpcm_ms", "-f", "wav"],
}


def raw(data: bytes) -> Callable[[Path], bytes]:
    return lambda folder: data


STEREO, INVERTED = np.stack([TONE, TONE], 1), np.stack([TONE, -TONE], 1)
AUDIO = {
    "Containers and codecs": {
        "WAV, 16-bit PCM": wav(),
        "WAV, extensible": wav(form="WAVEX"),
        "RF64": wav(form="RF64"),
        "FLAC, 16 bits": wav(form="FLAC"),
        "FLAC from a pipe (no length)": by_ffmpeg("pipe.flac"),
        "Ogg Vorbis": by_ffmpeg("ogg"),
        "Ogg Opus": by_ffmpeg("opus"),
        "MP3, constant bit rate": by_ffmpeg("mp3"),
        "MP3, variable bit rate without Xing frame": by_ffmpeg("vbr.mp3"),
        "MP3 from a pipe": by_ffmpeg("pipe.mp3"),
        "AIFF": wav(form="AIFF"),
        "AU": wav(form="AU"),
        "CAF": wav(form="CAF"),
        "W64": wav(form="W64"),
        "SPHERE (NIST)": wav(form="NIST"),
        "MP4, m4a (AAC), by ffmpeg": by_ffmpeg("m4a"),
        "AAC (ADTS), by ffmpeg": by_ffmpeg("aac"),
        "WebM (Opus, 48 kHz), by ffmpeg": by_ffmpeg("opus.webm"),
        "WMA, by ffmpeg": by_ffmpeg("wma"),
        "WAV with mu-law": wav(subtype="ULAW"),
        "WAV with A-law": wav(subtype="ALAW"),
        "WAV with MS ADPCM": by_ffmpeg("adpcm"),
        "raw samples without a header": raw(PCM.tobytes()[:999]),
        "an empty file": raw(b""),
        "a web page": raw(b"<html></html>"),
        "a pointer of git-lfs": raw(b"version https://git-lfs.github.com/spec/v1\n"),
        "a Mac's `._NAME`": raw(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"),
        "two Ogg streams in one file": twice(by_ffmpeg("ogg")),
        "two WAVs in one file": twice(wav()),
        "two FLACs in one file": twice(wav(form="FLAC")),
        "two MP3s with tags in one file": twice(by_ffmpeg("mp3")),
        "two m4as in one file": twice(by_ffmpeg("m4a")),
        "two AUs in one file": twice(wav(form="AU")),
        "two SPHERE files in one": twice(wav(form="NIST")),
    },
    "Rates": {
        "8,000 Hz": wav(rate=8000),
        "44,100 Hz": wav(rate=44100),
        "48,000 Hz": wav(rate=48000),
        "1,000 Hz": wav(rate=1000),
        "999 Hz": wav(rate=999),
        "800,000 Hz": wav(rate=800000),
    },
    "Channels and depths": {
        "stereo": wav(STEREO),
        "stereo that cancels": wav(INVERTED),
        "six channels": wav(np.stack([TONE] * 6, 1)),
        "8 bits": wav(subtype="PCM_U8"),
        "24 bits": wav(subtype="PCM_24"),
        "32 bits": wav(subtype="PCM_32"),
        "FLAC, 24 bits": wav(subtype="PCM_24", form="FLAC"),
        "32-bit float": wav(subtype="FLOAT"),
        "64-bit float": wav(subtype="DOUBLE"),
        "float up to 4": wav(8 * TONE, subtype="FLOAT"),
        "float up to 16,384 (integers)": wav(32768 * TONE, subtype="FLOAT"),
        "float with NaN": wav(np.where(TONE > 0.4, np.nan, TONE), subtype="FLOAT"),
        "float with infinity": wav(np.where(np.arange(3200) == 5, np.inf, TONE), subtype="FLOAT"),
        "16 bits, clipped": wav(np.clip(9 * TONE, -1, 32767 / 32768)),
        "silence": wav(0 * TONE),
    },
    "Lengths": {
        "one sample": wav(TONE[1:2]),
        "no sample": wav(TONE[:0]),
        "WAV size 0xFFFFFFFF (ffmpeg's pipe)": raw(stream(0xFFFFFFFF)),
        "WAV size 0x7FFFF000 (sox's pipe)": raw(stream(0x7FFFF000)),
        "WAV size 0 (a killed recorder)": raw(stream(0)),
        "the same with a LIST chunk behind": raw(stream(0xFFFFFFFF, LIST)),
        "WAV size odd": raw(stream(16001, pcm=PCM.tobytes() + b"\1")),
        "WAV with two data chunks": raw(stream(16000, chunk(b"data", b"abcd"))),
        "WAV with audio behind its size": raw(stream(4000)),
        "WAV without data": raw(riff(chunk(b"fmt ", FORM))),
        "WAV, cut": raw(stream(16000)[:-100]),
        "FLAC, a wrong length": lambda folder: wav(form="FLAC")(folder).replace(b"\x0c\x80", b"\x0c\x00", 1),
        "FLAC, cut": lambda folder: wav(form="FLAC")(folder)[:-100],
        "FLAC from a pipe, cut": by_ffmpeg("pipe.flac", 100),
        "Ogg, cut": by_ffmpeg("ogg", 100),
        "MP3, cut inside a frame": by_ffmpeg("mp3", 10),
        "m4a, cut": by_ffmpeg("m4a", 100),
        "AAC (ADTS), cut": by_ffmpeg("aac", 10),
        "AIFF, cut": lambda folder: wav(form="AIFF")(folder)[:-100],
    },
}
LISTS = {
    "Names": {
        "`id1 id1/a/0.wav`": b"id1 id1/a/0.wav",
        "`id1 dev/wav/id1/a/0.wav`": b"id1 dev/wav/id1/a/0.wav",
        "`id1 x/0.wav`": b"id1 x/0.wav",
        "`id1 ./id1//0.wav`": b"id1 ./id1//0.wav",
        "dots, `id1 id1/12.5.wav`": b"id1 id1/12.5.wav",
        "a speaker with a dot, `s.3 s.3/0.wav`": b"s.3 s.3/0.wav",
        "spaces, `id1 id1/my talk/0 1.wav`": b"id1 id1/my talk/0 1.wav",
        "other scripts, `id1 id1/\u7b2c\u4e00/0.wav`": "id1 id1/\u7b2c\u4e00/0.wav".encode(),
        "a path of 120 bytes": b"id1 id1/" + b"x" * 112 + b".wav",
        "a speaker of 128 bytes": b"x" * 128 + b" x/0.wav",
        "a member, `id1 a.zip::id1/0.wav`": b"id1 a.zip::id1/0.wav",
        "absolute, below the root": b"id1 ROOT/id1/0.wav",
        "absolute, elsewhere": b"id1 /elsewhere/id1/0.wav",
        "`..`": b"id1 ../id1/0.wav",
        "a backslash": b"id1 id1\\0.wav",
        "the name of a device": b"id1 id1/con/0.wav",
        "a control character": b"id1 id1/a\x0bb.wav",
        "`__NAME__`": b"__id1__ __id1__/0.wav",
        "Latin-1": b"id1 id1/caf\xe9.wav",
        "a Mac's `._0.wav`": b"id1 id1/1.wav\nid1 id1/._0.wav",
    },
    "Lists": {
        "UTF-8 with a byte order mark": codecs.BOM_UTF8 + b"id1 id1/0.wav",
        "UTF-16 with a byte order mark": codecs.BOM_UTF16_LE + "id1 id1/0.wav".encode("utf-16-le"),
        "UTF-16 without one": "id1 id1/0.wav".encode("utf-16-le"),
        "CR LF": b"id1 id1/0.wav\r\nid1 id1/1.wav\r\n",
        "CR alone": b"id1 id1/0.wav\rid1 id1/1.wav\r",
        "tabs": b"id1\tid1/0.wav",
        "blank lines": b"\n\nid1 id1/0.wav\n\n",
        "a line of one word": b"id1 id1/0.wav\nid1",
        "the same line twice": b"id1 id1/0.wav\nid1 id1/0.wav",
        "two files of one key": b"id1 id1/0.wav\nid1 id1/0.flac",
        "empty": b"",
        "gzip": b"\x1f\x8b\x08",
    },
}


def outcome(folder: Path, make: Callable[[Path], bytes], convert: bool) -> str:
    try:
        found = audio.decode(make(folder), "FILE", 16000, convert)
    except ShardError as error:
        text = re.sub(r"(byte|file at) \d+", r"\1 ...", str(error).removeprefix("FILE: "))
        return "refused: " + re.sub(r"\(Error : .*\)", "(...)", text)
    told = [f"{kind}: {detail}" for kind, detail in found.notes.items()]
    return "; ".join(["taken", *told])


def listed(folder: Path, data: bytes) -> str:
    from shards.plan import make_entries

    path = folder / "LIST"
    path.write_bytes(data.replace(b"ROOT", str(folder).encode()))
    made = read_list(path, folder)
    try:
        entries = make_entries(made)
    except ShardError as error:
        text = str(error).removeprefix(f"{path}, ").removeprefix(f"{path} ")
        return f"refused: {text.replace(str(path), 'LIST').replace(str(folder), 'ROOT')}"
    keys = ", ".join(f"`{key.decode()}`" for key in entries.keys.tolist())
    said = [remark.removeprefix(f"{path}: ") for remark in made.remarks()]
    return "; ".join([f"taken, key {keys}", *said])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def page(folder: Path) -> str:
    lines = [HEAD]
    for title, rows in AUDIO.items():
        lines += [f"## {title}", "", "| input | as it is, at 16,000 Hz | with `--convert` |", "|---|---|---|"]
        for name, make in rows.items():
            plain, converted = (cell(outcome(folder, make, convert)) for convert in (False, True))
            lines.append(f"| {name} | {plain} | {'the same' if plain == converted else converted} |")
        lines.append("")
    lines += [
        "Recordings may have up to four hours and 2 GiB; a zip member that inflates more than 100 times, beyond 64 MiB, is",
        "refused.",
        "",
    ]
    for title, rows in LISTS.items():
        lines += [f"## {title}", "", "| input | what becomes of it |", "|---|---|"]
        lines += [f"| {name} | {cell(listed(folder, data))} |" for name, data in rows.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" + NOT_SEEN


def test_the_page_of_limits_says_what_happens(tmp_path):
    assert PAGE.read_text() == page(tmp_path), "python -m tests.shards.test_limits writes the page anew"


def test_no_line_of_the_page_is_an_accident(tmp_path):
    # The page would also be "true" if everything were refused: how many are taken and refused is counted by hand.
    text = PAGE.read_text()
    assert text.count("refused: not readable as audio (") == 6  # five that are no audio, and a cut FLAC
    assert all(
        f"| {name} | taken |" in text
        for name in list(AUDIO["Containers and codecs"])[:17]
        if "WebM" not in name and "WMA" not in name
    )
    assert (
        "| stereo that cancels | refused: 2 channels" in text and "cancelled: the mean of its 2 channels keeps" in text
    )
    assert text.count("| refused: cut") >= 8


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        PAGE.write_text(page(Path(made)))
