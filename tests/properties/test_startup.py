"""What is compiled before the clock starts, and that nothing is after. The backend counts and compiles nothing."""
import os
import re
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import train_gpt_medium as tgm
from helpers import ALONE, CPU, TRAINER, as_window, enter, random_ids, randomise, small_config, write_text_folder

# One layer of each kind, and a second one of the first: long and short windows, with and without value embeddings.
LAYERS = (tgm.Layer(value_embed=0, long_window=True), tgm.Layer(value_embed=0), tgm.Layer(),
          tgm.Layer(attention=False), tgm.Layer(skip_from=1), tgm.Layer(value_embed=0, long_window=True))


def make_model() -> tgm.GPT:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = tgm.GPT(small_config(layers=LAYERS, backout_from=3, seq_len=128, val_seq_len=256, val_tokens=256,
                                 num_slices=1, dtype=torch.float32))
    randomise(model)
    return model


# A pass with gradients and one without: the whole model, or three kinds of block, the embeddings and the end.
# And the loss, where it trains as it is written. More kinds of block than torch's own limit lets share one function.
@pytest.mark.parametrize("whole, graphs", [(True, 2), (False, 2 * (5 + (not tgm.Config().fused_head)))])
def test_nothing_compiles_after_warm_up(monkeypatch, whole, graphs):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    model = make_model()
    tgm.compile_model(model, whole, backend="aot_eager")
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    optimizer = tgm.Optimizer(model, model.config, ALONE, compiled)
    tgm.warm_up(model, optimizer, ALONE)
    graphs += sum(group.rule.compiles for group, *_ in optimizer.groups)
    assert counters["stats"]["unique_graphs"] == graphs
    for step in range(model.config.num_iterations):  # every window of the schedule
        tgm.train_step(model, optimizer, *tgm.split_pieces(random_ids(129, model.config, step), 128), step)
    with torch.no_grad():
        ids = random_ids(257, model.config)
        model(ids[:-1], ids[1:].long(), as_window(3))
    assert counters["stats"]["unique_graphs"] == graphs


def test_an_edited_operation_has_graphs_of_its_own_in_the_caches(tmp_path, monkeypatch):
    """And an edited recipe keeps those it has: torch would return the graph of the operation as it was."""
    source, tags = TRAINER.read_text(), []
    for old, new in ((source, source), ("Muon(lr=0.03", "Muon(lr=0.04"),
                     ("len(logits), dtype=torch.float32)", "len(logits), dtype=torch.bfloat16)")):
        assert old in source
        (tmp_path / "edited.py").write_text(source.replace(old, new))
        monkeypatch.setattr(tgm, "__file__", str(tmp_path / "edited.py"))
        monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
        tgm.compile_model(make_model(), whole=True, backend="aot_eager")
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] == tags[1] != tags[2]


def test_progress_shows_every_compilation_on_rank_0(capsys):
    for rank in (0, 1):
        torch._dynamo.reset()
        square = torch.compile(lambda x: x * x, backend="aot_eager")
        with tgm.compile_progress(tgm.World(rank, 2, CPU)):
            square(torch.ones(3))
        square(torch.ones(2, 2))  # not announced any more
        shown = r"warm-up: compilation 1 begins after \d+ s\n" if rank == 0 else ""
        assert re.fullmatch(shown, capsys.readouterr().out)


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_ranks_wait_for_one_that_compiles_for_long(tmp_path, monkeypatch, device, backend):
    """NCCL's default is 10 minutes, gloo's 30. A group that is bound to its GPU connects at once."""
    given, device = {}, torch.device(device)

    def init(name, **options):
        given.update(options, backend=name)
        raise tgm.UserError("begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tgm, "find_world", lambda _: tgm.World(1, 2, device))
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(tgm.UserError, match="begun"):
        tgm.main(write_text_folder(tmp_path, small_config(num_slices=2)))
    assert given.pop("timeout") > timedelta(minutes=30)
    assert given == dict(backend=backend, device_id=device if backend == "nccl" else None)


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, num_gpus):
    enter(tmp_path, monkeypatch)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    if num_gpus < 4:
        with pytest.raises(tgm.UserError, match="^4 processes but 2 visible GPUs: start one per GPU"):
            tgm.find_world(small_config(num_slices=4))
        assert chosen == []
    else:
        assert tgm.find_world(small_config(num_slices=4)) == (3, 4, torch.device("cuda", 3)) and chosen == [3]


@pytest.mark.parametrize("variables, words", [
    (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR is missing"), (dict(RANK=""), "RANK is empty"),
    (dict(WORLD_SIZE="two", RANK="0"), "WORLD_SIZE is two"), (dict(RANK="1"), "RANK is 1 and WORLD_SIZE 1"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1"), "MASTER_PORT is missing"),
    (dict(SLURM_NTASKS="2", SLURM_PROCID="1"), "SLURM_NTASKS is 2 and WORLD_SIZE is missing"),
    (dict(OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_RANK="0"), "OMPI_COMM_WORLD_SIZE is 8"),
    (dict(SLURM_NTASKS="2"), ""), (dict(SLURM_NTASKS="1", SLURM_PROCID="0"), "")])
def test_a_launchers_environment_is_whole_or_refused(tmp_path, monkeypatch, variables, words):
    """The last two are a shell within an allocation, and one process of srun: each trains alone, as it should."""
    enter(tmp_path, monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words:
        with pytest.raises(tgm.UserError, match=re.escape(words) + ".*: start with torchrun, or unset"):
            tgm.find_world(small_config())
    else:
        assert tgm.find_world(small_config())[:2] == (0, 1)


@pytest.mark.parametrize("script, limit_s, words", [
    ("exit 9", 600, ""), ("echo table", 600, "table"), ("printf '\\377'", 600, "\ufffd"),
    ("exec sleep 600", 0.1, "nvidia-smi did not answer")])
def test_nvidia_smi_never_holds_a_run(tmp_path, monkeypatch, script, limit_s, words):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert tgm.ask_nvidia_smi(limit_s).strip() == words


def test_regions_compute_the_model_bit_for_bit():
    results = []
    for compiled in (False, True):
        model = make_model()
        if compiled:
            tgm.compile_model(model, whole=False, backend="aot_eager")
        ids = random_ids(257, model.config)
        loss = model(ids[:-1], ids[1:].long(), as_window(2))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, ours in zip(*results):
        assert torch.equal(eager, ours)


# The script's options, and tuned ones: where they differ, blocks with a value embedding are of two kinds.
@pytest.mark.parametrize("long_window, short_window, kinds", [
    (tgm.LONG_WINDOW_KERNEL, tgm.SHORT_WINDOW_KERNEL, 3 + (tgm.LONG_WINDOW_KERNEL != tgm.SHORT_WINDOW_KERNEL)),
    ({"fwd_BLOCK_M": 64}, {"fwd_BLOCK_M": 128, "bwd_num_warps": 8}, 4)])
def test_blocks_of_a_kind_share_code_with_block_masks(monkeypatch, long_window, short_window, kinds):
    """What a GPU compiles: FlexAttention with masks built outside the region, new ones in every step."""
    monkeypatch.setattr(tgm, "dense_mask", lambda mask: mask)
    monkeypatch.setattr(tgm, "LONG_WINDOW_KERNEL", long_window)
    monkeypatch.setattr(tgm, "SHORT_WINDOW_KERNEL", short_window)
    model = make_model()
    tgm.compile_model(model, whole=False, backend="aot_eager")
    with torch.no_grad():
        for step in range(3):
            model.latents(random_ids(256, model.config, step), as_window(step + 1))
    # Long and short windows differ in nothing that a graph holds while their kernel options are equal.
    assert counters["stats"]["unique_graphs"] == 2 + kinds
