"""The MUDD recipe's kernel against plain torch, within the bounds on rounding of test_kernels.py."""
import pytest
import torch

import kernel_specs
import train_gpt_mudd as mudd
from helpers import DEVICE

pytest.importorskip("triton", reason="triton is not installed: its interpreter runs the kernels")
from interpreter import fix_rounding
from test_kernels import UNIT, assert_within, randn

# Dtype of the logits, whether the gradient is FP8, and in which units; the last ones are so small that it saturates.
OUTPUTS = [(torch.bfloat16, False, 1.0), (torch.bfloat16, True, mudd.GRAD_SCALE), (torch.bfloat16, True, 1e-6)] + [
    (torch.float32, False, 1.0)] * (DEVICE.type != "cuda")


@pytest.fixture(autouse=True)
def right_rounding(monkeypatch):
    fix_rounding(monkeypatch)


def share_of(logits: torch.Tensor) -> torch.Tensor:
    """Of the cap, in fp64."""
    return torch.sigmoid((logits.double() + mudd.CAP_SHIFT) / mudd.CAP_SCALE)


# A row within one block of columns, of exactly one, and of several; more rows than programs.
@pytest.mark.parametrize("T, V, weights", [
    (7, 300, (1.0, 0.5, 0.25)), (3, 4096, (1.0, 0.3)), (9, 9000, (1.0, 0.5, 0.25)), (5, 9000, (1.0, 0.0, 0.0))])
@pytest.mark.parametrize("dtype, fp8, scale", OUTPUTS)
def test_cross_entropy_equals_plain_torch(kernels, monkeypatch, dtype, fp8, scale, T, V, weights):
    monkeypatch.setattr(mudd, "GRAD_SCALE", scale)
    logits, K = randn(T, V, seed=1, dtype=dtype, scale=20), len(weights)
    logits[0, :3] = torch.tensor([1e4, -1e4, 0.01])
    # Shares are rounded to bf16: logits are replaced where that hangs on fp32's rounding, of an exponent of up to 13
    # three times, of its exponential and of the quotient twice.
    low, high = ((share_of(logits) * (1 + sign * (3 * 13 + 4) * UNIT)).bfloat16() for sign in (-1, 1))
    assert (low != high).double().mean() < 0.01
    logits[low != high] = 0
    share = share_of(logits).bfloat16().double()
    targets = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[:3] = torch.tensor([V - 1, 0, 0])  # equal ones in a row's sum
    targets[-1] = targets[-2]
    mu = torch.tensor(weights, dtype=torch.float64, device=DEVICE)
    log_sum = (mudd.CAP * share).logsumexp(-1)
    p = (mudd.CAP * share - log_sum[:, None]).exp()
    exact, hit = torch.zeros_like(log_sum), torch.zeros_like(p)
    for row in range(T):
        for k in range(min(K, T - row)):
            exact[row] += mu[k] * (log_sum[row] - mudd.CAP * share[row, targets[row + k]])
            hit[row, targets[row + k]] += mu[k]
    slope = mudd.CAP / mudd.CAP_SCALE * share * (1 - share) / scale
    # Exponents up to CAP after about eight operations; the error of an exponent is the relative one of its power.
    exponent_error = 8 * mudd.CAP * UNIT
    error = slope * (mu.sum() * p * 2 * exponent_error + 8 * UNIT * (mu.sum() * p + hit))
    before = logits.clone()
    losses, grads = mudd.mtp_cross_entropy(logits, targets, mu.float(), fp8)
    assert losses.dtype == torch.float32 and grads.dtype == (torch.float8_e5m2 if fp8 else dtype)
    assert torch.equal(logits, before)
    assert_within(losses, exact, mu.sum() * 2 * exponent_error)
    largest = torch.finfo(grads.dtype).max
    full = slope * (mu.sum() * p - hit)
    assert (full.abs() > largest).any() == (scale == 1e-6)
    assert_within(grads, full.clamp(-largest, largest), error)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("version", ["kernel", "plain"])
def test_cross_entropy_does_what_it_declares(request, version, fp8):
    """To torch.compile: shape, dtype and strides of what it returns, and that it overwrites nothing."""
    if version == "kernel":
        request.getfixturevalue("kernels")
    logits, targets = randn(64, 256, seed=1, dtype=torch.bfloat16), torch.arange(64).to(DEVICE)
    given = logits, targets, torch.tensor([1.0, 0.5], device=DEVICE), fp8
    torch.library.opcheck(mudd.mtp_cross_entropy, given, test_utils=("test_schema", "test_faketensor"))


def test_it_compiles_for_an_h100_without_spills(monkeypatch):
    """Two programs share a multiprocessor, which has 65,536 registers."""
    monkeypatch.setenv("TRAIN_SCRIPT", mudd.__file__)
    found = kernel_specs.compiled("compile_kernels(prefix='mtp')")
    assert [k.name for k in found] == ["mtp_cross_entropy_kernel"] * 2  # FP8 and not
    for k in found:
        assert k.spill_store_bytes == k.spill_load_bytes == 0 and 2 * 32 * k.num_warps * k.registers <= 65536, k
