"""The benchmark's data, counts, groups and messages, on a CPU: nothing here is timed."""
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

import bench
import helpers
import plain_twin
import plan
import pretended_gpu as pretended_gpu_module
import step_model
import train_gpt_medium as tgm
from helpers import CPU, small_config


def kernel(name: str, us: float, calls: float = 1.0) -> dict:
    return {"name": name, "group": bench.group_of(name), "calls_per_step": calls, "us_per_step": us}


def test_ids_look_real():
    config = tgm.Config()
    ids = bench.real_looking_ids(2 ** 21, config, seed=1).numpy()
    assert ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < config.vocab_size
    starts = np.flatnonzero(ids == config.doc_token)
    lengths = np.diff(starts)  # the last document is cut
    assert starts[0] == 0 and 32 <= lengths.min() and lengths.max() <= 130_000
    assert np.median(lengths) == pytest.approx(403, rel=0.08)  # 398, and the 1 % of long ones
    assert 0.005 < (lengths > 6000).mean() < 0.02
    counts = np.sort(np.bincount(np.delete(ids, starts)))[::-1] / (len(ids) - len(starts))
    harmonic = (1 / np.arange(1, config.vocab_size)).sum()
    assert counts[[0, 9, 99]] * harmonic == pytest.approx([1, 1 / 10, 1 / 100], rel=0.1)
    assert torch.equal(bench.real_looking_ids(1000, config, seed=2), bench.real_looking_ids(1000, config, seed=2))
    assert not torch.equal(bench.real_looking_ids(1000, config, seed=2), bench.real_looking_ids(1000, config, seed=3))


def test_window_weights_sum_to_one():
    assert sum(bench.WINDOW_WEIGHTS.values()) == pytest.approx(1, abs=0.002)  # published with three digits
    assert list(bench.WINDOW_WEIGHTS) == [3, 7, 11, 14, 17, 23]


def test_sides_have_the_same_weights_and_no_initial_value():
    config = small_config()
    ours, plain, baseline = (side.model for side in bench.make_sides(bench.SIDES, config, CPU))
    assert isinstance(plain, plain_twin.GPT) and not baseline.config.smear_mtp
    weights = dict(ours.named_parameters())
    for name, p in weights.items():
        if p.ndim < 2 or "lambdas" in name:
            assert not ((p == 0) | (p == 1)).any(), name
        else:
            assert (p == 0).float().mean() < 1e-3, name
    assert ours.lm_head.std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in plain_twin.twin_of(weights).items():
        assert torch.equal(p, dict(plain.named_parameters())[name]), name
    assert dict(baseline.named_parameters()).keys() == weights.keys() - {"smear_lambda"}
    assert all(torch.equal(p, weights[name]) for name, p in baseline.named_parameters())


def test_flop_counts_are_those_of_the_budget():
    config = tgm.Config()
    tflop = bench.gemm_tflop(config)
    assert {name: round(x, 1) for name, x in tflop.items()} == {"QKV": 18.6, "O": 6.2, "MLP": 52.8, "head": 20.3}
    assert round(sum(tflop.values()) - tflop["head"], 1) == 77.5
    ids, _ = bench.one_slice(config, CPU)
    assert round(bench.attention_tflop(ids, 14, config), 1) == 10.0
    # Without documents, window 1 is the diagonal: 512 tiles in each of 15 layers and 8 heads, 7 products each.
    no_documents = torch.zeros(config.seq_len, dtype=torch.int32)
    assert bench.attention_tflop(no_documents, 1, config) == pytest.approx(15 * 512 * 8 * 7 * 2 * 128 ** 3 / 1e12)


def test_saved_bytes_count_storages_once_and_no_parameters():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8, 1))

        def forward(self, ids, targets, window_blocks):
            x = ids.float()[None] * self.weight  # saves ids as floats, 4 bytes a token, and the weight
            return (x * x.view(8, -1)).sum() + self.weight.square().sum()  # saves x twice: 8 x 4 bytes a token

    assert bench.saved_bytes_per_token(Square(), torch.arange(32), torch.arange(32)) == 36


@pytest.mark.parametrize("name, group", [
    ("triton_tem_fused_flex_attention_backward_12", "attention"),
    ("triton_per_fused_flex_attention_backward_mul_sum_3", "elementwise and norms"),
    ("cross_entropy_kernel", "cross-entropy"),
    ("triton_red_fused__log_softmax__to_copy_mul_rsqrt_7", "cross-entropy"),
    ("embedding_grad_kernel", "embeddings"),
    ("triton_per_fused_embedding_fused_rms_norm_0", "embeddings"),
    ("mlp_gemm_kernel", bench.BODY),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", bench.BODY),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", bench.BODY),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn", bench.BODY),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", bench.BODY),
    ("triton_poi_fused_add_mul_5", "elementwise and norms"),
    ("void at::native::vectorized_elementwise_kernel<4>", "elementwise and norms"),
    ("triton_per_fused_sort_sum_2", "masks and the rest"),
    ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "masks and the rest"),
    ("Memset (Device)", "masks and the rest"),
    ("something_new", "masks and the rest")])
def test_names_decide_the_group(name, group):
    assert bench.group_of(name) == group


def test_kernels_are_tabulated_and_the_heads_gemms_found_by_shape():
    def on_gpu(name, us, annotation=False):
        return SimpleNamespace(device_type=DeviceType.CUDA, name=name, is_user_annotation=annotation,
                               time_range=SimpleNamespace(elapsed_us=lambda: us))

    def on_cpu(name, shapes, *kernels):
        return SimpleNamespace(device_type=DeviceType.CPU, name=name, input_shapes=shapes,
                               kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels])

    rows = bench.tabulate([
        on_gpu("nvjet_a", 10), on_gpu("nvjet_a", 30), on_gpu("nvjet_a", 32), on_gpu("nvjet_b", 20),
        on_gpu("mlp_gemm_kernel", 7), on_gpu("## whole step ##", 1000, annotation=True),
        on_cpu("aten::mm", [[512, 64], [64, 384]], ("nvjet_a", 30)), on_cpu("aten::mm", [[512, 64]], ("nvjet_a", 10)),
        on_cpu("aten::mm", [[384, 512], [512, 64]], ("nvjet_b", 20)), on_cpu("aten::mul", [[384, 64], []]),
        on_cpu("CompiledFunction", [[384, 64]], ("mlp_gemm_kernel", 7))], num_steps=2, head_rows=384)
    assert {(row["name"], row["group"]): (row["calls_per_step"], row["us_per_step"]) for row in rows} == {
        ("nvjet_a", bench.BODY): (1, 21), ("nvjet_a", bench.HEAD): (0.5, 15), ("nvjet_b", bench.HEAD): (0.5, 10),
        ("mlp_gemm_kernel", bench.BODY): (0.5, 3.5)}
    assert [row["us_per_step"] for row in rows] == [21, 15, 10, 3.5]


def test_the_profilers_events_have_the_fields_that_are_tabulated():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(torch.ones(4, 5), torch.ones(5, 6))
    product, = (event for event in profiler.events() if event.name == "aten::mm")
    assert product.input_shapes == [[4, 5], [5, 6]]
    product.append_kernel("nvjet_a", 0, 3.0)
    product.device_type = DeviceType.CPU
    assert [(row["group"], row["us_per_step"]) for row in bench.tabulate([product], 1, head_rows=6)
            if row["calls_per_step"] > 0] == [(bench.HEAD, 3.0)]


def test_diff_finds_gained_lost_slower_and_faster():
    before = [kernel("triton_red_fused_a_1", 300, 3), kernel("triton_red_fused_a_22", 200, 2),
              kernel("triton_poi_fused_b_3", 100), kernel("nvjet_128x256_4", 5000), kernel("cross_entropy_kernel", 400),
              kernel("nvjet_128x256_8", 60)]
    after = [kernel("triton_red_fused_a_9", 900, 5), kernel("triton_poi_fused_c_3", 150),
             kernel("nvjet_128x256_4", 5010), kernel("cross_entropy_kernel", 250)]
    changes = bench.diff_profiles(before, after)
    assert [(c["kind"], c["name"], c["us"], c["calls"]) for c in changes] == [
        ("slower", "triton_red_fused_a", 400, "5 -> 5"), ("faster", "cross_entropy_kernel", -150, "1 -> 1"),
        ("gained", "triton_poi_fused_c", 150, "0 -> 1"), ("lost", "triton_poi_fused_b", -100, "1 -> 0"),
        ("lost", "nvjet_128x256_8", -60, "1 -> 0")]  # a library's last number is a size
    assert bench.diff_profiles(before, before) == []


def test_diff_is_printed_without_a_gpu(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, us in zip(paths, (2000, 1500)):
        bench.write_json(path, {"kernels": [kernel("mlp_gemm_kernel", us), kernel("nvjet_a", 1000)]})
    bench.main(["--diff", *map(str, paths)])
    out = capsys.readouterr().out
    assert "faster" in out and "-0.500 ms" in out and "mlp_gemm_kernel" in out and "nvjet_a" not in out
    body, = (line for line in out.splitlines() if line.startswith(bench.BODY))
    assert body.split()[-3:] == ["3.000", "2.500", "-0.500"]
    assert sorted(tmp_path.iterdir()) == paths  # nothing unfinished is left


def test_blocks_run_in_the_order_a_b_b_a(pretended_gpu):
    order = []

    def call(name):
        order.append(name)
        start = len(order)
        times = [SimpleNamespace(at=at, elapsed_time=lambda end, at=at: end.at - at) for at in (0, start, 3 * start)]
        return times

    ms = bench.interleave({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2, block=2)
    assert "".join(order) == "aabbbbaa" * 2
    assert ms["a"].shape == ms["b"].shape == (2, 4, 2)
    assert ms["a"][1].tolist() == [[9, 18], [10, 20], [15, 30], [16, 32]]
    assert bench.spread(np.array([1, 2, 3, 4, 10]))["median"] == 3


@pytest.fixture
def pretended_gpu(monkeypatch):
    pretended_gpu_module.pretend(monkeypatch)


def run(folder, *arguments: str) -> dict:
    """`main` with these arguments: the results in its file."""
    path = folder / "results.json"
    bench.main([*arguments, "--json", str(path)])
    results = json.loads(path.read_text())
    assert {name: results.pop(name) for name in pretended_gpu_module.FACTS} == pretended_gpu_module.FACTS
    return results


def test_comparison_reports_every_figure(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "profile_side", lambda side, *_: [kernel("nvjet_a", 7.0)])
    results = run(tmp_path, "--sides", "plain,ours", "--windows", "3,27", "--profile", str(tmp_path / "p"))
    one = {"median": 1, "lower_quartile": 1, "upper_quartile": 1}
    side = {"forward_ms": one, "backward_ms": one, "sum_ms": {name: 2 for name in one}, "saved_gb": 3, "peak_gb": 5}
    window = {"sides": {"plain": side, "ours": side}, "ratio": 1, "ratio_by_round": [1, 1], "gpu_before": "1980 MHz",
              "gpu_after": "1980 MHz"}
    assert results.pop("windows") == {"3": window, "27": window}
    assert results["config"]["seq_len"] == 256 and results.keys() == {"config"}
    for name in ("plain", "ours"):
        profile = json.loads((tmp_path / f"p.{name}.json").read_text())
        assert profile == {**bench.environment(), "side": name, "window": 3, "kernels": [kernel("nvjet_a", 7.0)]}
    assert "plain/ours 1.0000" in capsys.readouterr().out


def test_windows_are_weighted_as_in_the_run_and_saved_as_they_come(pretended_gpu, monkeypatch, tmp_path, capsys):
    """ours/baseline: the windows' ratios are 1 to 6, of a baseline that always takes a millisecond."""
    saved, ratio = [], iter(range(1, 7))
    monkeypatch.setattr(bench, "compare_sides", lambda sides, *_: {"sides": {
        side.name: {"sum_ms": {"median": next(ratio) if side.name == "ours" else 1}} for side in sides}})
    bench.run_comparison(["ours", "baseline"], [*bench.WINDOW_WEIGHTS], None, *bench.full_size(),
                         lambda results: saved.append((len(results["windows"]), results.get("weighted_ratio"))))
    weights = [*bench.WINDOW_WEIGHTS.values()]
    weighted = sum(weight * n for n, weight in enumerate(weights, 1)) / sum(weights)
    assert saved == [*((n, None) for n in range(1, 7)), (6, pytest.approx(weighted))]
    assert f"weighted as in the run: {weighted:.4f}" in capsys.readouterr().out


def test_optimizers_are_compared_on_one_rank_and_on_one_of_eight(pretended_gpu, monkeypatch, tmp_path, capsys):
    sent, exchange = [], torch.distributed.all_to_all_single
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda received, *args, **kwargs: (
        sent.append(torch.distributed.get_world_size()), exchange(received.zero_(), *args, **kwargs))[1])
    ranks = run(tmp_path, "--optimizer")["ranks"]
    assert set(ranks) == {"1", "8"} and set(sent) == {8} and not torch.distributed.is_initialized()
    for result in ranks.values():
        assert result["ratio"] == 1 and set(result["optimizers"]) == {"ours", "frozen"}
        for row in result["optimizers"].values():
            assert row["median"] == 1 and row["peak_gb"] == 15 - 13  # as the pretended GPU tells
            assert row["states_gb"] == pytest.approx(13 - 10, abs=0.01)  # less the gradients
    assert capsys.readouterr().out.count("ours/frozen 1.0000") == 2


def test_kernels_are_compared_with_what_they_replace(pretended_gpu, tmp_path, capsys):
    results, config = run(tmp_path, "--kernels")["kernels"], small_config()
    assert {name: len(row["versions"]) for name, row in results.items()} == {
        "mlp_up": 3, "mlp_down_grad": 2, "cross_entropy": 2, "embedding_grad": 2,
        "symmetric_product, 4 matrices": 2, "symmetric_product, 32 matrices": 2,
        "symmetric_product plus x, 4 matrices": 2, "symmetric_product plus x, 32 matrices": 2}
    T, C, V = config.seq_len, config.model_dim, config.vocab_size
    assert results["mlp_up"]["work"] == 2 * T * C * 4 * C / 1e12
    assert results["cross_entropy"]["work"] == pytest.approx(2 * T * 384 * 2 / 1e9)  # read and written, in bf16
    assert results["embedding_grad"]["work"] == pytest.approx(7 * (T + V) * C * 2 / 1e9)
    assert capsys.readouterr().out.count("1.000") >= 17 * 4


def test_a_configuration_that_fails_is_a_row_of_the_sweep(pretended_gpu, tmp_path, capsys):
    sweep = run(tmp_path, "--sweep-attention")["attention"]
    assert [*sweep] == ["14", "7"]
    for swept in sweep.values():
        times = [(row.get("forward_ms"), row.get("backward_ms"), row.get("failed")) for row in swept["candidates"]]
        failed = (None, None, "RuntimeError: out of resource")
        assert len(times) == 2 + 11 + 7 and times.count(failed) == 2 and times.count((1, 1, None)) == 17
        assert (None, None, "FloatingPointError: attention or a gradient is not finite") in times
        assert swept["best"] == {"options": {}, "forward_ms": 1, "backward_ms": 1}
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("failed: ") for line in lines) == 2 * 3 and lines[-1].startswith("failed")


def test_the_sweep_chooses_for_each_window_and_prints_what_to_paste(pretended_gpu, monkeypatch, tmp_path, capsys):
    """Long windows win by a forward's and a backward's options, which are then timed together; short ones by noise."""
    def time_attention(options, qkv, dy, masks, scale):
        ms = [3.0 - (options.get("fwd_BLOCK_N") == 64) - (options.get("fwd_num_stages") == 4),
              4.0 - (options.get("bwd_num_warps") == 8)]
        return [{"options": options, "forward_ms": ms[0] if mask is masks[0] else 3 + 0.001 * ms[0],
                 "backward_ms": ms[1] if mask is masks[0] else 4.0} for mask in masks]

    monkeypatch.setattr(bench, "time_attention", time_attention)
    sweep = run(tmp_path, "--sweep-attention")["attention"]
    both = {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 4, "fwd_num_warps": 4, "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64, "bwd_num_stages": 2, "bwd_num_warps": 8}
    assert sweep["14"]["best"] == sweep["14"]["candidates"][-1] == {"options": both, "forward_ms": 1, "backward_ms": 3}
    assert both not in [row["options"] for row in sweep["7"]["candidates"]]
    capsys.readouterr()
    (tmp_path / "book.json").write_text(json.dumps({"gpu": "X", "torch": "2.x", "stages": {"e": {"result": {
        "attention": sweep}}}}))
    for file, gpu in (("results.json", "none"), ("book.json", "X")):
        bench.main(["--choose", str(tmp_path / file)])
        out = capsys.readouterr().out
        exec(out, pasted := {})
        assert (pasted["LONG_WINDOW_KERNEL"], pasted["SHORT_WINDOW_KERNEL"]) == (both, {})
        assert max(map(len, out.splitlines())) <= 120
        assert f"on {gpu}, torch 2.x" in out and "# window 14: 4.000 ms, untuned 7.000" in out


def test_main_on_a_gpu_refuses_what_it_could_not_write(pretended_gpu, tmp_path):
    with pytest.raises(tgm.UserError, match="its folder does not exist"):
        bench.main(["--profile", str(tmp_path / "missing" / "p")])
    with pytest.raises(tgm.UserError, match="give it without --kernels"):
        bench.main(["--profile", str(tmp_path / "p"), "--kernels"])


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """No GPU, one hand-written kernel, and counted bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = SimpleNamespace(name="some_kernel", registers=168, shared_bytes=98304, num_warps=8, spill_store_bytes=12,
                           spill_load_bytes=34)
    monkeypatch.setitem(sys.modules, "kernel_specs", SimpleNamespace(compile_kernels=lambda: [spec]))
    monkeypatch.setattr(bench, "find_spec", lambda name: spec)
    passes = {"forward": {"fused": 60.0, "gemm": 40.0}, "backward": {"fused": 100.0, "gemm": 0.0}}
    counts = {"date": "2026-01-02", "torch": "2.10.0", "twin": passes | {"all_but_attention": 290.0, "saved": 48.0},
              "fast": passes | {"all_but_attention": 245.0, "saved": 36.0}}
    monkeypatch.setattr(bench, "KERNEL_BYTES", tmp_path / "kernel_bytes.json")
    bench.KERNEL_BYTES.write_text(json.dumps(counts))


def test_without_a_gpu_counts_are_printed(counted, capsys):
    bench.print_counts([2], small_config())
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in map(str.strip, out.splitlines())}
    assert "times on a CPU mean nothing" in out.splitlines()[0]
    assert {bench.BODY, bench.HEAD, "attention, window 2"} <= lines.keys()
    ours, twin = (float(bytes_per_token.replace(",", "")) for bytes_per_token in
                  (out.split("ours ")[1].split(", plain")[0], out.split("plain twin ")[1].split(", ratio")[0]))
    assert 0 < ours < twin
    assert lines["some_kernel"][1:] == ["168", "98304", "8", "12", "34"]
    assert lines["all_but_attention"][1:] == ["290.00", "245.00", "0.84"]
    assert lines["backward fused"][2:] == ["100.00", "100.00", "1.00"] and lines["backward gemm"][-1] == "-"


def test_what_cannot_be_counted_is_said(counted, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    bench.KERNEL_BYTES.unlink()
    bench.main([])
    out = capsys.readouterr().out
    assert "triton is not installed" in out and "kernel_bytes.json is missing" in out
    assert "77.5 (QKV 18.6, O 6.2, MLP 52.8)" in out


@pytest.mark.parametrize("arguments, sentence", [
    (["--sides", "ours,fast"], "--sides ours,fast: give two different names of ours, plain, baseline"),
    (["--sides", "ours,ours"], "--sides ours,ours: give two different names"),
    (["--windows", "3,28"], "--windows 3,28: give all, or some of 1 to 27"),
    (["--kernels"], "--kernels needs a CUDA GPU"),
    (["--sweep-attention"], "--sweep-attention needs a CUDA GPU"),
    (["--profile", "x"], "--profile needs a CUDA GPU"),
    (["--json", "x.json"], "--json needs a CUDA GPU"),
    (["--choose", bench.KERNEL_BYTES.__fspath__()], ".*kernel_bytes.json holds no sweep: make one with"),
    (["--diff", "missing.json", "missing.json"], "missing.json is not there or not a profile")])
def test_bad_input_gets_a_sentence(arguments, sentence, counted):
    with pytest.raises(tgm.UserError, match="^" + sentence):
        bench.main(arguments)


def test_the_tool_runs_from_anywhere_and_ends_with_one_line(tmp_path):
    done = subprocess.run([sys.executable, bench.__file__, "--sides", "ours,fast"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --sides ours,fast: ") and done.stderr.count("\n") == 1


def test_the_readme_shows_the_modelled_step():
    tool = helpers.RECORDS / "tools" / "bench" / "step_model.py"
    out = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True).stdout
    *tables, summary = out.strip().split("\n\n")
    readme = tool.with_name("README.md").read_text()
    for table in tables:
        assert table in readme
    ms, minutes = re.fullmatch(r"mean step (\d+) ms, ([\d.]+) minutes", summary).groups()
    assert f"{ms} ms in the mean, {minutes} minutes" in " ".join(readme.split())


@pytest.mark.record
def test_the_plan_of_the_record():
    _, *rows = plan.format_plan(tgm.Config(), 8).splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "mlp_fc bfloat16 67108864 0 134.2 4096 x 1024", "mlp_proj bfloat16 67108864 0 134.2 1024 x 4096",
        "qkvo bfloat16 62914560 4194304 134.2 1024 x 1024", "lm_head float32 51511296 0 206.0 128",
        "scalars float32 99 925 0.0 128", "embeds bfloat16 360242176 0 720.5 128", "all 1329.2",
        "12 collectives in a step"]


def test_one_rank_sends_nothing():
    done = subprocess.run([sys.executable, plan.__file__, "tiny", "1"], capture_output=True, text=True, check=True)
    assert done.stdout == plan.format_plan(tgm.PRESETS["tiny"](), 1) + "\n"
    assert done.stdout.endswith("\n0 collectives in a step\n")


@pytest.mark.parametrize("update, tail", [(0.5, 6), (3, 8)])  # in units of a bank's way: hidden by the third; too long
def test_the_model_of_the_tail_waits_for_what_it_must(update, tail):
    way = step_model.COLLECTIVE_MS + 8e9 * 7 / 8 / (step_model.NVLINK_GBS * 1e6)
    a, b, c = (step_model.Message(name, 8e9, 0, ms) for name, ms in (("a", 0), ("b", update * way), ("c", 0)))
    assert step_model.simulate([[a, b], [c]])["tail"] == pytest.approx(tail * way)
