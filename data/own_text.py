"""Shards from one's own text: .txt and .jsonl files, as GPT-2's BPE or as plain bytes.

The ids of all documents go into one file first; once their number is known, shards are cut from it.
"""
import json
import os
import re
import shlex
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from generate import BYTE_DOC_ID, SHARD_TOKENS, VAL_SHARE, VAL_TOKENS
from shard_format import MIN_TOKENS, PUBLISHED_DOC_ID, ShardError, check_count, write_shard

TEXTS_AT_ONCE = 64  # encoded by threads; untuned


class Tokenizer(NamedTuple):
    """An encoding of text, and why it was chosen."""
    name: str
    doc_id: int  # opens every document and is the last of the vocabulary
    encode: Callable[[list[str]], list[np.ndarray]]  # texts -> uint16 ids of each
    why: str


def read_txt(file, field):
    """One document."""
    yield file.read().decode("utf-8-sig")


def read_jsonl(file, field):
    """A document a line."""
    for number, line in enumerate(file, 1):
        try:
            text = json.loads(line)[field] if line.strip() else ""
            text.encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"line {number:,} is not JSON in UTF-8 with text in a field {field!r}; name it with "
                             f"--field, mend or remove the line") from error
        yield text


# Each yields the texts of documents. Raises ShardError, a clause that lacks the file in front.
READERS = {".txt": read_txt, ".jsonl": read_jsonl}


def list_inputs(inputs):
    """The files to read, in order: those named, and those of a readable kind below the folders named, sorted."""
    paths = []
    for given in inputs:
        found = sorted(given.rglob("*")) if given.is_dir() else [given]
        readable = [path for path in found if path.is_file() and path.suffix.lower() in READERS]
        if not readable:
            raise ShardError(f"{given} neither is nor holds a {' or '.join(READERS)} file; name another")
        paths += readable
    return paths


def read_texts(paths, field):
    """Yield the documents of all files, in order. Raises ShardError with the file."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                yield from READERS[path.suffix.lower()](file, field)
        except ShardError as error:
            raise ShardError(f"{path}: {error}") from error
        except (UnicodeError, OSError) as error:
            raise ShardError(f"{path} cannot be read ({error}); mend it, make it UTF-8 or leave it out") from error


def choose_tokenizer(wanted):
    """The Tokenizer for `wanted`: "bytes", "gpt2", or "auto", which is gpt2 where possible. Raises ShardError."""
    utf8 = Tokenizer("bytes", BYTE_DOC_ID, lambda texts: [
        np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts], "as asked")
    if wanted == "bytes":
        return utf8
    try:
        import tiktoken
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # not installed, or a download that failed in whatever way
        why = f"no GPT-2 vocabulary ({type(error).__name__}): pip install tiktoken and run this once with a network"
        if wanted == "gpt2":
            raise ShardError(f"{why}, or use --tokenizer bytes") from error
        return utf8._replace(why=why)
    return Tokenizer("gpt2", PUBLISHED_DOC_ID, lambda texts: [
        np.array(ids, np.uint16) for ids in encoding.encode_ordinary_batch(texts)], "tiktoken has its vocabulary")


def write_ids(path, texts, tokenizer):
    """Write the ids of all documents that are not empty to a file without a header. Returns their number."""
    texts, num_documents, opening = filter(None, texts), 0, np.array([tokenizer.doc_id], np.uint16)
    with open(path, "wb") as file:
        while batch := list(islice(texts, TEXTS_AT_ONCE)):
            for ids in tokenizer.encode(batch):
                file.write(opening)
                file.write(ids)
            num_documents += len(batch)
    return num_documents


def write_set(folder, prefix, ids, tokenizer, val_tokens, shard_tokens):
    """Write a validation shard and as many training shards as it takes. Returns the tokens of each, {path: number}.

    A document that a shard's end divides gets a second opening id: what is left of it is a document, too.
    """
    if ids.size < VAL_SHARE * MIN_TOKENS:
        raise ShardError(f"the input makes {ids.size} tokens; give it at least {VAL_SHARE * MIN_TOKENS}")
    val_tokens = val_tokens or min(ids.size // VAL_SHARE, VAL_TOKENS)
    if val_tokens >= ids.size:
        raise ShardError(f"validation takes all of the {ids.size:,} tokens; lower --val-tokens or give more text")
    sizes, begin, opening = {}, 0, np.array([tokenizer.doc_id], np.uint16)
    while begin < ids.size:
        split, size = ("train", shard_tokens) if sizes else ("val", val_tokens)
        path = folder / f"{prefix}_{split}_{len(sizes):06d}.bin"
        pieces = [] if ids[begin] == tokenizer.doc_id else [opening]
        end = begin + size - len(pieces)
        sizes[path], _ = write_shard(path, [*pieces, ids[begin:end]], tokenizer.doc_id + 1, tokenizer.doc_id)
        begin = end
    return sizes


def make_own_text(inputs, folder, field, wanted, shard_tokens, val_tokens):
    """Write PREFIX_val_000000.bin, PREFIX_train_000001.bin ... of the inputs' text into `folder`, PREFIX its name.

    The set appears in the folder when it is complete. Raises ShardError, or OSError where writing fails.
    """
    from tqdm import tqdm  # here: the other commands get by with numpy
    check_count("a training shard", shard_tokens)
    if val_tokens is not None:
        check_count("the validation shard", val_tokens)
    paths = list_inputs(inputs)
    for path in sorted(folder.glob("*.bin")):  # the trainer would mix the sets up
        raise ShardError(f"{folder} already holds {path.name}; remove its shards or name another folder")
    tokenizer = choose_tokenizer(wanted)
    print(f"{len(paths):,} files; tokenizer {tokenizer.name}, vocabulary {tokenizer.doc_id + 1:,}: {tokenizer.why}",
          flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="unfinished-", suffix=".tmp") as temporary:
        texts = tqdm(read_texts(paths, field), unit=" documents", leave=False, disable=None)
        num_documents = write_ids(Path(temporary, "ids"), texts, tokenizer)
        # np.memmap refuses an empty file.
        ids = np.memmap(Path(temporary, "ids"), np.uint16, "r") if num_documents else np.empty(0, np.uint16)
        # Fit for files, and without the "_train_" before which the trainer takes all for the prefix.
        prefix = re.sub(r"[\W_]+", "-", folder.resolve().name).strip("-") or "text"
        sizes = write_set(Path(temporary), prefix, ids, tokenizer, val_tokens, shard_tokens)
        for path in reversed(sizes):  # validation last: before it, the trainer does not take the set for one
            os.replace(path, folder / path.name)
    val_tokens, *train_tokens = sizes.values()
    print(f"{num_documents:,} documents: {val_tokens:,} tokens for validation, {sum(train_tokens):,} in "
          f"{len(train_tokens):,} training shards")
    preset = "tiny" if tokenizer.name == "bytes" else "short"
    print(f"to train: DATA_PATH={shlex.quote(str(folder.resolve()))} ./run.sh {preset}")


def add_make(commands):
    """Add `make` to the subparsers of data/shards.py."""
    make = commands.add_parser("make", help="shards of your own .txt and .jsonl files")
    make.set_defaults(run=lambda args: make_own_text(
        args.inputs, args.folder, args.field, args.tokenizer, args.shard_tokens, args.val_tokens))
    make.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files, or folders to search for them")
    make.add_argument("--out", dest="folder", required=True, type=Path, help="folder for the shards, named after it")
    make.add_argument("--field", default="text", help="field that holds the text (%(default)s)")
    make.add_argument("--tokenizer", choices=["auto", "gpt2", "bytes"], default="auto",
                      help="auto: GPT-2's BPE if tiktoken has its vocabulary, else bytes (%(default)s)")
    make.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens a training shard (%(default)s)")
    make.add_argument("--val-tokens", type=int, help=f"validation tokens (a {VAL_SHARE}th, at most {VAL_TOKENS})")
