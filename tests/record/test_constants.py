"""The published system's constants, schedules, initial values, rates and messages, value by value."""
import inspect
import math
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import memory
import train_gpt_medium as tgm
from helpers import ROOT, as_window, golden, random_ids, small_config

RECORD = tgm.Config()
BF16, FP32 = torch.bfloat16, torch.float32


def test_schedules_are_the_records():
    answers = golden("schedule.json")
    assert RECORD.num_iterations == answers["num_iterations"]
    assert {step: tgm.lr_factor(int(step), RECORD) for step in answers["lr"]} == answers["lr"]
    momentum = answers["muon_momentum"]
    assert {step: tgm.muon_momentum(int(step), RECORD) for step in momentum} == momentum
    windows = [tgm.num_window_blocks(step, RECORD) for step in range(RECORD.num_iterations + 1)]
    changes = [[step, w] for step, w in enumerate(windows) if step == 0 or w != windows[step - 1]]
    assert changes == answers["window_blocks_first_step"]
    assert windows[-1] == 27  # the last validation


def test_constants_of_the_record():
    """SPEC sections 1 to 5, but for what the known answers of the model and the schedules depend on."""
    expected = dict(
        vocab_size=50257, doc_token=50256, seq_len=65536, stages=(tgm.Stage(1.0, 8, None, 1.0),), piece_len=65536,
        val_tokens=10485760, val_seq_len=262144, val_piece_len=262144, val_loss_chunks=4, num_heads=8, head_dim=128,
        dtype=BF16, num_iterations=5535, val_every=125, snoo=tgm.Snoo(every=28, lr=0.68, momentum=0.37),
        checkpoint_every=0, checkpoint_minutes=0, seed=None)
    assert {name: getattr(RECORD, name) for name in expected} == expected
    assert RECORD.kernel_warmup_steps > 0


def test_rates_and_decays_of_the_record():
    adam = dict(betas=(0.8, 0.95), eps=1e-10, decay=0.0)
    muon = dict(lr=0.03, smoothing=0.2, newton_schulz=(
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012)))
    scalars = ("skip_weights", "block_lambdas", "attn_lambdas", "smear_lambda", "backout_lambdas")
    expected = {"mlp_fc": ("Muon", muon | dict(decay=0.02)), "mlp_proj": ("Muon", muon | dict(decay=0.02)),
                "qkvo": ("Muon", muon | dict(decay=0.01)), "lm_head": ("AdamW", adam | dict(lr=1 / 320)),
                "embeds": ("AdamW", adam | dict(lr=0.3)), **{r: ("AdamW", adam | dict(lr=0.015)) for r in scalars}}
    assert {role: (type(group.rule).__name__, asdict(group.rule)) for group in RECORD.groups
            for role in group.roles} == expected
    step = 4000  # beyond the flat part, where momentum is warm
    eta = (1 - 4000 / 5535) / 0.7 * 0.99 + 0.01
    for group in RECORD.groups:
        momentum = {"momentum": 0.95} if isinstance(group.rule, tgm.Muon) else {}
        assert group.rule.hyperparameters(step, RECORD) == pytest.approx({"lr": group.rule.lr * eta} | momentum)


def test_initial_values():
    config = small_config("medium", vocab_size=1500, doc_token=1499)
    torch.manual_seed(0)
    model = tgm.GPT(config)
    params = dict(model.named_parameters())
    bound = math.sqrt(3) * 0.5 / math.sqrt(config.model_dim)
    for name, p in params.items():
        if name == "embeds":  # standard error of mean and deviation of n draws: 1 / sqrt(n), 1 / sqrt(2n)
            assert abs(p.float().mean()) < 5 / p.numel() ** 0.5
            assert abs(p.float().std() - 1) < 5 / (2 * p.numel()) ** 0.5
        elif name.endswith("qkvo") or name.endswith("mlp_fc"):
            drawn = p[:3].float() if p.ndim == 3 else p.float()
            assert 0.99 * bound < drawn.abs().max() <= bound * (1 + 2 ** -8)  # bf16 rounds by half a unit at most
            assert abs(drawn.mean()) < 5 * bound / (3 * drawn.numel()) ** 0.5
            assert p.ndim == 2 or (p[3] == 0).all()
        elif name.endswith("mlp_proj") or name == "lm_head":
            assert (p == 0).all()
    assert (params["skip_weights"] == 1).all() and (params["block_lambdas"] == torch.tensor([1.0, 0, 0])).all()
    assert (params["attn_lambdas"] == 0.5).all() and params["smear_lambda"] == 0
    assert params["backout_lambdas"].tolist() == [1, 0]
    ids = random_ids(257, config)
    loss = model(ids[:-1], ids[1:].long(), as_window(1))
    assert loss.item() == pytest.approx(math.log(1536), abs=1e-6)  # uniform over all rows of the head


def test_presets():
    differences = {"medium": {}, "baseline": dict(smear_mtp=False, num_iterations=5550), "short": dict(
        num_iterations=300, val_tokens=2 ** 20, val_seq_len=2 ** 17, val_every=50, coordinate_descent_tuning=False)}
    for name, changes in differences.items():
        assert tgm.PRESETS[name]() == tgm.replace(RECORD, preset=name, **changes), name
    tiny, small = tgm.PRESETS["tiny"](), tgm.PRESETS["small"]()
    assert (tiny.layers, tiny.groups, tiny.stages) == (RECORD.layers, RECORD.groups, RECORD.stages)
    assert (small.layers[:4], small.layers[4:], small.groups) == (RECORD.layers[:4], RECORD.layers[-4:], RECORD.groups)
    assert len({tgm.num_window_blocks(step, tiny) for step in range(tiny.num_iterations)}) >= 3
    assert tiny.num_iterations > tiny.snoo.every


def test_communication_plan_of_the_record():
    """A bank for each row: a collective of so many bytes in either direction, 12 in all, on 8 ranks."""
    banks = memory.optimizer_of(RECORD, 8).banks
    assert [(name, bank.buffer.dtype, bank.buffer.numel() - bank.padding, bank.padding, bank.buffer.nbytes)
            for name, bank in banks.items()] == [
        ("mlp_fc", BF16, 67108864, 0, 134217728), ("mlp_proj", BF16, 67108864, 0, 134217728),
        ("qkvo", BF16, 62914560, 4194304, 134217728), ("lm_head", FP32, 51511296, 0, 206045184),
        ("scalars", FP32, 99, 925, 4096), ("embeds", BF16, 360242176, 0, 720484352)]
    # Of a shard's number: Muon's fp32 momentum, update and mantissa, or AdamW's two and its counter; Snoo's two.
    assert {name: sum(x.nbytes for x in bank.state.values()) for name, bank in banks.items()} == {
        "mlp_fc": 8388608 * 12, "mlp_proj": 8388608 * 12, "qkvo": 8388608 * 12, "lm_head": 6438912 * 16 + 4,
        "scalars": 128 * 16 + 4, "embeds": 45030272 * 8 + 4}


def test_the_recipe_is_read_in_one_sitting():
    """The model ends early in the file; no line of the repository is too long."""
    assert inspect.getsourcelines(tgm.GPT)[1] + len(inspect.getsource(tgm.GPT).splitlines()) <= 450
    linted = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_record_needs_thirty_shards(tmp_path):
    with pytest.raises(tgm.UserError, match="need 30 training shards"):
        tgm.find_shards(tgm.replace(RECORD, data_dir=str(tmp_path)))
    shards = [tgm.Shard(Path(str(n)), 100_000_000) for n in range(1, 104)]
    batches = Counter(shard.path.name for shard, _ in tgm.batch_places(shards, RECORD))
    assert batches == {str(n): 190 for n in range(1, 30)} | {"30": 5535 - 29 * 190}
    assert tgm.shards_needed(RECORD, shards[:3]) == 30
