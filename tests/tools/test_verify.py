"""data/verify.py: what it counts against a plain count, and real damage to real shards."""
import hashlib
import json
import os
import sys

import numpy as np
import pytest

import fetch
import helpers
import shards
import verify
from shard_format import ShardError, write_shard

BATCH = 524_288


def make_set(folder, prefix="own", sizes=(30_000, 50_000, 40_000), vocab_size=300, doc_id=299, seed=0):
    """A validation shard and training shards of random ids, written by the tool itself; {name: ids}."""
    rng, ids = np.random.default_rng(seed), {}
    for index, size in enumerate(sizes):
        name = f"{prefix}_{'train' if index else 'val'}_{index:06d}.bin"
        ids[name] = rng.integers(0, vocab_size, size).astype(np.uint16)
        write_shard(folder / name, ids[name], vocab_size, doc_id)
    return ids


def plain_count(ids, doc_id):
    """(documents, smallest, largest) by walking over the ids one by one."""
    lengths = []
    for token in ids.tolist():
        if token == doc_id:
            lengths.append(0)
        if lengths:
            lengths[-1] += 1
    return len(lengths), min(lengths, default=None), max(lengths, default=None)


def rows_of(folder):
    return {row["name"]: row for row in verify.examine(folder)["shards"]}


def run(capsys, *args):
    """(exit status or last sentence, stdout) of the command, which is silent on stderr: the bar is for terminals."""
    with pytest.raises(SystemExit) as caught:
        shards.main(["verify", *map(str, args)])
    said = capsys.readouterr()
    assert not said.err
    return caught.value.code, said.out


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


# ---- what it counts

def test_counts_are_those_of_a_plain_count(tmp_path):
    expected = make_set(tmp_path)
    for name, row in rows_of(tmp_path).items():
        ids = expected[name]
        assert (row["documents"], row["smallest"], row["largest"]) == plain_count(ids, 299)
        assert (row["tokens"], row["min_id"], row["max_id"]) == (ids.size, ids.min(), ids.max())
        assert (row["vocab_size"], row["doc_id"], row["problem"]) == (300, 299, None)
        assert row["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert row["sha256_from"] == "file"


@pytest.mark.parametrize("ids, expected", [
    ([9, 1, 2, 9, 3], (2, 2, 3)), ([1, 2, 9], (1, 1, 1)), ([1, 2, 3], (0, None, None)), ([9, 9, 9], (3, 1, 1)),
    ([5, 9, 1, 1, 9, 9, 7], (3, 1, 3))])
def test_documents(tmp_path, ids, expected):
    write_shard(tmp_path / "a_val_000000.bin", np.array(ids), 10, 9)
    row = rows_of(tmp_path)["a_val_000000.bin"]
    assert (row["documents"], row["smallest"], row["largest"]) == expected


def test_shards_with_a_published_header(tmp_path):
    helpers.write_shard(tmp_path / "fineweb_val_000000.bin", [50256, 0, 50255, 1], 0, 0)
    row = rows_of(tmp_path)["fineweb_val_000000.bin"]
    assert (row["vocab_size"], row["doc_id"], row["documents"]) == (50257, 50256, 1)
    assert (row["min_id"], row["max_id"], row["problem"]) == (0, 50256, None)


def test_shards_of_another_tokenizer_behind_a_published_header(tmp_path, capsys):
    """No id opens a document: the field is empty, so nothing else says whose ids these are."""
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        helpers.write_shard(tmp_path / name, range(1024), 0, 0)
    status, out = run(capsys, tmp_path)
    assert status == 1 and out.count("PROBLEM: fineweb_") == out.count(" holds no document id 50256") == 2


# ---- hashes and the manifest

def note(folder, names):
    fetch.write_manifest(folder, {name: {
        "bytes": (folder / name).stat().st_size, "mtime_ns": (folder / name).stat().st_mtime_ns,
        "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names})


def test_hashes_come_from_the_manifest_while_it_holds(tmp_path, monkeypatch):
    names = list(make_set(tmp_path))
    note(tmp_path, names)
    before = rows_of(tmp_path)
    assert {row["sha256_from"] for row in before.values()} == {"manifest"}
    monkeypatch.setattr(verify, "hashlib", None)  # a call raises
    assert rows_of(tmp_path) == before
    monkeypatch.undo()
    os.utime(tmp_path / names[0], ns=(1, 1))
    after = rows_of(tmp_path)
    assert after[names[0]]["sha256_from"] == "file" and after[names[0]]["problem"] is None
    assert [row["sha256"] for row in after.values()] == [row["sha256"] for row in before.values()]


def test_content_other_than_the_manifests_is_damage(tmp_path):
    names = list(make_set(tmp_path))
    note(tmp_path, names)
    flip(tmp_path / names[1], 5000)
    flip(tmp_path / names[1], 5002)
    (problem,) = verify.examine(tmp_path)["problems"]
    assert names[1] in problem and "SHA-256" in problem and "make it again" in problem


# ---- damage

@pytest.mark.parametrize("spoil, word", [
    (lambda path: os.truncate(path, 99_000), "should be"), (lambda path: os.truncate(path, 100), "header of 1,024"),
    (lambda path: flip(path, 0), "magic"), (lambda path: flip(path, 4), "version"),
    (lambda path: flip(path, 9), "promises"), (lambda path: flip(path, 19), "document id"),
    (lambda path: flip(path, 1024 + 2 * 777 + 1), "outside its vocabulary of 300")])  # 1,024 is added to an id
def test_damage_is_named_with_the_way_out(tmp_path, capsys, spoil, word):
    names = list(make_set(tmp_path))
    spoil(tmp_path / names[1])
    status, out = run(capsys, tmp_path)
    problems = [line for line in out.splitlines() if line.startswith("PROBLEM")]
    assert status == 1
    assert len(problems) == 1 and names[1] in problems[0] and word in problems[0] and "make it again" in problems[0]
    assert out.count("DAMAGED") == 1 and out.count(" ok ") == 2


def test_what_cannot_be_read_is_named(tmp_path):
    names = list(make_set(tmp_path))
    (tmp_path / names[1]).unlink()
    (tmp_path / names[1]).symlink_to("nowhere")
    (tmp_path / names[2]).unlink()
    (tmp_path / names[2]).mkdir()
    one, two = verify.examine(tmp_path)["problems"]
    assert names[1] in one and "No such file" in one and names[2] in two and "directory" in two
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ShardError, match="cannot read .*manifest.json"):
        verify.verify(tmp_path)


# ---- the set

def test_a_set_with_gaps_and_strangers(tmp_path):
    names = list(make_set(tmp_path, sizes=[1000] * 5))
    (tmp_path / "other.bin").write_bytes(b"not a shard by its name")
    assert verify.examine(tmp_path)["problems"] == []
    (tmp_path / names[0]).unlink()
    (tmp_path / names[2]).unlink()
    missing_val, missing_train = verify.examine(tmp_path)["problems"]
    assert names[0] in missing_val and missing_train.startswith(f"{names[2]} is missing, as are 0 more")
    make_set(tmp_path, prefix="b", sizes=[1000] * 2, vocab_size=400)
    problems = " ".join(verify.examine(tmp_path)["problems"])
    assert "b and own are mixed" in problems and "differ in their vocabularies, [(300, 299), (400, 299)]" in problems


def judge(folder):
    pytest.importorskip("torch")
    return verify.examine(folder)["presets"]


def test_presets_of_a_gpt2_set(tmp_path):
    sizes = [2**20 + 1] + [150 * BATCH + 1] * 2
    for index, size in enumerate(sizes):  # holes on disk, so that only the sizes are real
        path = tmp_path / f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"
        path.write_bytes(np.array([20240520, 1, size] + [0] * 253, "<i4").tobytes() + np.uint16(50256).tobytes())
        os.truncate(path, 1024 + 2 * size)
    verdicts = judge(tmp_path)
    assert sorted(verdicts) == ["baseline", "medium", "short"]
    assert verdicts["short"] == {"enough": True, "reason": "300 steps use 2 training shards"}
    assert not verdicts["medium"]["enough"] and "fineweb_train_000003.bin is missing" in verdicts["medium"]["reason"]
    flip(tmp_path / "fineweb_train_000002.bin", 2000)
    assert judge(tmp_path)["short"]["enough"]  # still a valid id, and nothing to compare with
    note(tmp_path, ["fineweb_train_000002.bin"])
    flip(tmp_path / "fineweb_train_000002.bin", 2002)
    verdict = judge(tmp_path)["short"]
    assert not verdict["enough"] and verdict["reason"] == "fineweb_train_000002.bin damaged"


def test_presets_of_byte_and_of_own_sets(tmp_path, capsys):
    for folder, vocab_size in (("bytes", 257), ("own", 300)):
        (tmp_path / folder).mkdir()
        make_set(tmp_path / folder, sizes=(2**14 + 1, 240 * 2 * 512 + 1), vocab_size=vocab_size, doc_id=vocab_size - 1)
    assert judge(tmp_path / "bytes") == {preset: {"enough": True, "reason": f"{steps} steps use 1 training shards"}
                                         for preset, steps in (("tiny", 64), ("small", 240))}
    assert judge(tmp_path / "own") == {}
    verify.print_report(verify.examine(tmp_path / "own"))
    assert "no preset of the trainer has this vocabulary" in capsys.readouterr().out


def test_without_torch_all_else_is_said(tmp_path, monkeypatch, capsys):
    make_set(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "train_gpt_medium", raising=False)
    status, out = run(capsys, tmp_path)
    assert status == 0 and "torch is not installed" in out and "own_train_000002.bin" in out


# ---- the command

def test_the_table(tmp_path, capsys):
    ids = make_set(tmp_path)["own_train_000001.bin"]
    status, out = run(capsys, tmp_path)
    assert status == 0 and "training: 90,000 tokens" in out
    documents, smallest, largest = plain_count(ids, 299)
    sha256 = hashlib.sha256((tmp_path / "own_train_000001.bin").read_bytes()).hexdigest()
    assert out.splitlines()[1].split()[1:] == [
        "ok", "50,000", str(documents), str(smallest), f"{largest:,}", "0-299", sha256[:12]]


def test_json(tmp_path, capsys):
    names = list(make_set(tmp_path))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    status, out = run(capsys, tmp_path, "--json")
    report = json.loads(out)
    assert status == 0 and report["problems"] == []
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
    assert sorted(row["name"] for row in report["shards"]) == sorted(names)
    assert report["train"]["tokens"] == 90_000 and report["val"]["shards"] == 1
    assert report["bytes"] == sum((tmp_path / name).stat().st_size for name in names)
    flip(tmp_path / names[0], 0)
    status, out = run(capsys, tmp_path, "--json")
    assert status == 1 and names[0] in json.loads(out)["problems"][0]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_no_shards(tmp_path, capsys, name):
    sentence, out = run(capsys, tmp_path / name)
    assert sentence.startswith(f"shards.py: {tmp_path / name} holds no shards") and "\n" not in sentence and not out
