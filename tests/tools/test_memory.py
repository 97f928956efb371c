"""The memory of a run, counted on meta tensors: held against real tensors, and against the count for an H100."""
import gc
import json

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

import memory
import train_gpt_medium as tgm
import train_gpt_mudd as mudd
from helpers import FEW_LAYERS, RECORDS, as_window, num_bytes, random_ids, run_ranks, small_config

RECORD, LAYER = tgm.Config(), tgm.Layer
KINDS = dict(layers=(LAYER(value_embed=0, long_window=True), LAYER(attention=False), LAYER(skip_from=0)),
             backout_from=1)
SCALARS = 2**10  # bytes of the small parameters and of losses, which may live a little longer


def measure_saved(config: tgm.Config, whole: bool, monkeypatch) -> int:
    """Bytes that a forward pass keeps, each storage once, as partitioned for Inductor; not parameters and inputs.

    With FlexAttention, as on a GPU: on a CPU it lacks a backward pass, which is not run here, and refuses to begin.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(tgm, "dense_mask", lambda mask: mask)
    torch._dynamo.reset()
    model = config.make_model()
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
        model(ids[:-1], ids[1:].long(), as_window(2))
    return sum(storage.nbytes() for storage in storages.values())


def watch_passes(config: tgm.Config) -> dict[str, int]:
    """On meta tensors: what the forward pass keeps, and what each pass has beyond parameters and inputs at its peak."""
    model = memory.compiled_model(config)

    def inputs(length: int) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype, device="meta")
                for shape, dtype in ((length, torch.int32), (length, torch.int64), ((), torch.int32))]

    training, validation = inputs(config.piece_len), inputs(config.val_piece_len)
    with memory.as_on_gpus(tgm), memory.Watch([*model.parameters(), *model.buffers(), *training, *validation]) as watch:
        held, peaks = watch.live, {}

        def end(name: str) -> None:
            gc.collect()  # what compiling left
            peaks[name], watch.peak = watch.peak - held, watch.live

        loss = model(*training)
        saved = watch.live - held - loss.nbytes
        end("forward")
        loss.backward()
        model.zero_grad()
        end("backward")
        with torch.no_grad():
            model(*validation)
        end("validation")
    return peaks | dict(saved=saved)


def test_saved_bytes_are_those_of_real_tensors(monkeypatch):
    """To the byte. A skip's source, layer 1, whose sum with another skip is the next layer's input: both are kept."""
    config = small_config(num_heads=4, mlp_factor=3, seq_len=512, smear_mtp=False, backout_from=0, layers=(
        LAYER(long_window=True), LAYER(value_embed=0), LAYER(skip_from=0), LAYER(skip_from=1)))
    assert watch_passes(config)["saved"] == measure_saved(config, False, monkeypatch)


def test_a_whole_compiled_model_saves_a_row_more(monkeypatch):
    """The backout layer's output in fp32 and, without attention, the mixed input, but neither x00 nor x01.

    Masks, made outside of parts that compile alone, have lists of their own for either window.
    """
    config = small_config(layers=FEW_LAYERS, backout_from=1)
    parts, whole = (measure_saved(config, whole, monkeypatch) for whole in (False, True))
    assert whole - parts + 4 * 4 * (config.seq_len // 128) ** 2 == config.seq_len * config.model_dim * 2


def test_passes_of_the_record_cover_what_was_counted_for_an_h100():
    """Figures in GB of torch 2.11 lowering the whole model for that GPU (README.md beside memory.py)."""
    T, C = RECORD.seq_len, RECORD.model_dim
    passes, row, val_row, head = watch_passes(RECORD), 2 * C * T, 2 * C * RECORD.val_seq_len, 2 * C * 50304
    # That count includes inputs that are kept: the blocks' matrices, rotary's tables of T positions, int32 ids; but not
    # the eight lists of two masks.
    inputs = 2 * C * C * (16 * 8 + 15 * 4) + 4 * RECORD.head_dim * T + 4 * T - 8 * 4 * (T // 128) ** 2
    counted = json.loads((RECORDS / "tools" / "bench" / "kernel_bytes.json").read_text())["fast"]["saved"]
    assert abs((passes["saved"] + row + inputs) / 1e9 - counted) <= 0.05  # it is given to 0.1 GB
    # The schedule of TorchInductor has the head's gradients, which are kept, and neither latents nor head.
    assert 0 <= passes["forward"] - passes["saved"] - row - 6.696e9 < head
    # Operations of a block count one by one, in fp32; it fuses them. In validation blocks that compile alone hold all
    # sixteen outputs, a whole model holds four.
    assert 0 <= passes["backward"] - passes["saved"] - 0.908e9 < 4 * row
    assert 0 <= passes["validation"] - 12 * val_row - 10.219e9 < 2 * val_row
    # Of a step on 8 GPUs, the forward pass takes most: the logits.
    with memory.META:
        model = RECORD.make_model()
        optimizer = tgm.Optimizer(model, RECORD, tgm.World(0, 8, memory.META))
    held = num_bytes([optimizer.state_dict(), [bank.buffer for bank in optimizer.banks.values()], [*model.buffers()]])
    held += 12 * T  # ids and targets
    assert abs(held + passes["forward"] - memory.count(RECORD, 8)) < SCALARS


def peak_of_a_step(world: tgm.World, config: tgm.Config) -> dict[str, int]:
    """Bytes that a step of the optimizer adds, and those of its states, on the world's device."""
    with world.device:
        model = config.make_model()
    optimizer = tgm.Optimizer(model, config, world)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    states = [x for bank in optimizer.state_dict().values() for x in bank.values()]
    with memory.Watch([*model.parameters(), *(p.grad for p in model.parameters()), *states]) as watch:
        held = watch.live
        optimizer.step(0)
    return dict(step=watch.peak - held, states=num_bytes(states))


@pytest.mark.parametrize("size", (1, 2))
def test_a_step_takes_what_it_takes_of_real_tensors(size, tmp_path):
    """Snoo's included, and between ranks."""
    config = small_config()
    with memory.as_on_gpus(tgm):
        counted = peak_of_a_step(tgm.World(0, size, memory.META), config)
    assert run_ranks(size, peak_of_a_step, config, folder=tmp_path) == [counted] * size


def test_a_second_piece_adds_the_means_and_a_third_nothing(monkeypatch):
    light = tgm.replace(RECORD, **KINDS, seq_len=4096, val_seq_len=4096, val_tokens=4096)
    peaks = []
    for pieces_run in (1, memory.PIECES_RUN, memory.PIECES_RUN + 1):
        monkeypatch.setattr(memory, "PIECES_RUN", pieces_run)
        peaks.append(memory.count(light, 1))
    means = 4 * sum(p.numel() for p in memory.compiled_model(light).parameters())
    assert abs(peaks[1] - peaks[0] - means) < SCALARS and abs(peaks[2] - peaks[1]) < SCALARS


def test_lengths_are_those_that_config_and_ranks_accept(monkeypatch):
    lengths = [128 << i for i in range(10)]
    assert [*memory.by_length(tgm.replace(RECORD, micro_seq_len=1024), 8)] == lengths  # 1024 is no limit
    ramp = tgm.replace(RECORD, stages=(tgm.Stage(until=0.5, num_slices=4), tgm.Stage(num_slices=8)))
    assert [*memory.by_length(ramp, 8)] == lengths[:-1]  # the first stage's batch is four slices
    monkeypatch.setattr(memory, "needed", lambda config, world_size: config.piece_len + world_size)
    for size, free, fitting in ((1, 2**40, 65536), (8, 1032, 1024), (8, 1031, 512), (1, 129, 128), (1, 128, None)):
        assert memory.largest_micro_seq_len(RECORD, size, free) == (fitting and (fitting, fitting + size))
    assert memory.largest_micro_seq_len(RECORD, 3, 2**40) is None


def test_another_recipe_is_counted_and_its_stages_have_pieces_of_their_own():
    layers = (*mudd.LAYERS[:5], mudd.Layer(skip_from=2), mudd.Layer(long_window=True, value_embed=4))
    config = tgm.replace(mudd.PRESETS["mudd_tiny"](), micro_seq_len=128, layers=layers, late_layer=4)
    assert memory.pieces(config) == [4, 8, 12, 16, 16, 16, 16, 16, 16]
    held = memory.checkpoint_bytes(config)
    assert 2 * held > memory.count(config, 1) > held
