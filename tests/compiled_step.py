"""The step that a GPU would run, executed on a CPU: torch.compile's graphs, wrappers and Triton kernels for an H100.

Real tensors lie on the CPU; the fakes that Dynamo and AOTAutograd trace with say cuda:0. So TorchInductor lowers for a
GPU; its wrapper is then called with the CPU's tensors, and launches run in Triton's interpreter. Every buffer is NaN
before it is written. Only in a process that `run` started: nothing here can be undone.
"""
import copy
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_gpu
import helpers
import interpreter
import train_gpt_medium as tgm
import train_gpt_mudd as mudd
from helpers import ALONE, relative

H100, CUDA = fake_gpu.GPUS["90"], torch.device("cuda", 0)
LAYERS = (tgm.Layer(value_embed=0, long_window=True), tgm.Layer(skip_from=0))
# Of the MUDD recipe, every kind; the last gives the last latent its value embedding.
MUDD_LAYERS = (mudd.Layer(value_embed=0, long_window=True), mudd.Layer(), mudd.Layer(value_embed=1),
               mudd.Layer(skip_from=1, value_embed=0, long_window=True), mudd.Layer(value_embed=1),
               mudd.Layer(value_embed=0, long_window=True))
# FlexAttention's tiles for bf16, in place of fp32's, which are so small that the interpreter takes minutes.
LARGE_TILES = dict(bwd_BLOCK_M1=64, bwd_BLOCK_N1=128, bwd_BLOCK_M2=128, bwd_BLOCK_N2=64)
COMPILED = partial(torch.compile, dynamic=False, fullgraph=True)
LAUNCHES: list[str] = []  # names of TorchInductor's kernels, one for each launch


def run(expression: str) -> Any:
    """The JSON value of an expression in this module's names, in a process of its own."""
    return fake_gpu.run_with_driver("compiled_step", expression, sys.path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


class Called(fake_gpu.OnCPU):
    """What a wrapper calls runs on the CPU. An operation of ours changes no argument but those that it declares."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten":
            return super().__torch_dispatch__(function, types, args, kwargs)
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for declared, x, old in zip(function._schema.arguments, args, before):
            if isinstance(x, torch.Tensor) and not declared.is_write:
                assert torch.equal(x, old), f"{function} changes {declared.name} and does not say so"
        return result


def large_blocks(autotuner) -> list:
    """Few large programs, since the interpreter's time is one of calls; no larger than TorchInductor's largest."""
    config = copy.deepcopy(autotuner.configs[0])
    hints = autotuner.size_hints
    if hints is not None and "XBLOCK" in config.kwargs and "YBLOCK" not in config.kwargs:
        reduced = config.kwargs.get("R0_BLOCK", math.prod(n for name, n in hints.items() if name.startswith("r")))
        config.kwargs["XBLOCK"] = max(config.kwargs["XBLOCK"], min(4096, hints["x"], max(1, 2 ** 17 // reduced)))
    return [config]


def execute_on_cpu(choose: Callable = large_blocks) -> None:
    """choose: the configurations of a kernel, from its autotuner. One is enough: which is fastest is not asked."""
    from torch._inductor.compile_fx import _InProcessFxCompile
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor
    fake_gpu.pretend(H100)
    interpreter.mend(pytest.MonkeyPatch())
    for name in ("flash", "mem_efficient", "cudnn"):  # of the 1.5B run; a library's kernels cannot be interpreted
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)

    torch._inductor.config.shape_padding = False  # of products, where a GPU's clock says that it pays
    # Fakes of the CPU's tensors lie on the GPU. Hyperparameters (fp64) and constants stay where they are.
    from_real, new, moves = fake_tensor.FakeTensorConverter.from_real_tensor, fake_tensor.FakeTensor.__new__, [False]

    def from_real_tensor(self, fake_mode, t, make_constant=False, *args, **kwargs):
        before, moves[0] = moves[0], not make_constant and t.dtype != torch.float64
        try:
            fake = from_real(self, fake_mode, t, make_constant, *args, **kwargs)
            for x in (fake, fake._base) if moves[0] else ():
                if isinstance(x, fake_tensor.FakeTensor) and x.fake_device.type == "cpu":
                    x.fake_device = CUDA
            return fake
        finally:
            moves[0] = before

    def new_fake(cls, fake_mode, elem, device, *args, **kwargs):
        on_cpu = torch.device(device).type == "cpu"
        return new(cls, fake_mode, elem, CUDA if moves[0] and on_cpu else device, *args, **kwargs)

    fake_tensor.FakeTensorConverter.from_real_tensor = from_real_tensor
    fake_tensor.FakeTensor.__new__ = staticmethod(new_fake)

    # Graphs: called with the CPU's tensors
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype)
    generate = _InProcessFxCompile.codegen_and_compile

    def codegen_and_compile(self, graph, inputs, inputs_to_check, options):
        code = generate(self, graph, inputs, inputs_to_check, options)
        own = code.current_callable

        def call(inputs):
            torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what is empty with NaN
            try:
                with Called():
                    return own(inputs)
            finally:
                torch.use_deterministic_algorithms(False)
        code.current_callable = call
        return code

    # Kernels
    launch = CachingAutotuner.run

    def chosen_launch(self, *args, stream, **kwargs):
        self.configs = choose(self)
        LAUNCHES.append(self.fn.__name__)
        return launch(self, *args, stream=stream, **kwargs)

    _InProcessFxCompile.codegen_and_compile, CachingAutotuner.run = codegen_and_compile, chosen_launch
    tgm.runs_kernels = lambda x, shared_bytes=0: x.dtype != torch.float32
    tgm.num_multiprocessors = lambda device: 4


# ----------------------------------------------------------------------------------------------------------------------
# What is compared: the eager step, computed before anything is pretended, and the compiled one

def make_config(num_tokens: int, **changes) -> tgm.Config:
    return tgm.Config(**(dict(layers=LAYERS, backout_from=1, num_heads=1, vocab_size=257, doc_token=256,
                              seq_len=num_tokens, val_seq_len=num_tokens, val_tokens=num_tokens, seed=1,
                              dtype=torch.float32) | changes))


def make_mudd(num_tokens: int, **changes) -> mudd.Config:
    """Two states of YaRN, and Smear-MTP, which the published run does without."""
    stages = tuple(mudd.Stage(until, num_tokens, window, yarn=yarn) for yarn, (until, window) in enumerate(
        ((0.5, 3), (1.0, 7))))
    return mudd.Config(**(dict(layers=MUDD_LAYERS, late_layer=3, num_heads=2, head_dim=64, bigram_rows=384,
                               vocab_size=257, doc_token=256, window_unit=32, stages=stages, seq_len=num_tokens,
                               micro_seq_len=num_tokens, val_seq_len=num_tokens, val_tokens=num_tokens, seed=1,
                               smear_mtp=True, fp8_head=False, dtype=torch.float32) | changes))


def random_model(config: tgm.Run) -> torch.nn.Module:
    torch.manual_seed(0)
    model = config.make_model()
    helpers.randomise(model)
    return model


def with_documents(config: tgm.Run, starts: Iterable[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A piece of random ids, and its targets, in which documents begin at these tokens and nowhere else."""
    ids = torch.randint(0, config.doc_token, (config.seq_len + 1,), generator=torch.Generator().manual_seed(seed)).int()
    ids[list(starts)] = config.doc_token
    return tuple(x[0] for x in tgm.split_pieces(ids, config.seq_len))


def answers(model: torch.nn.Module, piece: tuple, inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
    """Loss, validation's loss and every parameter's gradient, for each of the model's keyword arguments."""
    found = []
    for keywords in inputs:
        model.zero_grad()
        loss = model(*piece, **keywords)
        loss.backward()
        with torch.no_grad():
            val_loss = model(*piece, **keywords)
        found.append(dict(loss=loss.detach(), validation=val_loss) | {n: p.grad for n, p in model.named_parameters()})
    return found


def errors_of(ours: list[dict], exact: list[dict]) -> list[tuple[float, str]]:
    """Of every tensor, relative to its norm, and its name; the largest first, NaN before all."""
    errors = [(relative(a[name], b[name]), name) for a, b in zip(ours, exact, strict=True) for name in b]
    return sorted(errors, key=lambda error: (math.isnan(error[0]), error[0]), reverse=True)


def root_mean_square(errors: list[tuple[float, str]]) -> float:
    """Of bf16 the fair figure: the largest error is a vector's of a few numbers, and so mostly chance."""
    return math.sqrt(sum(error ** 2 for error, _ in errors) / len(errors))


def compiled_errors(config: tgm.Run, starts: Iterable[int], inputs: list[dict], whole: bool = True,
                    choose: Callable = large_blocks, mutate: Callable[[], None] = lambda: None,
                    **kernel_options) -> dict[str, Any]:
    """Errors of the compiled and of the eager model against fp32, eager and with dense masks.

    starts: of documents. whole: one graph, as `medium`; otherwise in parts, as `short`. kernel_options: of
    FlexAttention.
    """
    attend = tgm.attend
    tgm.attend = lambda *args: attend(*args[:-1], args[-1] | kernel_options)
    model, piece = random_model(config), with_documents(config, starts, seed=1)
    exact = tgm.replace(config, dtype=torch.float32).make_model()
    exact.load_state_dict(model.state_dict())
    exact, eager = answers(exact, piece, inputs), answers(model, piece, inputs)
    execute_on_cpu(choose)
    mutate()
    if not whole:  # called outside of every graph, so with the CPU's own tensors
        tgm.attention_masks = tgm.block_masks
    torch._inductor.config.coordinate_descent_tuning = whole
    tgm.compile_model(model, whole)
    ours = answers(model, piece, inputs)
    compiled, plain = errors_of(ours, exact), errors_of(eager, exact)
    return dict(worst=compiled[:3], kernels=len(set(LAUNCHES)), launches=len(LAUNCHES),
                mean=root_mean_square(compiled), mean_eager=root_mean_square(plain))


def windows(*blocks: int) -> list[dict[str, torch.Tensor]]:
    return [{"window_blocks": helpers.as_window(n)} for n in blocks]


def weights(bank: tgm.Bank) -> torch.Tensor:
    """In fp32, with the lower bits where there are some; a copy."""
    return (tgm.read_weights(bank.shard, bank.state["mantissa"]) if "mantissa" in bank.state else bank.shard).clone()


def updates(config: tgm.Run, world: tgm.World, compiled: Callable) -> dict[str, torch.Tensor]:
    """What each of two steps on fixed gradients adds to the weights, in fp32, by bank; the other states at the end."""
    model, found = random_model(config).to(world.device), {}
    optimizer = tgm.Optimizer(model, config, world, compiled)
    for step in (2 * config.update_every - 1, 3 * config.update_every - 1):  # at which all groups update
        before = {name: weights(bank) for name, bank in optimizer.banks.items()}
        helpers.give_gradients(model, world, step)
        optimizer.step(step)
        found |= {f"{name}, step {step}": weights(bank).double() - before[name]
                  for name, bank in optimizer.banks.items()}
    return found | {f"{name}, {key}": state.float() for name, states in optimizer.state_dict().items()
                    for key, state in states.items() if key != "mantissa"}


def update_errors(config: tgm.Run) -> tuple[float, str]:
    """Of all rules, those that compile compiled, against eager. Without Snoo, which does not compile."""
    config = tgm.replace(config, snoo=None)
    eager = updates(config, ALONE, lambda function: function)
    execute_on_cpu()
    torch._inductor.config.coordinate_descent_tuning = True
    return errors_of([updates(config, ALONE, COMPILED)], [eager])[0]


def rank_updates(world: tgm.World, config: tgm.Run, compiled: bool) -> dict[str, torch.Tensor]:
    if not compiled:
        return updates(config, world, lambda function: function)
    execute_on_cpu()
    return updates(config, world, COMPILED)


def rank_errors(config: tgm.Run, folder: Path) -> tuple[float, str]:
    """Of two gloo ranks, each on gradients of its own: averages and rules compiled, against eager."""
    config, found = tgm.replace(config, snoo=None), []
    for compiled in (True, False):
        first, second = helpers.run_ranks(2, rank_updates, config, compiled, folder=folder / str(compiled))
        # Together: one rank's shard may be padding alone, of which no error is relative.
        found.append({name: torch.stack((x, second[name])) for name, x in first.items()})
    return errors_of(*([both] for both in found))[0]


# ----------------------------------------------------------------------------------------------------------------------
# Made wrong: what the harness must find

def wrong_strides() -> None:
    """mlp_up's fake is laid out otherwise than what the operation gives."""
    @torch.library.custom_op("wrong::mlp_up", mutates_args=())
    def mlp_up(x: torch.Tensor, fc: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, fc).relu().square()

    mlp_up.register_fake(lambda x, fc: x.new_empty(len(fc), len(x)).mT)
    tgm.mlp_up = mlp_up


def hidden_mutation() -> None:
    """cross_entropy does not say that it overwrites the logits."""
    overwriting = tgm.cross_entropy._init_fn

    @torch.library.custom_op("wrong::cross_entropy", mutates_args=())
    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, softcap: float, with_grad: bool) -> torch.Tensor:
        return overwriting(logits, targets, softcap, with_grad)

    cross_entropy.register_fake(lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32))
    tgm.cross_entropy = cross_entropy


def shifted_query_lists() -> None:
    """The full query blocks of a key block, which the backward pass alone reads, begin one too late."""
    block_lists = tgm.block_lists

    def shifted(num_visible_B, num_full_B, direction, w):
        *others, full_BB = block_lists(num_visible_B, num_full_B, direction, w)
        return *others, (full_BB + 1).clamp(0, len(full_BB) - 1) if direction == 1 else full_BB

    tgm.block_lists = shifted
