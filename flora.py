"""FLoRA (Wen & Chaudhuri, "Batched Low-Rank Adaptation of Foundation Models", ICLR 2024) beside
the two methods that it is compared with: bmm-LoRA (App. B.1) and IA3 (end of §3.2).

A frozen weight W0 [d, k] serves a batch in which every example, or every token, has an adapter i
of its own. In the paper's shapes B_i is [d, r] and A_i is [r, k]:

    LoRA   (§2.1)      W_i = W0 + (alpha / r) B_i A_i
    FLoRA  (§3)        W_i = W0 ∘ (B_i A_i) / r             the identity is B_i A_i / r = 1
    IA3    (§3.2)      y   = l_i ∘ (W0ᵀ x)                  FLoRA with B_i = 1, "rank 0.5";
                                                            or, on the inputs, with A_i = 1

PEFT names LoRA's factors the other way round: its lora_A is our Bᵀ, its lora_B our Aᵀ.

Reading order: (1) the equations as functions, (2) what one projection learns (`FLoRA`, `LoRA`,
`IA3`), (3) a linear layer with many of them (`AdapterLinear`), (4) verbs on a model: add, gather,
merge, save, load. extras/ holds further kinds of adapters, and other forms of W0 (packed, int8).
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.adapter_files import named_parameters, read_adapter, write_adapter
from plumbing.files import BadInput
from plumbing.registry import extra, find
from plumbing.targets import check_rank, default_targets as defaults, layers_of

BASE = 0  # the adapter id that means "no adapter"; adapters are numbered from 1


# ------------------------------------------------------------------------------- 1 the equations


def flora_expand(x, times_W0, A, B, bias=None):
    """Eq. 6: Y = A ∘ ((B ∘ X) W0), and a bias. One shared matmul of r rows per token, no bmm.

    x [..., d], A [r, ..., k], B [r, ..., d], bias [k] or [..., k] -> [..., k] in the widest of
    their dtypes. times_W0 multiplies rows by the shared W0, [..., d] -> [..., k]. A and B hold
    each token's own adapter, as rows. For r > 1 the paper takes a mean over the r components; here
    it is a sum, since FLoRA.scale has divided A by r: so one batch may pad ranks with zeros.
    """
    BX = (B * x).type_as(x)                                  # [r, ..., d]
    XW = times_W0(BX)                                        # [r, ..., k]
    if len(A) == 1 and bias is not None:                     # A ∘ XW + bias by one operator
        return torch.addcmul(bias, A, XW)[0]
    Y = (A * XW).sum(0)                                      # [..., k]
    return Y if bias is None else Y + bias


def flora_materialise(x, W0, A, B):
    """Eq. 4: y = x (W0 ∘ ΔW), the adapted weight made once for all tokens of one adapter.

    x [..., d], W0 [d, k], A [r, k] (carrying the 1/r), B [r, d] -> [..., k] in x's dtype.
    """
    delta_W = (A.T @ B).T                                 # [d, k] = sum_j b_j a_jᵀ, strides as W0
    return (x @ (W0 * delta_W).to(x.dtype)).to(x.dtype)   # the last cast is for autocast


def lora_bmm(y, x, A, B):
    """App. B.1: y + (x B) A, LoRA's addend, one adapter per example, by two torch.bmm, of
    which the second adds y; in the dtype of A and B, as in PEFT.

    y [b, T, k], x [b, T, d], A [b, r, k] (carrying alpha / r), B [b, d, r] -> [b, T, k].
    """
    XB = torch.bmm(x.type_as(B), B)                                 # [b, T, r]
    if A.shape[1] == 1:   # elementwise: the same, on a CPU up to four times as fast
        return torch.addcmul(y.type_as(A), XB, A)
    return torch.baddbmm(y.type_as(A), XB, A)                       # [b, T, k]


def inflection_rank(c1, c2, d, k):
    """Eq. 7 for W0 [d, k]: FLoRA costs less than bmm-LoRA while c1 (d + k) / (c2 d k) + 1/r >= 1.

    c1, c2: seconds per multiply-add of torch.bmm and of a plain matmul. LoRA's two bmm take
    b l r (d + k) multiply-adds, the matmul b l d k; with d = k this is the paper's 2 c1 / (d c2).
    Returns the rank at which both cost the same, or infinity.
    """
    share = c1 * (d + k) / (c2 * d * k)
    return 1 / (1 - share) if share < 1 else float("inf")


# Cost of building W0 ∘ ΔW, in equivalent matmul rows, by device and bytes of x's dtype; below it
# Eq. 6 is cheaper. CPU: measured at 768 to 6144 wide (142 to 297 rows, and 812 to 1,229), 2 cores.
# Otherwise, as on CUDA: estimated from an H100's bandwidth and matmul rate.
MATERIALISE_COST = {("cpu", 4): 256, ("cpu", 2): 1024}
ESTIMATED_COST = 1024


def choose_path(x, rank, ids):
    """"expand" (Eq. 6) or "materialise" (Eq. 4) for x [b, T, d], whichever takes fewer matmul rows.

    An adapter with n tokens costs rank * n rows expanded, n and the cost above materialised.
    Decoding (T = 1) always expands: counting distinct ids would make a GPU wait for the host.
    """
    b, T, _ = x.shape
    if T == 1 or rank == 1:
        return "expand"
    cost = MATERIALISE_COST.get((x.device.type, x.dtype.itemsize), ESTIMATED_COST)
    more = (rank - 1) * b * T   # rows, of all adapters
    return "materialise" if more > cost and more / len(ids.unique()) > cost else "expand"


# -------------------------------------------------------------------- 2 what one projection learns


class Adapter(nn.Module):
    """One adapter of one projection W0 [d, k]: the float32 tensors that train and that are saved.

    A kind is a subclass that says what it changes; None means "as the base model". It starts as
    the base model exactly. columns: the outputs [lo, hi) that it adapts, default all.
    """
    kind = None
    learning_rate = 1e-3   # train.py's default
    fixed_rank = None      # of a kind without a choice
    places = None          # {target: [(end of a projection's name, options)]}; None: model.TARGETS
    options = ()           # what __init__ takes beside the following, and a file keeps

    def __init__(self, rank, target, d, k, columns=None, alpha=8.0, scales_input=False):
        super().__init__()
        self.rank, self.target, self.alpha = rank, target, alpha
        self.d, self.columns, self.scales_input = d, columns or (0, k), scales_input

    def scale(self, columns):
        """ΔW over the first `columns` outputs as sum_j b_j a_jᵀ: A [R, columns], B [R, d]."""
        return None, None

    def added(self, k):
        """An addend to W0 as factors: A [r, k], B [r, d]."""
        return None, None

    def bias(self, bias):
        """The layer's bias [k], or None, as this adapter changes it."""

    def merge(self, model, layer):
        """Write this adapter into the weight and bias of `layer`, in their dtype; BadInput,
        before the first write, if it cannot be."""
        k = layer.out_features
        (scale_A, scale_B), (added_A, added_B) = self.scale(k), self.added(k)
        bias = self.bias(layer.bias)
        if scale_A is not None:
            layer.weight.mul_(scale_A.T @ scale_B)        # W0ᵀ ∘ ΔWᵀ  [k, d]
        if added_A is not None:
            layer.weight.add_(added_A.T @ added_B)
        if bias is not None:
            layer.bias.copy_(bias)

    @classmethod
    def attached(cls, model, adapters):
        """Called when {layer name: Adapter} of this kind are attached to a model."""


class LowRank(Adapter):
    """A kind with two factors, B [d, r] and A [r, hi - lo], which reset_parameters fills."""

    def __init__(self, rank, target, d, k, *args, **kwargs):
        super().__init__(rank, target, d, k, *args, **kwargs)
        lo, hi = self.columns
        self.B = nn.Parameter(torch.empty(d, rank))
        self.A = nn.Parameter(torch.empty(rank, hi - lo))
        self.reset_parameters()


class FLoRA(LowRank):
    """ΔW = B A / r (§3)."""
    kind = "flora"
    learning_rate = 8e-3   # the paper's (App. A)

    @torch.no_grad()
    def reset_parameters(self):
        """Component 1 alone is the identity (r * 1 / r); of the others, B is random and A zero.

        With all ones every component would get the same gradient for ever, and rank r would train
        as rank 1."""
        nn.init.normal_(self.B)
        nn.init.zeros_(self.A)
        self.B[:, 0] = 1
        self.A[0] = self.rank

    def scale(self, columns):
        lo, hi = self.columns
        A, B = F.pad(self.A / self.rank, (lo, columns - hi)), self.B.T       # [r, columns], [r, d]
        if hi - lo == columns:
            return A, B
        # B scales the inputs of all columns, those of others too (c_attn.k beside c_attn's): one
        # more component is their identity, so the rank is r + 1
        outside = F.pad(torch.zeros_like(A[:1, lo:hi]), (lo, columns - hi), value=1.0)
        return torch.cat([A, outside]), torch.cat([B, torch.ones_like(B[:1])])


class LoRA(LowRank):
    """W0 + (alpha / r) B A (§2.1)."""
    kind = "lora"
    learning_rate = 1e-3   # the paper's 1e-4 is for 1,500 steps of a 15B model

    def reset_parameters(self):
        """As in PEFT, after a draw that keeps what a seed gave in extras/results/."""
        nn.init.normal_(self.B)
        nn.init.kaiming_uniform_(self.B.T, a=5**0.5)
        nn.init.zeros_(self.A)

    def added(self, k):
        lo, hi = self.columns
        return F.pad(self.A * (self.alpha / self.rank), (lo, k - hi)), self.B.T


class IA3(Adapter):
    """l [hi - lo] scales the outputs, bias included, or l [d] the inputs (end of §3.2)."""
    kind = "ia3"
    learning_rate = 5e-3   # the paper's (App. A)
    fixed_rank = 0.5       # the paper's name for it; it decides nothing

    def __init__(self, rank, target, d, k, *args, **kwargs):
        super().__init__(rank, target, d, k, *args, **kwargs)
        lo, hi = self.columns
        self.l = nn.Parameter(torch.ones(d if self.scales_input else hi - lo))

    def scale(self, columns):
        if self.scales_input:
            return self.l.new_ones(1, columns), self.l[None]
        return self.scaled_outputs(columns)[None], self.l.new_ones(1, self.d)

    def bias(self, bias):
        if bias is None or self.scales_input:
            return None
        return bias * self.scaled_outputs(len(bias))

    def scaled_outputs(self, columns):
        """l with ones outside of the columns that it adapts, [columns]."""
        lo, hi = self.columns
        return F.pad(self.l, (lo, columns - hi), value=1.0)


KINDS = {"flora": FLoRA, "lora": LoRA, "ia3": IA3}
NO_ADAPTER = Adapter(0, None, 0, 0)   # in the place of an id that a layer has no adapter of


# ----------------------------------------------------------------- 3 one layer, many adapters


@dataclass(eq=False)
class Bank:
    """The adapters of one layer, stacked: row 0 is the base model, row i adapter i; ranks are
    padded with zeros. float32, but on CUDA a frozen bank holds LoRA's factors in the model's dtype.
    A part that no adapter of the layer needs is None.
    """
    scale_A: torch.Tensor | None   # [n + 1, R, columns]   ΔW of FLoRA and IA3
    scale_B: torch.Tensor | None   # [n + 1, R, d]
    added_A: torch.Tensor | None   # [n + 1, R', k]        LoRA
    added_B: torch.Tensor | None   # [n + 1, R', d]
    bias: torch.Tensor | None      # [n + 1, k]            the bias as each IA3 scales it


def stack(tensors, neutral):
    """One tensor [r_i, m] for each adapter -> [n, max r, m], padded with zeros; or [k] -> [n, k].

    None stands for `neutral`. If all are None, so is the result."""
    if all(tensor is None for tensor in tensors):
        return None
    tensors = [neutral.float() if tensor is None else tensor for tensor in tensors]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def select(stacked, ids):
    """stacked [n + 1, ...], ids of any shape -> [*ids, ...]. A negative or unknown id is an
    IndexError."""
    return F.embedding(ids, stacked.flatten(1)).unflatten(-1, stacked.shape[1:])


class Rows:
    """One layer's adapters for one batch: its bank, and ids int64 [b] (one per example) or [b, T]
    (one per token). rows["scale_A"] are each one's own rows of bank.scale_A."""

    def __init__(self, bank, ids):
        self.bank, self.ids, self.kept = bank, ids.view(len(ids), -1), {}         # [b, 1 or T]

    def __getitem__(self, part):
        if part in self.kept:
            return self.kept[part]
        own = select(getattr(self.bank, part), self.ids)      # [b, 1 or T, R, m]; a bias has no R
        if part.startswith("scale"):                          # as flora_expand takes it
            own = own.movedim(2, 0).contiguous()              # [R, b, 1 or T, m]
        elif part.startswith("added"):                        # as torch.bmm takes it
            own = own.flatten(0, 1)                           # [b or b T, R, m]
        if not own.requires_grad:   # checkpointing recomputes a block: it must select again
            self.kept[part] = own
        return own


NO_ROWS = Rows(Bank(None, None, None, None, None), torch.zeros(1, dtype=torch.int64))


def add_lora(y, x, rows):
    """y + LoRA's addend, an adapter per example or per token: y [b, T, k], x [b, T, d]."""
    A, B = rows["added_A"], rows["added_B"]                                  # [n, r, k or d]
    y_rows, x_rows = (z.reshape(len(A), -1, z.shape[-1]) for z in (y, x))    # [n, b T / n, k or d]
    return lora_bmm(y_rows, x_rows, A, B.mT).view(y.shape)


class AdapterLinear(nn.Linear):
    """A frozen linear layer, y = W0ᵀ x + bias, with a bank of adapters over it.

    As in nn.Linear, `weight` is W0ᵀ [k, d]. `adapters` maps str(id) to this layer's Adapter; an id
    without one here runs the base layer.
    """
    form = None                         # W0 as nn.Linear's; or extras/packed.py's, as on a CPU
    add_lora = staticmethod(add_lora)   # how LoRA's addend is added: (y, x, rows) -> [b, T, k]
    path = "auto"                       # how ΔW is applied: a key of PATHS, or by choose_path

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        self.adapters = nn.ModuleDict()
        self.num_adapters = 0       # of the model, so that ids mean the same in every layer
        self.frozen_bank = None     # from freeze_bank, for serving; None stacks in each forward

    def forward(self, x, adapters=None):
        """x [b, T, d] -> [b, T, k] in x's dtype.

        adapters: {layer: its Rows}, from `gather`; None is the base model for all.
        """
        rows = (adapters or {}).get(self, NO_ROWS)
        y = self.scaled(x, rows)
        if rows.bank.added_A is not None:
            y = self.add_lora(y, x, rows)
        return y.type_as(x)

    def product(self, x, bias=None, lo=0, hi=None):
        """x [..., d] -> x W0[:, lo:hi] (+ bias), in the form in which W0 is held."""
        if self.form is None:
            return F.linear(x, self.weight[lo:hi], bias)
        return self.form.product(self, x, lo, hi, bias)

    def W0(self):
        """The dense W0 [d, k]: for Eq. 4, and for whoever merges or fits."""
        return self.weight.T if self.form is None else self.form.W0(self)

    def scaled(self, x, rows):
        """x (W0 ∘ ΔW) + bias, ΔW (and, for IA3, the bias) being each token's own -> [b, T, k]."""
        bank = rows.bank
        if bank.scale_A is None:
            return self.product(x, self.bias)
        rank, columns = bank.scale_A.shape[1:]
        path = choose_path(x, rank, rows.ids) if self.path == "auto" else self.path
        bias = self.bias if bank.bias is None else rows["bias"]
        if columns == self.out_features:
            return PATHS[path](self, x, rows, bias)
        # the last columns, which no adapter of this layer touches
        y = PATHS[path](self, x, rows, None)
        y = torch.cat([y, self.product(x, lo=columns).to(y.dtype)], dim=-1)
        return y if bias is None else y + bias

    def expanded(self, x, rows, bias):
        """Eq. 6 + bias: x [b, T, d] -> [b, T, columns]."""
        A, B = rows["scale_A"], rows["scale_B"]                              # [R, b, 1 or T, ...]
        return flora_expand(x, lambda BX: self.product(BX, hi=A.shape[-1]), A, B, bias)

    def materialised(self, x, rows, bias):
        """Eq. 4 + bias, one distinct adapter after another: x [b, T, d] -> [b, T, columns]."""
        A, B, ids = rows.bank.scale_A, rows.bank.scale_B, rows.ids.expand(x.shape[:2])
        W0, distinct = self.W0()[:, :A.shape[2]], ids.unique()
        if len(distinct) == 1:   # as in training: no copies of x and y
            y = flora_materialise(x, W0, select(A, distinct[0]), select(B, distinct[0]))
        else:
            y = x.new_empty(*x.shape[:2], A.shape[2])
            for i in distinct:
                y[ids == i] = flora_materialise(x[ids == i], W0, select(A, i), select(B, i))
        return y if bias is None else y + bias

    def in_rows(self, ids=None):
        """The Adapter of each row of a bank, NO_ADAPTER where this layer has none. ids: which
        (default: all, from 0)."""
        held = dict(self.adapters.items())
        return [held.get(str(i), NO_ADAPTER) for i in ids or range(self.num_adapters + 1)]

    def bank(self, ids=None, columns=0):
        """Stack this layer's adapters, differentiably. ids as in in_rows; columns: how many scale_A
        has at least."""
        adapters, (k, d) = self.in_rows(ids), self.weight.shape
        scaling = [a for a in adapters if type(a).scale is not Adapter.scale]
        columns = max([columns] + [a.columns[1] for a in scaling])
        scale_A, scale_B = zip(*(a.scale(columns) for a in adapters))
        added_A, added_B = zip(*(a.added(k) for a in adapters))
        bias = [a.bias(self.bias) for a in adapters]
        ones = torch.ones(1, max(k, d), device=self.weight.device)
        return Bank(stack(scale_A, ones[:, :columns]), stack(scale_B, ones[:, :d]),
                    stack(added_A, ones[:0, :k]), stack(added_B, ones[:0, :d]),
                    stack(bias, self.bias))

    def freeze_bank(self, capacity=0):
        """Set frozen_bank, as the verb freeze_bank explains."""
        bank = self.bank(range(max(self.num_adapters, capacity) + 1))
        if bank.added_A is not None and self.weight.is_cuda:   # a CPU's bmm is faster in float32
            dtype = self.W0().dtype
            bank.added_A, bank.added_B = bank.added_A.to(dtype), bank.added_B.to(dtype)
        self.frozen_bank = bank


PATHS = {"expand": AdapterLinear.expanded, "materialise": AdapterLinear.materialised}


# -------------------------------------------------------------------------- 4 verbs on a model


def adapter_class(kind):
    """The Adapter of a kind: one of KINDS, or the ADAPTER of extras/KIND.py."""
    return find(kind, KINDS, "ADAPTER",
                f"unknown adapter kind {kind!r}; use one of {', '.join(KINDS)}, "
                f"or a kind that extras/ holds (there is no extras/{kind}.py for it)")


def adapter_layers(model):
    """[(name, layer)] for every AdapterLinear of a model."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, AdapterLinear)]


def set_path(model, path):
    """Compute FLoRA by Eq. 6 ("expand"), Eq. 4 ("materialise") or as choose_path says ("auto")."""
    if path not in ("auto", *PATHS):
        raise BadInput(f'path is {path!r}; use "auto", "expand" or "materialise"')
    for _, layer in adapter_layers(model):
        layer.path = path


def default_targets(model, kind):
    """Where an adapter of a kind goes by default: PEFT's places for LoRA and IA3."""
    return defaults(model, adapter_class(kind))


def make_adapters(model, kind, rank, targets=None, alpha=8.0, device=None, **options):
    """{layer name: new Adapter} for every layer of `model` that one of `targets` names; on that
    layer's device, or on `device`: "meta" takes no memory."""
    kind = adapter_class(kind)
    rank, layers, made = check_rank(kind, rank), dict(adapter_layers(model)), {}
    for target, name, more in layers_of(model, kind, targets, layers):
        k, d = layers[name].weight.shape
        with torch.device(device or "cpu"):
            new = kind(rank, target, d, k, model.columns(target), alpha,
                       target in model.SCALES_INPUT, **more, **options)
        made[name] = new.to(device or layers[name].weight.device)
    return made


def attach(model, adapters):
    """Give {layer name: Adapter} the model's lowest free adapter id, and return it."""
    layers = dict(adapter_layers(model))
    taken = {int(i) for layer in layers.values() for i in layer.adapters}
    adapter_id = min(set(range(1, len(taken) + 2)) - taken)
    next(iter(adapters.values())).attached(model, adapters)
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
        raise BadInput(f"the model has no adapter {adapter_id}; load it first")
    return found


def adapter_parameters(model, adapter_id):
    """{"layer name.A": Parameter, ...} of one adapter: what to train, what save_adapter writes."""
    return named_parameters(adapters_of(model, adapter_id))


def remove_adapter(model, adapter_id):
    """Take an adapter out of the model. Its id runs the base until the next adapter gets it."""
    for name in adapters_of(model, adapter_id):
        del model.get_submodule(name).adapters[str(adapter_id)]
    for _, layer in adapter_layers(model):
        layer.frozen_bank = None


@torch.no_grad()
def freeze_bank(model, capacity=0):
    """Stack the adapters once, for serving: forward then only gathers rows. Adding,
    removing or merging one undoes it; what changes in an adapter is seen by freezing again.

    capacity: how many adapters to keep rows for at least (extras/hot_swap.py).
    """
    for _, layer in adapter_layers(model):
        layer.frozen_bank = None
        if layer.adapters:
            layer.freeze_bank(capacity)


def gather(model, adapter_ids):
    """int64 adapter_ids [b] (one per example) or [b, T] (one per token, §3.2), 0 for the base model
    -> {layer: its Rows}, which AdapterLinear.forward takes.

    None, the base model for all, and what is gathered already come back as they are: the latter
    serves as many decoding steps as the batch keeps its composition.
    """
    if adapter_ids is None or isinstance(adapter_ids, dict):
        return adapter_ids
    return {layer: Rows(layer.frozen_bank or layer.bank(), adapter_ids)
            for _, layer in adapter_layers(model) if layer.adapters or layer.frozen_bank}


@torch.no_grad()
def merge_adapter(model, adapter_id):
    """Write one adapter into the base weights, W0 ∘ BA / r or W0 + (alpha / r) BA, in their dtype.

    All adapters are then removed, since they belonged to the old base. Merging into bfloat16 or
    float16 rounds each weight: load the model in float32 to merge without that.
    """
    adapters = {model.get_submodule(name): a for name, a in adapters_of(model, adapter_id).items()}
    if not all(layer.weight.is_floating_point() for layer in adapters):
        raise BadInput("an int8 base has no weights to merge into; load it without --quantize")
    for layer, adapter in adapters.items():
        adapter.merge(model, layer)
    for _, layer in adapter_layers(model):
        layer.adapters, layer.num_adapters, layer.frozen_bank = nn.ModuleDict(), 0, None
    vars(model).pop("fingerprints", None)   # another base now


def save_adapter(model, adapter_id, file, training=None):
    """Write one adapter as safetensors: its float32 tensors, and as metadata its kind, rank,
    targets, alpha, its base model's fingerprint and `training`, a JSON-able summary."""
    write_adapter(file, model, adapters_of(model, adapter_id), training)


def load_adapter(model, file):
    """Add the adapter that save_adapter wrote to `file`, or that of a PEFT folder (extras/peft.py);
    returns its id.

    Raises BadInput, naming the file, for one that is damaged, that was trained on another base, or
    whose kind, targets or tensors do not fit.
    """
    if os.path.isdir(file):
        return extra("peft", f"the PEFT folder {file}").load_peft(model, file)
    return attach(model, read_adapter(file, model, make_adapters))
