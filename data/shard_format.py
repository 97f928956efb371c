"""The shard format: uint16 token ids behind a 1,024-byte header (layout: README.md beside this file)."""
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
MAX_VOCAB = 2**16  # ids are uint16
MIN_TOKENS, MAX_TOKENS = 2, 2**31 - 1  # one input and its target; the header counts in int32


class ShardError(ValueError):
    """A mistake that the caller can mend; its message is one sentence that says how."""


def write_shard(path, tokens, vocab_size, doc_id):
    """Write one shard atomically: under `path` there is either what was there before or the whole new shard.

    tokens: one 1-d integer array of ids, or an iterable of such arrays, written one after another.
    Returns (number of tokens, number of documents), a document being one occurrence of `doc_id`.
    Raises ShardError for sizes or ids that the format cannot hold, OSError where writing fails.
    """
    path = Path(path)
    if not 0 <= doc_id < vocab_size <= MAX_VOCAB:
        raise ShardError(f"{path.name} cannot have a vocabulary of {vocab_size:,} with document id {doc_id:,}; "
                         f"use at most {MAX_VOCAB:,} ids, the document id among them")
    pieces = [tokens] if isinstance(tokens, np.ndarray) else tokens
    num_tokens = num_documents = 0
    # In the same folder, so that the rename stays within one disk; not named .bin, so that no glob for shards finds it.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.seek(4 * HEADER_INTS)  # the count is known only after the last piece
            for piece in pieces:
                if piece.size and not 0 <= piece.min() <= piece.max() < vocab_size:
                    raise ShardError(f"{path.name} cannot hold ids {piece.min()} to {piece.max()}; "
                                     f"keep them within 0 to {vocab_size - 1}")
                # Not ndarray.tofile: its error on a full disk does not say that the disk is full.
                file.write(np.ascontiguousarray(piece, "<u2"))
                num_tokens += piece.size
                num_documents += np.count_nonzero(piece == doc_id)
            check_count(path.name, num_tokens)
            file.seek(0)
            file.write(np.array([MAGIC, VERSION, num_tokens, vocab_size, doc_id] + [0] * (HEADER_INTS - 5), "<i4"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return num_tokens, num_documents


def check_count(name, num_tokens):
    """Raise ShardError unless a shard can hold that many tokens."""
    if not MIN_TOKENS <= num_tokens <= MAX_TOKENS:
        raise ShardError(f"{name} cannot hold {num_tokens:,} tokens; ask for {MIN_TOKENS} to {MAX_TOKENS:,}")


def write_and_report(path, tokens, vocab_size, doc_id):
    """write_shard, then one line for people on stdout; tokens that are made lazily count into its seconds."""
    start = time.perf_counter()
    num_tokens, num_documents = write_shard(path, tokens, vocab_size, doc_id)
    print(f"{path}: {num_tokens:,} tokens, {num_documents:,} documents, {path.stat().st_size / 1e6:.1f} MB, "
          f"{time.perf_counter() - start:.1f} s", flush=True)


# ---- reading

PUBLISHED_VOCAB_SIZE, PUBLISHED_DOC_ID = 50_257, 50_256  # what 0 in a header stands for


class Damage(ShardError):
    """What is wrong with a shard's file: a clause that completes "NAME is damaged: "."""


class Header(NamedTuple):
    num_tokens: int
    vocab_size: int
    doc_id: int


def read_header(path):
    """The Header of a shard, zeros replaced by what they stand for, checked against the file's size.

    Raises Damage where it is no header or the size differs, OSError where the file cannot be read.
    """
    size = os.stat(path).st_size
    if size < 4 * HEADER_INTS:
        raise Damage(f"its {size:,} bytes do not hold a header of {4 * HEADER_INTS:,}")
    magic, version, num_tokens, vocab_size, doc_id = np.fromfile(path, "<i4", count=5).tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise Damage(f"its magic number and version are {magic} and {version} instead of {MAGIC} and {VERSION}")
    if size != 4 * HEADER_INTS + 2 * num_tokens or num_tokens < MIN_TOKENS:
        raise Damage(f"its header promises {num_tokens:,} tokens, for which its {size:,} bytes "
                     f"should be {4 * HEADER_INTS + 2 * num_tokens:,}")
    header = Header(num_tokens, vocab_size or PUBLISHED_VOCAB_SIZE, doc_id or PUBLISHED_DOC_ID)
    if not 0 <= header.doc_id < header.vocab_size <= MAX_VOCAB:
        raise Damage(f"its header names a vocabulary of {vocab_size:,} with document id {doc_id:,}")
    return header
