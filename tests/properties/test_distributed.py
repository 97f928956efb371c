"""Real gloo processes: one optimizer path for 1, 2, 4 and 8 ranks, with equal results, and what it sends and holds."""
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import memory
import train_gpt_medium as tgm
from helpers import FEW_LAYERS, NUM_STEPS, assert_one_run, give_gradients, num_bytes, random_ids, run_ranks, \
    small_config, train_and_report, watch_a_step, write_shard, write_text_folder

SIZES = (1, 2, 4, 8)
ONE_STAGE = small_config(layers=FEW_LAYERS, backout_from=1, num_slices=8, seq_len=128, num_iterations=NUM_STEPS,
                         val_seq_len=256, val_tokens=1024)


class Late:
    """A collective on a stream of its own, as late as it can be: all of it happens while its work is waited for."""
    def __init__(self, collective, output: torch.Tensor, sent: torch.Tensor, async_op: bool):
        self.finish, self.sent, self.before = partial(collective, output, sent), sent, sent.clone()
        output.fill_(math.nan)
        sent.copy_(self.before)  # which is a part of the output, where shards are gathered

    def wait(self) -> None:
        assert torch.equal(self.sent, self.before), "written before it was sent"
        self.finish()


def steps_with_late_collectives(world: tgm.World, config: tgm.Config, late: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model = config.make_model()
    optimizer = tgm.Optimizer(model, config, world)
    collectives = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather_single")}
    with patch.multiple(dist, **{name: partial(Late, run) if late else run for name, run in collectives.items()}):
        for step in range(NUM_STEPS):
            give_gradients(model, world, step)
            optimizer.step(step)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def report(world: tgm.World, identical: tgm.Config, distinct: tgm.Config) -> dict:
    return dict(identical=train_and_report(world, identical), distinct=train_and_report(world, distinct),
                watched=watch_a_step(world, identical),
                late={late: steps_with_late_collectives(world, identical, late) for late in (False, True)})


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, list[dict]]:
    """What every rank of every world size reports."""
    folder = tmp_path_factory.mktemp("ranks")
    # A period of one slice: every slice of every batch is the same, its last target included.
    period = random_ids(128, ONE_STAGE, mean_doc=40)
    write_shard(folder / "identical" / "text_train_000001.bin", [*period.repeat(NUM_STEPS * 8), period[0]])
    write_shard(folder / "identical" / "text_val_000000.bin", random_ids(ONE_STAGE.val_tokens + 1, ONE_STAGE))
    identical = tgm.replace(ONE_STAGE, data_dir=str(folder / "identical"))
    growing = (tgm.Stage(until=0.5, num_slices=4), tgm.Stage(num_slices=8))
    distinct = write_text_folder(folder / "distinct", tgm.replace(  # as many slices as ranks, or fewer: of two pieces
        ONE_STAGE, dtype=torch.float32, stages=growing, seq_len=256, micro_seq_len=128, val_seq_len=512))
    return {size: run_ranks(size, report, identical, distinct, folder=folder / str(size)) for size in SIZES}


def test_identical_slices_give_bitwise_equal_parameters(reports):
    alone = reports[1][0]["identical"]
    for size in SIZES:
        for rank_report in reports[size]:
            ours = rank_report["identical"]
            assert [name for name, p in ours["params"].items() if not torch.equal(p, alone["params"][name])] == [], size
            assert ours["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_distinct_pieces_of_a_growing_batch_give_the_same_update(reports, size):
    assert_one_run([rank_report["distinct"] for rank_report in reports[size]], reports[1][0]["distinct"])


@pytest.mark.parametrize("size", SIZES[1:])
def test_nothing_that_a_collective_reads_or_writes_is_touched_before_its_wait(reports, size):
    """On a GPU collectives run on a stream of their own, whenever they get to it; gloo's are mostly done at once."""
    for rank_report in reports[size]:
        on_time, late = rank_report["late"][False], rank_report["late"][True]
        assert [name for name, p in late.items() if not torch.equal(p, on_time[name])] == []


@pytest.mark.parametrize("size", [*SIZES, 3])
@pytest.mark.parametrize("preset", tgm.PRESETS)
def test_banks_are_the_groups_parameters_of_one_unit(preset, size):
    """At the preset's full size; a rank holds the states of its shards alone."""
    config = tgm.PRESETS[preset]()
    optimizer = memory.optimizer_of(config, size)
    assert [group for group, *_ in optimizer.groups] == [*config.groups]
    banked = [p for bank in optimizer.banks.values() for p in bank.params]
    assert sorted(map(id, banked)) == sorted(map(id, optimizer.params))
    for group, _, banks in optimizer.groups:
        rule = group.rule
        for bank in banks:
            unit = tuple(bank.shard.shape[1:])
            assert {(p.dtype, tuple(p.shape[-rule.unit_dims:]) if rule.unit_dims else (128,)) for p in bank.params} == {
                (bank.buffer.dtype, unit)}
            assert bank.buffer.numel() == size * bank.shard.numel() == sum(map(torch.numel, bank.params)) + bank.padding
            assert 0 <= bank.padding < size * math.prod(unit)
            assert {x.numel() for x in bank.state.values()} <= {1, bank.shard.numel()}


@pytest.mark.parametrize("size", SIZES)
def test_a_step_sends_what_the_plan_says(reports, size):
    """Recorded at the process group: count, order, bytes; nothing on one rank; no more in a step with an outer one."""
    plan = [(operation, str(bank.buffer.dtype), bank.buffer.nbytes)
            for operation in ("alltoall_base_", "_allgather_base_") if size > 1
            for bank in memory.optimizer_of(ONE_STAGE, size).banks.values()]
    for rank_report in reports[size]:
        assert rank_report["watched"]["collectives"] == [plan] * NUM_STEPS
        assert rank_report["watched"]["padding_is_zero"]


@pytest.mark.parametrize("size", SIZES)
def test_a_step_takes_no_more_memory_than_it_must(reports, size):
    """Besides parameters, the gradients it is given, and states."""
    optimizer = memory.optimizer_of(ONE_STAGE, size)
    buffers = [bank.buffer for bank in optimizer.banks.values()]
    packed = sum(buffer.nbytes for buffer in buffers)
    received = packed if size > 1 else 0
    # Eager code averages one bank with 6 bytes a number: its fp32 copy and the sums of pairs. It updates this rank's
    # matrices of a group with 16.5: directions by bank and as a batch, 4; X, two products and their sum, 8; A and four
    # products, a quarter of X each, 2.5; the fp32 gradient of one of the two banks, 2.
    average = 6 * max(buffer.numel() for buffer in buffers) if size > 1 else 0
    update = 16.5 * max(sum(bank.shard.numel() for bank in banks) for group, _, banks in optimizer.groups
                        if isinstance(group.rule, tgm.Muon))
    states = {name: num_bytes(state) for name, state in optimizer.state_dict().items()}
    for rank_report in reports[size]:
        assert 0 < rank_report["watched"]["step_bytes"] <= packed + received + max(average, update)
        assert rank_report["watched"]["state_bytes"] == states
