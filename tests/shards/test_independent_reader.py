"""A reader of 30 lines written from shards/FORMAT.md alone: it imports nothing of this repository."""

import ast
import binascii
import json
import random
import struct

import numpy as np

from tests.shards.test_corpus import packed


def read_crop(out, key, start, count):
    index = out / "index"
    meta = json.loads((index / "index.json").read_text())

    def npy(name):
        data = (index / name).read_bytes()
        assert data[:8] == b"\x93NUMPY\x01\x00"
        (length,) = struct.unpack("<H", data[8:10])
        shape = ast.literal_eval(data[10 : 10 + length].decode())["shape"]
        return data[10 + length :], shape[0]

    keys, n = npy("keys.npy")
    width = meta["key_bytes"]
    names = [keys[i * width : (i + 1) * width].rstrip(b"\0") for i in range(n)]
    i = names.index(key.encode())
    row = npy("utterances.npy")[0][32 * i : 32 * i + 32]
    offset, nbytes, samples, shard, speaker, crc, key_check, row_check = struct.unpack("<QIIIIIHH", row)
    assert row_check == binascii.crc_hqx(row[:30], 0) and key_check == binascii.crc_hqx(names[i], 0)
    rows, _ = npy("speaker_rows.npy")
    first, end = struct.unpack_from("<QQ", rows, 8 * speaker)
    assert first <= i < end and start + count <= samples == nbytes // 2
    tar = meta["shardlist"][shard]
    with open(out / tar["url"], "rb") as file:
        file.seek(offset + 2 * start)
        return struct.unpack(f"<{count}h", file.read(2 * count))


def test_a_reader_written_from_the_page_reads_random_crops(tmp_path):
    out, audio = packed(tmp_path)
    draw = random.Random(5)
    for _ in range(20):
        key = draw.choice(sorted(audio))
        start = draw.randrange(len(audio[key]) - 1000)
        assert np.array_equal(read_crop(out, key, start, 1000), audio[key][start : start + 1000])
