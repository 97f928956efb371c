"""The loader: which tokens a rank sees, and what is refused before and during a run."""
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

import train_gpt_medium as tgm
from helpers import ALONE, CPU, small_config, write_shard, write_text_folder


def numbered_config(**changes) -> tgm.Config:
    """A batch of 8 slices of 128 tokens, with ids wide enough to number every token."""
    return small_config(**(dict(vocab_size=50257, doc_token=50256, seq_len=128, val_tokens=1024) | changes))


def write_numbered(folder, config, sizes) -> tgm.Config:
    """Training shards of the given sizes whose ids count up through all of them."""
    start = 0
    for i, size in enumerate(sizes, start=1):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", range(start, start + size), 0, 0)
        start += size
    write_shard(folder / "fineweb_val_000000.bin", range(config.val_tokens + 1), 0, 0)
    return dataclasses.replace(config, data_dir=str(folder))


def load(config, world=ALONE, steps=None):
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, world)
    try:
        return [next(loader) for _ in range(config.num_iterations if steps is None else steps)]
    finally:
        loader.close()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_slices_are_together_exactly_the_batch(tmp_path, size):
    config = write_numbered(tmp_path, numbered_config(num_iterations=3), [3 * 1024 + 1])
    by_rank = [load(config, tgm.World(rank, size, CPU)) for rank in range(size)]
    for step in range(3):
        inputs = torch.cat([batches[step][0] for batches in by_rank])
        targets = torch.cat([batches[step][1] for batches in by_rank])
        assert inputs.shape == (8, 128) and inputs.dtype == torch.int32 and targets.dtype == torch.int64
        assert inputs.flatten().tolist() == list(range(step * 1024, (step + 1) * 1024))
        assert torch.equal(targets, inputs.long() + 1)


def test_tails_are_dropped_and_shards_follow_each_other(tmp_path):
    sizes = [2 * 1024 + 1, 1024 + 1000, 3 * 1024]  # 2, 1 and, for want of a last target, 2 batches
    config = write_numbered(tmp_path, numbered_config(num_iterations=5), sizes)
    first = [int(inputs[0, 0]) for inputs, _ in load(config)]
    assert first == [0, 1024, sizes[0], sizes[0] + sizes[1], sizes[0] + sizes[1] + 1024]


def test_only_the_shards_that_the_schedule_needs_are_opened(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=2), [1025, 1025, 1025])
    (tmp_path / "fineweb_train_000003.bin").write_bytes(b"not needed, not read")
    assert [shard.path.name[-5] for shard in tgm.find_shards(config)[0]] == ["1", "2"]


def test_the_record_needs_thirty_shards(tmp_path):
    with pytest.raises(tgm.UserError, match="need 30 training shards"):
        tgm.find_shards(tgm.Config(data_dir=str(tmp_path)))
    shard = tgm.Shard(tmp_path, 100_000_000)
    assert shard.num_batches(tgm.Config().batch_tokens) == 190


def test_header_and_values_of_a_published_shard(tmp_path):
    config = numbered_config()
    path = write_shard(tmp_path / "fineweb_train_000001.bin", [50256, 1, 2, 50255], 0, 0)
    shard = tgm.open_shard(path, config)
    assert shard == tgm.Shard(path, 4)
    assert shard.read(3, 50257).tolist() == [50256, 1, 2] and shard.read(3, 50257).dtype == np.uint16


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
    "too few tokens": (lambda path: write_shard(path, [1] * 1024), "too short"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
@pytest.mark.parametrize("name", ["text_train_000002.bin", "text_val_000000.bin"])
def test_a_bad_shard_is_refused_by_name(tmp_path, fault, name):
    config = small_config(seq_len=128, num_iterations=2, data_dir=str(tmp_path))
    for path in ("text_train_000001.bin", "text_train_000002.bin"):
        write_shard(tmp_path / path, [1] * 1025)
    write_shard(tmp_path / "text_val_000000.bin", [1] * 2049)
    tgm.find_shards(config)
    spoil, sentence = BAD_SHARDS[fault]
    spoil(tmp_path / name)
    if name.startswith("text_val") and fault == "missing":
        sentence = "cannot be read"
    with pytest.raises(tgm.UserError) as caught:
        tgm.find_shards(config)
    assert name in str(caught.value) and sentence in str(caught.value) and "\n" not in str(caught.value)


def test_too_few_shards_says_how_many(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=9), [2049, 2049])
    with pytest.raises(tgm.UserError, match=r"fineweb_train_000003.bin is missing: 9 steps .* need 5 training shards"):
        tgm.find_shards(config)


def test_a_gap_in_the_numbering_is_named(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=3), [1025, 1025, 1025])
    (tmp_path / "fineweb_train_000002.bin").unlink()
    with pytest.raises(tgm.UserError, match="fineweb_train_000002.bin is missing"):
        tgm.find_shards(config)


def test_kinds_of_shards_are_not_mixed(tmp_path):
    config = write_text_folder(tmp_path, small_config())
    write_shard(tmp_path / "fineweb_train_000001.bin", range(10))
    with pytest.raises(tgm.UserError, match="mixes shards of fineweb and text"):
        tgm.find_shards(config)


def spoil_later(tmp_path, spoil):
    """A loader over two shards, the second of which was spoiled after the check at the start."""
    config = write_numbered(tmp_path, numbered_config(num_iterations=40, vocab_size=50257), [20 * 1024 + 1] * 2)
    shards, _ = tgm.find_shards(config)
    spoil(tmp_path / "fineweb_train_000002.bin")
    return tgm.TrainLoader(shards, config, ALONE)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:5000])])
def test_an_error_in_the_background_reaches_the_main_thread_at_once(tmp_path, spoil):
    loader = spoil_later(tmp_path, spoil)
    with pytest.raises(tgm.UserError, match="fineweb_train_000002"):
        for _ in range(19):  # well before the second shard's turn
            next(loader)
            time.sleep(0.05)
    loader.close()


def test_validation_needs_its_last_target(tmp_path):
    config = write_text_folder(tmp_path, small_config())
    write_shard(tmp_path / "text_val_000000.bin", [1] * config.val_tokens)
    with pytest.raises(tgm.UserError, match="too short"):
        tgm.find_shards(config)


def test_the_next_batch_is_made_on_another_thread(tmp_path, monkeypatch):
    makers = []
    batches = tgm.TrainLoader._batches

    def watched(*arguments):
        for batch in batches(*arguments):
            makers.append(threading.current_thread())
            yield batch

    monkeypatch.setattr(tgm.TrainLoader, "_batches", watched)
    config = write_numbered(tmp_path, numbered_config(num_iterations=3), [3 * 1024 + 1])
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, ALONE)
    next(loader)
    loader.pending.result()
    assert len(makers) == 2 and threading.main_thread() not in makers  # the second without being asked for
    loader.close()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    config = small_config(seq_len=128, num_iterations=1)
    config = write_text_folder(tmp_path, config)
    write_shard(tmp_path / "text_train_000001.bin", [1] * 1024 + [257])
    with pytest.raises(tgm.UserError, match="text_train_000001.bin holds id 257"):
        load(config)
    path = write_shard(tmp_path / "text_val_000000.bin", [1] * config.val_tokens + [300])
    with pytest.raises(tgm.UserError, match="text_val_000000.bin holds id 300"):
        tgm.evaluate(tgm.GPT(config), tgm.open_shard(path, config), 0, ALONE)


def test_running_out_of_shards_raises_instead_of_hanging(tmp_path):
    config = write_numbered(tmp_path, numbered_config(num_iterations=2), [2049])
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, ALONE)
    next(loader), next(loader)
    with pytest.raises(tgm.UserError, match="needs more shards"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_validation_reads_exactly_the_first_tokens(tmp_path, size):
    config = write_numbered(tmp_path, numbered_config(num_iterations=1, val_tokens=4096, val_seq_len=1024), [1025])
    write_shard(tmp_path / "fineweb_val_000000.bin", range(5000), 0, 0)
    _, shard = tgm.find_shards(config)
    seen = []

    class Recorder:
        """Stands in for the model; the ranks of `size` are played one after the other."""
        def eval(self): pass
        def train(self): pass

        def __call__(self, ids, targets, window_blocks):
            assert torch.equal(targets, ids.long() + 1) and window_blocks.item() == tgm.num_window_blocks(1, config)
            seen.extend(ids.tolist())
            return torch.zeros(())

    recorder = Recorder()
    recorder.config = config
    tgm_all_reduce, tgm.dist.all_reduce = tgm.dist.all_reduce, lambda total: None
    try:
        for rank in range(size):
            tgm.evaluate(recorder, shard, 1, tgm.World(rank, size, CPU))
    finally:
        tgm.dist.all_reduce = tgm_all_reduce
    assert sorted(seen) == list(range(4096))
