"""The loop: warm-up without a trace, the log, repeatability, and what stops a run."""
import os
import re
import threading

import numpy as np
import pytest
import torch

import train_gpt_medium as tgm
from helpers import ALONE, CPU, random_ids, same, small_config, tensors, write_text_folder


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A folder to run in, and a configuration of seconds with shards of random ids: fp32, in which CPUs are fast."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # these runs are a CPU's, on any machine
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DATA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return write_text_folder(tmp_path / "shards", small_config(
        dtype=torch.float32, num_slices=2, seq_len=128, val_seq_len=128, val_tokens=512))


def read_log(folder) -> str:
    (path,) = (folder / "logs").iterdir()
    return path.read_text()


def test_warm_up_leaves_no_trace(tiny_run):
    config = tgm.replace(tiny_run, dtype=torch.bfloat16)  # with mantissas, which are states too
    torch.manual_seed(0)
    model = tgm.GPT(config)
    optimizer = tgm.Optimizer(model, config, ALONE)
    loader = tgm.TrainLoader(tgm.find_shards(config)[0], config, ALONE)
    storages = [p.data_ptr() for p in model.parameters()]

    def state() -> dict:
        return tensors({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "training": model.training,
                        "grads": [p.grad for p in model.parameters()], "rng": torch.get_rng_state(),
                        "numpy": [str(part) for part in np.random.get_state()],
                        "loader": loader.source.gi_frame.f_locals["batch"]})

    loader.pending.result()
    before = state()
    touched = []
    step = optimizer.step
    optimizer.step = lambda n: (step(n), touched.append(n))
    tgm.warm_up(model, optimizer, ALONE)
    after = state()
    assert touched == [0, 3]  # spread over six iterations, an outer step among them
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []
    assert [p.data_ptr() for p in model.parameters()] == storages
    assert not optimizer.adamw.state and not optimizer.snoo.sgd.state
    loader.close()

    # And what follows is what would have followed without it.
    torch.manual_seed(0)
    fresh = tgm.GPT(config)
    fresh_optimizer = tgm.Optimizer(fresh, config, ALONE)
    tokens = random_ids(2 * 128 + 1, config)
    for n in range(3):
        for m, o in ((model, optimizer), (fresh, fresh_optimizer)):
            tgm.train_step(m, o, *tgm.split_slices(tokens, 128), n)
    for (name, p), q in zip(model.named_parameters(), fresh.named_parameters()):
        assert torch.equal(p, q[1]), name


def test_warm_up_also_runs_validation(tiny_run, monkeypatch):
    config, seen, latents = tgm.replace(tiny_run, val_seq_len=256), [], tgm.GPT.latents
    monkeypatch.setattr(tgm.GPT, "latents",
                        lambda self, ids, w: seen.append((torch.is_grad_enabled(), len(ids))) or latents(self, ids, w))
    model = tgm.GPT(config)
    tgm.warm_up(model, tgm.Optimizer(model, config, ALONE), ALONE)
    assert seen == [(True, 128)] * 4 + [(False, 256)]


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


def test_log_lines_are_on_disk_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = tgm.Log("run", ALONE)
    log("a line")
    assert log.path.read_text() == "a line\n"


def test_ranks_share_the_seed_of_rank_0(monkeypatch):
    monkeypatch.setattr(tgm.dist, "broadcast", lambda tensor, src: tensor.fill_(42))
    assert tgm.draw_seed(small_config(seed=None), tgm.World(1, 2, CPU)) == 42


def test_bf16_micro_batches_are_averaged_in_fp32():
    torch.manual_seed(0)
    p, grads = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)), torch.randn(8, 1000).bfloat16()

    class Model:
        config = small_config()

        def __call__(self, ids, targets, window_blocks):
            return (p * grads[int(ids[0])]).sum()

    class Catcher:
        params = [p]

        def step(self, step):
            self.caught = p.grad.clone()

    catcher = Catcher()
    tgm.train_step(Model(), catcher, torch.arange(8)[:, None], torch.zeros(8, 1), 0)
    exact = grads.double().mean(0)  # one rounding to bf16, and fp32's of numbers of order one
    assert ((catcher.caught.double() - exact).abs() <= exact.abs() * 2 ** -8 + 1e-6).all()


def test_log_is_the_whole_truth(tiny_run, tmp_path, capsys):
    """Of a whole run in the record's dtypes."""
    config = tgm.replace(tiny_run, dtype=torch.bfloat16)
    val_loss = tgm.main(config)
    log = read_log(tmp_path)
    source, environment, steps = log.split("=" * 100 + "\n")[-3:]
    assert log.startswith(open(tgm.__file__).read())
    for name, value in vars(config).items():
        assert f"{name} = {value!r}" in environment
    assert f"PyTorch {torch.__version__}" in environment and "seed drawn or given: 1\n" in environment
    assert "SYNTHETIC" not in environment
    number, scalar = r"\d+\.\d+", r"-?\d+\.\d{6,}"
    validation = re.compile(rf"step:(\d+)/6 val_loss:({scalar}) train_time:(\d+)ms step_avg:{number}ms "
                            rf"smear_lambda:({scalar}) backout_lambda_0:{scalar} backout_lambda_1:{scalar}")
    training = re.compile(rf"step:(\d+)/6 train_time:(\d+)ms step_avg:{number}ms")
    lines = steps.splitlines()
    validations = [found.groups() for line in lines if (found := validation.fullmatch(line))]
    trainings = [found.groups() for line in lines if (found := training.fullmatch(line))]
    assert [int(groups[0]) for groups in validations] == [0, 4, 6]  # the last one out of turn
    assert [int(groups[0]) for groups in trainings] == [1, 2, 3, 4, 5, 6]
    assert len(lines) == 10 and re.fullmatch(r"peak memory: \d+ MiB resident", lines[-1])
    assert float(validations[-1][1]) == pytest.approx(val_loss, abs=1e-6)
    assert float(validations[0][3]) == 0 != float(validations[-1][3])
    times = [int(groups[2]) for groups in validations]
    assert times[0] == 0 and times == sorted(times)
    assert validations[-1][0] in capsys.readouterr().out


def test_without_smear_mtp_the_log_has_no_lambda(tiny_run, tmp_path):
    tgm.main(tgm.replace(tiny_run, smear_mtp=False))
    lines = [line for line in read_log(tmp_path).splitlines() if line.startswith("step:") and "val_loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert "smear_lambda" not in line and "backout_lambda_1:" in line


def losses_of(folder) -> list[str]:
    return [re.findall(r"^step:\d+/\d+ (val_loss:\S+) .* (smear_lambda.*)$", path.read_text(), re.M)
            for path in sorted((folder / "logs").iterdir(), key=os.path.getmtime)]


def test_a_seed_repeats_a_run_and_none_draws_one(tiny_run, tmp_path):
    for seed in (1, 1, None, None):
        tgm.main(tgm.replace(tiny_run, seed=seed, num_iterations=2, val_every=1))
    first, again, *drawn = losses_of(tmp_path)
    assert first == again and len(first) == 3
    assert len({str(run[-1]) for run in [first, *drawn]}) == 3


def test_synthetic_shards_are_named_as_such_in_the_log(tiny_run, tmp_path):
    for path in (tmp_path / "shards").iterdir():
        path.rename(path.with_name(path.name.replace("text", "synthetic")))
    tgm.main(tgm.replace(tiny_run, num_iterations=1))
    assert "SYNTHETIC" in read_log(tmp_path).split("=" * 100 + "\n")[-2]


def test_validation_is_untimed(tiny_run, tmp_path, monkeypatch):
    clocks, running = [], []

    class Watched(tgm.Clock):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            clocks.append(self)

    evaluate = tgm.evaluate
    monkeypatch.setattr(tgm, "Clock", Watched)
    monkeypatch.setattr(tgm, "evaluate", lambda *args: running.append(clocks[0].started is not None) or evaluate(*args))
    train_step = tgm.train_step
    monkeypatch.setattr(tgm, "train_step", lambda *args: running.append(
        clocks[0].started is not None if clocks else "warm-up") or train_step(*args))
    tgm.main(tiny_run)
    assert running == ["warm-up"] * 2 + [False] + [True] * 4 + [False] + [True] * 2 + [False]


def test_validation_uses_the_window_after_the_completed_steps(tiny_run, monkeypatch):
    config = tgm.replace(tiny_run, num_iterations=4, val_every=1, warmup_steps=0)
    seen = []
    latents = tgm.GPT.latents
    monkeypatch.setattr(tgm.GPT, "latents",
                        lambda self, ids, w: seen.append((torch.is_grad_enabled(), int(w))) or latents(self, ids, w))
    tgm.main(config)
    windows = [tgm.num_window_blocks(step, config) for step in range(5)]
    assert len(set(windows)) >= 3
    order = [w for i, w in enumerate(seen) if i == 0 or w != seen[i - 1]]
    expected = [(False, 1)]  # the warm-up's look at validation
    for step, w in enumerate(windows):
        expected += [(False, w)] + ([(True, w)] if step < 4 else [])
    assert order == [w for i, w in enumerate(expected) if i == 0 or w != expected[i - 1]]


def test_micro_batches_are_all_used(tiny_run):
    """The gradient of a step is the mean over its slices: checked against one slice at a time."""
    torch.manual_seed(0)
    model = tgm.GPT(tiny_run)
    with torch.no_grad():
        model.lm_head.normal_(std=0.1)
    inputs, targets = tgm.split_slices(random_ids(8 * 128 + 1, tiny_run), 128)
    w = tgm.as_window(tgm.num_window_blocks(0, tiny_run), CPU)
    total = torch.stack([model(ids, target, w) for ids, target in zip(inputs, targets)]).mean()
    total.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    caught = []

    class Catcher:
        params = list(model.parameters())

        def step(self, step):
            caught.extend(p.grad.clone() for p in self.params)

    loss = tgm.train_step(model, Catcher(), inputs, targets, 0)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for (name, _), ours, mean in zip(model.named_parameters(), caught, expected):
        assert (ours - mean).norm() <= 1e-5 * mean.norm(), name


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_run, tmp_path):
    with pytest.raises(tgm.UserError, match="the loss of step 2 was not finite.*No checkpoint was kept"):
        tgm.main(tgm.replace(tiny_run, embed_lr=float("inf")))
    assert "step:4/6 train_time" in read_log(tmp_path)  # what was done is in the log


def test_a_run_ends_without_threads_left(tiny_run):
    before = set(threading.enumerate())
    tgm.main(tgm.replace(tiny_run, num_iterations=1, warmup_steps=0))
    for thread in set(threading.enumerate()) - before:
        if "ThreadPoolExecutor" in thread.name:
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_logs_that_cannot_be_written_are_refused(tiny_run, tmp_path):
    (tmp_path / "logs").write_text("a file in the folder's place")
    with pytest.raises(tgm.UserError, match="logs"):
        tgm.main(tiny_run)
