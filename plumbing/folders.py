"""Hugging Face folders, in and out: config.json and the files of weights.

Weights are read as safetensors or pytorch_model*.bin (never unpickled beyond tensors), in one file
or in shards, each tensor into its place, so that memory peaks near one copy of the model. What is
missing, misshaped or not supported is refused, naming the file or key.
"""
import os
import pickle
import zipfile
from dataclasses import asdict, fields

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from plumbing.files import (BadInput, check_json, check_weights, existing_file, existing_folder,
                            is_json, read_json, warn_once)
from plumbing.fingerprint import digests_of, sample
from plumbing.outputs import save_tensors, write_json

LARGEST = 2**31 - 1   # value of any size


class StarCoderFolder:
    """How a folder holds a StarCoder. Other families subclass it."""
    ARCHITECTURE = dict(architectures=["GPTBigCodeForCausalLM"],
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    KEYS = {}                    # {field of the config: key of config.json}, where the two differ
    SUPPORTED = {  # {key of config.json: the values that are implemented, the default first}
        "multi_query": [True], "scale_attn_weights": [True], "tie_word_embeddings": [True],
        "activation_function": ["gelu_pytorch_tanh", "gelu"]}
    SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")   # above 0
    TIED = "lm_head.weight"      # a copy of the tied embedding, which a folder may hold
    IGNORED = ()                 # other tensors that it may hold

    @classmethod
    def parse(cls, values, file, config_class):
        """The object of a config.json -> config_class; BadInput names the key not supported."""
        for key, supported in cls.SUPPORTED.items():
            check_supported(file, key, values.get(key, supported[0]), supported)
        kinds = {field.name: field.type for field in fields(config_class)}
        keys = {name: cls.KEYS.get(name, name) for name in kinds}
        found = {name: values[key] for name, key in keys.items() if values.get(key) is not None}
        for name, value in found.items():
            if name not in cls.SIZES and kinds[name] in (int, float, str, bool):
                check_json(value, kinds[name], file, keys[name])
        found = cls.complete(found, values, file)
        for name in cls.SIZES:
            if not is_json(found.get(name), int) or not 1 <= found[name] <= LARGEST:
                raise BadInput(f"{file}: {keys[name]} is {found.get(name)!r}, "
                               "but must be a positive whole number")
        ends = read_ends(values, file, found["vocab_size"])
        if ends:   # otherwise, where none can come, what the file says stays
            found["eos_token_id"] = ends if isinstance(values["eos_token_id"], list) else ends[0]
        config = config_class(**found)
        for name in ("layer_norm_epsilon", "initializer_range"):
            if getattr(config, name) < 0:
                raise BadInput(f"{file}: {keys[name]} is {getattr(config, name)}, "
                               "but must not be negative")
        return config

    @classmethod
    def complete(cls, found, values, file):
        """The fields `found` in a config.json with those that follow from others."""
        if "n_inner" not in found and isinstance(found.get("n_embd"), int):
            found["n_inner"] = 4 * found["n_embd"]
        return found

    @classmethod
    def to_json(cls, config, dtype):
        """config.json's object, for transformers 4 and 5 and for parse."""
        defaults = {key: supported[0] for key, supported in cls.SUPPORTED.items()}
        sizes = {cls.KEYS.get(name, name): value for name, value in asdict(config).items()}
        return (dict(model_type=config.model_type) | defaults | sizes | cls.ARCHITECTURE
                | dict(torch_dtype=str(dtype).removeprefix("torch.")))


def read_config(folder, model_class):
    """The config of a folder. model_class: from a model_type to the class of its models."""
    file = os.path.join(existing_folder(folder), "config.json")
    values = read_json(file, {"model_type?": str})
    try:
        family = model_class(values.get("model_type"))
    except BadInput as e:
        raise BadInput(f"{file}: {e}") from None
    return family.FOLDER.parse(values, file, family.CONFIG)


def load(folder, config, make_model, device, dtype):
    """The model of a folder. make_model: from a config to a model of random weights."""
    shapes = {name: (file, tensor.shape) for file, name, tensor in stored_tensors(folder)}
    if config.n_layer > len(shapes):   # before as many layers are made
        raise BadInput(f"{folder}/config.json: n_layer is {config.n_layer}, but the weight "
                       f"files hold {len(shapes)} tensors")
    with torch.device("meta"), Unfilled():
        model = make_model(config)
    check_shapes(model, shapes, folder)
    model = model.to(dtype).to_empty(device=device)
    parameters, samples, output = model.base_parameters(), {}, None
    for file, name, tensor in stored_tensors(folder):
        if name in parameters:
            parameters[name].data.copy_(tensor)
            check_weights(name, tensor, file, parameters[name])
            samples[name] = sample(tensor)
        elif name.endswith(model.FOLDER.TIED):
            output = tensor.to(device, dtype)
    if output is not None and not torch.equal(output, model.wte.weight):
        raise BadInput(f"{folder}: {model.FOLDER.TIED} differs from the embedding, to which "
                       "config.json ties it (tie_word_embeddings); its values would be lost")
    model.fingerprints = digests_of(samples)
    return model


class Unfilled(TorchFunctionMode):
    """Inside, torch.nn.init fills nothing: on the meta device it would import torch's compiler
    first, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def check_shapes(model, shapes, folder):
    """BadInput unless {name: (file, shape)} of a folder's tensors are the model's parameters."""
    parameters, ignored = model.base_parameters(), (model.FOLDER.TIED, *model.FOLDER.IGNORED)
    for name, (file, shape) in shapes.items():
        if name not in parameters and not name.endswith(ignored):
            raise BadInput(f"{file}: unexpected tensor {name}; the model of "
                           f"{folder}/config.json has no such parameter")
        if name in parameters and parameters[name].shape != shape:
            raise BadInput(f"{file}: {name} has shape {list(shape)}, but config.json "
                           f"needs {list(parameters[name].shape)}")
    missing = sorted(parameters.keys() - shapes.keys())
    if missing:
        raise BadInput(f"{folder}: tensor {missing[0]} is missing from the weight files"
                       + (f", and {len(missing) - 1} more" if missing[1:] else ""))


def save(model, folder, dtype):
    """Write config.json and model.safetensors, in `dtype` or (None) the model's."""
    if not all(p.is_floating_point() for p in model.base_parameters().values()):
        raise BadInput("an int8 base has no weights to save; load it without --quantize")
    os.makedirs(folder, exist_ok=True)
    tensors = {name: p.detach().to(dtype or p.dtype).contiguous().cpu()
               for name, p in model.base_parameters().items()}
    save_tensors(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    config = model.FOLDER.to_json(model.config, dtype or model.wte.weight.dtype)
    write_json(os.path.join(folder, "config.json"), config)


def read_ends(values, file, vocab_size=None):
    """The token ids that end a text, by the object of a config.json or generation_config.json. One
    outside of the vocabulary, as transformers writes for small random models, ends none."""
    ends = values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    ends = [i for i in ends if i is not None]
    check_json(ends, [int], file, "eos_token_id")
    if min(ends, default=0) < 0:
        raise BadInput(f"{file}: eos_token_id is {min(ends)}, which is no token")
    outside = [i for i in ends if vocab_size is not None and i >= vocab_size]
    for i in outside:
        warn_once(f"{os.path.dirname(file)}: eos_token_id {i} is outside of the vocabulary of "
                  f"{vocab_size}, so it ends no text")
    return [i for i in ends if i not in outside]


def check_supported(file, key, value, supported):
    if value not in supported:
        raise BadInput(f"{file}: {key} is {value!r}, but only "
                       f"{' or '.join(map(repr, supported))} is supported")


def weight_files(folder):
    """{file: the names of its tensors that count, None for all} of a folder: one file, or the
    shards of an index. A tensor that lies in two shards counts where the index says."""
    existing_folder(folder)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        file, index = os.path.join(folder, stem), os.path.join(folder, f"{stem}.index.json")
        if os.path.exists(file):
            return {existing_file(file): None}
        if os.path.exists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index}: has no weight_map; download it again")
            check_json(list(weight_map.values()), [str], index, "weight_map")
            return read_shards(folder, index, weight_map)
    raise BadInput(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, "
                   "nor an index of shards")


def read_shards(folder, index, weight_map):
    shards = {}
    for name, shard in weight_map.items():
        path = os.path.normpath(shard)
        if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
            raise BadInput(f"{index}: names the shard {shard!r}, which is not in this folder; "
                           "download it again")
        shards.setdefault(os.path.join(folder, path), set()).add(name)
    for shard in shards:
        if not os.path.isfile(shard):
            raise BadInput(f"{shard}: this shard, named in {index}, is missing; download it again")
    return {existing_file(shard): shards[shard] for shard in sorted(shards)}


def stored_tensors(folder):
    """Yield (file, name, CPU tensor) for every tensor of a folder, one at a time, mapped from
    disk."""
    files = weight_files(folder)
    mapped = set().union(*(names for names in files.values() if names))
    for file, names in files.items():
        for name, tensor in tensors_in(file):
            if not isinstance(tensor, torch.Tensor):
                raise BadInput(f"{file}: {name} is not a tensor; it is not a weight file")
            if names is None or name in names or name not in mapped:
                yield file, name, tensor


def tensors_in(file):
    """Yield (name, CPU tensor) of one file of weights, .safetensors or .bin."""
    try:
        if file.endswith(".bin"):
            mmap = zipfile.is_zipfile(file)  # files of torch before 1.6 are not zip archives
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            yield from tensors.items()
        else:
            with safe_open(file, "pt") as f:
                yield from ((name, f.get_tensor(name)) for name in f.keys())
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
            KeyError, TypeError, AttributeError) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        if isinstance(e, pickle.UnpicklingError):   # whose message advises to unpickle anything
            reason = "it is damaged, or holds more than tensors"
        raise BadInput(f"{file}: truncated or not a weight file ({reason}); "
                       "download it again") from e
