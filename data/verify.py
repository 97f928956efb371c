"""What is in a folder of shards, and whether it is whole: `python data/shards.py verify FOLDER`. It changes nothing."""
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fetch import CHUNK_BYTES, is_unchanged, load_trainer, open_bar, read_manifest
from shard_format import HEADER_INTS, PUBLISHED_DOC_ID, Damage, ShardError, read_header

NAME = re.compile(r"(.+)_(train|val)_(\d{6})\.bin")
BAR_DELAY_S = 2
MAX_NAME_WIDTH = 30  # keeps the table within 120 columns
ROW = "{:<{}}  {:<7}  {:>13}  {:>11}  {:>11}  {:>11}  {:>11}  {:<12}"


# ---- one shard

def scan(path, header, digest, bar):
    """One pass in pieces over a shard: a dict of its documents, smallest and largest document, smallest and largest id.

    A document is counted in tokens from its opening id to the next one or the end; what stands before the first one
    ends a document of the shard before. digest: a hash to be updated with the whole file, or None.
    """
    num_documents, lengths, low, high = 0, [], header.vocab_size, 0
    position, opened = 0, np.empty(0, np.int64)  # where the document in progress began
    with open(path, "rb") as file:
        piece = file.read(4 * HEADER_INTS)
        while piece:
            if digest:
                digest.update(piece)
            bar.update(len(piece))
            if piece := file.read(CHUNK_BYTES):
                ids = np.frombuffer(piece, "<u2")
                low, high = min(low, int(ids.min())), max(high, int(ids.max()))
                starts = np.concatenate((opened, np.flatnonzero(ids == header.doc_id) + position))
                num_documents += starts.size - opened.size
                position, opened = position + ids.size, starts[-1:]
                lengths += extremes(np.diff(starts))
    lengths += extremes(position - opened)
    return {"documents": num_documents, "smallest": min(lengths, default=None), "largest": max(lengths, default=None),
            "min_id": low, "max_id": high}


def extremes(lengths):
    """[smallest, largest] of an array, or nothing of an empty one."""
    return [int(lengths.min()), int(lengths.max())] if lengths.size else []


def inspect(path, entry, bar):
    """All that is known of one shard as a dict; `problem` is None or the clause after "NAME is damaged: "."""
    row = dict.fromkeys(("name", "problem", "tokens", "vocab_size", "doc_id", "documents", "smallest", "largest",
                         "min_id", "max_id", "sha256", "sha256_from"))
    row["name"] = path.name
    try:
        header = read_header(path)
        digest = None if is_unchanged(path, entry) else hashlib.sha256()
        row.update(header._asdict(), tokens=header.num_tokens, **scan(path, header, digest, bar))
        del row["num_tokens"]
        row["sha256"] = digest.hexdigest() if digest else entry["sha256"]
        row["sha256_from"] = "file" if digest else "manifest"
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
        if missing := find_gaps(splits["train"]):
            problems.append(f"training shards of {prefix} are missing: {missing}; fetch or make them")
    return problems


def vocabularies(rows):
    """Sorted pairs of vocabulary size and document id that the readable shards have."""
    return sorted({(row["vocab_size"], row["doc_id"]) for row in rows if row["vocab_size"]})


def find_gaps(numbers):
    """The numbers that a run of training shards from 1 to the largest (1 at least) lacks, such as "1-3, 7"."""
    gaps, expected = [], 1
    for number in sorted(numbers) or [2]:
        if number > expected:
            gaps.append(str(expected) if number == expected + 1 else f"{expected}-{number - 1}")
        expected = number + 1
    return ", ".join(gaps)


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
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*.bin") if NAME.fullmatch(path.name))
    if not paths:
        raise ShardError(f"{folder} holds no shards (such as PREFIX_train_000001.bin); get or make some, "
                         f"or name another folder")
    manifest = read_manifest(folder)
    total = sum(path.stat().st_size for path in paths if path.exists())  # a dangling link does not
    with open_bar("checking", total, delay=BAR_DELAY_S, leave=False) as bar:
        rows = [inspect(path, manifest.get(path.name), bar) for path in paths]
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
    """The report for people: a table of at most 120 columns, totals, presets, problems."""
    width = min(MAX_NAME_WIDTH, max(len(row["name"]) for row in report["shards"]))
    print(ROW.format("shard", width, "state", "tokens", "documents", "smallest", "largest", "ids", "sha256"))
    for row in report["shards"]:
        name = row["name"] if len(row["name"]) <= width else f"...{row['name'][3 - width:]}"
        counts = [f"{row[key]:,}" if row[key] is not None else "-"
                  for key in ("tokens", "documents", "smallest", "largest")]
        ids = "-" if row["min_id"] is None else f"{row['min_id']}-{row['max_id']}"
        print(ROW.format(name, width, "DAMAGED" if row["problem"] else "ok", *counts, ids, (row["sha256"] or "-")[:12]))
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
