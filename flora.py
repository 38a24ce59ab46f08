"""FLoRA (Wen & Chaudhuri, "Batched Low-Rank Adaptation of Foundation Models", ICLR 2024),
beside the two methods it is compared with: bmm-LoRA (App. B.1) and IA3 (end of §3.2), and beside another
FLoRA: fused forward-backward adapters (FFBA; Gowda, Song, Lee & Goka).

A frozen weight W0 [d, k] serves a whole batch while every example, or every token, has its own
adapter i. In the paper's shapes B_i is [d, r] and A_i is [r, k]:

    LoRA   (Eq. 1)     W_i = W0 + (alpha / r) B_i A_i
    FLoRA  (Eq. 2-5)   W_i = W0 ∘ (B_i A_i) / r             the identity is B_i A_i / r = 1
    IA3    (§3.2)      y   = l_i ∘ (W0ᵀ x)                  FLoRA with B_i = 1, "rank 0.5"
    FFBA               y   = W2ᵀ f(W1ᵀ x) + (alpha / r) (s(x B_i) A_i)ᵀ    around a pair W1, W2 of projections

PEFT names the LoRA factors the other way round: its lora_A is our Bᵀ, its lora_B our Aᵀ.

Of FFBA only the abstract was at hand. From it: LoRA's low rank and the parallel adapter combined, a "forward" and
a "backward" adapter, both fused into existing projections, so that inference runs no matmul more than the base.
Our reading: the forward adapter (our B) is appended to the first projection of a pair (PAIRS) as outputs, the
backward one (our A) to the second as inputs; s, between them, is the identity or the block's activation; scale and
initialisation are LoRA's. Beyond the text: the columns of many adapters stand side by side and each token keeps its own
alone, so that one batch mixes adapters, still at the base's number of matmuls.

Reading order: the methods as functions, one adapter of one projection (`Adapter`), a linear
layer with a bank of them (`AdapterLinear`), then verbs on a whole model: add, merge, save, load; PEFT's
folders; a LoRA made into a FLoRA; last, the forms in which a layer may hold W0 for serving, all
multiplied by `matmul`.
"""
import json
import os
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

BASE = 0  # the adapter id that means "no adapter"; adapters are numbered from 1
KINDS = ("flora", "lora", "ia3", "ffba")
TARGETS = {  # name for --targets: the projection of a block that it adapts
    "c_attn": "attn.c_attn",      # query, key and value, fused: what PEFT adapts in StarCoder
    "c_attn.qk": "attn.c_attn",   # its query and key columns alone: App. A
    "c_attn.k": "attn.c_attn",    # its key columns alone: IA3 in App. A
    "c_proj": "attn.c_proj",
    "c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},   # Llama's
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
PAIRS = {  # FFBA's targets: (the projection of a block that takes B, the one that takes A), StarCoder's and Llama's
    "attn": (("attn.c_attn", "attn.c_proj"), ("self_attn.q_proj", "self_attn.o_proj")),
    "mlp": (("mlp.c_fc", "mlp.c_proj"), ("mlp.gate_proj", "mlp.down_proj")),
}
DEFAULT_TARGETS = {  # {model_type: {kind: targets}}, PEFT's for LoRA and IA3
    "gpt_bigcode": {"flora": ("c_attn",), "lora": ("c_attn",), "ia3": ("c_attn", "mlp.c_proj"), "ffba": ("attn", "mlp")},
    "llama": {"flora": ("q_proj", "v_proj"), "lora": ("q_proj", "v_proj"), "ia3": ("k_proj", "v_proj", "down_proj"),
              "ffba": ("attn", "mlp")},
}
SCALES_INPUT = ("mlp.c_proj", "down_proj")   # where PEFT's IA3 scales what goes in, not what comes out


class BadInput(ValueError):
    """A mistake in what the caller gave, told in one sentence. Scripts print it and exit with 2."""


# ------------------------------------------------------------------------------------ the methods


def flora_expand(x, W0, A, B):
    """Eq. 6: Y = A ∘ ((B ∘ X) W0). One shared matmul of r rows per token, no bmm.

    x [..., d], W0 [d, k], A [..., r, k], B [..., r, d] -> [..., k] in the wider of A's and x's dtype.
    A and B hold each token's own adapter, as rows. For r > 1 the paper takes a mean over the r
    components; here A already carries the 1/r, so that one batch may pad several ranks with zeros.
    """
    BX = (B * x.unsqueeze(-2)).to(x.dtype)                # [..., r, d]
    Y = A * matmul(BX, W0)                                # [..., r, k]
    return Y.sum(-2) if Y.shape[-2] > 1 else Y.squeeze(-2)   # [..., k]


def flora_materialise(x, W0, A, B):
    """Eq. 4: y = x (W0 ∘ ΔW), the adapted weight made once for all tokens of one adapter.

    x [..., d], W0 [d, k], A [r, k] (carrying the 1/r), B [r, d] -> [..., k] in x's dtype.
    """
    delta_W = B.T @ A                                     # [d, k] = sum_j b_j a_jᵀ
    return (x @ (W0 * delta_W).to(x.dtype)).to(x.dtype)   # the last cast is for autocast


def lora_bmm(x, A, B):
    """App. B.1: the addend of Eq. 1, (x B) A, one adapter per example, by two torch.bmm.

    x [b, T, d], A [b, r, k] (carrying alpha / r), B [b, d, r] -> [b, T, k] in x's dtype.
    """
    hidden = torch.bmm(x, B.to(x.dtype))                  # [b, T, r]
    return torch.bmm(hidden, A.to(x.dtype))               # [b, T, k]


def lora_masked(x, A, B, mask):
    """The same without bmm: all n adapters as one dense [d, n r] matmul, the others masked out.

    x [b, T, d], A [n r, k], B [n r, d], mask [b, 1 or T, n r] from own_rows -> [b, T, k].
    """
    hidden = (x @ B.T.to(x.dtype)) * mask.to(x.dtype)     # [b, T, n r]
    return hidden @ A.to(x.dtype)


def own_rows(adapter_ids, bank):
    """bank [n, r, m], adapter_ids [b] or [b, T] -> bool [b, 1 or T, n r], True at a token's own rows."""
    n, r, _ = bank.shape
    owner = torch.eye(n, dtype=torch.bool, device=bank.device).repeat_interleave(r, 1)        # [n, n r]
    return select(owner, adapter_ids[:, None] if adapter_ids.dim() == 1 else adapter_ids)


# What making W0 ∘ ΔW once costs, in rows of the plain matmul. Below it Eq. 6 is cheaper.
# CPU: from rough timings of 1024 x 1024 projections on 2 cores. CUDA: an estimate from reading and writing W0
# at memory speed against the matmul rate of an H100; not measured.
MATERIALISE_COST = {"cpu": 128, "cuda": 1024}


def choose_path(x, rank, adapter_ids):
    """"expand" (Eq. 6) or "materialise" (Eq. 4) for x [b, T, d], whichever takes fewer matmul rows.

    An adapter with n tokens costs rank * n rows expanded, and n + MATERIALISE_COST rows materialised.
    Decoding (T = 1) always expands: counting distinct adapters would make a GPU wait for the host.
    """
    b, T, _ = x.shape
    cost = MATERIALISE_COST.get(x.device.type, MATERIALISE_COST["cuda"])
    if T == 1 or (rank - 1) * b * T <= cost:
        return "expand"
    tokens_per_adapter = b * T / len(adapter_ids.unique())
    return "materialise" if (rank - 1) * tokens_per_adapter > cost else "expand"


# ---------------------------------------------------------------------------- one adapter, one layer


class Adapter(nn.Module):
    """One adapter of one projection W0 [d, k]: the float32 tensors that train and that are saved.

    flora, lora: B [d, r] and A [r, hi - lo], where [lo, hi) are the output columns it adapts.
    ia3: l [hi - lo], a scale on those outputs, bias included; on SCALES_INPUT, l [d] on the inputs.
    ffba: one `half`, B [d, r] on the first projection of a pair of its target, or A [r, k] on the second;
    activation is its s, "identity" or "block" (the block's own).
    Every kind starts as the base model, exactly.
    """

    def __init__(self, kind, rank, target, d, k, alpha=8.0, device=None, half=None, activation=None):
        super().__init__()
        head = (k - d) // 2  # c_attn's outputs are [d query | head key | head value]
        lo, hi = {"c_attn.qk": (0, d + head), "c_attn.k": (d, d + head)}.get(target, (0, k))
        self.kind, self.rank, self.target, self.alpha = kind, rank, target, alpha
        self.d, self.columns, self.half, self.activation = d, (lo, hi), half, activation
        self.scales_input = kind == "ia3" and target in SCALES_INPUT
        if kind == "ia3":
            self.l = nn.Parameter(torch.ones(d if self.scales_input else hi - lo, device=device))
            return
        if half != "A":
            self.B = nn.Parameter(torch.randn(d, rank, device=device))
        if half != "B":
            self.A = nn.Parameter(torch.zeros(rank, hi - lo, device=device))
        with torch.no_grad():
            if kind == "flora":
                # Component 1 alone is the identity (r * 1 / r); the others start as LoRA's do, one
                # factor random and one zero. With all ones every component would get the same
                # gradient for ever, and rank r would train as rank 1.
                self.B[:, 0] = 1
                self.A[0] = rank
            elif half != "A":
                nn.init.kaiming_uniform_(self.B.T, a=5**0.5)  # as in PEFT

    def scale_factors(self, columns):
        """ΔW over the first `columns` outputs as sum_j b_j a_jᵀ: A [R, columns], B [R, d].

        ΔW is 1 in the columns that this adapter leaves alone, and everywhere for LoRA and FFBA.
        """
        lo, hi = self.columns
        one = torch.ones((), device=next(self.parameters()).device)
        ones_A, ones_B = one.expand(1, columns), one.expand(1, self.d)
        if self.kind in ("lora", "ffba"):
            return ones_A, ones_B
        if self.kind == "ia3" and self.scales_input:
            return ones_A, self.l[None]
        if self.kind == "ia3":
            return F.pad(self.l[None], (lo, columns - hi), value=1.0), ones_B
        A, B = F.pad(self.A / self.rank, (lo, columns - hi)), self.B.T
        if hi - lo < columns:  # B scales the inputs of all columns: one component more undoes that
            outside = F.pad(torch.zeros_like(A[:1, lo:hi]), (lo, columns - hi), value=1.0)
            A, B = torch.cat([A, outside]), torch.cat([B, ones_B])
        return A, B

    def added_factors(self, k):
        """LoRA's addend, alpha / r included, over all k outputs: A [r, k], B [r, d]."""
        lo, hi = self.columns
        return F.pad(self.A * (self.alpha / self.rank), (lo, k - hi)), self.B.T

    def half_factor(self):
        """FFBA's half as rows: B [r, d], or A [r, k] with alpha / r included."""
        return self.B.T if self.half == "B" else self.A * (self.alpha / self.rank)


class Fused(NamedTuple):
    """W0 with the rows of all FFBA halves of a layer appended: a copy of W0, made once for serving."""
    weight: torch.Tensor       # as in nn.Linear: [k + m, d] of a first, [k, d + m] of a second projection
    bias: torch.Tensor | None
    packed: dict               # PackedCopies of it, used where the layer has its own


class Bank(NamedTuple):
    """The adapters of one layer, stacked: row 0 is the base model, row i adapter i; float32 (LoRA's and
    FFBA's, once frozen, in the dtype of the model, which they would get in each call).

    Ranks are padded with zeros. A part that no adapter of the layer needs is None.
    """
    scale_A: torch.Tensor | None   # [n + 1, R, columns]   FLoRA and IA3
    scale_B: torch.Tensor | None   # [n + 1, R, d]
    added_A: torch.Tensor | None   # [n + 1, R', k]        LoRA
    added_B: torch.Tensor | None   # [n + 1, R', d]
    bias: torch.Tensor | None      # [n + 1, k]            the bias as each IA3 scales it
    half_B: torch.Tensor | None = None   # [n + 1, R", d]  FFBA's, on the first projection of a pair;
    half_A: torch.Tensor | None = None   # [n + 1, R", k]  on the second
    block: torch.Tensor | None = None    # bool [n + 1, R"], with half_B: s is the block's activation
    # No rows: whole or absent
    mask: torch.Tensor | None = None     # of gathered rows, for lora_masked, with added_A and added_B whole
    own: torch.Tensor | None = None      # of gathered rows, the same for FFBA
    fused: Fused | None = None           # of a frozen bank; half_B and half_A are views of it


def stack_rows(rows):
    """[r_i, m] tensors of several ranks -> [n, max r, m], padded with zeros."""
    rank = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, rank - len(row))) for row in rows])


def select(bank, adapter_ids):
    """bank [n + 1, R, m], adapter_ids [...] -> [..., R, m]; the same for a bank [n + 1, k] of biases.
    A negative or unknown id is an error.

    adapter_ids None: `bank` holds the rows already, from `gather`."""
    if adapter_ids is None:
        return bank
    return F.embedding(adapter_ids, bank.flatten(1)).unflatten(-1, bank.shape[1:])


class AdapterLinear(nn.Linear):
    """A frozen linear layer, y = W0ᵀ x + bias, with a bank of adapters over it.

    As in nn.Linear, `weight` is W0ᵀ [k, d]. `adapters` maps str(id) to this layer's Adapter; an id
    without one here runs the base layer.
    """

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.adapters = nn.ModuleDict()
        self.num_adapters = 0         # of the whole model, so that ids mean the same in every layer
        self.frozen_bank = None       # set by freeze_bank for serving; else stacked in each forward
        self.path = "auto"            # how FLoRA is computed, where forward is not told
        self.lora_path = "example"    # and LoRA: bmm per "example", bmm per "token", or "masked"
        self.scale = None             # [k] once quantize_int8 has made `weight` int8
        self.packed = None            # PackedCopies once the model serves on a CPU (GPT.pack)

    def W0(self, lo=0, hi=None):
        """Columns [lo, hi) of W0 [d, k], for `matmul`."""
        if self.scale is not None:
            return Int8(self.weight.T[:, lo:hi], self.scale[lo:hi])
        return packed_columns(self.weight, self.packed, lo, hi)

    def bank(self, ids=None, columns=0):
        """Stack this layer's adapters into a Bank, differentiably. ids: which (default all, from 0);
        columns: how many scale_A has at least."""
        k, d = self.weight.shape
        ones = torch.ones(1, max(k, d), device=self.weight.device)
        adapters = [self.adapters[str(i)] if str(i) in self.adapters else None
                    for i in (range(self.num_adapters + 1) if ids is None else ids)]
        scaling = [a for a in adapters if a and a.kind in ("flora", "ia3")]
        halves = [a for a in adapters if a and a.kind == "ffba"]
        scale_A = scale_B = added_A = added_B = bias = half_B = half_A = block = None
        if scaling:
            columns = max(columns, *(a.columns[1] for a in scaling))
            rows = [a.scale_factors(columns) if a else (ones[:, :columns], ones[:, :d])
                    for a in adapters]
            scale_A, scale_B = (stack_rows(factor) for factor in zip(*rows))
        if any(a and a.kind == "lora" for a in adapters):
            rows = [a.added_factors(k) if a and a.kind == "lora" else (ones[:0, :k], ones[:0, :d])
                    for a in adapters]
            added_A, added_B = (stack_rows(factor) for factor in zip(*rows))
        if self.bias is not None and any(a.kind == "ia3" and not a.scales_input for a in scaling):
            bias = torch.stack([
                self.bias * (a.scale_factors(k)[0][0] if a and a.kind == "ia3" else ones[0, :k])
                for a in adapters])
        if halves:
            width = d if halves[0].half == "B" else k
            rows = stack_rows([a.half_factor() if a and a.kind == "ffba" else ones[:0, :width] for a in adapters])
            half_B, half_A = (rows, None) if halves[0].half == "B" else (None, rows)
        if half_B is not None and any(a.activation == "block" for a in halves):
            block = torch.tensor([bool(a) and a.activation == "block" for a in adapters], device=rows.device)
            block = block[:, None].expand(rows.shape[:2]).clone()
        return Bank(scale_A, scale_B, added_A, added_B, bias, half_B, half_A, block)

    def freeze_bank(self, capacity):
        """Set frozen_bank, as the verb freeze_bank explains."""
        bank = self.bank(range(max(self.num_adapters, capacity) + 1))
        k, d = self.weight.shape
        dtype = self.weight.dtype if self.scale is None else self.scale.dtype
        bank = bank._replace(**{name: part.to(dtype) for name, part in bank._asdict().items()
                                if name in ("added_A", "added_B", "half_A", "half_B") and part is not None})
        if self.scale is None and bank.scale_A is None and bank.half_B is not None:
            weight = torch.cat([self.weight, bank.half_B.flatten(0, 1)])                      # [k + m, d]
            bias = None if self.bias is None else F.pad(self.bias, (0, len(weight) - k))
            bank = bank._replace(fused=Fused(weight, bias, PackedCopies()),
                                 half_B=weight[k:].unflatten(0, bank.half_B.shape[:2]))
        elif self.scale is None and bank.scale_A is None and bank.half_A is not None:
            weight = torch.cat([self.weight, bank.half_A.flatten(0, 1).T], dim=1)             # [k, d + m]
            bank = bank._replace(fused=Fused(weight, self.bias, PackedCopies()),
                                 half_A=weight[:, d:].T.unflatten(0, bank.half_A.shape[:2]))
        self.frozen_bank = bank

    def write_row(self, i):
        """Write adapter i, or the base where this layer has none, into the frozen bank, in place.
        Returns False, and writes nothing, where it does not fit."""
        bank = self.frozen_bank
        row = self.bank([i], 0 if bank.scale_A is None else bank.scale_A.shape[2])[:-3]  # what has rows
        for old, new in zip(bank, row):
            if old is None and new is not None or old is not None and i >= len(old):
                return False
            if new is not None and any(n > o for n, o in zip(new.shape[1:], old.shape[1:])):
                return False
        for old, new in zip(bank, row):
            if old is not None:
                old[i] = 0 if new is not None else old[0]
            if new is not None:
                old[i][tuple(slice(n) for n in new.shape[1:])] = new[0]
        if bank.fused:
            bank.fused.packed.clear()
        return True

    def gather(self, adapter_ids):
        """The Bank of the rows that adapter_ids [b] need."""
        bank = self.frozen_bank or self.bank()
        masked = bank.added_A is not None and self.lora_path == "masked"
        names = ("scale_A", "scale_B", "bias") if masked else ("scale_A", "scale_B", "bias", "added_A", "added_B")
        rows = {name: select(getattr(bank, name), adapter_ids) for name in names if getattr(bank, name) is not None}
        if masked:
            rows["mask"] = own_rows(adapter_ids, bank.added_A)
        if bank.half_B is not None:
            rows["own"] = own_rows(adapter_ids, bank.half_B)
        return bank._replace(**rows)

    def forward(self, x, adapter_ids=None, path=None, hidden=None):
        """x [b, T, d] -> [b, T, k] in x's dtype.

        adapter_ids: int64 [b] (one per example) or [b, T] (one per token, §3.2), 0 for the base
        model and i for adapter i; None is the base model for all; or the rows that
        `gather(model, ids)` has gathered for ids [b], to decode (T = 1) many times with.
        path: "expand" (Eq. 6; the one way for gathered rows), "materialise" (Eq. 4) or "auto"
        (choose_path); None takes self.path. hidden: on the second projection of a pair, what
        `with_hidden` of the first gave beside its outputs.
        """
        return self.with_hidden(x, adapter_ids, None, path, hidden)[0]

    def with_hidden(self, x, adapter_ids=None, activation=None, path=None, hidden=None):
        """forward, and beside it FFBA's hidden columns s(x B) [b, T, m], those of every token's own
        adapter (the others are 0); None without FFBA. activation: what an s of "block" stands for.

        A frozen bank computes both by one matmul with [W0 | B], and the second projection takes them by
        one with [W0; A]; without (training, an int8 base, FLoRA or IA3 on the same layer) by a small one each.
        """
        if adapter_ids is None or not (self.adapters or self.frozen_bank):
            return matmul(x, self.W0(), self.bias), None
        if isinstance(adapter_ids, dict):
            bank, adapter_ids = adapter_ids[self], None
        else:
            bank = self.frozen_bank or self.bank()
        if bank.fused:
            W0 = packed_columns(bank.fused.weight, None if self.packed is None else bank.fused.packed)
            inputs = x if bank.half_A is None else torch.cat([x, hidden], dim=-1)              # [b, T, d + m]
            y = matmul(inputs, W0, bank.fused.bias)
            y, hidden = y[..., :self.out_features], y[..., self.out_features:]                # [b, T, k], [b, T, m]
        elif bank.scale_A is None:
            y = matmul(x, self.W0(), self.bias)
        else:
            columns = bank.scale_A.shape[2]  # value columns, say, that no adapter of the bank touches
            y = self.scaled(x, bank, adapter_ids, path or self.path)
            if columns < self.out_features:
                y = torch.cat([y, matmul(x, self.W0(columns)).to(y.dtype)], dim=-1)
            bias = self.bias
            if bank.bias is not None:
                bias = select(bank.bias, adapter_ids)
                bias = bias[:, None] if bias.dim() == 2 else bias             # [b, 1 or T, k]
            if bias is not None:
                y = y + bias
        if bank.added_A is not None:
            y = y + self.added(x, bank, adapter_ids)
        if bank.half_A is not None and not bank.fused:
            y = y + hidden @ bank.half_A.flatten(0, 1).to(x.dtype)
        if bank.half_B is None:
            return y.to(x.dtype), None
        if not bank.fused:
            hidden = x @ bank.half_B.flatten(0, 1).T.to(x.dtype)
        if bank.block is not None:
            hidden = torch.where(bank.block.flatten(), activation(hidden), hidden)
        own = own_rows(adapter_ids, bank.half_B) if bank.own is None else bank.own            # [b, 1 or T, m]
        return y.to(x.dtype), torch.where(own, hidden, 0.0).to(x.dtype)

    def scaled(self, x, bank, adapter_ids, path):
        """The FLoRA part: x [b, T, d] @ (W0 ∘ ΔW of each token's adapter) -> [b, T, columns]."""
        columns = bank.scale_A.shape[2]
        if adapter_ids is None:  # rows from gather
            path = "expand"
        elif path == "auto":
            path = choose_path(x, bank.scale_A.shape[1], adapter_ids)
        if path == "expand":
            A, B = select(bank.scale_A, adapter_ids), select(bank.scale_B, adapter_ids)
            if A.dim() == 3:
                A, B = A[:, None], B[:, None]                                 # [b, 1, R, .]
            return flora_expand(x, self.W0(0, columns), A, B)
        if path != "materialise":
            raise BadInput(f'path is {path!r}; use "auto", "expand" or "materialise"')
        W0 = self.weight.T[:, :columns]
        if self.scale is not None:
            W0 = W0 * self.scale[:columns]
        ids = (adapter_ids[:, None] if adapter_ids.dim() == 1 else adapter_ids).expand(x.shape[:2])
        distinct = ids.unique().tolist()
        if len(distinct) == 1:
            return flora_materialise(x, W0, bank.scale_A[distinct[0]], bank.scale_B[distinct[0]])
        y = x.new_empty(*x.shape[:2], columns)
        for i in distinct:
            y[ids == i] = flora_materialise(x[ids == i], W0, bank.scale_A[i], bank.scale_B[i])
        return y

    def added(self, x, bank, adapter_ids):
        """The LoRA part: x [b, T, d] -> the addend of Eq. 1 [b, T, k], by lora_path."""
        b, T, _ = x.shape
        if self.lora_path == "masked":
            mask = own_rows(adapter_ids, bank.added_A) if bank.mask is None else bank.mask
            return lora_masked(x, bank.added_A.flatten(0, 1), bank.added_B.flatten(0, 1), mask)
        if self.lora_path == "token" and adapter_ids is not None and adapter_ids.dim() == 1:
            adapter_ids = adapter_ids[:, None].expand(b, T)
        A, B = select(bank.added_A, adapter_ids), select(bank.added_B, adapter_ids).mT
        if A.dim() == 3:
            return lora_bmm(x, A, B)
        # every token carries a copy of its adapter, as in an engine that flattens tokens
        return lora_bmm(x.flatten(0, 1)[:, None], A.flatten(0, 1), B.flatten(0, 1)).view(b, T, -1)


# ------------------------------------------------------------------------------- verbs on a model


def adapter_layers(model):
    """Yield (name, layer) for every AdapterLinear of a model."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            yield name, module


def make_adapters(model, kind, rank, targets, alpha, activation=None):
    """{layer name: new Adapter} for every layer of `model` that one of `targets` names."""
    if kind not in KINDS:
        raise BadInput(f"unknown adapter kind {kind!r}; use one of {', '.join(KINDS)}")
    if kind == "ia3":
        rank = 0.5  # the paper's name for it; it decides nothing
    elif not (isinstance(rank, int) and rank >= 1):
        raise BadInput(f"rank is {rank!r}; use a whole number of at least 1")
    if kind == "ffba":
        activation = activation or "identity"
        if activation not in ("identity", "block"):
            raise BadInput(f'activation is {activation!r}; use "identity" or "block"')
        places = {target: [place for pair in pairs for place in zip(pair, "BA")] for target, pairs in PAIRS.items()}
    else:
        places = {target: [(layer, None)] for target, layer in TARGETS.items()}
    places = {target: found for target, found in places.items()     # those that this model has
              if any(name.endswith("." + place) for name, _ in adapter_layers(model) for place, _ in found)}
    if targets is None:
        targets = DEFAULT_TARGETS[model.config.model_type][kind]
    elif "all" in targets:
        targets = list(PAIRS) if kind == "ffba" else [target for target in places if TARGETS[target].endswith(target)]
    made = {}
    for target in targets:
        if target not in places:
            raise BadInput(f"unknown target {target!r}; use one of {', '.join(places)}, or all")
        for name, layer in adapter_layers(model):
            for place, half in places[target]:
                if name.endswith("." + place):
                    if name in made:
                        raise BadInput(f"targets {' '.join(targets)} adapt {name} twice; name it once")
                    k, d = layer.weight.shape
                    made[name] = Adapter(kind, rank, target, d, k, alpha, layer.weight.device, half, activation)
    return made


def attach(model, adapters):
    """Give {layer name: Adapter} the model's lowest free adapter id, and return it."""
    layers = dict(adapter_layers(model))
    taken = {int(i) for layer in layers.values() for i in layer.adapters}
    adapter_id = min(set(range(1, len(taken) + 2)) - taken)
    for name, layer in layers.items():
        layer.num_adapters, layer.frozen_bank = max(layer.num_adapters, adapter_id), None
        if name in adapters:
            layer.adapters[str(adapter_id)] = adapters[name]
    return adapter_id


def add_adapter(model, kind, rank=1, targets=None, alpha=8.0, activation=None):
    """Add a new adapter, exactly the base model until trained, to every layer that `targets` names.

    kind: "flora", "lora", "ia3" (which has no rank) or "ffba". targets: names out of TARGETS (ffba: of
    PAIRS), or ["all"]; None takes the DEFAULT_TARGETS of the model's family. alpha: LoRA's and FFBA's, 8 as in PEFT.
    activation: FFBA's s, "identity" (also None) or "block". Returns the adapter's id, from 1.
    Raises BadInput for an unknown kind, target or activation and for a rank below 1.
    """
    return attach(model, make_adapters(model, kind, rank, targets, alpha, activation))


def adapters_of(model, adapter_id):
    """{layer name: Adapter} of one adapter id."""
    found = {name: layer.adapters[str(adapter_id)] for name, layer in adapter_layers(model)
             if str(adapter_id) in layer.adapters}
    if not found:
        raise BadInput(f"the model has no adapter {adapter_id}")
    return found


def adapter_parameters(model, adapter_id):
    """{"layer name.A": Parameter, ...} of one adapter: what to train, and what save_adapter writes."""
    return {f"{name}.{p}": tensor for name, adapter in adapters_of(model, adapter_id).items()
            for p, tensor in adapter.named_parameters()}


def remove_adapter(model, adapter_id):
    """Take an adapter out of the model. Its id is the base model from now on, and free for the next."""
    for name in adapters_of(model, adapter_id):
        del model.get_submodule(name).adapters[str(adapter_id)]
    for _, layer in adapter_layers(model):
        layer.frozen_bank = None


@torch.no_grad()
def freeze_bank(model, capacity=0):
    """Stack the adapters once, for serving: forward then only gathers rows. Adding one undoes it.

    FFBA's are appended to a copy of W0, which costs its memory (not if the base is int8, or FLoRA or IA3
    adapts the same layer). What changes in W0 or in an adapter later is seen by freezing again.
    capacity: how many adapters to keep rows for at least, so that update_bank finds room.
    """
    for _, layer in adapter_layers(model):
        layer.frozen_bank = None
        if layer.adapters:
            layer.freeze_bank(capacity)


def frozen_banks(model):
    """{layer: its frozen bank} of the layers that have one."""
    return {layer: layer.frozen_bank for _, layer in adapter_layers(model) if layer.frozen_bank}


@torch.no_grad()
def update_bank(model, banks, adapter_id):
    """Freeze again after adapter `adapter_id` was added, replaced or removed.

    banks: frozen_banks(model) before that. One row is written in place where the adapter fits their
    rows, ranks and parts, so that CUDA graphs over them stay valid; else all are stacked anew.
    Returns True if in place.
    """
    for layer, bank in banks.items():
        layer.frozen_bank = bank
    if (all(layer in banks for _, layer in adapter_layers(model) if layer.adapters)
            and all(layer.write_row(adapter_id) for layer in banks)):
        return True
    rows = max((len(part) for bank in banks.values() for part in bank if part is not None), default=1)
    freeze_bank(model, capacity=rows - 1)
    return False


def gather(model, adapter_ids):
    """{layer: its adapters' rows for int64 adapter_ids [b]}, to pass in the place of adapter_ids for
    as many decoding steps as the batch keeps its composition."""
    return {layer: layer.gather(adapter_ids) for _, layer in adapter_layers(model)
            if layer.adapters or layer.frozen_bank}


@torch.no_grad()
def merge_adapter(model, adapter_id):
    """Write one adapter into the base weights, W0 ∘ BA / r or W0 + (alpha / r) BA, in their dtype.

    FFBA is no change of W0: its halves stay appended, and the MLP is r units wider, an ordinary model still.
    BadInput where no ordinary model is that: for the pair of the attention, for an identity s, and in a Llama.
    All adapters are then removed, since they belonged to the old base. Merging into bfloat16 or
    float16 rounds each weight: load the model in float32 to merge without that.
    """
    for name, adapter in adapters_of(model, adapter_id).items():
        if adapter.kind == "ffba" and (model.config.model_type, adapter.target, adapter.activation) != (
                "gpt_bigcode", "mlp", "block"):
            raise BadInput(f"an ffba adapter of {name} with the activation {adapter.activation!r} cannot be merged, only "
                           'one of StarCoder\'s target mlp and activation "block"; serve it unmerged')
    for name, adapter in adapters_of(model, adapter_id).items():
        layer = model.get_submodule(name)
        if layer.scale is not None:
            raise BadInput("an int8 base has no weights to merge into; load it without --quantize")
        k = layer.weight.shape[0]
        if adapter.half == "B":
            layer.weight.data = torch.cat([layer.weight, adapter.half_factor().to(layer.weight.dtype)])
            layer.bias.data, layer.out_features = F.pad(layer.bias, (0, adapter.rank)), k + adapter.rank
            model.config = replace(model.config, n_inner=layer.out_features)
        elif adapter.half == "A":
            layer.weight.data = torch.cat([layer.weight, adapter.half_factor().T.to(layer.weight.dtype)], dim=1)
            layer.in_features += adapter.rank
        elif adapter.kind == "lora":
            A, B = adapter.added_factors(k)
            layer.weight.add_(A.T @ B)
        else:
            A, B = adapter.scale_factors(k)
            layer.weight.mul_(A.T @ B)                                        # W0ᵀ ∘ ΔWᵀ  [k, d]
            if adapter.kind == "ia3" and layer.bias is not None:
                layer.bias.mul_(A[0])  # ones where it scales the input
    for _, layer in adapter_layers(model):
        layer.adapters, layer.num_adapters, layer.frozen_bank = nn.ModuleDict(), 0, None
    model.fingerprint = None  # another base now


def save_adapter(model, adapter_id, file, training=None):
    """Write one adapter as safetensors: its float32 tensors, and as metadata its kind, rank, targets, alpha,
    activation (null but for ffba), the fingerprint of its base model and `training`, a JSON-able summary."""
    adapters = adapters_of(model, adapter_id)
    first = next(iter(adapters.values()))
    metadata = dict(kind=first.kind, rank=first.rank, alpha=first.alpha, activation=first.activation,
                    base=model.fingerprint,
                    targets=list(dict.fromkeys(a.target for a in adapters.values())),
                    training=training or {})
    tensors = {name: p.detach().contiguous().cpu()
               for name, p in adapter_parameters(model, adapter_id).items()}
    save_tensors(tensors, file, {"flora_adapter": json.dumps(metadata)})


def save_tensors(tensors, file, metadata):
    """Write a safetensors file whole: under a temporary name, then renamed."""
    with open(f"{file}.tmp", "wb"):  # gives it the usual permissions; safetensors alone says 0600
        pass
    save_file(tensors, f"{file}.tmp", metadata)
    os.replace(f"{file}.tmp", file)


def read_json(file):
    try:
        with open(file, encoding="utf-8") as f:
            value = json.load(f)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except FileNotFoundError:
        raise BadInput(f"{file}: no such file") from None
    except (OSError, ValueError) as e:
        raise BadInput(f"{file}: not readable as JSON ({e})") from None


def write_json(file, value):
    """Write a JSON file whole: under a temporary name, then renamed."""
    try:
        with open(f"{file}.tmp", "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)
            f.write("\n")
        os.replace(f"{file}.tmp", file)
    except OSError as e:
        raise BadInput(f"{file}: cannot be written ({e.strerror})") from None


def load_tensors(file):
    """A safetensors file of an adapter -> ({name: CPU tensor}, its "flora_adapter" metadata or None)."""
    if not os.path.isfile(file):
        raise BadInput(f"{file}: no such adapter file")
    try:
        with safe_open(file, "pt") as f:
            metadata = json.loads((f.metadata() or {}).get("flora_adapter", "null"))
            return {name: f.get_tensor(name) for name in f.keys()}, metadata
    except (SafetensorError, json.JSONDecodeError) as e:
        raise BadInput(f"{file}: not a readable safetensors file ({e}); copy or train it again") from e


def load_adapter(model, file):
    """Add the adapter that save_adapter wrote to `file`, or the LoRA or IA3 of a PEFT folder
    (load_peft); returns its id.

    Raises BadInput if the file is missing, truncated or no adapter, if its kind is unknown, if it
    was trained on another base, or if a tensor is missing, left over or of the wrong shape.
    """
    if os.path.isdir(file):
        return load_peft(model, file)
    tensors, metadata = load_tensors(file)
    if metadata is None:
        raise BadInput(f'{file}: has no "flora_adapter" metadata, so train.py did not write it')
    if metadata["base"] != model.fingerprint:
        raise BadInput(f"{file}: was trained on another base model (fingerprint {metadata['base']}, "
                       f"this model's is {model.fingerprint}); load that base with --weights")
    try:
        adapters = make_adapters(model, metadata["kind"], metadata["rank"], metadata["targets"],
                                 metadata["alpha"], metadata.get("activation"))
    except BadInput as e:
        raise BadInput(f"{file}: {e}") from None
    fill({f"{name}.{p}": t.data for name, a in adapters.items() for p, t in a.named_parameters()}, tensors, file)
    return attach(model, adapters)


def fill(wanted, tensors, file):
    """Copy `tensors`, read from `file`, into the tensors of the same names in `wanted`, one for one."""
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise BadInput(f"{file}: tensor {name} is {'missing' if name in wanted else 'unexpected'}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise BadInput(f"{file}: {name} has shape {list(tensors[name].shape)}, "
                           f"this model needs {list(tensor.shape)}")
        tensor.copy_(tensors[name])


# --------------------------------------------------------------------------------- PEFT's folders

# Keys of adapter_config.json that may say what they like: they change no output. "r", "lora_alpha",
# "use_rslora" and the modules are read; any other key must be empty, since what it asks for would be lost.
PEFT_KEYS = {"r", "lora_alpha", "use_rslora", "target_modules", "feedforward_modules", "peft_type", "task_type",
             "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
             "lora_dropout", "init_ia3_weights", "megatron_core", "qalora_group_size"}
PEFT_VALUES = {"bias": ["none"],  # PiSSA, OLoRA, CorDA and LoftQ, as init_lora_weights, change the base
               "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}


def peft_tensors(adapters):
    """{PEFT's name: view of our tensor in PEFT's shape} of {layer name: Adapter}, LoRA or IA3."""
    views = {}
    for name, a in adapters.items():
        key = f"base_model.model.{name}."
        if a.kind == "ia3":  # [1, in] scales the inputs, [out, 1] the outputs
            views[key + "ia3_l"] = a.l.data[None] if a.scales_input else a.l.data[:, None]
        else:
            views[key + "lora_A.weight"], views[key + "lora_B.weight"] = a.B.data.T, a.A.data.T
    return views


def load_peft(model, folder):
    """Add the LoRA or IA3 of a PEFT folder (adapter_config.json, adapter_model.safetensors); returns its id.

    PEFT records the base model's name alone, so that another base of the same shapes goes unnoticed.
    Raises BadInput, naming file and key, for what an Adapter cannot represent and for tensors that do not fit.
    """
    file, weights = (os.path.join(folder, f) for f in ("adapter_config.json", "adapter_model.safetensors"))
    config = read_json(file)
    kind = {"LORA": "lora", "IA3": "ia3"}.get(config.get("peft_type"))
    if kind is None:
        raise BadInput(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA and IA3 can be loaded")
    for key, value in config.items():
        if value and key not in PEFT_KEYS and value not in PEFT_VALUES.get(key, []):
            raise BadInput(f"{file}: {key} is {value!r}, which cannot be represented here; "
                           "train without it, or merge the adapter into the base in PEFT")
    if not os.path.isfile(weights) and os.path.isfile(os.path.join(folder, "adapter_model.bin")):
        raise BadInput(f"{folder}/adapter_model.bin is a pickle, which is not opened; load it in PEFT and save it "
                       "again as safetensors")
    rank, alpha, modules = config.get("r"), config.get("lora_alpha", 8), config.get("target_modules")
    if not isinstance(alpha, (int, float)):
        raise BadInput(f"{file}: lora_alpha is {alpha!r}; it must be a number")
    if not (isinstance(modules, list) and modules and all(isinstance(m, str) for m in modules)):
        raise BadInput(f"{file}: target_modules is {modules!r}; it must list the names of projections")
    names = {m: [n for n, _ in adapter_layers(model) if f".{n}".endswith(f".{m}")] for m in modules}
    for module in (m for m in modules if not names[m]):
        raise BadInput(f"{file}: target_modules names {module!r}, which is none of this model's projections: "
                       f"{', '.join(sorted({n.split('.', 3)[-1] for n, _ in adapter_layers(model)}))}")
    named = {n for found in names.values() for n in found}
    targets = dict.fromkeys(next(t for t in TARGETS if n.endswith("." + TARGETS[t])) for n in sorted(named))
    try:
        adapters = make_adapters(model, kind, rank, list(targets), alpha)
    except BadInput as e:
        raise BadInput(f"{file}: {e}") from None
    for name in sorted(adapters.keys() - named):
        raise BadInput(f"{file}: target_modules leaves out {name} but not the same projection of all other layers; "
                       "an adapter here has all or none of them")
    if config.get("use_rslora"):  # alpha / sqrt(r) in the place of alpha / r
        for adapter in adapters.values():
            adapter.alpha = alpha * rank**0.5
    fill(peft_tensors(adapters), load_tensors(weights)[0], weights)
    return attach(model, adapters)


def save_peft(model, adapter_id, folder, base_name=None):
    """Write a LoRA or IA3 as a folder that PEFT opens, float32.

    base_name: the base model for PEFT to load, a folder or a name on the hub. An adapter of some of a
    projection's columns (c_attn.qk) is written over all of them, as zeros (LoRA) or ones (IA3) there.
    """
    adapters = adapters_of(model, adapter_id)
    first = next(iter(adapters.values()))
    if first.kind not in ("lora", "ia3"):
        raise BadInput(f"adapter {adapter_id} is of kind {first.kind}, which PEFT does not have; write it into the "
                       "base by flora.merge_adapter and save that by GPT.save_pretrained")
    modules = list(dict.fromkeys(TARGETS[a.target] for a in adapters.values()))
    config = dict(task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True,
                  target_modules=modules)
    if first.kind == "lora":
        alpha = int(first.alpha) if first.alpha == int(first.alpha) else first.alpha
        config |= dict(peft_type="LORA", r=first.rank, lora_alpha=alpha, bias="none")
    else:
        scaled_inputs = {TARGETS[a.target] for a in adapters.values() if a.scales_input}
        config |= dict(peft_type="IA3", feedforward_modules=sorted(scaled_inputs))
    tensors = peft_tensors(adapters)
    for name, adapter in adapters.items():
        k, (lo, hi) = model.get_submodule(name).out_features, adapter.columns
        for key in (f"base_model.model.{name}.lora_B.weight", f"base_model.model.{name}.ia3_l"):
            if key in tensors and hi - lo < k:  # [hi - lo, r or 1] -> [k, r or 1]
                tensors[key] = F.pad(tensors[key], (0, 0, lo, k - hi), value=float(first.kind == "ia3"))
    os.makedirs(folder, exist_ok=True)
    save_tensors({key: t.contiguous().cpu() for key, t in tensors.items()},
                 os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    write_json(os.path.join(folder, "adapter_config.json"), config)


# ------------------------------------------------------------------------------- FLoRA from a LoRA (§6)


def fit_flora(W0, W, rank, rounds=10):
    """The best W0 ∘ BA for a given W, both [d, k], in the Frobenius norm: argmin ‖W0 ∘ BA - W‖.

    A low-rank approximation of W / W0 weighted by W0²; alternating least squares in float64, from the
    identity and the steepest directions away from it. With B fixed each column of A is a system of r
    equations, and the other way round; each is solved with a slight pull to its last value, so that the
    error never grows. -> (A [r, k], B [d, r], [the identity's error, the error after each round]).
    """
    W0, W = W0.double(), W.double()
    B, A = W0.new_ones(W0.shape[0], rank), W0.new_zeros(rank, W0.shape[1])
    A[0] = 1
    steepest = torch.svd_lowrank(W0 * (W - W0), q=min(rank + 3, *W.shape), niter=4)[0][:, :rank - 1]
    B[:, 1:1 + steepest.shape[1]] = steepest * len(B)**0.5                              # [d, r - 1]
    squares, products = W0 * W0, W0 * W

    def solve(weights, targets, fixed, last):
        """argmin over x [n, r] of sum_m weights [n, m] (x · fixed [m, r])² - 2 targets [n, m] (x · fixed)."""
        outer = (fixed[:, :, None] * fixed[:, None]).flatten(1)                         # [m, r r]
        G = (weights @ outer).unflatten(1, (rank, rank))                                # [n, r, r]
        pull = 1e-9 * G.diagonal(dim1=1, dim2=2).mean() + 1e-30
        G = G + pull * torch.eye(rank, dtype=G.dtype, device=G.device)
        return torch.linalg.solve(G, targets @ fixed + pull * last)

    errors = [(W0 * (B @ A) - W).norm().item()]
    for _ in range(rounds):
        A = solve(squares.T, products.T, B, A.T).T
        B = solve(squares, products, A.T, B)
        errors.append((W0 * (B @ A) - W).norm().item())
    return A, B, errors


@torch.no_grad()
def flora_from_lora(model, lora_id, rank):
    """Add the FLoRA of `rank`, on the same targets, whose weights are nearest to a LoRA's (fit_flora).

    Returns (its id, its error): ‖W0 ∘ BA / r - W‖ over all layers, relative to the ‖W0 - W‖ of the
    base model, so that 0 is the LoRA itself and 1 no adapter at all.
    """
    loras = adapters_of(model, lora_id)
    first = next(iter(loras.values()))
    if first.kind != "lora":
        raise BadInput(f"adapter {lora_id} is of kind {first.kind}; a FLoRA is fitted to a LoRA")
    fitted = make_adapters(model, "flora", rank, list(dict.fromkeys(a.target for a in loras.values())), first.alpha)
    before = after = 0.0
    for name, lora in loras.items():
        layer, (lo, hi) = model.get_submodule(name), lora.columns
        W0 = (layer.weight if layer.scale is None else layer.weight * layer.scale[:, None]).T[:, lo:hi].double()
        A, B, errors = fit_flora(W0, W0 + lora.alpha / lora.rank * (lora.B.double() @ lora.A.double()), rank)
        fitted[name].A.copy_(A * rank)
        fitted[name].B.copy_(B)
        before, after = before + errors[0]**2, after + errors[-1]**2
    return attach(model, fitted), (after / before)**0.5 if before else 0.0


# ------------------------------------------------------------------ the forms in which a layer holds W0


class Packed(NamedTuple):
    """W0 [d, k] in oneDNN's own layout. CPU, float32, no gradient."""
    weight: torch.Tensor


class Int8(NamedTuple):
    """W0 [d, k] as whole numbers times a scale per output column."""
    values: torch.Tensor   # int8 [d, k]
    scale: torch.Tensor    # [k], in the dtype of the activations


class Int8Matmul(torch.autograd.Function):
    """x [..., d] @ an Int8 W0, in x's dtype. Backward makes W0 anew from its int8, which else would be kept
    in full precision, layer upon layer, from forward to backward."""

    @staticmethod
    def forward(ctx, x, values, scale):
        ctx.save_for_backward(values, scale)
        ctx.dtype = x.dtype
        y = F.linear(x, values.T.to(x.dtype))
        return y * scale.to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        values, scale = ctx.saved_tensors
        return ((grad * scale.to(grad.dtype)) @ values.T.to(grad.dtype)).to(ctx.dtype), None, None


class PackedCopies(dict):
    """{(lo, hi): Packed} of one weight. Copied or pickled it is empty: oneDNN's tensors allow neither."""

    def __reduce__(self):
        return PackedCopies, ()


def packed_columns(weight, packed, lo=0, hi=None):
    """Columns [lo, hi) of W0 for `matmul`, weight being W0ᵀ [k, d]: packed, and kept in
    `packed` until the weight changes; a plain view if packed is None or gradients are enabled."""
    if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return weight.T[:, lo:hi]
    now = weight.data_ptr(), weight._version
    if packed.get("weight") != now:
        packed.clear()
        packed["weight"] = now
    if (lo, hi) not in packed:
        packed[lo, hi] = Packed(torch.ops.mkldnn._reorder_linear_weight(weight.detach()[lo:hi], None))
    return packed[lo, hi]


def matmul(x, W0, bias=None):
    """x [..., d] @ W0 [d, k] (+ bias [k]) -> [..., k], for every form in which a layer holds W0.

    PyTorch's CPU matmul (MKL) repacks W0 in each call and keeps to AVX2 on an AMD CPU; a W0 packed
    once spares the few rows of a decoding step that work where d and k are large.
    """
    if isinstance(W0, Packed):
        return torch.ops.mkldnn._linear_pointwise(x, W0.weight, bias, "none", [], "")
    if isinstance(W0, Int8):
        y = Int8Matmul.apply(x, *W0)
        return y if bias is None else y + bias
    return F.linear(x, W0.T, bias)


@torch.no_grad()
def quantize_int8(model):
    """Hold the projections of the base as int8, rounded to nearest, one scale per output (weight-only:
    activations and matmul keep their dtype). Adapters, embeddings and LayerNorms stay as they are."""
    model.fingerprint  # read before the weights change: adapters belong to the model as it was stored
    for _, layer in adapter_layers(model):
        scale = layer.weight.abs().amax(1).float() / 127                      # [k]
        values = (layer.weight / scale[:, None]).round().to(torch.int8)
        layer.weight, layer.scale = nn.Parameter(values, requires_grad=False), scale.to(layer.weight.dtype)
