"""What made a result, and on what: the command, the commit, the machine, the inputs.

A base, an adapter or data are identified by a digest of their content, not by a name.
"""
import hashlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time

import torch

from plumbing.adapter_files import load_tensors
from plumbing.files import open_file
from plumbing.folders import weight_files
from plumbing.tokenizer import TOKENIZER_FILES


def provenance(device="cpu"):
    """What every file of results begins with: what made the figures, and on what."""
    return dict(run=describe_run(), machine=describe_machine(torch.device(device)))


def describe_run():
    """The command, the commit of the code, and the day."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:   # no git
        commit = ""
    return dict(command=shlex.join(["python", *sys.orig_argv[1:]]), commit=commit or None,
                date=time.strftime("%Y-%m-%d"))


def describe_machine(device):
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        cpu = names[0] if names else cpu
    on_gpu = device.type == "cuda"
    return dict(cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version(),
                gpu=torch.cuda.get_device_name(device) if on_gpu else None,
                cuda=torch.version.cuda if on_gpu else None)


def digest(*parts):
    """16 hexadecimal digits for texts or bytes in this order; different inputs give others."""
    total = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]


def digest_files(files):
    """The digest of several files' names and contents."""
    sums = []
    for file in files:
        content = hashlib.sha256()
        with open_file(file, "rb") as f:
            while chunk := f.read(1 << 22):
                content.update(chunk)
        sums += [os.path.basename(file), content.digest()]
    return digest(*sums)


def base_digest(folder):
    """The digest of all that makes up a base model: its weights, config and tokenizer."""
    beside = [os.path.join(folder, name) for name in ("config.json", *TOKENIZER_FILES)]
    return digest_files([*weight_files(folder), *filter(os.path.isfile, beside)])


def adapter_digest(name):
    """The digest of what an adapter file or PEFT folder computes; None for "none", the base."""
    if name == "none":
        return None
    if os.path.isdir(name):
        inside = [os.path.join(name, file) for file in sorted(os.listdir(name))]
        return digest_files(f for f in inside if f.endswith((".json", ".safetensors")))
    tensors, metadata = load_tensors(name)
    metadata = {key: value for key, value in (metadata or {}).items() if key != "training"}
    parts = [json.dumps(metadata, sort_keys=True)]
    for key in sorted(tensors):
        tensor = tensors[key].contiguous().reshape(-1)
        parts += [key, f"{tensors[key].dtype} {list(tensors[key].shape)}",
                  tensor.view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


CONTENT = {   # settings that are digests: what a difference means
    "base": "another base model", "data": "other data", "adapter_file": "another adapter",
    "lora": "another LoRA", "problems": "other problems"}


def difference(made, now):
    """In what the settings with which something was `made` differ from those of `now`, as words
    that follow "was made with"; None if in nothing. What `made` lacks is not compared."""
    for name, value in now.items():
        if name in made and made[name] != value:
            if name in CONTENT:
                return f"{CONTENT[name]} (fingerprint {shown(made[name])}, not {shown(value)})"
            return f"--{name.replace('_', '-')} {shown(made[name])}, not {shown(value)}"
    return None


def shown(value):
    """A value in a sentence, which a damaged file must not make endless."""
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def peak_memory(device):
    """Bytes: the GPU's peak allocation, or this process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
