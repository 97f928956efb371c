"""The model against the record's known answers, and the properties that make Smear-MTP honest."""
import pytest
import torch
import torch.nn.functional as F

import plain_twin
import train_gpt_medium as tgm
from helpers import CPU, assert_known_answer, golden, random_ids, randomise, small_config

CASES = [(case["config"], answer) for name in ("model.json", "model_full_vocabulary.json") for case in golden(name)
         for answer in case["cases"]]


@pytest.mark.parametrize("case, answer", CASES, ids=[f"{c['name']}-{a['window_blocks']}" for c, a in CASES])
def test_known_answers(case, answer):
    assert_known_answer(case, answer)


def make_model(**changes) -> tgm.GPT:
    torch.manual_seed(0)
    model = tgm.GPT(small_config(**changes))
    randomise(model)
    return model


def logits_of(model: tgm.GPT, ids: torch.Tensor, w: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return plain_twin.GPT.logits(model, model.latents(ids, tgm.as_window(w, CPU)))


def test_smear_looks_back_by_one_and_not_recursively():
    x = torch.randn(5, 3)
    y = tgm.smear(x, torch.tensor(0.5))
    assert torch.equal(y[0], x[0])
    for t in range(1, 5):
        assert torch.equal(y[t], x[t] + 0.5 * x[t - 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_lambda_is_the_baseline_bit_for_bit(dtype):
    smeared, baseline = make_model(dtype=dtype), make_model(dtype=dtype, smear_mtp=False)
    with torch.no_grad():
        smeared.smear_lambda.zero_()
        baseline.load_state_dict({n: p for n, p in smeared.state_dict().items() if n != "smear_lambda"})
    ids = random_ids(257, smeared.config)
    losses = [model(ids[:-1], ids[1:].long(), tgm.as_window(1, CPU)) for model in (smeared, baseline)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    ours = dict(smeared.named_parameters())
    for name, p in baseline.named_parameters():
        assert torch.equal(p.grad, ours[name].grad), name
    assert ours["smear_lambda"].grad != 0


def test_gradient_of_lambda_by_finite_difference():
    model = make_model(dtype=torch.float32)
    ids, h = random_ids(257, model.config), 1e-2

    def loss_at(value: float) -> torch.Tensor:
        with torch.no_grad():
            model.smear_lambda.fill_(value)
        return model(ids[:-1], ids[1:].long(), tgm.as_window(2, CPU))

    loss_at(0.3).backward()
    with torch.no_grad():
        slope = (loss_at(0.3 + h) - loss_at(0.3 - h)).item() / (2 * h)
    # fp32 losses of about 6 are spaced 5e-7 apart: 5e-5 of slope; the cubic term is below that at this h.
    assert model.smear_lambda.grad.item() == pytest.approx(slope, abs=1e-4)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("cut", [1, 100, 127, 128, 200, 255])
def test_a_suffix_never_changes_earlier_logits(cut):
    model = make_model()
    ids = random_ids(256, model.config)
    changed = ids.clone()
    changed[cut:] = (changed[cut:] + 1) % model.config.doc_token
    before, after = logits_of(model, ids), logits_of(model, changed)
    assert torch.equal(before[:cut], after[:cut])
    assert not torch.equal(before[cut], after[cut])


@pytest.mark.parametrize("smear_mtp", [True, False])
def test_only_smear_mtp_looks_across_a_document_border(smear_mtp):
    model = make_model(smear_mtp=smear_mtp)
    ids = torch.arange(256, dtype=torch.int32) % 256
    ids[[0, 150]] = model.config.doc_token
    changed = ids.clone()
    changed[149] = 7  # the last token of the first document
    before, after = logits_of(model, ids), logits_of(model, changed)
    assert torch.equal(before[150], after[150]) != smear_mtp
    assert torch.equal(before[151:], after[151:])


def test_neighbour_reaches_the_next_position_within_a_document():
    # Without attention only the smear mixes positions.
    model = make_model(layers=(tgm.Layer(attention=False), tgm.Layer(attention=False, skip_from=0)), backout_from=0)
    ids = random_ids(256, model.config, mean_doc=1000)
    changed = ids.clone()
    changed[100] = (changed[100] + 1) % 256
    differs = (logits_of(model, ids) != logits_of(model, changed)).any(1)
    assert differs.nonzero().flatten().tolist() == [100, 101]


def test_every_parameter_gets_a_gradient_and_a_dtype():
    model = make_model()
    ids = random_ids(257, model.config)
    latents = model.latents(ids[:-1], tgm.as_window(2, CPU))
    assert latents.dtype == torch.bfloat16 and latents.shape == (256, 64)
    model(ids[:-1], ids[1:].long(), tgm.as_window(2, CPU)).backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype and p.grad.abs().sum() > 0, name


def test_initial_loss_is_uniform_over_all_rows_of_the_head():
    config = small_config()
    ids = random_ids(257, config)
    loss = tgm.GPT(config)(ids[:-1], ids[1:].long(), tgm.as_window(1, CPU))
    assert loss.item() == pytest.approx(torch.tensor(384.0).log().item(), abs=1e-6)


def test_rotary_and_loss_round_where_the_record_rounds():
    """In bf16: rotary in fp32 and then cast; the head's product in bf16, cast to fp32 before the softcap."""
    model = make_model()
    x = torch.randn(1, 256, 2, 32).bfloat16()
    assert torch.equal(model.rotary(x), model.rotary(x.float()).bfloat16())
    y = torch.randn(256, 64).bfloat16()
    z, targets = y @ model.lm_head.bfloat16().T, torch.arange(256)
    expected = F.cross_entropy(15 * z.float() * torch.rsqrt(z.float() ** 2 + 225), targets, reduction="none")
    torch.testing.assert_close(tgm.cross_entropy(z, targets, 15.0, False), expected, rtol=1e-6, atol=1e-6)


def test_validation_in_chunks_is_the_mean_over_all_targets(monkeypatch):
    model = make_model()
    ids = random_ids(513, model.config)
    arguments = ids[:-1], ids[1:].long(), tgm.as_window(2, CPU)
    whole = model(*arguments)
    sizes, cross_entropy = [], tgm.cross_entropy
    monkeypatch.setattr(tgm, "cross_entropy", lambda z, *rest: sizes.append(len(z)) or cross_entropy(z, *rest))
    with torch.no_grad():
        chunked = model(*arguments)
    assert sizes == [128] * 4
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
