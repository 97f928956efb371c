"""The fastest published recipe of the medium track: MUDD connections, 4,150 steps, 860.5 s on 8xH100.

As published in modded-nanogpt's pull request 261 on 2026-04-27 (six runs: mean loss 2.9171; README.md in this folder).

    torchrun --standalone --nproc_per_node=8 records/2026-04-27_MUDD/train_gpt_mudd.py             # 1, 2, 4 GPUs too
    torchrun --standalone --nproc_per_node=8 records/2026-04-27_MUDD/train_gpt_mudd.py mudd_smear  # with Smear-MTP
    torchrun --standalone --nproc_per_node=1 records/2026-04-27_MUDD/train_gpt_mudd.py mudd_short  # 300 steps
    python records/2026-04-27_MUDD/train_gpt_mudd.py mudd_tiny                                     # on a CPU

This file is the recipe. The machine that runs it is train_gpt_medium.py; the log holds both sources.
Shards are read from the preset's `data_dir`, or from the folder named by the environment variable DATA_PATH.
Shapes: T tokens of a piece, C channels, H heads, D channels of a head, V rows of the head.
"""
import math
import os
import sys
from array import array
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_medium as tgm  # noqa: E402
from train_gpt_medium import Group, ReluSquaredMLP, Run, Shard, UserError, look_up, norm, tl  # noqa: E402


# ----------------------------------------------------------------------------------------------------------------------
# Constants

@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """Every constant of a run; the defaults are the published run's."""
    preset: str = "mudd"
    num_iterations: int = 4150
    extension_steps: int = 25  # the last ones, after the schedules' end
    stages: "tuple[Stage, ...]" = field(default_factory=lambda: STAGES)
    groups: tuple[Group, ...] = field(default_factory=lambda: GROUPS)
    snoo: None = None
    val_every: int = 250
    kernel_warmup_steps: int = 9
    max_doc_len: int = 4096  # tokens of a document that are trained on; the rest of it is dropped
    # model
    layers: "tuple[Layer, ...]" = field(default_factory=lambda: LAYERS)
    num_heads: int = 8
    head_dim: int = 128
    mlp_factor: int = 4  # hidden width of the MLP, in model_dim
    bigram_rows: int = 5 * 50304
    gate_channels: int = 16  # of a gate's input
    dense_channels: int = 64  # hidden width of a MUDD module
    late_layer: int = 11  # whose output the layers after it attend from
    attention_scale: float = 0.1  # in place of 1/sqrt(D), since q and k are normed; YaRN raises it
    rotary_base: float = 1024.0
    window_unit: int = 128  # tokens, of the stages' windows
    val_window: int = 27  # of the last validation
    max_short_window: int = 11
    smear_mtp: bool = False  # Smear-MTP before the head: not in the published recipe, and untried at its size
    fused_head: bool = True  # GPT.loss by a kernel, in less memory; False: as GPT.loss is written
    fp8_head: bool = True  # products of the fused head in FP8 while training
    dtype: torch.dtype = torch.bfloat16  # of weights, activations and Newton-Schulz; float32 in exact tests
    val_loss_chunks: int = 4  # the logits of a whole piece of validation do not fit
    # schedules
    flat_share: float = 0.3  # of the scheduled steps at the stages' full rates
    final_lr_factor: float = 0.1
    momentum_start: float = 0.85
    momentum_end: float = 0.95
    momentum_warmup_steps: int = 300
    momentum_cooldown_steps: int = 50
    tied_share: float = 2 / 12  # of the scheduled steps with one table for embedding and head

    may_be_zero = (*Run.may_be_zero, "extension_steps", "flat_share", "final_lr_factor", "momentum_start", "tied_share")

    def checks(self) -> list[tuple[bool, str]]:
        return super().checks() + [
            (self.extension_steps < self.num_iterations, "extension_steps leaves no step for the schedules"),
            (self.head_dim % 4 == 0 == self.num_heads % 2, "num_heads is not even, or head_dim not a multiple of 4"),
            (self.gate_channels <= self.model_dim, "gate_channels is more than the model has"),
            (self.val_piece_len % self.val_loss_chunks == 0, "val_loss_chunks does not divide val_seq_len's pieces"),
            (not self.fp8_head or self.fused_head and self.dtype == torch.bfloat16,
             "fp8_head needs fused_head and dtype bfloat16"),
            (all(stage.seq_len % self.window_unit == 0 for stage in self.stages),
             f"window_unit {self.window_unit} does not divide a stage's seq_len"),
            (self.late_layer < len(self.layers) - 1, f"late_layer {self.late_layer} is not before the last layer")]

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def scheduled_steps(self) -> int:
        return self.num_iterations - self.extension_steps

    def stage(self, step: int) -> "Stage":
        """Ends of stages are shares of the scheduled steps; the last stage lasts through the extension."""
        return next((row for row in self.stages if step < row.until * self.scheduled_steps), self.stages[-1])

    def model_inputs(self, step: int) -> dict[str, int | float]:
        stage, (mtp_1, mtp_2) = self.stage(step), mtp_weights(step, self)
        window = self.val_window if step == self.num_iterations else stage.window
        return {"window_blocks": window, "yarn": stage.yarn, "mtp_1": mtp_1, "mtp_2": mtp_2}

    def make_model(self) -> "GPT":
        return GPT(self)

    def next_batch(self, shard: Shard, position: int, step: int) -> tuple[list[list[range]], int] | None:
        """Pieces of whole documents. A document is cut at max_doc_len and at its piece's end; the rest is dropped."""
        starts, (num_pieces, length) = document_starts(shard, self.doc_token), self.pieces(self.stage(step))
        pieces = []
        for _ in range(num_pieces):
            piece, missing = [], length + 1
            while missing:
                if position == len(starts) - 1:
                    return None
                begin, position = starts[position], position + 1
                end = min(starts[position], begin + self.max_doc_len, begin + missing)
                piece.append(range(begin, end))
                missing -= end - begin
            pieces.append(piece)
        return pieces, position


@lru_cache(maxsize=None)
def document_starts(shard: Shard, doc_token: int) -> array:
    """Where the shard's documents start, and its end. Raises UserError where none does.

    Of a shard that is not there yet, how many of them a run needs is asked: lengths as FineWeb's, in distribution.
    """
    if not shard.path.exists():
        lengths = np.random.default_rng(0).lognormal(math.log(403), 1.2, shard.num_tokens // 600).astype(int) + 1
        starts = np.cumsum(lengths[lengths.cumsum() < shard.num_tokens])
    else:
        starts = np.flatnonzero(np.fromfile(shard.path, dtype="<u2", offset=tgm.HEADER_BYTES) == doc_token)
        if not len(starts):
            raise UserError(f"{shard.path} holds no document id {doc_token}: use shards whose documents begin with it.")
        if starts[0] and os.environ.get("RANK", "0") == "0":
            print(f"{shard.path} begins within a document: its first {starts[0]:,} tokens are skipped", flush=True)
    return array("q", [*starts.tolist(), shard.num_tokens])


# ----------------------------------------------------------------------------------------------------------------------
# Layer plan

class Layer(NamedTuple):
    """A row of the layer plan."""
    long_window: bool = False  # such layers also shift the channels of their keys that do not rotate by one token
    value_embed: int | None = None  # table added to the values
    skip_from: int | None = None  # earlier layer whose output is added first, gated


LAYERS = (
    Layer(value_embed=0, long_window=True),  # 0
    Layer(value_embed=1),  # 1
    Layer(value_embed=2),  # 2
    Layer(value_embed=3),  # 3
    Layer(value_embed=4, long_window=True),  # 4
    Layer(),  # 5
    Layer(),  # 6
    Layer(),  # 7
    Layer(),  # 8
    Layer(skip_from=6),  # 9
    Layer(skip_from=4),  # 10
    Layer(skip_from=2, value_embed=0, long_window=True),  # 11
    Layer(value_embed=1),  # 12
    Layer(value_embed=2),  # 13
    Layer(value_embed=3),  # 14
    Layer(value_embed=4, long_window=True),  # 15
)


# ----------------------------------------------------------------------------------------------------------------------
# Stages and schedules: functions of the step in progress, counted from 0

class Stage(NamedTuple):
    """A row of the stage table: what holds until a share of the scheduled steps is done."""
    until: float = 1.0
    seq_len: int = 64 * 1024  # tokens of a piece
    window: int = 23  # of long layers, in window_unit; of the others half of it
    lr_factor: float = 2.0  # before the cooldown
    yarn: int = 3  # changes of rotary and attention_scale so far
    num_slices: int = 8  # pieces of a batch


STAGES = (
    Stage(1 / 12, 16 * 1024, window=3, lr_factor=1.0, yarn=0),
    Stage(2 / 12, 32 * 1024, window=7, lr_factor=1.52, yarn=1),
    Stage(3 / 12, 48 * 1024, window=11, lr_factor=1.73, yarn=2),
    Stage(4 / 12, window=13),
    Stage(5 / 12, window=15),
    Stage(6 / 12, window=17),
    Stage(7 / 12, window=19),
    Stage(8 / 12, window=21),
    Stage(1.0, window=23),
)


def lr_factor(step: int, config: Config) -> float:
    """The stage's, then linear down from the last stage's to final_lr_factor, and flat in the extension."""
    progress = min(step / config.scheduled_steps, 1.0)
    if progress < config.flat_share:
        return config.stage(step).lr_factor
    remaining = (1 - progress) / (1 - config.flat_share)
    return remaining * config.stages[-1].lr_factor + (1 - remaining) * config.final_lr_factor


def muon_momentum(step: int, config: Config) -> float:
    """Rises at the start of the run and falls at its end."""
    cooled = max(step - (config.num_iterations - config.momentum_cooldown_steps), 0) / config.momentum_cooldown_steps
    share = min(step / config.momentum_warmup_steps, 1) - cooled
    return config.momentum_start + share * (config.momentum_end - config.momentum_start)


def mtp_weights(step: int, config: Config) -> tuple[float, float]:
    """Weights of the second and third next token as targets: the third goes in the first twelfth, then the second."""
    twelfths = 12 * step / config.scheduled_steps
    return 0.5 * min(max(2 - twelfths, 0), 1), 0.25 * max(1 - twelfths, 0)


def is_tied(step: int, config: Config) -> bool:
    """Up to the first update of the table after tied_share: embedding and head are one table."""
    return step <= math.ceil(config.tied_share * config.scheduled_steps) | 1


def yarn_states(config: Config) -> tuple[Tensor, Tensor]:
    """Rotary frequencies [n, D / 2] and attention scales [n], fp32, before and after each change of YaRN."""
    quarter = config.head_dim // 4
    f, scale = (1 / config.rotary_base) ** torch.linspace(0, 1, quarter, dtype=torch.float32), config.attention_scale
    first_of = {stage.yarn: stage for stage in reversed(config.stages)}
    frequencies, scales = [f], [scale]
    for n in range(1, len(first_of)):
        old, new = first_of[n - 1].window, first_of[n].window
        rotations = config.window_unit * old * f / (2 * math.pi)
        theta = ((rotations - 1) / 31).clamp(0, 1)
        f = f * (old / new + theta * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
        frequencies.append(f)
        scales.append(scale)
    return F.pad(torch.stack(frequencies), (0, quarter)), torch.tensor(scales)  # half of the channels never rotate


# ----------------------------------------------------------------------------------------------------------------------
# Model. A parameter is declared once, with its initial value; its role in GROUPS is the last part of its name.

DENSE_SCALE = 0.2 / 3 ** 0.5  # of what MUDD's modules put out
LAST_VALUE_SCALE = 1.15  # of the mix that the last layer's values get


def bigram_ids(ids: Tensor, num_rows: int) -> Tensor:
    """Row of the bigram table for each token and the one before it, [T] -> [T]; the first token has the last row."""
    M, ids = num_rows - 1, ids.int()
    before_second = (27191 * M + 2**31) % 2**32 - 2**31  # M stands for the first token; int32 wraps, as published
    before = torch.cat((ids.new_full((2,), before_second), 27191 * ids[1:-1]))
    return torch.cat((ids.new_full((1,), M), (((36313 * ids) ^ before) % M)[1:]))


def shift(x: Tensor) -> Tensor:
    """y[t] = x[t - 1], y[0] = x[0], along the first dimension. Looks across document borders."""
    return torch.cat((x[:1], x[:-1]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [T, H, D], tables [T, 1, D / 2]."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def shift_still_channels(k: Tensor) -> Tensor:
    """[T, H, D]: the second quarter and the fourth, which never rotate, become the previous token's."""
    rotating, still = k.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((rotating, shift(still)), -2).flatten(-3)


class Block(nn.Module):
    """One layer: its attention and its MLP, which GPT adds up."""
    def __init__(self, config: Config, layer: Layer, is_last: bool):
        super().__init__()
        C, hidden = config.model_dim, config.mlp_factor * config.model_dim
        self.gate_shape = config.num_heads, config.gate_channels
        self.shifts_keys = layer.long_window
        bound = (3 / C) ** 0.5  # uniform in +-bound
        qkvo = torch.empty(4, C, C).uniform_(-bound, bound)
        qkvo[3] = 0
        self.qkvo = nn.Parameter(qkvo.to(config.dtype))
        self.mlp_fc = nn.Parameter(torch.empty(hidden, C).uniform_(-bound / 2, bound / 2).to(config.dtype))
        self.mlp_proj = nn.Parameter(torch.zeros(hidden, C, dtype=config.dtype))  # [in, out]
        self.attn_gate = nn.Parameter(torch.zeros(self.gate_shape, dtype=config.dtype))
        if layer.value_embed is not None and not is_last:  # the last layer's gate is MUDD's
            self.value_gate = nn.Parameter(torch.zeros(self.gate_shape, dtype=config.dtype))

    def gate(self, a: Tensor, weights: Tensor) -> Tensor:
        """From the first channels of a [T, C], numbers between 0 and 1 for every token and head, [T, H, 1]."""
        return torch.sigmoid(F.linear(a[:, :self.gate_shape[1]], weights))[..., None]

    def attention(self, a: Tensor, lambdas: Tensor, value_embed: Tensor | None, rotary: tuple[Tensor, Tensor], mask,
                  scale: Tensor, value_gate: Tensor | None = None, mix: Tensor | None = None) -> Tensor:
        """a, value_embed, mix [T, C] -> [T, C]. lambdas: [2], of qkv and o.

        value_gate [T, H, 1], mix: of the last layer alone, from MUDD.
        """
        in_heads = partial(torch.unflatten, dim=-1, sizes=(self.gate_shape[0], -1))
        # The scalars multiply the weights, which are fewer than the activations.
        qkv = F.linear(a, (lambdas[0] * self.qkvo[:3]).flatten(0, 1))
        q, k, v = (in_heads(x) for x in qkv.chunk(3, dim=-1))
        if mix is not None:
            v = v + in_heads(mix)
        q, k = rotate(norm(q), *rotary), rotate(norm(k), *rotary)
        if self.shifts_keys:
            k = shift_still_channels(k)
        if value_embed is not None:
            value_gate = 2 * self.gate(a, self.value_gate) if value_gate is None else value_gate
            v = v + value_gate * in_heads(value_embed)
        # FlexAttention takes no scale that changes; q's rounding hides in its own.
        y = tgm.attend((scale * q)[None], k[None], v[None], mask, 1.0, {})[0] * self.gate(a, self.attn_gate)
        return F.linear(y.flatten(1), lambdas[1] * self.qkvo[3])

    def mlp(self, x: Tensor) -> Tensor:
        return ReluSquaredMLP.apply(norm(x), self.mlp_fc, self.mlp_proj.mT)


class GPT(nn.Module):
    """The published model: gated value embeddings and skips, bigrams, late layers that attend from one latent, MUDD."""
    compiled_alone = ("forward",)  # which is all, in one graph
    crosses_documents = "the input's smear, bigrams and shifted keys"

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.largest_logit = config, CAP
        C, n, gate = config.model_dim, len(config.layers), config.gate_channels
        num_rows = -(-config.vocab_size // 128) * 128

        def parameter(x: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(x.to(dtype))

        def zeros(*shape: int) -> nn.Parameter:
            return parameter(torch.zeros(shape), config.dtype)

        self.blocks = nn.ModuleList(Block(config, layer, i == n - 1) for i, layer in enumerate(config.layers))
        # [V, 2, C]: of each token the head's row, then the embedding's, so that one rank holds both and can tie them.
        self.tied = parameter((0.005 * torch.randn(num_rows, 1, C)).repeat(1, 2, 1), config.dtype)
        num_value_embeds = len({layer.value_embed for layer in config.layers} - {None})
        # A second table for the input, the others for values.
        self.embeds = zeros(1 + num_value_embeds, num_rows, C)
        nn.init.normal_(self.embeds[0])
        self.bigram_embed = zeros(config.bigram_rows, C)
        self.block_lambdas = parameter(torch.full((n,), 1.05))
        self.attn_lambdas = parameter(torch.tensor([0.5, 1.0]).repeat(n, 1))
        self.x0_lambdas = parameter(torch.zeros(n, 2))
        self.bigram_lambdas = parameter(torch.full((n,), 0.05))
        self.embed_smear_lambda = parameter(torch.tensor(0.0))
        self.embed_smear_gate = zeros(gate)
        num_skips = sum(layer.skip_from is not None for layer in config.layers)
        self.skip_lambdas = parameter(torch.full((num_skips,), -1.5))
        self.skip_gates = zeros(num_skips, gate)
        # MUDD's two modules, after the last layer but one and after the last: [64, C] then [64, 2, 8], and biases.
        self.dense_w1 = parameter(torch.empty(2, config.dense_channels, C).uniform_(-1, 1) / C ** 0.5, config.dtype)
        self.dense_w2 = zeros(2, config.dense_channels, 2, 8)
        biases = torch.zeros(2, 2, 8)
        biases[0, :, 4:6] = torch.tensor([1.05, 1.0]) / DENSE_SCALE
        biases[0, :, 7] = 0.05 / DENSE_SCALE
        biases[1, 1, 1] = -4.34
        # In bf16, which rounds away every update of the large ones: in fp32 this would be another recipe.
        self.dense_biases = parameter(biases, config.dtype)
        if config.smear_mtp:
            self.smear_lambda = parameter(torch.tensor(0.0))
        # Tables for every state of YaRN: computed in forward, they would be computed again in every layer's kernels.
        frequencies, scales = yarn_states(config)
        positions = torch.arange(max(config.piece_len, config.val_piece_len), dtype=torch.float32)
        theta = positions[:, None, None] * frequencies[:, None, None]  # [n, max_len, 1, D / 2]
        self.register_buffer("cos", theta.cos().to(config.dtype), persistent=False)
        self.register_buffer("sin", theta.sin().to(config.dtype), persistent=False)
        self.register_buffer("attention_scales", scales, persistent=False)

    def rotary(self, T: int, yarn: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, D / 2]. yarn: zero-dim; as an index of one dimension the host need not read it."""
        return tuple(table[:, :T][yarn[None]].squeeze(0) for table in (self.cos, self.sin))

    def dense(self, n: int, x: Tensor) -> Tensor:
        """MUDD's module n: x [T, C] -> numbers for each token, [T, 2, 8]. MUDD is from [Xiao et al., 2025]."""
        hidden = F.gelu(F.linear(x, self.dense_w1[n]))
        return DENSE_SCALE * ((hidden @ self.dense_w2[n].flatten(1)).view(-1, 2, 8) + self.dense_biases[n])

    def latents(self, ids: Tensor, window_blocks: Tensor, yarn: Tensor) -> Tensor:
        """ids [T] integer -> the head's input [T, C]. window_blocks: of the long layers, in window_unit."""
        config, gate = self.config, self.config.gate_channels
        short = (window_blocks // 2).clamp(max=config.max_short_window)
        masks = tgm.attention_masks(ids, (config.window_unit * short, config.window_unit * window_blocks),
                                    config.doc_token, exact=True)
        rotary, scale = self.rotary(len(ids), yarn), self.attention_scales[yarn[None]].squeeze(0)
        e, x02, *value_embeds = look_up(ids, self.tied[:, 1][None], self.embeds)
        smear_gate = self.embed_smear_lambda * torch.sigmoid(e[1:, :gate] @ self.embed_smear_gate)
        x0 = norm(tgm.smear(e, smear_gate[:, None]))
        x02 = norm(x02)
        xb, = look_up(bigram_ids(ids, config.bigram_rows), self.bigram_embed[None])
        x, outputs, skips = x0, [], iter(zip(self.skip_lambdas, self.skip_gates))

        *early, (last_layer, last_block) = zip(config.layers, self.blocks)
        for i, (layer, block) in enumerate(early):
            if layer.skip_from is not None:
                skip_lambda, skip_gate = next(skips)
                skip = torch.sigmoid(skip_lambda) * 2 * torch.sigmoid(x0[:, :gate] @ skip_gate)
                x = x + skip[:, None] * outputs[layer.skip_from]
            x = (self.block_lambdas[i] * x + self.x0_lambdas[i, 0] * x0 + self.x0_lambdas[i, 1] * x02
                 + self.bigram_lambdas[i].to(x.dtype) * xb)
            a = norm(x if i <= config.late_layer else outputs[config.late_layer])
            value_embed = None if layer.value_embed is None else value_embeds[layer.value_embed]
            x = x + block.attention(a, self.attn_lambdas[i], value_embed, rotary, masks[layer.long_window], scale)
            x = x + block.mlp(x)
            outputs.append(x)

        late, dense = outputs[config.late_layer], self.dense(0, x)
        mix = LAST_VALUE_SCALE * self.weigh(dense[:, 0], x0, late, x)
        x = x + self.weigh(dense[:, 1], x0, late, x)
        # Heads of each half share a gate.
        value_gate = 2 + dense[:, :, 3].repeat_interleave(config.num_heads // 2, 1)[..., None]
        y = last_block.attention(norm(late), self.attn_lambdas[-1], value_embeds[last_layer.value_embed], rotary,
                                 masks[last_layer.long_window], scale, value_gate, mix)
        x = self.weigh(dense[:, 0, 4:], x, y, x0, xb)
        x = self.weigh(dense[:, 1, 4:], x, last_block.mlp(x))

        x = x + self.weigh(self.dense(1, x)[:, 1], x0, late, outputs[-1], value_embeds[0], outputs[4])
        return tgm.smear(norm(x), self.smear_lambda) if config.smear_mtp else norm(x)

    @staticmethod
    def weigh(weights: Tensor, *xs: Tensor) -> Tensor:
        """The sum of the xs [T, C], each times its column of weights [T, n]; further columns are not read."""
        return sum(weights[:, i, None] * x for i, x in enumerate(xs))

    def loss(self, latents: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum, not mean, over tokens and over the next tokens k, of weights[k] times the cross-entropy, fp32, in nats.

        An edit of it needs fused_head = False, or training, by MtpHead, does not see it. All rows of the head count.
        """
        capped = cap((latents @ self.tied[:, 0].mT).float())
        log_sum, T = capped.logsumexp(-1), len(targets)
        loss = torch.zeros((), device=latents.device)
        for k, weight in enumerate(weights):
            target_capped = capped[:T - k].gather(1, targets[k:, None])[:, 0]
            # The last k tokens have no such target; the published gradient lowers their log_sum all the same.
            rest = (log_sum - log_sum.detach())[T - k:].sum()
            loss = loss + weight * ((log_sum[:T - k] - target_capped).sum() + rest)
        return loss

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Validation's: cross-entropy of logits [n, V], not yet capped, and targets [n], in nats (fp32), [n]."""
        return F.cross_entropy(cap(logits.float()), targets, reduction="none")

    def forward(self, ids: Tensor, targets: Tensor, window_blocks: Tensor, yarn: Tensor, mtp_1: Tensor,
                mtp_2: Tensor) -> Tensor:
        """In training the sum of weighted losses, else the mean cross-entropy, in nats (fp32). ids, targets: [T]."""
        latents = self.latents(ids, window_blocks, yarn)
        head, chunks = self.tied[:, 0], self.config.val_loss_chunks
        if not torch.is_grad_enabled():
            return sum(self.token_losses(y @ head.mT, t).sum()
                       for y, t in zip(latents.chunk(chunks), targets.chunk(chunks))) / len(ids)
        weights = torch.stack((torch.ones_like(mtp_1), mtp_1, mtp_2))
        if not self.config.fused_head:
            return self.loss(latents, targets, weights)
        return MtpHead.apply(latents, head, targets, weights, self.config.fp8_head)

    def report(self) -> dict[str, float]:
        """The learned scalars that a validation line of the log shows."""
        smear_lambda = {"smear_lambda": self.smear_lambda.item()} if self.config.smear_mtp else {}
        return smear_lambda | {"embed_smear_lambda": self.embed_smear_lambda.item(),
                               "block_lambda_0": self.block_lambdas[0].item(),
                               "x0_lambda_0": self.x0_lambdas[0, 0].item(),
                               "bigram_lambda_0": self.bigram_lambdas[0].item()}


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: the head. The logits are capped at CAP, and the gradient is written beside them, in FP8.

CAP, CAP_SHIFT, CAP_SCALE = 23.0, 5.0, 7.5
# What an FP8 number of 1 stands for, of latents, of the head and of the logits' gradient.
X_SCALE, W_SCALE, GRAD_SCALE = 100 / 448, 1.6 / 448, 0.75 / 448


def cap(z: Tensor) -> Tensor:
    """Logits between 0 and CAP."""
    return CAP * torch.sigmoid((z + CAP_SHIFT) / CAP_SCALE)


@tgm.kernel
def mtp_cross_entropy_kernel(logits, targets, weights, losses, grads, num_rows, num_columns, cap, cap_shift, cap_scale,
                             grad_scale, grad_max, NUM_TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * num_columns
        exp_sum = tl.full([BLOCK], 0.0, tl.float32)
        for start in tl.range(0, num_columns, BLOCK, num_stages=4):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + offset + column, mask=column < num_columns, other=0.0).to(tl.float32)
            share = tl.sigmoid((z + cap_shift) / cap_scale).to(tl.bfloat16).to(tl.float32)
            # No logit exceeds cap, so the exponentials need no maximum to be subtracted.
            exp_sum += tl.where(column < num_columns, tl.exp(cap * share - cap), 0.0)
        log_sum, slope = tl.log(tl.sum(exp_sum, 0)) + cap, cap / (cap_scale * grad_scale)
        loss, weight_sum = 0.0, 0.0
        for k in tl.static_range(NUM_TARGETS):
            weight = tl.load(weights + k)
            weight_sum += weight
            if row + k < num_rows:
                z = tl.load(logits + offset + tl.load(targets + row + k)).to(tl.float32)
                share = tl.sigmoid((z + cap_shift) / cap_scale).to(tl.bfloat16).to(tl.float32)
                loss += weight * (log_sum - cap * share)
        tl.store(losses + row, loss)
        for start in tl.range(0, num_columns, BLOCK, num_stages=4):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + offset + column, mask=column < num_columns, other=0.0).to(tl.float32)
            share = tl.sigmoid((z + cap_shift) / cap_scale).to(tl.bfloat16).to(tl.float32)
            excess = weight_sum * tl.exp(cap * share - log_sum)
            for k in tl.static_range(NUM_TARGETS):
                target = tl.load(targets + row + k, mask=row + k < num_rows, other=-1).to(tl.int32)
                excess -= tl.where(column == target, tl.load(weights + k), 0.0)
            grad = excess * share * (1 - share) * slope
            grad = tl.minimum(tl.maximum(grad, -grad_max), grad_max)
            tl.store(grads + offset + column, grad.to(grads.dtype.element_ty), mask=column < num_columns)


@torch.library.custom_op("mudd::mtp_cross_entropy", mutates_args=())
def mtp_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """Loss of each row of logits [T, V], not yet capped, under its next len(weights) targets, fp32, and the gradient.

    fp8: the gradient [T, V] is e5m2, in units of GRAD_SCALE; otherwise it has the logits' dtype.
    """
    assert logits.is_contiguous()
    T, V = logits.shape
    losses = torch.empty(T, dtype=torch.float32, device=logits.device)
    grads = torch.empty(T, V, dtype=torch.float8_e5m2 if fp8 else logits.dtype, device=logits.device)
    grad_scale, grad_max = GRAD_SCALE if fp8 else 1.0, torch.finfo(grads.dtype).max
    if tgm.runs_kernels(logits):
        mtp_cross_entropy_kernel[(min(T, 2 * tgm.num_multiprocessors(logits.device)),)](
            logits, targets, weights, losses, grads, T, V, CAP, CAP_SHIFT, CAP_SCALE, grad_scale, grad_max,
            NUM_TARGETS=len(weights), BLOCK=4096, num_warps=16, maxnreg=64)
        return losses, grads
    share = torch.sigmoid((logits.float() + CAP_SHIFT) / CAP_SCALE)
    share = share.to(logits.dtype).float()
    log_sum = (CAP * share).logsumexp(-1)
    excess = weights.sum() * (CAP * share - log_sum[:, None]).exp()
    losses.zero_()
    for k, weight in enumerate(weights):
        target = targets[k:, None]
        losses[:T - k] += weight * (log_sum[:T - k] - CAP * share[:T - k].gather(1, target)[:, 0])
        excess[:T - k].scatter_add_(1, target, (-weight).expand(target.shape))
    grad = excess * (CAP / CAP_SCALE) * share * (1 - share) / grad_scale
    grads.copy_(grad.clamp(-grad_max, grad_max))
    return losses, grads


@mtp_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    return (logits.new_empty(len(logits), dtype=torch.float32),
            torch.empty_like(logits, dtype=torch.float8_e5m2 if fp8 else logits.dtype))


def to_fp8(x: Tensor, scale: float) -> Tensor:
    """x / scale as e4m3; what is too large becomes the largest number."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def scaled_product(a: Tensor, b: Tensor, scale_a: float, scale_b: float, out_dtype: torch.dtype,
                   fast: bool = False) -> Tensor:
    """a [M, K] b [K, N] of FP8 numbers, in units of their scales. fast: sums of less precision, on a GPU."""
    if not a.is_cuda:
        return (a.float() @ b.float() * (scale_a * scale_b)).to(out_dtype)
    scales = (torch.full((), scale, device=a.device) for scale in (scale_a, scale_b))
    # The GPU's instruction needs a by rows and b by columns.
    return torch._scaled_mm(a.contiguous(), b.mT.contiguous().mT, *scales, out_dtype=out_dtype, use_fast_accum=fast)


class MtpHead(torch.autograd.Function):
    """GPT.loss in training: forward computes both gradients, and frees the logits, the largest tensor of all."""
    @staticmethod
    def forward(ctx, latents: Tensor, head: Tensor, targets: Tensor, weights: Tensor, fp8: bool) -> Tensor:
        if not fp8:
            logits = latents @ head.mT
            losses, grads = mtp_cross_entropy(logits, targets, weights, False)
            ctx.save_for_backward(grads @ head, grads.mT @ latents)
            return losses.sum()
        x8, w8 = to_fp8(latents, X_SCALE), to_fp8(head, W_SCALE)
        logits = scaled_product(x8, w8.mT, X_SCALE, W_SCALE, latents.dtype, fast=True)
        losses, g8 = mtp_cross_entropy(logits, targets, weights, True)
        head_grad = scaled_product(g8.mT, x8, GRAD_SCALE, X_SCALE, torch.float32).to(head.dtype)
        ctx.save_for_backward(scaled_product(g8, w8, GRAD_SCALE, W_SCALE, latents.dtype), head_grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        latents_grad, head_grad = ctx.saved_tensors
        return latents_grad * grad, head_grad * grad, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Update rules and parameter groups

# One row per Newton-Schulz step: a, b, c of X <- aX + (bA + cA^2)X with A = XX^T (Polar Express, [Amsel et al., 2025]).
NEWTON_SCHULZ = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class NorMuon:
    """Orthogonalised momentum whose rows are scaled by their own averages [NorMuon, Li et al., 2025], and mantissas."""
    lr_factor: float = 1.0  # of lr, for the step alone
    lr: float = 0.015  # before schedules
    decay: float = 1.2
    beta2: float = 0.95
    unit_dims = 2  # a matrix is never split across ranks
    compiles = True

    def hyperparameters(self, step: int, config: Config) -> dict[str, float]:
        lr = self.lr * lr_factor(step, config)
        return {"lr": lr * self.lr_factor, "decay": self.decay * lr * lr * self.lr_factor,
                "momentum": muon_momentum(step, config)}

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32),
                    row_squares=torch.zeros_like(p[..., :1], dtype=torch.float32),
                    mantissa=torch.zeros_like(p, dtype=torch.int16))

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], lr: Tensor,
               decay: Tensor, momentum: Tensor) -> None:
        """In place, on batches of matrices [n, rows >= cols]."""
        for p, grad, state in zip(params, grads, states):
            average, is_tall = state["momentum_buffer"], p.size(-2) > p.size(-1)
            average.copy_(average + (1 - momentum) * (grad.float() - average))
            x = (grad.float() + momentum * (average - grad.float())).to(p.dtype)
            x = x.mT.contiguous() if is_tall else x
            x = tgm.newton_schulz(x, NEWTON_SCHULZ, first_norm=1 / 1.02, eps=1e-6)
            x = x.mT if is_tall else x
            squares, cols = x.float().square().mean(-1, keepdim=True), x.size(-1)
            state["row_squares"].lerp_(squares, 1 - self.beta2)
            factors = state["row_squares"].clamp_min(1e-10).rsqrt()
            # The matrix keeps its Frobenius norm.
            before, after = ((cols * s).sum(-2, keepdim=True) for s in (squares, squares * factors.square()))
            x = (x * (factors * before.sqrt() / after.sqrt().clamp_min(1e-10)).to(x.dtype)).float()
            w = tgm.read_weights(p, state["mantissa"])
            tgm.write_weights(p, state["mantissa"], w - (x * w >= 0) * w * decay - x * lr)


@dataclass(frozen=True)
class Adam:
    """Adam with fp32 averages, a decay that goes with the rate squared, where it agrees with the step; see `tied`."""
    lr: float  # before schedules
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.0
    eps: float = 1e-8
    tied: bool = False  # parameters [n, 2, C]: while is_tied, both halves get the sum of their gradients
    compiles = True

    @property
    def unit_dims(self) -> int:
        return 2 if self.tied else 0  # elementwise otherwise

    def hyperparameters(self, step: int, config: Config) -> dict[str, float]:
        lr, n = self.lr * lr_factor(step, config), step // ADAM_EVERY + 1  # updates, this one included
        bias = (1 - self.betas[1] ** n) ** 0.5 / (1 - self.betas[0] ** n)
        return {"rate": lr * bias, "decay": lr * lr * self.decay} | (
            {"is_tied": float(is_tied(step, config))} if self.tied else {})

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name in ("average", "square_average")}

    def update(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], rate: Tensor,
               decay: Tensor, is_tied: Tensor | None = None) -> None:
        """In place."""
        beta1, beta2 = self.betas
        for p, grad, state in zip(params, grads, states):
            if self.tied:  # equal gradients from equal values keep values and averages equal until they part
                grad = torch.where(is_tied.to(grad.device) > 0, grad[:, :1] + grad[:, 1:], grad)
            average, square_average = state["average"], state["square_average"]
            average.copy_(beta1 * average + (1 - beta1) * grad.float())
            square_average.copy_(beta2 * square_average + (1 - beta2) * grad.float().square())
            u, w = average / (square_average.sqrt() + self.eps) * rate, p.float()
            p.copy_(w - torch.where(u * w > 0, u + decay * w, u))


ADAM_EVERY = 2  # steps

# In the order of sending: the longest updates first, the longest messages last.
GROUPS = (
    Group("mlp_fc", ("mlp_fc",), NorMuon(lr_factor=2)),
    Group("mlp_proj", ("mlp_proj",), NorMuon(lr_factor=4)),
    Group("qkvo", ("qkvo",), NorMuon()),
    Group("lambdas", ("block_lambdas", "attn_lambdas", "embed_smear_lambda", "skip_lambdas", "x0_lambdas",
                      "smear_lambda"), Adam(lr=0.02), ADAM_EVERY),
    Group("bigram_lambdas", ("bigram_lambdas",), Adam(lr=0.004, betas=(0.9, 0.95)), ADAM_EVERY),
    Group("slow_gates", ("embed_smear_gate", "skip_gates"), Adam(lr=4e-5), ADAM_EVERY),
    Group("gates", ("attn_gate", "value_gate"), Adam(lr=4e-4, decay=0.005), ADAM_EVERY),
    Group("dense", ("dense_w1", "dense_w2"), Adam(lr=0.001, decay=0.005), ADAM_EVERY),
    Group("dense_biases", ("dense_biases",), Adam(lr=0.001), ADAM_EVERY),
    Group("tied", ("tied",), Adam(lr=0.004, betas=(0.8, 0.95), decay=0.75, tied=True), ADAM_EVERY),
    Group("embeds", ("embeds",), Adam(lr=0.3, betas=(0.8, 0.95), decay=0.025), ADAM_EVERY),
    Group("bigram_embed", ("bigram_embed",), Adam(lr=0.3, betas=(0.75, 0.95), decay=0.025), ADAM_EVERY),
)

# ----------------------------------------------------------------------------------------------------------------------
# Presets

PRESETS = {  # made and checked when they are chosen
    "mudd": Config,
    "mudd_smear": partial(Config, preset="mudd_smear", smear_mtp=True),
    "mudd_short": partial(Config, preset="mudd_short", num_iterations=300, extension_steps=2, momentum_warmup_steps=30,
                          momentum_cooldown_steps=4, val_tokens=2**20, val_seq_len=2**17, val_every=50,
                          coordinate_descent_tuning=False),
    # fp32: a CPU without AVX-512 multiplies bf16 matrices ten times slower.
    "mudd_tiny": partial(Config, preset="mudd_tiny", data_dir="data/text", shard_prefix="text", vocab_size=257,
                         doc_token=256, num_iterations=80, extension_steps=4, momentum_warmup_steps=16,
                         momentum_cooldown_steps=4, num_heads=4, head_dim=32, bigram_rows=5 * 384, window_unit=16,
                         stages=tuple(row._replace(seq_len=row.seq_len // 128, num_slices=4) for row in STAGES),
                         seq_len=512, val_tokens=2**14, val_seq_len=2**11, val_every=16, kernel_warmup_steps=1,
                         fp8_head=False, dtype=torch.float32, needs_gpu=False, coordinate_descent_tuning=False),
}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # of matrices as narrow as mudd_tiny's: more threads wait for each other
    tgm.start(PRESETS)
