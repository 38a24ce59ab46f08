"""Adapters loaded and evicted between the steps of a running engine, while others' requests go on.

    from extras import hot_swap
    adapter_id = hot_swap.load_adapter(engine, "a.safetensors")
    hot_swap.remove_adapter(engine, adapter_id)

flora.freeze_bank stacks the adapters of each layer as a bank with a row per adapter. One row is
written in place where the new adapter fits the bank's rows, ranks and parts, so that CUDA graphs
over the bank stay valid; otherwise all adapters are stacked again, with as many rows as before.
"""
from dataclasses import fields

import torch

import flora
from plumbing.files import BadInput


def load_adapter(engine, file):
    """flora.load_adapter between two steps of an engine -> the adapter's id."""
    return add_adapter(engine, lambda model: flora.load_adapter(model, file))


def add_adapter(engine, add):
    """add(model) -> the id of an adapter that it adds (flora.add_adapter, extras.blend.blend), between two steps."""
    banks = frozen_banks(engine.model)
    adapter_id = add(engine.model)
    update_bank(engine.model, banks, adapter_id)
    engine.recompose()
    return adapter_id


def remove_adapter(engine, adapter_id):
    """Evict an adapter between two steps. BadInput while a waiting or running request uses it."""
    if adapter_id in in_use(engine):
        raise BadInput(f"adapter {adapter_id} is in use by a request; "
                       "cancel it or let it end first")
    banks = frozen_banks(engine.model)
    flora.remove_adapter(engine.model, adapter_id)
    update_bank(engine.model, banks, adapter_id)
    engine.recompose()


def in_use(engine):
    """The adapter ids of an engine's waiting and running requests."""
    return {r.adapter_id for r in (*engine.waiting, *engine.running) if r.state in ("waiting", "running")}


def frozen_banks(model):
    """{layer: its frozen bank} of the layers that have one."""
    return {layer: layer.frozen_bank for _, layer in flora.adapter_layers(model)
            if layer.frozen_bank is not None}


@torch.no_grad()
def update_bank(model, banks, adapter_id):
    """Freeze again after adapter `adapter_id` was added, replaced or removed -> True if in place.

    banks: frozen_banks(model) before that.
    """
    for layer, bank in banks.items():
        layer.frozen_bank = bank
    adapted = [layer for _, layer in flora.adapter_layers(model) if layer.adapters]
    if all(layer in banks for layer in adapted):
        if all(write_row(layer, adapter_id) for layer in banks):
            return True
    rows = [len(part) for bank in banks.values() for part in parts_of(bank).values()]
    flora.freeze_bank(model, capacity=max(rows, default=1) - 1)
    return False


def parts_of(bank):
    """{name: tensor [rows, ...]} of the parts that a Bank has."""
    parts = {f.name: getattr(bank, f.name) for f in fields(bank)}
    return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}


def write_row(layer, i):
    """Write adapter i, or the base where this layer has none, into its frozen bank, in place.

    Returns False, and writes nothing, where it does not fit.
    """
    bank = parts_of(layer.frozen_bank)
    columns = bank["scale_A"].shape[2] if "scale_A" in bank else 0
    row = parts_of(layer.bank([i], columns))   # each [1, ...]
    if any(i >= len(part) for part in bank.values()):
        return False
    for name, new in row.items():
        if name not in bank:
            return False
        if any(n > o for n, o in zip(new.shape[1:], bank[name].shape[1:])):
            return False
    for name, part in bank.items():
        if name in row:
            new = row[name][0]
            part[i] = 0
            part[i][tuple(slice(n) for n in new.shape)] = new
        else:
            part[i] = part[0]   # as the base
    return True
