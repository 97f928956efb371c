"""What is in a folder of shards, and whether it is whole: `python data/shards.py verify FOLDER`. It changes nothing."""
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fetch import is_unchanged, load_trainer, read_manifest
from shard_format import HEADER_INTS, PUBLISHED_DOC_ID, Damage, ShardError, read_header

NAME = re.compile(r"(.+)_(train|val)_(\d{6})\.bin")
ROW = "{:<{}}  {:<7}  {:>13}  {:>11}  {:>11}  {:>11}  {:>11}  {:<12}"


# ---- one shard

def scan(content, header):
    """A shard's documents, smallest and largest document, smallest and largest id, as a dict; content: its bytes.

    A document is counted in tokens from its opening id to the next one or the end; what stands before the first one
    ends a document of the shard before.
    """
    ids = np.frombuffer(content, "<u2", offset=4 * HEADER_INTS)
    starts = np.flatnonzero(ids == header.doc_id)
    lengths = np.diff(starts, append=ids.size).tolist()
    return {"documents": len(lengths), "smallest": min(lengths, default=None), "largest": max(lengths, default=None),
            "min_id": int(ids.min()), "max_id": int(ids.max())}


def inspect(path, entry):
    """All that is known of one shard as a dict; `problem` is None or the clause after "NAME is damaged: "."""
    row = dict.fromkeys(("name", "problem", "tokens", "vocab_size", "doc_id", "documents", "smallest", "largest",
                         "min_id", "max_id", "sha256", "sha256_from"))
    row["name"] = path.name
    try:
        header = read_header(path)
        content, known = path.read_bytes(), is_unchanged(path, entry)
        row.update(scan(content, header), tokens=header.num_tokens, vocab_size=header.vocab_size, doc_id=header.doc_id)
        row["sha256"] = entry["sha256"] if known else hashlib.sha256(content).hexdigest()
        row["sha256_from"] = "manifest" if known else "file"
        if row["max_id"] >= header.vocab_size:
            raise Damage(f"it holds id {row['max_id']:,}, outside its vocabulary of {header.vocab_size:,}")
        if entry and entry["sha256"] != row["sha256"]:
            raise Damage(f"its SHA-256 begins with {row['sha256'][:12]}, the manifest's with {entry['sha256'][:12]}")
    except Damage as damage:
        row["problem"] = str(damage)
    except OSError as error:
        row["problem"] = f"it cannot be read ({error.strerror})"
    return row


# ---- the set

def find_problems(rows):
    """Sentences, each with a way out, on all that is wrong with the shards and with the set that they make."""
    problems = [f"{row['name']} is damaged: {row['problem']}; fetch (shards.py get) or make it again"
                for row in rows if row["problem"]]
    # Of a header that leaves the id open, as published shards do, or names theirs: their documents are never so long.
    problems += [f"{row['name']} holds no document id {PUBLISHED_DOC_ID}: another tokenizer made it; use other shards, "
                 f"or make them again with its vocabulary" for row in rows
                 if row["documents"] == 0 and row["doc_id"] == PUBLISHED_DOC_ID]
    numbers = {}
    for row in rows:
        prefix, split, number = NAME.fullmatch(row["name"]).groups()
        numbers.setdefault(prefix, {"train": [], "val": []})[split].append(int(number))
    if len(numbers) > 1:
        problems.append(f"shards of {' and '.join(numbers)} are mixed; keep each kind in a folder of its own")
    if len(vocabularies(rows)) > 1:
        problems.append(f"the shards differ in their vocabularies, {vocabularies(rows)}; keep each kind apart")
    for prefix, splits in numbers.items():
        if 0 not in splits["val"]:
            problems.append(f"{prefix}_val_000000.bin is missing; fetch or make it")
        if missing := sorted({*range(1, max(splits["train"], default=1) + 1)} - {*splits["train"]}):
            problems.append(f"{prefix}_train_{missing[0]:06d}.bin is missing, as are {len(missing) - 1} more; "
                            f"fetch or make them")
    return problems


def vocabularies(rows):
    """Sorted pairs of vocabulary size and document id that the readable shards have."""
    return sorted({(row["vocab_size"], row["doc_id"]) for row in rows if row["vocab_size"]})


def judge_presets(folder, rows):
    """{preset: {"enough", "reason"}} of the presets with this vocabulary; a refusal's reason is the trainer's sentence.

    Raises ShardError where the trainer cannot be imported.
    """
    trainer, verdicts = load_trainer(), {}
    for name, make_config in trainer.PRESETS.items():
        try:
            config = replace(make_config(), data_dir=str(folder))
            if (config.vocab_size, config.doc_token) not in vocabularies(rows):
                continue
            train_shards, val_shard = trainer.find_shards(config)
            used = {shard.path.name for shard in (*train_shards, val_shard)}
            damaged = " ".join(row["name"] for row in rows if row["problem"] and row["name"] in used)
            reason = f"{config.num_iterations:,} steps use {len(train_shards)} training shards"
            verdicts[name] = {"enough": not damaged, "reason": f"{damaged} damaged" if damaged else reason}
        except trainer.UserError as error:
            verdicts[name] = {"enough": False, "reason": str(error)}
    return verdicts


# ---- the command

def examine(folder):
    """Everything about the folder's shards as a dict, ready for JSON. Raises ShardError where there are none."""
    from tqdm import tqdm  # here: other commands of shards.py get by with numpy
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*.bin") if NAME.fullmatch(path.name))
    if not paths:
        raise ShardError(f"{folder} holds no shards (such as PREFIX_train_000001.bin); get or make some, "
                         f"or name another folder")
    manifest = read_manifest(folder)
    total = sum(path.stat().st_size for path in paths if path.exists())  # a dangling link does not
    rows = [inspect(path, manifest.get(path.name))
            for path in tqdm(paths, "checking", delay=2, leave=False, disable=None)]
    report = {"folder": str(folder), "shards": rows, "problems": find_problems(rows),
              "bytes": total, "presets": None, "presets_unknown": None}
    for split in ("train", "val"):
        mine = [row for row in rows if f"_{split}_" in row["name"] and row["tokens"]]
        report[split] = {key: sum(row[key] for row in mine) for key in ("tokens", "documents")} | {"shards": len(mine)}
    try:
        report["presets"] = judge_presets(folder, rows)
    except ShardError as error:
        report["presets_unknown"] = str(error)
    return report


def print_report(report):
    """The report for people: a table, totals, presets, problems."""
    width = max(len(row["name"]) for row in report["shards"])
    print(ROW.format("shard", width, "state", "tokens", "documents", "smallest", "largest", "ids", "sha256"))
    for row in report["shards"]:
        counts = [f"{row[key]:,}" if row[key] is not None else "-"
                  for key in ("tokens", "documents", "smallest", "largest")]
        ids = "-" if row["min_id"] is None else f"{row['min_id']}-{row['max_id']}"
        state, sha256 = "DAMAGED" if row["problem"] else "ok", (row["sha256"] or "-")[:12]
        print(ROW.format(row["name"], width, state, *counts, ids, sha256))
    for split, title in (("train", "training"), ("val", "validation")):
        count = report[split]
        print(f"{title}: {count['tokens']:,} tokens, {count['documents']:,} documents, shards: {count['shards']}")
    from_manifest = sum(row["sha256_from"] == "manifest" for row in report["shards"])
    print(f"{report['bytes'] / 1e6:,.1f} MB; SHA-256: {from_manifest} from the manifest, the others computed")
    for name, verdict in (report["presets"] or {}).items():
        print(f"preset {name}: {'enough, ' if verdict['enough'] else 'not enough: '}{verdict['reason']}")
    if report["presets"] == {}:
        print("no preset of the trainer has this vocabulary")
    if report["presets_unknown"]:
        print(f"whether they suffice for a preset is unknown: {report['presets_unknown']}")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")


def verify(folder, as_json=False):
    """The command; exits with status 1 if anything is wrong with the shards, 0 otherwise."""
    try:
        report = examine(folder)
    except OSError as error:
        raise ShardError(f"cannot read {error.filename or folder}: {error.strerror}; name a folder that you can read") \
            from error
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    sys.exit(1 if report["problems"] else 0)


def add_verify(commands):
    """Register the command with the parser of shards.py."""
    parser = commands.add_parser("verify", help="what is in a folder of shards, and whether it is whole and enough")
    parser.set_defaults(run=lambda args: verify(args.folder, args.json))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="one object on stdout instead of the table")
