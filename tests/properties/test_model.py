"""Every preset's model: no later token leaks, gradients are the loss's, the fused head is the loss as it is written."""
from unittest import mock

import pytest
import torch

import audit
import train_gpt_medium as tgm
from helpers import CPU, DISTINCT_PRESETS, random_ids, randomise, relative, small_config


@pytest.fixture(params=DISTINCT_PRESETS)
def make_model(request):
    def make(**changes) -> torch.nn.Module:
        torch.manual_seed(0)
        model = small_config(request.param, **changes).make_model()
        randomise(model)
        return model
    return make


def inputs_of(model) -> dict[str, torch.Tensor]:
    """The model's further inputs after the last step, where windows are longest."""
    return tgm.inputs_at(model.config.num_iterations, model.config, CPU)


def test_a_validations_line_shows_numbers(make_model):
    assert all(isinstance(x, float) for x in make_model().report().values())


@pytest.mark.parametrize("share", [0, 1])
def test_a_suffix_never_changes_earlier_logits(make_model, share):
    """share: of the run, at whose end windows are longest."""
    model = make_model()
    ids, step = random_ids(256, model.config), share * model.config.num_iterations
    logits = audit.record_logits(model, ids, step).logits
    for cut in (1, 127, 128, 200):
        changed = ids.clone()
        changed[cut:] = (changed[cut:] + 1) % model.config.doc_token
        first, *_ = (audit.record_logits(model, changed, step).logits != logits).any(1).nonzero().flatten().tolist()
        assert first == cut, f"tokens changed from {cut} on, logits from {first} on"


def test_every_gradient_has_its_parameters_dtype_and_something_in_it(make_model):
    model = make_model()
    ids = random_ids(257, model.config)
    model(ids[:-1], ids[1:].long(), **inputs_of(model)).backward()
    wrong = {name: p.grad if p.grad is None else (p.grad.dtype, p.grad.abs().sum().item())
             for name, p in model.named_parameters()
             if p.grad is None or p.grad.dtype != p.dtype or not 0 < p.grad.abs().sum() < float("inf")}
    assert wrong == {}


def test_the_loss_rises_along_every_gradient_as_steeply_as_it_says(make_model):
    """Central differences in fp32, for the parameters of each role along their gradient."""
    model = make_model(dtype=torch.float32)
    ids, h = random_ids(257, model.config), 1e-2
    arguments = ids[:-1], ids[1:].long()
    model(*arguments, **inputs_of(model)).backward()
    by_role: dict[str, list] = {}
    for name, p in model.named_parameters():
        by_role.setdefault(name.split(".")[-1], []).append(p)
    said, found = {}, {}
    for role, params in by_role.items():
        said[role] = torch.cat([p.grad.flatten() for p in params]).norm().item()
        losses = []
        for way in (h, -2 * h, h):  # up, down, and back
            for p in params:
                p.data += way / said[role] * p.grad
            losses.append(model(*arguments, **inputs_of(model)).item())
        found[role] = (losses[0] - losses[1]) / (2 * h)
    # fp32 losses of about 6 are spaced 5e-7 apart: 5e-5 of slope; the cubic term is some thousandth of the slope.
    assert found == pytest.approx(said, rel=3e-3, abs=1e-4)
    assert min(said.values()) > 4e-4, said  # so that a wrong one shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_is_the_loss_as_it_is_written(make_model, dtype):
    """An edited GPT.loss is not what trains while fused_head is set. Loss, both gradients, and validation's loss."""
    model = make_model(dtype=dtype)
    config, targets = model.config, torch.arange(256) % 257
    if not config.fused_head:
        pytest.skip("this recipe trains with GPT.loss as it is written")
    y = torch.randn(256, config.model_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    outcomes = []
    for loss in (lambda y: model.loss(y, targets), lambda y: tgm.fused_head_loss(
            y, model.lm_head.to(dtype), targets, config.logit_softcap, config.val_loss_chunks)):
        latents = y.clone().requires_grad_()
        trained = loss(latents)
        (3 * trained).backward()  # which multiplies gradients that the fused head has computed before
        outcomes.append((trained.detach(), latents.grad.float(), model.lm_head.grad))
        model.lm_head.grad = None
        with torch.no_grad():
            assert loss(y).item() == pytest.approx(trained.item(), rel=2 ** -18)  # of fp32 sums of 256 terms
    # An exponent of up to 2 softcap is off by some eight roundings of fp32: so is, relative, a probability. Each of the
    # two rounds its logits' gradient, the product, and its cast or its multiple: six halves of a last place.
    bound = 2 * 8 * 2 * config.logit_softcap * 2 ** -24 + 6 * torch.finfo(dtype).eps / 2
    for ours, written in zip(*outcomes[::-1]):
        assert ours.dtype == torch.float32 and relative(ours, written) < bound


def test_validations_loss_in_chunks_is_that_of_the_whole(make_model):
    model = make_model()
    ids, chunks = random_ids(513, model.config), model.config.val_loss_chunks
    arguments = ids[:-1], ids[1:].long()
    with torch.no_grad(), mock.patch.object(tgm, "cross_entropy", wraps=tgm.cross_entropy) as called:
        in_chunks = model(*arguments, **inputs_of(model))
        lengths = [len(call.args[0]) for call in called.call_args_list]
        assert lengths == [512 // chunks] * chunks or not model.config.fused_head
        model.config = tgm.replace(model.config, val_loss_chunks=1)
        assert in_chunks.item() == pytest.approx(model(*arguments, **inputs_of(model)).item(), rel=1e-6)
