"""What packing does to audio is counted, named and written down; the packer's advice works; nothing else is overwritten."""

import json
import multiprocessing
import os
import zipfile

import numpy as np
import pytest
import soundfile

from shards import audio, parts, plan
from shards.format import ShardError
from shards.lists import read_list
from shards.pack import main, only_writer, pack
from shards.reader import open_shards
from tests.shards.test_corpus import entries_of, make_corpus, noise, write_wav

T = np.arange(16000) / 16000
TONE = 0.5 * np.sin(2 * np.pi * 300 * T)


def corpus(folder, **kinds) -> list[str]:
    """Float (or int16) arrays, or (array, rate), as id1/KIND.wav; the words of a pack."""
    lines = []
    for name, samples in kinds.items():
        samples, rate = samples if isinstance(samples, tuple) else (samples, 16000)
        path = folder / f"id1/{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        subtype = "FLOAT" if name.startswith("float") else "PCM_16"
        soundfile.write(path, samples, rate, subtype=subtype)
        lines.append(f"id1 id1/{name}.wav\n")
    (folder / "list.txt").write_text("".join(lines))
    words = ["--list", folder / "list.txt", "--root", folder, "--out", folder / "out", "--workers", "1"]
    return [str(word) for word in words]


def test_the_report_names_and_counts_what_was_done_to_the_audio(tmp_path, capsys):
    quiet = TONE[:4800]
    kinds = {
        "float_hot": 4 * TONE,
        "float_fine": TONE,
        "fast": (np.stack([TONE, TONE], 1), 48000),
        "antiphase": np.stack([TONE, -TONE], 1),
        "silent": np.zeros(16000),
        "clipped": np.clip(9 * TONE, -1, 32767 / 32768),
        "short": quiet,
        "plain": TONE,
        "float_nan": np.where(np.arange(16000) == 7, np.nan, TONE),
        "float_integers": np.round(32768 * TONE),
    }
    words = corpus(tmp_path, **kinds)
    report, bad = str(tmp_path / "report.txt"), str(tmp_path / "bad.txt")
    more = ["--convert", "--skip-bad", bad, "--report", report, "--report-crop", "0.5"]
    assert main([*words, *more]) == 0
    made = json.loads((tmp_path / "report.json").read_text())
    named = {kind: sorted(line["key"].removeprefix("id1/") for line in lines) for kind, lines in made["lists"].items()}
    assert named == {
        "converted": ["antiphase", "fast", "float_fine", "float_hot"],
        "trimmed": [],
        "clipped": ["clipped", "float_hot"],
        "silent": ["antiphase", "silent"],
        "cancelled": ["antiphase"],
        "shorter than the crop": ["fast", "short"],
        "left out": ["float_integers", "float_nan"],
    }
    counts = {kind: len(keys) for kind, keys in named.items()}
    assert made["totals"] == {"utterances": 8, "speakers": 1, "unknown_tars": 0} | counts
    text = (tmp_path / "report.txt").read_text()
    last = "total: 8 utterances of 1 speakers; converted 4, trimmed 0, clipped 2, silent 2, cancelled 1, "
    assert (
        text.endswith(last + "shorter than the crop 2, left out 2\n")
        and text.strip().splitlines()[-1] in capsys.readouterr().out
    )
    # A sine of peak 2 is beyond 1 for two thirds of the time: acos(1/2) / (pi/2).
    [hot] = [line["detail"] for line in made["lists"]["clipped"] if line["key"].endswith("hot")]
    assert abs(int(hot.split(" of ")[0]) - 16000 * 2 / 3) < 200 and hot.endswith("the highest 2")
    details = {line["key"]: line["detail"] for line in made["lists"]["converted"]}
    assert details["id1/fast"] == "mean of 2 channels, 48000 Hz to 16000 Hz"
    reasons = (tmp_path / "bad.txt").read_text()
    assert "1 samples are NaN or infinite, the first at 7" in reasons and "integers stored as floats?" in reasons


def test_the_report_can_be_made_again_without_packing(tmp_path, capsys):
    words = corpus(tmp_path, silent=np.zeros(1600), plain=TONE)
    assert main([*words, "--report", str(tmp_path / "a.txt")]) == 0
    before = (tmp_path / "out/SHA256SUMS").read_bytes()
    assert main([*words, "--report", str(tmp_path / "b.txt")]) == 0
    assert "everything was packed already" in capsys.readouterr().out
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text()
    assert (tmp_path / "out/SHA256SUMS").read_bytes() == before


def test_nan_stops_a_pack_and_is_named(tmp_path, capsys):
    words = corpus(tmp_path, float_nan=np.full(100, np.nan))
    assert main([*words, "--convert"]) == 2
    assert "float_nan.wav: 100 samples are NaN or infinite, the first at 0" in capsys.readouterr().err


def test_packing_again_with_convert_as_the_message_advises_works(tmp_path, capsys):
    kinds = {f"u{i}": TONE for i in range(6)} | {"fast": (TONE, 44100)}
    words = corpus(tmp_path, **kinds)
    assert main(words) == 2
    assert "44100 Hz, expected 16000 Hz; convert it, or pack with --convert" in capsys.readouterr().err
    assert main([*words, "--convert"]) == 0
    assert main([*words[:-4], "--out", str(tmp_path / "fresh"), "--workers", "1", "--convert"]) == 0
    assert (tmp_path / "out/SHA256SUMS").read_bytes() == (tmp_path / "fresh/SHA256SUMS").read_bytes()
    assert main(words) == 2  # and without --convert the converted one is refused again, not kept without a word


def test_tars_that_needed_no_conversion_are_kept_when_convert_is_added(tmp_path):
    make_corpus(tmp_path / "wav")
    fast = tmp_path / "wav/id005/session0/00000.wav"
    soundfile.write(fast, noise(np.random.default_rng(1), 9000), 44100, subtype="PCM_16")
    listed = read_list(tmp_path / "wav/list.txt", tmp_path / "wav")
    with pytest.raises(ShardError, match="44100 Hz"):
        pack(listed, tmp_path / "out", shard_bytes=60000, progress=False)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert kept
    pack(listed, tmp_path / "out", shard_bytes=60000, progress=False, convert=True)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_corrected_list_begins_anew_where_nothing_was_written(tmp_path, capsys):
    words = corpus(tmp_path, a=TONE, b=(TONE, 8000))
    assert main(words) == 2
    (tmp_path / "list.txt").write_text("id1 id1/a.wav\n")
    assert main(words) == 0
    assert len(open_shards(tmp_path / "out")) == 1
    (tmp_path / "list.txt").write_text("id1 id1/a.wav\nid1 id1/b.wav\n")
    assert main([*words, "--seed", "3"]) == 2
    said = capsys.readouterr().err
    assert (
        "was begun with another list (1 utterances, now 2) and the seed 0 (now 3); give what it was begun with" in said
    )


def test_a_plan_is_not_replaced_under_a_task_that_is_at_work(tmp_path):
    corpus(tmp_path, a=TONE, b=(TONE, 8000))
    listed, out = read_list(tmp_path / "list.txt", tmp_path), tmp_path / "out"
    with pytest.raises(ShardError, match="8000 Hz"):
        pack(listed, out, task=(0, 2), progress=False)
    with only_writer(out, shared=True), pytest.raises(ShardError, match="was begun with the seed 0"):
        pack(listed, out, task=(0, 2), seed=1, progress=False)
    pack(listed, out, task=(0, 2), seed=1, convert=True, progress=False)


def test_a_second_pack_into_the_same_folder_is_refused_in_one_sentence(tmp_path, capsys):
    words = corpus(tmp_path, a=TONE)
    with only_writer(tmp_path / "out"):
        assert main(words) == 2
        assert main(["--out", str(tmp_path / "out"), "--merge"]) == 2
    assert capsys.readouterr().err.count("another pack is writing to") == 2
    assert main(words) == 0


def _pack_a_task(folder, out):
    return pack(read_list(folder / "list.txt", folder), out, task=(0, 1), progress=False, shard_bytes=60000)


def test_the_same_task_started_twice_at_once_ends_well_twice(tmp_path):
    make_corpus(tmp_path / "wav", speakers=12)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        counts = pool.starmap(_pack_a_task, [(tmp_path / "wav", tmp_path / "out")] * 4)
    assert max(counts) > 0
    parts.merge(tmp_path / "out")
    pack(read_list(tmp_path / "wav/list.txt", tmp_path / "wav"), tmp_path / "one", progress=False, shard_bytes=60000)
    assert (tmp_path / "out/SHA256SUMS").read_bytes() == (tmp_path / "one/SHA256SUMS").read_bytes()


def test_a_task_without_a_share_says_so(tmp_path, capsys):
    words = corpus(tmp_path, a=TONE)
    assert main([*words, "--task", "3/5"]) == 0
    assert "no tar for task 3/5: there are 1 tars, one a task at most" in capsys.readouterr().out
    assert main([*words, "--task", "0/5"]) == 0 and main([*words, "--task", "0/5"]) == 0
    assert "everything was packed already" in capsys.readouterr().out


def test_the_count_of_written_utterances_leaves_out_what_was_skipped(tmp_path, capsys):
    for workers in ("1", "2"):
        audio_of = make_corpus(tmp_path / workers)
        (tmp_path / workers / f"{min(audio_of)}.wav").write_bytes(b"no audio")
        words = [
            "--list",
            f"{tmp_path}/{workers}/list.txt",
            "--root",
            f"{tmp_path}/{workers}",
            "--shard-bytes",
            "60000",
        ]
        words += ["--out", f"{tmp_path}/out{workers}", "--workers", workers, "--skip-bad", f"{tmp_path}/bad{workers}"]
        assert main(words) == 0
        said = capsys.readouterr().out
        assert f"{len(audio_of) - 1} utterances written" in said and "left out 1" in said


def test_skip_bad_and_report_overwrite_no_input(tmp_path, capsys):
    words = corpus(tmp_path, a=TONE)
    before = (tmp_path / "list.txt").read_bytes()
    (tmp_path / "link").symlink_to("list.txt")
    (tmp_path / "thesis.txt").write_text("years of work\n")
    for option, name, message in (
        ("--skip-bad", "list.txt", "is the list itself"),
        ("--skip-bad", "link", "is the list itself"),
        ("--skip-bad", "thesis.txt", "exists and is no list of bad files"),
        ("--skip-bad", "id1", "is a folder, expected the name of a file"),
        ("--skip-bad", "nowhere/bad.txt", "nowhere is not there"),
        ("--report", "list.txt", "is the list itself"),
        ("--report", "report.json", "give a name with another ending"),
    ):
        assert main([*words, option, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "list.txt").read_bytes() == before and not (tmp_path / "out").exists()
    assert (tmp_path / "thesis.txt").read_text() == "years of work\n"


def test_senseless_options_are_one_sentence(tmp_path, capsys):
    words = corpus(tmp_path, a=TONE)
    for more in (
        ["--sample-rate", "1"],
        ["--shard-bytes", "0"],
        ["--seed", "-1"],
        ["--task", "²/3"],
        ["--report-crop", "nan"],
    ):
        assert main([*words, *more]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main([*words[:-4], "--out", str(tmp_path / "list.txt")]) == 2
    assert main(["--list", str(tmp_path), *words[2:]]) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err


def test_a_zip_member_that_inflates_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("id1/a.wav", "w") as member,
    ):
        for _ in range(100):
            member.write(bytes(1 << 20))
    with pytest.raises(ShardError, match=r"bomb.zip::id1/a.wav: \d+ bytes would unpack to 104857600, over 100 times"):
        audio.read_audio(f"{tmp_path}/bomb.zip::id1/a.wav", 16000)


def test_a_record_of_an_older_pack_is_taken_up_with_the_same_settings_only(tmp_path):
    make_corpus(tmp_path / "wav")
    entries = plan.make_entries(read_list(tmp_path / "wav/list.txt", tmp_path / "wav"))
    settings = plan.Settings(shard_bytes=60000)
    (tmp_path / "out/parts").mkdir(parents=True)
    made = plan.make_plan(entries, tmp_path / "out", settings)
    record = plan.read_record(tmp_path / "out/parts/plan-000.npz")
    import hashlib

    text = (
        '{"codec": "wav", "convert": false, "first_shard": 0, "generation": 0, "sample_rate": 16000, "seed": 0,'
        ' "shard_bytes": 60000}'
    )
    old = hashlib.sha256(text.encode() + entries.keys.tobytes()).hexdigest()
    record.identity, record.settings, record.keys_sha256 = old, "", ""
    assert plan.differences(record, entries, settings) == [] and made.digest
    assert plan.differences(record, entries, plan.Settings(shard_bytes=60001)) == [
        "another list, seed, tar size, codec, rate or --convert"
    ]


def test_odd_bytes_at_the_end_are_counted(tmp_path):
    write_wav(tmp_path / "id1/a.wav", noise(np.random.default_rng(0), 100))
    data = (tmp_path / "id1/a.wav").read_bytes()
    (tmp_path / "id1/a.wav").write_bytes(data[:40] + b"\xff\xff\xff\xff" + data[44:] + b"\7")
    found = audio.decode((tmp_path / "id1/a.wav").read_bytes(), "a", 16000)
    assert found.notes == {"trimmed": "1 bytes at its end that are no whole sample"} and len(found.pcm) == 200
    assert entries_of(tmp_path, {"id1/a": None}) and os.path.exists(tmp_path / "id1/a.wav")
