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


def test_machine_reads_no_constant_that_run_lacks():
    """Of anything that is called config, torch's own apart."""
    read = [(node.attr, node.lineno) for node in walk(MACHINE, ast.Attribute)
            if re.fullmatch(r"(?!torch\.)(.*\.)?config", ast.unparse(node.value))]
    interface = {*dir(tgm.Run), *(field.name for field in tgm.fields(tgm.Run)), "make_model", "model_inputs"}
    assert len(read) > 30 and [(name, line) for name, line in read if name not in interface] == []


def test_machine_names_no_parameter_and_no_role():
    """In identifiers, strings and comments."""
    names = {role for make in tgm.PRESETS.values() for group in make().groups for role in group.roles}
    for make in tgm.PRESETS.values():
        with torch.device("meta"):
            names |= {name.split(".")[-1] for name, _ in make().make_model().named_parameters()}
    words = re.compile(rf"\b({'|'.join(names)})\b")
    lines = enumerate(SOURCE.splitlines()[FIRST_OF_MACHINE:], start=FIRST_OF_MACHINE + 1)
    assert len(names) > 5 and [(number, line) for number, line in lines if words.search(line)] == []


def test_machine_holds_no_number_of_the_recipe():
    """Tuned ones: floats that are not plain, and large integers that no block, tile or byte count would be."""
    def numbers(nodes):
        return {(x.value, x.lineno) for x in walk(nodes, ast.Constant)
                if type(x.value) is float and x.value not in (0, 0.5, 1, 2)
                or type(x.value) is int and x.value > 1000 and x.value.bit_count() > 1}

    tuned = {x for x, _ in numbers(RECIPE)} - {50256, 50257}  # which headers of published shards leave out
    assert len(tuned) > 10 and [(x, line) for x, line in numbers(MACHINE) if x in tuned] == []


def test_source_is_one_flat_file_of_bounded_size():
    too_long = {node.name: node.end_lineno - node.lineno + 1 for node in walk([TREE], ast.FunctionDef)
                if node.end_lineno - node.lineno >= 60}
    assert too_long == {}
    imported = {name.name for node in walk([TREE], ast.Import) for name in node.names}
    imported |= {node.module for node in walk([TREE], ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch", "triton", "numpy", "tqdm"}
