"""Shards from one's own text: .txt, .jsonl and .parquet files, as GPT-2's BPE or as plain bytes.

One process reads the files in blocks and deals them out, workers turn blocks into ids, and the first process cuts the
ids, in the order of the input, into shards. What comes out depends on neither the number nor the speed of the workers.
"""
import codecs
import gzip
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import zlib
from collections import Counter, deque
from contextlib import contextmanager, suppress
from itertools import chain, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, NamedTuple

import numpy as np

from generate import BYTE_DOC_ID, GPT2_DOC_ID, SHARD_TOKENS, VAL_SHARE, VAL_TOKENS
from shard_format import MIN_TOKENS, ShardError, check_count, write_shard

BLOCK_BYTES = 2**20  # what a worker gets at once; bounds memory, untuned
PARQUET_ROWS = 256  # at once, for the same reason
# Where a long .txt may be divided: before a blank that ends a word. GPT-2's BPE never joins the two sides of it, so
# the ids are those of the whole. A block without such a place is divided between any two characters.
DIVIDE = re.compile(rb".*[!-~](?=[ \n])|.+(?=[^\x80-\xbf])|.+", re.DOTALL)


class Tokenizer(NamedTuple):
    name: str
    doc_id: int  # opens every document and is the last of the vocabulary
    encode: Callable[[str], np.ndarray]  # text -> uint16 ids
    why: str


class Block(NamedTuple):
    """Documents of one file, or a part of one long document."""
    path: Path
    first: int  # number of the line (.parquet: row) with which it begins, from 1
    records: list[bytes]  # .txt: all or a part of the file; .jsonl: lines; .parquet: texts
    opens: bool  # False if it continues the document of the block before
    num_bytes: int  # of the file that were read for it


# ---- text to ids

def encode_bytes(text):
    """UTF-8 bytes as uint16 ids."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)


def choose_tokenizer(wanted):
    """The Tokenizer for `wanted`: "bytes", "gpt2", or "auto", which is gpt2 where possible. Raises ShardError."""
    if wanted == "bytes":
        return Tokenizer("bytes", BYTE_DOC_ID, encode_bytes, "as asked")
    try:
        import tiktoken
        encoding = tiktoken.get_encoding("gpt2")
    except ImportError as error:
        why = f"tiktoken cannot be imported ({error}; pip install tiktoken)"
    except Exception as error:  # a download can fail in any way: tiktoken passes on what requests raises
        why = f"tiktoken cannot get the GPT-2 vocabulary ({type(error).__name__})"
    else:
        return Tokenizer("gpt2", GPT2_DOC_ID, lambda text: np.array(encoding.encode_ordinary(text), np.uint16),
                         f"tiktoken {getattr(tiktoken, '__version__', '')} has its vocabulary")
    if wanted == "gpt2":
        raise ShardError(f"{why}; run it once with a network, or use --tokenizer bytes")
    return Tokenizer("bytes", BYTE_DOC_ID, encode_bytes, why)


def extract_text(record, kind, field):
    """The text in a record, "" where there is none. Raises ShardError, a clause that lacks the place in front."""
    try:
        text = record.decode()
        if kind == ".jsonl":
            text = json.loads(text)[field] if text.strip() else ""
            text.encode()
        return text
    except UnicodeDecodeError as error:
        raise ShardError("is not UTF-8; convert the file to UTF-8") from error
    except UnicodeEncodeError as error:
        raise ShardError("holds half a surrogate pair, which is no text; mend or remove it") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ShardError(f"has no text in a field {field!r}; name it with --field or remove that line") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"is not JSON ({getattr(error, 'msg', error)}); mend or remove it") from error


def encode_block(block, field, tokenizer):
    """(uint16 ids, counts) of a block: bytes, documents begun, empty ones skipped. ShardError says where."""
    pieces, counts, kind = [np.empty(0, np.uint16)], Counter(bytes=block.num_bytes), kind_of(block.path)
    for number, record in enumerate(block.records, block.first):
        try:
            text = extract_text(record, kind, field)
        except ShardError as error:
            if kind == ".txt":
                number += record.count(b"\n", 0, error.__cause__.start)
            raise ShardError(f"{block.path}, {'row' if kind == '.parquet' else 'line'} {number:,} {error}") from error
        if block.opens:
            counts["documents" if text else "empty"] += 1
        if block.opens and text:
            pieces.append(np.array([tokenizer.doc_id], np.uint16))
        pieces.append(tokenizer.encode(text))
    return np.concatenate(pieces), counts


# ---- files to blocks

def kind_of(path):
    """".txt", ".jsonl", ".parquet" or what else the name ends in, without a .gz after it."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def refuse(error):
    """For os.walk, which would leave out what it cannot list."""
    raise ShardError(f"{error.filename} cannot be read ({error.strerror}); mend it or leave it out") from error


def list_inputs(inputs):
    """The files to read, in order: those named, and those of a readable kind below the folders named, sorted."""
    paths = []
    for given in inputs:
        if not os.path.isdir(given):
            paths.append(given)
            continue
        found = [Path(folder, name) for folder, _, names in os.walk(given, onerror=refuse) for name in names]
        paths += sorted(path for path in found if kind_of(path) in READERS)
    for path in paths:
        if not os.path.isfile(path):
            raise ShardError(f"{path} is no file that can be found; check the name")
        if kind_of(path) not in READERS:
            raise ShardError(f"{path} is of no kind that can be read; name {', '.join(READERS)} files or their folders")
        if kind_of(path) == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ShardError(f"{path} needs pyarrow, which is not installed; pip install pyarrow")
    if not paths:
        raise ShardError(f"there is no {', '.join(READERS)} file in {' '.join(map(str, inputs))}; name another folder")
    return paths


def read_txt(file, path, field):
    """Yield the only record of a file in parts that can be encoded one by one."""
    data = file.read(BLOCK_BYTES)
    while more := file.read(BLOCK_BYTES):
        data += more
        end = DIVIDE.match(data).end()
        yield [data[:end]]
        data = data[end:]
    yield [data]


def read_jsonl(file, path, field):
    """Yield lists of lines, each of about BLOCK_BYTES together."""
    while lines := file.readlines(BLOCK_BYTES):
        yield lines


def read_parquet(file, path, field):
    """Yield lists of the texts of the column `field`. Raises ShardError."""
    import pyarrow
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise ShardError(f"{path} has no column {field!r}; name one of {', '.join(table.schema_arrow.names)} "
                             f"with --field")
        for batch in table.iter_batches(PARQUET_ROWS, columns=[field]):
            yield [text or b"" for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist()]
    except pyarrow.ArrowNotImplementedError as error:
        raise ShardError(f"column {field!r} of {path} does not hold text; name another with --field") from error
    except pyarrow.ArrowException as error:
        raise ShardError(f"{path} is not a whole parquet file; fetch it again or remove it") from error


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_blocks(paths, field):
    """Yield all files as Blocks, in order. Raises ShardError where one cannot be read."""
    for path in paths:
        kind, first, position = kind_of(path), 1, 0
        try:
            with open(path, "rb") as raw:
                file = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
                if file.peek(3).startswith(codecs.BOM_UTF8):
                    file.seek(3)  # the mark that some editors put first is no text
                for index, records in enumerate(READERS[kind](file, path, field)):
                    opens = index == 0 or kind != ".txt"
                    yield Block(path, first, records, opens, raw.tell() - position)
                    first += records[0].count(b"\n") if kind == ".txt" else len(records)
                    position = raw.tell()
        except (OSError, EOFError, zlib.error) as error:  # the latter two from a cut or damaged .gz
            raise ShardError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); "
                             f"mend it or leave it out") from error


# ---- workers

def work(connection, inherited, field, tokenizer):
    """A worker's life: blocks in, encode_block's results or a ShardError out, until the other end is closed."""
    for other in inherited:  # or else a worker would never see the end of a first process that was killed
        other.close()
    try:
        while True:
            block = connection.recv()
            try:
                connection.send(encode_block(block, field, tokenizer))
            except ShardError as error:
                connection.send(error)
    except (EOFError, OSError):  # the latter when it is closed within a message
        pass


@contextmanager
def workers(num_processes, field, tokenizer):
    """Connections to so many new workers, which end with the context. Raises ShardError if they cannot be started."""
    context = multiprocessing.get_context("fork")  # a copy of the tokenizer without loading it again
    processes, connections = [], []
    # Ctrl-C reaches every process of the terminal. Workers inherit the mask; the first process ends them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            for _ in range(num_processes):
                ours, theirs = context.Pipe()
                connections.append(ours)
                args = (theirs, connections, field, tokenizer)
                processes.append(context.Process(target=work, args=args, daemon=True))
                processes[-1].start()
                theirs.close()
        except OSError as error:
            raise ShardError(f"cannot start {num_processes} processes ({error.strerror}); ask for fewer") from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield connections
    finally:
        for process in processes:
            if process.pid:
                process.terminate()
                process.join()


def collect(connection, block):
    """What a worker made of the block that it got. Raises ShardError, the worker's own or because it is gone."""
    try:
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise ShardError(f"the worker that encoded {block.path} from line {block.first:,} on was ended, perhaps for "
                         f"want of memory; use fewer --processes") from error
    if isinstance(result, ShardError):
        raise result
    return result


def encode_all(blocks, connections):
    """Yield encode_block's results in the order of the blocks. A worker holds one block at a time: memory is bounded,
    and a worker to which something is sent has nothing else to do than to receive it."""
    busy = deque()
    for connection, block in zip(cycle(connections), blocks):
        result = collect(*busy.popleft()) if len(busy) == len(connections) else None
        with suppress(ConnectionError):  # a dead worker is reported when its result is due
            connection.send(block)
        busy.append((connection, block))
        if result:
            yield result
    for connection, block in busy:
        yield collect(connection, block)


def count(results, totals, bar):
    """Yield the ids of the results; `totals` gathers their counts, `bar` shows the bytes read for them."""
    for ids, counts in results:
        totals.update(counts)
        bar.update(counts["bytes"])
        yield ids


# ---- ids to shards

class Stream:
    """A stream of ids, in pieces (uint16 arrays), from which one shard after another is cut."""
    def __init__(self, pieces, doc_id):
        self.pieces, self.doc_id, self.rest = pieces, doc_id, np.empty(0, np.uint16)

    def has_more(self):
        while not self.rest.size:
            piece = next(self.pieces, None)
            if piece is None:
                return False
            self.rest = piece
        return True

    def cut(self, num_tokens):
        """Yield the next `num_tokens` ids, fewer at the end. A document that the last cut divided gets a second
        opening id: what is left of it is a document, too."""
        if self.has_more() and self.rest[0] != self.doc_id:
            yield np.array([self.doc_id], np.uint16)
            num_tokens -= 1
        while num_tokens and self.has_more():
            piece, self.rest = self.rest[:num_tokens], self.rest[num_tokens:]
            num_tokens -= piece.size
            yield piece


def choose_val_tokens(pieces):
    """(validation tokens, all pieces again): a VAL_SHARE-th of all tokens, at most VAL_TOKENS.

    Holds the pieces only until the maximum is certain (VAL_SHARE * VAL_TOKENS tokens, 210 MB), so that no text is
    encoded twice. Raises ShardError if there is too little for a shard.
    """
    held, num_tokens = [], 0
    for piece in pieces:
        held.append(piece)
        num_tokens += piece.size
        if num_tokens >= VAL_SHARE * VAL_TOKENS:
            break
    if num_tokens < VAL_SHARE * MIN_TOKENS:
        raise ShardError(f"the input makes {num_tokens} tokens; give it at least {VAL_SHARE * MIN_TOKENS}")
    return min(num_tokens // VAL_SHARE, VAL_TOKENS), chain(held, pieces)


def write_set(folder, prefix, pieces, tokenizer, val_tokens, shard_tokens):
    """Write a validation shard and as many training shards as it takes. Returns the tokens of each, {path: number}."""
    if val_tokens is None:
        val_tokens, pieces = choose_val_tokens(pieces)
    stream, sizes = Stream(pieces, tokenizer.doc_id), {}
    while not sizes or stream.has_more():
        split, size = ("train", shard_tokens) if sizes else ("val", val_tokens)
        path = folder / f"{prefix}_{split}_{len(sizes):06d}.bin"
        sizes[path], _ = write_shard(path, stream.cut(size), tokenizer.doc_id + 1, tokenizer.doc_id)
    if len(sizes) == 1:
        raise ShardError(f"validation takes all of the {sum(sizes.values()):,} tokens; "
                         f"lower --val-tokens or give more text")
    return sizes


def prefix_for(folder):
    """The folder's name, made fit for files: the trainer takes what is before the first "_train_" for the prefix."""
    return re.sub(r"[\W_]+", "-", os.path.basename(os.path.abspath(folder))).strip("-") or "text"


def refuse_other_shards(folder):
    """Raise ShardError if the folder holds a shard: the trainer would mix the sets up."""
    for path in sorted([*folder.glob("*_train_*.bin"), *folder.glob("*_val_*.bin")]):
        raise ShardError(f"{folder} already holds {path.name}; remove its shards or name another folder")


def make_own_text(inputs, folder, field, wanted, shard_tokens, val_tokens, num_processes):
    """Write PREFIX_val_000000.bin, PREFIX_train_000001.bin ... of the inputs' text into `folder`, PREFIX its name.

    The set appears in the folder when it is complete. Raises ShardError, or OSError where writing fails.
    """
    # Not above: the other commands get by with numpy.
    from tqdm import tqdm
    start = time.perf_counter()
    check_count("a training shard", shard_tokens)
    if val_tokens is not None:
        check_count("the validation shard", val_tokens)
    if num_processes < 1:
        raise ShardError(f"cannot work with {num_processes} processes; ask for 1 or more")
    paths = list_inputs(inputs)
    refuse_other_shards(folder)
    tokenizer, totals = choose_tokenizer(wanted), Counter()
    num_bytes = sum(path.stat().st_size for path in paths)
    print(f"{len(paths):,} files, {num_bytes / 1e6:,.1f} MB; tokenizer {tokenizer.name}: {tokenizer.why}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (workers(num_processes, field, tokenizer) as connections,
          TemporaryDirectory(dir=folder, prefix="unfinished-", suffix=".tmp") as temporary,
          tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar):
        pieces = count(encode_all(read_blocks(paths, field), connections), totals, bar)
        sizes = write_set(Path(temporary), prefix_for(folder), pieces, tokenizer, val_tokens, shard_tokens)
        refuse_other_shards(folder)  # that another run has put there in the meantime
        for path in reversed(sizes):  # validation last: before it, the trainer does not take the set for one
            os.replace(path, folder / path.name)
    report(folder, sizes, tokenizer, totals, time.perf_counter() - start)


def report(folder, sizes, tokenizer, totals, seconds):
    """Say on stdout what was made and how to train on it."""
    val, *train = [path.name for path in sizes]
    val_tokens, *train_tokens = sizes.values()
    num_tokens = val_tokens + sum(train_tokens)
    preset, note = {"bytes": ("tiny", ""), "gpt2": ("short", "  (or medium)")}[tokenizer.name]
    print(f"tokenizer:  {tokenizer.name}, vocabulary {tokenizer.doc_id + 1:,}; {tokenizer.why}")
    print(f"documents:  {totals['documents']:,}, and {totals['empty']:,} empty ones skipped")
    print(f"validation: {val_tokens:,} tokens in {folder / val}")
    print(f"training:   {sum(train_tokens):,} tokens in {len(train):,} shards, {folder / train[0]} to {train[-1]}")
    print(f"time:       {seconds:.1f} s, {num_tokens / seconds:,.0f} tokens/s")
    print(f"to train:   DATA_PATH={shlex.quote(str(folder.resolve()))} ./run.sh {preset}{note}")


# ---- the command

def run(args):
    """The command; Ctrl-C ends it with status 130."""
    try:
        make_own_text(args.inputs, args.folder, args.field, args.tokenizer, args.shard_tokens, args.val_tokens,
                      args.processes)
    except KeyboardInterrupt:
        print("shards.py: interrupted; nothing was made", file=sys.stderr)
        sys.exit(130)


def add_make(commands):
    """Add `make` to the subparsers of data/shards.py."""
    make = commands.add_parser("make", help="shards of your own .txt, .jsonl and .parquet files")
    make.set_defaults(run=run)
    make.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files, or folders to search for them")
    make.add_argument("--out", dest="folder", required=True, type=Path, help="folder for the shards, named after it")
    make.add_argument("--field", default="text", help="field or column that holds the text (%(default)s)")
    make.add_argument("--tokenizer", choices=["auto", "gpt2", "bytes"], default="auto",
                      help="auto: GPT-2's BPE if tiktoken has its vocabulary, else bytes (%(default)s)")
    make.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens a training shard (%(default)s)")
    make.add_argument("--val-tokens", type=int, help=f"validation tokens (a {VAL_SHARE}th, at most {VAL_TOKENS})")
    make.add_argument("--processes", type=int, default=os.cpu_count(), help="that encode (%(default)s)")
