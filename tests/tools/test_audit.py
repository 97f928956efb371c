"""records/tools/weights/audit.py: a trained model passes every check, and every check catches what it is for."""
from pathlib import Path

import numpy as np
import pytest
import torch

import audit
import train_gpt_medium as tgm
import weights
from helpers import ALONE, FEW_LAYERS, RECORDS, randomise, small_config, train_few_layers

pytestmark = pytest.mark.record  # which looks back by one token, also across a border
CHECKS = ["suffix", "documents", "probabilities", "validation", "warm-up"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[tgm.Config, Path]:
    return train_few_layers(tmp_path_factory.mktemp("run"), smear_mtp=True)


@pytest.fixture(scope="module")
def trained(run) -> weights.Weights:
    return weights.read_weights(run[1])


@pytest.fixture
def model(trained) -> tgm.GPT:
    return weights.build_model(trained)


@pytest.fixture
def steps(run) -> list[int]:
    """With windows of 1, 2 and 4 blocks."""
    return audit.audited_steps(8, run[0])


@pytest.fixture
def shard(run) -> tgm.Shard:
    return weights.open_validation(run[0], Path(run[0].data_dir))


@pytest.fixture
def ids(run, shard) -> torch.Tensor:
    return audit.audited_ids(shard, run[0])


def test_the_readme_lists_the_checks():
    table = (RECORDS / "README.md").read_text().split("| check | what must hold |")[1].split("\n\n")[0]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {check}" for check in CHECKS]


def test_a_trained_checkpoint_passes(run, capsys):
    config, folder = run
    assert weights.main(["audit", str(folder), "--data", config.data_dir]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", f"{check}:"] for check in CHECKS]
    # 3 windows, 14 prefixes, 3 kinds of changes
    assert "126 changes of later tokens, window_blocks:1, window_blocks:2, window_blocks:4: no" in lines[0]
    assert "9 changes before a document" in lines[1] and "6 first tokens'" in lines[1]  # one follows a document token
    assert "targets 1 to 2,048 of text_val_000000.bin" in lines[3]


@pytest.fixture
def fewer_changes(monkeypatch):
    """For tests of what is around the checks, of which one shows that all of them pass."""
    monkeypatch.setattr(audit, "PREFIXES", (100,))
    monkeypatch.setattr(audit, "WORLD_SIZES", (1, 2))


def test_a_failure_is_a_line_and_the_exit_status(run, fewer_changes, capsys, monkeypatch):
    patch_trainer(monkeypatch, "Optimizer.reset_states", reset_but("embeds", "exp_avg"))
    assert weights.main(["audit", str(run[1]), "--data", run[0].data_dir]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 4 + ["FAILED"]


# ---- models that see too much

def with_mask(allows):
    """`block_masks` in which `allows(q, k)` are let attend too, within the blocks that are listed."""
    def block_masks(*arguments):
        masks = original(*arguments)
        for mask in masks:
            def mask_mod(b, h, q, k, honest=mask.mask_mod):
                return honest(b, h, q, k) | allows(q, k)
            mask.mask_mod = mask_mod
        return masks
    original = tgm.block_masks
    return block_masks


def with_pair(q: int, k: int):
    """`dense_mask` that lets one more pair attend."""
    def dense_mask(mask):
        dense = original(mask)
        dense[q, k] = True
        return dense
    original = tgm.dense_mask
    return dense_mask


def smear_with(*shifts):
    """Smear-MTP with the neighbours at these distances: [1] is the record's."""
    def smear(x, smear_lambda):
        neighbours = [torch.cat((x.new_zeros(n, x.size(1)), x[:-n])) if n > 0 else
                      torch.cat((x[-n:], x.new_zeros(-n, x.size(1)))) for n in shifts]
        return x + smear_lambda * sum(neighbours)
    return smear


original_finish = tgm.GPT.finish
FROM_THE_FUTURE = {
    "one later token of a block": lambda: ("block_masks", with_mask(lambda q, k: k == q + 1)),
    "over a block's border": lambda: ("dense_mask", with_pair(127, 128)),
    "the very last token": lambda: ("dense_mask", with_pair(510, 511)),
    "a smear that looks forward": lambda: ("smear", smear_with(-1)),
    "the mean of the sequence": lambda: ("GPT.finish", lambda self, x, middle, ids: original_finish(
        self, x, middle, ids) + 1e-3 * x.mean(0)),
}


def patch_trainer(monkeypatch, name, replacement) -> None:
    monkeypatch.setattr(f"train_gpt_medium.{name}", replacement)


@pytest.mark.parametrize("fault", FROM_THE_FUTURE)
def test_later_tokens_in_sight_are_caught(model, ids, steps, monkeypatch, fault):
    patch_trainer(monkeypatch, *FROM_THE_FUTURE[fault]())
    outcome = audit.check_suffixes(model, ids, steps[1:2])
    assert outcome.passed is False and "reach earlier logits" in outcome.numbers


def test_a_model_that_no_token_moves_is_no_proof(model, ids, steps, fewer_changes):
    with torch.no_grad():
        model.lm_head.zero_()
    outcome = audit.check_suffixes(model, ids, steps[1:2])
    assert outcome.passed is False and "do not reach their own logits" in outcome.numbers
    with torch.no_grad():
        model.backout_lambdas.zero_()
    outcome = audit.check_documents(model, ids, steps[1:2])
    assert outcome.passed is False and "change nothing at all" in outcome.numbers


ACROSS_DOCUMENTS = {
    "attention": lambda: ("block_masks", with_mask(lambda q, k: q >= k)),
    "a smear that looks back by two": lambda: ("smear", smear_with(1, 2)),
}


@pytest.mark.parametrize("fault", ACROSS_DOCUMENTS)
def test_earlier_documents_in_sight_are_caught(model, ids, steps, monkeypatch, fault):
    smear_lambda = model.smear_lambda.clone()
    patch_trainer(monkeypatch, *ACROSS_DOCUMENTS[fault]())
    outcome = audit.check_documents(model, ids, steps[1:2])
    assert outcome.passed is False and "reach into it" in outcome.numbers
    assert torch.equal(model.smear_lambda, smear_lambda) and smear_lambda != 0


def test_without_smear_mtp_not_even_a_first_token_looks_back(ids, monkeypatch):
    model = tgm.GPT(small_config(smear_mtp=False, dtype=torch.float32, layers=FEW_LAYERS, backout_from=1))
    randomise(model)
    steps = audit.audited_steps(1, model.config)
    outcome = audit.check_documents(model, ids, steps)
    assert outcome.passed and "but 0 first tokens'" in outcome.numbers
    patch_trainer(monkeypatch, "GPT.finish", lambda self, x, middle, ids: tgm.smear(
        original_finish(self, x, middle, ids), torch.tensor(0.1)))
    outcome = audit.check_documents(model, ids, steps)
    assert outcome.passed is False and "0 positions after the first, 1 without" in outcome.numbers


# ---- losses that are none

def loss_of(z, z_target):
    capped, target = (x.float() * 15 * torch.rsqrt(x.float() ** 2 + 15 ** 2) for x in (z, z_target))
    return capped.logsumexp(-1) - target


@pytest.mark.parametrize("fault", [
    lambda z, z_target: loss_of(z[:, :257], z_target), lambda z, z_target: loss_of(z, z_target) - 1e-3],
    ids=["padded rows missing", "a thousandth too low"])
def test_a_loss_that_is_not_normalised_is_caught(model, ids, steps, monkeypatch, fault):
    patch_trainer(monkeypatch, "cross_entropy", lambda z, targets, softcap, with_grad: fault(
        z, z.gather(1, targets[:, None])[:, 0]))
    assert audit.check_probabilities(model, ids, steps[1]).passed is False


# ---- validations of something else

split_pieces, evaluate = tgm.split_pieces, tgm.evaluate
OTHER_VALIDATIONS = {
    "a piece skipped": (("split_pieces", lambda *args: tuple(x[:-1] for x in split_pieces(*args))), "1 of 4 pieces"),
    "the ranks share rank 0's pieces": (("evaluate", lambda model, shard, step, world: evaluate(
        model, shard, step, world._replace(rank=0))), "2 ranks: 2 of 4 pieces are not fed, 2 twice"),
    "another mean": (("evaluate", lambda *args: evaluate(*args) * (1 - 1e-9)), "0.999999999 times the mean"),
}


@pytest.mark.parametrize("fault", OTHER_VALIDATIONS)
def test_a_validation_of_other_targets_is_caught(run, shard, monkeypatch, fault):
    replacement, sentence = OTHER_VALIDATIONS[fault]
    patch_trainer(monkeypatch, *replacement)
    outcome = audit.check_validation(run[0], shard, 8)
    assert outcome.passed is False and sentence in outcome.numbers


# ---- warm-ups that leave a trace

def reset_but(bank, state):
    """`Optimizer.reset_states` that leaves one state as it is."""
    def reset_states(self):
        kept = {name: x for name, x in self.banks[bank].state.items() if name == state}
        original(self)
        self.banks[bank].state.update(kept)
    original = tgm.Optimizer.reset_states
    return reset_states


def also(leave):
    """`warm_up` that ends with `leave(model)`."""
    def warm_up(model, *rest):
        original(model, *rest)
        leave(model)
    original = tgm.warm_up
    return warm_up


@pytest.mark.parametrize("name, make, sentence", [
    ("warm_up", lambda: also(lambda model: model.lm_head.data.add_(1)), "(parameters/lm_head)"),
    ("warm_up", lambda: also(lambda model: model.lm_head.sum().backward()), "(gradients/lm_head)"),
    ("warm_up", lambda: also(lambda model: torch.rand(1)), "(torch's random state)"),
    ("warm_up", lambda: also(lambda model: np.random.rand()), "(numpy's random state)"),
    ("Optimizer.reset_states", lambda: reset_but("qkvo", "momentum_buffer"), "(optimizer/qkvo/momentum_buffer)")])
def test_a_warm_up_that_leaves_a_trace_is_caught(model, monkeypatch, name, make, sentence):
    patch_trainer(monkeypatch, name, make())
    outcome = audit.check_warm_up(model, ALONE)
    assert outcome.passed is False and sentence in outcome.numbers
