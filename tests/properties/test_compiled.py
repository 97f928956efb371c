"""The compiled step, executed on a CPU, equals the eager one; made wrong, it is found out.

fp32 within 1e-5 of eager, relative to a tensor's norm: other orders of sums. bf16 no farther from fp32 than 1.5 times
what eager bf16 is, in the mean over losses and gradients: as many roundings, elsewhere.
"""
import pytest

pytest.importorskip("triton", reason="triton is not installed: its interpreter runs the kernels")
from compiled_step import run

# At a block's border, in its first and in its second half; one document is longer than a window of two blocks.
DOCUMENTS = "(0, 40, 80, 128)"


def assert_equal(found: dict) -> None:
    assert found["launches"] >= found["kernels"] > 10
    if found["mean_eager"]:
        assert found["mean"] < 1.5 * found["mean_eager"], found["worst"]
    else:
        assert found["worst"][0][0] < 1e-5, found["worst"]


@pytest.mark.parametrize("num_tokens, blocks", [(384, "2"), pytest.param(512, "2, 9", marks=pytest.mark.slow)])
def test_whole_graph_in_fp32(num_tokens, blocks):
    assert_equal(run(f"compiled_errors(make_config({num_tokens}), {DOCUMENTS}, windows({blocks}), **LARGE_TILES)"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates(dtype):
    """bf16: the bound of SPEC 8 for one update in another order of operations, of weights that it moves by a tenth."""
    error, where = run(f"update_errors(make_config(256, dtype=torch.{dtype}))")
    assert error < (1e-5 if dtype == "float32" else 3e-2), where


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    f"make_config(512, num_heads=2), {DOCUMENTS}, windows(1, 3, 9), whole=False, **LARGE_TILES",  # in parts, as `short`
    f"make_config(512), {DOCUMENTS}, windows(3), choose=lambda tuner: tuner.configs[:1]",  # TorchInductor's own tiles
    "make_config(640, dtype=torch.bfloat16, layers=tgm.LAYERS, backout_from=11), (0, 80, 256), windows(1, 4)"])
def test_other_steps(options):
    assert_equal(run(f"compiled_errors({options})"))


@pytest.mark.slow
def test_two_ranks(tmp_path):
    error, where = run(f"rank_errors(make_config(384), Path({str(tmp_path)!r}))")
    assert error < 1e-5, where


@pytest.mark.slow
def test_the_second_experiment():
    assert_equal(run("""compiled_errors(__import__("train_gpt_1b").Config(
        num_layers=2, num_heads=1, vocab_size=257, doc_token=256, context_len=128, seq_len=256, val_seq_len=256,
        val_tokens=256, dtype=torch.float32, seed=1), (0, 80), [{}])"""))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mudd_recipe(dtype):
    """Six layers of every kind, one graph; five minutes each, most of them in the plain loss of validation."""
    assert_equal(run(f"""compiled_errors(make_mudd(256, dtype=torch.{dtype}), {DOCUMENTS}, [dict(
        window_blocks=helpers.as_window(5), yarn=helpers.as_window(1), mtp_1=torch.tensor(0.5),
        mtp_2=torch.tensor(0.25))], **LARGE_TILES)"""))


@pytest.mark.slow
def test_updates_of_the_mudd_recipe():
    """Newton-Schulz multiplies fp32's rounding by up to its slope at zero, the product of the a: 990."""
    error, where = run("update_errors(make_mudd(256))")
    assert error < 990 * 2 ** -24, where


@pytest.mark.slow
@pytest.mark.parametrize("wrong, message", [
    ("mutate=wrong_strides", "AssertionError"), ("mutate=hidden_mutation", "changes logits and does not say so")])
def test_a_wrong_declaration_stops_the_step(wrong, message):
    with pytest.raises(RuntimeError, match=message):
        run(f"compiled_errors(make_config(256, layers=LAYERS[:1], backout_from=0), (0,), windows(9), {wrong})")


@pytest.mark.slow
def test_wrong_masks_are_found():
    """Full blocks of one list are shifted, which 4 blocks or more can show; keys of a first tile are all masked."""
    wrong = "compiled_errors(make_config(512, layers=LAYERS[:1], backout_from=0), {}, windows(9), {})"
    assert run(wrong.format("(0,)", "mutate=shifted_query_lists"))["worst"][0][0] > 0.1
    (error, _), *_ = run(wrong.format("(0, 80)", "ROWS_GUARANTEED_SAFE=True"))["worst"]
    assert error != error
