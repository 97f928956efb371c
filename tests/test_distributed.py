"""Real gloo processes: one optimizer path for 1, 2, 4 and 8 ranks, with equal results."""
import pytest
import torch
import torch.distributed as dist

import train_gpt_medium as tgm
from helpers import random_ids, randomise, run_ranks, small_config, write_shard, write_text_folder

NUM_STEPS = 3  # outer steps of Snoo after the first and the third


def train_and_report(world: tgm.World, config: tgm.Config) -> dict:
    """A few steps from fixed weights: parameters, validation loss, and the ids that this rank saw."""
    torch.manual_seed(5)
    model = tgm.GPT(config)
    randomise(model)
    optimizer = tgm.Optimizer(model, config, world)
    train_shards, val_shard = tgm.find_shards(config)
    loader, seen = tgm.TrainLoader(train_shards, config, world), []
    for step in range(NUM_STEPS):
        inputs, targets = next(loader)
        seen.append(inputs)
        tgm.train_step(model, optimizer, inputs, targets, step)
    loader.close()
    return dict(params={name: p.detach() for name, p in model.named_parameters()}, seen=torch.stack(seen),
                val_loss=tgm.evaluate(model, val_shard, NUM_STEPS, world), muon_states=len(optimizer.muon.state))


def results(folder, config) -> dict[int, list[dict]]:
    return {size: run_ranks(size, train_and_report, config, folder=folder / str(size)) for size in (1, 2, 4, 8)}


def test_identical_slices_give_bitwise_equal_parameters(tmp_path):
    config = small_config(seq_len=128, num_iterations=NUM_STEPS, val_seq_len=256, val_tokens=1024)
    # A period of one slice: every slice of every batch is the same, its last target included.
    period = random_ids(128, config, mean_doc=40)
    write_shard(tmp_path / "text_train_000001.bin", [*period.repeat(NUM_STEPS * 8), period[0]])
    write_shard(tmp_path / "text_val_000000.bin", random_ids(config.val_tokens + 1, config))
    reports = results(tmp_path, tgm.replace(config, data_dir=str(tmp_path)))
    (alone,) = reports[1]
    for size in (2, 4, 8):
        for report in reports[size]:
            for name, p in report["params"].items():
                assert torch.equal(p, alone["params"][name]), (size, name)
            assert report["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-12)
    # Each matrix's Muon state lives on one rank, as evenly as 47 matrices allow.
    assert [report["muon_states"] for report in reports[8]] == [6] * 7 + [5]


def test_distinct_slices_give_the_same_update(tmp_path):
    config = small_config(seq_len=128, num_iterations=NUM_STEPS, val_seq_len=256, val_tokens=1024, dtype=torch.float32)
    config = write_text_folder(tmp_path, config)
    reports = results(tmp_path, config)
    (alone,) = reports[1]
    batch = alone["seen"]
    for size in (2, 4, 8):
        together = torch.cat([report["seen"] for report in reports[size]], dim=1)
        assert torch.equal(together, batch), "the ranks' slices are not the batch"
        for report in reports[size]:
            for name, p in report["params"].items():
                assert torch.equal(p, reports[size][0]["params"][name]), (size, name)  # ranks never drift apart
                error = (p - alone["params"][name]).norm() / alone["params"][name].norm()
                assert error < 1e-5, (size, name)  # the order of fp32 sums
            assert report["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)


def average(world: tgm.World) -> list[torch.Tensor]:
    """Gradients of awkward sizes, averaged; the exact mean is known to the test."""
    grads = [torch.full(shape, 2.0 ** world.rank).to(dtype) + (world.rank == 3)
             for shape in ((), (1,), (5,), (16, 3), (257, 8)) for dtype in (torch.float32, torch.bfloat16)]
    for grad in grads:
        tgm.average_over_ranks(grad, world.size)
    noisy = torch.randn(1000, generator=torch.Generator().manual_seed(world.rank)).bfloat16()
    own = noisy.clone()
    tgm.average_over_ranks(noisy, world.size)
    everyone = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(everyone, own)
    return [*grads, noisy, torch.stack(everyone).float().mean(0)]


def test_average_is_exact_up_to_one_rounding(tmp_path):
    for report in run_ranks(4, average, folder=tmp_path):
        *grads, noisy, mean = report
        for grad in grads:  # (1 + 2 + 4 + 8 + 1) / 4
            assert (grad == 4).all()
        # At most half a unit of bf16, but for ties that fp32 sums in another order may break.
        assert ((noisy.float() - mean).abs() <= mean.abs() * 2 ** -8).all()
