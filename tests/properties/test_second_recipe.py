"""The MUDD recipe on the machine: ranks, resuming, leaks, shards that it refuses, its log."""
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch

import run_log
import train_gpt_medium as tgm
import train_gpt_mudd as mudd
from helpers import ALONE, CPU, RECORDS, assert_one_run, enter, environment, random_ids, randomise, run_main, \
    run_ranks, same, train_and_report, write_shard


def small(**changes) -> mudd.Config:
    """All layers at width 32, twelve steps through all stages: the table is untied after step 3."""
    constants = dict(num_iterations=12, extension_steps=0, num_heads=2, head_dim=16, bigram_rows=640, dense_channels=8,
                     seq_len=512, val_seq_len=512, val_tokens=1024, val_every=4, seed=1,
                     stages=tuple(row._replace(num_slices=8) for row in mudd.PRESETS["mudd_tiny"]().stages))
    return replace(mudd.PRESETS["mudd_tiny"](), **(constants | changes))


def with_shards(folder, config: mudd.Config, *num_tokens: int) -> mudd.Config:
    """Training shards of so many tokens, in documents of about 100, which begin with one."""
    for n, size in enumerate(num_tokens):
        ids = random_ids(size, config, seed=n)
        ids[0] = config.doc_token
        write_shard(folder / f"text_train_{n + 1:06d}.bin", ids)
    write_shard(folder / "text_val_000000.bin", random_ids(config.val_tokens + 1, config, seed=9))
    return replace(config, data_dir=str(folder))


def test_ranks_train_as_one(tmp_path):
    """Three steps, with two lengths of a piece and one update of the tables, on 2, 4 and 8 gloo processes."""
    stages = tuple(row._replace(num_slices=8, seq_len=length) for row, length in zip(small().stages[:2], (128, 256)))
    config = small(num_iterations=3, seq_len=256, val_seq_len=256, stages=(
        stages[0]._replace(until=0.5), stages[1]._replace(until=1.0)))
    config = with_shards(tmp_path, config, 12_000)
    alone = train_and_report(ALONE, config)
    for size in (2, 4, 8):
        # Adam passes on the relative error of a gradient, which is large where its sum nearly cancels (dense_w1: 5e-5).
        assert_one_run(run_ranks(size, train_and_report, config, folder=tmp_path / str(size)), alone, bound=2e-4)


def test_a_resumed_run_is_the_straight_one_bit_for_bit(tmp_path, monkeypatch):
    """Over changes of the stage and of the shard, and over the untying; a signal waits for the tables' update."""
    enter(tmp_path, monkeypatch)
    stages = tuple(row._replace(num_slices=2) for row in small().stages)
    config = with_shards(tmp_path / "shards", small(checkpoint_every=4, stages=stages), 8000, 8000, 8000)
    places = [shard.path.name for shard, _ in tgm.batch_places(tgm.find_shards(config)[0], config)]
    assert places[1] != places[-1]
    straight = run_main(ALONE, config)
    logs, (finished,) = {*(tmp_path / "logs").iterdir()}, (tmp_path / "checkpoints").iterdir()
    stopped = run_main(ALONE, config, stop_after=1)
    assert "SIGTERM ended the run after step 2." in stopped["ended"]
    folder, = (path for path in (tmp_path / "checkpoints").iterdir() if (path / "step_000002").exists())
    resumed = run_main(ALONE, config, resume_from=str(folder))
    assert straight["ended"] == resumed["ended"] == "" and straight["state"].keys() == resumed["state"].keys()
    assert [name for name, x in straight["state"].items() if not same(x, resumed["state"][name])] == []

    run = run_log.read_log(*logs)
    assert run.finished and [v.step for v in run.validations] == [0, 4, 8, 12]
    assert run.tokens.tolist() == [sum(map(config.batch_tokens, range(step))) for step in range(13)]
    assert run.validations[-1].extras["embed_smear_lambda"] != 0
    assert "window_blocks:23 yarn:3 mtp_1:0 mtp_2:0" in next(iter(logs)).read_text()

    weights, settings = RECORDS / "tools" / "weights" / "weights.py", environment(TRAIN_SCRIPT=mudd.__file__)
    answers = [subprocess.run([sys.executable, weights, *arguments], text=True, capture_output=True, env=settings)
               for arguments in (["evaluate", finished, "--data", config.data_dir],
                                 ["sample", finished, "--tokens", "2"])]
    assert f"val_loss:{run.final_loss:.6f}" in answers[0].stdout, answers[0].stderr
    assert answers[1].returncode == 0, answers[1].stderr


@pytest.fixture
def model() -> mudd.GPT:
    torch.manual_seed(0)
    model = mudd.GPT(small(smear_mtp=True))
    randomise(model)
    return model


def different_latents(model: mudd.GPT, ids: torch.Tensor, other: torch.Tensor) -> list[int]:
    """Positions at which the head's inputs differ."""
    inputs = tgm.inputs_at(12, model.config, CPU)
    with torch.no_grad():
        one, other = (model.latents(x, inputs["window_blocks"], inputs["yarn"]) for x in (ids, other))
    return (one != other).any(1).nonzero().flatten().tolist()


def test_a_suffix_never_changes_earlier_latents(model):
    ids = random_ids(256, model.config)
    for cut in (1, 127, 128, 200):
        changed = ids.clone()
        changed[cut:] = (changed[cut:] + 1) % model.config.doc_token
        assert different_latents(model, ids, changed)[0] == cut


CROSSINGS = ("smear of the input", "Smear-MTP", "key shift", "bigrams")


@pytest.mark.parametrize("crossings", [*combinations(CROSSINGS, 0), *combinations(CROSSINGS, 1)], ids=str)
def test_what_crosses_a_documents_border(model, monkeypatch, crossings):
    """The last token of a document reaches the next by each of four ways alone, and never by attention."""
    ids = random_ids(256, model.config, mean_doc=10 ** 9)
    ids[100] = model.config.doc_token
    changed = ids.clone()
    changed[:100] = (changed[:100] + 1) % model.config.doc_token
    with torch.no_grad():
        model.embed_smear_lambda.fill_(float("smear of the input" in crossings))
        model.smear_lambda.fill_(float("Smear-MTP" in crossings))
    if "key shift" not in crossings:
        monkeypatch.setattr(mudd, "shift_still_channels", lambda k: k)
    if "bigrams" not in crossings:
        monkeypatch.setattr(mudd, "bigram_ids", lambda ids, num_rows: ids)
    later = [position for position in different_latents(model, ids, changed) if position >= 100]
    assert bool(later) == bool(crossings)
    if crossings == ("Smear-MTP",):
        assert later == [100]


# ---- bad input

def test_a_shard_without_documents_is_refused(tmp_path):
    config = with_shards(tmp_path, small(), 1000)
    write_shard(tmp_path / "text_train_000001.bin", [7] * 1000)
    with pytest.raises(tgm.UserError, match="holds no document id 256: use shards whose documents begin with it"):
        tgm.find_shards(config)


def test_what_stands_before_the_first_document_is_skipped_and_said_once(tmp_path, capsys):
    config = with_shards(tmp_path, small(num_iterations=2), 8000)
    ids = torch.cat((torch.full((50,), 7, dtype=torch.int32), random_ids(8000, config)))
    ids[50] = config.doc_token
    shard = tgm.Shard(write_shard(tmp_path / "text_train_000001.bin", ids), len(ids))
    for _ in range(2):
        (_, pieces), *_ = tgm.batch_places([shard], config)
    assert pieces[0][0].start == 50
    assert capsys.readouterr().out.count("begins within a document: its first 50 tokens are skipped") == 1


def test_too_few_shards_are_told_with_the_number_that_is_needed(tmp_path):
    config = with_shards(tmp_path, small(), 12_000)
    with pytest.raises(tgm.UserError, match=r"text_train_000002.bin is missing: 12 steps need \d+ training shards"):
        tgm.find_shards(config)
    assert 21 <= tgm.shards_needed(mudd.Config(), []) <= 24  # an estimate, of documents as long as FineWeb's


@pytest.mark.parametrize("changes, sentence", [
    (dict(window_unit=96), "window_unit 96 does not divide a stage's seq_len"),
    (dict(fp8_head=True), "fp8_head needs fused_head and dtype bfloat16"), (dict(num_heads=3), "num_heads is not even"),
    (dict(extension_steps=12), "extension_steps leaves no step"), (dict(late_layer=15), "late_layer 15"),
    (dict(checkpoint_every=3), "checkpoint_every 3 is not a multiple of 2")])
def test_constants_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(tgm.UserError, match=sentence):
        small(**changes)


@pytest.mark.parametrize("size", [3, 5, 16])
def test_a_number_of_ranks_that_does_not_divide_a_batch_is_refused(monkeypatch, size):
    for name, value in dict(RANK=0, WORLD_SIZE=size, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(tgm.UserError, match=f"{size} processes cannot share 8 pieces equally"):
        tgm.find_world(small())


