"""One adapter as a file: safetensors, with what it is as JSON in the metadata "flora_adapter".

The tensors are float32, named "layer name.A" and so on. The metadata holds the kind, rank, targets
and alpha, the fingerprint of the base model, an option of extras/ffba.py (`activation`) and a
summary of the training.
"""
import json

import torch
from safetensors import SafetensorError, safe_open

from plumbing.files import BadInput, check_weights, existing_file

ADAPTER_METADATA = {"kind": str, "rank": float, "targets": [str], "alpha": float, "base": str,
                    "activation?": str}


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
