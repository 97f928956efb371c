"""data/shards.py: the format as bytes on disk, what the tokens are, and what a user reads when it cannot be done."""
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import generate
import shard_format
import shards
from helpers import ROOT

TOOL = ROOT / "data" / "shards.py"

HEADER_BYTES = 1024


def read(path):
    """(header as 256 int, ids) of a shard, by the format's description alone."""
    data = Path(path).read_bytes()
    return struct.unpack("<256i", data[:HEADER_BYTES]), np.frombuffer(data[HEADER_BYTES:], "<u2")


def split(ids, doc_id):
    """The documents of a shard without their ids; whatever stands before the first one is an error."""
    starts = np.flatnonzero(ids == doc_id)
    assert starts[0] == 0
    return [document[1:] for document in np.split(ids, starts[1:])]


def run(*args):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, timeout=60)


def assert_one_sentence(result, *words):
    """Exit status 1 and a single line on stderr that holds all of `words`."""
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    for word in words:
        assert str(word) in result.stderr


# ---- the format

@pytest.mark.parametrize("in_pieces", [False, True])
def test_bytes_on_disk(tmp_path, in_pieces):
    ids = np.array([256, 1, 2, 256, 255, 0], np.int64)  # any integers go in, uint16 comes out
    pieces = iter([ids[:2], ids[2:2], ids[2:]]) if in_pieces else ids
    path = tmp_path / "a.bin"
    path.write_bytes(b"an older and longer file" * 100)
    assert shard_format.write_shard(path, pieces, 257, 256) == (6, 2)
    header = [20240520, 1, 6, 257, 256] + [0] * 251
    assert path.read_bytes() == struct.pack("<256i6H", *header, 256, 1, 2, 256, 255, 0)
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("ids, vocab_size, doc_id, words", [
    ([0, 1], 65537, 0, "65,537"),
    ([0, 1], 257, 257, "257"),
    ([0, 257], 257, 256, "ids 0 to 257"),
    ([-1, 5], 257, 256, "ids -1 to 5"),
    ([256], 257, 256, "1 tokens"),
])
def test_what_does_not_fit_is_refused(tmp_path, ids, vocab_size, doc_id, words):
    with pytest.raises(shard_format.ShardError, match=words):
        shard_format.write_shard(tmp_path / "a.bin", np.array(ids), vocab_size, doc_id)
    assert os.listdir(tmp_path) == []


def test_failure_in_the_middle_leaves_what_was_there(tmp_path):
    seen = []

    def pieces():
        yield np.zeros(100_000, np.uint16)
        seen.extend(os.listdir(tmp_path))
        raise KeyboardInterrupt

    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        shard_format.write_shard(tmp_path / "a.bin", pieces(), 257, 256)
    assert len(seen) == 2 and sorted(seen)[0] == "a.bin"  # it did stand half written, under another name
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


# ---- text

@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "deep" / "text"
    generate.make_text(folder)
    return folder


def test_text_is_the_documents_split_where_validation_has_a_tenth(text_folder):
    names = ["text_val_000000.bin", "text_train_000001.bin"]
    assert sorted(os.listdir(text_folder)) == sorted(names)
    found, sizes = [], []
    for header, ids in (read(text_folder / name) for name in names):
        assert header == (20240520, 1, ids.size, 257, 256) + (0,) * 251 and ids.max() == 256
        found.append([document.astype(np.uint8).tobytes() for document in split(ids, 256)])
        sizes.append(ids.size)
    val, train = found
    assert sizes[0] >= 65_537 and sizes[1] >= 1_000_000
    assert sum(sizes) // 10 <= sizes[0] <= sum(sizes) // 10 + 1 + max(map(len, val))
    assert [document.decode("utf-8") for document in val + train] == generate.text_documents()
    assert len(set(val + train)) == len(val + train)
    # Nor does a whole long paragraph of one document make up another document.
    assert not set(val) & {part for document in train for part in document.split(b"\n\n")}


# ---- synthetic

NUM_TOKENS = 3_000_000  # more than two pieces, and no whole number of them


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "synthetic"
    generate.make_synthetic(folder, 2, NUM_TOKENS, 70_001, seed=5)
    return folder


@pytest.fixture(scope="module")
def synthetic_ids(synthetic_folder):
    return read(synthetic_folder / "synthetic_train_000001.bin")[1]


def test_synthetic_counts_and_headers(synthetic_folder):
    sizes = {"synthetic_val_000000.bin": 70_001, "synthetic_train_000001.bin": NUM_TOKENS,
             "synthetic_train_000002.bin": NUM_TOKENS}
    assert sorted(os.listdir(synthetic_folder)) == sorted(sizes)
    for name, size in sizes.items():
        header, ids = read(synthetic_folder / name)
        assert header == (20240520, 1, size, 50257, 50256) + (0,) * 251
        assert ids.size == size and ids.max() == ids[0] == 50256


def test_shards_depend_on_seed_and_index_only(synthetic_ids, monkeypatch):
    monkeypatch.setattr(generate, "PIECE_TOKENS", 123_457)
    again, *others = (np.concatenate([*generate.synthetic_pieces(size, seed, index)]) for size, seed, index in (
        (NUM_TOKENS, 5, 1), (70_001, 5, 2), (70_001, 6, 1)))
    assert np.array_equal(again, synthetic_ids)
    assert not any(np.array_equal(other, again[:70_001]) for other in others)


def test_document_lengths(synthetic_ids):
    lengths = np.array([document.size for document in split(synthetic_ids, 50256)[:-1]])  # the last one is cut
    assert lengths.min() >= 32 and lengths.max() <= 130_000
    # A share of 0.99 lies below m with the lognormal's chance, the Pareto tail never (it starts at 6000), so the median
    # is at z = Phi^-1(0.5 / 0.99) = 0.01266: exp(ln 398 + 0.88 z) = 402.5. A sample median of n has the standard error
    # 1 / (2 f sqrt(n)); in log lengths f = 0.99 phi(z) / 0.88 = 0.4488, so 1.114 / sqrt(n). Truncation shifts it by
    # 0.5 at most. 4 sigma at n = 3,800 is 7 %.
    assert abs(np.log(np.median(lengths) + 0.5) - np.log(402.5)) < 4 * 1.114 / lengths.size**0.5 + 0.5 / 402.5


def test_defaults_carry_the_short_preset():
    args = shards.parse(["synthetic"])
    assert args.shards * ((args.tokens - 1) // 524_288) >= 300 > (args.shards - 1) * ((args.tokens - 1) // 524_288)
    assert args.val_tokens > 10_485_760
    assert args.folder == TOOL.parent / "synthetic" and shards.parse(["text"]).folder == TOOL.parent / "text"


# ---- what the user reads

@pytest.mark.parametrize("option, value, word", [
    ("--tokens", 1, "1 tokens"), ("--tokens", 2**31, "2,147,483,648"), ("--val-tokens", 0, "validation"),
    ("--shards", 0, "0 shards"), ("--seed", -1, "seed -1")])
def test_sizes_that_cannot_be(tmp_path, option, value, word):
    with pytest.raises(SystemExit, match=f"^shards.py: .*{word}.*ask for"):
        shards.main(["synthetic", str(tmp_path / "new"), option, str(value)])
    assert not (tmp_path / "new").exists()


def test_a_full_disk(tmp_path, mount):
    folder = mount(tmp_path / "disk", "size=512k")
    result = run("synthetic", folder, "--val-tokens", 1000, "--tokens", 1_000_000)
    assert_one_sentence(result, folder, "No space left", "free some space")
    assert os.listdir(folder) == ["synthetic_val_000000.bin"]  # what was whole before stays


def test_a_folder_that_cannot_be_written(tmp_path, mount):
    folder = mount(tmp_path / "disk", "size=512k,ro")
    assert_one_sentence(run("synthetic", folder / "new"), folder / "new", "name a folder that you can write to")
