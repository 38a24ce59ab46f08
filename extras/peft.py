"""PEFT's folders: LoRA, IA3 and HiRA adapters in and out, and FLoRA as a HiRA.

  python generate.py --adapter PEFT_FOLDER --prompt 'def f('
  flora.load_adapter(model, "PEFT_FOLDER");  extras.peft.save_peft(model, adapter_id, "PEFT_FOLDER")

A folder holds adapter_config.json and adapter_model.safetensors. PEFT names the two factors of LoRA
and HiRA the other way round: its lora_A [r, in] is our Bᵀ, its lora_B [out, r] our Aᵀ.

A FLoRA of rank r is written as the HiRA of rank r + 1 that it equals (extras/hira.py), and such a
folder is opened as the FLoRA again.
"""
import os

import torch
import torch.nn.functional as F

from extras.hira import flora_in_hira, hira_of_flora
from flora import adapter_layers, adapters_of, attach, make_adapters
from plumbing.adapter_files import fill, load_tensors
from plumbing.files import BadInput, is_json, read_json
from plumbing.outputs import save_tensors, write_json

KINDS = {"LORA": "lora", "IA3": "ia3", "HIRA": "hira"}
PEFT_TYPES = {kind: peft_type for peft_type, kind in KINDS.items()} | {"flora": "HIRA"}
# Keys of adapter_config.json that change no output, and those that are read below. Any other key
# must be empty, since what it asks for would be lost.
HARMLESS_KEYS = {
    "r", "lora_alpha", "use_rslora", "target_modules", "feedforward_modules", "peft_type",
    "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "hira_dropout", "init_ia3_weights", "init_weights",
    "megatron_core", "qalora_group_size"}
HARMLESS_VALUES = {  # PiSSA, OLoRA, CorDA and LoftQ, as init_lora_weights, change the base
    "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}
OUTPUTS = {  # PEFT's name of the tensor that has a row for each output: its value for "no change"
    "lora_B.weight": 0.0, "ia3_l": 1.0, "hira_B": 0.0}


def peft_tensors(adapters):
    """{layer name: Adapter} -> {PEFT's name: tensor in PEFT's shape}, views except for FLoRA."""
    tensors = {}
    for name, a in adapters.items():
        key = f"base_model.model.{name}."
        if a.kind == "ia3":  # [1, in] scales the inputs, [out, 1] the outputs
            tensors[key + "ia3_l"] = a.l.data[None] if a.scales_input else a.l.data[:, None]
        elif a.kind == "lora":
            tensors[key + "lora_A.weight"] = a.B.data.T
            tensors[key + "lora_B.weight"] = a.A.data.T
        else:
            A, Bt = a.A.data, a.B.data.T
            if a.kind == "flora":
                A, Bt = hira_of_flora(A, a.B.data)
            tensors[key + "hira_A"], tensors[key + "hira_B"] = Bt, A.T
    return tensors


# ------------------------------------------------------------------------------------------- in


def read_config(folder):
    """A folder's adapter_config.json; BadInput, naming the key, for what an Adapter cannot hold."""
    file = os.path.join(folder, "adapter_config.json")
    config = read_json(file)
    if config.get("peft_type") not in list(KINDS):   # a list, since what is read may not be hashable
        raise BadInput(f"{file}: peft_type is {config.get('peft_type')!r}; "
                       "only LORA, IA3 and HIRA can be loaded")
    for key, value in config.items():
        if value and key not in HARMLESS_KEYS and value not in HARMLESS_VALUES.get(key, []):
            raise BadInput(f"{file}: {key} is {value!r}, which cannot be represented here; "
                           "train without it, or merge the adapter into the base in PEFT")
    alpha, modules = config.setdefault("lora_alpha", 8), config.get("target_modules")
    if not is_json(alpha, float):
        raise BadInput(f"{file}: lora_alpha is {alpha!r}; it must be a number")
    if not (isinstance(modules, list) and modules and all(isinstance(m, str) for m in modules)):
        raise BadInput(f"{file}: target_modules is {modules!r}; "
                       "it must list the names of projections")
    return config


def modules_named(model, modules, file):
    """Names of the layers that `modules`, PEFT's target_modules, stand for."""
    layers, named = [name for name, _ in adapter_layers(model)], set()
    for module in modules:
        found = [name for name in layers if f".{name}".endswith(f".{module}")]
        if not found:
            projections = sorted({name.split(".", 3)[-1] for name in layers})
            raise BadInput(f"{file}: target_modules names {module!r}, which is none of this "
                           f"model's projections: {', '.join(projections)}")
        named.update(found)
    return named


def load_peft(model, folder):
    """Add the LoRA, IA3 or HiRA of a PEFT folder, or the FLoRA that save_peft wrote as a HiRA;
    returns its id.

    PEFT records the base model's name alone, so that another base of the same shapes goes
    unnoticed. Raises BadInput, naming file and key, for what cannot be represented or does not fit.
    """
    config = read_config(folder)
    file = os.path.join(folder, "adapter_config.json")
    weights = os.path.join(folder, "adapter_model.safetensors")
    pickled = os.path.join(folder, "adapter_model.bin")
    if not os.path.isfile(weights) and os.path.isfile(pickled):
        raise BadInput(f"{pickled} is a pickle, which is not opened; load it in PEFT and save it "
                       "again as safetensors")
    named = modules_named(model, config["target_modules"], file)
    targets = [t for t, place in model.TARGETS.items() if model.columns(t) is None
               and any(name.endswith(f".{place}") for name in named)]
    kind, rank, alpha = KINDS[config["peft_type"]], config.get("r"), config["lora_alpha"]
    try:
        adapters = make_adapters(model, kind, rank, targets, alpha, device="meta")
    except BadInput as e:
        raise BadInput(f"{file}: {e}") from None
    for name in sorted(adapters.keys() - named):
        raise BadInput(f"{file}: target_modules leaves out {name} but not the same projection of "
                       "all other layers; an adapter here has all or none of them")
    if config.get("use_rslora"):  # alpha / sqrt(r) in the place of alpha / r
        for adapter in adapters.values():
            adapter.alpha = alpha * rank**0.5
    fill(model, adapters, peft_tensors, load_tensors(weights)[0], weights)
    return attach(model, floras(model, adapters, rank, targets) or adapters)


@torch.no_grad()
def floras(model, adapters, rank, targets):
    """{layer name: FLoRA} of HiRAs of `rank` that all were made from FLoRAs, otherwise None."""
    found = {name: flora_in_hira(a.A, a.B) for name, a in adapters.items() if a.kind == "hira"}
    if not found or None in found.values():
        return None
    made = make_adapters(model, "flora", rank - 1, targets)
    for name, (A, Bt) in found.items():
        made[name].A.copy_(A)
        made[name].B.copy_(Bt.T)
    return made


# ------------------------------------------------------------------------------------------ out


def save_peft(model, adapter_id, folder, base_name=None):
    """Write a LoRA, IA3, HiRA or FLoRA as a folder that PEFT opens, float32; FLoRA as a HiRA.

    base_name: the base model for PEFT to load, a folder or a name on the hub. An adapter of some of
    a projection's columns (c_attn.qk) is written over all of them, as zeros (LoRA) or ones outside.
    """
    adapters = adapters_of(model, adapter_id)
    kind = next(iter(adapters.values())).kind
    if kind not in PEFT_TYPES:
        raise BadInput(f"adapter {adapter_id} is of kind {kind}, which PEFT does not have; write "
                       "it into the base by flora.merge_adapter and save that by "
                       "GPT.save_pretrained")
    tensors = peft_tensors(adapters)
    for name, adapter in adapters.items():
        k, (lo, hi) = model.get_submodule(name).out_features, adapter.columns
        for end, value in OUTPUTS.items():
            key = f"base_model.model.{name}.{end}"
            if key in tensors and hi - lo < k:  # [hi - lo, r or 1] -> [k, r or 1]
                tensors[key] = F.pad(tensors[key], (0, 0, lo, k - hi), value=value)
    os.makedirs(folder, exist_ok=True)
    save_tensors({key: t.contiguous().cpu() for key, t in tensors.items()},
                 os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    write_json(os.path.join(folder, "adapter_config.json"),
               peft_config(model, adapters, base_name))


def peft_config(model, adapters, base_name):
    """The object of adapter_config.json for {layer name: Adapter}."""
    first = next(iter(adapters.values()))
    places = {name: model.TARGETS[a.target] for name, a in adapters.items()}
    config = dict(peft_type=PEFT_TYPES[first.kind], task_type="CAUSAL_LM",
                  base_model_name_or_path=base_name, inference_mode=True,
                  target_modules=list(dict.fromkeys(places.values())))
    if first.kind == "ia3":
        scaled_inputs = {places[name] for name, a in adapters.items() if a.scales_input}
        return config | dict(feedforward_modules=sorted(scaled_inputs))
    if first.kind == "lora":
        alpha = int(first.alpha) if first.alpha == int(first.alpha) else first.alpha
        return config | dict(r=first.rank, lora_alpha=alpha, bias="none")
    return config | dict(r=first.rank + (first.kind == "flora"))
