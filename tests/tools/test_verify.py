"""data/verify.py: what it counts against a plain count, and real damage to real shards."""
import hashlib
import os

import numpy as np
import pytest

import fetch
import shards
import verify
from helpers import write_shard


def make_set(folder, sizes=(3_000, 5_000, 4_000)):
    """A validation shard and training shards of random ids; {name: ids}."""
    rng, found = np.random.default_rng(0), {}
    for index, size in enumerate(sizes):
        name = f"own_{'train' if index else 'val'}_{index:06d}.bin"
        found[name] = rng.integers(0, 300, size)
        write_shard(folder / name, found[name], 300, 299)
    return found


def plain_count(ids, doc_id):
    """(documents, smallest, largest) by walking over the ids one by one."""
    lengths = []
    for token in ids.tolist():
        if token == doc_id:
            lengths.append(0)
        if lengths:
            lengths[-1] += 1
    return len(lengths), min(lengths, default=None), max(lengths, default=None)


def run(capsys, folder):
    """(exit status or last sentence, lines) of the command."""
    status = 0
    try:
        shards.main(["verify", str(folder)])
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().out.splitlines()


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def test_a_line_a_shard_with_the_counts_of_a_plain_count(tmp_path, capsys):
    expected = make_set(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"not a shard by its name")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    status, lines = run(capsys, tmp_path)
    assert status == 0 and len(lines) == 4
    for name, ids in expected.items():
        documents, smallest, largest = plain_count(ids, 299)
        sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert (f"{name}: {ids.size:,} tokens, {documents} documents of {smallest:,} to {largest:,}, "
                f"ids 0-299 of 300, sha256 {sha256[:12]}") in lines
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ids, says", [
    ([9, 1, 2, 9, 3], "2 documents of 2 to 3,"), ([1, 2, 9], "1 documents of 1 to 1,"), ([1, 2, 3], "0 documents, "),
    ([5, 9, 1, 1, 9, 9, 7], "3 documents of 1 to 3,")])
def test_documents(tmp_path, ids, says):
    assert says in verify.inspect(write_shard(tmp_path / "a.bin", ids, 10, 9), None)


def test_headers_that_leave_the_vocabulary_open(tmp_path, capsys):
    """Zeros stand for GPT-2's; where no id opens a document, the ids are another tokenizer's."""
    path = write_shard(tmp_path / "fineweb_val_000000.bin", [50256, 0, 50255, 1], 0, 0)
    assert "1 documents of 4 to 4, ids 0-50256 of 50,257" in verify.inspect(path, None)
    write_shard(path, range(1024), 0, 0)
    status, lines = run(capsys, tmp_path)
    assert "damaged: fineweb_val" in status and "holds no document id 50,256: another tokenizer made it" in lines[0]


def test_content_other_than_what_was_fetched_is_damage(tmp_path, capsys):
    name, *_ = make_set(tmp_path)
    (tmp_path / fetch.SUMS).write_text(f"{fetch.hash_file(tmp_path / name)}  {name}\n")
    assert " as fetched" in run(capsys, tmp_path)[1][-2]
    flip(tmp_path / name, 5000)
    assert any(line.startswith(f"{name} is damaged: its SHA-256 begins with") for line in run(capsys, tmp_path)[1])


@pytest.mark.parametrize("spoil, word", [
    (lambda path: os.truncate(path, 9_900), "should be"), (lambda path: os.truncate(path, 100), "header of 1,024"),
    (lambda path: flip(path, 0), "magic"), (lambda path: flip(path, 4), "version"),
    (lambda path: flip(path, 9), "promises"), (lambda path: flip(path, 19), "document id"),
    (lambda path: flip(path, 1024 + 2 * 777 + 1), "outside its vocabulary of 300"),  # 1,024 is added to an id
    (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file")])
def test_damage_is_named_with_the_way_out(tmp_path, capsys, spoil, word):
    _, name, _ = make_set(tmp_path)
    spoil(tmp_path / name)
    status, lines = run(capsys, tmp_path)
    assert status == f"shards.py: damaged: {name}; remove and fetch (shards.py get) or make them again"
    line, = (line for line in lines if "damaged" in line)
    assert line.startswith(f"{name} is damaged: ") and word in line and len(lines) == 3


def test_no_shards(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        sentence, lines = run(capsys, folder)
        assert sentence.startswith(f"shards.py: {folder} holds no shards") and "\n" not in sentence and not lines
