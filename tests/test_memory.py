"""The memory model: held against tensors that compiled code keeps, a real optimizer, and the count for an H100."""
import copy
import json
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import train_gpt_medium as tgm
from helpers import ALONE, CPU, ROOT, random_ids, small_config
from test_distributed import num_bytes, watch_a_step

sys.path.insert(0, str(ROOT / "data"))
import memory  # noqa: E402

RECORD, LAYER = tgm.Config(), tgm.Layer
PLANS = {  # every kind of layer; in the second, a skip's source whose sum with another skip is the next layer's input
    "attention or not": dict(layers=(LAYER(value_embed=0), LAYER(), LAYER(attention=False), LAYER(skip_from=1)),
                             backout_from=2),
    "source before a skip": dict(layers=(LAYER(), LAYER(value_embed=0), LAYER(value_embed=1), LAYER(skip_from=1),
                                         LAYER(skip_from=2)), backout_from=0)}


@torch.library.custom_op("test_memory::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps what FlexAttention does: its inputs, its output, and log-sum-exp."""
    return q.clone(), q.new_zeros(1, q.size(2), q.size(1), dtype=torch.float32)


@attention.register_fake
def _(q, k, v):
    return torch.empty_like(q), q.new_empty(1, q.size(2), q.size(1), dtype=torch.float32)


@torch.library.custom_op("test_memory::attention_grad", mutates_args=())
def attention_grad(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
                   log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@attention_grad.register_fake
def _(dy, q, k, v, y, log_sum):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention.register_autograd(lambda ctx, dy, _: attention_grad(dy, *ctx.saved_tensors),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def measure_saved(config: tgm.Config, whole: bool, monkeypatch) -> int:
    """Bytes that a forward pass keeps, each storage once, as partitioned for Inductor; not parameters and inputs."""
    monkeypatch.setattr(tgm, "attend", lambda q, k, v, *_: attention(q, k, v)[0])
    monkeypatch.setattr(tgm, "block_masks", lambda *_: (None, None))
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


@pytest.mark.parametrize("plan, num_heads, seq_len", [
    ("attention or not", 2, 256), ("attention or not", 4, 512), ("source before a skip", 2, 256)])
def test_saved_bytes_are_those_of_the_whole_compiled_model(plan, num_heads, seq_len, monkeypatch):
    """To the byte: the formula counts the very tensors."""
    config = small_config(num_heads=num_heads, seq_len=seq_len, **PLANS[plan])
    expected = memory.estimate(config, 1).saved - memory.mask_bytes(seq_len)  # no masks here
    assert measure_saved(config, True, monkeypatch) == expected


def test_blocks_that_compile_alone_save_no_more(monkeypatch):
    """They keep x00 and x01 and no fp32 copy of a row, nor the mixed input where there is no attention."""
    config = small_config(**PLANS["attention or not"], smear_mtp=False)
    expected = memory.estimate(config, 1).saved - memory.mask_bytes(config.seq_len)
    row = config.seq_len * config.model_dim * config.dtype.itemsize
    assert expected - row <= measure_saved(config, False, monkeypatch) <= expected


def test_saved_bytes_of_the_record_are_those_counted_for_an_h100():
    """That count includes inputs that are kept: the blocks' matrices, rotary's tables of T positions, int32 ids."""
    T, C = RECORD.seq_len, RECORD.model_dim
    inputs = 2 * C * C * (16 * 8 + 15 * 4) + 4 * RECORD.head_dim * T + 4 * T
    saved = memory.estimate(RECORD, 8).saved - memory.mask_bytes(T)
    counted = json.loads((ROOT / "records" / "bench" / "kernel_bytes.json").read_text())["fast"]["saved"]
    assert abs((saved + inputs) / 1e9 - counted) <= 0.05  # it is given to 0.1 GB


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
