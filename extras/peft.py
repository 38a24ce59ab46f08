"""PEFT's folders: LoRA and IA3 adapters in and out.

  python generate.py --adapter PEFT_FOLDER --prompt 'def f('
  flora.load_adapter(model, "PEFT_FOLDER");  extras.peft.save_peft(model, adapter_id, "PEFT_FOLDER")

A folder holds adapter_config.json and adapter_model.safetensors. PEFT names LoRA's factors the
other way round: its lora_A [r, in] is our Bᵀ, its lora_B [out, r] our Aᵀ.
"""
import os

import torch.nn.functional as F

from flora import (BadInput, adapter_layers, adapters_of, attach, fill, load_tensors, make_adapters,
                   read_json, save_tensors, write_json)

KINDS = {"LORA": "lora", "IA3": "ia3"}
# Keys of adapter_config.json that change no output, and those that are read below. Any other key
# must be empty, since what it asks for would be lost.
HARMLESS_KEYS = {"r", "lora_alpha", "use_rslora", "target_modules", "feedforward_modules", "peft_type",
                 "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
                 "inference_mode", "lora_dropout", "init_ia3_weights", "megatron_core", "qalora_group_size"}
HARMLESS_VALUES = {  # PiSSA, OLoRA, CorDA and LoftQ, as init_lora_weights, change the base
    "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}


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


def read_config(folder):
    """adapter_config.json of a folder; BadInput, naming the key, for what an Adapter cannot represent."""
    file = os.path.join(folder, "adapter_config.json")
    config = read_json(file)
    if config.get("peft_type") not in KINDS:
        raise BadInput(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA and IA3 can be loaded")
    for key, value in config.items():
        if value and key not in HARMLESS_KEYS and value not in HARMLESS_VALUES.get(key, []):
            raise BadInput(f"{file}: {key} is {value!r}, which cannot be represented here; "
                           "train without it, or merge the adapter into the base in PEFT")
    alpha, modules = config.setdefault("lora_alpha", 8), config.get("target_modules")
    if not isinstance(alpha, (int, float)):
        raise BadInput(f"{file}: lora_alpha is {alpha!r}; it must be a number")
    if not (isinstance(modules, list) and modules and all(isinstance(m, str) for m in modules)):
        raise BadInput(f"{file}: target_modules is {modules!r}; it must list the names of projections")
    return config


def modules_named(model, modules, file):
    """Names of the layers that `modules`, PEFT's target_modules, stand for."""
    layers, named = [name for name, _ in adapter_layers(model)], set()
    for module in modules:
        found = [name for name in layers if f".{name}".endswith(f".{module}")]
        if not found:
            projections = sorted({name.split(".", 3)[-1] for name in layers})
            raise BadInput(f"{file}: target_modules names {module!r}, which is none of this model's "
                           f"projections: {', '.join(projections)}")
        named.update(found)
    return named


def load_peft(model, folder):
    """Add the LoRA or IA3 of a PEFT folder; returns its id.

    PEFT records the base model's name alone, so that another base of the same shapes goes
    unnoticed. Raises BadInput, naming file and key, for what cannot be represented or does not fit.
    """
    config = read_config(folder)
    file, weights = (os.path.join(folder, f) for f in ("adapter_config.json", "adapter_model.safetensors"))
    if not os.path.isfile(weights) and os.path.isfile(os.path.join(folder, "adapter_model.bin")):
        raise BadInput(f"{folder}/adapter_model.bin is a pickle, which is not opened; load it in PEFT and "
                       "save it again as safetensors")
    named = modules_named(model, config["target_modules"], file)
    targets = [t for t, place in model.TARGETS.items() if model.columns(t) is None
               and any(name.endswith(f".{place}") for name in named)]
    rank, alpha = config.get("r"), config["lora_alpha"]
    try:
        adapters = make_adapters(model, KINDS[config["peft_type"]], rank, targets, alpha, device="meta")
    except BadInput as e:
        raise BadInput(f"{file}: {e}") from None
    for name in sorted(adapters.keys() - named):
        raise BadInput(f"{file}: target_modules leaves out {name} but not the same projection of all "
                       "other layers; an adapter here has all or none of them")
    if config.get("use_rslora"):  # alpha / sqrt(r) in the place of alpha / r
        for adapter in adapters.values():
            adapter.alpha = alpha * rank**0.5
    fill(model, adapters, peft_tensors, load_tensors(weights)[0], weights)
    return attach(model, adapters)


def save_peft(model, adapter_id, folder, base_name=None):
    """Write a LoRA or IA3 as a folder that PEFT opens, float32.

    base_name: the base model for PEFT to load, a folder or a name on the hub. An adapter of some of
    a projection's columns (c_attn.qk) is written over all of them, as zeros (LoRA) or ones (IA3).
    """
    adapters = adapters_of(model, adapter_id)
    first = next(iter(adapters.values()))
    if first.kind not in KINDS.values():
        raise BadInput(f"adapter {adapter_id} is of kind {first.kind}, which PEFT does not have; write it "
                       "into the base by flora.merge_adapter and save that by GPT.save_pretrained")
    places = {name: model.TARGETS[a.target] for name, a in adapters.items()}
    config = dict(task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True,
                  target_modules=list(dict.fromkeys(places.values())))
    if first.kind == "lora":
        alpha = int(first.alpha) if first.alpha == int(first.alpha) else first.alpha
        config |= dict(peft_type="LORA", r=first.rank, lora_alpha=alpha, bias="none")
    else:
        scaled_inputs = {places[name] for name, a in adapters.items() if a.scales_input}
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
