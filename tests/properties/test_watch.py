"""Losses and gradient norms: logged with their step; what is not finite ends the run; no step waits for either."""
import contextlib
import math

import pytest
import torch

import train_gpt_medium as tgm
from helpers import ALONE, DISTINCT_PRESETS, run_ranks, small_config

EVERY = 16


def make_watch(world: tgm.World, lines: list[str]) -> tgm.Watch:
    return tgm.Watch(["qkvo"], small_config(watch_every=EVERY), world, lines.append)


def note_all(watch: tgm.Watch, num_steps: int, values: dict[int, tuple[float, float]]) -> None:
    """values: loss and sum of squares by step."""
    for step in range(1, num_steps + 1):
        loss, square = values.get(step, (2.0, 9.0))
        watch.note(step, torch.tensor(loss), [torch.tensor(square)])


@pytest.mark.parametrize("values, sentence", [
    ({3: (math.nan, 1.0)}, "the loss of step 3 was not finite"),
    ({3: (1.0, math.inf)}, "the qkvo gradient of step 3 was not finite"),
    ({3: (1.0, math.inf), 5: (math.nan, math.nan)}, "the qkvo gradient of step 3 was not finite"),
    ({16: (math.nan, math.nan)}, "the loss of step 16 was not finite"),
    ({7: (3e38, 3e38)}, "")])
def test_figures_are_logged_and_the_first_cause_told_one_look_later_or_when_asked(values, sentence):
    for asked in (False, True):
        lines: list[str] = []
        watch = make_watch(ALONE, lines)
        watch.read()  # nothing was asked yet
        note_all(watch, EVERY if asked else 2 * EVERY - 1, values)
        assert lines == []  # no step has waited
        with pytest.raises(tgm.UserError, match=sentence) if sentence else contextlib.nullcontext():
            if asked:
                watch.read()
                watch.ask()
                watch.read()
            else:
                watch.note(2 * EVERY, torch.tensor(1.0), [torch.tensor(1.0)])
        last = min(step for step in (*values, EVERY) if sentence or step == EVERY)
        figures = [values.get(step, (2.0, 9.0)) for step in range(1, last + 1)]
        assert lines == [f"step:{step}/6 train_loss:{loss:.6g} grad_norm_qkvo:{square ** 0.5:.6g}"
                         for step, (loss, square) in enumerate(figures, start=1)]


def two_ranks_of_which_one_is_bad(world: tgm.World) -> list[str]:
    """What both are told; the lines of steps in which they differ."""
    told: list[str] = []
    for bad_rank, bad in ((1, {4: (math.nan, 1.0)}), (0, {9: (1.0, math.nan)})):
        watch = make_watch(world, told)
        try:
            own = {2: (1.0 + world.rank, 2.0 * world.rank)}
            note_all(watch, 3 * EVERY, own | bad if world.rank == bad_rank else own)
        except tgm.UserError as error:
            told.append(str(error))
    return told


def test_all_ranks_stop_together(tmp_path):
    first, second = run_ranks(2, two_ranks_of_which_one_is_bad, folder=tmp_path)
    assert first == second and len(first) == 4 + 1 + 9 + 1
    assert "loss of step 4" in first[4] and "qkvo gradient of step 9" in first[-1]
    # The mean of the losses, the root of the sum of squares.
    assert first[:2] == [f"step:{step}/6 train_loss:{loss} grad_norm_qkvo:{norm}"
                         for step, loss, norm in ((1, 2, 4.24264), (2, 1.5, 1.41421))]


@pytest.mark.parametrize("preset", DISTINCT_PRESETS)
def test_a_step_leaves_the_squares_of_every_bank(preset):
    config = small_config(preset, dtype=torch.float32, num_slices=1, seq_len=128)
    ids = torch.zeros(1, 128, dtype=torch.int32)
    by_role = {name.split(".")[-1]: name for name, _ in config.make_model().named_parameters()}
    for name in by_role.values():
        model = config.make_model()
        optimizer = tgm.Optimizer(model, config, ALONE)
        bad = dict(model.named_parameters())[name]
        bad.register_hook(lambda grad: torch.full_like(grad, math.nan))
        loss = tgm.train_step(model, optimizer, ids, ids.long(), 0)
        assert loss.isfinite()
        for bank_name, bank in optimizer.banks.items():
            assert bank.grad_square.isfinite().item() is not any(p is bad for p in bank.params), (name, bank_name)
