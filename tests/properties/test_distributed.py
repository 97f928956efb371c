"""Real gloo processes: one optimizer path for 1, 2, 4 and 8 ranks, with equal results, and what it sends and holds."""
import math
import re

import pytest
import torch

import plain_optimizer
import train_gpt_medium as tgm
from helpers import NUM_STEPS, give_gradients, random_ids, randomise, relative, run_ranks, small_config, \
    train_and_report, watch_a_step, write_shard, write_text_folder

SIZES = (1, 2, 4, 8)
BANKS = ("mlp_fc", "mlp_proj", "qkvo", "lm_head", "scalars", "embeds")  # in the order of sending


def advance(make_optimizer, config: tgm.Config, world: tgm.World) -> list[torch.Tensor]:
    """Parameters after steps with given gradients."""
    torch.manual_seed(5)
    model = tgm.GPT(config)
    randomise(model)
    optimizer = make_optimizer(model, config, world)
    for step in range(NUM_STEPS):
        give_gradients(model, world, step)
        optimizer.step(step)
    return [p.detach().clone() for p in model.parameters()]


def report(world: tgm.World, identical: tgm.Config, distinct: tgm.Config) -> dict:
    return dict(identical=train_and_report(world, identical), distinct=train_and_report(world, distinct),
                ours=advance(tgm.Optimizer, distinct, world),
                frozen=advance(plain_optimizer.Optimizer, distinct, world), watched=watch_a_step(world, identical))


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, list[dict]]:
    """What every rank of every world size reports."""
    folder = tmp_path_factory.mktemp("ranks")
    config = small_config(seq_len=128, num_iterations=NUM_STEPS, val_seq_len=256, val_tokens=1024)
    # A period of one slice: every slice of every batch is the same, its last target included.
    period = random_ids(128, config, mean_doc=40)
    write_shard(folder / "identical" / "text_train_000001.bin", [*period.repeat(NUM_STEPS * 8), period[0]])
    write_shard(folder / "identical" / "text_val_000000.bin", random_ids(config.val_tokens + 1, config))
    identical = tgm.replace(config, data_dir=str(folder / "identical"))
    distinct = write_text_folder(folder / "distinct", tgm.replace(config, dtype=torch.float32))
    return {size: run_ranks(size, report, identical, distinct, folder=folder / str(size)) for size in SIZES}


def test_identical_slices_give_bitwise_equal_parameters(reports):
    alone = reports[1][0]["identical"]
    for size in SIZES:
        for rank_report in reports[size]:
            for name, p in rank_report["identical"]["params"].items():
                assert torch.equal(p, alone["params"][name]), (size, name)
            assert rank_report["identical"]["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-12)


def test_distinct_slices_give_the_same_update(reports):
    alone = reports[1][0]["distinct"]
    for size in SIZES:
        ranks = [rank_report["distinct"] for rank_report in reports[size]]
        assert torch.equal(torch.cat([rank["seen"] for rank in ranks], dim=1), alone["seen"]), "not the whole batch"
        for rank in ranks:
            for name, p in rank["params"].items():
                assert torch.equal(p, ranks[0]["params"][name]), (size, name)  # ranks never drift apart
                assert relative(p, alone["params"][name]) < 1e-5, (size, name)  # the order of fp32 sums
            assert rank["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_frozen_optimizer_agrees(reports, size):
    """The same updates as with everything averaged and updated everywhere: Newton-Schulz in fp32, bound of SPEC 8."""
    torch.manual_seed(5)
    model = tgm.GPT(small_config(dtype=torch.float32))
    randomise(model)
    for rank_report in reports[size]:
        for initial, ours, frozen in zip(model.parameters(), rank_report["ours"], rank_report["frozen"], strict=True):
            assert relative(ours - initial, frozen - initial) < 1e-4


def bank_numbers(model_config: tgm.Config) -> dict[str, tuple[torch.dtype, int, int]]:
    """By bank: dtype, how many numbers, how many of them are not divided. Counted from the table in SPEC section 3."""
    C, V, layers = model_config.model_dim, model_config.vocab_size, 16
    head_rows = -(-V // 128) * 128
    matrix, mlp = C * C, 4 * C * C
    return {"mlp_fc": (torch.bfloat16, layers * mlp, mlp), "mlp_proj": (torch.bfloat16, layers * mlp, mlp),
            "qkvo": (torch.bfloat16, 15 * 4 * matrix, matrix), "lm_head": (torch.float32, head_rows * C, 128),
            "scalars": (torch.float32, 16 + 16 * 3 + 16 * 2 + 1 + 2, 128),
            "embeds": (torch.bfloat16, 7 * V * C, 128)}


def padded(numbers: int, unit: int, size: int) -> int:
    return math.ceil(numbers / (unit * size)) * unit * size


@pytest.mark.parametrize("size", SIZES)
def test_a_step_sends_what_the_plan_says(reports, size):
    """Recorded at the process group: count, order, bytes; nothing on one rank; no more in a step with an outer one."""
    plan = []
    for operation in ("alltoall_base_", "_allgather_base_") if size > 1 else ():
        for name, (dtype, numbers, unit) in bank_numbers(small_config()).items():
            plan.append((operation, str(dtype), padded(numbers, unit, size) * dtype.itemsize))
    for rank_report in reports[size]:
        for collectives in rank_report["watched"]["collectives"]:
            assert collectives == plan


def test_the_plan_in_the_docstring_is_that_of_the_record():
    """Its table, row by row, for the record on 8 ranks; the count of collectives."""
    rows = re.findall(r"^ +(\w+) +(bf16|fp32) +(\d+) +(\d+) +([\d.]+)$", tgm.Optimizer.__doc__, re.M)
    expected = []
    for name, (dtype, numbers, unit) in bank_numbers(tgm.Config()).items():
        sent = padded(numbers, unit, 8)
        expected.append((name, {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype], str(numbers),
                         str(sent - numbers), f"{sent * dtype.itemsize / 1e6:.1f}"))
    assert rows == expected and [row[0] for row in rows] == list(BANKS)
    assert f"{2 * len(BANKS)} in all" in tgm.Optimizer.__doc__


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_the_states_of_its_shards_alone(reports, size):
    for rank_report in reports[size]:
        watched = rank_report["watched"]
        shards = {name: (padded(numbers, unit, size) // size, dtype.itemsize)
                  for name, (dtype, numbers, unit) in bank_numbers(small_config()).items()}
        assert watched["numbers"] == {name: numbers for name, (numbers, _) in shards.items()}
        muon = sum(shards[name][0] for name in ("mlp_fc", "mlp_proj", "qkvo")) * (4 + 2 + 2)
        adam = sum(numbers * 2 * itemsize for name, (numbers, itemsize) in shards.items() if name not in (
            "mlp_fc", "mlp_proj", "qkvo"))
        snoo = sum(numbers * 2 * itemsize for numbers, itemsize in shards.values())
        counters = 3 * 4  # AdamW's step of each shard
        assert watched["state_bytes"] == {"muon": muon, "adamw": adam + counters, "snoo": snoo}
        assert watched["padding_is_zero"]


@pytest.mark.parametrize("size", SIZES)
def test_a_step_takes_no_more_memory_than_it_must(reports, size):
    """Besides parameters, the gradients it is given, and states."""
    banks = {name: (padded(numbers, unit, size), dtype.itemsize)
             for name, (dtype, numbers, unit) in bank_numbers(small_config()).items()}
    packed = sum(numbers * itemsize for numbers, itemsize in banks.values())
    received = packed if size > 1 else 0
    # Eager code averages one bank with 6 bytes a number: its fp32 copy and the sums of pairs. It updates this rank's
    # MLP matrices with 16.5: directions by bank and as a batch, 4; X, two products and their sum, 8; A and four
    # products, a quarter of X each, 2.5; the fp32 gradient of one of the two banks, 2.
    average = 6 * max(numbers for numbers, _ in banks.values()) if size > 1 else 0
    update = 16.5 * (banks["mlp_fc"][0] + banks["mlp_proj"][0]) / size
    for rank_report in reports[size]:
        assert 0 < rank_report["watched"]["step_bytes"] <= packed + received + max(average, update)
