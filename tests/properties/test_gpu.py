"""What only a CUDA GPU can show: FlexAttention with its gradients, the compiled optimizer, a run of the script."""
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for GPUs")
import train_gpt_medium as tgm
from compiled_step import COMPILED, errors_of, updates
from helpers import ALONE, CPU, TRAINER, as_window, random_ids, randomise, relative, small_config, write_text_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_flex_attention_forward_and_backward_equal_the_dense_path():
    T, H, D = 2048, 8, 128

    @torch.compile(fullgraph=True, dynamic=False)
    def flex(q, k, v, ids, w):
        return tgm.attend(q, k, v, tgm.block_masks(ids, (w,), 256)[0], 0.12, tgm.LONG_WINDOW_KERNEL)

    generator = torch.Generator("cuda").manual_seed(0)
    for case in range(12):
        ids = random_ids(T, small_config(), seed=case, mean_doc=(30, 300, 3000)[case % 3]).cuda()
        w = as_window(case % 9).cuda()
        q, k, v, dy = torch.randn(4, 1, T, H, D, generator=generator, device="cuda", dtype=torch.bfloat16).unbind(0)
        results = []
        for dtype, attention in ((torch.bfloat16, flex), (torch.float32, None)):
            inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
            y = attention(*inputs, ids, w) if attention else tgm.attend(
                *inputs, tgm.dense_mask(tgm.block_masks(ids, (w,), 256)[0]), 0.12, {})
            y.backward(dy.to(dtype))
            results.append([y.detach(), *(x.grad for x in inputs)])
        for name, ours, reference in zip(("y", "dq", "dk", "dv"), *results):
            # bf16 inputs, probabilities and outputs: three roundings of 2^-9, doubled for the products of gradients.
            assert relative(ours, reference) < 6 * 2 ** -9, (case, name)


@pytest.mark.parametrize("preset", tgm.PRESETS)
def test_compiled_model_equals_the_dense_path(preset):
    config = small_config(preset, dtype=torch.bfloat16, seq_len=1024, val_seq_len=1024, val_tokens=1024)
    torch.manual_seed(0)
    model, reference = config.make_model(), tgm.replace(config, dtype=torch.float32).make_model()
    randomise(model)
    ids = random_ids(1025, config)
    reference.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    step = config.num_iterations // 2
    reference(ids[:-1], ids[1:].long(), **tgm.inputs_at(step, config, CPU)).backward()
    model.cuda().compile(dynamic=False, fullgraph=True)
    ids = ids.cuda()
    model(ids[:-1], ids[1:].long(), **tgm.inputs_at(step, config, ids.device)).backward()
    # A few roundings of 2^-9 in each layer: their sum bounds the error, their root is what to expect.
    errors = {name: relative(p.grad.cpu(), q.grad) for (name, p), q in zip(model.named_parameters(),
                                                                           reference.parameters())}
    assert {name: error for name, error in errors.items() if not error < len(config.layers) * 3 * 2 ** -9} == {}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_compiled_updates_equal_the_cpus(dtype, bound):
    """In bf16 through the kernel: SPEC 8's bounds for another order of operations."""
    config = small_config(dtype=dtype, num_heads=2, head_dim=64, snoo=None)
    on_gpu = updates(config, tgm.World(0, 1, torch.device("cuda")), COMPILED)
    (error, where), *_ = errors_of([{name: x.cpu() for name, x in on_gpu.items()}],
                                   [updates(config, ALONE, lambda function: function)])
    assert error < bound, where


def warmed_up(config: tgm.Config) -> tuple[torch.nn.Module, tgm.Optimizer, tgm.World]:
    """As `main` has them when the loop begins, compiled as for a record, but tuned."""
    world = tgm.World(0, 1, torch.device("cuda"))
    with world.device:
        model = config.make_model()
    tgm.compile_model(model, whole=True)
    optimizer = tgm.Optimizer(model, config, world, COMPILED)
    tgm.warm_up(model, optimizer, world)
    return model, optimizer, world


def test_no_step_waits_for_the_gpu():
    """Compiled steps and the watch's notes, its question to the ranks among them: torch raises where one waits."""
    config = small_config(num_slices=1)
    torch._dynamo.reset()
    model, optimizer, world = warmed_up(config)
    watch = tgm.Watch(optimizer.banks, config, world, print)
    ids = torch.arange(config.seq_len, device="cuda", dtype=torch.int32)[None] % 256
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2 * config.watch_every):
            loss = tgm.train_step(model, optimizer, ids, ids.long(), step % config.num_iterations)
            watch.note(step + 1, loss, [bank.grad_square for bank in optimizer.banks.values()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.answer.is_pinned()  # a copy into other memory waits, which the mode does not see
    watch.read()


def test_the_script_runs_under_torchrun(tmp_path):
    config = tgm.PRESETS["tiny"]()
    write_text_folder(tmp_path / config.data_dir, config)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                           str(TRAINER), "tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"step:{config.num_iterations}/{config.num_iterations} val_loss:" in done.stdout
