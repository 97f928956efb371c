"""Block masks against the plain twin's and token by token, and compiled FlexAttention against the dense path."""
import shutil

import pytest
import torch

import plain_twin
import train_gpt_medium as tgm
from helpers import DISTINCT_PRESETS, as_window, random_ids, small_config

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


BLOCK_LISTS = [(f"{kind}_num_blocks", f"{kind}_indices") for kind in ("kv", "full_kv", "q", "full_q")]
LAYOUTS = {"one document": [0], "no mark": [], "borders on blocks": [0, 128, 512],
           "around borders": [127, 129, 255, 257], "short": list(range(0, 640, 37)),
           "long after short": [5, 6, 7, 200], "last token": [639]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w", [1, 60, 127, 128, 129, 255, 256, 700])
def test_windows_exact_to_the_token(layout, w):
    """Which pairs attend; and every block that is listed, by rows and by columns, is needed, a full one full."""
    ids = torch.zeros(640, dtype=torch.int32)
    ids[LAYOUTS[layout]] = 7
    mask, = tgm.block_masks(ids, (as_window(w),), 7, exact=True)
    position, doc = torch.arange(640), (ids == 7).cumsum(0)
    apart = position[:, None] - position
    expected = (apart >= 0) & (apart <= w) & (doc[:, None] == doc)
    assert torch.equal(tgm.dense_mask(mask), expected)
    blocks = expected.view(5, 128, 5, 128).transpose(1, 2).flatten(2)
    listed = {number: torch.zeros(5, 5, dtype=torch.bool) for number, _ in BLOCK_LISTS}
    for number, index in BLOCK_LISTS:
        for i, count in enumerate(getattr(mask, number)[0, 0].tolist()):
            listed[number][i, getattr(mask, index)[0, 0, i, :count].long()] = True
    partial, full, by_columns, full_by_columns = listed.values()
    assert torch.equal(full, blocks.all(-1)) and torch.equal(partial, blocks.any(-1) & ~full)
    assert torch.equal(full_by_columns.T, full) and torch.equal(by_columns.T, partial)


@pytest.mark.parametrize("options, right", [
    (tgm.LONG_WINDOW_KERNEL, True), (tgm.SHORT_WINDOW_KERNEL, True), ({"fwd_ROWS_GUARANTEED_SAFE": True}, False),
    ({"fwd_ROWS_GUARANTEED_SAFE": True, "fwd_BLOCK_N": 128}, True)])
def test_rows_are_called_safe_only_if_their_first_tile_is(options, right):
    """The sum over keys begins with the first tile of a query's own block: of nothing but masked keys it is NaN."""
    ids = torch.zeros(256, dtype=torch.int32)
    ids[80] = 7
    mask, = tgm.block_masks(ids, (as_window(2),), 7)
    assert (mask.kv_indices[0, 0, :, 0] == torch.arange(2)).all()
    tile = options.get("fwd_BLOCK_N", 64)  # torch's own for an H100
    called_safe = any("ROWS_GUARANTEED_SAFE" in name for name in options)
    assert (tgm.dense_mask(mask)[:128, :tile].any(1).all() or not called_safe) == right


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_block_lists_are_the_sorted_ones(seed, num_blocks):
    """All eight tensors that FlexAttention reads, against the twin, which sorts; entries past a number are free.

    And which pairs attend, of them every token to itself.
    """
    T, generator = 128 * num_blocks, torch.Generator().manual_seed(seed)
    ids = torch.zeros(T, dtype=torch.int32)
    borders = 128 * torch.randint(0, num_blocks, (4,), generator=generator)
    starts = [torch.rand(T, generator=generator) < 1 / 150, borders,
              (borders + torch.randint(-1, 2, (4,), generator=generator)).clamp(0, T - 1), []][seed]
    ids[starts] = 7
    windows = [as_window(w) for w in range(num_blocks + 3)]
    for w, mask in zip(windows, tgm.block_masks(ids, tuple(windows), 7), strict=True):
        twin = plain_twin.window_block_mask(ids, w, 7)
        attended = tgm.dense_mask(mask)
        assert torch.equal(attended, tgm.dense_mask(twin)) and attended.diagonal().all()
        for number, index in BLOCK_LISTS:
            count = getattr(mask, number)
            assert torch.equal(count, getattr(twin, number)) and count.dtype == torch.int32
            listed = torch.arange(num_blocks) < count[..., None]
            assert torch.equal(getattr(mask, index)[listed], getattr(twin, index)[listed]), (w, index)
            assert ((0 <= getattr(mask, index)) & (getattr(mask, index) < num_blocks)).all()


@pytest.mark.parametrize("preset", DISTINCT_PRESETS)
def test_long_and_short_layers_use_their_windows(preset, monkeypatch):
    """And the options that the script has for them, which may differ."""
    config, seen, attend = small_config(preset, seq_len=1024), [], tgm.attend
    monkeypatch.setattr(tgm, "attend", lambda *args: seen.append(args[3:]) or attend(*args))
    monkeypatch.setattr(tgm, "LONG_WINDOW_KERNEL", {"fwd_BLOCK_M": 64})
    monkeypatch.setattr(tgm, "SHORT_WINDOW_KERNEL", {"fwd_BLOCK_M": 128})
    ids = torch.zeros(1024, dtype=torch.int32)
    config.make_model().latents(ids, as_window(5))
    long_mask, short_mask = (tgm.dense_mask(plain_twin.window_block_mask(ids, as_window(w), 256))
                             for w in (5, 5 // config.short_window_divisor))
    for (mask, scale, kernel_options), layer in zip(seen, [row for row in config.layers if row.attention], strict=True):
        assert torch.equal(mask, long_mask if layer.long_window else short_mask) and scale == config.attention_scale
        assert kernel_options is (tgm.LONG_WINDOW_KERNEL if layer.long_window else tgm.SHORT_WINDOW_KERNEL)


@needs_compiler
def test_compiled_flex_attention_equals_the_dense_path():
    """With one head of keys for two of queries."""
    T, H, D, doc_token = 1024, 2, 32, 256

    @torch.compile(fullgraph=True, dynamic=False)
    def flex(q, k, v, ids, w):
        return tgm.attend(q, k, v, tgm.block_masks(ids, (w,), doc_token)[0], 0.12, tgm.LONG_WINDOW_KERNEL)

    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, T, H, D, generator=generator).unbind(0)
    k, v = k[:, :, :1], v[:, :, :1]
    # Sums of up to T products, each rounded to 2^-24 of values that v bounds; a wrong pair shows at about |v| / T.
    tolerance = T * 2 ** -24 * v.abs().max().item()
    with torch.no_grad():
        for w, mean_doc in enumerate((20, 200, 2000, 200, 2000, 20)):  # a window of 0 too, as short layers see it
            ids = random_ids(T, small_config(), seed=w, mean_doc=mean_doc)
            dense = tgm.attend(q, k, v, tgm.dense_mask(tgm.block_masks(ids, (as_window(w),), doc_token)[0]), 0.12, {})
            torch.testing.assert_close(flex(q, k, v, ids, as_window(w)), dense, rtol=0, atol=tolerance)


def test_fewer_heads_of_keys_each_serve_several_of_queries():
    """As if they were repeated."""
    q, k, v = (torch.randn(1, 256, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    mask = tgm.dense_mask(tgm.block_masks(random_ids(256, small_config()), (as_window(2),), 256)[0])
    outcomes = []
    for repeats in (1, 2):
        y = tgm.attend(q, *(x.repeat_interleave(repeats, 2) for x in (k, v)), mask, 0.12, {})
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for grouped, repeated in zip(*outcomes):
        torch.testing.assert_close(grouped, repeated, rtol=1e-5, atol=1e-5)  # fp32 sums of 256 terms
