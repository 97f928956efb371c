"""What makes a loss honest, checked on given weights: no position sees what it predicts, probabilities sum to one,
validation consumes every target once, warm-up leaves no trace. `weights.py audit` runs these; the tests break each.

Nothing here knows how the trainer does it: its functions are run, what they answer is judged. "The same" means bitwise.
"""
import copy
import hashlib
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import train_gpt_medium as tgm

NUM_TOKENS = 512
# Where documents begin: within a block of attention, at a block's border, and one that is its first token alone.
BORDERS = (0, 200, 256, 257)
# Tokens left as they are: within a document, around documents' first tokens, around blocks' borders.
PREFIXES = (1, 100, 127, 128, 129, 199, 200, 201, 255, 256, 257, 258, 384, NUM_TOKENS - 1)
WORLD_SIZES = (1, 2, 3, 8, 16)
TARGETS_AT_ONCE = 2**24  # logits of a call of the loss operation, which bounds memory


class Outcome(NamedTuple):
    """Of one check: `passed` is None where it could not run here. `numbers`: one line."""
    check: str
    passed: bool | None
    numbers: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'FAILED', None: 'not run'}[self.passed]:<7}  {self.check}: {self.numbers}"


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ----------------------------------------------------------------------------------------------------------------------
# What a position may see

def audited_ids(shard: tgm.Shard, config: tgm.Config) -> Tensor:
    """The first validation tokens, [T] int32, T <= 512, with documents beginning at BORDERS besides their own.

    Raises UserError where the shard holds fewer tokens than validation needs, or other ids than the model's.
    """
    T = min(NUM_TOKENS, config.val_piece_len)
    ids = shard.read(0, config.val_tokens + 1, config.vocab_size)[:T]
    ids[[border for border in BORDERS if border < T]] = config.doc_token
    return ids


def audited_steps(step: int, config: tgm.Config) -> list[int]:
    """`step` and, for each input of the model, the first steps with its first two values, such as the smallest windows.

    No two have the same inputs.
    """
    first_with: dict[str, dict[float, int]] = {}
    for number in range(config.num_iterations):
        for name, value in config.model_inputs(number).items():
            first_with.setdefault(name, {}).setdefault(value, number)
    steps = [step, *(number for numbers in first_with.values() for number in list(numbers.values())[:2])]
    return sorted({tgm.as_fields(config.model_inputs(number)): number for number in steps}.values())


def describe(steps: list[int], config: tgm.Config) -> str:
    return ", ".join(tgm.as_fields(config.model_inputs(step)) for step in steps)


class Seen(NamedTuple):
    """What a model hands to its loss operation, and the operation."""
    logits: Tensor  # [T, V], not yet capped
    losses: Callable[[Tensor, Tensor], Tensor]  # logits [n, V], targets [n] -> nats [n], fp32
    largest: float  # bound of a capped logit


@torch.no_grad()
def record_logits(model: nn.Module, ids: Tensor, step: int) -> Seen:
    """At `step`. The operation is the model's token_losses, if it has its own, or else the trainer's cross_entropy.

    ids: [T] integer; a position's target is the next id, as in validation. Raises UserError for another loss operation.
    """
    calls, device, (owner, name) = [], device_of(model), (tgm, "cross_entropy")
    if hasattr(model, "token_losses"):
        owner, name = model, "token_losses"
    operation = getattr(owner, name)

    def record(logits: Tensor, targets: Tensor, softcap: float = 0.0, with_grad: bool = False) -> Tensor:
        calls.append((logits, softcap))
        return logits.new_zeros(len(logits), dtype=torch.float32)

    config = model.config
    if hasattr(config, "fused_head"):  # which is given the logits that the loss as it is written begins with
        config = replace(config, fused_head=True)
    with patch.object(owner, name, record), patch.object(model, "config", config):
        model(ids.to(device), ids.roll(-1).long().to(device), **tgm.inputs_at(step, model.config, device))
    if not calls:
        raise tgm.UserError("the model's logits are not seen, since its loss is not the trainer's cross_entropy.")
    logits, softcap = torch.cat([logits for logits, _ in calls]), calls[0][1]
    if owner is model:
        return Seen(logits, operation, model.largest_logit)
    return Seen(logits, lambda z, targets: operation(z, targets, softcap, False), softcap)


def changes_after(ids: Tensor, prefix: int, doc_token: int) -> Iterator[Tensor]:
    """`ids` with all that follows the prefix replaced, new documents included; then with only the next token changed,
    to another one and to a document's beginning (or from it)."""
    rng = torch.Generator().manual_seed(prefix)
    others = (ids + torch.randint(1, doc_token, ids.shape, generator=rng, dtype=ids.dtype)) % doc_token
    suffix = torch.cat((ids[:prefix], others[prefix:]))
    suffix[prefix + 1:][torch.rand(len(ids) - prefix - 1, generator=rng) < 1 / 16] = doc_token
    yield suffix
    for token in (others[prefix], doc_token if ids[prefix] != doc_token else 0):
        one = ids.clone()
        one[prefix] = token
        yield one


def check_suffixes(model: nn.Module, ids: Tensor, steps: list[int]) -> Outcome:
    """No logit changes when later tokens do, wherever the change begins. ids: [T] int32 on the CPU."""
    num_changes, leaks, idle = 0, [], []
    for step in steps:
        inputs = describe([step], model.config)
        before = record_logits(model, ids, step).logits
        for prefix in (prefix for prefix in PREFIXES if prefix < len(ids)):
            for changed in changes_after(ids, prefix, model.config.doc_token):
                num_changes += 1
                moved = (record_logits(model, changed, step).logits - before).abs().amax(1)
                if moved[:prefix].any():
                    leaks.append(f"{inputs}, from token {prefix}: {int(moved[:prefix].count_nonzero())} earlier "
                                 f"positions, by up to {moved[:prefix].max():.2g}")
                if not moved[prefix]:
                    idle.append(f"{inputs}, token {prefix}")
    what = f"{num_changes} changes of later tokens, {describe(steps, model.config)}"
    if leaks:
        return Outcome("suffix", False, f"{len(leaks)} of {what} reach earlier logits ({leaks[0]})")
    if idle:
        return Outcome("suffix", False, f"{len(idle)} of {what} do not reach their own logits ({idle[0]})")
    return Outcome("suffix", True, f"{what}: no earlier logit moves")


@torch.no_grad()
def check_documents(model: nn.Module, ids: Tensor, steps: list[int]) -> Outcome:
    """What stands in earlier documents changes no logit of a later one but, by Smear-MTP, its first token's.

    Smear-MTP adds to each latent the one before it, also at a document's first token: the record's behaviour. That
    neighbour is an earlier token, so nothing leaks from the future; without it, or with its scalar at 0, not even the
    first token may change. Not asked of a model that names what else crosses. ids: [T] int32 on the CPU.
    """
    if crossing := getattr(model, "crosses_documents", ""):
        return Outcome("documents", None, f"{crossing} reach into later documents, as published")

    def moved(border: int, step: int) -> Tensor:
        changed = torch.where((torch.arange(len(ids)) < border) & (ids != model.config.doc_token),
                              (ids + 1) % model.config.doc_token, ids)
        before, after = (record_logits(model, x, step).logits for x in (ids, changed))
        return (before != after).any(1).cpu()

    cases = [(border, step) for step in steps for border in BORDERS if 0 < border < len(ids)]
    smeared = {case: moved(*case) for case in cases}
    unsmeared = smeared
    if hasattr(model, "smear_lambda"):
        smear_lambda = model.smear_lambda.clone()
        model.smear_lambda.zero_()
        unsmeared = {case: moved(*case) for case in cases}
        model.smear_lambda.copy_(smear_lambda)
    crossed = [f"{describe([step], model.config)}, border {border}: {int(smeared[border, step][border + 1:].sum())} "
               f"positions after the first, {int(unsmeared[border, step][border:].sum())} without Smear-MTP"
               for border, step in cases
               if smeared[border, step][border + 1:].any() or unsmeared[border, step][border:].any()]
    first = sum(bool(smeared[border, step][border]) for border, step in cases)
    what = f"{len(cases)} changes before a document, {describe(steps, model.config)}"
    if crossed:
        return Outcome("documents", False, f"{len(crossed)} of {what} reach into it ({crossed[0]})")
    if not all(smeared[border, step][:border].any() for border, step in cases):
        return Outcome("documents", False, f"of {what}, some change nothing at all")
    return Outcome("documents", True, f"{what}: no logit moves but {first} first tokens', by Smear-MTP's look back")


# ----------------------------------------------------------------------------------------------------------------------
# Probabilities

def probability_tolerance(softcap: float, num_rows: int) -> float:
    """How far rounding may take a sum of exp(-loss) over a head of `num_rows` from one, with u = 2^-24 (fp32).

    The sum's error is at most the largest error of a loss, as the weights sum to one. A loss is log(sum) - logit, and
    capped logits lie in +-softcap. The sum has V positive terms in at least 8 lanes: V / 8 u, relative, which the log
    makes absolute. Capping, subtracting the maximum, taking exponents and subtracting the target each round a number
    below 2 softcap once or twice: 10 softcap u. The log and the loss round one below 2 softcap + ln V: 3 ln V u; what
    exponentials and log add of their own, two units each: 8 u.
    """
    return (num_rows / 8 + 10 * softcap + 3 * math.log(num_rows) + 8) * 2 ** -24


@torch.no_grad()
def check_probabilities(model: nn.Module, ids: Tensor, step: int) -> Outcome:
    """exp(-loss) over every row of the padded head sums to one, by the loss operation that trains and validates.

    Logits: those of two positions of `ids` [T], and zeros, under which also the rows that training has long silenced
    count.
    """
    if not getattr(model.config, "fused_head", True):
        return Outcome("probabilities", None, "the script's own loss (fused_head = False) is not taken apart")
    logits, token_losses, softcap = record_logits(model, ids, step)
    V, rows = logits.size(1), torch.cat((logits[[len(ids) // 2, -1]], torch.zeros_like(logits[:1])))
    sums = []
    for row in rows:
        losses = [token_losses(row.expand(len(targets), V).contiguous(), targets)
                  for targets in torch.arange(V, device=row.device).split(max(1, TARGETS_AT_ONCE // V))]
        sums.append(torch.cat(losses).double().neg().exp().sum().item())
    error, tolerance = max(abs(total - 1) for total in sums), probability_tolerance(softcap, V)
    return Outcome("probabilities", error <= tolerance, f"over {V:,} rows of the head they sum to "
                   f"{', '.join(f'{total:.7f}' for total in sums)}: {error:.1e} from 1, {tolerance:.1e} allowed")


# ----------------------------------------------------------------------------------------------------------------------
# Validation

def fingerprint(ids: np.ndarray, targets: np.ndarray) -> str:
    return hashlib.sha1(ids.astype("<i4").tobytes() + targets.astype("<i4").tobytes()).hexdigest()


def check_validation(config: tgm.Config, shard: tgm.Shard, step: int) -> Outcome:
    """`evaluate` feeds the first val_tokens targets of the shard, each once, and their mean is the loss.

    The file is read here without the trainer's help. Ranks are played one after the other, and nothing is added up
    between them: each answers with its share of the mean.
    """
    tokens = np.fromfile(shard.path, dtype="<u2", count=config.val_tokens + 1, offset=tgm.HEADER_BYTES)
    pieces = range(0, config.val_tokens, config.val_piece_len)
    expected = Counter(fingerprint(tokens[start:start + config.val_piece_len],
                                   tokens[start + 1:start + config.val_piece_len + 1]) for start in pieces)
    # Sums of ids are exact in fp64; what is left is one rounding a piece's mean and a sum.
    mean, tolerance = tokens[1:].mean(dtype=np.float64), 2 * (len(pieces) + max(WORLD_SIZES)) * 2 ** -53
    faults = []

    def model(ids: Tensor, targets: Tensor, **_) -> Tensor:
        """Counts what it is fed; a piece's loss is its mean target."""
        fed[fingerprint(ids.numpy(), targets.numpy())] += 1
        return targets.double().mean()

    model.config = config
    for size in WORLD_SIZES:
        fed: Counter[str] = Counter()
        with patch.object(tgm.dist, "all_reduce", lambda total: None):
            loss = sum(tgm.evaluate(model, shard, step, tgm.World(rank, size, torch.device("cpu")))
                       for rank in range(size))
        missing, extra = (expected - fed).total(), (fed - expected).total()
        if missing or extra:
            faults.append(f"{size} ranks: {missing} of {len(pieces)} pieces are not fed, {extra} twice or not from the "
                          f"first {config.val_tokens:,} targets")
        elif abs(loss - mean) > tolerance * mean:
            faults.append(f"{size} ranks: the loss is {loss / mean:.9f} times the mean over its targets")
    if faults:
        return Outcome("validation", False, "; ".join(faults))
    return Outcome("validation", True, f"targets 1 to {config.val_tokens:,} of {shard.path.name}, each once, and their "
                   f"mean, with {str(WORLD_SIZES)[1:-1]} ranks")


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up

def leaves(tree, path: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested dicts, lists and tuples, by path."""
    if not isinstance(tree, (dict, list, tuple)):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, f"{path}/{key}" if path else str(key))


def traces(model: nn.Module, optimizer: tgm.Optimizer) -> dict[str, object]:
    """Copies of all that a warm-up could change, by name: parameters, gradients, optimizer states, random states."""
    return copy.deepcopy(dict(leaves({
        "parameters": model.state_dict(), "gradients": {name: p.grad for name, p in model.named_parameters()},
        "optimizer": optimizer.state_dict(), "torch's random state": torch.get_rng_state(),
        "the GPUs' random states": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy's random state": pickle.dumps(np.random.get_state()),
        "Python's random state": pickle.dumps(random.getstate())})))


def check_warm_up(model: nn.Module, world: tgm.World) -> Outcome:
    """After `warm_up` from these weights all is as it was, bit for bit. The model keeps the optimizer's buffers."""
    optimizer = tgm.Optimizer(model, model.config, world)
    before = traces(model, optimizer)
    tgm.warm_up(model, optimizer, world)
    after = traces(model, optimizer)
    changed = [name for name in before.keys() | after.keys() if not (name in before and name in after and (
        torch.equal(before[name], after[name]) if isinstance(before[name], Tensor) else before[name] == after[name]))]
    what = f"kernel_warmup_steps = {model.config.kernel_warmup_steps} and a validation"
    if changed:
        return Outcome("warm-up", False, f"{what} change {len(changed)} of {len(before)} states ({min(changed)})")
    return Outcome("warm-up", True, f"{what} leave {len(before)} states as they were")
