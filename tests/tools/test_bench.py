"""The benchmark's data, counts and results on a CPU, and the stages that run it: nothing here is timed."""
import contextlib
import json
import math
from itertools import count, cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

import bench
import plain_twin
import stages
import train_gpt_medium as tgm
from helpers import CPU, small_config


def test_sides_have_the_same_weights_and_no_initial_value():
    config = small_config()
    ours, plain = bench.make_sides(config, CPU).values()
    assert isinstance(plain, plain_twin.GPT)
    weights = dict(ours.named_parameters())
    for name, p in weights.items():
        if p.ndim < 2 or "lambdas" in name:
            assert not ((p == 0) | (p == 1)).any(), name
        else:
            assert (p == 0).float().mean() < 1e-3, name
    assert ours.lm_head.std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in plain_twin.twin_of(weights).items():
        assert torch.equal(p, dict(plain.named_parameters())[name]), name


def test_the_slice_has_the_runs_attention():
    """10.0 TFLOP at window 14: of the visible 128 x 128 tiles, 2 products forward, 5 backward."""
    config = tgm.Config()
    ids, _ = bench.one_slice(config, CPU)
    long, short = (plain_twin.window_block_mask(ids, torch.tensor(window), config.doc_token) for window in (
        14, 14 // config.short_window_divisor))
    tiles = sum(int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) for mask in (
        long if layer.long_window else short for layer in config.layers if layer.attention))
    assert round(tiles * 7 * 2 * 128 ** 2 * config.model_dim / 1e12, 1) == 10.0


def test_a_profile_has_kernels_alone(monkeypatch):
    """The longest first, a step of three."""
    def row(key, us, device=DeviceType.CUDA, annotation=False):
        return SimpleNamespace(key=key, count=6, self_device_time_total=us, device_type=device,
                               is_user_annotation=annotation)

    averages = [row("a", 3000), row("b", 6000), row("aten::mm", 9, DeviceType.CPU), row("# step", 9, annotation=True)]
    with torch.profiler.profile() as profiler:
        torch.ones(2)
    assert vars(row("", 0)).keys() <= {*dir(profiler.key_averages()[0])}
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(
        SimpleNamespace(key_averages=lambda: averages)))
    monkeypatch.setattr(bench, "step", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert [*bench.profile_side(*[None] * 4).items()] == [("b", (2, 2)), ("a", (2, 1))]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The clock goes on by 1 ms at every event, nothing is compiled, memory is 10, 13 and 15 GB."""
    clock = count()

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return float(end.at - self.at)

    def attention(q, k, v, block_mask, scale, kernel_options):
        if kernel_options.get("fwd_BLOCK_M") == 64:
            raise RuntimeError("out of resource\nand more")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=tgm.dense_mask(block_mask), scale=scale)
        return y * torch.nan if kernel_options.get("fwd_num_stages") == 1 else y

    for name, answer in dict(is_available=True, _sleep=None, synchronize=None, reset_peak_memory_stats=None,
                             get_device_name="X").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for name, gigabytes in {"memory_allocated": (10, 13), "max_memory_allocated": (15,)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answers=cycle(gigabytes): next(answers) * 10 ** 9)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    monkeypatch.setattr(bench, "flex_attention", attention)
    for name, value in dict(WARM_STEPS=2, LOAD_SECONDS=0, ROUNDS=2, BLOCK_STEPS=1).items():
        monkeypatch.setattr(bench, name, value)


@pytest.fixture
def stage(pretended_gpu, monkeypatch, tmp_path):
    """Runs a stage on the small model, its benchmark in this process: the results in the benchmark's file."""
    monkeypatch.setattr(stages, "call", lambda script, *options: bench.main([*map(str, options)], small_config(), CPU))

    def run(key: str) -> dict:
        next(stage for stage in stages.STAGES if stage.key == key).run(job=stages.Job(tmp_path))
        results = json.loads((tmp_path / "bench.json").read_text())
        assert (results.pop("gpu"), results.pop("torch")) == ("X", torch.__version__) and results.pop("date")
        assert results.pop("triton") and results["says"].keys() == results.keys() - {"says"}
        return results
    return run


def test_blocks_run_in_the_order_a_b_b_a(pretended_gpu):
    order = []

    def call(name):
        order.append(name)
        start = len(order)
        return SimpleNamespace(elapsed_time=lambda end: end.at - start), SimpleNamespace(at=3 * start)

    ms = bench.interleave({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2, block=2)
    assert "".join(order) == "aabbbbaa" * 2
    assert {name: rows.tolist() for name, rows in ms.items()} == {
        "a": [[2, 4, 14, 16], [18, 20, 30, 32]], "b": [[6, 8, 10, 12], [22, 24, 26, 28]]}


def test_ratios_are_of_medians(pretended_gpu, monkeypatch):
    monkeypatch.setattr(bench, "interleave", lambda calls, *_, **__: {
        "a": np.array([[1, 2, 3], [2, 3, 4]]), "b": np.array([[4, 4, 9], [5, 5, 5]])})
    rows, says = bench.compare("x", {"a": None, "b": None})
    assert rows["a"] == {"ms": [2.5, 2, 3], "ratio": [1, 1, 1]}
    assert rows["b"] == {"ms": [5, 4.25, 5], "ratio": [0.5, 0.5, 0.6]} and says == "x: a 2.500 ms, b 5.000 ms"


ONE = {"ms": [1, 1, 1], "ratio": [1, 1, 1]}  # every call takes one of the clock's


def test_sides_are_compared_at_three_windows_with_every_figure(stage, monkeypatch):
    monkeypatch.setattr(bench, "profile_side", lambda *_: {"nvjet_a": (1, 7.0)})
    results = stage("d")
    side = ONE | {"saved_gb": 3, "peak_gb": 5}
    assert results["says"]["window 3"] == "window 3: ours 1.000 ms, plain 1.000 ms, ratio 1.000, peaks 5.0 and 5.0 GB"
    assert results == {"says": results["says"]} | {
        f"window {blocks}": {"ours": side, "plain": side} for blocks in (14, 3, 27)} | {
        f"profile of {name}": {"nvjet_a": [1, 7]} for name in ("ours", "plain")}


def test_kernels_are_compared_with_what_they_replace(stage, monkeypatch, tmp_path):
    results = stage("e")
    says = results.pop("says")
    assert {name: len(row) - 1 for name, row in results.items()} == {
        "mlp_up": 3, "mlp_down_grad": 2, "cross_entropy": 2, "embedding_grad": 2,
        "symmetric_product, 4 matrices": 2, "symmetric_product, 32 matrices": 2,
        "symmetric_product plus x, 4 matrices": 2, "symmetric_product plus x, 32 matrices": 2}
    assert all(0 < row["error"] < 0.01 for row in results.values())
    assert says["mlp_down_grad"].startswith("mlp_down_grad: ours 1.000 ms, library GEMM alone 1.000 ms, error 0.")
    for error in (0.03, float("nan")):
        monkeypatch.setattr(bench, "kernel_error", lambda case: error if case.name == "mlp_up" else 0.01)
        with pytest.raises(tgm.UserError, match="^not within 2% of fp32: mlp_up$"):
            stage("e")
        assert "embedding_grad" in json.loads((tmp_path / "bench.json").read_text())  # the last is timed


def test_a_gradient_that_is_not_finite_is_an_error():
    case = bench.Case("bad", (torch.ones(2),), lambda z: z.clone(), {})
    assert bench.kernel_error(case) == 0
    spoiled = case._replace(ours=lambda z: (z.clone(), z.mul_(torch.nan))[0])
    assert np.isnan(bench.kernel_error(spoiled))


def test_a_configuration_that_fails_is_a_row_of_the_sweep(stage):
    results = stage("f")
    for name in bench.SWEPT_WINDOWS:
        rows = [(row["ms"], row.get("failed")) for row in results[name]["candidates"]]
        assert len(rows) == 2 + 11 + 7 and rows.count((math.inf, "RuntimeError: out of resource")) == 2
        assert (math.inf, "FloatingPointError: attention or a gradient is not finite") in rows
        assert rows.count((1, None)) == 17 and results[name]["chosen"] == {}
    assert results["says"]["LONG_WINDOW_KERNEL"] == "window 14: 1.000 ms, 1.000 with {}; 3 configurations fail"


def test_the_sweep_chooses_for_each_window_and_prints_what_to_paste(stage, monkeypatch, tmp_path, capsys):
    """Long windows win by a forward's and a backward's options; short ones by noise."""
    def time_attention(options, *_):
        won = sum(options.get(name) == value for name, value in (
            ("fwd_BLOCK_N", 64), ("fwd_num_stages", 4), ("bwd_num_warps", 8)))
        return [{"options": options, "ms": 7 - won}, {"options": options, "ms": 7 - 0.001 * won}]

    monkeypatch.setattr(bench, "time_attention", time_attention)
    results = stage("f")
    assert results["says"]["LONG_WINDOW_KERNEL"].startswith("window 14: 7.000 ms, 4.000 with ")
    (tmp_path / "book.json").write_text(json.dumps({"runs": [{"result": results}, {"result": {}}]}))
    capsys.readouterr()
    bench.main(["--choose", str(tmp_path / "book.json")])
    out = capsys.readouterr().out
    exec(out, pasted := {})
    assert max(map(len, out.splitlines())) <= 120
    assert pasted["SHORT_WINDOW_KERNEL"] == {} and pasted["LONG_WINDOW_KERNEL"] == {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 4, "fwd_num_warps": 4, "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64, "bwd_num_stages": 2, "bwd_num_warps": 8}
