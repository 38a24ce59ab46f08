"""The other FLoRA: fused forward-backward adapters (FFBA; Gowda, Song, Lee & Goka, arXiv 2511.00050).

  python train.py --adapter ffba --rank 2 [--targets mlp] [--ffba-activation block]

A LoRA cut in two around a pair of projections W1 and W2:

    y = W2ᵀ f(W1ᵀ x) + (alpha / r) (s(x B) A)ᵀ

Only the abstract was to be had. From it: LoRA's low rank and the parallel adapter combined, a
"forward" and a "backward" adapter, both fused into existing projections, so that inference runs
no matmul more than the base. Our reading: B is appended to the first projection of a pair (PAIRS)
as outputs, A to the second as inputs; s is the identity or the block's activation; scale and
initialisation are LoRA's. Beyond the text: the columns of many adapters stand side by side and
each token keeps its own alone, so that one batch mixes adapters, still at the base's number of
matmuls.

The two projections become a FirstHalf and a SecondHalf that share a Pair, through which the first
hands its columns to the second: one thread at a time may run a model.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from flora import Adapter, AdapterLinear, Bank, adapter_layers, select, stack
from model import ACTIVATIONS
from plumbing.files import BadInput

PAIRS = {  # target: (the projection that takes B, the one that takes A) in StarCoder and in Llama
    "attn": (("attn.c_attn", "attn.c_proj"), ("self_attn.q_proj", "self_attn.o_proj")),
    "mlp": (("mlp.c_fc", "mlp.c_proj"), ("mlp.gate_proj", "mlp.down_proj")),
}


class FFBA(Adapter):
    """One half: B [d, r] on the first projection of a pair, or A [r, k] on the second."""
    kind = "ffba"
    learning_rate = 1e-3
    options = ("activation",)
    places = {target: [(place, dict(half=half)) for pair in pairs for place, half in zip(pair, "BA")]
              for target, pairs in PAIRS.items()}

    def __init__(self, rank, target, d, k, *args, half="B", activation=None):
        super().__init__(rank, target, d, k, *args)
        self.half, self.activation = half, activation or "identity"
        if self.activation not in ("identity", "block"):
            raise BadInput(f'activation is {activation!r}; use "identity" or "block"')
        if half == "B":
            self.B = nn.Parameter(torch.randn(d, rank))
            nn.init.kaiming_uniform_(self.B.T, a=5**0.5)   # as in PEFT's LoRA
        else:
            self.A = nn.Parameter(torch.zeros(rank, k))

    def rows(self):
        """This half as rows: B [r, d], or A [r, k] with alpha / r included."""
        return self.B.T if self.half == "B" else self.A * (self.alpha / self.rank)

    @classmethod
    def attached(cls, model, adapters):
        """Turn the pairs that `adapters` adapt into a FirstHalf and a SecondHalf, where they are not."""
        layers, pairs = dict(adapter_layers(model)), {}
        for name, adapter in adapters.items():
            layer = layers[name]
            if type(layer) is AdapterLinear:
                layer.__class__ = FirstHalf if adapter.half == "B" else SecondHalf
                layer.activation = ACTIVATIONS[model.config.activation_function]
                layer.pair = pairs.setdefault(name.rpartition(".")[0], Pair())   # by the module of both

    def merge(self, model, layer):
        """Append this half to the weight for good: the MLP is then r units wider, an ordinary model.

        What cannot be merged is found at an adapter's first layer: attention comes before the MLP."""
        if (model.config.model_type, self.target, self.activation) != ("gpt_bigcode", "mlp", "block"):
            raise BadInput(f"an ffba adapter of {self.target} with the activation {self.activation!r} cannot be merged, "
                           'only one of StarCoder\'s target mlp and activation "block"; serve it unmerged')
        rows = self.rows().to(layer.weight.dtype)
        if self.half == "B":
            layer.weight.data = torch.cat([layer.weight, rows])               # [k + r, d]
            layer.bias.data = F.pad(layer.bias, (0, self.rank))
            layer.out_features += self.rank
            model.config = replace(model.config, n_inner=layer.out_features)
        else:
            layer.weight.data = torch.cat([layer.weight, rows.T], dim=1)      # [k, d + r]
            layer.in_features += self.rank


ADAPTER = FFBA


class Pair:
    """What passes between the two halves in a forward: s(x B) [b, T, m] of every token's own adapter,
    zeros in the columns of the others."""
    columns = None


@dataclass(eq=False)
class Fused:
    """W0 with the rows of all halves of a layer appended: a copy of W0, made once for serving."""
    weight: torch.Tensor           # as in nn.Linear: [k + m, d] of a first, [k, d + m] of a second half
    bias: torch.Tensor | None


@dataclass(eq=False)
class HalfBank(Bank):
    """A Bank with FFBA's rows. m = (n + 1) R."""
    half: torch.Tensor | None = None    # [n + 1, R, d] of a first half, [n + 1, R, k] of a second
    block: torch.Tensor | None = None   # bool [n + 1, R], of a first half: s is the block's activation
    spoilt: torch.Tensor | None = None  # [n + 1, 1], of a second half: NaN where an adapter is, or 0
    fused: Fused | None = None          # of a frozen bank; `half` is then a view of its weight


def own_columns(rows, part):
    """bool [b, 1 or T, n R]: True at the rows of rows.bank.`part` [n, R, m] that are a token's own."""
    if (part, "own") not in rows.kept:
        n, rank = getattr(rows.bank, part).shape[:2]
        owner = torch.eye(n, dtype=torch.bool, device=rows.ids.device).repeat_interleave(rank, 1)
        rows.kept[part, "own"] = select(owner, rows.ids)                                  # from [n, n R]
    return rows.kept[part, "own"]


def times(layer, x, fused):
    """x [..., d] times a Fused -> [..., k], by the layer's form of W0 if that multiplies other weights."""
    return getattr(layer.form, "times", F.linear)(x, fused.weight, fused.bias)


class Half(AdapterLinear):
    """What both halves share: a bank with FFBA's rows, fused with W0 when it is frozen."""

    def bank(self, ids=None, columns=0):
        bank = HalfBank(**vars(super().bank(ids, columns)))
        adapters = self.in_rows(ids)
        halves = [a for a in adapters if a.kind == "ffba"]
        if halves:
            bank.half = stack([a.rows() if a.kind == "ffba" else None for a in adapters], halves[0].rows()[:0])
        if halves and halves[0].half == "A":
            # All columns meet all rows in one matmul, where 0 times NaN is NaN: an adapter that
            # diverged or overflows gives its NaN to its own tokens alone, by an addition
            dtype = self.weight.dtype if self.weight.is_floating_point() else torch.float16
            finite = bank.half.to(dtype).isfinite().flatten(1).all(1)                     # [n + 1]
            bank.spoilt = torch.where(finite, 0.0, float("nan"))[:, None]
            bank.half = torch.where(finite[:, None, None], bank.half, 0.0)
        if any(a.half == "B" and a.activation == "block" for a in halves):
            block = torch.tensor([a in halves and a.activation == "block" for a in adapters], device=self.weight.device)
            bank.block = block[:, None].repeat(1, bank.half.shape[1])
        return bank

    def freeze_bank(self, capacity=0):
        """As in AdapterLinear, with W0 and the halves in one weight: it costs the memory of another W0.
        Not on an int8 base, nor where FLoRA or IA3 adapts the same layer: there it runs unfused."""
        super().freeze_bank(capacity)
        bank = self.frozen_bank
        if bank.half is None:
            return
        bank.half = bank.half.to(self.W0().dtype)
        if bank.scale_A is None and self.weight.is_floating_point():
            self.fuse(bank)


class FirstHalf(Half):
    def fuse(self, bank):
        k = self.out_features
        weight = torch.cat([self.weight, bank.half.flatten(0, 1)])                        # [k + m, d]
        bias = None if self.bias is None else F.pad(self.bias, (0, len(weight) - k))
        bank.fused, bank.half = Fused(weight, bias), weight[k:].unflatten(0, bank.half.shape[:2])

    def scaled(self, x, rows):
        bank, self.pair.columns = rows.bank, None
        if getattr(bank, "half", None) is None:   # NO_ROWS, or all FFBA adapters of the layer were removed
            return super().scaled(x, rows)
        if bank.fused is None:
            y = super().scaled(x, rows)
            columns = x @ bank.half.flatten(0, 1).T.to(x.dtype)                           # [b, T, m]
        else:
            both = times(self, x, bank.fused)                                             # [b, T, k + m]
            y, columns = both[..., :self.out_features], both[..., self.out_features:]
        if bank.block is not None:
            columns = torch.where(bank.block.flatten(), self.activation(columns), columns)
        self.pair.columns = torch.where(own_columns(rows, "half"), columns, 0.0).to(x.dtype)
        return y


class SecondHalf(Half):
    def fuse(self, bank):
        d = self.in_features
        weight = torch.cat([self.weight, bank.half.flatten(0, 1).T], dim=1)               # [k, d + m]
        bank.fused, bank.half = Fused(weight, self.bias), weight[:, d:].T.unflatten(0, bank.half.shape[:2])

    def scaled(self, x, rows):
        columns, self.pair.columns = self.pair.columns, None
        if getattr(rows.bank, "half", None) is None:
            return super().scaled(x, rows)
        fused = rows.bank.fused
        if fused is None:
            y = super().scaled(x, rows) + columns @ rows.bank.half.flatten(0, 1).to(x.dtype)
        else:
            y = times(self, torch.cat([x, columns], dim=-1), fused)
        return y + rows["spoilt"].to(y.dtype)
