"""What a data set holds, as a table and histograms."""

import numpy as np

from shards.info import histogram, main
from tests.shards.test_corpus import packed


def test_the_table_counts_speakers_utterances_and_hours(tmp_path, capsys):
    out, audio = packed(tmp_path)
    assert main([str(out)]) == 0
    printed = capsys.readouterr().out
    words = {line[:24].strip(): line[24:].split() for line in printed.splitlines() if line[:24].strip()}
    assert words["speakers"] == ["6"] and words["utterances"] == ["30"]
    assert words["hours"] == [f"{sum(map(len, audio.values())) / 16000 / 3600:.2f}"]
    lengths = [len(samples) / 16000 for samples in audio.values()]
    assert words["seconds"] == [f"{f(lengths):.1f}" for f in (min, np.median, np.mean, max)]
    assert words["utterances per speaker"] == ["4.0", "5.0", "5.0", "6.0"]


def test_histogram_bars_are_as_long_as_their_counts_and_lose_no_value():
    lines = histogram("x", np.array([1.0] * 10 + [2.0] * 5 + [100.0]))
    counts = [int(line.split("-")[1].split()[1]) for line in lines[2:]]
    assert sum(counts) == 16 and counts[0] == 15
    assert lines[2].endswith("#" * 40)


def test_a_folder_that_holds_no_data_set_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is not a packed data set, or is not packed to the end" in capsys.readouterr().err
