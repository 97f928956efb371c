"""The published FineWeb shards, fetched into a folder: `python data/shards.py get`.

huggingface_hub transfers and resumes the files in FOLDER/.partial. Each is then checked and moved, so a .bin file is
always whole; its SHA-256 stands in FOLDER/SHA256SUMS, for `sha256sum -c`. One process at a time works in a folder.
"""
import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from generate import SHARD_TOKENS, VAL_TOKENS
from shard_format import PUBLISHED_DOC_ID, PUBLISHED_VOCAB_SIZE, Damage, ShardError, read_header

DATASET = "kjj0/fineweb10B-gpt2"
NUM_PUBLISHED = 103  # training shards
NUM_THREADS = 4  # files at once; untuned
MAX_TRIES = 5  # of a file whose transfer breaks
SUMS, PARTIAL, LOCK = "SHA256SUMS", ".partial", ".get.lock"
ROOT = Path(__file__).resolve().parent.parent


def count_shards(preset):
    """Training shards that the preset's schedule consumes. Raises ShardError where the trainer cannot tell."""
    sys.path.append(str(ROOT / "data" / "preflight"))
    try:
        import memory  # with torch, which most commands do without
        config = memory.load_script().PRESETS[preset]()
        if config.shard_prefix != "fineweb":
            raise ShardError("it does not train on FineWeb")
        return memory.machine_of(config).shards_needed(config, [])
    except Exception as error:  # constants are made to be edited
        raise ShardError(f"preset {preset} does not say how many shards it needs ({type(error).__name__}: {error}); "
                         f"name their number with --shards") from error


def shard_names(num_shards):
    """The validation shard's name and the training shards'. Raises ShardError for a number that is not published."""
    if not 1 <= num_shards <= NUM_PUBLISHED:
        raise ShardError(f"cannot get {num_shards} training shards; {DATASET} has 1 to {NUM_PUBLISHED}")
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{index:06d}.bin" for index in range(1, num_shards + 1)]


def check_published(path):
    """Raises Damage unless header and size can be those of the published shard of this name."""
    num_tokens, vocab_size, doc_id = read_header(path)
    if (vocab_size, doc_id) != (PUBLISHED_VOCAB_SIZE, PUBLISHED_DOC_ID):
        raise Damage(f"its header names a vocabulary of {vocab_size:,} with document id {doc_id:,}")
    if num_tokens != SHARD_TOKENS if "_train_" in path.name else num_tokens < VAL_TOKENS:
        raise Damage(f"it holds {num_tokens:,} tokens; training needs {SHARD_TOKENS:,}, validation {VAL_TOKENS:,}")


def find_missing(folder, names):
    """The names of files that are not there; damaged ones are named and count among them."""
    missing = []
    for name in names:
        try:
            check_published(folder / name)
        except FileNotFoundError:
            missing.append(name)
        except Damage as damage:
            print(f"{folder / name} is damaged: {damage}; fetching it again", flush=True)
            missing.append(name)
    return missing


def fetch_shard(hub, folder, endpoint, name):
    """Put a shard into its place and note its SHA-256. Raises Damage where it came otherwise than the hub has it."""
    file = dict(repo_id=DATASET, filename=name, repo_type="dataset", endpoint=endpoint)
    remote = hub.get_hf_file_metadata(hub.hf_hub_url(**file))
    for tries_left in reversed(range(MAX_TRIES)):
        try:
            part = Path(hub.hf_hub_download(local_dir=folder / PARTIAL, **file))
            break
        # Of a connection that was closed, the library takes some errors for final. The second is its own: it removes a
        # note that a full disk cut off, and then looks for what the note said.
        except (OSError, UnboundLocalError) as error:
            if not tries_left or getattr(error, "errno", None) is not None:  # the disk's
                raise
            time.sleep(1)
    try:
        check_published(part)
        sha256 = hashlib.sha256(part.read_bytes()).hexdigest()
        if len(remote.etag or "") == 64 and sha256 != remote.etag:
            raise Damage(f"its SHA-256 begins with {sha256[:12]} instead of {remote.etag[:12]}")
    except Damage as damage:
        part.unlink()  # so that the next call fetches it again
        raise Damage(f"{name} came damaged: {damage}") from damage
    with open(folder / SUMS, "a") as sums:
        sums.write(f"{sha256}  {name}\n")
    os.replace(part, folder / name)
    print(folder / name, flush=True)


def download(folder, names, endpoint):
    """Fetch the named shards. Raises ShardError at the first that cannot be had."""
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # before the import, which reads it: that way of transfer does not resume
    import huggingface_hub as hub
    print(f"fetching {len(names)} files of {DATASET} into {folder}; where this ends early, it resumes", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would wait for the threads, and so for the server
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(partial(fetch_shard, hub, folder, endpoint), names))
    except (Damage, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        while isinstance(error, OSError) and error.__cause__:  # the library's errors wrap what happened
            error = error.__cause__
        raise ShardError(f"cannot fetch from {endpoint or hub.constants.ENDPOINT}: {' '.join(str(error).split())}; try "
                         f"again later, without {folder / PARTIAL} if that does not help, or put the files of the "
                         f"Hugging Face dataset {DATASET} into {folder} by hand")
    shutil.rmtree(folder / PARTIAL)


def get(folder, num_shards, endpoint=None):
    """Have the validation shard and `num_shards` training shards in `folder`; `endpoint` replaces HF_ENDPOINT."""
    folder, names = Path(folder), shard_names(num_shards)
    if find_missing(folder, names):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process that fetches here is waited for
            if missing := find_missing(folder, names):
                download(folder, missing, endpoint)
    size_gb = sum((folder / name).stat().st_size for name in names) / 1e9
    print(f"{folder} holds the validation shard and {num_shards} training shards, {size_gb:.1f} GB")


def add_get(commands):
    """Register the command with the parser of shards.py."""
    parser = commands.add_parser("get", help="the published FineWeb shards, from the network",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(run=lambda args: get(
        args.folder, count_shards(args.preset) if args.shards is None else args.shards))
    folder = os.environ.get("DATA_PATH") or ROOT / "data" / "fineweb10B"
    parser.add_argument("folder", nargs="?", type=Path, default=Path(folder), help="where; DATA_PATH names another")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--preset", default="medium", help="as many as it trains on")
    number.add_argument("--shards", type=int, metavar="N", help=f"so many training shards, at most {NUM_PUBLISHED}")
