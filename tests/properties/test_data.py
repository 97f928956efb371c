"""The loader: which tokens a rank sees, and what is refused before and during a run."""
import threading

import numpy as np
import pytest
import torch

import audit
import train_gpt_medium as tgm
from helpers import ALONE, CPU, small_config, write_shard, write_text_folder


def numbered_config(**changes) -> tgm.Config:
    """A batch of 8 slices of 128 tokens, with ids wide enough to number every token."""
    return small_config(**(dict(vocab_size=50257, doc_token=50256, seq_len=128, val_tokens=1024,
                                stages=(tgm.Stage(num_slices=8),)) | changes))


def write_numbered(folder, config, sizes) -> tgm.Config:
    """Training shards of the given sizes whose ids count up through all of them."""
    start = 0
    for i, size in enumerate(sizes, start=1):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", range(start, start + size), 0, 0)
        start += size
    write_shard(folder / "fineweb_val_000000.bin", range(config.val_tokens + 1), 0, 0)
    return tgm.replace(config, data_dir=str(folder))


def load(config, world=ALONE, first_step=0):
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, world, first_step)
    try:
        return [next(loader) for _ in range(first_step, config.num_iterations)]
    finally:
        loader.close()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_share_a_growing_batch_and_may_begin_with_any(tmp_path, monkeypatch, seed, size):
    """No token is skipped but a shard's tail, none comes twice; shards before the first batch are not read."""
    rng = np.random.default_rng(seed)
    ends, slices = [*sorted(rng.choice(range(1, 8), 2, replace=False) / 8), 1.0], size * rng.permutation([1, 2, 3])
    stages = tuple(tgm.Stage(float(end), int(n)) for end, n in zip(ends, slices))
    sizes = [int(n) for n in rng.integers(3 * size * 128 + 1, 6 * size * 128, 8)]
    config = write_numbered(tmp_path, numbered_config(num_iterations=8, stages=stages), sizes)
    shards, _ = tgm.find_shards(config)
    assert tgm.shards_needed(config, shards) == len(shards)
    by_rank = [load(config, tgm.World(rank, size, CPU)) for rank in range(size)]
    position, used = 0, [0]
    for step in range(8):
        inputs, targets = (torch.cat([batches[step][i] for batches in by_rank]) for i in (0, 1))
        tokens, end = config.batch_tokens(step), sum(sizes[:used[-1] + 1])
        leaves = position + tokens >= end  # its last target would not be in this shard
        position, used = end if leaves else position, [*used, used[-1] + leaves]
        assert inputs.flatten().tolist() == list(range(position, position + tokens)), step
        assert torch.equal(targets, inputs.long() + 1) and inputs.dtype == torch.int32
        position += tokens
    assert used[-1] + 1 == len(shards)

    reads, read = [], tgm.Shard.read
    monkeypatch.setattr(tgm.Shard, "read", lambda shard, *rest: reads.append(shard) or read(shard, *rest))
    for first in range(8):
        reads.clear()
        resumed = load(config, tgm.World(size - 1, size, CPU), first)
        for batch, same in zip(resumed, by_rank[-1][first:], strict=True):
            assert all(map(torch.equal, batch, same))
        num_pieces = sum(config.pieces(config.stage(step))[0] for step in range(first, 8)) // size
        assert len(reads) == num_pieces and [*dict.fromkeys(reads)] == [shards[i] for i in sorted({*used[first + 1:]})]


def test_only_the_shards_that_the_schedule_needs_are_opened(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=2), [1025, 1025, 1025])
    (tmp_path / "fineweb_train_000003.bin").write_bytes(b"not needed, not read")
    assert [shard.path.name[-5] for shard in tgm.find_shards(config)[0]] == ["1", "2"]


BAD_SHARDS = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "not a version 1 token shard"),
    "header only in part": (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a version 1 token shard"),
    "magic": (lambda path: write_shard(path, range(2000), header={0: 20240521}), "not a version 1 token shard"),
    "version": (lambda path: write_shard(path, range(2000), header={1: 2}), "not a version 1 token shard"),
    "short file": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    "long file": (lambda path: path.write_bytes(path.read_bytes() + b"xy"), "is damaged"),
    "negative count": (lambda path: write_shard(path, range(2000), header={2: -5}), "is damaged"),
    "vocabulary": (lambda path: write_shard(path, range(2000), 50257, 50256), "vocabulary of 50257"),
    "document id": (lambda path: write_shard(path, range(2000), 257, 255), "document id 255"),
    "no last target": (lambda path: write_shard(path, [1] * (2048 if "val" in path.name else 1024)), "too short"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
@pytest.mark.parametrize("name", ["text_train_000002.bin", "text_val_000000.bin"])
def test_a_bad_shard_is_refused_by_name(tmp_path, fault, name):
    config = small_config(seq_len=128, num_slices=8, num_iterations=2, data_dir=str(tmp_path))
    for path in ("text_train_000001.bin", "text_train_000002.bin"):
        write_shard(tmp_path / path, [1] * 1025)
    write_shard(tmp_path / "text_val_000000.bin", [1] * 2049)
    tgm.find_shards(config)
    spoil, sentence = BAD_SHARDS[fault]
    spoil(tmp_path / name)
    if name.startswith("text_val"):
        sentence = {"missing": "cannot be read", "no last target": "too short for 2,049"}.get(fault, sentence)
    with pytest.raises(tgm.UserError) as caught:
        tgm.find_shards(config)
    assert name in str(caught.value) and sentence in str(caught.value) and "\n" not in str(caught.value)


def test_too_few_shards_says_how_many(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=9), [2049, 2049])
    with pytest.raises(tgm.UserError, match=r"fineweb_train_000003.bin is missing: 9 steps need 5 training shards"):
        tgm.find_shards(config)


def test_kinds_of_shards_are_not_mixed(tmp_path):
    config = write_text_folder(tmp_path, small_config())
    write_shard(tmp_path / "fineweb_train_000001.bin", range(10))
    with pytest.raises(tgm.UserError, match="mixes shards of fineweb and text"):
        tgm.find_shards(config)


@pytest.mark.parametrize("spoil, num_shards, sentence", [
    (lambda path: path.unlink(), 2, "fineweb_train_000002.bin is gone"),
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), 2, "fineweb_train_000002.bin ends after"),
    (lambda path: None, 1, "needs more shards")])
def test_an_error_in_the_background_is_raised_when_its_batch_is_due(tmp_path, spoil, num_shards, sentence):
    """The second shard was spoiled, or left out, after the check at the start."""
    config = write_numbered(tmp_path, numbered_config(num_iterations=4), [2 * 1024 + 1] * 2)
    shards, _ = tgm.find_shards(config)
    spoil(tmp_path / "fineweb_train_000002.bin")
    loader = tgm.TrainLoader(shards[:num_shards], config, ALONE)
    next(loader), next(loader)
    with pytest.raises(tgm.UserError, match=sentence):
        next(loader)
    loader.close()


def test_batches_are_read_ahead_on_another_thread(tmp_path, monkeypatch):
    threads, read = [], tgm.Shard.read
    monkeypatch.setattr(tgm.Shard, "read", lambda *rest: threads.append(threading.current_thread()) or read(*rest))
    config = write_numbered(tmp_path, numbered_config(num_iterations=3), [3 * 1024 + 1])
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, ALONE)
    loader.pool.submit(int).result()  # what was asked for before is done
    assert len(threads) > 1 and threading.main_thread() not in threads
    loader.close()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    config = write_text_folder(tmp_path, small_config(seq_len=128, num_slices=8, num_iterations=1))
    write_shard(tmp_path / "text_train_000001.bin", [1] * 1024 + [257])
    with pytest.raises(tgm.UserError, match="text_train_000001.bin holds id 257"):
        load(config)
    path = write_shard(tmp_path / "text_val_000000.bin", [1] * config.val_tokens + [300])
    with pytest.raises(tgm.UserError, match="text_val_000000.bin holds id 300"):
        tgm.evaluate(tgm.GPT(config), tgm.open_shard(path, config), 0, ALONE)


def test_validation_reads_exactly_the_first_tokens(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=1, val_tokens=4096, val_seq_len=1024), [1025])
    write_shard(tmp_path / "fineweb_val_000000.bin", range(5000), 0, 0)
    outcome = audit.check_validation(config, tgm.find_shards(config)[1], step=1)
    assert outcome.passed, outcome


@pytest.mark.parametrize("header, refused", [({}, True), ({3: 50257, 4: 50256}, False)])
def test_a_long_shard_of_another_tokenizer_is_refused(tmp_path, header, refused):
    """Its header leaves the document id open, and no token is one. A header that names it is believed."""
    path = write_shard(tmp_path / "fineweb_train_000001.bin", [], 0, 0, header={2: 2 ** 22 + 1} | header)
    with open(path, "ab") as file:
        np.ones(2 ** 22 + 1, "<u2").tofile(file)
    if refused:
        with pytest.raises(tgm.UserError, match="no document id 50256: another tokenizer"):
            tgm.open_shard(path, numbered_config())
    else:
        tgm.open_shard(path, numbered_config())
