"""Part files, the commit records of the packer, and the index made from them alone.

    parts/plan-GGG.npz   sizes and identity of the list of pack GGG (000: the first, later ones: --append)
    parts/NNNNNN.npz     of tar NNNNNN: rows, keys and speakers in the order of the tar, its size and sha256, the plan's digest, what
                         was left out. It is written after the tar: a tar without its part is packed again

Everything in index/ is a function of the parts, labels included, so a merge that is killed loses nothing.

Usage: merge(Path("data/shards/vox2"))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards import format, index, plan
from shards.format import ROW, TAR, ShardError


@dataclass
class Part:
    """What a part file holds. rows: (n,) ROW; keys: n byte strings; skipped: (key, source, reason) of each bad file.

    identity: hex, of the tar's last block; notes: (key, word of audio.NOTES, detail); None in the parts of older packs.
    """

    rows: np.ndarray
    keys: list[bytes] | np.ndarray
    filesize: int
    sha256: str
    head_crc32: int
    digest: str
    skipped: list[tuple[str, str, str]]
    identity: str | None = None
    notes: list[tuple[str, str, str]] | None = None

    def is_converted(self) -> bool:
        return any(word == "converted" for _, word, _ in self.notes or ())


def part_path(out: Path, shard: int) -> Path:
    return out / "parts" / f"{shard:06d}.npz"


def write_part(out: Path, shard: int, part: Part) -> None:
    keys = np.array(part.keys, "S") if len(part.keys) else np.empty(0, "S1")
    path = part_path(out, shard)
    format.remove_leftovers(path.parent, path.name)
    with format.atomic_write(path) as file:
        np.savez(
            file,
            rows=part.rows,
            keys=keys,
            speakers=np.unique([key.split(b"/", 1)[0] for key in part.keys] or np.empty(0, "S1")),
            filesize=np.int64(part.filesize),
            sha256=np.array(part.sha256),
            head_crc32=np.int64(part.head_crc32),
            digest=np.array(part.digest),
            skipped=np.array(part.skipped or np.empty((0, 3)), str),
            identity=np.array(part.identity),
            notes=np.array(part.notes or np.empty((0, 3)), str),
        )


def read_part(out: Path, shard: int) -> Part:
    """Raises ShardError where the part is missing or damaged."""
    path = part_path(out, shard)
    try:
        with format.open_regular(path, -1) as opened, np.load(opened, allow_pickle=False) as file:
            skipped = [tuple(line) for line in file["skipped"].tolist()]
            known = "identity" in file
            part = Part(
                file["rows"],
                file["keys"],
                int(file["filesize"]),
                str(file["sha256"]),
                int(file["head_crc32"]),
                str(file["digest"]),
                skipped,
                str(file["identity"]) if known else None,
                [tuple(line) for line in file["notes"].tolist()] if known else None,
            )
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: tar {shard} is not packed yet") from None
    except plan.DAMAGED as error:
        raise ShardError(f"{path} is damaged ({error}); delete it and run the same pack again") from None
    if part.rows.dtype != ROW or len(part.rows) != len(part.keys):
        raise ShardError(f"{path} is damaged: {len(part.rows)} rows, {len(part.keys)} keys; delete it and pack again")
    return part


def records(out: Path) -> list[Path]:
    """The plans of a data set: of the first pack, then of each --append."""
    return sorted((out / "parts").glob("plan-*.npz"))


def generation_to_write(out: Path, entries: plan.Entries, settings: plan.Settings, append: bool) -> plan.Settings:
    """The settings with the number of the pack and of its first tar: a new one, or the one that this list has begun.

    Raises ShardError where OUT holds what does not go together with this list.
    """
    packs = records(out)
    if not append:
        return settings
    if not packs:
        raise ShardError(f"{out} holds no data set to append to; pack without --append")
    last = len(packs) - 1
    begun = replace(settings, generation=last, first_shard=plan.read_record(packs[last]).first_shard)
    if last and not plan.differences(plan.read_record(packs[last]), entries, begun):
        return begun
    meta = index.read_meta(out)
    if meta["shardlist"][-1]["generation"] != last:
        raise ShardError(f"{out}: an --append with another list is unfinished; run that one to its end first")
    if (meta["sample_rate"], meta["codec"]) != (settings.sample_rate, settings.codec):
        raise ShardError(
            f"{out} holds {meta['sample_rate']} Hz {meta['codec']}, asked for {settings.sample_rate} Hz "
            f"{settings.codec}: append the same, or pack to another folder"
        )
    known = np.isin(entries.keys, index.open_index(out).keys)
    if known.any():
        first = entries.keys[known][0].decode()
        raise ShardError(f"{known.sum()} of the keys are in {out} already, the first: {first!r}; list only new ones")
    return replace(settings, generation=last + 1, first_shard=len(meta["shardlist"]))


def merge(out: str | Path, skip_bad: str | Path | None = None) -> None:
    """Makes OUT/index and OUT/SHA256SUMS from all parts; skip_bad: where to list what was left out.

    Raises ShardError while a tar or a part is missing, or where parts come from different plans.
    """
    out = Path(out)
    if not records(out):
        raise ShardError(f"{out}/parts holds no plan; pack something first")
    rows, keys, tars, skipped, sums = [], [], [], [], []
    settings, identities = plan.Settings(), []
    for generation, record in enumerate(records(out)):
        made = plan.read_record(record)
        settings = replace(settings, sample_rate=made.sample_rate, codec=made.codec)
        sums.append((format.sha256_file(record), f"parts/{record.name}"))
        _check_complete(out, made)
        for shard in range(made.first_shard, made.first_shard + made.n_shards):
            part = read_part(out, shard)
            _check_part(out, shard, part, made.digest)
            rows.append(part.rows)
            keys.append(part.keys)
            skipped += part.skipped
            sums.append((format.sha256_file(part_path(out, shard)), f"parts/{shard:06d}.npz"))
            identities.append(bytes.fromhex(part.identity or index.NO_IDENTITY.hex()))
            tars.append((part.filesize, len(part.rows), part.head_crc32, generation, bytes.fromhex(part.sha256)))
    rows, keys = np.concatenate(rows), np.concatenate(keys)
    if not len(rows):
        raise ShardError(f"{out}: every utterance was left out as bad, the first: {skipped[0][2]}")
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise ShardError(f"{out}: key {keys[twice[0]].decode()!r} is packed twice, by different --append")
    format.remove_leftovers(out)
    format.remove_leftovers(out / "parts")
    if skip_bad is not None:
        format.write_file(skip_bad, "".join("\t".join(line) + "\n" for line in sorted(skipped)))
    made = np.array(identities, "V32")
    index.write_index(out, index.Contents(rows, keys, np.array(tars, TAR), made, settings, len(skipped), sums))


def _check_complete(out: Path, made: plan.Record) -> None:
    numbers = range(made.first_shard, made.first_shard + made.n_shards)
    missing = [s for s in numbers if not part_path(out, s).exists()]
    if missing:
        named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ShardError(
            f"{out}: {len(missing)} of {made.n_shards} tars are not packed yet ({named}); run their --task, then --merge again"
        )


def _check_part(out: Path, shard: int, part: Part, digest: str) -> None:
    if part.digest != digest:
        raise ShardError(
            f"{part_path(out, shard)} belongs to another plan; run the same pack (or --task) again, which packs that tar anew"
        )
    path = out / index.tar_name(shard)
    size = path.stat().st_size if path.exists() else None
    if size != part.filesize:
        found = "no such file" if size is None else f"{size} bytes"
        raise ShardError(f"{path}: found {found}, its part says {part.filesize} bytes; run the same pack again")
