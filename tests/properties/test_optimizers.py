"""AdamW, Muon and Snoo against known answers, formulas and torch's own."""
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

import plain_optimizer
import train_gpt_medium as tgm
from helpers import ALONE, GOLDEN, golden, random_ids, relative, small_config


def zero_state(p: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32), smooth=torch.zeros_like(p),
                mantissa=torch.zeros_like(p, dtype=torch.int16))


def scalars(momentum: float, lr: float, decay: float, smoothing: float) -> dict:
    return dict(momentum=torch.tensor(momentum, dtype=torch.float64), lr=torch.tensor(lr, dtype=torch.float64),
                decay=torch.tensor(decay, dtype=torch.float64), smoothing=smoothing)


def muon_errors(update=tgm.muon_update) -> tuple[list[float], list[float]]:
    """Relative L2 errors of the golden run: of every single update, and of the sums of a parameter's updates."""
    c, answers = golden("muon.json"), np.load(GOLDEN / "muon.npz")
    errors, sums = [], []
    for k, shape in enumerate(c["shapes"]):
        p = (torch.randn(shape, generator=torch.Generator().manual_seed(c["seed"] + k)) * 0.1).bfloat16()
        batch = (-1, *shape[-2:])
        state, w = zero_state(p.view(batch)), p.float()
        first = previous = w
        for t in range(c["steps"]):
            generator = torch.Generator().manual_seed(c["seed"] + 100 * (t + 1) + k)
            grad = torch.randn(shape, generator=generator).bfloat16()
            update([p.view(batch)], [grad.view(batch)], [state], **scalars(
                c["momentum"][t], c["lr"][t], c["weight_decay"] * c["wd_mul"][k], c["update_smoothing"]))
            ours = tgm.join_mantissa(p, state["mantissa"].view(shape))
            answer = torch.tensor(answers[f"p{k}_step{t + 1}"])
            errors.append(relative(ours - w, answer - previous))
            w, previous = ours, answer
        sums.append(relative(w - first, answer - first))
    return errors, sums


def muon_errors_as_the_record_multiplies() -> list[float]:
    """muon_errors with matrices laid out in memory as the record's code has them: tall ones are transposed views, which
    sum a norm in another order than the trainer's batches do."""
    newton_schulz, shape = tgm.newton_schulz, []

    def update(params, grads, *args, **kwargs):
        shape[:] = params[0].shape[-2:]
        tgm.muon_update(params, grads, *args, **kwargs)

    def matrix_by_matrix(x):
        if shape[0] > shape[1]:
            x = x.mT.contiguous().mT
        return torch.cat([newton_schulz(matrix[None]) for matrix in x])

    with mock.patch.object(tgm, "newton_schulz", matrix_by_matrix):
        return muon_errors(update)[0]


def test_muon_known_answers():
    # The answers come from AVX2 products (SPEC 8); which instructions oneDNN uses is fixed when torch is loaded.
    code = "import json, test_optimizers as t; print(json.dumps(t.muon_errors_as_the_record_multiplies()))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    errors = json.loads(done.stdout)
    assert len(errors) == 25 and max(errors) < 1e-5


def assert_within_bf16s_freedom(errors: list[float], sums: list[float]) -> None:
    """Another order of bf16 operations differs by about 2 % in an update and 11 % in the sum of five (SPEC 8)."""
    assert len(errors) == 25 and max(errors) < 0.03
    assert len(sums) == 5 and max(sums) < 0.15


def test_muon_known_answers_on_any_processor():
    assert_within_bf16s_freedom(*muon_errors())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_muon_known_answers():
    """bf16 with mantissas in one graph, as CUDA runs it; fused operations round less often."""
    assert_within_bf16s_freedom(*muon_errors(torch.compile(tgm.muon_update, dynamic=False, fullgraph=True)))


@pytest.mark.parametrize("shapes", [((3, 64, 64),), ((2, 256, 64), (1, 64, 256)), ((1, 64, 256),)])
def test_muon_formula_in_fp32(shapes):
    """One matrix at a time, spelled out in fp64 from SPEC section 4, while Muon takes them as one batch."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(3, *shape, generator=generator) for shape in shapes]
    before, states = [p.double() for p in params], [zero_state(p) for p in params]
    for step_grads in zip(*grads):
        tgm.muon_update(params, list(step_grads), states, **scalars(0.9, 0.03, 0.02, 0.2))
    for p, W, all_grads in zip(params, before, grads):
        assert_muon_formula(p, W, all_grads, 0.9, 0.03, 0.02)


def assert_muon_formula(p: torch.Tensor, W: torch.Tensor, grads: torch.Tensor, m: float, lr: float, decay: float):
    """p is W [n, rows, cols] after steps with grads [steps, n, rows, cols]."""
    M, S = torch.zeros_like(W), torch.zeros_like(W)
    rows, cols = W.shape[-2:]
    for g in grads:
        M = m * M + (1 - m) * g.double()
        updates = []
        for X in m * M + (1 - m) * g.double():
            X = X.T if rows > cols else X
            X = X / (X.norm() + 1e-7)
            for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                            (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):
                A = X @ X.T
                X = a * X + (b * A + c * A @ A) @ X
            updates.append(X.T if rows > cols else X)
        S = 0.2 * S + 0.8 * torch.stack(updates)
        W = W * (1 - lr * decay) - lr * max(1, rows / cols) ** 0.5 * S
    # Newton-Schulz multiplies fp32 rounding (6e-8) by up to its slope at zero, the product of the a: about 500.
    assert ((p - W).norm() / (lr * S.norm())).item() < 1e-4


def matrices(model: tgm.GPT, optimizer: tgm.Optimizer | plain_optimizer.Optimizer) -> dict[str, torch.Tensor]:
    """Muon's parameters by name as fp32 numbers, mantissas included."""
    if isinstance(optimizer, plain_optimizer.Optimizer):
        pairs = [(optimizer.muon.params[i][0], state["mantissa"]) for i, state in optimizer.muon.state.items()]
    else:
        pairs = [(p, mantissa) for muon in optimizer.muons for bank, state in zip(muon.banks, muon.states)
                 for p, mantissa in zip(bank.params, state["mantissa"].flatten().split(
                     [p.numel() for p in bank.params]))]
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: tgm.join_mantissa(p, mantissa.view_as(p)) for p, mantissa in pairs}


def test_the_frozen_optimizer_agrees_in_bf16():
    """Five inner steps: matrices within what SPEC 8 allows another order of bf16 operations, tables bit for bit."""
    config = small_config(snoo_every=10, num_iterations=10)
    torch.manual_seed(0)
    models = tgm.GPT(config), tgm.GPT(config)
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [kind(model, config, ALONE)
                  for kind, model in zip((tgm.Optimizer, plain_optimizer.Optimizer), models)]
    weights = [[matrices(*pair)] for pair in zip(models, optimizers)]
    for step in range(1, 6):
        for model, optimizer, history in zip(models, optimizers, weights):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step(step)
            history.append(matrices(model, optimizer))
    ours, frozen = weights
    assert ours[0].keys() == frozen[0].keys() and len(ours[0]) == 47
    for name in ours[0]:
        for t in range(5):
            assert relative(ours[t + 1][name] - ours[t][name], frozen[t + 1][name] - frozen[t][name]) < 0.03, name
        assert relative(ours[5][name] - ours[0][name], frozen[5][name] - frozen[0][name]) < 0.15, name
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        if name not in ours[0]:
            # Scalars lie in one vector now, which a CPU rounds otherwise: some eight operations of fp32 a step.
            rtol = 0 if p.numel() % 128 == 0 else 5 * 8 * 2 ** -24
            torch.testing.assert_close(p, q, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 13])
def test_average_rounds_once(size, dtype):
    parts = torch.randn(size, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, average = parts.double().mean(0), tgm.average_parts(parts)
    # Half a unit in the last place; at most four roundings of fp32 sums of numbers below 8, and one of a quotient.
    assert average.dtype == dtype
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 5 * 8 * 2 ** -24
    assert ((average.double() - exact).abs() <= bound).all()
    if size & (size - 1) == 0:  # equal gradients stay as they are
        assert torch.equal(tgm.average_parts(parts[:1].expand(size, -1)), parts[0])


def test_newton_schulz_brings_singular_values_near_one():
    g = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    orthogonal = tgm.newton_schulz(g)
    values = torch.linalg.svdvals(orthogonal.float())
    assert orthogonal.shape == g.shape and orthogonal.dtype == g.dtype
    assert 0.6 < values.min() and values.max() < 1.4


def test_mantissa_round_trip_truncates():
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(250)
    w = torch.cat([w, torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2 ** -23, 1 + 2 ** -8, 3.4e38, -1e-38])])
    upper, mantissa = tgm.split_mantissa(w)
    assert torch.equal(tgm.join_mantissa(upper, mantissa).view(torch.int32), w.view(torch.int32))
    assert (upper.float().abs() <= w.abs()).all()  # truncated, never rounded up
    assert torch.equal(tgm.join_mantissa(w.bfloat16(), torch.zeros_like(mantissa)), w.bfloat16().float())


def test_mantissa_keeps_steps_that_bf16_would_lose():
    p = torch.ones(1, 64, 64, dtype=torch.bfloat16)
    state = zero_state(p)
    for _ in range(50):  # each step decays by 3e-5, a hundredth of bf16's spacing
        tgm.muon_update([p], [torch.zeros_like(p)], [state], **scalars(0.9, 0.003, 0.01, 0.2))
    expected = torch.full(p.shape, (1 - 3e-5) ** 50)
    torch.testing.assert_close(tgm.join_mantissa(p, state["mantissa"]), expected, rtol=50 * 2 ** -24, atol=0)


def test_snoo_known_answers():
    c, answers = golden("snoo.json"), np.load(GOLDEN / "snoo.npz")
    generator = torch.Generator().manual_seed(c["seed"])
    params = [torch.randn(5, 7, generator=generator), torch.randn(3, generator=generator)]
    snoo = tgm.Snoo(params, c["lr"], c["momentum"])
    for t in range(c["steps"]):
        for j, p in enumerate(params):
            r = torch.randn(p.shape, generator=torch.Generator().manual_seed(c["seed"] + 100 * (t + 1) + j))
            p.add_(r, alpha=-0.05)
        if t % c["k"] == 0:
            snoo.step(params)
        for name, p in zip("ab", params):
            torch.testing.assert_close(p, torch.tensor(answers[f"{name}_step{t + 1}"]), rtol=0, atol=2e-7)


def test_snoo_formula_in_bf16():
    """Also where torch's fused SGD would leave the parameters unmoved: bf16 on a CPU."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator).bfloat16()
    snoo, outer, buffer = tgm.Snoo([p], 0.68, 0.37), p.double(), 0.0
    for _ in range(4):
        p += torch.randn(1000, generator=generator).bfloat16() * 0.1
        difference = outer - p.double()
        snoo.step([p])
        buffer = 0.37 * buffer + difference
        outer = outer - 0.68 * (difference + 0.37 * buffer)
        # Half a unit of bf16 (2^-9 of numbers up to 4) from each of at most seven rounded operations.
        assert (p.double() - outer).abs().max() < 7 * 2 ** -9 * 4
        outer = p.double()


@pytest.mark.parametrize("dtype, shape", [(torch.bfloat16, (40, 64)), (torch.float32, (40, 64)), (torch.float32, ())])
def test_adamw_is_the_formula_rounded_to_the_parameters_dtype(dtype, shape):
    config = small_config()
    model = tgm.GPT(config)
    optimizer = tgm.Optimizer(model, config, ALONE)
    group = optimizer.adamw.param_groups[-1]
    ours = torch.optim.AdamW([p := torch.randn(shape).to(dtype)], **{
        name: group[name] for name in ("betas", "eps", "weight_decay", "fused", "amsgrad", "maximize")}, lr=0.3)
    reference = p.double()
    m, v = torch.zeros_like(reference), torch.zeros_like(reference)
    for t in range(1, 6):
        p.grad = torch.randn(shape).to(dtype)
        g = p.grad.double()
        ours.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        m, v = m.to(dtype).double(), v.to(dtype).double()  # states are kept in the parameter's dtype
        reference -= 0.3 * (m / (1 - 0.8 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-10)
        # Each state is used before it is rounded, so the step, of at most 0.3 * 3, is off by half a unit twice, and the
        # parameter is rounded once.
        unit = torch.finfo(dtype).eps
        assert (p.double() - reference).abs().max() < unit * (0.3 * 3 + reference.abs().max() / 2)
        reference = p.double()
        m, v = (ours.state[p][name].double() for name in ("exp_avg", "exp_avg_sq"))


def owner_of(bank: tgm.Bank, names: dict[int, str]) -> list[str]:
    return [names[id(p)] for p in bank.params]


def test_every_parameter_has_its_optimizer_and_rate(monkeypatch):
    config = small_config(num_iterations=10, momentum_warmup_steps=20)
    model = tgm.GPT(config)
    seen = []
    monkeypatch.setattr(tgm, "muon_update", lambda *args, **kw: seen.append((*args, kw)))
    optimizer = tgm.Optimizer(model, config, ALONE)
    step = 6  # of 10: the factor is below one
    factor = (0.4 / 0.7) + (1 - 0.4 / 0.7) * 0.01
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(step)
    names = {id(p): name for name, p in model.named_parameters()}
    by_shard = {id(bank.shard): owner_of(bank, names) for bank in optimizer.banks.values()}
    rates = {name: group["lr"] / factor for group in optimizer.adamw.param_groups for shard in group["params"]
             for name in by_shard[id(shard)]}
    for name, rate in rates.items():
        expected = 1 / 320 if name == "lm_head" else 0.3 if "embed" in name else 0.015
        assert rate == pytest.approx(expected), name
    decays = {name: kw["decay"].item() for shards, _, _, kw in seen for shard in shards for name in by_shard[id(shard)]}
    assert decays == {name: pytest.approx(0.01 if name.endswith("qkvo") else 0.02) for name in decays}
    for _, grads, states, kw in seen:
        assert kw["lr"].item() == pytest.approx(0.03 * factor)
        assert kw["momentum"].item() == pytest.approx(0.85 + 0.1 * 6 / 20) and kw["smoothing"] == 0.2
        for grad, state in zip(grads, states, strict=True):
            assert (grad == 1).all()
            assert [state[name].dtype for name in ("momentum_buffer", "smooth", "mantissa")] == [
                torch.float32, torch.bfloat16, torch.int16]
    assert rates.keys() | decays.keys() == set(names.values()) and not rates.keys() & decays.keys()
    assert all(p.grad is None for p in model.parameters())
    (snoo,) = optimizer.snoo.sgd.param_groups
    assert {id(p) for p in snoo["params"]} == {id(optimizer.snoo.outer[b.shard]) for b in optimizer.banks.values()}
    assert (snoo["lr"], snoo["momentum"], snoo["nesterov"], snoo["dampening"]) == (0.68, 0.37, True, 0)
    assert optimizer.adamw.defaults["fused"]  # bf16 states with fp32 arithmetic


def test_a_parameter_without_a_role_is_refused():
    model = tgm.GPT(small_config())
    model.extra_scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="extra_scale"):
        tgm.Optimizer(model, model.config, ALONE)


def test_the_outer_step_follows_every_bank_s_inner_step(monkeypatch):
    config, order = small_config(snoo_every=3), []
    model = tgm.GPT(config)
    optimizer = tgm.Optimizer(model, config, ALONE)
    banks = {id(bank.shard): name for name, bank in optimizer.banks.items()}
    for muon in optimizer.muons:
        monkeypatch.setattr(muon, "step", lambda *a, muon=muon: order.extend(banks[id(b.shard)] for b in muon.banks))
    monkeypatch.setattr(optimizer.adamw, "step", lambda: order.extend(
        banks[id(p)] for group in optimizer.adamw.param_groups for p in group["params"] if p.grad is not None))
    monkeypatch.setattr(optimizer.snoo, "step", lambda shards: order.extend(f"outer {banks[id(p)]}" for p in shards))
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(step)
    inner = ["mlp_fc", "mlp_proj", "qkvo", "lm_head", "scalars", "embeds"]
    outer = ["mlp_fc", "mlp_proj", "outer mlp_fc", "outer mlp_proj", "qkvo", "outer qkvo", "lm_head", "outer lm_head",
             "scalars", "outer scalars", "embeds", "outer embeds"]
    assert order == outer + inner + inner + outer


def test_state_round_trip_continues_bit_for_bit():
    config = small_config()
    torch.manual_seed(0)
    model, twin = tgm.GPT(config), tgm.GPT(config)
    optimizer = tgm.Optimizer(model, config, ALONE)
    tokens = random_ids(128 + 1, config)

    def advance(model, optimizer, step):
        tgm.train_step(model, optimizer, *tgm.split_slices(tokens, 128), step)

    for step in range(2):  # stops between two outer steps
        advance(model, optimizer, step)
    twin.load_state_dict(model.state_dict())
    resumed = tgm.Optimizer(twin, config, ALONE)
    resumed.load_state_dict(tgm.copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        advance(model, optimizer, step)
        advance(twin, resumed, step)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(p, q), name
