"""One adapter as a file: safetensors, with what it is as JSON in the metadata.

Tensors, all float32, are named by layer and parameter. Of a FLoRA of rank r and a LoRA on a
projection of d inputs, of which it adapts n outputs (c_attn.qk: the first C + head_dim), they are
    transformer.h.0.attn.c_attn.A   [r, n]    and   transformer.h.0.attn.c_attn.B   [d, r],
of an IA3 ….l [n], or [d] where it scales the inputs (mlp.c_proj). The metadata has one key,
"flora_adapter", whose JSON holds
    kind          "flora", "lora", "ia3", or the name of a kind in extras/
    rank, alpha   numbers; of FLoRA and IA3 alpha means nothing, an IA3's rank is 0.5
    targets       names out of the model's TARGETS
    base          the base model's fingerprint (plumbing/fingerprint.py): another base is refused
    activation    an option of FFBA's (extras/ffba.py), else null
    training      a summary of the training, which nothing reads
The format has no version: unknown keys are left alone, and files of older fingerprints load.
"""
import json

import torch
from safetensors import SafetensorError, safe_open

from plumbing.files import BadInput, check_json, check_weights, existing_file
from plumbing.outputs import save_tensors

METADATA = {"kind": str, "rank": float, "targets": [str], "alpha": float, "base": str,
            "activation?": str}
OPTIONS = ("activation",)   # of some kind (extras/ffba.py); null where an adapter has none


def named_parameters(adapters):
    """{layer name: Adapter} -> {"layer name.A": Parameter, ...}"""
    return {f"{name}.{p}": tensor for name, adapter in adapters.items()
            for p, tensor in adapter.named_parameters()}


def write_adapter(file, model, adapters, training=None):
    """Write {layer name: Adapter} of a model; training: a summary. A kind that files do not hold
    (extras/blend.py) is written as what its to_save(model, adapters) makes of it."""
    to_save = getattr(next(iter(adapters.values())), "to_save", None)
    adapters = to_save(model, adapters) if to_save else adapters
    first = next(iter(adapters.values()))
    metadata = dict(kind=first.kind, rank=first.rank, alpha=first.alpha,
                    **{name: getattr(first, name, None) for name in OPTIONS},
                    base=model.fingerprint,
                    targets=list(dict.fromkeys(a.target for a in adapters.values())),
                    training=training or {})
    tensors = {name: p.detach().contiguous().cpu()
               for name, p in named_parameters(adapters).items()}
    save_tensors(tensors, file, {"flora_adapter": json.dumps(metadata)})


def read_adapter(file, model, make_adapters):
    """A file that write_adapter wrote -> {layer name: Adapter} for `model`, by flora.make_adapters.

    Raises BadInput as flora.load_adapter says.
    """
    tensors, metadata = load_tensors(file)
    if metadata is None:
        raise BadInput(f'{file}: has no "flora_adapter" metadata, so train.py did not write it')
    check_json(metadata, METADATA, f'{file}: "flora_adapter" metadata')
    if metadata["base"] not in model.fingerprints:
        raise BadInput(f"{file}: was trained on another base model (fingerprint {metadata['base']},"
                       f" this model's is {model.fingerprint}); load that base with --weights")
    options = {name: metadata[name] for name in OPTIONS if metadata.get(name) is not None}
    try:
        adapters = make_adapters(model, metadata["kind"], metadata["rank"], metadata["targets"],
                                 metadata["alpha"], device="meta", **options)
    except (BadInput, TypeError) as e:   # TypeError: an option that the kind does not have
        raise BadInput(f"{file}: {e}") from None
    fill(model, adapters, named_parameters, tensors, file)
    return adapters


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
