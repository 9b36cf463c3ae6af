"""Headers that lie or do not know: streams, odd chunks, files from pipes, cut containers. Every reader says the same of each."""

import contextlib
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile

from shards import audio, containers, flac, wav
from shards.audio import read_audio
from shards.format import ShardError
from shards.headers import read_header
from shards.pack import main, pack
from shards.reader import open_files, open_shards
from spknet.evaluate.utterances import Sources
from tests.shards.test_corpus import noise

PCM = noise(np.random.default_rng(0), 8000).astype("<i2")
FORM = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
LIST = b"LIST\x0e\0\0\0INFOISFT\2\0\0\0x\0"


def chunk(name: bytes, data: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(data) if size is None else size) + data + b"\0" * (len(data) % 2)


def riff(*chunks: bytes, head: bytes = b"RIFF", size: int = 0) -> bytes:
    return head + struct.pack("<I", size) + b"WAVE" + b"".join(chunks)


def stream(size: int, behind: bytes = b"", pcm: bytes = PCM.tobytes()) -> bytes:
    return riff(chunk(b"fmt ", FORM), chunk(b"data", pcm, size), behind)


GUID = bytes.fromhex("0100000000001000800000aa00389b71")
WHOLE = {
    "whole": stream(16000),
    "size of ffmpeg's pipe": stream(0xFFFFFFFF),
    "size of sox's pipe": stream(0x7FFFF000),
    "size of sox's pipe with a header of 80": stream(0x7FFFEFFA + 2),
    "largest even size": stream(0x7FFFFFFE),
    "largest odd size": stream(0x7FFFFFFF),
    "size of a killed recorder": stream(0),
    "LIST behind a pipe's data": stream(0xFFFFFFFF, LIST),
    "LIST behind a killed recorder's data": stream(0, LIST),
    "LIST behind the data": stream(16000, LIST),
    "zeros behind the data": stream(16000, bytes(100)),
    "an ID3v1 tag behind the data": stream(16000, b"TAG".ljust(128, b"x")),
    "odd size": stream(16001, pcm=PCM.tobytes() + b"\1"),
    "odd size from a pipe": stream(0xFFFFFFFF, pcm=PCM.tobytes() + b"\1")[:-1],
    "chunks before the data": riff(
        LIST, chunk(b"fmt ", FORM), chunk(b"LIST", bytes(9001)), chunk(b"data", PCM.tobytes())
    ),
    "extensible": riff(
        chunk(b"fmt ", struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16000, 32000, 2, 16, 22, 16, 4) + GUID),
        chunk(b"data", PCM.tobytes()),
    ),
    "RF64": riff(
        chunk(b"ds64", struct.pack("<QQQI", 0, 16000, 8000, 0)),
        chunk(b"fmt ", FORM),
        chunk(b"data", PCM.tobytes(), 0xFFFFFFFF),
        head=b"RF64",
    ),
}
REFUSED = {
    "two pieces of audio": (stream(16000, chunk(b"data", b"abcd")), "two pieces of audio"),
    "audio behind a short size": (stream(4000), "12000 bytes behind its audio are no chunks"),
    "two files in one": (
        stream(16000) + riff(chunk(b"fmt ", FORM), chunk(b"data", PCM.tobytes()), size=16036),
        "two pieces of audio",
    ),
    "samples wider than their bits": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16000, 64000, 4, 24)), chunk(b"data", PCM.tobytes())),
        "samples of 4 bytes for 1 channels of 24 bits",
    ),
    "RF64, cut": (
        riff(
            chunk(b"ds64", struct.pack("<QQQI", 0, 1 << 40, 1 << 39, 0)),
            chunk(b"fmt ", FORM),
            chunk(b"data", PCM.tobytes(), 0xFFFFFFFF),
            head=b"RF64",
        ),
        "promises 1099511627776 bytes of audio, 16000 are there",
    ),
    "cut": (stream(16000)[:9000], "cut: its header promises 16000 bytes of audio, 8956 are there"),
    "no data": (riff(chunk(b"fmt ", FORM)), "no data chunk"),
    "no format": (riff(chunk(b"data", b"ab")), "no format"),
    "no samples": (stream(0, pcm=b""), r"no audio in it \(0 samples\)"),
    "empty": (b"", "an empty file"),
    "a Mac's file": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "what a Mac keeps beside a file"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


def written(folder, data: bytes, name: str = "id1/a/0.wav"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    (folder / "list.txt").write_text(f"id1 {name}\n")
    return path


@pytest.mark.parametrize("case", WHOLE)
def test_packing_loose_files_and_evaluation_read_the_same_samples_of_every_header(tmp_path, case):
    path = written(tmp_path, WHOLE[case])
    assert np.array_equal(read_audio(path, 16000), PCM)
    loose = open_files(tmp_path / "list.txt", tmp_path)
    assert np.array_equal(loose.read_utterance(0), PCM)
    sources = Sources(roots=[str(tmp_path)])
    places = sources.measure(sources.locate(["id1/a/0.wav"]))
    assert places.samples.tolist() == [8000] and np.array_equal(sources.read(places, 0), PCM)
    pack([("id1", "id1/a/0", str(path))], tmp_path / "out", progress=False)
    assert np.array_equal(open_shards(tmp_path / "out").read_utterance(0), PCM)


@pytest.mark.parametrize("case", REFUSED)
def test_every_reader_refuses_what_is_cut_or_no_audio_and_names_it(tmp_path, case):
    data, message = REFUSED[case]
    path = written(tmp_path, data)
    with pytest.raises(ShardError, match=f"0.wav: .*{message}"):
        read_audio(path, 16000)
    with pytest.raises(ShardError, match=f"line 1: .*0.wav: .*{message}"):
        open_files(tmp_path / "list.txt", tmp_path)
    sources = Sources(roots=[str(tmp_path)])
    with pytest.raises(ShardError, match=f"0.wav: .*{message}"):
        sources.measure(sources.locate(["id1/a/0.wav"]))


def ffmpeg(source, *words: str, pipe: bool = False) -> bytes:
    target = "pipe:1" if pipe else str(source.parent / "made")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(source), *words, target]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    return made if pipe else (source.parent / "made").read_bytes()


KINDS = {  # ending: ffmpeg's words, whether through a pipe, whether cut files show, whether flipped ones do
    "flac": (["-f", "flac"], False, True),
    "pipe.flac": (["-f", "flac"], True, True),
    "ogg": (["-c:a", "libvorbis", "-f", "ogg"], False, True),
    "opus": (["-c:a", "libopus", "-f", "opus"], False, True),
    "mp3": (["-c:a", "libmp3lame", "-b:a", "64k", "-f", "mp3"], False, False),
    "vbr.mp3": (["-c:a", "libmp3lame", "-q:a", "4", "-write_xing", "0", "-f", "mp3"], False, False),
    "pipe.mp3": (["-c:a", "libmp3lame", "-q:a", "4", "-f", "mp3"], True, False),
    "m4a": (["-c:a", "aac", "-f", "mp4"], False, False),
    "aac": (["-c:a", "aac", "-f", "adts"], False, False),
    "webm": (["-c:a", "libopus", "-f", "webm"], False, False),
    "aiff": (["-c:a", "pcm_s16be", "-f", "aiff"], False, False),
    "au": (["-c:a", "pcm_s16be", "-f", "au"], False, False),
    "caf": (["-c:a", "pcm_s16le", "-f", "caf"], False, False),
    "w64": (["-c:a", "pcm_s16le", "-f", "w64"], False, False),
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """2 s that change all the time, so that a variable bit rate varies."""
    folder = tmp_path_factory.mktemp("speech")
    t = np.arange(32000) / 16000
    x = np.sin(2 * np.pi * (200 + 900 * t) * t) * (0.2 + 0.15 * np.sin(9 * t))
    x[20000:] += 0.2 * np.random.default_rng(3).standard_normal(12000)
    soundfile.write(folder / "s.wav", x, 16000, subtype="PCM_16")
    return folder / "s.wav"


@pytest.mark.parametrize("ending", KINDS)
def test_compressed_files_are_read_whole_whatever_their_header_says_and_cut_ones_refused(speech, ending):
    words, pipe, _ = KINDS[ending]
    data = ffmpeg(speech, *words, pipe=pipe)
    pcm = np.frombuffer(audio.decode(data, f"a.{ending}", 16000, True).pcm, "<i2")
    # Lossy codecs add their delay, at most 2,200 samples; none may be missing.
    assert 32000 <= len(pcm) <= 34200
    lossless = ending in ("flac", "pipe.flac", "aiff", "au", "caf", "w64")
    if lossless:
        assert np.array_equal(pcm, read_audio(speech, 16000))
    cuts = [1, 40, len(data) - 1, len(data) - 2, len(data) - 3, len(data) - 10]
    if ending not in ("vbr.mp3", "pipe.mp3"):  # without a count of frames, a cut between two of them cannot be seen
        cuts += np.random.default_rng(len(ending)).integers(2, len(data), 12).tolist()
    for cut in cuts:
        with pytest.raises(ShardError, match=f"a.{ending}"):
            audio.decode(data[:cut], f"a.{ending}", 16000, True)


@pytest.mark.parametrize("ending", [ending for ending, (_, _, sums) in KINDS.items() if sums])
def test_a_flipped_bit_in_a_container_with_sums_is_refused_or_changes_nothing(speech, ending):
    words, pipe, _ = KINDS[ending]
    data = ffmpeg(speech, *words, pipe=pipe)
    whole = bytes(audio.decode(data, "a", 16000, True).pcm)
    draw = np.random.default_rng(7)
    for bit in draw.integers(0, 8 * len(data), 40).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(ShardError):
            assert bytes(audio.decode(bytes(flipped), "a", 16000, True).pcm) == whole


def test_ogg_sums_are_those_of_a_published_page(speech):
    data = ffmpeg(speech, "-c:a", "libvorbis", "-f", "ogg")
    size = 27 + data[26] + sum(data[27 : 27 + data[26]])
    page = bytearray(data[:size])
    expected = int.from_bytes(page[22:26], "little")
    page[22:26] = bytes(4)
    crc = 0  # bit by bit, as RFC 3533 describes it
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc >> 31 else crc << 1) & 0xFFFFFFFF
    assert crc == expected == containers.ogg_crc(bytes(page))


@pytest.mark.parametrize("ending", sorted({*KINDS, "wma"} - {"aac", "vbr.mp3"}))
def test_two_recordings_in_one_file_are_refused_and_not_half_read(speech, ending):
    words, pipe, _ = KINDS.get(ending, (["-c:a", "wmav2", "-f", "asf"], False, False))
    data = ffmpeg(speech, *words, pipe=pipe)
    with pytest.raises(
        ShardError, match=f"a.{ending}: (several|.* stand behind|cut or damaged|not readable|ffmpeg cannot)"
    ):
        audio.decode(data + data, f"a.{ending}", 16000, True)


def test_a_flac_with_a_wrong_length_is_refused_by_every_reader(tmp_path, speech):
    data = ffmpeg(speech, "-f", "flac")
    word = int.from_bytes(data[18:26], "big")
    for length in (1, 4096, 16384, 31999, 32001, 64000):  # 4096: where a frame ends
        path = written(tmp_path, data[:18] + (word - 32000 + length).to_bytes(8, "big") + data[26:], "id1/a/0.flac")
        said = f"0.flac: cut or damaged: no frame ends at the {length} samples of its header"
        with pytest.raises(ShardError, match=said):
            read_audio(path, 16000)
        with pytest.raises(ShardError, match=said):
            open_files(tmp_path / "list.txt", tmp_path)


def test_no_message_of_a_decoder_holds_a_python_object_or_an_address(speech):
    bits0 = riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 0)), chunk(b"data", PCM.tobytes()))
    for data in (bits0, b"#!AMR\n" + b"\xff" * 400):
        with pytest.raises(ShardError, match="^a.wav: ") as error:
            audio.decode(data, "a.wav", 16000)
        assert "<" not in str(error.value) and "0x" not in str(error.value)


def test_the_length_of_a_flac_from_a_pipe_is_found_in_its_last_frame(speech):
    for words in ([], ["-frame_size", "777"], ["-ar", "48000", "-frame_size", "16"]):
        piped, whole = ffmpeg(speech, *words, "-f", "flac", pipe=True), ffmpeg(speech, *words, "-f", "flac")
        assert flac.promised(piped) == 0 and flac.promised(whole) > 0
        assert flac.promised(flac.with_length(piped, "a")) == flac.promised(whole)


def test_a_float_wav_from_a_pipe_is_read_as_the_same_file_is(speech):
    for words in (["-c:a", "pcm_f32le"], ["-ar", "8000", "-c:a", "pcm_mulaw"], ["-c:a", "pcm_s24le", "-ac", "2"]):
        piped, whole = ffmpeg(speech, *words, "-f", "wav", pipe=True), ffmpeg(speech, *words, "-f", "wav")
        assert bytes(audio.decode(piped, "a", 16000, True).pcm) == bytes(audio.decode(whole, "a", 16000, True).pcm)
        with pytest.raises(ShardError, match="cut: its header promises"):
            audio.decode(whole[:-500], "a", 16000, True)


def test_what_a_file_is_its_content_says_and_not_its_ending(tmp_path, speech):
    made = ffmpeg(speech, "-c:a", "aac", "-f", "mp4")
    (tmp_path / "a.wav").write_bytes(made)
    (tmp_path / "b.m4a").write_bytes(speech.read_bytes())
    assert len(read_audio(tmp_path / "a.wav", 16000)) >= 32000
    assert np.array_equal(read_audio(tmp_path / "b.m4a", 16000), read_audio(speech, 16000))
    assert (read_header(tmp_path / "a.wav").container, read_header(tmp_path / "b.m4a").samples) == ("MP4", 32000)
    (tmp_path / "c.wav").write_bytes(b"random bytes that nobody knows" * 9)
    with pytest.raises(ShardError, match=r"c.wav: not readable as audio \(.wav, begins with .* if ffmpeg reads it"):
        read_audio(tmp_path / "c.wav", 16000)


def test_whatever_a_decoder_raises_is_an_error_with_the_name_and_can_be_left_out(tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, *_):
            raise TypeError("surprise")

    path = written(tmp_path, WHOLE["whole"])
    soundfile.write(tmp_path / "id1/a/1.flac", PCM, 16000)
    (tmp_path / "list.txt").write_text("id1 id1/a/0.wav\nid1 id1/a/1.flac\n")
    monkeypatch.setattr(soundfile, "SoundFile", Broken)
    with pytest.raises(ShardError, match=r"1.flac: not readable as audio \(TypeError: surprise\)"):
        read_audio(tmp_path / "id1/a/1.flac", 16000)
    words = ["--list", str(tmp_path / "list.txt"), "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--skip-bad", str(tmp_path / "bad.txt"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 utterances written" in said and "left out 1" in said
    assert "surprise" in (tmp_path / "bad.txt").read_text() and path.exists()


def test_rates_that_would_blow_a_file_up_are_refused():
    data = riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 1, 2, 2, 16)), chunk(b"data", bytes(64000)))
    with pytest.raises(ShardError, match="1 Hz, expected 1000 to 768000 Hz"):
        audio.decode(data, "a.wav", 16000, True)


def test_recordings_beyond_four_hours_are_refused(monkeypatch):
    monkeypatch.setattr(audio, "LONGEST", 1)
    data = riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 4000, 8000, 2, 16)), chunk(b"data", bytes(16002)))
    with pytest.raises(ShardError, match="longer than"):
        audio.decode(data, "a.wav", 16000, True)


def test_sphere_files_are_read_and_cut_ones_refused():
    head = (
        b"NIST_1A\n   1024\nsample_count -i 8000\nsample_n_bytes -i 2\nchannel_count -i 1\nsample_byte_format -s2 01\n"
    )
    head += b"sample_rate -i 16000\nsample_sig_bits -i 16\nsample_coding -s3 pcm\nend_head\n"
    data = head.ljust(1024, b" ") + PCM.tobytes()
    assert bytes(audio.decode(data, "a.wav", 16000).pcm) == PCM.tobytes()
    with pytest.raises(ShardError, match="promises 16000 bytes of audio, 15000 are there"):
        audio.decode(data[:-1000], "a.wav", 16000)


def test_every_header_is_parsed_without_reading_beyond_what_is_asked():
    asked = []

    def read(offset, n):
        asked.append(offset + n)
        return WHOLE["whole"][offset : offset + n]

    assert wav.parse(read, len(WHOLE["whole"]), "a").nbytes == 16000 and max(asked) <= 60


def test_ffmpeg_is_here_for_these_tests():
    assert shutil.which("ffmpeg")
