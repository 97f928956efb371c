"""Shards without a network: the documentation that every Python carries, and random tokens with web-text statistics."""
import ast
import os
import random
import sysconfig
import warnings
from pathlib import Path

import numpy as np

from shard_format import PUBLISHED_DOC_ID, PUBLISHED_VOCAB_SIZE, ShardError, check_count, write_and_report

# Byte-level text: 256 byte values, then the id that opens a document.
BYTE_DOC_ID = 256
TEXT_SEED = 0
MIN_TEXT_CHARS = 100  # drops one-line docstrings, which say little and repeat each other; untuned
VAL_SHARE = 10  # one token in so many validates
# Test folders hold fixtures, some broken on purpose; installed packages would make the text differ between machines.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# Synthetic tokens, of the published shards' vocabulary, whose last id opens a document.
PIECE_TOKENS = 2**20  # bounds memory; the tokens do not depend on it
LENGTHS_AT_ONCE = 8192
# Sized for the trainer's short preset: the least shards whose whole batches cover its steps.
BATCH_TOKENS, SHORT_STEPS = 524_288, 300
SHARD_TOKENS = 100_000_000
NUM_SHARDS = -(-SHORT_STEPS // ((SHARD_TOKENS - 1) // BATCH_TOKENS))
VAL_TOKENS = 20 * BATCH_TOKENS + 1  # those that validate, and the last target


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


def make_text(folder):
    """Write text_val_000000.bin and text_train_000001.bin into `folder`; no document is in both."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [np.array([BYTE_DOC_ID, *text.encode("utf-8")], np.uint16) for text in text_documents()]
    ends = np.cumsum([document.size for document in documents])
    val_tokens = ends[-1] // VAL_SHARE
    num_val = np.searchsorted(ends, val_tokens) + 1
    splits = {"text_val_000000.bin": documents[:num_val], "text_train_000001.bin": documents[num_val:]}
    for name, split in splits.items():
        write_and_report(folder / name, split, BYTE_DOC_ID + 1, BYTE_DOC_ID)


# ---- synthetic: random tokens that cost a model what web text costs it

def zipf_cdf(num_ids):
    """P(id <= i) where P(i) is proportional to 1 / (i + 1); float64 of shape (num_ids,), ends in exactly 1."""
    cdf = np.cumsum(1.0 / np.arange(1, num_ids + 1))
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


def synthetic_pieces(num_tokens, seed, index, doc_id=PUBLISHED_DOC_ID):
    """Yield the tokens of shard `index` as uint16 arrays of at most PIECE_TOKENS; all depends on the arguments only.

    doc_id: opens every document; the ids below it are the others.
    """
    rng = np.random.default_rng([seed, index])
    cdf, starts = zipf_cdf(doc_id), document_starts(rng, num_tokens)
    for begin in range(0, num_tokens, PIECE_TOKENS):
        end = min(begin + PIECE_TOKENS, num_tokens)
        piece = np.searchsorted(cdf, rng.random(end - begin), side="right").astype(np.uint16)
        first, last = np.searchsorted(starts, [begin, end])
        piece[starts[first:last] - begin] = doc_id
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
        write_and_report(path, synthetic_pieces(size, seed, index), PUBLISHED_VOCAB_SIZE, PUBLISHED_DOC_ID)
