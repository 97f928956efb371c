"""The published model: its known answers, plain and through the kernels, its twin, and what makes it Smear-MTP."""
import pytest
import torch
import torch.nn.functional as F

import plain_twin
import train_gpt_medium as tgm
from helpers import DEVICE, as_window, golden, golden_weights, random_ids, randomise, relative, small_config

CASES = [pytest.param(case["config"], answer, id=f"{case['config']['name']}-{answer['window_blocks']}")
         for name in ("model.json", "model_full_vocabulary.json") for case in golden(name) for answer in case["cases"]]


@pytest.mark.parametrize("case, answer", CASES)
def test_known_answers(case, answer):
    """Losses, all gradient norms and attended pairs, in fp32, within the bounds of SPEC section 8."""
    T, window_blocks = case["seq_len"], answer["window_blocks"]
    config = tgm.Config(seq_len=T, val_seq_len=T, val_tokens=T, dtype=torch.float32, **{
        name: case[name] for name in ("vocab_size", "doc_token", "num_heads", "head_dim")})
    model = tgm.GPT(config)
    golden_weights(model, case["seed"])
    ids = torch.randint(0, case["doc_token"], (T + 1,), generator=torch.Generator().manual_seed(case["seed"] + 10000))
    ids[case["doc_starts"]] = case["doc_token"]
    inputs, targets, window = ids[:-1], ids[1:], as_window(window_blocks)
    loss = model(inputs, targets, window)
    loss.backward()
    with torch.no_grad():
        eval_loss = model(inputs, targets, window)

    assert relative(loss.detach(), answer["train_loss"]) < 5e-7
    assert relative(eval_loss, answer["eval_loss"]) < 5e-7
    grads = plain_twin.twin_of({name: p.grad for name, p in model.named_parameters()})
    for role, grad_norm in answer["grad_norm"].items():
        kind, *number = role.split(".")
        name = role if role in grads else f"blocks.{number[0]}.{kind}"
        assert relative(grads.pop(name).double().norm(), grad_norm) < 1e-6, role
    assert not grads
    for name, ours in (("smear_lambda_grad", model.smear_lambda.grad),
                       ("backout_lambdas_grad", model.backout_lambdas.grad),
                       ("block_lambdas_grad_layer9", model.block_lambdas.grad[9])):
        assert relative(ours, answer[name]) < 2e-6, name
    for name, mask in zip(("long", "short"), tgm.block_masks(inputs, (window, window // 2), case["doc_token"])):
        attended = tgm.dense_mask(mask).sum(1)
        pairs = {"total": attended.sum().item(), "weighted": (attended * (torch.arange(T) % 997)).sum().item()}
        assert pairs == answer[f"{name}_attended_pairs"], name


# The kernels know neither documents nor windows: in the interpreter each occurs once, other pairs with `-m slow`.
PAIRS = [pytest.param(doc_starts, w, marks=[] if DEVICE.type == "cuda" or i == j else [pytest.mark.slow])
         for i, doc_starts in enumerate(([], [0, 128, 256], [127, 129, 200, 383])) for j, w in enumerate((0, 1, 3))]


@pytest.mark.parametrize("doc_starts, w", PAIRS)
def test_model_through_the_kernels_equals_the_twin(kernels, doc_starts, w):
    """Forward, validation and every gradient, fp32, with no parameter at zero."""
    layers = (tgm.Layer(value_embed=0, long_window=True), tgm.Layer(attention=False),
              tgm.Layer(value_embed=0, skip_from=0))
    config = small_config(layers=layers, backout_from=1, vocab_size=65, doc_token=64, seq_len=384, val_seq_len=384,
                          val_tokens=384, dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    model, twin = tgm.GPT(config), plain_twin.GPT(tgm.replace(config, dtype=torch.float32))
    randomise(model)
    plain_twin.copy_weights(model, twin)
    ids = random_ids(385, config, mean_doc=10 ** 9)
    ids[doc_starts] = 64
    arguments = ids[:-1], ids[1:].long(), as_window(w)
    loss = model.to(DEVICE)(*(x.to(DEVICE) for x in arguments))
    loss.backward()
    twin_loss = twin(*arguments)
    twin_loss.backward()
    with torch.no_grad():
        val_loss = model(*(x.to(DEVICE) for x in arguments))
    # fp32: sums of up to 384 terms in three layers. bf16: a few roundings of 2^-9 a layer.
    tolerance = 1e-5 if DEVICE.type == "cpu" else 16 * 2 ** -9
    assert abs(loss - twin_loss) < tolerance * twin_loss and abs(val_loss - twin_loss) < tolerance * twin_loss
    grads = plain_twin.twin_of({name: p.grad.cpu().float() for name, p in model.named_parameters()})
    for name, p in twin.named_parameters():
        assert relative(grads[name], p.grad) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_lambda_is_the_baseline_bit_for_bit(dtype):
    smeared, baseline = (tgm.GPT(small_config(preset, dtype=dtype)) for preset in ("medium", "baseline"))
    randomise(smeared)
    with torch.no_grad():
        smeared.smear_lambda.zero_()
        baseline.load_state_dict({n: p for n, p in smeared.state_dict().items() if n != "smear_lambda"})
    ids = random_ids(257, smeared.config)
    losses = [model(ids[:-1], ids[1:].long(), as_window(1)) for model in (smeared, baseline)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    ours = dict(smeared.named_parameters())
    assert [name for name, p in baseline.named_parameters() if not torch.equal(p.grad, ours[name].grad)] == []
    assert ours["smear_lambda"].grad != 0


def test_rotary_and_loss_round_where_the_record_rounds():
    """In bf16: rotary in fp32 and then cast; the head's product in bf16, cast to fp32 before the softcap."""
    model = tgm.GPT(small_config("medium"))
    randomise(model)
    x = torch.randn(1, 256, 2, 32).bfloat16()
    assert torch.equal(model.rotary(x), model.rotary(x.float()).bfloat16())
    y = torch.randn(256, 64).bfloat16()
    z, targets = y @ model.lm_head.bfloat16().T, torch.arange(256)
    expected = F.cross_entropy(15 * z.float() * torch.rsqrt(z.float() ** 2 + 225), targets, reduction="none")
    torch.testing.assert_close(tgm.cross_entropy(z, targets, 15.0, False), expected, rtol=1e-6, atol=1e-6)
