"""The loop: warm-up without a trace, the log, repeatability, and what stops a run."""
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import audit
import run_log
import train_gpt_medium as tgm
from helpers import ALONE, CPU, DISTINCT_PRESETS, FEW_LAYERS, Watch, enter, same, small_config, write_text_folder

SIZES = dict(layers=FEW_LAYERS, backout_from=1, dtype=torch.float32, num_slices=2, seq_len=128, val_seq_len=128,
             val_tokens=512)


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A folder to run in, and a configuration of seconds with shards of random ids: fp32, in which CPUs are fast."""
    enter(tmp_path, monkeypatch)
    return write_text_folder(tmp_path / "shards", small_config(**SIZES))


def read_log(folder) -> str:
    (path,) = (folder / "logs").iterdir()
    return path.read_text()


def test_warm_up_leaves_no_trace(tiny_run):
    config = tgm.replace(tiny_run, dtype=torch.bfloat16)  # with mantissas, which are states too
    model = config.make_model()
    optimizer = tgm.Optimizer(model, config, ALONE)
    storages, touched, step = [p.data_ptr() for p in model.parameters()], [], optimizer.step
    before = audit.traces(model, optimizer)
    optimizer.step = lambda n: (step(n), touched.append(n))
    tgm.warm_up(model, optimizer, ALONE)
    after = audit.traces(model, optimizer)
    assert touched == [0, 3]  # spread over six iterations, an outer step among them
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []
    assert [p.data_ptr() for p in model.parameters()] == storages


def test_warm_up_also_runs_validation_and_holds_no_second_copy_on_the_device(tiny_run, monkeypatch):
    """Its peak is that of the steps it takes; putting states back takes nothing beyond them."""
    config, seen, forward = tgm.replace(tiny_run, val_seq_len=256), [], tgm.GPT.forward
    monkeypatch.setattr(tgm.GPT, "forward", lambda self, ids, *rest, **inputs: seen.append(
        (torch.is_grad_enabled(), len(ids))) or forward(self, ids, *rest, **inputs))
    peaks = []
    for warms_up in (True, False):
        with Watch([]) as watch:
            model = config.make_model()
            optimizer = tgm.Optimizer(model, config, ALONE)
            watch.peak = watch.live
            optimizer.reset_states()
            assert watch.peak == watch.live
            if warms_up:
                tgm.warm_up(model, optimizer, ALONE)
            else:
                ids = torch.zeros(2, 128, dtype=torch.int32)
                for step in (0, 3):
                    tgm.train_step(model, optimizer, ids, ids.long(), step)
        peaks.append(watch.peak)
    assert seen == [(True, 128)] * 4 + [(False, 256)] + [(True, 128)] * 4
    assert abs(peaks[0] - peaks[1]) < 100, peaks  # single numbers


def test_the_clock_adds_up_its_stretches_and_waits_for_all_ranks(monkeypatch):
    now, waits = iter([10.0, 13.0, 20.0, 24.0]), []
    monkeypatch.setattr(tgm.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(tgm.dist, "barrier", lambda: waits.append(1))
    clock = tgm.Clock(tgm.World(0, 2, CPU))
    for total in (3.0, 7.0):
        clock.start()
        clock.stop()
        assert clock.seconds == total
    assert len(waits) == 4


def test_ranks_share_the_seed_of_rank_0(monkeypatch):
    monkeypatch.setattr(tgm.dist, "broadcast", lambda tensor, src: tensor.fill_(42))
    assert tgm.draw_seed(small_config(seed=None), tgm.World(1, 2, CPU)) == 42


def test_a_mean_of_gradients_is_taken_in_fp32_without_another_copy():
    grads = torch.randn(3, 1024).bfloat16().repeat(1, 2 ** 15 + 1)[:, :2 ** 25 + 3]
    mean = torch.zeros(grads.size(1))
    with Watch([mean, grads]) as watch:
        for n, grad in enumerate(grads, start=1):
            tgm.update_mean(mean, grad, n)
    assert watch.peak <= mean.nbytes / 2
    # Rounding of fp32, on numbers of order one.
    torch.testing.assert_close(mean, grads.float().mean(0), rtol=0, atol=4 * 2 ** -24 * grads.abs().max().item())


@pytest.mark.parametrize("preset", DISTINCT_PRESETS)
def test_log_is_the_whole_truth(tiny_run, preset, tmp_path, capsys):
    """Of a whole run."""
    config = small_config(preset, **SIZES, data_dir=tiny_run.data_dir)
    val_loss = tgm.main(config)
    log, (path,) = read_log(tmp_path), (tmp_path / "logs").iterdir()
    run, report = run_log.read_log(path), config.make_model().report()
    assert log.startswith(open(tgm.__file__).read())
    assert {name: repr(value) for name, value in vars(config).items()}.items() <= run.constants.items()
    assert run.environment.torch == torch.__version__ and "\nseed drawn or given: 1\n" in log
    assert "SYNTHETIC" not in log.split("=" * 100 + "\n")[-2] and run.peak_memory_mib > 0
    tokens = np.cumsum([0, *map(config.batch_tokens, range(6))])
    assert run.finished and run.tokens.tolist() == tokens.tolist()
    figures = {"train_loss", *(f"grad_norm_{name}" for name in tgm.Optimizer(config.make_model(), config, ALONE).banks)}
    for step in range(1, 7):
        given, found = {"tokens": tokens[step], **config.step_fields(step - 1)}, run.step_fields[step]
        assert found.keys() == given.keys() | figures and all(found[name] == x for name, x in given.items()), step
    assert [v.step for v in run.validations] == [0, 4, 6]  # the last one out of turn
    assert run.final_loss == pytest.approx(val_loss, abs=1e-6)
    assert [v.extras.keys() for v in run.validations] == [report.keys()] * 3
    assert run.validations[0].extras != run.validations[-1].extras
    times = [0, *(ms for _, ms in run.step_ms)]
    assert run.validations[0].train_ms == 0 and times == sorted(times) and len(times) == 7
    assert f"val_loss:{val_loss:.6f}" in capsys.readouterr().out


def losses_of(folder) -> list[str]:
    return [re.findall(r"^step:\d+/\d+ (val_loss:\S+) .*?ms .*?ms (.*)$", path.read_text(), re.M)
            for path in sorted((folder / "logs").iterdir(), key=os.path.getmtime)]


def test_a_seed_repeats_a_run_and_none_draws_one(tiny_run, tmp_path):
    for seed in (1, 1, None, None):
        tgm.main(tgm.replace(tiny_run, seed=seed, num_iterations=2, val_every=1))
    first, again, *drawn = losses_of(tmp_path)
    assert first == again and len(first) == 3
    assert len({str(run[-1]) for run in [first, *drawn]}) == 3


def test_synthetic_shards_are_named_as_such_in_the_log():
    shards = [tgm.Shard(Path("synthetic_train_000001.bin"), 1000)]
    assert "(SYNTHETIC tokens" in tgm.describe_run(small_config(), shards, seed=1, world=ALONE)


def test_validation_is_untimed(tiny_run, monkeypatch):
    events = []
    for owner, name in ((tgm.Clock, "start"), (tgm.Clock, "stop"), (tgm, "evaluate"), (tgm, "train_step")):
        def noted(*arguments, name=name, function=getattr(owner, name)):
            events.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, noted)
    tgm.main(tiny_run)
    validation, step = ["stop", "evaluate"], ["start", "train_step"]
    assert events == ["train_step"] * 2 + validation + step * 4 + validation + step * 2 + validation


def test_validation_has_the_inputs_after_the_completed_steps(tiny_run, monkeypatch):
    config = tgm.replace(tiny_run, num_iterations=4, val_every=1, kernel_warmup_steps=0)
    seen, forward = [], tgm.GPT.forward
    monkeypatch.setattr(tgm.GPT, "forward", lambda self, *rest, **inputs: seen.append(
        (torch.is_grad_enabled(), {name: x.item() for name, x in inputs.items()})) or forward(self, *rest, **inputs))
    tgm.main(config)
    expected = [(False, config.model_inputs(0))]  # the warm-up's look at validation
    for step in range(5):
        expected += [(False, config.model_inputs(step))] * 4  # 512 tokens in sequences of 128
        expected += [(True, config.model_inputs(step))] * 2 if step < 4 else []
    assert seen == expected


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_run, tmp_path):
    groups = tuple(group._replace(rule=tgm.replace(group.rule, lr=float("inf"))) for group in tiny_run.groups)
    with pytest.raises(tgm.UserError, match="the loss of step 2 was not finite.*No checkpoint was kept"):
        tgm.main(tgm.replace(tiny_run, groups=groups))
    assert "step:4/6 train_time" in read_log(tmp_path)  # what was done is in the log
