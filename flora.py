"""FLoRA (Wen & Chaudhuri, "Batched Low-Rank Adaptation of Foundation Models", ICLR 2024) beside
the two methods that it is compared with: bmm-LoRA (App. B.1) and IA3 (end of §3.2).

A frozen weight W0 [d, k] serves a batch in which every example, or every token, has an adapter i
of its own. In the paper's shapes B_i is [d, r] and A_i is [r, k]:

    LoRA   (Eq. 1)     W_i = W0 + (alpha / r) B_i A_i
    FLoRA  (Eq. 2-5)   W_i = W0 ∘ (B_i A_i) / r             the identity is B_i A_i / r = 1
    IA3    (§3.2)      y   = l_i ∘ (W0ᵀ x)                  FLoRA with B_i = 1, "rank 0.5"

PEFT names LoRA's factors the other way round: its lora_A is our Bᵀ, its lora_B our Aᵀ.

Reading order: (1) the equations as functions, (2) what one projection learns (`FLoRA`, `LoRA`,
`IA3`), (3) a linear layer with many of them (`AdapterLinear`), (4) verbs on a model: add, merge,
save, load. (5) and (6), at the end, read and write files. Further kinds, and other forms in which
W0 may be held, stand in extras/.
"""
import contextlib
import importlib
import json
import os
import reprlib
import stat
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import nn

BASE = 0  # the adapter id that means "no adapter"; adapters are numbered from 1


class BadInput(ValueError):
    """A mistake in what the caller gave, told in one sentence. Scripts print it and exit with 2."""


# ------------------------------------------------------------------------------- 1 the equations


def flora_expand(x, times_W0, A, B):
    """Eq. 6: Y = A ∘ ((B ∘ X) W0). One shared matmul of r rows per token, no bmm.

    x [..., d], A [..., r, k], B [..., r, d] -> [..., k] in the wider of A's and x's dtype.
    times_W0 multiplies rows by the shared W0, [..., d] -> [..., k]. A and B hold each token's own
    adapter, as rows. For r > 1 the paper takes a mean over the r components; here A carries the
    1/r already, so that one batch may pad several ranks with zeros.
    """
    BX = (B * x.unsqueeze(-2)).to(x.dtype)                   # [..., r, d]
    Y = A * times_W0(BX)                                     # [..., r, k]
    return Y.sum(-2) if Y.shape[-2] > 1 else Y.squeeze(-2)   # [..., k]


def flora_materialise(x, W0, A, B):
    """Eq. 4: y = x (W0 ∘ ΔW), the adapted weight made once for all tokens of one adapter.

    x [..., d], W0 [d, k], A [r, k] (carrying the 1/r), B [r, d] -> [..., k] in x's dtype.
    """
    delta_W = (A.T @ B).T                                 # [d, k] = sum_j b_j a_jᵀ, strides as W0
    return (x @ (W0 * delta_W).to(x.dtype)).to(x.dtype)   # the last cast is for autocast


def lora_bmm(x, A, B):
    """App. B.1: the addend of Eq. 1, (x B) A, one adapter per example, by two torch.bmm.

    x [b, T, d], A [b, r, k] (carrying alpha / r), B [b, d, r] -> [b, T, k] in x's dtype.
    """
    XB = torch.bmm(x, B.to(x.dtype))                      # [b, T, r]
    return torch.bmm(XB, A.to(x.dtype))                   # [b, T, k]


def inflection_rank(c1, c2, d, k):
    """Eq. 7 for W0 [d, k]: FLoRA costs less than bmm-LoRA while c1 (d + k) / (c2 d k) + 1/r >= 1.

    c1, c2: seconds per multiply-add of torch.bmm and of a plain matmul. LoRA's two bmm take
    b l r (d + k) multiply-adds, the matmul b l d k; with d = k this is the paper's 2 c1 / (d c2).
    Returns the rank at which both cost the same, or infinity.
    """
    share = c1 * (d + k) / (c2 * d * k)
    return 1 / (1 - share) if share < 1 else float("inf")


def free_rank(requests, balance):
    """The rank up to which Eq. 6 costs nothing when `requests` rows are decoded at once.

    Reading W0 hides the arithmetic of requests * r rows while these stay below the device's
    balance: matmul rate (FLOP/s) / bandwidth (bytes/s) * bytes of a weight / 2. Not in the paper.
    """
    return balance / requests


# Cost of building W0 ∘ ΔW, in rows of the plain matmul, by device and bytes of a weight; below it
# Eq. 6 is cheaper. CPU: measured at 768 to 6144 wide (142 to 297 rows, and 812 to 1,229), 2 cores.
# Otherwise, as on CUDA: estimated from an H100's bandwidth and matmul rate.
MATERIALISE_COST = {("cpu", 4): 256, ("cpu", 2): 1024}
ESTIMATED_COST = 1024


def choose_path(x, rank, ids):
    """"expand" (Eq. 6) or "materialise" (Eq. 4) for x [b, T, d], whichever takes fewer matmul rows.

    An adapter with n tokens costs rank * n rows expanded, n and MATERIALISE_COST materialised.
    Decoding (T = 1) always expands: counting distinct ids would make a GPU wait for the host.
    """
    b, T, _ = x.shape
    cost = MATERIALISE_COST.get((x.device.type, x.dtype.itemsize), ESTIMATED_COST)
    if T == 1 or (rank - 1) * b * T <= cost:
        return "expand"
    tokens_per_adapter = b * T / len(ids.unique())
    return "materialise" if (rank - 1) * tokens_per_adapter > cost else "expand"


# -------------------------------------------------------------------- 2 what one projection learns


class Adapter(nn.Module):
    """One adapter of one projection W0 [d, k]: the float32 tensors that train and that are saved.

    A kind is a subclass that says what it changes; None means "as the base model". It starts as
    the base model exactly. columns: the outputs [lo, hi) that it adapts, default all.
    """
    kind = None
    learning_rate = 1e-3   # train.py's default
    scales = False         # whether scale() is ever not None
    activation = None      # an option of extras/ffba.py, kept in every adapter file

    def __init__(self, rank, target, d, k, columns=None, alpha=8.0):
        super().__init__()
        self.rank, self.target, self.alpha = rank, target, alpha
        self.d, self.columns = d, columns or (0, k)

    def scale(self, columns):
        """ΔW over the first `columns` outputs as sum_j b_j a_jᵀ: A [R, columns], B [R, d]."""

    def added(self, k):
        """An addend to W0 as factors: A [r, k], B [r, d]."""

    def bias(self, bias):
        """The layer's bias [k] as this adapter changes it."""

    def merge(self, model, layer):
        """Write this adapter into the weight and bias of `layer`, in their dtype."""
        k = layer.out_features
        scale, added, bias = self.scale(k), self.added(k), self.bias(layer.bias)
        if scale is not None:
            A, B = scale
            layer.weight.mul_(A.T @ B)                    # W0ᵀ ∘ ΔWᵀ  [k, d]
        if added is not None:
            A, B = added
            layer.weight.add_(A.T @ B)
        if bias is not None:
            layer.bias.copy_(bias)

    # What the verbs on a model ask of a kind

    @classmethod
    def check_rank(cls, rank):
        if type(rank) is not int or rank < 1:
            raise BadInput(f"rank is {rank!r}; use a whole number of at least 1")
        return rank

    @classmethod
    def places(cls, model):
        """{target: [(end of a projection's name, what __init__ is told beside it)]}"""
        return {target: [(place, {})] for target, place in model.TARGETS.items()}

    @classmethod
    def default_targets(cls, model):
        return model.DEFAULT_TARGETS.get(cls.kind, model.DEFAULT_TARGETS["flora"])

    @classmethod
    def prepare(cls, model, adapters):
        """Called before {layer name: Adapter} are attached to a model."""

    def check_merge(self, model, name):
        """Raise BadInput if this adapter of layer `name` cannot be merged."""

    @classmethod
    def to_save(cls, model, adapters):
        """What save_adapter writes for {layer name: Adapter} of the model; BadInput if nothing."""
        return adapters


class LowRank(Adapter):
    """A kind with two factors, B [d, r] and A [r, hi - lo]."""

    def __init__(self, rank, target, d, k, columns=None, alpha=8.0):
        super().__init__(rank, target, d, k, columns, alpha)
        lo, hi = self.columns
        self.B = nn.Parameter(torch.randn(d, rank))
        self.A = nn.Parameter(torch.zeros(rank, hi - lo))


class FLoRA(LowRank):
    """ΔW = B A / r (Eq. 2-5)."""
    kind = "flora"
    learning_rate = 8e-3   # the paper's (App. A)
    scales = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Component 1 alone is the identity (r * 1 / r); the others start as LoRA's do, one
        # factor random and one zero. With all ones every component would get the same
        # gradient for ever, and rank r would train as rank 1.
        with torch.no_grad():
            self.B[:, 0] = 1
            self.A[0] = self.rank

    def scale(self, columns):
        lo, hi = self.columns
        A, B = F.pad(self.A / self.rank, (lo, columns - hi)), self.B.T       # [r, columns], [r, d]
        if hi - lo == columns:
            return A, B
        # B scales the inputs of all columns: one more component is the identity of the others
        outside = F.pad(torch.zeros_like(A[:1, lo:hi]), (lo, columns - hi), value=1.0)
        return torch.cat([A, outside]), torch.cat([B, torch.ones_like(B[:1])])


class LoRA(LowRank):
    """W0 + (alpha / r) B A (Eq. 1), initialised as in PEFT."""
    kind = "lora"
    learning_rate = 1e-3   # the paper's 1e-4 is for 1,500 steps of a 15B model

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.kaiming_uniform_(self.B.T, a=5**0.5)

    def added(self, k):
        lo, hi = self.columns
        return F.pad(self.A * (self.alpha / self.rank), (lo, k - hi)), self.B.T


class IA3(Adapter):
    """l [hi - lo] scales the outputs, bias included, or l [d] the inputs (end of §3.2)."""
    kind = "ia3"
    learning_rate = 5e-3   # the paper's (App. A)
    scales = True

    def __init__(self, rank, target, d, k, columns=None, alpha=8.0, scales_input=False):
        super().__init__(rank, target, d, k, columns, alpha)
        self.scales_input = scales_input
        lo, hi = self.columns
        self.l = nn.Parameter(torch.ones(d if scales_input else hi - lo))

    def scale(self, columns):
        if self.scales_input:
            return self.l.new_ones(1, columns), self.l[None]
        return self.scale_of_outputs(columns)[None], self.l.new_ones(1, self.d)

    def bias(self, bias):
        if bias is None or self.scales_input:
            return None
        return bias * self.scale_of_outputs(len(bias))

    def scale_of_outputs(self, columns):
        lo, hi = self.columns
        return F.pad(self.l, (lo, columns - hi), value=1.0)                  # [columns]

    @classmethod
    def check_rank(cls, rank):
        return 0.5  # the paper's name for it; it decides nothing

    @classmethod
    def places(cls, model):
        return {target: [(place, dict(scales_input=target in model.SCALES_INPUT))]
                for target, place in model.TARGETS.items()}


KINDS = {"flora": FLoRA, "lora": LoRA, "ia3": IA3}
NO_ADAPTER = Adapter(0, None, 0, 0)   # what the base model's row of a Bank is made of


# ----------------------------------------------------------------- 3 one layer, many adapters


@dataclass(eq=False)
class Bank:
    """The adapters of one layer, stacked: row 0 is the base model, row i adapter i. float32; a
    frozen bank holds LoRA's factors in the model's dtype, which they would get in each call.

    Ranks are padded with zeros. A part that no adapter of the layer needs is None.
    """
    scale_A: torch.Tensor | None   # [n + 1, R, columns]   ΔW of FLoRA and IA3
    scale_B: torch.Tensor | None   # [n + 1, R, d]
    added_A: torch.Tensor | None   # [n + 1, R', k]        LoRA
    added_B: torch.Tensor | None   # [n + 1, R', d]
    bias: torch.Tensor | None      # [n + 1, k]            the bias as each IA3 scales it


def stack_rows(rows):
    """[r_i, m] tensors of several ranks -> [n, max r, m], padded with zeros."""
    rank = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, rank - len(row))) for row in rows])


def stack_factors(factors, neutral):
    """(A [r_i, k], B [r_i, d]) of each adapter -> A [n, R, k], B [n, R, d].

    An adapter's None stands for `neutral`; if all are None, so is the result: (None, None)."""
    if all(pair is None for pair in factors):
        return None, None
    A, B = zip(*(neutral if pair is None else pair for pair in factors))
    return stack_rows(A), stack_rows(B)


def select(bank, ids):
    """bank [n + 1, R, m] or [n + 1, k], ids [b, T] -> [b, T, R, m] or [b, T, k].
    A negative or unknown id is an IndexError."""
    return F.embedding(ids, bank.flatten(1)).unflatten(-1, bank.shape[1:])


class Rows:
    """One layer's adapters for one batch: its bank, and ids int64 [b] (one per example) or [b, T]
    (one per token). rows["scale_A"] are each one's own rows of bank.scale_A, [b, 1 or T, R, m],
    gathered when first asked for and kept."""

    def __init__(self, bank, ids):
        self.bank, self.ids, self.gathered = bank, ids.view(len(ids), -1), {}     # [b, 1 or T]

    def __getitem__(self, part):
        if part not in self.gathered:
            self.gathered[part] = select(getattr(self.bank, part), self.ids)
        return self.gathered[part]


class Gathered(dict):
    """{layer: its Rows} of one batch, from `gather`: to be passed in the place of ids for as many
    decoding steps as the batch keeps its composition."""


def lora_per_row(x, rows):
    """LoRA's addend, an adapter per example or per token as in `rows`: x [b, T, d] -> [b, T, k]."""
    return lora_by_bmm(x, rows["added_A"], rows["added_B"])


def lora_per_token(x, rows):
    """The same as an engine computes it that flattens tokens (the paper's baseline): every token
    carries a copy of its adapter."""
    A, B = (rows[part].expand(*x.shape[:2], -1, -1) for part in ("added_A", "added_B"))
    return lora_by_bmm(x, A, B)


def lora_by_bmm(x, A, B):
    """lora_bmm for x [b, T, d], A [b, n, r, k], B [b, n, r, d], n being 1 or T -> [b, T, k]."""
    b, T, d = x.shape
    x = x.reshape(b * A.shape[1], -1, d)                                     # [b n, T / n, d]
    return lora_bmm(x, A.flatten(0, 1), B.flatten(0, 1).mT).view(b, T, -1)


class Plain:
    """W0 held as nn.Linear holds it. extras/int8.py and extras/packed.py have other forms."""
    times = staticmethod(F.linear)       # (x, weight, bias) -> x weightᵀ + bias

    def product(self, layer, x, lo, hi, bias):
        """x [..., d] -> x W0[:, lo:hi] (+ bias [hi - lo])."""
        return self.times(x, layer.weight[lo:hi], bias)

    def W0(self, layer):
        """The dense W0 [d, k]."""
        return layer.weight.T


class AdapterLinear(nn.Linear):
    """A frozen linear layer, y = W0ᵀ x + bias, with a bank of adapters over it.

    As in nn.Linear, `weight` is W0ᵀ [k, d]. `adapters` maps str(id) to this layer's Adapter; an id
    without one here runs the base layer.
    """
    form = Plain()                       # how W0 is held
    lora = staticmethod(lora_per_row)    # how LoRA's addend is computed: (x, rows) -> [b, T, k]

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.adapters = nn.ModuleDict()
        self.num_adapters = 0       # of the model, so that ids mean the same in every layer
        self.frozen_bank = None     # from freeze_bank, for serving; None stacks in each forward
        self.path = "auto"          # how FLoRA is computed, where forward is not told

    def forward(self, x, adapters=None, path=None):
        """x [b, T, d] -> [b, T, k] in x's dtype.

        adapters: int64 [b] (one per example) or [b, T] (one per token, §3.2), 0 for the base model
        and i for adapter i; or what `gather` made of ids; None is the base model for all.
        path: "expand" (Eq. 6), "materialise" (Eq. 4) or "auto" (choose_path); None is self.path.
        """
        rows = self.rows(adapters)
        if rows is None:
            return self.product(x, bias=self.bias)
        y = self.scaled(x, rows, path or self.path)
        if rows.bank.added_A is not None:
            y = y + self.lora(x, rows)
        return y.to(x.dtype)

    def rows(self, adapters):
        """forward's `adapters` -> this layer's Rows; None where only the base model runs."""
        if adapters is None or not (self.adapters or self.frozen_bank):
            return None
        if isinstance(adapters, Gathered):
            return adapters[self]
        return Rows(self.frozen_bank or self.bank(), adapters)

    def product(self, x, lo=0, hi=None, bias=None):
        """x [..., d] -> x W0[:, lo:hi] (+ bias), by the form in which W0 is held."""
        return self.form.product(self, x, lo, hi, bias)

    def W0(self):
        """The dense W0 [d, k]: for Eq. 4, and for whoever merges or fits."""
        return self.form.W0(self)

    def scaled(self, x, rows, path):
        """x (W0 ∘ ΔW) + bias, ΔW (and, for IA3, the bias) being each token's own -> [b, T, k]."""
        if rows.bank.scale_A is None:
            return self.product(x, bias=self.bias)
        rank, columns = rows.bank.scale_A.shape[1:]
        if path == "auto":
            path = choose_path(x, rank, rows.ids)
        if path == "expand":
            y = flora_expand(x, lambda BX: self.product(BX, 0, columns),
                             rows["scale_A"], rows["scale_B"])
        elif path == "materialise":
            y = self.materialised(x, rows.bank, rows.ids)
        else:
            raise BadInput(f'path is {path!r}; use "auto", "expand" or "materialise"')
        if columns < self.out_features:   # the last columns, which no adapter of this layer touches
            y = torch.cat([y, self.product(x, columns).to(y.dtype)], dim=-1)
        bias = self.bias if rows.bank.bias is None else rows["bias"]
        return y if bias is None else y + bias

    def materialised(self, x, bank, ids):
        """Eq. 4, one distinct adapter after another: x [b, T, d] -> [b, T, columns]."""
        columns = bank.scale_A.shape[2]
        W0, ids = self.W0()[:, :columns], ids.expand(x.shape[:2])
        distinct = ids.unique().tolist()
        if len(distinct) == 1:   # as in training: no copies of x and y
            return flora_materialise(x, W0, bank.scale_A[distinct[0]], bank.scale_B[distinct[0]])
        y = x.new_empty(*x.shape[:2], columns)
        for i in distinct:
            y[ids == i] = flora_materialise(x[ids == i], W0, bank.scale_A[i], bank.scale_B[i])
        return y

    def adapter(self, i):
        """This layer's Adapter i, or NO_ADAPTER."""
        return self.adapters[str(i)] if str(i) in self.adapters else NO_ADAPTER

    def bank(self, ids=None, columns=0):
        """Stack this layer's adapters, differentiably. ids: which (default: all, from 0); columns:
        how many scale_A has at least."""
        ids = range(self.num_adapters + 1) if ids is None else ids
        adapters = [self.adapter(i) for i in ids]
        k, d = self.weight.shape
        columns = max([columns] + [a.columns[1] for a in adapters if a.scales])
        ones = torch.ones(1, max(k, d), device=self.weight.device)
        base = ones[:, :columns], ones[:, :d]
        scale_A, scale_B = stack_factors([a.scale(columns) for a in adapters], base)
        nothing = ones[:0, :k], ones[:0, :d]
        added_A, added_B = stack_factors([a.added(k) for a in adapters], nothing)
        biases = [a.bias(self.bias) for a in adapters]
        if all(bias is None for bias in biases):
            return Bank(scale_A, scale_B, added_A, added_B, None)
        biases = [self.bias.float() if bias is None else bias for bias in biases]
        return Bank(scale_A, scale_B, added_A, added_B, torch.stack(biases))

    def freeze_bank(self, capacity=0):
        """Set frozen_bank, as the verb freeze_bank explains."""
        bank = self.bank(range(max(self.num_adapters, capacity) + 1))
        if bank.added_A is not None:
            dtype = self.W0().dtype
            bank.added_A, bank.added_B = bank.added_A.to(dtype), bank.added_B.to(dtype)
        self.frozen_bank = bank


# -------------------------------------------------------------------------- 4 verbs on a model


def extra(name, what):
    """The module extras/NAME.py, which `what` (a flag, or what stood in a file) asks for."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as e:
        if e.name not in ("extras", f"extras.{name}"):
            raise
        raise BadInput(f"{what} needs extras/{name}.py, which is not here") from None


def adapter_class(kind):
    """The Adapter of a kind: one of KINDS, or the ADAPTER of extras/KIND.py."""
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    unknown = BadInput(f"unknown adapter kind {kind!r}; use one of {', '.join(KINDS)}, "
                       f"or a kind that extras/ holds (there is no extras/{kind}.py for it)")
    if not (isinstance(kind, str) and kind.isidentifier()):
        raise unknown
    try:
        return extra(kind, kind).ADAPTER
    except (BadInput, AttributeError):
        raise unknown from None


def adapter_layers(model):
    """Yield (name, layer) for every AdapterLinear of a model."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            yield name, module


def default_targets(model, kind):
    """Where an adapter of a kind goes if nothing is said: PEFT's places for LoRA and IA3."""
    return list(adapter_class(kind).default_targets(model))


def make_adapters(model, kind, rank, targets=None, alpha=8.0, device=None, **options):
    """{layer name: new Adapter} for every layer of `model` that one of `targets` names; on that
    layer's device, or on `device`: "meta" takes no memory."""
    adapter = adapter_class(kind)
    rank, places = adapter.check_rank(rank), adapter.places(model)
    layers = dict(adapter_layers(model))
    if targets is None:
        targets = default_targets(model, kind)
    elif "all" in targets:
        targets = [target for target in places if model.columns(target) is None]
    made = {}
    for target in targets:
        if target not in places:
            raise BadInput(f"unknown target {target!r}; use one of {', '.join(places)}, or all")
        for place, more in places[target]:
            for name in [name for name in layers if name.endswith("." + place)]:
                if name in made:
                    raise BadInput(f"targets {' '.join(targets)} adapt {name} twice; name it once")
                k, d = layers[name].weight.shape
                with torch.device(device or "cpu"):
                    new = adapter(rank, target, d, k, model.columns(target), alpha,
                                  **more, **options)
                made[name] = new.to(device or layers[name].weight.device)
    return made


def attach(model, adapters):
    """Give {layer name: Adapter} the model's lowest free adapter id, and return it."""
    layers = dict(adapter_layers(model))
    taken = {int(i) for layer in layers.values() for i in layer.adapters}
    adapter_id = min(set(range(1, len(taken) + 2)) - taken)
    next(iter(adapters.values())).prepare(model, adapters)
    for name, layer in layers.items():
        layer.num_adapters, layer.frozen_bank = max(layer.num_adapters, adapter_id), None
        if name in adapters:
            layer.adapters[str(adapter_id)] = adapters[name]
    return adapter_id


def add_adapter(model, kind, rank=1, targets=None, alpha=8.0, **options):
    """Add a new adapter, exactly the base model until trained, to every layer that `targets` names.

    kind: "flora", "lora", "ia3" (which has no rank), or one of extras/. targets: names out of the
    model's TARGETS, or ["all"]; None takes default_targets. alpha: LoRA's, 8 as in PEFT.
    options: those of an extra's kind. Returns the adapter's id, from 1.
    Raises BadInput for an unknown kind, target or option and for a rank below 1.
    """
    return attach(model, make_adapters(model, kind, rank, targets, alpha, **options))


def adapters_of(model, adapter_id):
    """{layer name: Adapter} of one adapter id."""
    found = {name: layer.adapters[str(adapter_id)] for name, layer in adapter_layers(model)
             if str(adapter_id) in layer.adapters}
    if not found:
        raise BadInput(f"the model has no adapter {adapter_id}")
    return found


def adapter_parameters(model, adapter_id):
    """{"layer name.A": Parameter, ...} of one adapter: what to train, what save_adapter writes."""
    return named_parameters(adapters_of(model, adapter_id))


def named_parameters(adapters):
    return {f"{name}.{p}": tensor for name, adapter in adapters.items()
            for p, tensor in adapter.named_parameters()}


def remove_adapter(model, adapter_id):
    """Take an adapter out of the model. Its id is the base model from now on, free for the next."""
    for name in adapters_of(model, adapter_id):
        del model.get_submodule(name).adapters[str(adapter_id)]
    for _, layer in adapter_layers(model):
        layer.frozen_bank = None


@torch.no_grad()
def freeze_bank(model, capacity=0):
    """Stack the adapters once, for serving: forward then only gathers rows. Adding one undoes it;
    what changes in W0 or in an adapter later is seen by freezing again.

    capacity: how many adapters to keep rows for at least (extras/hot_swap.py).
    """
    for _, layer in adapter_layers(model):
        layer.frozen_bank = None
        if layer.adapters:
            layer.freeze_bank(capacity)


def gather(model, adapter_ids):
    """The Gathered rows for int64 adapter_ids [b], to pass in their place."""
    rows = {layer: layer.rows(adapter_ids) for _, layer in adapter_layers(model)}
    return Gathered((layer, r) for layer, r in rows.items() if r is not None)


@torch.no_grad()
def merge_adapter(model, adapter_id):
    """Write one adapter into the base weights, W0 ∘ BA / r or W0 + (alpha / r) BA, in their dtype.

    All adapters are then removed, since they belonged to the old base. Merging into bfloat16 or
    float16 rounds each weight: load the model in float32 to merge without that.
    """
    adapters = adapters_of(model, adapter_id)
    for name, adapter in adapters.items():
        adapter.check_merge(model, name)
        if not model.get_submodule(name).weight.is_floating_point():
            raise BadInput("an int8 base has no weights to merge into; load it without --quantize")
    for name, adapter in adapters.items():
        adapter.merge(model, model.get_submodule(name))
    for _, layer in adapter_layers(model):
        layer.adapters, layer.num_adapters, layer.frozen_bank = nn.ModuleDict(), 0, None
    model.fingerprint = None  # another base now


def save_adapter(model, adapter_id, file, training=None):
    """Write one adapter as safetensors: its float32 tensors, and as metadata its kind, rank,
    targets, alpha, activation, its base model's fingerprint and `training`, a JSON-able summary."""
    adapters = adapters_of(model, adapter_id)
    adapters = next(iter(adapters.values())).to_save(model, adapters)
    first = next(iter(adapters.values()))
    metadata = dict(kind=first.kind, rank=first.rank, alpha=first.alpha,
                    activation=first.activation, base=model.fingerprint,
                    targets=list(dict.fromkeys(a.target for a in adapters.values())),
                    training=training or {})
    tensors = {name: p.detach().contiguous().cpu()
               for name, p in named_parameters(adapters).items()}
    save_tensors(tensors, file, {"flora_adapter": json.dumps(metadata)})


ADAPTER_METADATA = {"kind": str, "rank": float, "targets": [str], "alpha": float, "base": str,
                    "activation?": str}


def load_adapter(model, file):
    """Add the adapter that save_adapter wrote to `file`, or that of a PEFT folder (extras/peft.py);
    returns its id.

    Raises BadInput if the file is missing, truncated or not an adapter, if its kind is unknown, if
    it was trained on another base, or if a tensor is missing, left over, of the wrong shape or type
    or not finite.
    """
    if os.path.isdir(file):
        return extra("peft", f"the PEFT folder {file}").load_peft(model, file)
    tensors, metadata = load_tensors(file)
    if metadata is None:
        raise BadInput(f'{file}: has no "flora_adapter" metadata, so train.py did not write it')
    check(metadata, ADAPTER_METADATA, f'{file}: "flora_adapter" metadata')
    if metadata["base"] != model.fingerprint:
        raise BadInput(f"{file}: was trained on another base model (fingerprint {metadata['base']},"
                       f" this model's is {model.fingerprint}); load that base with --weights")
    options = {} if metadata.get("activation") is None else {"activation": metadata["activation"]}
    try:
        adapters = make_adapters(model, metadata["kind"], metadata["rank"], metadata["targets"],
                                 metadata["alpha"], device="meta", **options)
    except (BadInput, TypeError) as e:   # TypeError: an option that the kind does not have
        raise BadInput(f"{file}: {e}") from None
    fill(model, adapters, named_parameters, tensors, file)
    return attach(model, adapters)


# --------------------------------------------------------------------- 5 files: right or refused


def fill(model, adapters, named, tensors, file):
    """Give adapters that were made on "meta" the `tensors` read from `file`; memory is taken once
    all fit. named(adapters) -> {name in the file: tensor of an adapter}."""
    wanted = named(adapters)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise BadInput(f"{file}: tensor {name} is {'missing' if name in wanted else 'unexpected'}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise BadInput(f"{file}: {name} has shape {list(tensors[name].shape)}, "
                           f"this model needs {list(tensor.shape)}")
        check_weights(name, tensors[name], file)
    for name, adapter in adapters.items():
        adapter.to_empty(device=model.get_submodule(name).weight.device)
    with torch.no_grad():
        for name, tensor in named(adapters).items():
            tensor.copy_(tensors[name])


def check_weights(name, tensor, file, kept=None):
    """BadInput unless a tensor read from `file` can be weights: floating point, and finite, also in
    the dtype in which it is `kept` (default: its own)."""
    kept = tensor if kept is None else kept
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(f"{file}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; weights "
                       "must be float32, bfloat16 or float16")
    if kept.numel() and not all(extreme.isfinite() for extreme in kept.detach().aminmax()):
        what = str(kept.dtype).removeprefix("torch.")
        raise BadInput(f"{file}: {name} holds values that are not finite in {what}; it is damaged "
                       "or diverged, or needs another --dtype")


def existing_file(file, what="file"):
    """`file`, or BadInput if it is not there, not a regular file, or a pointer of Git LFS."""
    if not os.path.exists(file):
        raise BadInput(f"{file}: no such {what}")
    if not os.path.isfile(file):
        raise BadInput(f"{file}: is not a {what} but a folder, device or pipe")
    with open_file(file, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise BadInput(f"{file}: is a pointer of Git LFS, not the file itself; run "
                           "git lfs pull")
    return file


def open_file(file, mode):
    try:
        return open(file, mode)
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror})") from None


def load_tensors(file):
    """An adapter's safetensors file -> ({name: CPU tensor}, "flora_adapter" metadata or None)."""
    existing_file(file, "adapter file")
    try:
        with safe_open(file, "pt") as f:
            metadata = json.loads((f.metadata() or {}).get("flora_adapter", "null"))
            return {name: f.get_tensor(name) for name in f.keys()}, metadata
    except (SafetensorError, ValueError, RecursionError) as e:
        raise BadInput(f"{file}: not a readable safetensors file ({e}); "
                       "copy or train it again") from e


WORDS = {str: "text", int: "a whole number", float: "a number that is finite",
         bool: "true or false"}


def check(value, schema, where, name="what it holds"):
    """BadInput, naming `where` and the key, unless `value`, read from a file, has the form
    `schema`: str, int, float (any finite number) or bool; [schema], a list; {key: schema}, an
    object, in which a key written with "?" may be missing or null."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            raise BadInput(f"{where}: {name} is {reprlib.repr(value)}, but must be a list")
        for item in value:
            check(item, schema[0], where, f"an entry of {name}")
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            raise BadInput(f"{where}: {name} is {reprlib.repr(value)}, but must be an object")
        for key, inner in schema.items():
            key, optional = key.rstrip("?"), key.endswith("?")
            if value.get(key) is not None:
                check(value[key], inner, where, key)
            elif not optional:
                raise BadInput(f"{where}: has no {key}")
    elif not is_a(value, schema):
        raise BadInput(f"{where}: {name} is {reprlib.repr(value)}, but must be {WORDS[schema]}")


def is_a(value, kind):
    """Whether a value of JSON is of a kind: a bool is not a number, a number is finite, a whole
    number has 64 bits."""
    if kind is int:
        return type(value) is int and -2**63 <= value < 2**63
    if kind is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    return type(value) is kind


def read_json(file, schema={}):
    """The object in a JSON file; BadInput if it cannot be read or is not of the form `schema`."""
    existing_file(file)
    try:
        with open_file(file, "rb") as f:
            value = json.loads(f.read().decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{file}: not readable as JSON ({e})") from None
    check(value, schema, file)
    return value


# --------------------------------------------------- 6 outputs: nothing overwritten, nothing lost


def save_tensors(tensors, file, metadata):
    """Write a safetensors file."""
    with open_output(file) as f:
        if stands(file):
            f.write(save(tensors, metadata))
        else:   # not by way of memory: a base model may fill most of it
            save_file(tensors, f.name, metadata)


def write_json(file, value):
    """Write a JSON file."""
    with open_output(file) as f:
        f.write(json.dumps(value, indent=1).encode() + b"\n")


@contextlib.contextmanager
def open_output(file):
    """The one way in which a file is written: open for bytes under a temporary name, and renamed
    when all is written, so that a kill or a full disk leaves what was there. Links are followed;
    devices and pipes are written to as they stand. BadInput, naming the file, if it cannot be."""
    try:
        through = stands(file)
        if through is None:
            with replacing(os.path.realpath(file)) as f:
                yield f
        else:
            with open(os.dup(through) if isinstance(through, int) else through, "wb") as f:
                yield f
    except (OSError, RuntimeError, SafetensorError) as e:
        reason = e
        while reason is not None and not isinstance(reason, (OSError, SafetensorError)):
            reason = reason.__context__   # torch.save hides the OSError behind an error of its own
        if reason is None:
            raise
        reason = getattr(reason, "strerror", None) or reason
        raise BadInput(f"{file}: cannot be written ({reason})") from e


def stands(file):
    """What to write to if `file` is not to be replaced: the path of a device or pipe, the number
    of this process's output if it is that file; otherwise None."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(stream)):
                return stream
    return None if stat.S_ISREG(found.st_mode) else file


@contextlib.contextmanager
def temporary(file):
    """A file open for bytes beside `file`; it is gone at the end, unless it was renamed."""
    name = f"{file}.{os.getpid()}.tmp"
    try:
        with open(name, "wb") as f:
            yield f
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def replacing(file):
    """A temporary file which, once written, takes the place and the permissions of `file`."""
    with temporary(file) as f:
        mode = os.stat(file if os.path.exists(file) else f.name).st_mode
        yield f
        f.flush()
        os.fsync(f.fileno())
        os.chmod(f.name, stat.S_IMODE(mode))
        os.replace(f.name, file)
