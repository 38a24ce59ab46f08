"""Layers that multiply the same x as one, on a CPU: their weights packed together, and the adapters
of a batch applied to all of them at once.

A decoding step takes longer to start a small operator than to compute it. Beside the base's one
product, LoRA on q_proj and v_proj is two small batched ones here in place of four. FLoRA of rank 1
has an x of its own in each layer, so it keeps a product for each and shares the rest, B ∘ x and
A ∘ y. What else an adapter may be is left to its layer.

Shapes: B batch, d and k in and out, k being that of all layers together.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from extras.int8 import serving
from extras.packed import Copies, Packed, pack_weight, times_packed
from flora import NO_ROWS, AdapterLinear, add_lora, select

MOST_RANKS = 16   # of a LoRA; a joint A holds zeros beside it, for the columns of the other layers


class JointRows(NamedTuple):
    """The adapters of the layers for one batch; a part that no adapter needs is None."""
    scale_A: torch.Tensor | None    # [B, k]
    scale_B: torch.Tensor | None    # [layers, B, d]
    added_A: torch.Tensor | None    # [B, R, k]
    added_B: torch.Tensor | None    # [B, d, R]


def is_joinable(layer, rows):
    """Whether JointRows can hold what a layer does: FLoRA of rank 1, IA3, and LoRA of a low one."""
    A, added = rows.bank.scale_A, rows.bank.added_A
    one = A is None or A.shape[1] == 1 and A.shape[2] == layer.out_features
    few = added is None or added.shape[1] <= MOST_RANKS
    alike = layer.add_lora is add_lora or hasattr(layer.add_lora, "is_add_lora_at_one_token")
    usual = alike and layer.path != "materialise"
    return type(layer) is AdapterLinear and type(layer.form) is Packed and usual and one and few


def join_scales(layers, ids, all_rows):
    """scale_A and scale_B of JointRows, ones for a layer without."""
    A, B = [], []
    for layer, rows in zip(layers, all_rows):
        if rows.bank.scale_A is None:
            A.append(torch.ones(len(ids), layer.out_features))
            B.append(torch.ones(len(ids), layer.in_features))
        else:
            A.append(select(rows.bank.scale_A, ids)[:, 0])
            B.append(select(rows.bank.scale_B, ids)[:, 0])
    return torch.cat(A, 1), torch.stack(B)


def join_added(layers, ids, all_rows):
    """added_A and added_B of JointRows."""
    A, B, lo, end = [], [], 0, sum(layer.out_features for layer in layers)
    for layer, rows in zip(layers, all_rows):
        hi = lo + layer.out_features
        if rows.bank.added_A is not None:
            A.append(F.pad(select(rows.bank.added_A, ids), (lo, end - hi)))
            B.append(select(rows.bank.added_B, ids))
        lo = hi
    return torch.cat(A, 1), torch.cat(B, 1).mT.contiguous()


def join(layers, all_rows):
    """The JointRows of layers, all_rows being the flora.Rows of each, or NO_ROWS."""
    ids = next(rows.ids for rows in all_rows if rows is not NO_ROWS)[:, 0]
    parts = []
    for part, join_part in [("scale_A", join_scales), ("added_A", join_added)]:
        found = any(getattr(rows.bank, part) is not None for rows in all_rows)
        parts += join_part(layers, ids, all_rows) if found else (None, None)
    return JointRows(*parts)


class Joint:
    """Layers without biases that multiply the same x."""

    def __init__(self, *layers):
        self.layers, self.copies = layers, Copies()

    def plain(self, x, adapters):
        """x [..., d] -> what the layers make of it side by side [..., k]; None where one of them is
        not packed or has an adapter, or where this is not serving on a CPU."""
        if serving(x) and not self.adapted(adapters) and self.is_packed():
            return times_packed(x, self.packed())

    def adapted(self, adapters):
        return adapters and any(layer in adapters for layer in self.layers)

    def is_packed(self):
        return all(type(layer.form) is Packed for layer in self.layers)

    def packed(self):
        """All weights as one, packed at first use and again when one has changed."""
        if len(self.layers) == 1:
            return self.layers[0].form.linear.copy(self.layers[0].weight)
        weights = [layer.weight for layer in self.layers]
        now = [(weight.data_ptr(), weight._version) for weight in weights]
        if "joint" not in self.copies or self.copies["joint"][1] != now:
            packed = pack_weight(torch.cat([weight.detach() for weight in weights]))
            self.copies["joint"] = weights, now, packed   # held, so that no other gets an address
        return self.copies["joint"][2]

    def rows(self, adapters):
        """The JointRows of the batch; None where its adapters cannot be joined."""
        all_rows = [adapters.get(layer, NO_ROWS) for layer in self.layers]
        kept = next(rows for rows in all_rows if rows is not NO_ROWS).kept
        if self not in kept:
            joinable = all(map(is_joinable, self.layers, all_rows))
            kept[self] = join(self.layers, all_rows) if joinable else None
        return kept[self]

    def step(self, x, adapters):
        """One token of each example, x [B, d] -> [B, k], in x's dtype or with adapters float32."""
        rows = None
        if self.adapted(adapters):
            rows = self.rows(adapters)
        elif self.is_packed():
            return times_packed(x, self.packed())
        if rows is None:
            return torch.cat([layer(x[:, None], adapters)[:, 0] for layer in self.layers], -1)
        y = self.scaled(x, rows)
        if rows.added_A is None:
            return y
        XB = torch.bmm(x.float()[:, None], rows.added_B)                      # [B, 1, R]
        return torch.baddbmm(y.float()[:, None], XB, rows.added_A)[:, 0]

    def scaled(self, x, rows):
        """The part of FLoRA and IA3, or of the base."""
        if rows.scale_A is None:
            return times_packed(x, self.packed())
        BX = (rows.scale_B * x).to(x.dtype)                                   # [layers, B, d]
        y = [times_packed(x, layer.form.linear.copy(layer.weight))
             for x, layer in zip(BX, self.layers)]
        return rows.scale_A * torch.cat(y, -1)
