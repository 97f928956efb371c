"""Importing the trainer does nothing, and its model knows no process group and no device."""
import ast
import subprocess
import sys

from helpers import ROOT


def test_import_has_no_side_effect(tmp_path):
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); before = dict(os.environ)\n"
            "import torch, train_gpt_medium as t\n"
            "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
            "assert dict(os.environ) == before and t.Config().num_iterations == 5535")
    subprocess.run([sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


def test_model_and_schedules_know_no_device_and_no_ranks():
    tree = ast.parse((ROOT / "train_gpt_medium.py").read_text())
    parts = {"norm", "block_lists", "block_masks", "dense_mask", "attend", "Rotary", "Block", "smear", "GPT",
             "newton_schulz", "muon_update", "lr_factor", "muon_momentum", "num_window_blocks"}
    seen = [node for node in tree.body if getattr(node, "name", None) in parts]
    assert {node.name for node in seen} == parts
    for node in seen:
        for inner in ast.walk(node):
            assert not (isinstance(inner, ast.Constant) and inner.value == "cuda"), node.name
            assert not (isinstance(inner, ast.Name) and inner.id in ("dist", "os")), node.name


def test_source_is_one_flat_file_of_bounded_size():
    tree = ast.parse((ROOT / "train_gpt_medium.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long to read at once"
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "triton", "numpy", "tqdm"}
