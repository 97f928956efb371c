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
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

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


def listed(numbers) -> str:
    return ", ".join(map(str, numbers))


# ----------------------------------------------------------------------------------------------------------------------
# What a position may see

def audited_ids(shard: tgm.Shard, config: tgm.Config) -> Tensor:
    """The first validation tokens, [T] int32, T <= 512, with documents beginning at BORDERS besides their own."""
    T = min(NUM_TOKENS, config.val_piece_len)
    ids = torch.from_numpy(shard.read(T, config.vocab_size).astype(np.int32))
    ids[[border for border in BORDERS if border < T]] = config.doc_token
    return ids


def audited_windows(step: int, config: tgm.Config) -> list[int]:
    """In blocks: that of `step`, and the two smallest, without and with whole blocks in sight."""
    return sorted({1, 2, tgm.num_window_blocks(step, config)})


def logits_of(latents: Tensor, head: Tensor, softcap: float) -> Tensor:
    """Softcapped logits [T, V], fp32, of latents [T, C] under the head [V, C], both in the model's dtype."""
    z = (latents @ head.mT).float()
    return z * softcap * torch.rsqrt(z.square() + softcap ** 2)


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


@torch.no_grad()
def check_suffixes(model: tgm.GPT, ids: Tensor, windows: list[int]) -> Outcome:
    """No logit changes when later tokens do, wherever the change begins. ids: [T] int32 on the CPU."""
    config, device = model.config, model.lm_head.device
    head = model.lm_head.to(config.dtype)

    def logits(ids: Tensor, window: int) -> Tensor:
        return logits_of(model.latents(ids.to(device), tgm.as_window(window, device)), head, config.logit_softcap)

    num_changes, leaks, idle = 0, [], []
    for window in windows:
        before = logits(ids, window)
        for prefix in (prefix for prefix in PREFIXES if prefix < len(ids)):
            for changed in changes_after(ids, prefix, config.doc_token):
                num_changes += 1
                moved = (logits(changed, window) - before).abs().amax(1)
                if moved[:prefix].any():
                    leaks.append(f"window {window}, from token {prefix}: {int(moved[:prefix].count_nonzero())} earlier "
                                 f"positions, by up to {moved[:prefix].max():.2g}")
                if not moved[prefix]:
                    idle.append(f"window {window}, token {prefix}")
    what = f"{num_changes} changes of later tokens, windows {listed(windows)}"
    if leaks:
        return Outcome("suffix", False, f"{len(leaks)} of {what} reach earlier logits ({leaks[0]})")
    if idle:
        return Outcome("suffix", False, f"{len(idle)} of {what} do not reach their own logits ({idle[0]})")
    return Outcome("suffix", True, f"{what}: no earlier logit moves")


@torch.no_grad()
def check_documents(model: tgm.GPT, ids: Tensor, windows: list[int]) -> Outcome:
    """What stands in earlier documents changes no latent of a later one but, by Smear-MTP, its first token's.

    Smear-MTP adds to each latent the one before it, also at a document's first token: the record's behaviour. That
    neighbour is an earlier token, so nothing leaks from the future; without it, or with its scalar at 0, not even the
    first token may change. ids: [T] int32 on the CPU.
    """
    config, device = model.config, model.lm_head.device

    def moved(border: int, window: int) -> Tensor:
        changed = torch.where((torch.arange(len(ids)) < border) & (ids != config.doc_token),
                              (ids + 1) % config.doc_token, ids)
        before, after = (model.latents(x.to(device), tgm.as_window(window, device)) for x in (ids, changed))
        return (before != after).any(1).cpu()

    cases = [(border, window) for window in windows for border in BORDERS if 0 < border < len(ids)]
    smeared = {case: moved(*case) for case in cases}
    unsmeared = smeared
    if config.smear_mtp:
        smear_lambda = model.smear_lambda.clone()
        model.smear_lambda.zero_()
        unsmeared = {case: moved(*case) for case in cases}
        model.smear_lambda.copy_(smear_lambda)
    crossed = [f"window {window}, border {border}: {int(smeared[border, window][border + 1:].sum())} latents after the "
               f"first, {int(unsmeared[border, window][border:].sum())} without Smear-MTP"
               for border, window in cases
               if smeared[border, window][border + 1:].any() or unsmeared[border, window][border:].any()]
    first = sum(bool(smeared[border, window][border]) for border, window in cases)
    what = f"{len(cases)} changes before a document, windows {listed(windows)}"
    if crossed:
        return Outcome("documents", False, f"{len(crossed)} of {what} reach into it ({crossed[0]})")
    if not all(smeared[border, window][:border].any() for border, window in cases):
        return Outcome("documents", False, f"of {what}, some change nothing at all")
    return Outcome("documents", True, f"{what}: no latent moves but {first} first tokens', by Smear-MTP's look back")


# ----------------------------------------------------------------------------------------------------------------------
# Probabilities

def probability_tolerance(config: tgm.Config, num_rows: int) -> float:
    """How far rounding may take a sum of exp(-loss) over a head of `num_rows` from one, with u = 2^-24 (fp32).

    The sum's error is at most the largest error of a loss, as the weights sum to one. A loss is log(sum) - logit, and
    capped logits lie in +-softcap. The sum has V positive terms in at least 8 lanes: V / 8 u, relative, which the log
    makes absolute. Capping, subtracting the maximum, taking exponents and subtracting the target each round a number
    below 2 softcap once or twice: 10 softcap u. The log and the loss round one below 2 softcap + ln V: 3 ln V u; what
    exponentials and log add of their own, two units each: 8 u.
    """
    return (num_rows / 8 + 10 * config.logit_softcap + 3 * math.log(num_rows) + 8) * 2 ** -24


@torch.no_grad()
def check_probabilities(model: tgm.GPT, ids: Tensor, window: int) -> Outcome:
    """exp(-loss) over every row of the padded head sums to one, by the loss operation that trains and validates.

    Rows: two latents of `ids` [T], and logits of zero, under which also the rows that training has long silenced count.
    """
    config, device, V = model.config, model.lm_head.device, len(model.lm_head)
    latents = model.latents(ids.to(device), tgm.as_window(window, device))[[len(ids) // 2, -1]]
    rows = torch.cat((latents @ model.lm_head.to(config.dtype).mT, latents.new_zeros(1, V)))
    sums = []
    for row in rows:
        losses = [tgm.cross_entropy(row.expand(len(targets), V).contiguous(), targets, config.logit_softcap, False)
                  for targets in torch.arange(V, device=device).split(max(1, TARGETS_AT_ONCE // V))]
        sums.append(torch.cat(losses).double().neg().exp().sum().item())
    error, tolerance = max(abs(total - 1) for total in sums), probability_tolerance(config, V)
    return Outcome("probabilities", error <= tolerance, f"over {V:,} rows of the head they sum to "
                   f"{', '.join(f'{total:.7f}' for total in sums)}: {error:.1e} from 1, {tolerance:.1e} allowed")


# ----------------------------------------------------------------------------------------------------------------------
# Validation

def fingerprint(ids: np.ndarray, targets: np.ndarray) -> str:
    return hashlib.sha1(ids.astype("<i4").tobytes() + targets.astype("<i4").tobytes()).hexdigest()


class Recorder:
    """In the model's place: counts the pieces that it is fed; a piece's loss is its mean target."""
    def __init__(self, config: tgm.Config):
        self.config, self.fed = config, Counter()

    def __call__(self, ids: Tensor, targets: Tensor, window_blocks: Tensor) -> Tensor:
        self.fed[fingerprint(ids.numpy(), targets.numpy())] += 1
        return targets.double().mean()


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
    for size in WORLD_SIZES:
        recorder = Recorder(config)
        with patch.object(tgm.dist, "all_reduce", lambda total: None):
            loss = sum(tgm.evaluate(recorder, shard, step, tgm.World(rank, size, torch.device("cpu")))
                       for rank in range(size))
        missing, extra = (expected - recorder.fed).total(), (recorder.fed - expected).total()
        if missing or extra:
            faults.append(f"{size} ranks: {missing} of {len(pieces)} pieces are not fed, {extra} twice or not from the "
                          f"first {config.val_tokens:,} targets")
        elif abs(loss - mean) > tolerance * mean:
            faults.append(f"{size} ranks: the loss is {loss / mean:.9f} times the mean over its targets")
    if faults:
        return Outcome("validation", False, "; ".join(faults))
    return Outcome("validation", True, f"targets 1 to {config.val_tokens:,} of {shard.path.name}, each once, and their "
                   f"mean, with {listed(WORLD_SIZES)} ranks")


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up

def leaves(tree, path: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested dicts, lists and tuples, by path."""
    if not isinstance(tree, (dict, list, tuple)):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, f"{path}/{key}" if path else str(key))


def traces(model: tgm.GPT, optimizer: tgm.Optimizer) -> dict[str, object]:
    """Copies of all that a warm-up could change, by name: parameters, gradients, optimizer states, random states."""
    return copy.deepcopy(dict(leaves({
        "parameters": model.state_dict(), "gradients": {name: p.grad for name, p in model.named_parameters()},
        "optimizer": optimizer.state_dict(), "torch's random state": torch.get_rng_state(),
        "the GPUs' random states": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy's random state": pickle.dumps(np.random.get_state()),
        "Python's random state": pickle.dumps(random.getstate())})))


def check_warm_up(model: tgm.GPT, world: tgm.World) -> Outcome:
    """After `warm_up` from these weights all is as it was, bit for bit. The model keeps the optimizer's buffers."""
    optimizer = tgm.Optimizer(model, model.config, world)
    before = traces(model, optimizer)
    tgm.warm_up(model, optimizer, world)
    after = traces(model, optimizer)
    changed = [name for name in before.keys() | after.keys() if not (name in before and name in after and (
        torch.equal(before[name], after[name]) if isinstance(before[name], Tensor) else before[name] == after[name]))]
    what = f"warmup_steps = {model.config.warmup_steps} and a validation"
    if changed:
        return Outcome("warm-up", False, f"{what} change {len(changed)} of {len(before)} states ({min(changed)})")
    return Outcome("warm-up", True, f"{what} leave {len(before)} states as they were")
