"""The plain twin: model and loss as they were before any kernel was written by hand, frozen at commit 9706d82.

The trainer's kernels are tested and benchmarked against this file; nothing in it is to be made faster. It was held to
the record's known answers when it was the trainer. What has no kernel is the trainer's own. `copy_weights` gives it the
trainer's parameters.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from train_gpt_medium import BLOCK_SIZE, Config, Layer, Rotary, attend, dense_mask, norm, smear


def window_block_mask(ids_T: Tensor, window_blocks: Tensor, doc_token: int) -> BlockMask:
    """Causal attention within documents, cut to the nearest blocks.

    ids_T: integer ids, T a multiple of 128. window_blocks: zero-dim integer tensor w, so that a growing window does not
    recompile. A query block keeps its nearest w - 1 full and max(w - full, 1) partial blocks. Full: both blocks lie in
    one document, every pair attends. Partial: q >= k and the same document are tested token by token.
    Source of the scheme: [@KoszarskyB and @YouJiacheng, modded-nanogpt].
    """
    doc_T = (ids_T == doc_token).cumsum(0)
    first_B, last_B = doc_T.view(-1, BLOCK_SIZE)[:, 0], doc_T.view(-1, BLOCK_SIZE)[:, -1]
    block = torch.arange(first_B.numel(), device=ids_T.device)
    overlap_BB = (first_B[:, None] <= last_B) & (last_B[:, None] >= first_B)
    full_BB = (block[:, None] > block) & (first_B[:, None] == last_B) & (last_B[:, None] == first_B)
    partial_BB = (block[:, None] >= block) & overlap_BB & ~full_BB

    def nearest_first(kept_BB: Tensor) -> tuple[Tensor, Tensor]:
        # Ascending and stable puts the kept blocks last, in order: flipped, they come first, nearest block first.
        return kept_BB.sum(-1, dtype=torch.int32), kept_BB.int().argsort(dim=-1, stable=True).flip(-1).int()

    num_full_B, full_index_BB = nearest_first(full_BB)
    num_partial_B, partial_index_BB = nearest_first(partial_BB)
    return BlockMask.from_kv_blocks(
        torch.minimum(num_partial_B, (window_blocks - num_full_B).clamp_min(1))[None, None],
        partial_index_BB[None, None],
        torch.minimum(num_full_B, (window_blocks - 1).clamp_min(0))[None, None],  # w = 0 keeps no full block
        full_index_BB[None, None],
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=lambda b, h, q, k: (q >= k) & (doc_T[q] == doc_T[k]),
    )


class Block(nn.Module):
    """One layer: attention without a norm in front (q, k and v are normed instead), then an MLP with relu squared."""
    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        C = config.model_dim
        self.num_heads, self.attention_scale = config.num_heads, config.attention_scale
        bound = 3 ** 0.5 * config.init_scale * C ** -0.5  # uniform in +-bound
        if layer.attention:
            qkvo = torch.empty(4, C, C).uniform_(-bound, bound)
            qkvo[3] = 0
            self.qkvo = nn.Parameter(qkvo.to(config.dtype))
        self.mlp_fc = nn.Parameter(torch.empty(4 * C, C).uniform_(-bound, bound).to(config.dtype))
        self.mlp_proj = nn.Parameter(torch.zeros(C, 4 * C, dtype=config.dtype))

    def attention(self, x: Tensor, value_embed: Tensor | None, lambdas: Tensor, rotary: Rotary,
                  mask: BlockMask | Tensor) -> Tensor:
        """x, value_embed: [T, C]; lambdas: [2], the shares of value and value embedding."""
        qkv = F.linear(x, self.qkvo[:3].flatten(0, 1)).view(1, x.size(0), 3, self.num_heads, -1)
        q, k, v = norm(qkv).unbind(2)
        v = lambdas[0] * v
        if value_embed is not None:
            v = v + lambdas[1] * value_embed.view_as(v)
        y = attend(rotary(q), rotary(k), v, mask, self.attention_scale, {})
        return F.linear(y.reshape(x.shape), self.qkvo[3])

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(norm(x), self.mlp_fc)).square(), self.mlp_proj)


class GPT(nn.Module):
    """The record's model: 16 layers, value embeddings, skips, backout, Smear-MTP. Initial values are drawn here."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        num_layers, C = len(config.layers), config.model_dim
        num_value_embeds = len({layer.value_embed for layer in config.layers} - {None})

        def table() -> nn.Parameter:
            return nn.Parameter(torch.randn(config.vocab_size, C).to(config.dtype))

        self.embed1, self.embed2 = table(), table()
        self.value_embeds = nn.ParameterList(table() for _ in range(num_value_embeds))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.rotary = Rotary(config)
        # Rows are padded to a multiple of 128 [@Grad62304977, modded-nanogpt]; all of them count in the loss.
        self.lm_head = nn.Parameter(torch.zeros(-(-config.vocab_size // 128) * 128, C, dtype=torch.float32))
        self.skip_weights = nn.Parameter(torch.ones(num_layers))
        self.block_lambdas = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]).repeat(num_layers, 1))
        self.attn_lambdas = nn.Parameter(torch.full((num_layers, 2), 0.5))
        if config.smear_mtp:
            self.smear_lambda = nn.Parameter(torch.tensor(0.0))  # zero-dim: a [1] tensor would promote bf16 to fp32
        self.backout_lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def latents(self, ids: Tensor, window_blocks: Tensor) -> Tensor:
        """ids [T] integer, window_blocks zero-dim integer -> the head's input [T, C], smeared."""
        masks = [window_block_mask(ids, w, self.config.doc_token) for w in (window_blocks, window_blocks // 2)]
        if not ids.is_cuda:
            masks = [dense_mask(mask) for mask in masks]
        long_mask, short_mask = masks
        x = x00 = norm(F.embedding(ids, self.embed1))
        x01 = norm(F.embedding(ids, self.embed2))
        value_embeds = [F.embedding(ids, table) for table in self.value_embeds]
        outputs: list[Tensor] = []
        for i, (layer, block) in enumerate(zip(self.config.layers, self.blocks)):
            if layer.skip_from is not None:
                x = x + self.skip_weights[layer.skip_from] * outputs[layer.skip_from]
            x_lambda, x00_lambda, x01_lambda = self.block_lambdas[i]
            x = x_lambda * x + x00_lambda * x00 + x01_lambda * x01
            if layer.attention:
                value_embed = None if layer.value_embed is None else value_embeds[layer.value_embed]
                x = x + block.attention(x, value_embed, self.attn_lambdas[i], self.rotary,
                                        long_mask if layer.long_window else short_mask)
            x = x + block.mlp(x)
            outputs.append(x)
        x = self.backout_lambdas[0] * norm(x) + self.backout_lambdas[1] * norm(outputs[self.config.backout_from])
        return smear(x, self.smear_lambda) if self.config.smear_mtp else x

    def logits(self, latents: Tensor) -> Tensor:
        """[T, C] -> softcapped [T, V] in fp32."""
        z = F.linear(latents, self.lm_head.to(latents.dtype)).float()
        softcap = self.config.logit_softcap
        return softcap * z * torch.rsqrt(z.square() + softcap ** 2)

    def forward(self, ids: Tensor, targets: Tensor, window_blocks: Tensor) -> Tensor:
        """Mean cross-entropy in nats (fp32). ids: [T] integer, targets: [T] int64, window_blocks: zero-dim integer."""
        latents = self.latents(ids, window_blocks)
        chunks = 1 if self.training else self.config.val_loss_chunks
        losses = [F.cross_entropy(self.logits(y), t) for y, t in zip(latents.chunk(chunks), targets.chunk(chunks))]
        return torch.stack(losses).mean()


def split_tables(embeds: Tensor) -> dict[str, Tensor]:
    """The trainer's one table of embeddings [n, V, C] as the twin's parameters, by name."""
    return {"embed1": embeds[0], "embed2": embeds[1],
            **{f"value_embeds.{i}": table for i, table in enumerate(embeds[2:])}}


def twin_of(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trainer's parameters or gradients by the twin's names."""
    named = dict(named)
    return split_tables(named.pop("embeds")) | named


def copy_weights(model: nn.Module, twin: GPT) -> None:
    """Give the twin the parameters of the trainer's model."""
    twin.load_state_dict({name: p.detach() for name, p in twin_of(dict(model.named_parameters())).items()})
