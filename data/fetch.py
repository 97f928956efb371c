"""The published FineWeb shards, fetched into a folder: `python data/shards.py get`.

huggingface_hub transfers and resumes each file in a folder of its own, FOLDER/.partial/NAME. The file is then checked
and renamed, so a .bin file is always whole; FOLDER/manifest.json keeps what was checked, so that nothing is checked
twice. One process at a time works in a folder.
"""
import argparse
import fcntl
import hashlib
import json
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
MAX_TRIES = 5  # of a file whose transfer breaks or that comes damaged
HUB_SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ENABLE_HF_TRANSFER": "0"}
MANIFEST, PARTIAL, LOCK = "manifest.json", ".partial", ".get.lock"
ROOT = Path(__file__).resolve().parent.parent


# ---- which files

def load_trainer():
    """The trainer, or what TRAIN_SCRIPT names, as a module, for its presets. Raises ShardError if it cannot be."""
    sys.path.append(str(ROOT / "data" / "preflight"))
    try:
        from memory import load_script  # with torch, which most commands do without
        return load_script()
    except ModuleNotFoundError as error:
        raise ShardError(f"{error.name} is not installed, which presets need; install requirements.txt") from error
    except Exception as error:  # its constants are made to be edited
        name = Path(os.environ.get("TRAIN_SCRIPT") or "train_gpt_medium.py").name
        raise ShardError(f"the trainer's presets cannot be read ({error}); mend {name}") from error


def count_shards(preset):
    """Training shards that the preset's schedule consumes. Raises ShardError where the trainer cannot tell."""
    try:
        trainer = load_trainer()
        config = trainer.PRESETS[preset]()
        if config.shard_prefix != "fineweb":
            raise ShardError(f"preset {preset} does not train on FineWeb")
        return trainer.shards_needed(config, [])
    except KeyError as error:
        raise ShardError(f"{preset} is not a preset; choose one of {', '.join(trainer.PRESETS)}") from error
    except Exception as error:  # ShardError, or a refusal of constants that were edited
        raise ShardError(f"{str(error).rstrip('.')}, or name the number of training shards with --shards") from error


def shard_names(num_shards):
    """The validation shard's name and the training shards'. Raises ShardError for a number that is not published."""
    if not 1 <= num_shards <= NUM_PUBLISHED:
        raise ShardError(f"cannot get {num_shards} training shards; {DATASET} has 1 to {NUM_PUBLISHED}")
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{index:06d}.bin" for index in range(1, num_shards + 1)]


def check_published(path):
    """The tokens in the file at `path`. Raises Damage unless it can be the published shard of its name."""
    num_tokens, vocab_size, doc_id = read_header(path)
    if (vocab_size, doc_id) != (PUBLISHED_VOCAB_SIZE, PUBLISHED_DOC_ID):
        raise Damage(f"its header names a vocabulary of {vocab_size:,} with document id {doc_id:,}")
    if num_tokens != SHARD_TOKENS if "_train_" in path.name else num_tokens < VAL_TOKENS:
        raise Damage(f"it holds {num_tokens:,} tokens; training needs {SHARD_TOKENS:,}, validation {VAL_TOKENS:,}")
    return num_tokens


# ---- the manifest: {"files": {name: {"bytes", "tokens", "mtime_ns", "sha256"}}}

def read_manifest(folder):
    """{name: entry}; empty where the folder has no manifest, or one that cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: entry for name, entry in files.items() if {"bytes", "mtime_ns", "sha256"} <= entry.keys()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{folder / MANIFEST} cannot be read; the files themselves are checked again", file=sys.stderr)
        return {}


def write_manifest(folder, manifest):
    """Write {name: entry} atomically."""
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"dataset": DATASET, "files": dict(sorted(manifest.items()))}, indent=1))
    os.replace(temporary, folder / MANIFEST)


def is_unchanged(path, entry):
    """Whether the file still has the size and the time of change of its manifest entry (None: it has none)."""
    stat = path.stat()
    return entry is not None and (stat.st_size, stat.st_mtime_ns) == (entry["bytes"], entry["mtime_ns"])


def is_current(path, entry):
    """Whether the file needs no second look: it is as the manifest says, or where no manifest can be written."""
    try:
        return check_published(path) > 0 and (is_unchanged(path, entry) or not os.access(path.parent, os.W_OK))
    except (FileNotFoundError, Damage):
        return False


def examine(path, wanted):
    """The manifest entry of a shard, read as a whole. Raises Damage if it is wrong or its SHA-256 is not `wanted`."""
    num_tokens, stat = check_published(path), path.stat()
    with open(path, "rb") as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
        os.fsync(file.fileno())  # before a name says that it is whole
    if wanted and sha256 != wanted:
        raise Damage(f"its SHA-256 begins with {sha256[:12]} instead of {wanted[:12]}")
    return {"bytes": stat.st_size, "tokens": num_tokens, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


# ---- the transfer

def mend_settings():
    """The way out where a setting of the library will not do: a clause that names those that are set."""
    names = sorted(name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_")))
    names = [name for name in names if name not in HUB_SETTINGS]
    return f"correct or unset {', '.join(names)}" if names else "look at the token that it has stored"


def load_hub():
    """huggingface_hub, set for this use. Raises ShardError where it is not installed."""
    # Before the import, which reads them: these two ways of transfer do not resume.
    os.environ.update(HUB_SETTINGS)
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ModuleNotFoundError as error:
        raise ShardError(f"{error.name} is not installed, which fetching needs; install requirements.txt") from error
    except ValueError as error:  # it reads some of its settings as numbers
        raise ShardError(f"huggingface_hub cannot use its settings ({error}); {mend_settings()}") from error
    huggingface_hub.logging.set_verbosity_error()  # its warnings on what it tries again would hide the one sentence
    return huggingface_hub


def fetch_shard(hub, source, folder, name, known_sha256):
    """The manifest entry of a shard, once it is in its place; what breaks is resumed, what is damaged fetched again."""
    remote = hub.get_hf_file_metadata(hub.hf_hub_url(filename=name, **source),
                                      timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
    part, sha256 = folder / PARTIAL / name, remote.etag if len(remote.etag or "") == 64 else known_sha256
    for tries_left in reversed(range(MAX_TRIES)):
        if max((path.stat().st_size for path in part.rglob("*")), default=0) > (remote.size or 0):
            shutil.rmtree(part)  # a server that ignores ranges sent all again
        try:
            if not (part / name).exists():
                hub.hf_hub_download(filename=name, local_dir=part, **source)
            entry = examine(part / name, sha256)
            os.replace(part / name, folder / name)
            shutil.rmtree(part)
            return entry
        except Damage as damage:
            shutil.rmtree(part)
            if not tries_left:
                raise Damage(f"{name} came damaged {MAX_TRIES} times, {damage}")
        except OSError as error:  # HfHubHTTPError: a request that the library has repeated itself
            if isinstance(error, hub.errors.HfHubHTTPError) or not tries_left:
                raise
        time.sleep(1)


def download(folder, names, manifest, endpoint):
    """Fetch the named shards and note them in the manifest. Raises ShardError at the first that cannot be had."""
    print(f"fetching {len(names)} files of {DATASET} into {folder}", flush=True)
    hub, source = load_hub(), dict(repo_id=DATASET, repo_type="dataset", endpoint=endpoint)
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            known = [manifest[name]["sha256"] if name in manifest else None for name in names]
            entries = pool.map(partial(fetch_shard, hub, source, folder), names, known)
            for name, entry in zip(names, entries):
                manifest[name] = entry
                write_manifest(folder, manifest)
                hub.utils.tqdm.write(f"{folder / name}: {entry['tokens']:,} tokens, {entry['bytes'] / 1e6:.1f} MB")
                sys.stdout.flush()
    except UnicodeError as error:  # of a header, into which the token goes
        raise ShardError(f"huggingface_hub cannot use its settings ({error}); {mend_settings()}") from error
    except (Damage, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's
            raise
        while not isinstance(error, Damage) and (cause := error.__cause__ or error.__context__):
            error = cause  # the library's errors wrap what happened
        raise ShardError(f"cannot fetch from {endpoint or hub.constants.ENDPOINT}: {' '.join(str(error).split())}; try "
                         f"again later, or put the files of the Hugging Face dataset {DATASET} into {folder} by hand")
    shutil.rmtree(folder / PARTIAL)


# ---- the command

def survey(folder, names, manifest):
    """The names of files to fetch; others get the manifest entries that they lack, and damaged ones are named."""
    missing = [name for name in names if not is_current(folder / name, manifest.get(name))]
    for path in [folder / name for name in missing if (folder / name).exists()]:
        try:
            manifest[path.name] = examine(path, manifest.get(path.name, {}).get("sha256"))
            missing.remove(path.name)
            print(f"{path}: {manifest[path.name]['tokens']:,} tokens, checked", flush=True)
        except Damage as damage:
            print(f"{path} is damaged: {damage}; fetching it again", flush=True)
    write_manifest(folder, manifest)
    return missing


def get(folder, num_shards, endpoint=None):
    """Have the validation shard and `num_shards` training shards in `folder`; `endpoint` replaces HF_ENDPOINT."""
    folder, names = Path(folder), shard_names(num_shards)
    manifest = read_manifest(folder)
    if not all(is_current(folder / name, manifest.get(name)) for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "w") as lock:  # which the system drops when a process ends in any way
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another download is at work in {folder}; waiting for it to end", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            manifest = read_manifest(folder)
            if missing := survey(folder, names, manifest):
                download(folder, missing, manifest, endpoint)
    size_gb = sum((folder / name).stat().st_size for name in names) / 1e9
    print(f"{folder} holds the validation shard and {num_shards} training shards, {size_gb:.1f} GB")


def run_get(args):
    """The command: as many shards as the preset needs, or as were named."""
    def end(*_):  # Python itself would wait for the threads, and so for servers that do not answer
        os.write(2, f"\ninterrupted; what came is kept in {args.folder}, and the same command resumes\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    get(args.folder, count_shards(args.preset) if args.shards is None else args.shards)


def add_get(commands):
    """Register the command with the parser of shards.py."""
    parser = commands.add_parser("get", help="the published FineWeb shards, from the network",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(run=run_get)
    folder = os.environ.get("DATA_PATH") or ROOT / "data" / "fineweb10B"
    parser.add_argument("folder", nargs="?", type=Path, default=Path(folder), help="where; DATA_PATH names another")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--preset", default="medium", help="as many as it trains on")
    number.add_argument("--shards", type=int, metavar="N", help=f"so many training shards, at most {NUM_PUBLISHED}")
