"""Which rule updates a parameter, in which order, and the rules' formulas, for any groups and constants."""
import copy

import pytest
import torch

import train_gpt_medium as tgm
from helpers import ALONE, CPU, DISTINCT_PRESETS, NUM_STEPS, give_gradients, random_ids, randomise, relative, \
    small_config


def as_tensors(numbers: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


# One kind of matrix, two that are each other's transposes, wide ones.
@pytest.mark.parametrize("shapes", [((3, 64, 64),), ((2, 256, 64), (1, 64, 256)), ((1, 64, 256),)])
def test_muon_formula_in_fp32(shapes):
    """One matrix at a time, spelled out in fp64, while Muon takes them as one batch."""
    generator, rule = torch.Generator().manual_seed(0), tgm.Muon(lr=0.03, decay=0.02)
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(3, *shape, generator=generator) for shape in shapes]
    before, states = [p.double() for p in params], [rule.new_state(p) for p in params]
    for step_grads in zip(*grads):
        rule.update(params, list(step_grads), states, **as_tensors(dict(lr=rule.lr, momentum=0.9)))
    for p, W, all_grads in zip(params, before, grads):
        M, S = torch.zeros_like(W), torch.zeros_like(W)
        rows, cols = W.shape[-2:]
        for g in all_grads.double():
            M = 0.9 * M + 0.1 * g
            updates = []
            for X in 0.9 * M + 0.1 * g:
                X = X.T if rows > cols else X
                X = X / (X.norm() + 1e-7)
                for a, b, c in rule.newton_schulz:
                    A = X @ X.T
                    X = a * X + (b * A + c * A @ A) @ X
                updates.append(X.T if rows > cols else X)
            S = rule.smoothing * S + (1 - rule.smoothing) * torch.stack(updates)
            W = W * (1 - rule.lr * rule.decay) - rule.lr * max(1, rows / cols) ** 0.5 * S
        # Newton-Schulz multiplies fp32 rounding (6e-8) by up to its slope at zero, the product of the a: about 500.
        assert ((p - W).norm() / (rule.lr * S.norm())).item() < 1e-4


def test_a_group_may_update_every_third_step_with_the_sum_of_its_gradients(monkeypatch):
    """Until then none of its gradients are sent, or lost where a batch is made of several pieces."""
    config = small_config(dtype=torch.float32, snoo=None)
    config = tgm.replace(config, groups=tuple(
        tgm.Group(name, roles, rule, 3 if name == "embeds" else 1) for name, roles, rule, _ in config.groups))
    model = config.make_model()
    randomise(model)
    optimizer, sent, send = tgm.Optimizer(model, config, ALONE), [], tgm.Bank.send_grads
    monkeypatch.setattr(tgm.Bank, "send_grads", lambda bank: sent.append(bank) or send(bank))
    bank, before, alone = optimizer.banks["embeds"], model.embeds.detach().clone(), []
    for step in range(3):
        inputs, targets = tgm.split_pieces(random_ids(2 * 256 + 1, config, step), 256)
        single = copy.deepcopy(model)
        losses = [single(*piece, **tgm.inputs_at(step, config, CPU)) for piece in zip(inputs, targets)]
        alone.append(torch.autograd.grad(sum(losses) / 2, single.embeds)[0])
        sent.clear()
        tgm.train_step(model, optimizer, inputs, targets, step)
        assert (bank in sent) == (step == 2) and len(sent) == len(optimizer.banks) - (step < 2)
        assert torch.equal(model.embeds, before) == (step < 2)
    total = sum(alone).flatten()
    received = bank.state["exp_avg"].flatten()[:total.numel()] / (1 - optimizer.groups[-1][0].rule.betas[0])
    # Sums of six, in two orders, and the average: a few roundings of fp32.
    assert relative(received, total) < 1e-6
    assert model.embeds.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 13])
def test_average_rounds_once(size, dtype):
    parts = torch.randn(size, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, average = parts.double().mean(0), tgm.average_ranks(parts)
    # Half a unit in the last place; at most four roundings of fp32 sums of numbers below 8, and one of a quotient.
    assert average.dtype == dtype
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 5 * 8 * 2 ** -24
    assert ((average.double() - exact).abs() <= bound).all()
    if size & (size - 1) == 0:  # equal gradients stay as they are
        assert torch.equal(tgm.average_ranks(parts[:1].expand(size, -1)), parts[0])


def test_mantissa_round_trip_truncates():
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(250)
    w = torch.cat([w, torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2 ** -23, 1 + 2 ** -8, 3.4e38, -1e-38])])
    upper, mantissa = torch.empty_like(w, dtype=torch.bfloat16), torch.empty_like(w, dtype=torch.int16)
    tgm.write_weights(upper, mantissa, w)
    assert torch.equal(tgm.read_weights(upper, mantissa).view(torch.int32), w.view(torch.int32))
    assert (upper.float().abs() <= w.abs()).all()  # truncated, never rounded up
    assert torch.equal(tgm.read_weights(w.bfloat16(), torch.zeros_like(mantissa)), w.bfloat16().float())


def test_snoo_formula_in_bf16():
    """Also where torch's fused SGD would leave the parameters unmoved: bf16 on a CPU."""
    generator, snoo = torch.Generator().manual_seed(0), tgm.Snoo()
    p = torch.randn(1000, generator=generator).bfloat16()
    state, outer, buffer = snoo.new_state(p), p.double(), 0.0
    for _ in range(4):
        p += torch.randn(1000, generator=generator).bfloat16() * 0.1
        difference = outer - p.double()
        snoo.update([p], [state])
        buffer = snoo.momentum * buffer + difference
        outer = outer - snoo.lr * (difference + snoo.momentum * buffer)
        # Half a unit of bf16 (2^-9 of numbers up to 4) from each of at most seven rounded operations.
        assert (p.double() - outer).abs().max() < 7 * 2 ** -9 * 4
        outer = p.double()


@pytest.mark.parametrize("dtype, shape", [(torch.bfloat16, (40, 64)), (torch.float32, (40, 64)), (torch.float32, ())])
def test_adamw_is_the_formula_rounded_to_the_parameters_dtype(dtype, shape):
    torch.manual_seed(0)
    rule, p = tgm.AdamW(lr=0.3, decay=0.1), torch.randn(shape).to(dtype)
    state, reference, (beta1, beta2) = rule.new_state(p), p.double(), rule.betas
    m, v = torch.zeros_like(reference), torch.zeros_like(reference)
    for t in range(1, 6):
        grad = torch.randn(shape).to(dtype)
        rule.update([p], [grad], [state], **as_tensors(dict(lr=rule.lr)))
        g = grad.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        reference *= 1 - rule.lr * rule.decay
        reference -= rule.lr * (m / (1 - beta1 ** t)) / ((v / (1 - beta2 ** t)).sqrt() + rule.eps)
        # Each state is used before it is rounded, so the step, of at most 0.3 * 3, is off by half a unit twice, and the
        # parameter is rounded once; in fp32 also what decay leaves of it.
        unit, roundings = torch.finfo(dtype).eps, 1 if dtype == torch.bfloat16 else 2
        assert (p.double() - reference).abs().max() < unit * (0.3 * 3 + roundings * reference.abs().max() / 2)
        reference = p.double()
        m, v = (state[name].double() for name in ("exp_avg", "exp_avg_sq"))  # kept in the parameter's dtype


def role_of(name: str) -> str:
    return name.split(".")[-1]


@pytest.mark.parametrize("share", [None, 0.25, 4.0])
def test_gradients_are_clipped_to_one_norm_of_them_all(share, monkeypatch):
    """share: clip_norm, in norms of the gradients that the rules would get."""
    def gradients(clip_norm: float | None) -> torch.Tensor:
        config, seen = small_config(dtype=torch.float32, clip_norm=clip_norm), []
        for group in config.groups:
            monkeypatch.setattr(type(group.rule), "update", lambda rule, shards, grads, *_, **__: seen.extend(
                grad.flatten() for grad in grads))
        model = config.make_model()
        optimizer = tgm.Optimizer(model, config, ALONE)
        give_gradients(model, ALONE, step=0)
        optimizer.step(1)
        assert all(bank.grads is None for bank in optimizer.banks.values())
        return torch.cat(seen)

    unclipped = gradients(None)
    clipped = gradients(share and share * unclipped.double().norm().item())
    scale = min(share or 1.0, 1.0)
    assert torch.equal(clipped, unclipped) if scale == 1 else relative(clipped, scale * unclipped) < 1e-5


@pytest.mark.parametrize("preset", DISTINCT_PRESETS)
def test_a_step_is_what_the_rules_make_of_every_parameter_alone(preset):
    """Banks, batches and the order of groups change no number: fp32, with the bound of Muon's formula above."""
    config = small_config(preset, dtype=torch.float32, clip_norm=None)
    torch.manual_seed(0)
    model = config.make_model()
    randomise(model)
    rule_of = {role: group.rule for group in config.groups for role in group.roles}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone, states = copy.deepcopy(before), {}
    for name, p in alone.items():
        unit_dims = rule_of[role_of(name)].unit_dims
        alone[name] = p.view(-1, *p.shape[p.ndim - unit_dims:])
        states[name] = rule_of[role_of(name)].new_state(alone[name])
        states[name] |= config.snoo.new_state(alone[name]) if config.snoo else {}
    optimizer = tgm.Optimizer(model, config, ALONE)
    for step in range(NUM_STEPS):
        give_gradients(model, ALONE, step)
        for name, p in model.named_parameters():
            rule, shard = rule_of[role_of(name)], [alone[name]]
            rule.update(shard, [p.grad.view_as(alone[name])], [states[name]],
                        **as_tensors(rule.hyperparameters(step, config)))
            if config.snoo and step % config.snoo.every == 0:
                config.snoo.update(shard, [states[name]])
        optimizer.step(step)
        assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    errors = {name: relative(p.detach() - before[name], alone[name].view_as(p) - before[name])
              for name, p in model.named_parameters()}
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


def test_a_parameter_without_a_role_is_refused():
    model = small_config().make_model()
    model.extra_scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(tgm.UserError, match="no group has the role extra_scale"):
        tgm.Optimizer(model, model.config, ALONE)
