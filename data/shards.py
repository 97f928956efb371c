"""Make token shards for the trainer: uint16 ids behind a 1,024-byte header (layout: README.md beside this file).

    python data/shards.py text                        # bytes of Python's own documentation, for small trial runs
    python data/shards.py synthetic                   # random tokens with web-text statistics, for timing runs
    python data/shards.py synthetic FOLDER --shards 4 --tokens 50000000 --seed 7

Needs numpy and the standard library only; the trainer reads the files and never imports this module.
"""
import argparse
import ast
import errno
import os
import random
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
MAX_VOCAB = 2**16  # ids are uint16
MIN_TOKENS, MAX_TOKENS = 2, 2**31 - 1  # one input and its target; the header counts in int32

HERE = Path(__file__).resolve().parent

# Byte-level text: 256 byte values, then the id that opens a document.
BYTE_DOC_ID = 256
TEXT_SEED = 0
MIN_TEXT_CHARS = 100  # drops one-line docstrings, which say little and repeat each other; untuned
VAL_SHARE = 10  # one token in so many validates
MIN_VAL_TOKENS = 65_536 + 1
# Test folders hold fixtures, some broken on purpose; installed packages would make the text differ between machines.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# Synthetic tokens: GPT-2's vocabulary, whose last id opens a document.
GPT2_DOC_ID = 50_256
PIECE_TOKENS = 2**20  # bounds memory; the tokens do not depend on it
LENGTHS_AT_ONCE = 8192
# Sized for the trainer's short preset: the least shards whose whole batches cover its steps.
BATCH_TOKENS, SHORT_STEPS = 524_288, 300
SHARD_TOKENS = 100_000_000
NUM_SHARDS = -(-SHORT_STEPS // ((SHARD_TOKENS - 1) // BATCH_TOKENS))
VAL_TOKENS = 20 * BATCH_TOKENS + 1


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
                check_ids(path.name, piece, vocab_size)
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


def check_ids(name, ids, vocab_size):
    """Raise ShardError unless every id of the array is one of the shard's vocabulary."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ShardError(f"{name} cannot hold ids {ids.min()} to {ids.max()}; keep them within 0 to {vocab_size - 1}")


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


# ---- text: the documentation that every Python carries

def clean(text):
    """`text` with plain line ends, no trailing blanks, and only characters that UTF-8 can encode."""
    lines = text.encode("utf-8", "ignore").decode("utf-8").splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()


def docstrings(source):
    """The cleaned docstrings in a module's source (bytes), in source order; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings of other people's escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    nodes.sort(key=lambda node: node.body[0].lineno)  # ast.walk goes level by level
    return [clean(ast.get_docstring(node)) for node in nodes]


def library_sources(root):
    """The readable .py files below `root` as bytes, in path order, without SKIPPED_FOLDERS."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS  # prunes the walk
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        try:
            yield path.read_bytes()
        except OSError:
            continue


def text_documents():
    """This Python's help topics and, one document per module, its library's docstrings; a shuffled list of str.

    The same Python always gives the same list. No text of MIN_TEXT_CHARS or more occurs in it twice.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ShardError("this Python lacks its help topics (pydoc_data); install its full standard library") from error
    candidates = [[clean(topics[name])] for name in sorted(topics)]
    candidates += [docstrings(source) for source in library_sources(sysconfig.get_path("stdlib"))]
    seen, documents = set(), []
    for texts in candidates:
        fresh = [text for text in dict.fromkeys(texts) if len(text) >= MIN_TEXT_CHARS and text not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    random.Random(TEXT_SEED).shuffle(documents)
    return documents


def encode(text):
    """One document as ids: BYTE_DOC_ID, then its UTF-8 bytes; uint16 of shape (1 + bytes,)."""
    return np.array([BYTE_DOC_ID, *text.encode("utf-8")], np.uint16)


def make_text(folder):
    """Write text_val_000000.bin and text_train_000001.bin into `folder`; no document is in both."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [encode(text) for text in text_documents()]
    ends = np.cumsum([document.size for document in documents])
    val_tokens = ends[-1] // VAL_SHARE
    if val_tokens < MIN_VAL_TOKENS:
        raise ShardError(f"{sysconfig.get_path('stdlib')} carries {ends[-1]:,} tokens of text; use a Python whose "
                         f"standard library has its sources and so at least {VAL_SHARE * MIN_VAL_TOKENS:,}")
    num_val = np.searchsorted(ends, val_tokens) + 1
    splits = {"text_val_000000.bin": documents[:num_val], "text_train_000001.bin": documents[num_val:]}
    for name, split in splits.items():
        write_and_report(folder / name, split, BYTE_DOC_ID + 1, BYTE_DOC_ID)


# ---- synthetic: random tokens that cost a model what web text costs it

def zipf_cdf():
    """P(id <= i) where P(i) is proportional to 1 / (i + 1); float64 of shape (GPT2_DOC_ID,), ends in exactly 1."""
    cdf = np.cumsum(1.0 / np.arange(1, GPT2_DOC_ID + 1))
    return cdf / cdf[-1]


def document_lengths(rng, num_documents):
    """Tokens of each document after its id, int64 of shape (num_documents,): the project's model of FineWeb."""
    lengths = rng.lognormal(np.log(398), 0.88, num_documents)
    tail = rng.random(num_documents) < 0.01
    lengths[tail] = 6000 * (1 + rng.pareto(1.2, tail.sum()))
    return np.clip(lengths, 32, 130_000).astype(np.int64)


def document_starts(rng, num_tokens):
    """Positions below `num_tokens` at which a document begins, int64, the first 0; the last document may be cut."""
    starts = [np.zeros(1, np.int64)]
    while starts[-1][-1] < num_tokens:
        starts.append(starts[-1][-1] + np.cumsum(1 + document_lengths(rng, LENGTHS_AT_ONCE)))
    starts = np.concatenate(starts)
    return starts[starts < num_tokens]


def synthetic_pieces(num_tokens, seed, index):
    """Yield the tokens of shard `index` as uint16 arrays of at most PIECE_TOKENS; all depends on the arguments only."""
    rng = np.random.default_rng([seed, index])
    cdf, starts = zipf_cdf(), document_starts(rng, num_tokens)
    for begin in range(0, num_tokens, PIECE_TOKENS):
        end = min(begin + PIECE_TOKENS, num_tokens)
        piece = np.searchsorted(cdf, rng.random(end - begin), side="right").astype(np.uint16)
        first, last = np.searchsorted(starts, [begin, end])
        piece[starts[first:last] - begin] = GPT2_DOC_ID
        yield piece


def make_synthetic(folder, num_shards, num_tokens, val_tokens, seed):
    """Write synthetic_val_000000.bin and `num_shards` training shards of `num_tokens` each into `folder`."""
    if num_shards < 1 or seed < 0:
        raise ShardError(f"cannot make {num_shards} shards from seed {seed}; ask for 1 or more, the seed 0 or more")
    check_count("a training shard", num_tokens)
    check_count("the validation shard", val_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards + 1):
        split, size = ("train", num_tokens) if index else ("val", val_tokens)
        path = folder / f"synthetic_{split}_{index:06d}.bin"
        write_and_report(path, synthetic_pieces(size, seed, index), GPT2_DOC_ID + 1, GPT2_DOC_ID)


# ---- command line

def parse(argv):
    """The arguments; `run` among them is the chosen command, a function of them all."""
    parser = argparse.ArgumentParser(description="Make token shards for the trainer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = commands.add_parser("text", help="bytes of Python's own documentation, in seconds")
    text.set_defaults(run=lambda args: make_text(args.folder))
    text.add_argument("folder", nargs="?", type=Path, default=HERE / "text", help="default: %(default)s")

    synthetic = commands.add_parser("synthetic", help="random tokens with the statistics of web text, of any size")
    synthetic.set_defaults(
        run=lambda args: make_synthetic(args.folder, args.shards, args.tokens, args.val_tokens, args.seed))
    synthetic.add_argument("folder", nargs="?", type=Path, default=HERE / "synthetic", help="default: %(default)s")
    synthetic.add_argument("--shards", type=int, default=NUM_SHARDS, help="training shards (%(default)s)")
    synthetic.add_argument("--tokens", type=int, default=SHARD_TOKENS, help="tokens a training shard (%(default)s)")
    synthetic.add_argument("--val-tokens", type=int, default=VAL_TOKENS, help="validation tokens (%(default)s)")
    synthetic.add_argument("--seed", type=int, default=0, help="another seed, other tokens (%(default)s)")
    return parser.parse_args(argv)


def describe(error, folder):
    """An OSError met while writing into `folder`, as one sentence with a way out."""
    in_the_way = "move away the file that is in the folder's place or name another folder"
    way_out = {
        errno.EEXIST: in_the_way,
        errno.ENOTDIR: in_the_way,
        errno.ENOSPC: "free some space or name a folder on another disk",
    }.get(error.errno, "name a folder that you can write to")
    # filename2 is the shard's final path, set if only the renaming failed.
    return f"cannot write {error.filename2 or folder}: {error.strerror}; {way_out}"


def main(argv=None):
    """Run one command; where it cannot be done, exit with status 1 and one sentence on stderr."""
    args = parse(argv)
    start = time.perf_counter()
    try:
        args.run(args)
    except ShardError as error:
        sys.exit(f"shards.py: {error}")
    except OSError as error:
        sys.exit(f"shards.py: {describe(error, args.folder)}")
    print(f"done in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
