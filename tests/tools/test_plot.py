"""records/tools/plot.py: figures of the README's width for every kind of source, and what they are drawn from."""
import numpy as np
import pytest

import plot
import records
import synthetic_logs as logs
from curves import read_curve
from helpers import RECORDS
from run_log import RecordError

imread = pytest.importorskip("matplotlib.image").imread


def test_figures_of_two_sets_of_logs(tmp_path, capsys):
    record = logs.write_record(tmp_path / "record")
    assert records.main(["plot", str(record / "baseline"), str(record), "--out", str(tmp_path / "png")]) == 0
    names = ["loss", "step_time", "lambdas", "final_losses"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "png" / f"{name}.png") for name in names]
    assert {imread(path).shape[1] for path in (tmp_path / "png").iterdir()} == {1760}


def test_committed_figures_are_those_of_the_published_data(tmp_path):
    """Same data, same figures: names, sizes; pixels may differ between versions of a font."""
    folder = RECORDS / "2025-11-02_SmearMTP"
    written = plot.draw([folder], tmp_path)
    assert {path.name for path in written} == {path.name for path in (folder / "figures").iterdir()}
    for path in written:
        assert imread(path).shape == imread(folder / "figures" / path.name).shape


def test_one_unadorned_log_gives_what_it_can(tmp_path):
    path = logs.write_log(tmp_path, logs.Spec(smear_lambda=None, is_old=True))
    assert [p.name for p in plot.draw([path], tmp_path)] == ["loss.png", "step_time.png", "final_losses.png"]
    assert read_curve(path).side.stated("windows") is None


def test_curves_are_means_over_runs(tmp_path):
    specs = [logs.Spec(loss=loss, seed=i, smear_lambda=0.004 * (i + 1)) for i, loss in enumerate((2.918, 2.920))]
    curve = read_curve(logs.write_logs(tmp_path, specs))
    assert curve.losses[-1] == pytest.approx(2.919, abs=1e-6)
    assert curve.stds[-1] == pytest.approx(0.002 / 2 ** 0.5, abs=1e-6)
    mean, sigma = curve.extras["smear_lambda"]
    assert (mean[-1], sigma[-1]) == pytest.approx((0.006, 0.004 / 2 ** 0.5), abs=1e-6)
    steps, ms, _ = curve.step_times
    # 25 steps from validation to validation are off by 1 ms of rounding and 5 deviations of jitter.
    expected = logs.step_ms(specs[0]).reshape(8, 25).mean(1)
    assert steps.tolist() == list(range(0, 201, 25)) and np.abs(ms[:-1] - expected).max() <= (1 + 5 * 0.2 * 5) / 25
    assert (curve.side.stated("windows") == logs.window_blocks(specs[0])).all()


def test_published_curve_has_lambdas_and_step_times():
    curve = read_curve(RECORDS / "2025-11-02_SmearMTP")
    assert set(curve.extras) == {"smear_lambda", "backout_lambda_0", "backout_lambda_1"}
    steps, ms, _ = curve.step_times
    seconds = (np.diff(steps) * ms[:-1]).sum() / 1000
    assert seconds == pytest.approx(np.mean([run.train_seconds for run in curve.side.runs]), abs=0.001)


@pytest.mark.parametrize("vocabulary, is_drawn", [("", True), ("\nvocab_size = 50257", True),
                                                  ("\nvocab_size = 257", False)])
def test_the_target_stands_beside_losses_of_its_task_alone(tmp_path, vocabulary, is_drawn):
    path = logs.write_log(tmp_path, logs.Spec(constants=logs.Spec.constants + vocabulary))
    plt = plot.load_pyplot()
    for drawing in (plot.loss_figure, plot.final_figure):
        figure = drawing(plt, [read_curve(path)])
        assert any("target" in text.get_text() for text in figure.findobj(plt.Text)) == is_drawn
        plt.close(figure)


def test_too_many_sets_and_folders_that_cannot_be_written(tmp_path):
    path = logs.write_log(tmp_path, logs.Spec())
    with pytest.raises(RecordError, match="6 at most"):
        plot.draw([path] * 7, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="name another folder"):
        plot.draw([path], tmp_path / "file")
