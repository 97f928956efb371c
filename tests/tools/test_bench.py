"""The benchmark's data, counts and results on a CPU, and the stages that run it: nothing here is timed."""
import json
import re
import subprocess
import sys
from itertools import count, cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

import bench
import helpers
import kernel_specs
import plain_twin
import plan
import stages
import step_model
import train_gpt_medium as tgm
from helpers import CPU, small_config


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


def test_sides_have_the_same_weights_and_no_initial_value():
    config = small_config()
    ours, plain, baseline = bench.make_sides(bench.SIDES, config, CPU).values()
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


def test_without_a_gpu_counts_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--windows", "2"])
    lines = {line[:40].strip(): line[40:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["GEMMs, MLP"] == ["52.777"] and "attention, window 2, this slice's tiles" in lines
    assert 0 < float(lines["ours"][0]) < float(lines["plain"][0])


def test_kernels_are_tabulated_and_compared(monkeypatch, tmp_path, capsys):
    """From the profiler's events: with Inductor's last number, new in every compilation, not with a library's."""
    def on_gpu(name, us, annotation=False):
        return SimpleNamespace(device_type=DeviceType.CUDA, name=name, is_user_annotation=annotation,
                               time_range=SimpleNamespace(elapsed_us=lambda: us))

    before, after = (bench.tabulate([
        on_gpu("triton_red_fused_a_1", us), on_gpu("triton_red_fused_a_22", us), on_gpu(library, 2000),
        on_gpu("triton_poi_fused_b_3", 4), on_gpu("## whole step ##", 9000, annotation=True),
        SimpleNamespace(device_type=DeviceType.CPU, name="aten::mm", is_user_annotation=False)], num_steps=2)
        for us, library in ((1000, "nvjet_128x256_4"), (1500, "nvjet_128x256_8")))
    assert before == {"triton_red_fused_a": [1, 1], "nvjet_128x256_4": [0.5, 1], "triton_poi_fused_b": [0.5, 0.002]}
    for name, kernels in (("before", before), ("after", after)):
        (tmp_path / name).write_text(json.dumps({"profiles": {"ours": kernels}}))
    bench.main(["--diff", str(tmp_path / "before"), str(tmp_path / "after")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["all", "2.002", "2.502", "0.500", "2", "2"], ["nvjet_128x256_4", "1.000", "0.000", "-1.000", "0.5", "0"],
        ["nvjet_128x256_8", "0.000", "1.000", "1.000", "0", "0.5"],
        ["triton_red_fused_a", "1.000", "1.500", "0.500", "1", "1"]]  # the fourth is noise


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

    for name, answer in dict(is_available=True, _sleep=None, is_current_stream_capturing=False, synchronize=None,
                             reset_peak_memory_stats=None, get_device_name="X").items():
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
    """Runs a stage on the small model, its benchmark in this process: the benchmark's file."""
    monkeypatch.setattr(stages, "call", lambda script, *options: bench.main([*map(str, options)], small_config(), CPU))

    def run(key: str) -> dict:
        next(stage for stage in stages.STAGES if stage.key == key).run(job=stages.Job(tmp_path))
        results = json.loads((tmp_path / "bench.json").read_text())
        assert results["gpu"] == "X" and results["torch"] == torch.__version__
        return results
    return run


def test_blocks_run_in_the_order_a_b_b_a(pretended_gpu):
    order = []

    def call(name):
        order.append(name)
        start = len(order)
        return [SimpleNamespace(at=at, elapsed_time=lambda end, at=at: end.at - at) for at in (0, start, 3 * start)]

    ms = bench.interleave({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2, block=2)
    assert "".join(order) == "aabbbbaa" * 2
    assert ms["a"].shape == ms["b"].shape == (2, 4, 2)
    assert ms["a"][1].tolist() == [[9, 18], [10, 20], [15, 30], [16, 32]]
    assert bench.spread(np.array([1, 2, 3, 4, 10]))["median"] == 3


def test_sides_are_compared_at_three_windows_with_every_figure(stage, monkeypatch):
    monkeypatch.setattr(bench, "profile_side", lambda *_: {"nvjet_a": [1, 7.0]})
    results = stage("d")
    one = {"median": 1, "lower_quartile": 1, "upper_quartile": 1}
    side = {"forward_ms": one, "backward_ms": one, "sum_ms": {name: 2 for name in one}, "saved_gb": 3, "peak_gb": 5}
    window = {"sides": {"ours": side, "plain": side}, "ratio": 1, "ratio_by_round": [1, 1]}
    assert results["windows"] == {"14": window, "3": window, "27": window}
    assert results["says"][1] == "window 3: ours 2.0 ms, 5.0 GB, plain 2.0 ms, 5.0 GB"
    assert results["profiles"] == {"ours": {"nvjet_a": [1, 7]}, "plain": {"nvjet_a": [1, 7]}}


def test_optimizers_are_compared_on_one_rank_and_on_one_of_eight(stage, monkeypatch):
    sent, exchange = [], torch.distributed.all_to_all_single
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda received, *args, **kwargs: (
        sent.append(torch.distributed.get_world_size()), exchange(received.zero_(), *args, **kwargs))[1])
    results = stage("k")
    one = {"median": 1, "lower_quartile": 1, "upper_quartile": 1}
    assert results["ranks"] == {size: {"ours": one, "frozen": one} for size in ("1", "8")}
    assert set(sent) == {8} and not torch.distributed.is_initialized()
    assert results["says"][1] == "one of 8 ranks: ours 1.0 ms, frozen 1.0 ms"


def test_kernels_are_compared_with_what_they_replace(stage, monkeypatch, tmp_path):
    results = stage("e")
    assert {name: len(row["versions"]) for name, row in results["kernels"].items()} == {
        "mlp_up": 3, "mlp_down_grad": 2, "cross_entropy": 2, "embedding_grad": 2,
        "symmetric_product, 4 matrices": 2, "symmetric_product, 32 matrices": 2,
        "symmetric_product plus x, 4 matrices": 2, "symmetric_product plus x, 32 matrices": 2}
    assert all(0 < row["error"] < 0.01 for row in results["kernels"].values())
    assert "cross_entropy 1.000 ms, compiled plain, both passes 1.000 ms" in results["says"]
    for error in (0.03, float("nan")):
        monkeypatch.setattr(bench, "kernel_error", lambda case: error if case.name == "mlp_up" else 0.01)
        with pytest.raises(tgm.UserError, match=f"^not within 2% of fp32: {{'mlp_up': {error}}}$"):
            stage("e")
        assert "embedding_grad" in json.loads((tmp_path / "bench.json").read_text())["kernels"]  # the last is timed


def test_a_gradient_that_is_not_finite_is_an_error():
    case = bench.Case("bad", (torch.ones(2),), lambda z: z.clone(), {})
    assert bench.kernel_error(case) == 0
    spoiled = case._replace(ours=lambda z: (z.clone(), z.mul_(torch.nan))[0])
    assert np.isnan(bench.kernel_error(spoiled))


def test_a_configuration_that_fails_is_a_row_of_the_sweep(stage):
    results = stage("f")
    assert [*results["attention"]] == ["14", "7"]
    for rows in results["attention"].values():
        times = [(row.get("forward_ms"), row.get("backward_ms"), row.get("failed")) for row in rows]
        failed = (None, None, "RuntimeError: out of resource")
        assert len(times) == 2 + 11 + 7 and times.count(failed) == 2 and times.count((1, 1, None)) == 17
        assert (None, None, "FloatingPointError: attention or a gradient is not finite") in times
    assert results["says"][0] == "window 14: 2.000 ms, untuned 2.000, 3 configurations fail"


def test_the_sweep_chooses_for_each_window_and_prints_what_to_paste(stage, monkeypatch, tmp_path, capsys):
    """Long windows win by a forward's and a backward's options; short ones by noise."""
    def time_attention(options, qkv, dy, masks, scale):
        ms = [3.0 - (options.get("fwd_BLOCK_N") == 64) - (options.get("fwd_num_stages") == 4),
              4.0 - (options.get("bwd_num_warps") == 8)]
        return [{"options": options, "forward_ms": ms[0], "backward_ms": ms[1]},
                {"options": options, "forward_ms": 3 + 0.001 * ms[0], "backward_ms": 4.0}]

    monkeypatch.setattr(bench, "time_attention", time_attention)
    results = stage("f")
    both = {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 4, "fwd_num_warps": 4, "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64, "bwd_num_stages": 2, "bwd_num_warps": 8}
    (tmp_path / "book.json").write_text(json.dumps({"runs": [{"result": results}, {"result": {}}]}))
    for file in ("bench.json", "book.json"):
        capsys.readouterr()
        bench.main(["--choose", str(tmp_path / file)])
        out = capsys.readouterr().out
        exec(out, pasted := {})
        assert (pasted["LONG_WINDOW_KERNEL"], pasted["SHORT_WINDOW_KERNEL"]) == (both, {})
        assert max(map(len, out.splitlines())) <= 120
        assert f"on X, torch {torch.__version__}" in out and "# window 14: 4.000 ms, untuned 7.000" in out


@pytest.mark.parametrize("arguments, sentence", [
    (["--sides", "ours", "ours"], "argument --sides: ours against itself: name two"),
    (["--windows", "3", "28"], "argument --windows: invalid choice: 28"),
    (["--profile", "--kernels"], "argument --profile: it profiles two sides"),
    (["--kernels"], "a measurement needs a CUDA GPU and none is visible"),
    (["--json", "x.json"], "a measurement needs a CUDA GPU and none is visible"),
    (["--choose", bench.__file__], f"{bench.__file__} has no attention: make it with --sweep-attention"),
    (["--diff", "missing.json", "missing.json"], "missing.json has no profiles: make it with --profile")])
def test_bad_input_gets_a_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((SystemExit, tgm.UserError)) as caught:
        bench.main(arguments)
    assert sentence in f"{capsys.readouterr().err}{caught.value}"


def test_a_file_that_could_not_be_written_is_refused_before_the_measurement(pretended_gpu, tmp_path):
    with pytest.raises(tgm.UserError, match="its folder does not exist"):
        bench.main(["--json", str(tmp_path / "missing" / "p")])


def test_the_tool_runs_from_anywhere_and_ends_with_one_line(tmp_path):
    command = [sys.executable, bench.__file__, "--choose", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: x has no attention: ") and done.stderr.count("\n") == 1


def test_the_readme_shows_the_modelled_step():
    tool = helpers.RECORDS / "tools" / "bench" / "step_model.py"
    out = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True).stdout
    *tables, summary = out.strip().split("\n\n")
    readme = tool.with_name("README.md").read_text()
    for table in tables:
        assert table in readme
    ms, minutes = re.fullmatch(r"mean step (\d+) ms, ([\d.]+) minutes", summary).groups()
    assert f"{ms} ms in the mean, {minutes} minutes" in " ".join(readme.split())


def test_a_table_of_kernels_counts_equal_ones_and_is_read_back():
    spec = kernel_specs.CompiledKernel("validation", 4, 32, 0, 0, 1024, "XBLOCK=8,YBLOCK=4", "triton_poi_fused_add_3")
    other = spec._replace(config="-", spill_store_bytes=8)
    twice = [spec, spec._replace(name="triton_poi_fused_add_12")]
    table = kernel_specs.format_table({"medium": [*twice, other], "short": [other]})
    named = [k._replace(name="triton_poi_fused_add") for k in (spec, other)]
    spills, *shown = kernel_specs.with_spills_first(table).splitlines()
    assert spills == "triton_poi_fused_add spills: a thread stores 8 bytes and loads 0" and shown[0] == ""
    assert kernel_specs.read_table("\n".join([spills, *shown, ""])) == named
    assert [line.split()[:2] for line in table.splitlines()] == [["medium", "short"], ["2", "0"], ["1", "1"]]


@pytest.mark.parametrize("version", ["2.11", "2.13"])  # the oldest that has been compiled for, the pinned one
def test_every_kernel_of_a_run_has_been_compiled_for_an_h100(version):
    folder = helpers.RECORDS / "tools" / "bench"
    text, readme = (folder / f"kernel_specs_{version}.txt").read_text(), (folder / "README.md").read_text()
    assert f", torch {version}." in text.splitlines()[0]
    kernels = kernel_specs.read_table(text)
    kernel_specs.refuse_too_large(kernels)
    by_hand = {k.name.split("(")[0] for k in kernels if k.phase == "hand-written"}
    assert by_hand == {name for name in dir(tgm) if name.endswith("_kernel")}
    assert {k.phase for k in kernels if "flex_attention" in k.name and k.name.startswith("triton_tem")} == {
        "training-forward", "training-backward", "validation"}
    assert {k.phase for k in kernels if k.name.startswith("triton_poi")} == {
        "training-forward", "training-backward", "validation", "updates-1-rank", "updates-8-ranks"}
    assert all(k.name in readme for k in kernels if k.spill_store_bytes + k.spill_load_bytes)


def test_the_readme_sums_up_the_tables_of_kernels():
    folder = helpers.RECORDS / "tools" / "bench"
    phases = {"training-forward": "training, forward", "validation": "validation",
              "training-backward": "training, backward", "updates-1-rank": "updates, one rank",
              "updates-8-ranks": "updates, 8 ranks", "hand-written": "hand-written"}
    for phase, label in phases.items():
        columns = []
        for version in ("2.11", "2.13"):
            lines = [line.split() for line in (folder / f"kernel_specs_{version}.txt").read_text().splitlines()]
            rows = [[int(row[i]) for i in (0, 1, 4, 7)] for row in lines if row[2:3] == [phase]]
            medium, short, registers, shared = zip(*rows)
            columns.append([sum(medium), sum(short), max(registers), f"{max(shared):,}"])
        row = " | ".join(f"{older} / {newer}" for older, newer in zip(*columns))
        assert f"| {label} | {row} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("arguments, sentence", [(["shrt"], "'shrt' is not a preset"), (["short"], "a CUDA build")])
def test_presets_that_cannot_be_compiled_get_a_sentence(monkeypatch, arguments, sentence):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(tgm.UserError, match=sentence):
        kernel_specs.main(arguments)


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
