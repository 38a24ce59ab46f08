"""Hugging Face folders: which files hold the weights, and what stands in them."""
import hashlib
import os
import pickle
import zipfile

import torch
from safetensors import SafetensorError, safe_open

from plumbing.files import BadInput, check, existing_file, is_a, read_json


def check_supported(file, key, value, supported):
    if value not in supported:
        raise BadInput(f"{file}: {key} is {value!r}, but only "
                       f"{' or '.join(map(repr, supported))} is supported")


def read_ends(values, file):
    """The token ids that end a text, by the object of a config.json or generation_config.json."""
    ends = values.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    ends = [i for i in ends if i is not None]
    check(ends, [int], file, "eos_token_id")
    vocab_size = values.get("vocab_size")
    for i in ends:
        if i < 0 or is_a(vocab_size, int) and i >= vocab_size:
            raise BadInput(f"{file}: eos_token_id is {i}, outside of the vocabulary of "
                           f"{vocab_size}")
    return ends


def weight_files(folder):
    """{file: the names of its tensors that count, None for all} of a folder: one file, or the
    shards of an index. A tensor that lies in two shards counts where the index says."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        file, index = os.path.join(folder, stem), os.path.join(folder, f"{stem}.index.json")
        if os.path.exists(file):
            return {existing_file(file): None}
        if os.path.exists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index}: has no weight_map; download it again")
            check(list(weight_map.values()), [str], index, "weight_map")
            return read_shards(folder, index, weight_map)
    raise BadInput(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, "
                   "nor an index of shards")


def read_shards(folder, index, weight_map):
    shards = {}
    for name, shard in weight_map.items():
        shards.setdefault(os.path.join(folder, os.path.basename(shard)), set()).add(name)
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


def sample(tensor):
    """64 values spread over a tensor, as float32 bytes with its shape."""
    flat = tensor.detach().reshape(-1)
    picked = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()]
    return str(list(tensor.shape)).encode() + picked.float().cpu().numpy().tobytes()


def fingerprint(samples):
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:16]
