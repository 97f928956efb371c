"""What test_edits.py starts in processes that have not imported the trainer: they get the copy's, with its edit."""
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

SIZES = dict(seq_len=128, max_window=1024, val_seq_len=256, val_tokens=512, num_iterations=4, val_every=2,
             checkpoint_every=2, kernel_warmup_steps=1)


def constants_of(config) -> dict[str, str]:
    return {item.name: repr(getattr(config, item.name)) for item in fields(config)}


def run_copy(copy: Path, rank: int, size: int, kept: tuple[str, ...], variables: dict[str, str]) -> None:
    """`main` of a small model in copy/ranks_<size>. One rank alone also resumes it in the middle, and then runs the
    copy's property tests of the model and the updates. All have few layers and two slices, or the tables `kept`."""
    os.environ.clear()
    os.environ.update(variables, RANK=str(rank), WORLD_SIZE=str(size))
    os.chdir(copy / f"ranks_{size}")
    console = os.open(f"console_{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(console, standard)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    import torch

    import helpers
    import train_gpt_medium as tgm
    torch.set_num_threads(1)
    changes = {} if "layers" in kept else dict(layers=helpers.FEW_LAYERS, backout_from=1)
    changes |= {} if "stages" in kept else dict(num_slices=2)
    small_config = helpers.small_config
    helpers.small_config = lambda *preset, **own: small_config(*preset, **changes | own)
    config = helpers.small_config(**SIZES, dtype=torch.float32, data_dir=str(copy / "shards"))
    tgm.main(config)
    if size == 1:
        Path("constants.json").write_text(json.dumps(constants_of(tgm.Config())))
        tgm.main(config, resume_from=str(next(Path("checkpoints").glob("*/step_000002"))))
        os.chdir(copy)
        import pytest
        # What depends on the recipe is parametrized by presets, which are nearly the same at this size.
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not record", "-k", next(iter(tgm.PRESETS)),
                              "tests/properties/test_model.py", "tests/properties/test_optimizers.py"]))
