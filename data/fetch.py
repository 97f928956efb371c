"""The published FineWeb shards, fetched into a folder: `python data/shards.py get`.

A file comes in under another name in FOLDER/.partial, is checked and then renamed, so a .bin file is always whole;
FOLDER/manifest.json keeps what was checked, so that nothing is checked twice. One process at a time works in a folder.
"""
import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shard_format import HEADER_INTS, PUBLISHED_DOC_ID, PUBLISHED_VOCAB_SIZE, Damage, ShardError, read_header

DATASET = "kjj0/fineweb10B-gpt2"
NUM_PUBLISHED = 103  # training shards
SHARD_TOKENS = 100_000_000
MIN_VAL_TOKENS = 10_485_760 + 1  # those that validate, and the last target
NUM_TRANSFERS, NUM_REQUESTS = 4, 8  # at once; untuned
PATIENCE_S = 20  # without a new byte, before a file is given up
FIRST_WAIT_S, MAX_WAIT_S = 1, 8  # between two attempts, doubled each time
COMPLETE_TRIES = 2  # of a file that comes whole and wrong
MAX_RESTARTS = 5  # of a transfer that breaks and cannot be continued
CHUNK_BYTES = 2**20  # at most this much of a cut transfer is sent again
MANIFEST, PARTIAL, LOCK = "manifest.json", ".partial", ".get.lock"
ROOT = Path(__file__).resolve().parent.parent


# ---- which files

def load_trainer():
    """The trainer as a module, for its presets. Raises ShardError where it cannot be imported."""
    sys.path.append(str(ROOT))
    try:
        import train_gpt_medium
    except ModuleNotFoundError as error:
        raise ShardError(f"{error.name} is not installed, which the trainer's presets need; "
                         f"install requirements.txt") from error
    except Exception as error:  # its constants are made to be edited
        raise ShardError(f"the trainer's presets cannot be read ({error}); mend train_gpt_medium.py") from error
    finally:
        sys.path.remove(str(ROOT))
    return train_gpt_medium


def count_shards(preset):
    """Training shards that the preset's schedule consumes. Raises ShardError as load_trainer does."""
    try:
        config = load_trainer().PRESETS[preset]
    except ShardError as error:
        raise ShardError(f"{error}, or name the number of training shards with --shards") from error
    return -(-config.num_iterations // ((SHARD_TOKENS - 1) // config.batch_tokens))


def shard_names(num_shards):
    """The validation shard's name and the training shards'. Raises ShardError for a number that is not published."""
    if not 1 <= num_shards <= NUM_PUBLISHED:
        raise ShardError(f"cannot get {num_shards} training shards; {DATASET} has 1 to {NUM_PUBLISHED}")
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{index:06d}.bin" for index in range(1, num_shards + 1)]


def check_published(path, name):
    """The tokens in the file at `path`. Raises Damage unless it can be the published shard of that name."""
    header = read_header(path)
    if (header.vocab_size, header.doc_id) != (PUBLISHED_VOCAB_SIZE, PUBLISHED_DOC_ID):
        raise Damage(f"its header names a vocabulary of {header.vocab_size:,} with document id {header.doc_id:,}")
    check_count(header.num_tokens, name)
    return header.num_tokens


def check_count(num_tokens, name):
    """Raise Damage unless the published shard of that name can hold so many tokens."""
    if "_val_" in name and num_tokens < MIN_VAL_TOKENS:
        raise Damage(f"it holds {num_tokens:,} tokens, and validation needs {MIN_VAL_TOKENS:,}")
    if "_train_" in name and num_tokens != SHARD_TOKENS:
        raise Damage(f"it holds {num_tokens:,} tokens instead of {SHARD_TOKENS:,}")


# ---- the manifest: {"files": {name: {"bytes", "tokens", "mtime_ns", "sha256", "hub_sha256"}}}

def read_manifest(folder):
    """{name: entry}; empty where the folder has no manifest, or one that cannot be read."""
    keys = {"bytes", "tokens", "mtime_ns", "sha256"}
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: entry for name, entry in files.items() if keys <= entry.keys()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{folder / MANIFEST} cannot be read; the files themselves are checked anew", file=sys.stderr)
        return {}


def write_manifest(folder, manifest):
    """Write {name: entry} atomically."""
    temporary = folder / f"{MANIFEST}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as file:
            json.dump({"dataset": DATASET, "files": dict(sorted(manifest.items()))}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def make_entry(path, num_tokens, sha256, hub_sha256):
    stat = path.stat()
    return {"bytes": stat.st_size, "tokens": num_tokens, "mtime_ns": stat.st_mtime_ns, "sha256": sha256,
            "hub_sha256": hub_sha256}


def is_unchanged(path, entry):
    """Whether the file still has the size and the time of change of its manifest entry (None: it has none)."""
    stat = path.stat()
    return entry is not None and (stat.st_size, stat.st_mtime_ns) == (entry["bytes"], entry["mtime_ns"])


def is_current(path, entry):
    """Whether the file needs no second look: unchanged since the manifest, and its header is right."""
    try:
        return is_unchanged(path, entry) and check_published(path, path.name) == entry["tokens"]
    except (FileNotFoundError, Damage):
        return False


# ---- several files at once

class Stopped(Exception):
    """Raised in a thread whose result is no longer wanted."""


class Progress:
    """The bytes done so far, counted by threads and shown by the main one, and the signal that ends them early."""
    def __init__(self, num_bytes=0):
        self.num_bytes, self.lock, self.stop = num_bytes, threading.Lock(), threading.Event()

    def add(self, num_bytes):
        if self.stop.is_set():
            raise Stopped
        with self.lock:
            self.num_bytes += num_bytes


def work_through(todo, done, work, stop):
    """A thread's life: put (work(item), None) or (None, exception) into `done` for each item that it gets."""
    with contextlib.suppress(queue.Empty):
        while not stop.is_set():
            item = todo.get_nowait()
            try:
                done.put((work(item), None))
            except BaseException as error:  # in_parallel raises it in the main thread
                done.put((None, error))


def in_parallel(work, items, num_threads, progress, bar=None, keep=None):
    """[work(item)], in order of completion; each is handed to `keep` at once, and the first exception is raised here.

    Daemon threads, not a pool: at exit Python would wait for a pool, and so for servers that do not answer.
    """
    todo, done, results = queue.SimpleQueue(), queue.SimpleQueue(), []
    for item in items:
        todo.put(item)
    threads = [threading.Thread(target=work_through, args=(todo, done, work, progress.stop), daemon=True)
               for _ in range(min(num_threads, len(items)))]
    try:
        for thread in threads:
            thread.start()
        while len(results) < len(items):
            with contextlib.suppress(queue.Empty):
                result, error = done.get(timeout=0.1)
                if error is not None:
                    raise error
                results.append(result)
                if keep is not None:
                    keep(result)
            if bar is not None:
                bar.update(progress.num_bytes - bar.n)
        return results
    except BaseException:
        progress.stop.set()
        deadline = time.monotonic() + 1  # most end with their next piece; the process need not wait for the others
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        raise


def hash_file(path, progress=None):
    """SHA-256 of a file, hexadecimal, read in pieces that `progress` counts."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(buffer[:num_bytes])
            if progress is not None:
                progress.add(num_bytes)
    return digest.hexdigest()


def open_bar(title, total, initial=0, **options):
    """A tqdm bar in bytes on stderr, shown on terminals only."""
    from tqdm import tqdm  # here, so that making shards needs numpy alone
    return tqdm(desc=title, total=total, initial=initial, unit="B", unit_scale=True, disable=None, **options)


# ---- the transfer

class Remote(NamedTuple):
    """A file as the server describes it; `part` is where it comes in."""
    name: str
    url: str
    num_bytes: int
    sha256: str | None
    part: Path


class PartialFile(io.FileIO):
    """The file that a transfer appends to: unbuffered, counted, and never longer than the whole."""
    def __init__(self, remote, progress):
        super().__init__(remote.part, "ab")
        self.remote, self.progress, self.num_restarts = remote, progress, 0

    def write(self, data):
        if self.tell() + len(data) > self.remote.num_bytes:  # a server that ignores ranges sends all anew
            self.restart()
            raise OSError("more came than was announced")
        rest = memoryview(data)
        while rest:
            self.progress.add(0)  # ends here if the whole ends
            try:
                num_bytes = super().write(rest)
            except OSError as error:
                raise ShardError(f"cannot write {self.name}: {error.strerror}; free some space or name a folder on "
                                 f"another disk, what came so far is kept") from error
            self.progress.add(num_bytes)
            rest = rest[num_bytes:]
        return len(data)

    def truncate(self, size=None):
        self.num_restarts += 1
        if self.num_restarts > MAX_RESTARTS:  # the library itself would go on without end
            raise OSError("it breaks off and cannot be continued")
        before, after = os.fstat(self.fileno()).st_size, super().truncate(size)
        self.progress.add(after - before)
        return after

    def restart(self):
        self.seek(0)
        self.truncate()


def load_hub():
    """huggingface_hub with settings for this use. Raises ShardError where it is not installed."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, file_download, utils  # noqa: F401  (loads the submodules)
    except ModuleNotFoundError as error:
        raise ShardError(f"{error.name} is not installed, which fetching needs; install requirements.txt") from error
    # Its own bars and warnings would break the one bar and the one sentence.
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    constants.HF_HUB_ENABLE_HF_TRANSFER = False  # its partial files have holes, and cannot be continued
    return huggingface_hub


def ask(name, hub, folder, endpoint, progress):
    """What the server says of a file, as Remote. Raises ShardError where it cannot be had or is the wrong size."""
    url = hub.hf_hub_url(DATASET, name, repo_type="dataset", endpoint=endpoint)
    timeout = hub.constants.HF_HUB_ETAG_TIMEOUT
    metadata = with_patience(partial(hub.get_hf_file_metadata, url, timeout=timeout), name, url, hub, folder, progress)
    try:
        check_count(((metadata.size or 0) - 4 * HEADER_INTS) // 2, name)
    except Damage as error:
        raise ShardError(f"cannot fetch {name}: by its size at {host(url)}, {error}; {by_hand(folder)}") from error
    etag = re.sub(r"\W", "", metadata.etag or "unknown")  # a file that changes there starts anew here
    sha256 = etag if re.fullmatch("[0-9a-f]{64}", etag) else None
    return Remote(name, url, metadata.size, sha256, folder / PARTIAL / f"{name}.{etag[:16]}.part")


def transfer(file, hub):
    """Append to the PartialFile what it lacks; raises what the library does, with what came before in the file.

    http_get, not hf_hub_download: that keeps partial files in some versions only, and has no bar for several files.
    """
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    hub.file_download.http_get(file.remote.url, file, resume_size=file.tell(), expected_size=file.remote.num_bytes,
                               headers=headers)


def with_patience(action, name, url, hub, folder, progress, measure=int):
    """action(), repeated after network errors until PATIENCE_S have passed in which measure(), in bytes, did not grow.

    Time and not attempts, as some versions of the library repeat by themselves. Raises ShardError when given up.
    """
    most, since, wait_s = measure(), time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return action()
        except (OSError, hub.errors.HTTPError) as error:
            if measure() > most:
                most, since, wait_s = measure(), time.monotonic(), FIRST_WAIT_S
            reason, is_final = explain(error, url, hub)
            if is_final or time.monotonic() - since >= PATIENCE_S:
                raise ShardError(f"cannot fetch {name}: {reason}; {by_hand(folder)}") from error
            if progress.stop.wait(wait_s):
                raise Stopped from error
            wait_s = min(2 * wait_s, MAX_WAIT_S)


def explain(error, url, hub):
    """(the reason as a clause, whether it is of no use to try again) of a network error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return "offline mode is switched on (HF_HUB_OFFLINE)", True
    if status in (401, 403):
        return f"{host(url)} refuses it (status {status}; a wrong HF_TOKEN can be the cause)", True
    if status is not None:
        reason = f"{host(url)} does not have it" if status == 404 else f"{host(url)} cannot serve it now"
        return f"{reason} (status {status})", 400 <= status < 500 and status not in (408, 416, 425, 429)
    if "Timeout" in type(error).__name__ or "timed out" in str(error):
        return f"{host(url)} did not answer in time", False
    return f"no connection to {host(url)}, or it broke ({root_cause(error)})", False


def root_cause(error):
    """The system's words for what went wrong, such as "Connection refused", or the last exception's own."""
    while error.__cause__ or error.__context__:
        if isinstance(error, OSError) and error.strerror:
            break
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:100] or type(error).__name__


def host(url):
    return url.split("/")[2]


def by_hand(folder):
    return f"try again later, or put the files of the Hugging Face dataset {DATASET} into {folder} by hand"


def fetch_shard(remote, hub, folder, manifest, progress):
    """(name, manifest entry) of one shard, fetched, checked and in its place. Raises ShardError where it cannot be."""
    for _ in range(COMPLETE_TRIES):
        with PartialFile(remote, progress) as file:
            with_patience(partial(transfer, file, hub), remote.name, remote.url, hub, folder, progress, file.tell)
            os.fsync(file.fileno())
            try:
                return remote.name, accept(remote, folder, manifest.get(remote.name))
            except Damage as error:
                damage = error
                file.restart()
    raise ShardError(f"cannot fetch {remote.name}: it came damaged {COMPLETE_TRIES} times, {damage}; {by_hand(folder)}")


def accept(remote, folder, old_entry):
    """The manifest entry of a file that came whole, after it got its final name. Raises Damage if it is wrong."""
    num_tokens, sha256 = check_published(remote.part, remote.name), hash_file(remote.part)
    wanted = remote.sha256 or (old_entry or {}).get("sha256", sha256)
    if sha256 != wanted:
        source = "the hub's" if remote.sha256 else f"{MANIFEST}'s"
        raise Damage(f"its SHA-256 begins with {sha256[:12]}, {source} with {wanted[:12]}")
    os.replace(remote.part, folder / remote.name)
    return make_entry(folder / remote.name, num_tokens, sha256, remote.sha256)


# ---- the command

@contextlib.contextmanager
def folder_lock(folder):
    """Wait until no other process fetches into the folder. The system drops a lock whose process ends in any way."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another download is at work in {folder}; waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recheck(path, old_entry, progress):
    """(name, manifest entry, None) of a file that the manifest does not vouch for, or (name, None, the damage)."""
    try:
        num_tokens, sha256 = check_published(path, path.name), hash_file(path, progress)
        if old_entry and old_entry["sha256"] != sha256:
            raise Damage(f"its SHA-256 begins with {sha256[:12]}, {MANIFEST}'s with {old_entry['sha256'][:12]}")
    except Damage as damage:
        return path.name, None, damage
    return path.name, make_entry(path, num_tokens, sha256, (old_entry or {}).get("hub_sha256")), None


def survey(folder, names, manifest):
    """The names of files to fetch; those that are there get their manifest entries, damaged ones are named."""
    doubtful = [folder / name for name in names
                if (folder / name).exists() and not is_current(folder / name, manifest.get(name))]
    progress = Progress()
    with open_bar("checking", sum(path.stat().st_size for path in doubtful), delay=1, leave=False) as bar:
        results = in_parallel(lambda path: recheck(path, manifest.get(path.name), progress), doubtful, 2, progress, bar)
    for name, entry, damage in sorted(results, key=lambda result: result[0]):
        if damage is None:
            manifest[name] = entry
        else:
            print(f"{folder / name} is damaged: {damage}; fetching it again", flush=True)
    if doubtful:
        write_manifest(folder, manifest)
    return [name for name in names if not is_current(folder / name, manifest.get(name))]


def sum_partial(folder, remotes):
    """Bytes that already came, after removal of those that a file changed at its source makes useless."""
    (folder / PARTIAL).mkdir(exist_ok=True)
    for remote in remotes:
        for path in (folder / PARTIAL).glob(f"{remote.name}.*.part"):
            if path != remote.part or path.stat().st_size > remote.num_bytes:
                path.unlink()
    return sum(remote.part.stat().st_size for remote in remotes if remote.part.exists())


def check_space(folder, num_bytes):
    """Raise ShardError unless the folder's disk has so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ShardError(f"{folder} needs {num_bytes:,} bytes more and its disk has {free:,} free; "
                         f"free some space or name a folder on another disk")


def keep_entry(folder, manifest, result):
    """Note a shard that arrived, on disk and for people."""
    from tqdm import tqdm
    name, entry = result
    manifest[name] = entry
    write_manifest(folder, manifest)
    tqdm.write(f"{folder / name}: {entry['tokens']:,} tokens, {entry['bytes'] / 1e6:.1f} MB")
    sys.stdout.flush()


def download(folder, names, manifest, endpoint):
    """Fetch the named shards and note them in the manifest. Raises ShardError at the first that cannot be had."""
    hub, progress = load_hub(), Progress()
    print(f"fetching {len(names)} files of {DATASET} into {folder}", flush=True)
    remotes = in_parallel(lambda name: ask(name, hub, folder, endpoint, progress), names, NUM_REQUESTS, progress)
    remotes.sort(key=lambda remote: names.index(remote.name))
    total, there = sum(remote.num_bytes for remote in remotes), sum_partial(folder, remotes)
    check_space(folder, total - there)
    progress = Progress(there)
    with open_bar(f"{len(names)} files", total, there) as bar:
        in_parallel(lambda remote: fetch_shard(remote, hub, folder, manifest, progress), remotes, NUM_TRANSFERS,
                    progress, bar, partial(keep_entry, folder, manifest))
    with contextlib.suppress(OSError):  # others' partial files may be in it
        (folder / PARTIAL).rmdir()


def fetch(folder, num_shards, endpoint=None):
    """Have the validation shard and `num_shards` training shards in `folder`; `endpoint` replaces the hub's address.

    Raises ShardError with what to do where they cannot be had, OSError where the folder cannot be written.
    """
    folder, names = Path(folder), shard_names(num_shards)
    manifest = read_manifest(folder)
    if not all(is_current(folder / name, manifest.get(name)) for name in names):
        if is_read_only_set(folder, names):
            print(f"{folder} cannot be written, so {MANIFEST} is left as it is; headers and sizes are right")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(folder):
                manifest = read_manifest(folder)
                if missing := survey(folder, names, manifest):
                    download(folder, missing, manifest, endpoint)
    num_bytes = sum((folder / name).stat().st_size for name in names)
    print(f"{folder} holds the validation shard and {num_shards} training shards, {num_bytes / 1e9:.1f} GB")


def is_read_only_set(folder, names):
    """Whether the shards, right by header and size, are in a folder that cannot be written, such as a shared disk."""
    if not folder.is_dir() or os.access(folder, os.W_OK):
        return False
    try:
        return all(check_published(folder / name, name) for name in names)
    except (FileNotFoundError, Damage):
        return False


def get(folder, preset="medium", num_shards=None, endpoint=None):
    """The command: as many shards as the preset needs, or `num_shards`. Ctrl-C ends it with one line and status 130."""
    try:
        fetch(folder, count_shards(preset) if num_shards is None else num_shards, endpoint)
    except KeyboardInterrupt:
        print(f"interrupted; what came is kept in {folder}, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def add_get(commands):
    """Register the command with the parser of shards.py."""
    parser = commands.add_parser("get", help="the published FineWeb shards, from the network",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(run=lambda args: get(args.folder, args.preset, args.shards))
    folder = os.environ.get("DATA_PATH") or ROOT / "data" / "fineweb10B"
    parser.add_argument("folder", nargs="?", type=Path, default=Path(folder), help="where; DATA_PATH names another")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--preset", choices=("medium", "short"), default="medium", help="as many as it trains on")
    number.add_argument("--shards", type=int, metavar="N", help=f"so many training shards, at most {NUM_PUBLISHED}")
