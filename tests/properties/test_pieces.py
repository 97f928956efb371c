"""micro_seq_len: a slice in pieces. What a border cuts, that nothing else changes; any number of ranks and nodes."""
import re
import socket
import subprocess
import sys

import pytest
import torch

import train_gpt_medium as tgm
from helpers import (CPU, TRAINER, environment, random_ids, randomise, relative, run_ranks, small_config,
    train_and_report, write_shard, write_text_folder)


def test_a_batch_in_pieces_is_the_batch_of_as_many_short_slices(tmp_path):
    """Bit for bit: the same pieces, in the same order, in training and in validation."""
    short = small_config(dtype=torch.float32, num_slices=4, seq_len=128, val_seq_len=256, val_tokens=1024)
    long = tgm.replace(short, num_slices=2, seq_len=256, micro_seq_len=128, val_seq_len=512)
    assert (long.num_pieces, long.piece_len, long.val_piece_len) == (4, 128, 256)
    folder = write_text_folder(tmp_path, short).data_dir
    one, other = (run_ranks(1, train_and_report, tgm.replace(config, data_dir=folder), folder=tmp_path / name)[0]
                  for name, config in (("short", short), ("long", long)))
    assert torch.equal(one["seen"], other["seen"]) and one["val_loss"] == other["val_loss"]
    for name, p in one["params"].items():
        assert torch.equal(p, other["params"][name]), name


def whole_and_pieces(ids: torch.Tensor, smear_lambda: float, window_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [T, C] of ids [T] in one pass, and in two halves."""
    model = tgm.GPT(small_config(dtype=torch.float32, seq_len=len(ids)))
    randomise(model)
    with torch.no_grad():
        model.smear_lambda.fill_(smear_lambda)
        window = tgm.as_window(window_blocks, CPU)
        return model.latents(ids, window), torch.cat([model.latents(half, window) for half in ids.chunk(2)])


def test_where_a_document_begins_a_border_cuts_smear_mtp_alone():
    ids = random_ids(512, small_config(), mean_doc=60)
    ids[256] = 256
    # Rotary angles are those of other positions: fp32 rounding of the angle (2^-24 of up to 512) and of sixteen layers.
    whole, pieces = whole_and_pieces(ids, 0.0, 4)
    assert relative(pieces, whole) < 1e-4
    whole, pieces = whole_and_pieces(ids, 0.5, 4)
    different = ((whole - pieces).norm(dim=1) > 1e-3 * whole.norm(dim=1)).nonzero().flatten()
    assert different.tolist() == [256]


def test_within_a_document_a_border_cuts_the_context():
    ids = random_ids(512, small_config(), mean_doc=10 ** 9)
    whole, pieces = whole_and_pieces(ids, 0.5, 4)
    error = (whole - pieces).norm(dim=1) / whole.norm(dim=1)
    assert (error[:256] < 1e-4).all()
    assert (error[256:] > 1e-3).all()  # every later token has seen less


@pytest.fixture(scope="module")
def thirds(tmp_path_factory) -> tgm.Config:
    """Two slices of three pieces."""
    config = small_config(dtype=torch.float32, num_slices=2, seq_len=384, micro_seq_len=128, val_seq_len=384,
                          val_tokens=768)
    return write_text_folder(tmp_path_factory.mktemp("thirds"), config)


def test_six_ranks_share_two_slices(thirds, tmp_path):
    (alone,) = run_ranks(1, train_and_report, thirds, folder=tmp_path / "1")
    ranks = run_ranks(6, train_and_report, thirds, folder=tmp_path / "6")
    assert torch.equal(torch.cat([rank["seen"] for rank in ranks], dim=1), alone["seen"]), "not the whole batch"
    for rank in ranks:
        for name, p in rank["params"].items():
            assert torch.equal(p, ranks[0]["params"][name]), name
            assert relative(p, alone["params"][name]) < 1e-5, name  # the order of fp32 sums
        assert rank["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)


def test_two_nodes_share_a_run(tmp_path):
    """torchrun's own rendezvous on the loopback: two launchers of two ranks, against one process with all four pieces.

    The pieces are equal, so that the losses are, to the last digit.
    """
    source = TRAINER.read_text().replace('Config(preset="tiny", ', 'Config(preset="tiny", seed=3, micro_seq_len=256, ')
    source = re.sub(r'(preset="tiny".*?)num_iterations=64,', r"\1num_slices=2, num_iterations=2,", source, flags=re.S)
    source = source.replace("val_tokens=2**14, val_seq_len=2**11, val_every=16", "val_tokens=2**12, val_seq_len=2**11")
    config = small_config()
    period = random_ids(256, config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    runs = {name: tmp_path / name for name in ("alone", "first", "second")}
    for folder in runs.values():
        folder.mkdir()
        (folder / "train.py").write_text(source)
        write_shard(folder / "data" / "text" / "text_train_000001.bin", [*period.repeat(8), period[0]])
        write_shard(folder / "data" / "text" / "text_val_000000.bin", random_ids(2 ** 12 + 1, config))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_id=pieces",
                "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--local_addr=127.0.0.1", "train.py", "tiny")
    nodes = [subprocess.Popen(torchrun, cwd=runs[name], env=environment(OMP_NUM_THREADS="1"), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name in ("first", "second")]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    subprocess.run((sys.executable, "train.py", "tiny"), cwd=runs["alone"], env=environment(), check=True,
                   capture_output=True, timeout=300)
    (alone,), (shared,) = ([re.findall(r"^step:\d+/2 val_loss:(\S+)", path.read_text(), re.M) for path in found]
                           for found in ((runs["alone"] / "logs").iterdir(),  # one log of both nodes: rank 0 writes
                                         [*runs["first"].glob("logs/*"), *runs["second"].glob("logs/*")]))
    assert len(shared) == 2 and shared == alone
