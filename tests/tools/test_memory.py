"""The memory model: held against tensors that compiled code keeps, a real optimizer, and the count for an H100."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils._pytree import tree_leaves

import memory
import train_gpt_medium as tgm
from helpers import ALONE, CPU, RECORDS, Watch, num_bytes, random_ids, small_config, watch_a_step

RECORD, LAYER = tgm.Config(), tgm.Layer
KINDS = dict(layers=(LAYER(value_embed=0, long_window=True), LAYER(attention=False), LAYER(skip_from=0)),
             backout_from=1)
# A skip's source, layer 1, whose sum with another skip is the next layer's input: both are kept.
TWO_SKIPS = dict(layers=(LAYER(long_window=True), LAYER(value_embed=0), LAYER(skip_from=0), LAYER(skip_from=1)),
                 backout_from=0)


def measure_saved(config: tgm.Config, whole: bool, monkeypatch) -> int:
    """Bytes that a forward pass keeps, each storage once, as partitioned for Inductor; not parameters and inputs.

    With FlexAttention, as on a GPU: on a CPU it lacks a backward pass, which is not run here, and refuses to begin.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(tgm, "dense_mask", lambda mask: mask)
    torch._dynamo.reset()
    model = tgm.GPT(config)
    tgm.compile_model(model, whole, backend="aot_eager_decomp_partition")
    ids = random_ids(config.seq_len + 1, config)
    inputs = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), ids)}
    storages = {}  # holds them, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids[:-1], ids[1:].long(), tgm.as_window(2, CPU))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("plan, num_heads, seq_len", [(KINDS, 2, 256), (TWO_SKIPS, 4, 512)])
def test_saved_bytes_are_those_of_the_whole_compiled_model(plan, num_heads, seq_len, monkeypatch):
    """To the byte: the formula counts the very tensors."""
    config = small_config(num_heads=num_heads, seq_len=seq_len, **plan)
    assert measure_saved(config, True, monkeypatch) == memory.estimate(config, 1).saved


def test_blocks_that_compile_alone_save_no_more(monkeypatch):
    """They keep x00 and x01 in place of a fp32 row, and no mixed input where there is no attention.

    Masks, made outside of them, have lists of their own for either window.
    """
    config = small_config(**KINDS)
    saved = measure_saved(config, False, monkeypatch) - 4 * 4 * (config.seq_len // 128) ** 2
    row = config.seq_len * config.model_dim * config.dtype.itemsize
    assert memory.estimate(config, 1).saved - row <= saved <= memory.estimate(config, 1).saved


def test_saved_bytes_of_the_record_are_those_counted_for_an_h100():
    """That count includes inputs that are kept: the blocks' matrices, rotary's tables of T positions, int32 ids."""
    T, C = RECORD.seq_len, RECORD.model_dim
    inputs = 2 * C * C * (16 * 8 + 15 * 4) + 4 * RECORD.head_dim * T + 4 * T
    saved = memory.estimate(RECORD, 8).saved - memory.mask_bytes(T)
    counted = json.loads((RECORDS / "bench" / "kernel_bytes.json").read_text())["fast"]["saved"]
    assert abs((saved + inputs) / 1e9 - counted) <= 0.05  # it is given to 0.1 GB


def test_transients_of_the_record_cover_those_of_the_schedule_for_an_h100():
    """TorchInductor's own account of what lives when (data/README.md), whose figures in GB these are."""
    estimated, C = memory.estimate(RECORD, 8), RECORD.model_dim
    row, val_row, head = 2 * C * RECORD.seq_len, 2 * C * RECORD.val_seq_len, 2 * C * 50304
    # It has the head's two gradients, which are kept, and neither latents nor head, which lie there before.
    assert abs(estimated.head - row - 6.696e9) < head
    assert 0 <= estimated.backward - 0.908e9 < row
    # Compiled as a whole, only four of the sixteen outputs outlive the next block.
    assert 0 <= estimated.validation - 10.219e9 < 12 * val_row


@pytest.mark.parametrize("size", (1, 8))
def test_what_is_held_is_what_a_real_optimizer_holds(size):
    config = small_config()
    model = tgm.GPT(config)
    optimizer = tgm.Optimizer(model, config, tgm.World(0, size, CPU))
    estimated = memory.estimate(config, size)
    copies = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
              for x in tree_leaves(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
              if isinstance(x, Tensor)}
    assert estimated.copies == sum(copies.values())
    for bank in optimizer.adam_banks:
        bank.shard.grad = torch.ones_like(bank.shard)
    optimizer.adamw.step()
    optimizer.snoo.step([bank.shard for bank in optimizer.banks.values()])
    counters = 3 * 4  # AdamW's step of each shard
    assert estimated.states == num_bytes(optimizer.state_dict()) - counters
    assert estimated.parameters == sum(bank.buffer.nbytes for bank in optimizer.banks.values())
    assert estimated.gradients == num_bytes(list(model.parameters()))
    assert estimated.means == 4 * sum(p.numel() for p in model.parameters()) * (size == 1)  # eight pieces
    assert estimated.rotary == num_bytes(list(model.buffers()))


def test_an_eager_update_fits_what_is_estimated():
    """And all of it is used, but for less than one of the 16.5 bytes that a number of the MLP's takes."""
    config = small_config()
    update, mlp = memory.estimate(config, 1).update, 2 * 4 * config.model_dim ** 2 * len(config.layers)
    assert update - mlp < watch_a_step(ALONE, config)["step_bytes"] <= update


def test_averaging_pieces_takes_what_is_estimated():
    """train_step with gradients that are given: fp32 means, gradients in their own dtypes, one of them in fp32."""
    config = small_config()
    optimizer = tgm.Optimizer(tgm.GPT(config), config, ALONE)

    class Loss:
        def backward(self):
            for p in optimizer.params:
                p.grad = torch.ones_like(p)

        def detach(self):
            return torch.zeros(())

    class Model:
        config = optimizer.config

        def __call__(self, *_):
            return Loss()

    pieces = torch.zeros(3, config.piece_len, dtype=torch.int32)
    stand_in = SimpleNamespace(params=optimizer.params, step=lambda step: None)
    with Watch([*optimizer.params, pieces]) as watch:
        tgm.train_step(Model(), stand_in, pieces, pieces, 0)
    scalars = 4 + 3 * 4  # the window, and losses
    assert 0 <= watch.peak - memory.estimate(config, 1).phases["means"] <= scalars


def with_pieces_of(micro_seq_len: int) -> tgm.Config:
    return tgm.replace(RECORD, micro_seq_len=micro_seq_len)


def test_the_peak_is_the_largest_phase_and_not_their_sum():
    estimated = memory.estimate(RECORD, 8)
    phases = estimated.phases
    held = estimated.parameters + estimated.rotary + estimated.states + estimated.copies
    assert max(phases, key=phases.get) == "forward"  # the logits: 6.6 GB of bf16, once
    T, logits = RECORD.seq_len, 65536 * 50304 * 2
    assert estimated.peak == held + estimated.saved + logits + 2 * 1024 * (T + 50304)
    short = memory.estimate(with_pieces_of(2048), 1).phases  # what no length changes: fp32 means
    assert max(short, key=short.get) == "means" and short["means"] == memory.estimate(RECORD, 1).phases["means"]


def test_shorter_pieces_and_more_ranks_never_take_more():
    lengths = [RECORD.seq_len >> i for i in range(10)]
    for size in (1, 2, 4, 8):
        peaks = [memory.estimate(with_pieces_of(length), size).peak for length in lengths]
        assert all(short <= long for long, short in zip(peaks[size == 8:], peaks[1 + (size == 8):]))
        assert peaks[0] > 2 * peaks[-1]
    for length in lengths:
        one, eight = (memory.estimate(with_pieces_of(length), size) for size in (1, 8))
        assert eight.peak < one.peak and eight.states < one.states
        assert (one.means, eight.means) == (one.means, one.means if length < RECORD.seq_len else 0) and one.means
    wider = memory.estimate(tgm.replace(RECORD, num_heads=12), 8)
    assert wider.peak > memory.estimate(RECORD, 8).peak


@pytest.mark.parametrize("size", (1, 8))
def test_largest_micro_seq_len_at_its_limits(size):
    for length in (65536, 16384, 8192):
        needed = memory.estimate(with_pieces_of(length), size).needed(size)
        assert memory.largest_micro_seq_len(RECORD, size, needed) == length
        assert memory.largest_micro_seq_len(RECORD, size, needed - 1) == length // 2
        assert memory.largest_micro_seq_len(with_pieces_of(1024), size, needed) == length  # 1024 is no limit
    least = memory.estimate(with_pieces_of(128), size).needed(size)
    assert memory.largest_micro_seq_len(RECORD, size, least - 1) is None


def test_largest_micro_seq_len_is_one_that_config_and_ranks_accept():
    assert memory.largest_micro_seq_len(RECORD, 16, 2 ** 50) == 32768
    assert memory.largest_micro_seq_len(RECORD, 3, 2 ** 50) is None
    thirds = small_config(seq_len=1152, val_seq_len=1152, val_tokens=1152, val_loss_chunks=3)
    assert memory.largest_micro_seq_len(thirds, 24, 2 ** 50) == 384
    ninths = tgm.replace(thirds, val_loss_chunks=9)  # a validation pass of 384 or 128 tokens has no ninths
    assert [memory.largest_micro_seq_len(ninths, size, 2 ** 50) for size in (8, 24)] == [1152, None]
