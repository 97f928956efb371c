"""micro_seq_len: a slice in pieces. What a border cuts, and that nothing else changes."""
import torch

import train_gpt_medium as tgm
from helpers import ALONE, CPU, random_ids, randomise, small_config, train_and_report, write_text_folder


def test_a_batch_in_pieces_is_the_batch_of_as_many_short_slices(tmp_path):
    """Bit for bit: the same pieces, in the same order, in training and in validation."""
    short = small_config(dtype=torch.float32, num_slices=4, seq_len=128, val_seq_len=256, val_tokens=1024)
    long = tgm.replace(short, stages=(tgm.Stage(num_slices=2),), seq_len=256, micro_seq_len=128, val_seq_len=512)
    assert (long.piece_len, long.val_piece_len) == (128, 256)
    folder = write_text_folder(tmp_path, short).data_dir
    one, other = (train_and_report(ALONE, tgm.replace(config, data_dir=folder)) for config in (short, long))
    assert all(map(torch.equal, one["seen"], other["seen"])) and one["val_loss"] == other["val_loss"]
    assert [name for name, p in one["params"].items() if not torch.equal(p, other["params"][name])] == []


def difference_of_halves(config: tgm.Config, ids: torch.Tensor) -> torch.Tensor:
    """What cutting ids [T] in two changes in the latents [T, C], relative to their norm."""
    model, inputs = config.make_model(), tgm.inputs_at(config.num_iterations, config, CPU)
    randomise(model)
    with torch.no_grad():
        whole, halves = model.latents(ids, **inputs), [model.latents(half, **inputs) for half in ids.chunk(2)]
    return (torch.cat(halves) - whole).norm(dim=1) / whole.norm(dim=1)


def test_within_a_document_a_border_cuts_the_context():
    config = small_config(dtype=torch.float32, seq_len=512)
    difference = difference_of_halves(config, random_ids(512, config, mean_doc=10 ** 9))
    assert (difference[:256] < 1e-4).all()
    assert (difference[256:] > 1e-3).all()  # every later token has seen less
