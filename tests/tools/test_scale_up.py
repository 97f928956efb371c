"""The scaled-up run, records/scale_up_1b: its formulas, 1 and 2 gloo processes, its data, its log, what stops it."""
import json
import math
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import torch

import memory
import run_log
import train_gpt_1b as t1b
import train_gpt_medium as tgm
from helpers import ALONE, NUM_STEPS, RECORDS, TRAINER, assert_one_run, enter, relative, run_ranks, train_and_report, \
    write_shard

FOLDER = RECORDS / "scale_up_1b"


def tiny(**changes) -> t1b.Config:
    """Two layers' worth of work in fp32; a batch is 8 micro-batches of 4 sequences of 32."""
    constants = dict(context_len=32, seq_len=128, val_seq_len=128, stages=(tgm.Stage(num_slices=8),), val_tokens=1024,
                     num_layers=4, head_dim=16, num_iterations=8, cooldown_steps=4, seed=1)
    return t1b.PRESETS["tiny"](**(constants | changes))


def random_ids(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(257, (num,), generator=torch.Generator().manual_seed(seed))


def random_model(config: t1b.Config) -> t1b.GPT:
    """No initial zero left, so that no path is dead."""
    torch.manual_seed(2)
    model = t1b.GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model


def with_shards(folder: Path, config: t1b.Config, train, val=random_ids(1025, seed=9)) -> t1b.Config:
    """`config` reading shards of these ids."""
    write_shard(folder / "text_train_000001.bin", train)
    write_shard(folder / "text_val_000000.bin", val)
    return tgm.replace(config, data_dir=str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Size

@pytest.mark.parametrize("preset", ["baseline", "1b"])
def test_parameters_are_counted_exactly(preset):
    """The published count is the baseline's: Smear-MTP adds its one scalar."""
    optimizer = memory.optimizer_of(t1b.PRESETS[preset](), 8)
    numbers = {name: len(bank.buffer) - bank.padding for name, bank in optimizer.banks.items()}
    assert sum(numbers.values()) == 1_549_467_648 + (preset == "1b")
    assert numbers["mlp"] + numbers["attention"] == 52 * 12 * 1536 ** 2 and numbers["tied"] == 50_304 * 1536
    assert all(bank.padding == 0 for name, bank in optimizer.banks.items() if name != "scalar")  # all ranks work alike
    config = t1b.PRESETS[preset]()
    pieces = config.batch_tokens(0) // config.piece_len, config.val_tokens // config.val_piece_len
    assert pieces == (40, 848)  # which 1, 2, 4 and 8 ranks share


# ----------------------------------------------------------------------------------------------------------------------
# Formulas

def plain_logits(model: t1b.GPT, ids: torch.Tensor, smear_lambda: float) -> torch.Tensor:
    """The model on one sequence [T] in fp64, written a second time: complex rotations, scores, a mask."""
    config, T = model.config, len(ids)
    D = config.head_dim
    theta = torch.outer(torch.arange(T).float(), config.rotary_base ** -(torch.arange(0, D, 2) / D))
    turns = torch.complex(theta.cos().bfloat16().double(), -theta.sin().bfloat16().double())

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 2 ** -23).sqrt()

    def rotate(x):
        return torch.cat(torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turns).unbind(-1), -1)

    x = model.tied.double()[ids]
    for block in model.blocks:
        W = {name: p.double().T for name, p in block.named_parameters()}
        q, k, v = ((norm(x) @ W[name]).view(T, -1, D).transpose(0, 1) for name in "qkv")
        scores = rotate(norm(q)) @ rotate(norm(k)).mT / math.sqrt(D)
        y = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf).softmax(-1) @ v
        x = x + y.transpose(0, 1).flatten(1) @ W["o"]
        x = x + (norm(x) @ W["mlp_in"]).clamp_min(0) ** 2 @ W["mlp_out"].T
    x = norm(x)
    return (x + smear_lambda * torch.cat((0 * x[:1], x[:-1]))) @ model.tied.double().T


@torch.no_grad()
def test_model_against_its_formulas():
    model = random_model(tiny(smear_mtp=True))
    ids = random_ids(2 * 32).view(2, 32)
    expected = torch.stack([plain_logits(model, row, model.smear_lambda.item()) for row in ids])
    assert relative(model.logits(ids), expected) < 1e-5  # fp32 through four layers
    targets = random_ids(64, seed=1).view(2, 32)
    log_p = expected.log_softmax(-1)
    loss = -torch.stack([log_p[b, t, targets[b, t]] for b in range(2) for t in range(32)]).mean()
    assert model(ids.flatten(), targets.flatten()).item() == pytest.approx(loss.item(), rel=1e-5)


def test_lr_factor():
    config = t1b.Config()
    assert [t1b.lr_factor(step, config) for step in (0, 14_531, 14_532, 17_438, 20_343)] == [
        1, 1, 1, 0.5, 1 / 5812]


def plain_muon(w, grad, buf, lr):
    """(W, buf) after a step, in fp64, on a matrix of any shape without transposing it."""
    buf = 0.95 * buf + grad
    X = grad + 0.95 * buf
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T if len(X) <= X.size(1) else X.T @ X
        B = -4.7750 * A + 2.0315 * A @ A
        X = 3.4445 * X + (B @ X if len(X) <= X.size(1) else X @ B)
    return w - lr * math.sqrt(max(w.shape)) * X, buf


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_muon_against_its_formula(shape):
    generator, rule = torch.Generator().manual_seed(0), t1b.Muon(0.003, torch.float32)
    p = torch.randn(1, *shape, generator=generator)
    state, initial, w, buf = rule.new_state(p), p[0].double(), p[0].double(), 0.0
    for factor in (1, 1, 0.5):
        grad = torch.randn(1, *shape, generator=generator)
        rule.update([p], [grad], [state], lr=torch.tensor(factor * 0.003, dtype=torch.float64))
        w, buf = plain_muon(w, grad[0].double(), buf, factor * 0.003)
    assert relative(p[0] - initial, w - initial) < 1e-4


def test_rates():
    config = t1b.Config()
    assert {group.name: group.rule.hyperparameters(17_438, config) for group in config.groups} == {
        "mlp": {"lr": 0.00009}, "attention": {"lr": 0.00009}, "tied": {"lr": 0.0009}, "scalar": {"lr": 0.0075}}
    tied = next(group.rule for group in config.groups if group.name == "tied")
    assert (tied.betas, tied.eps, tied.decay) == ((0.9, 0.95), 1e-8, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks and data

def test_two_ranks_train_as_one(tmp_path):
    config = tiny(num_iterations=NUM_STEPS)
    config = with_shards(tmp_path, config, random_ids(NUM_STEPS * 8 * config.piece_len + 1))
    assert_one_run(run_ranks(2, train_and_report, config, folder=tmp_path), train_and_report(ALONE, config))


def test_training_data_wraps_around(tmp_path):
    """Whole batches of each shard, tails dropped, then from the first shard again; targets are the next ids."""
    ids = torch.arange(2 * 1024 + 1) % 257, (1100 + torch.arange(1024 + 300)) % 257
    config = with_shards(tmp_path, tiny(), ids[0])
    write_shard(tmp_path / "text_train_000002.bin", ids[1])
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, ALONE)
    for shard, start in ((0, 0), (0, 1024), (1, 0)) * 2 + ((0, 0), (0, 1024)):
        inputs, targets = next(loader)
        assert inputs.shape == (8, 128)
        assert torch.equal(inputs.flatten(), ids[shard][start:start + 1024].int())
        assert torch.equal(targets.flatten(), ids[shard][start + 1:start + 1025])
    loader.close()


# ----------------------------------------------------------------------------------------------------------------------
# A run

def test_tiny_learns_on_text_and_its_log_is_read_by_the_tools(monkeypatch, tmp_path):
    enter(tmp_path, monkeypatch)
    text = np.frombuffer("".join(topics.topics.values()).encode(), np.uint8)
    config = with_shards(tmp_path / "text", tiny(context_len=64, head_dim=32, val_tokens=4096, num_iterations=24,
                                                 cooldown_steps=8, val_every=12), text[4097:60_000], text[:4097])
    val_loss = t1b.main(config)
    (path,) = (tmp_path / "logs").iterdir()
    run = run_log.read_log(path)
    assert [v.step for v in run.validations] == [0, 12, 24] and run.finished
    assert [step for step, _ in run.step_ms] == list(range(1, 25))
    assert all(path.read_text().strip() in run.source for path in (FOLDER / "train_gpt_1b.py", TRAINER))
    assert run.constants["groups"] == repr(config.groups) and run.peak_memory_mib > 0
    assert run.tokens.tolist() == [1024 * step for step in range(25)]
    assert run.final_loss == pytest.approx(val_loss, abs=1e-6)
    assert run.validations[0].extras["smear_lambda"] == 0 != run.validations[-1].extras["smear_lambda"]
    # Uniform guesses over the 256 bytes cost ln 256; letters alone bring English text below 3.2.
    assert run.validations[0].loss > math.log(256) > 4 > run.final_loss


# ----------------------------------------------------------------------------------------------------------------------
# The README

def test_readme_gives_the_published_figures():
    text = " ".join((FOLDER / "README.md").read_text().split())
    published = json.loads((FOLDER / "published.json").read_text())["scale_up_1b"]
    for name, label in (("baseline", "without"), ("smear_mtp", "with Smear-MTP")):
        first, last = published[name][0], published[name][-1]
        assert (first["step"], last["step"]) == (0, t1b.Config().num_iterations)
        assert f"| {label} | {first['val_loss']:.4f} | {last['val_loss']:.4f} |" in text
