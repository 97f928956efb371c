"""Every hand-written kernel against plain torch: in Triton's interpreter on a CPU, as compiled on a GPU.

Tolerances are bounds on rounding: a sum of n products is off by at most n units of 2^-24 of the sum of magnitudes, and
a result stored in a shorter dtype by half of its last place.
"""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fake_gpu
import kernel_specs
import train_gpt_medium as tgm
from helpers import DEVICE

pytest.importorskip("triton", reason="triton is not installed: its interpreter runs the kernels")
from interpreter import check_addresses, fix_rounding

# On a GPU fp32 is left to the plain versions.
DTYPES = [torch.float16, torch.bfloat16] + [torch.float32] * (DEVICE.type != "cuda")
UNIT = 2.0 ** -24  # rounding of fp32, relative


@pytest.fixture(autouse=True)
def right_rounding(monkeypatch):
    fix_rounding(monkeypatch)


@pytest.mark.parametrize("shared_kib, dtype, small, large", [
    (227, torch.bfloat16, True, True), (163, torch.bfloat16, True, False), (99, torch.bfloat16, True, False),
    (227, torch.float32, False, False)])
def test_tiles_that_a_gpu_cannot_hold_are_left_to_the_plain_versions(monkeypatch, shared_kib, dtype, small, large):
    gpu = SimpleNamespace(shared_memory_per_block_optin=shared_kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    x = SimpleNamespace(is_cuda=True, dtype=dtype, device="a GPU")
    assert tgm.runs_kernels(x) is small and tgm.runs_kernels(x, tgm.HOPPER_SHARED_BYTES) is large


def randn(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def assert_within(ours: torch.Tensor, exact_fp64: torch.Tensor, bound: torch.Tensor) -> None:
    """|ours - exact| <= bound + half a last place of ours' dtype, element by element; NaN fails."""
    half_place, smallest = {torch.float32: (UNIT, 0.0), torch.float16: (2.0 ** -11, 2.0 ** -25),
                            torch.bfloat16: (2.0 ** -8, 0.0), torch.float8_e5m2: (2.0 ** -3, 2.0 ** -17)}[ours.dtype]
    excess = (ours.double() - exact_fp64).abs() - bound - half_place * exact_fp64.abs() - smallest
    assert (excess <= 0).all(), f"{(~(excess <= 0)).sum()} of {excess.numel()} elements, by up to {excess.max()}"


# A row within one block of columns, of exactly one, and of several; more rows than programs.
@pytest.mark.parametrize("T, V", [(7, 300), (3, 4096), (5, 9000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_equals_plain_torch(kernels, dtype, T, V):
    softcap = 15.0
    logits = randn(T, V, seed=1, dtype=dtype, scale=20)
    logits[0, :4] = torch.tensor([1e4, -1e4, 0, 0.01])  # saturated, and nearly linear
    targets = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[:2] = torch.tensor([V - 1, 0])
    z = logits.double().requires_grad_()
    exact = F.cross_entropy(softcap * z * torch.rsqrt(z * z + softcap ** 2), targets, reduction="none")
    exact.mean().backward()
    # Exponents up to 2 softcap after about eight operations; the error of an exponent is the relative one of its power.
    exponent_error = 8 * 2 * softcap * UNIT
    before = logits.clone()
    for with_grad in (False, True):
        losses = tgm.cross_entropy(logits, targets, softcap, with_grad)
        assert losses.dtype == torch.float32
        assert_within(losses, exact.detach(), torch.full_like(exact, 2 * exponent_error))
        assert torch.equal(logits, before) or with_grad
    assert logits.dtype == dtype
    p = (softcap * z * torch.rsqrt(z * z + softcap ** 2)).softmax(-1).detach()
    assert_within(logits, z.grad, (p * 2 * exponent_error + 8 * UNIT) / T)


# Borders that no tile divides, several tiles a program.
@pytest.mark.parametrize("T, C", [(200, 96), (384, 72)])
@pytest.mark.parametrize("transposed", [False, True])  # how proj is stored
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_products_equal_plain_torch(kernels, dtype, transposed, T, C):
    x, fc = randn(T, C, seed=1, dtype=dtype), randn(4 * C, C, seed=2, dtype=dtype, scale=C ** -0.5)
    post = tgm.mlp_up(x, fc)
    h = x.double() @ fc.double().mT
    h_error = (C + 1) * UNIT * (x.double().abs() @ fc.double().abs().mT)
    assert post.dtype == dtype and post.shape == (T, 4 * C)
    assert_within(post, h.relu() ** 2, 2 * h.abs() * h_error + h_error ** 2 + 2 * UNIT * h ** 2)
    dy, proj = randn(T, C, seed=3, dtype=dtype), randn(C, 4 * C, seed=4, dtype=dtype, scale=C ** -0.5)
    dh = tgm.mlp_down_grad(dy, proj.mT.contiguous().mT if transposed else proj, post)
    slope = 2 * post.double().sqrt()
    exact = slope * (dy.double() @ proj.double())
    product_error = (C + 1) * UNIT * (dy.double().abs() @ proj.double().abs())
    assert dh.dtype == dtype and (exact != 0).any() and (exact == 0).any()
    assert_within(dh, exact, slope * product_error + 4 * UNIT * exact.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [64, 96])
def test_embedding_gradients_equal_plain_torch(kernels, dtype, C):
    T, V, num_tables = 256, 40, 3
    ids = torch.randint(3, V - 2, (T,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[:100], ids[200], ids[-1] = 5, 0, V - 1  # one id in several rounds of its program; the first and the last id
    grads = randn(num_tables, T, C, seed=1, dtype=dtype)
    ours = tgm.embedding_grad(grads, ids.to(DEVICE), V)
    exact = torch.zeros(num_tables, V, C, dtype=torch.float64, device=DEVICE)
    exact.index_add_(1, ids.to(DEVICE), grads.double())
    magnitude = torch.zeros_like(exact).index_add_(1, ids.to(DEVICE), grads.double().abs())
    assert ours.dtype == dtype and ours[:, 1].abs().sum() == 0  # an id that does not occur
    assert_within(ours, exact, T * UNIT * magnitude)


# One tile; tiles above, on and below the diagonal, of several matrices and several steps along K.
@pytest.mark.parametrize("n, rows, K", [(1, 128, 64), (2, 256, 192)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_products_equal_plain_torch(kernels, dtype, n, rows, K):
    x = randn(n, rows, K, seed=1, dtype=dtype, scale=K ** -0.5)
    A = tgm.symmetric_product(x, 1.0, 0.0)
    exact = x.double() @ x.double().mT
    error = (K + 1) * UNIT * (x.double().abs() @ x.double().abs().mT)
    tile = torch.arange(rows, device=DEVICE) // 128
    mirrored = tile[:, None] != tile  # tiles on the diagonal are computed in full
    assert A.dtype == dtype and torch.equal(A[:, mirrored], A.mT[:, mirrored])
    assert_within(A, exact, error)
    B = tgm.symmetric_product(A, 1.2, -3.1)
    exact = 1.2 * A.double() @ A.double().mT - 3.1 * A.double()
    magnitude = 1.2 * A.double().abs() @ A.double().abs() + 3.1 * A.double().abs()
    assert_within(B, exact, (rows + 4) * UNIT * magnitude)
    assert torch.equal(B[:, mirrored], B.mT[:, mirrored])


@pytest.mark.parametrize("name, arguments", [
    ("cross_entropy", lambda x, ids: (x(64, 256), ids, 15.0, True)),
    ("mlp_up", lambda x, ids: (x(64, 64), x(256, 64))),
    ("mlp_down_grad", lambda x, ids: (x(64, 64), x(64, 256), x(64, 256).square())),
    ("mlp_down_grad", lambda x, ids: (x(64, 64), x(256, 64).mT, x(64, 256).square())),
    ("embedding_grad", lambda x, ids: (x(2, 64, 32), ids, 256)),
    ("symmetric_product", lambda x, ids: (x(2, 128, 64), 1.0, 0.0)),
    ("symmetric_product", lambda x, ids: (x(2, 128, 128), 1.2, -3.1))])
@pytest.mark.parametrize("version", ["kernel", "plain"])
def test_operations_do_what_they_declare(request, monkeypatch, version, name, arguments):
    """To torch.compile: shape, dtype and strides of what they return, and which tensors they overwrite."""
    if version == "kernel":
        request.getfixturevalue("kernels")
    else:
        monkeypatch.setattr(tgm, "runs_kernels", lambda *_: False)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    ids = torch.randint(256, (64,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given = arguments(lambda *shape: randn(*shape, seed=1, dtype=dtype, scale=0.1), ids)
    torch.library.opcheck(getattr(tgm, name), given, test_utils=("test_schema", "test_faketensor"))


def test_kernels_compile_for_an_h100_without_spills():
    kernels = kernel_specs.compiled("compile_kernels()")
    large = ("mlp_gemm_kernel", "symmetric_product_kernel")
    assert {k.name.split("(")[0] for k in kernels} == {name for name in dir(tgm) if name.endswith("_kernel")}
    for k in kernels:
        assert k.registers > 0 and k.spill_store_bytes == k.spill_load_bytes == 0, k
        assert k.shared_bytes <= (tgm.HOPPER_SHARED_BYTES if k.name.startswith(large) else 48 * 1024), k
    small = [k for k in kernels if not k.name.startswith(large)]  # all that a card with less shared memory runs
    launched = {kernel.__name__ for kernel, *_ in kernel_specs.recorded_launches(fake_gpu.GPUS["120"])}
    assert launched == {k.name.split("(")[0] for k in small}
    assert kernel_specs.sum_up("120", small).endswith("left to torch: mlp_gemm_kernel, symmetric_product_kernel")


@pytest.mark.slow
def test_generated_kernels_compile_for_a_gpu_that_is_not_there():
    """Those of one layer. Its attention is asked to load more tiles ahead than a multiprocessor holds."""
    kernels = kernel_specs.compiled("""[
        tgm.LONG_WINDOW_KERNEL.clear(), tgm.LONG_WINDOW_KERNEL.update(fwd_num_stages=7), compile_generated(tgm.Config(
            layers=(tgm.Layer(long_window=True),), backout_from=0, num_heads=1, vocab_size=256, doc_token=255,
            seq_len=1024, val_seq_len=1024, coordinate_descent_tuning=False), world_sizes=(1,))][2]""")
    updates = [k for k in kernels if k.phase == "updates-1-rank"]
    assert {k.phase for k in kernels if k not in updates} == {"training-forward", "training-backward", "validation"}
    assert all(k.num_warps > 0 and k.registers > 0 for k in kernels)
    kinds = {k.name.split("_")[1] for k in kernels}  # of Inductor's kernels
    assert {"poi", "per", "tem"} <= kinds <= {"poi", "per", "red", "tem"}
    attention = [k for k in kernels if "flex_attention" in k.name and k.phase == "validation"]
    assert [k.config for k in attention] == ["BLOCK_M=128,BLOCK_N=64"]
    assert attention[0].shared_bytes >= (128 + 7 * 2 * 64) * 128 * 2  # of q, and seven times k and v
    tried = {k.config for k in updates if "transpose" in k.name and "YBLOCK" in k.config}
    assert len(tried) > 3  # each configuration
    with pytest.raises(tgm.UserError, match=rf"^{attention[0].name} \(BLOCK_M=128,BLOCK_N=64\) needs 2[\d,]+ bytes"):
        kernel_specs.refuse_too_large([attention[0]])
    kernel_specs.refuse_too_large([k for k in kernels if "flex_attention" not in k.name])
    assert "2 need more than" in kernel_specs.sum_up("90", kernels)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="nothing is interpreted where there is a GPU")
def test_an_address_outside_of_every_argument_is_found(monkeypatch, kernels):
    check_addresses(monkeypatch)
    g, out = randn(1, 16, 32, seed=1, dtype=torch.float16), torch.empty(1, 8, 32, dtype=torch.float16)
    ids, order = torch.randint(8, (16,), generator=torch.Generator().manual_seed(1)).int().sort()
    starts = torch.searchsorted(ids, torch.arange(9, dtype=torch.int32))

    def launch(starts: torch.Tensor) -> None:
        tgm.embedding_grad_kernel[(8, 1)](g, order, starts, out, 16, 8, 32, ROWS=16, CHANNELS=32)

    launch(starts)
    with pytest.raises(Exception, match="outside of every argument"):
        launch(starts[:8].clone())
