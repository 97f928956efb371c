"""What the source shows: an import does nothing, the recipe knows no device, the machine knows no recipe."""
import ast
import re
import subprocess
import sys

import torch

import train_gpt_medium as tgm
from helpers import ROOT, TRAINER

SOURCE = TRAINER.read_text()
TREE = ast.parse(SOURCE)
FIRST_OF_RECIPE, FIRST_OF_MACHINE = (SOURCE[:SOURCE.index(banner)].count("\n") + 1
                                     for banner in ("# Part 1: the recipe\n", "# Part 2: the machine\n"))
RECIPE = [node for node in TREE.body if FIRST_OF_RECIPE < node.lineno < FIRST_OF_MACHINE]
*MACHINE, GUARD = [node for node in TREE.body if node.lineno > FIRST_OF_MACHINE]


def walk(nodes: list[ast.AST], kind: type) -> list:
    return [inner for node in nodes for inner in ast.walk(node) if isinstance(inner, kind)]


def test_import_has_no_side_effect(tmp_path):
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); before = dict(os.environ)\n"
            "import torch, train_gpt_medium as t\n"
            "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
            "assert dict(os.environ) == before and all(make() for make in t.PRESETS.values())")
    subprocess.run([sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


def test_recipe_knows_no_device_and_no_ranks():
    assert {name.id for name in walk(RECIPE, ast.Name)} & {"dist", "os", "world", "World"} == set()
    assert {text.value for text in walk(RECIPE, ast.Constant)} & {"cuda", "cpu"} == set()


def test_machine_refers_to_nothing_of_the_recipe_but_its_interface():
    recipe = {node.name for node in RECIPE if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    recipe |= {target.id for node in RECIPE if isinstance(node, ast.Assign) for target in node.targets}
    assert {"Run", "Config", "LAYERS", "GROUPS", "GPT", "Muon", "PRESETS", "norm"} <= recipe
    annotations = [note for node in walk(MACHINE, (ast.arg, ast.AnnAssign)) if (note := node.annotation)]
    annotations += [node.returns for node in walk(MACHINE, ast.FunctionDef) if node.returns]
    in_annotations = {id(name) for name in walk(annotations, ast.Name)}
    used = [(name.id, name.lineno) for name in walk(MACHINE, ast.Name)
            if name.id in recipe and not (id(name) in in_annotations and name.id in ("Run", "Stage", "Group"))]
    assert used == []
    assert {name.id for name in walk([GUARD], ast.Name)} == {"__name__", "start", "PRESETS"}


def test_machine_names_no_parameter_and_no_role():
    """In identifiers, strings and comments."""
    names = {role for make in tgm.PRESETS.values() for group in make().groups for role in group.roles}
    for make in tgm.PRESETS.values():
        with torch.device("meta"):
            names |= {name.split(".")[-1] for name, _ in make().make_model().named_parameters()}
    words = re.compile(rf"\b({'|'.join(names)})\b")
    lines = enumerate(SOURCE.splitlines()[FIRST_OF_MACHINE:], start=FIRST_OF_MACHINE + 1)
    assert len(names) > 5 and [(number, line) for number, line in lines if words.search(line)] == []


def test_source_is_one_flat_file_of_bounded_size():
    too_long = {node.name: node.end_lineno - node.lineno + 1 for node in walk([TREE], ast.FunctionDef)
                if node.end_lineno - node.lineno >= 60}
    assert too_long == {}
    imported = {name.name for node in walk([TREE], ast.Import) for name in node.names}
    imported |= {node.module for node in walk([TREE], ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "triton", "numpy", "tqdm"}
