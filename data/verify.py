"""What is in a folder of shards, and whether it is whole: `python data/shards.py verify FOLDER`. It changes nothing."""
import sys
from pathlib import Path

import numpy as np

from fetch import SUMS, hash_file, read_sums
from shard_format import HEADER_INTS, PUBLISHED_DOC_ID, Damage, ShardError, read_header


def inspect(path, known_sha256):
    """What a shard holds, in words. Raises Damage, with what is wrong; known_sha256: None, or what its SHA-256 must be.

    A document is counted in tokens from its opening id to the next one or the end; what stands before the first one
    ends a document of the shard before.
    """
    header = read_header(path)
    ids = np.fromfile(path, "<u2", offset=4 * HEADER_INTS)
    starts = np.flatnonzero(ids == header.doc_id)
    lengths = np.diff(starts, append=ids.size).tolist()
    if ids.max() >= header.vocab_size:
        raise Damage(f"it holds id {ids.max():,}, outside its vocabulary of {header.vocab_size:,}")
    # Of a header that leaves the id open, as published shards do, or names theirs: their documents are never so long.
    if not lengths and header.doc_id == PUBLISHED_DOC_ID:
        raise Damage(f"it holds no document id {PUBLISHED_DOC_ID:,}: another tokenizer made it")
    sha256 = hash_file(path)
    if known_sha256 and sha256 != known_sha256:
        raise Damage(f"its SHA-256 begins with {sha256[:12]}, that in {SUMS} with {known_sha256[:12]}")
    span = f" of {min(lengths):,} to {max(lengths):,}" if lengths else ""
    return (f"{ids.size:,} tokens, {len(lengths):,} documents{span}, ids {ids.min()}-{ids.max()} of "
            f"{header.vocab_size:,}, sha256 {sha256[:12]}{' as fetched' if known_sha256 else ''}")


def verify(folder):
    """The command: a line for each shard; exits with status 1 if one is damaged. Raises ShardError where none is."""
    from tqdm import tqdm  # here: other commands of shards.py get by with numpy
    paths = sorted([*folder.glob("*_val_*.bin"), *folder.glob("*_train_*.bin")])
    if not paths:
        raise ShardError(f"{folder} holds no shards (such as PREFIX_train_000001.bin); get or make some, "
                         f"or name another folder")
    sums, damaged = read_sums(folder), []
    for path in tqdm(paths, "checking", delay=2, leave=False, disable=None):
        try:
            tqdm.write(f"{path.name}: {inspect(path, sums.get(path.name))}")
        except (Damage, OSError) as error:
            tqdm.write(f"{path.name} is damaged: {error}")
            damaged.append(path.name)
    if damaged:
        sys.exit(f"shards.py: damaged: {' '.join(damaged)}; remove and fetch (shards.py get) or make them again")


def add_verify(commands):
    """Register the command with the parser of shards.py."""
    parser = commands.add_parser("verify", help="what is in a folder of shards, and whether they are whole")
    parser.set_defaults(run=lambda args: verify(args.folder))
    parser.add_argument("folder", type=Path)
