"""AdamW, Muon and Snoo against known answers, formulas and torch's own."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt_medium as tgm
from helpers import ALONE, GOLDEN, ROOT, golden, random_ids, small_config


def zero_state(p: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32), smooth=torch.zeros_like(p),
                mantissa=torch.zeros_like(p, dtype=torch.int16))


def scalars(momentum: float, lr: float, decay: float, smoothing: float) -> dict:
    return dict(momentum=torch.tensor(momentum, dtype=torch.float64), lr=torch.tensor(lr, dtype=torch.float64),
                decay=torch.tensor(decay, dtype=torch.float64), smoothing=smoothing)


def muon_errors(update=tgm.muon_update) -> list[float]:
    """Relative L2 error of every update of the golden run, worst first."""
    c, answers = golden("muon.json"), np.load(GOLDEN / "muon.npz")
    errors = []
    for k, shape in enumerate(c["shapes"]):
        p = (torch.randn(shape, generator=torch.Generator().manual_seed(c["seed"] + k)) * 0.1).bfloat16()
        state, w = zero_state(p), p.float()
        previous = w
        for t in range(c["steps"]):
            generator = torch.Generator().manual_seed(c["seed"] + 100 * (t + 1) + k)
            update(p, torch.randn(shape, generator=generator).bfloat16(), **state, **scalars(
                c["momentum"][t], c["lr"][t], c["weight_decay"] * c["wd_mul"][k], c["update_smoothing"]))
            ours, answer = tgm.join_mantissa(p, state["mantissa"]), torch.tensor(answers[f"p{k}_step{t + 1}"])
            errors.append((((ours - w) - (answer - previous)).norm() / (answer - previous).norm()).item())
            w, previous = ours, answer
    return sorted(errors, reverse=True)


def test_muon_known_answers():
    # The answers come from AVX2 products (SPEC 8); which instructions oneDNN uses is fixed when torch is loaded.
    code = "import json, test_optimizers as t; print(json.dumps(t.muon_errors()))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    errors = json.loads(done.stdout)
    assert len(errors) == 25 and errors[0] < 1e-5


def test_muon_known_answers_on_any_processor():
    assert muon_errors()[0] < 0.03  # another order of bf16 operations differs by about 2 % (SPEC 8)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_muon_known_answers():
    """bf16 with mantissas in one graph, as CUDA runs it; fused operations round less often (bound of SPEC 8)."""
    assert muon_errors(torch.compile(tgm.muon_update, dynamic=False, fullgraph=True))[0] < 0.03


@pytest.mark.parametrize("shape", [(3, 64, 64), (256, 64), (64, 256)])
def test_muon_formula_in_fp32(shape):
    """One matrix at a time, spelled out in fp64 from SPEC section 4."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator)
    state, W = zero_state(p), p.double()
    M, S = torch.zeros_like(W), torch.zeros_like(W)
    m, lr, decay = 0.9, 0.03, 0.02
    for _ in range(3):
        g = torch.randn(shape, generator=generator)
        tgm.muon_update(p, g, **state, **scalars(m, lr, decay, 0.2))
        M = m * M + (1 - m) * g.double()
        rows, cols = shape[-2:]
        updates = []
        for X in (m * M + (1 - m) * g.double()).view(-1, rows, cols):
            X = X.T if rows > cols else X
            X = X / (X.norm() + 1e-7)
            for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                            (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):
                A = X @ X.T
                X = a * X + (b * A + c * A @ A) @ X
            updates.append(X.T if rows > cols else X)
        S = 0.2 * S + 0.8 * torch.stack(updates).view(shape)
        W = W * (1 - lr * decay) - lr * max(1, rows / cols) ** 0.5 * S
        # Newton-Schulz multiplies fp32 rounding (6e-8) by up to its slope at zero, the product of the a: about 500.
        assert ((p - W).norm() / (lr * S.norm())).item() < 1e-4


def test_newton_schulz_brings_singular_values_near_one():
    g = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for matrix in (g, g.mT):
        values = torch.linalg.svdvals(tgm.newton_schulz(matrix).float())
        assert tgm.newton_schulz(matrix).shape == matrix.shape
        assert 0.6 < values.min() and values.max() < 1.4


def test_mantissa_round_trip_truncates():
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(250)
    w = torch.cat([w, torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2 ** -23, 1 + 2 ** -8, 3.4e38, -1e-38])])
    upper, mantissa = tgm.split_mantissa(w)
    assert torch.equal(tgm.join_mantissa(upper, mantissa).view(torch.int32), w.view(torch.int32))
    assert (upper.float().abs() <= w.abs()).all()  # truncated, never rounded up
    assert torch.equal(tgm.join_mantissa(w.bfloat16(), torch.zeros_like(mantissa)), w.bfloat16().float())


def test_mantissa_keeps_steps_that_bf16_would_lose():
    p = torch.ones(64, 64, dtype=torch.bfloat16)
    state = zero_state(p)
    for _ in range(50):  # each step decays by 3e-5, a hundredth of bf16's spacing
        tgm.muon_update(p, torch.zeros_like(p), **state, **scalars(0.9, 0.003, 0.01, 0.2))
    expected = torch.full((64, 64), (1 - 3e-5) ** 50)
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
            snoo.step()
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
        snoo.step()
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
    group = next(g for g in optimizer.adamw.param_groups if g["base_lr"] == config.embed_lr)
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


def test_every_parameter_has_its_optimizer_and_rate():
    config = small_config(num_iterations=10, momentum_warmup_steps=20)
    model = tgm.GPT(config)
    seen = []
    optimizer = tgm.Optimizer(model, config, ALONE, lambda p, grad, **kw: seen.append((p, kw)))
    step = 6  # of 10: the factor is below one
    factor = (0.4 / 0.7) + (1 - 0.4 / 0.7) * 0.01
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(step)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] / factor for group in optimizer.adamw.param_groups for p in group["params"]}
    for name, rate in rates.items():
        expected = 1 / 320 if name == "lm_head" else 0.3 if "embed" in name else 0.015
        assert rate == pytest.approx(expected), name
    decays = {names[id(p)]: kw["decay"].item() for p, kw in seen}
    assert decays == {name: pytest.approx(0.01 if name.endswith("qkvo") else 0.02) for name in decays}
    for _, kw in seen:
        assert kw["lr"].item() == pytest.approx(0.03 * factor)
        assert kw["momentum"].item() == pytest.approx(0.85 + 0.1 * 6 / 20) and kw["smoothing"] == 0.2
        assert [kw[name].dtype for name in ("momentum_buffer", "smooth", "mantissa")] == [
            torch.float32, torch.bfloat16, torch.int16]
    assert rates.keys() | decays.keys() == set(names.values()) and not rates.keys() & decays.keys()
    assert all(p.grad is None for p in model.parameters())
    (snoo,) = optimizer.snoo.sgd.param_groups
    assert len(snoo["params"]) == len(names)
    assert (snoo["lr"], snoo["momentum"], snoo["nesterov"], snoo["dampening"]) == (0.68, 0.37, True, 0)
    assert optimizer.adamw.defaults["fused"]  # bf16 states with fp32 arithmetic


def test_a_parameter_without_a_role_is_refused():
    model = tgm.GPT(small_config())
    model.extra_scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="extra_scale"):
        tgm.Optimizer(model, model.config, ALONE)


def test_order_adamw_muon_snoo(monkeypatch):
    config, order = small_config(snoo_every=3), []
    optimizer = tgm.Optimizer(tgm.GPT(config), config, ALONE)
    for name in ("adamw", "muon", "snoo"):
        monkeypatch.setattr(getattr(optimizer, name), "step", lambda *a, name=name: order.append(name))
    for step in range(4):
        optimizer.step(step)
    assert order == ["adamw", "muon", "snoo"] + ["adamw", "muon"] * 2 + ["adamw", "muon", "snoo"]


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
