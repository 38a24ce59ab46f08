"""StarCoder (GPTBigCode): the transformer, its KV cache, its Hugging Face folder, its tokenizer.

A pre-norm decoder with learned positions, multi-query attention, a GELU MLP, biases everywhere and
a tied output embedding. The projections of each block are `flora.AdapterLinear`, so every row of a
batch may run its own adapter. Parameters carry Hugging Face's names. Other families subclass `GPT`
in extras/ (llama.py) and are found by their config.json's model_type.

Shapes: B batch, T tokens, S cached tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim.
"""
import contextlib
import hashlib
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from flora import (AdapterLinear, BadInput, check, check_weights, existing_file, extra, is_a,
                   load_tensors, open_file, open_output, read_json, save_tensors, stands, temporary,
                   write_json)


@dataclass
class GPTConfig:
    """Sizes, by the names of StarCoder's config.json. The defaults are its 15B model's."""
    vocab_size: int = 49152
    n_positions: int = 8192       # context length, in tokens
    n_embd: int = 6144
    n_layer: int = 40
    n_head: int = 48
    n_inner: int = 24576
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int | list = 0  # <|endoftext|>; or all the tokens that end a text
    activation_function: str = "gelu_pytorch_tanh"   # the 15B checkpoint says "gelu": the exact one

    # No fields: StarCoder has no choice here, other families do
    model_type = "gpt_bigcode"
    n_kv_head = 1                 # key/value heads, shared by all query heads
    tie_word_embeddings = True    # the output embedding is the input's

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.head_dim = self.n_embd // self.n_head


PRESETS = {
    "tiny_starcoder_py": GPTConfig(n_embd=768, n_layer=20, n_head=12, n_inner=3072),
    "starcoderbase-1b": GPTConfig(n_embd=2048, n_layer=24, n_head=16, n_inner=8192),
    "starcoderbase-3b": GPTConfig(n_embd=2816, n_layer=36, n_head=22, n_inner=11264),
    "starcoderbase-7b": GPTConfig(n_embd=4096, n_layer=42, n_head=32, n_inner=16384),
    "starcoder": GPTConfig(activation_function="gelu"),
    # 27 M parameters, to be compared with llama-cpu on a CPU (bench.py)
    "starcoder-cpu": GPTConfig(vocab_size=8192, n_positions=2048, n_embd=512, n_layer=8, n_head=8,
                               n_inner=2048),
}


def preset(name):
    """The GPTConfig of a published size: of PRESETS, or of another family's in extras/."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        return extra(name.split("-")[0], name).PRESETS[name]
    except (BadInput, AttributeError, KeyError):
        raise BadInput(f"--model {name}: unknown; use one of {', '.join(PRESETS)}, "
                       "or one of extras/llama.py's") from None


class Where(NamedTuple):
    """Where the tokens of one call stand in their rows: made once, the same for every layer."""
    index: tuple | None = None         # where the cache takes keys and values; None: its start
    mask: torch.Tensor | None = None   # [B, T, S], 0 where a token may look, or -inf; None: causal
    rope: tuple | None = None          # Llama's angles (extras/llama.py)


def attend(q, k, v, mask=None, flash=True):
    """Grouped-query attention: q [B, H, T, D] over k, v [B, K, S, D], H / K query heads to each key
    head (K = 1 is multi-query attention) -> [B, H, T, D].

    mask [B, T, S], in q's dtype: 0 where a query may look, otherwise -inf; None is causal, S = T.
    flash=False writes the scores out, as the paper's measurements did (no FlashAttention). All
    query heads of a key head are rows of one matmul: for one token on a CPU that is faster.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    mask = None if mask is None else mask[:, None]                            # [B, 1, T, S]
    if flash and not (T == 1 and q.device.type == "cpu"):
        k, v = (x[:, :, None].expand(B, K, H // K, -1, D) for x in (k, v))
        k, v = k.flatten(1, 2), v.flatten(1, 2)                               # [B, H, S, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.full((T, T), float("-inf"), device=q.device).triu(1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                                   # [B K, S, D]
    scores = (q.reshape(B * K, H // K * T, D) @ k.mT).view(B, H, T, -1)
    scores = torch.add(mask, scores.float(), alpha=D**-0.5)                   # [B, H, T, S]
    weights = scores.softmax(-1).to(q.dtype)
    return (weights.view(B * K, H // K * T, -1) @ v).view(B, H, T, D)


def cached_attention(q, kv, kv_cache, where, attend):
    """Attention of new tokens, q [B, T, H, D] and kv [B, T, 2, K, D], -> [B, T, H D].

    kv_cache [2, B, K, S, D] or None takes the new keys and values in place. Prefill (where.index
    None) attends among the new tokens; decoding to all that each row has cached so far. attend:
    the function of this name, or one like it.
    """
    B, T = q.shape[:2]
    if where.index is not None:
        kv_cache[where.index] = kv
        kv = kv_cache
    else:
        kv = kv.permute(2, 0, 3, 1, 4)                                        # [2, B, K, T, D]
        if kv_cache is not None:
            kv_cache[:, :, :, :T] = kv
    k, v = kv
    return attend(q.transpose(1, 2), k, v, where.mask).transpose(1, 2).reshape(B, T, -1)


def activation(config):
    """The activation of the MLP: GELU, exact or by tanh, or SiLU."""
    exact = {"gelu": F.gelu, "silu": F.silu}
    return exact.get(config.activation_function, partial(F.gelu, approximate="tanh"))


class Attention(nn.Module):
    """Multi-query attention. The rows of c_attn's weight are [query C | key D | value D]."""

    def __init__(self, config):
        super().__init__()
        C, self.head_dim, self.attend = config.n_embd, config.head_dim, attend
        self.c_attn = AdapterLinear(C, C + 2 * self.head_dim)
        self.c_proj = AdapterLinear(C, C)

    def forward(self, x, adapters, kv_cache, where):
        B, T, C = x.shape
        q, kv = self.c_attn(x, adapters).split([C, 2 * self.head_dim], dim=-1)
        q, kv = q.view(B, T, -1, self.head_dim), kv.view(B, T, 2, 1, self.head_dim)
        return self.c_proj(cached_attention(q, kv, kv_cache, where, self.attend), adapters)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = activation(config)
        self.c_fc = AdapterLinear(config.n_embd, config.n_inner)
        self.c_proj = AdapterLinear(config.n_inner, config.n_embd)

    def forward(self, x, adapters):
        return self.c_proj(self.activation(self.c_fc(x, adapters)), adapters)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, adapters, kv_cache, where):
        x = x + self.attn(self.ln_1(x), adapters, kv_cache, where)
        return x + self.mlp(self.ln_2(x), adapters)


class GPT(nn.Module):
    """StarCoder, by Hugging Face's names (`transformer.h.0.attn.c_attn.weight`)."""

    # What an adapter may be told about the family's projections
    TARGETS = {  # name for --targets: the projection of a block that it adapts
        "c_attn": "attn.c_attn",      # query, key and value, fused: what PEFT adapts in StarCoder
        "c_attn.qk": "attn.c_attn",   # its query and key columns alone: App. A
        "c_attn.k": "attn.c_attn",    # its key columns alone: IA3 in App. A
        "c_proj": "attn.c_proj",
        "c_fc": "mlp.c_fc",
        "mlp.c_proj": "mlp.c_proj",
    }
    DEFAULT_TARGETS = {"flora": ("c_attn",), "lora": ("c_attn",), "ia3": ("c_attn", "mlp.c_proj")}
    SCALES_INPUT = {"mlp.c_proj"}     # where PEFT's IA3 scales what goes in, not what comes out

    # Its config.json
    CONFIG = GPTConfig
    ARCHITECTURE = dict(architectures=["GPTBigCodeForCausalLM"],
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    KEYS = {}                         # {field of CONFIG: key of config.json}, where the two differ
    SUPPORTED = {  # {key of config.json: the values that are implemented, the default first}
        "multi_query": [True], "scale_attn_weights": [True], "tie_word_embeddings": [True],
        "activation_function": ["gelu_pytorch_tanh", "gelu"]}
    SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")   # above 0
    IGNORED = ("lm_head.weight",)     # tensors that a folder may hold: a copy of the tied embedding

    times_output = staticmethod(F.linear)   # (x, output embedding) -> logits

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False   # recompute each block in backward, to save memory
        self._fingerprint = None
        self.build(config)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:  # not the norms' gains; residual projections start smaller (GPT-2)
                last = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))
                depth = 2 * config.n_layer if last else 1
                nn.init.normal_(p, std=config.initializer_range / depth**0.5)

    def build(self, config):
        """Make the modules: what `wte`, `blocks`, `ln_f` and `output` name."""
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)))

    @property
    def wte(self):
        """The input embedding."""
        return self.transformer.wte

    @property
    def blocks(self):
        return self.transformer.h

    @property
    def ln_f(self):
        return self.transformer.ln_f

    @property
    def output(self):
        """The output embedding, tied to the input's."""
        return self.transformer.wte

    def columns(self, target):
        """The output columns [lo, hi) that a target stands for; None is all of them."""
        C, D = self.config.n_embd, self.config.head_dim
        return {"c_attn.qk": (0, C + D), "c_attn.k": (C, C + D)}.get(target)

    def embed(self, ids, positions):
        """ids [B, T] -> [B, T, C]. positions [B, T]; None is 0 .. T - 1."""
        wpe = self.transformer.wpe
        return self.wte(ids) + (wpe.weight[:ids.shape[1]] if positions is None else wpe(positions))

    def where(self, x, kv_cache, positions):
        """The Where of x [B, T, C] at positions [B, T]; without a cache or positions, prefill."""
        if positions is None or kv_cache is None:
            return Where()
        row, every = torch.arange(len(x), device=x.device)[:, None], slice(None)
        cached = torch.arange(kv_cache.shape[-2], device=x.device)            # [S]
        unseen = cached > positions[:, :, None]                               # [B, T, S]
        mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, float("-inf"))
        return Where((every, row, every, positions), mask)

    def hidden(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """All of `forward` but the output embedding -> [B, T, C]."""
        if ids.shape[1] > self.config.n_positions:
            raise BadInput(f"{ids.shape[1]} tokens are more than the model's context of "
                           f"{self.config.n_positions} (n_positions); "
                           "shorten or truncate the prompt")
        x = self.embed(ids, positions)                                        # [B, T, C]
        where = self.where(x, kv_cache, positions)
        for i, block in enumerate(self.blocks):
            layer_cache = None if kv_cache is None else kv_cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, adapter_ids, layer_cache, where, use_reentrant=False)
            else:
                x = block(x, adapter_ids, layer_cache, where)
        return self.ln_f(x)

    def logits(self, x):
        """x [..., C] from `hidden` -> logits [..., vocab_size], by the output embedding."""
        return self.times_output(x, self.output.weight)

    def forward(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """ids int64 [B, T] -> logits [B, T, vocab_size], in the model's dtype.

        adapter_ids: int64 [B] or [B, T], 0 for the base model; or flora.gather's; None is the base
        model for all. kv_cache: from `new_kv_cache`, written in place. Without `positions` it is
        filled from its start (prefill; pad shorter rows on the right, causality keeps the padding
        out of sight). With positions int64 [B, T], each row's tokens are written there and see
        what that row has cached up to them (decode).
        """
        return self.logits(self.hidden(ids, adapter_ids, kv_cache, positions))

    def new_kv_cache(self, batch, length):
        """An empty static cache for S = `length` tokens, [n_layer, 2, B, K, S, D], in the model's
        dtype."""
        c, weight = self.config, self.wte.weight
        return torch.zeros(c.n_layer, 2, batch, c.n_kv_head, length, c.head_dim,
                           dtype=weight.dtype, device=weight.device)

    def set_attention(self, flash):
        """Choose F.scaled_dot_product_attention (True) or plain math (False): see `attend`."""
        for attention in self.attentions():
            attention.attend = attend if flash else partial(attend, flash=False)

    def attentions(self):
        """The Attention of each block."""
        return [part for block in self.blocks for part in block.children()
                if isinstance(part, Attention)]

    def pack(self):
        """Serve with packed weights where that is faster (extras/packed.py); not for training."""
        try:
            extra("packed", "packing").pack(self)
        except BadInput:   # without extras/ the product stays plain
            pass

    def base_parameters(self):
        """{name: parameter} of the base model, adapters left out."""
        return {name: p for name, p in self.named_parameters() if ".adapters." not in name}

    @property
    def fingerprint(self):
        """16 hexadecimal digits that tell this base model from others, from a sample of its weights
        as they were stored (so a load in another dtype keeps it)."""
        if self._fingerprint is None:
            samples = {name: sample(p) for name, p in self.base_parameters().items()}
            self._fingerprint = fingerprint(samples)
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, value):
        self._fingerprint = value

    # ------------------------------------------------------------------ Hugging Face folders

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=torch.float32):
        """Load a Hugging Face folder of StarCoder's family, or of one in extras/: config.json and
        weights as safetensors or pytorch_model*.bin (never unpickled beyond tensors), in one file
        or in shards.

        Each tensor is read into place in `dtype`, so memory peaks near one copy of the model.
        Raises BadInput, naming the file or key, for what is missing, misshaped or not supported.
        """
        config = read_config(folder)
        shapes = {name: (file, tensor.shape) for file, name, tensor in stored_tensors(folder)}
        if config.n_layer > len(shapes):   # before as many layers are made
            raise BadInput(f"{folder}/config.json: n_layer is {config.n_layer}, but the weight "
                           f"files hold {len(shapes)} tensors")
        with torch.device("meta"):
            model = model_from_config(config)
        model.check_shapes(shapes, folder)
        model = model.to(dtype).to_empty(device=device)
        parameters, samples, output = model.base_parameters(), {}, None
        for file, name, tensor in stored_tensors(folder):
            if name in parameters:
                parameters[name].data.copy_(tensor)
                check_weights(name, tensor, file, parameters[name])
                samples[name] = sample(tensor)
            elif name.endswith("lm_head.weight"):
                output = tensor.to(device, dtype)
        if output is not None and not torch.equal(output, model.wte.weight):
            raise BadInput(f"{folder}: lm_head.weight differs from the embedding, to which "
                           "config.json ties it (tie_word_embeddings); its values would be lost")
        model.fingerprint = fingerprint(samples)
        return model

    def check_shapes(self, shapes, folder):
        """BadInput unless {name: (file, shape)} of a folder's tensors are the parameters of this
        model."""
        parameters = self.base_parameters()
        for name, (file, shape) in shapes.items():
            if name not in parameters and not name.endswith(self.IGNORED):
                raise BadInput(f"{file}: unexpected tensor {name}; the model of "
                               f"{folder}/config.json has no such parameter")
            if name in parameters and parameters[name].shape != shape:
                raise BadInput(f"{file}: {name} has shape {list(shape)}, but config.json "
                               f"needs {list(parameters[name].shape)}")
        missing = sorted(parameters.keys() - shapes.keys())
        if missing:
            raise BadInput(f"{folder}: tensor {missing[0]} is missing from the weight files"
                           + (f", and {len(missing) - 1} more" if missing[1:] else ""))

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors that Hugging Face transformers opens.

        dtype: the stored one (None keeps the model's). Adapters are not written: merge one first,
        or use flora.save_adapter.
        """
        os.makedirs(folder, exist_ok=True)
        tensors = {name: p.detach().to(dtype or p.dtype).contiguous().cpu()
                   for name, p in self.base_parameters().items()}
        save_tensors(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        config = self.config_json(dtype or self.wte.weight.dtype)
        write_json(os.path.join(folder, "config.json"), config)

    @classmethod
    def parse_config(cls, values, file):
        """The object of a config.json -> CONFIG; BadInput names the key that is not supported."""
        for key, supported in cls.SUPPORTED.items():
            check_supported(file, key, values.get(key, supported[0]), supported)
        kinds = {field.name: field.type for field in fields(cls.CONFIG)}
        keys = {name: cls.KEYS.get(name, name) for name in kinds}
        found = {name: values[key] for name, key in keys.items() if values.get(key) is not None}
        for name, value in found.items():
            if name not in cls.SIZES and kinds[name] in (int, float, str, bool):
                check(value, kinds[name], file, keys[name])
        found = cls.complete_config(found, values, file)
        for name in cls.SIZES:
            if not is_a(found.get(name), int) or not 1 <= found[name] <= LARGEST:
                raise BadInput(f"{file}: {keys[name]} is {found.get(name)!r}, "
                               "but must be a positive whole number")
        ends = read_ends(values, file)
        if ends:
            found["eos_token_id"] = ends if isinstance(values["eos_token_id"], list) else ends[0]
        config = cls.CONFIG(**found)
        if config.layer_norm_epsilon < 0:
            raise BadInput(f"{file}: {keys['layer_norm_epsilon']} is {config.layer_norm_epsilon}, "
                           "but must not be negative")
        return config

    @classmethod
    def complete_config(cls, found, values, file):
        """The fields `found` in a config.json with those that follow from others."""
        if "n_inner" not in found and isinstance(found.get("n_embd"), int):
            found["n_inner"] = 4 * found["n_embd"]
        return found

    def config_json(self, dtype):
        """config.json's object, for transformers 4 and 5 and for parse_config."""
        defaults = {key: supported[0] for key, supported in self.SUPPORTED.items()}
        sizes = {self.KEYS.get(name, name): value for name, value in asdict(self.config).items()}
        return (dict(model_type=self.config.model_type) | defaults | sizes | self.ARCHITECTURE
                | dict(torch_dtype=str(dtype).removeprefix("torch.")))


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


def check_supported(file, key, value, supported):
    if value not in supported:
        raise BadInput(f"{file}: {key} is {value!r}, but only "
                       f"{' or '.join(map(repr, supported))} is supported")


def model_class(model_type):
    """The model of a config.json's model_type: GPT, or the MODEL of extras/MODEL_TYPE.py."""
    if model_type == GPT.CONFIG.model_type:
        return GPT
    unknown = BadInput(f"model_type is {model_type!r}, but only 'gpt_bigcode' or a family that "
                       f"extras/ holds is supported (there is no extras/{model_type}.py for it)")
    if not (isinstance(model_type, str) and model_type.isidentifier()):
        raise unknown
    try:
        return extra(model_type, model_type).MODEL
    except (BadInput, AttributeError):
        raise unknown from None


def model_from_config(config):
    """A model of random weights, of the class that the config's family has."""
    return model_class(config.model_type)(config)


def read_config(folder):
    """The config of a Hugging Face folder; BadInput names the key that is not supported."""
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such model folder")
    file = os.path.join(folder, "config.json")
    values = read_json(file)
    try:
        family = model_class(values.get("model_type"))
    except BadInput as e:
        raise BadInput(f"{file}: {e}") from None
    return family.parse_config(values, file)


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


def base_digest(folder):
    """The digest of all that makes up a base model: its weights, config and tokenizer."""
    beside = [os.path.join(folder, name) for name in ("config.json", *TOKENIZER_FILES)]
    return digest_files([*weight_files(folder), *filter(os.path.isfile, beside)])


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


# -------------------------------------------------------------------------------------- tokenizers

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>")


# What makes up a tokenizer, and what goes with it into a merged folder. generation_config.json
# comes along because it says which tokens end a text.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "chat_template.jinja", "chat_template.json", "generation_config.json")


class JsonTokenizer:
    """tokenizer.json, by `tokenizers`."""

    def __init__(self, file):
        from tokenizers import Tokenizer as HFTokenizer
        self.hf = HFTokenizer.from_file(file)
        self.hf.no_truncation()   # a file may hold either, left there by a training script
        self.hf.no_padding()
        self.vocab_size = self.hf.get_vocab_size()
        marked, plain = self.hf.encode("a").ids, self.encode("a")
        self.bos_id = None if marked[:1] == plain[:1] else marked[0]

    def token_id(self, token):
        return self.hf.token_to_id(token)

    def encode(self, text):
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=False)


class PieceTokenizer:
    """tokenizer.model, by `sentencepiece`, with the added_tokens.json beside it."""

    def __init__(self, file):
        from sentencepiece import SentencePieceProcessor
        with open(file, "rb") as f:
            proto = f.read()
        self.whole = SentencePieceProcessor(model_proto=proto)   # Llama's puts a space before
        self.prefix = " " if self.whole.normalize("a").startswith("▁") else ""
        # One that does not, for what goes on from a text: a field after the protobuf's end,
        # normalizer_spec.add_dummy_prefix = 0, overrides
        self.sp = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        self.bos_id = None if self.sp.bos_id() < 0 else self.sp.bos_id()
        self.added = read_added_tokens(os.path.dirname(file))         # {text: id}
        self.texts = {i: text for text, i in self.added.items()}
        self.vocab_size = max([self.sp.vocab_size() - 1, *self.texts]) + 1

    def token_id(self, token):
        if token in self.added:
            return self.added[token]
        i = self.sp.piece_to_id(token)
        return None if i == self.sp.unk_id() else i

    def encode(self, text):
        longest_first = sorted(self.added, key=len, reverse=True)
        split = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")   # (?!): nowhere
        ids, start = [], 0
        for found in split.finditer(text):
            ids += self.encode_pieces(text[start:found.start()]) + [self.added[found.group()]]
            start = found.end()
        return ids + self.encode_pieces(text[start:])

    def encode_pieces(self, text):
        if not text:
            return []
        # sentencepiece writes a space as ▁, so that a ▁ of the text must go in as its UTF-8 bytes
        low_line = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        first, *rest = text.split("▁")
        ids = self.whole.encode(first) if first else self.sp.encode(self.prefix)
        return ids + [i for part in rest for i in low_line + self.sp.encode(part)]

    def decode(self, ids):
        """Ids without a text, of padding in the embedding, are left out."""
        text, run = "", []
        for i in ids:
            if i in self.texts:
                text, run = text + self.decode_pieces(run) + self.texts[i], []
            elif i < self.sp.vocab_size():
                run.append(i)
        return text + self.decode_pieces(run)

    def decode_pieces(self, ids):
        return self.sp.decode(ids).removeprefix(self.prefix)


def read_added_tokens(folder):
    """{text: id} of the tokens that a folder adds to its tokenizer.model's."""
    file = os.path.join(folder, "added_tokens.json")
    added = read_json(file) if os.path.exists(file) else {}
    config = os.path.join(folder, "tokenizer_config.json")
    decoder = read_json(config).get("added_tokens_decoder") if os.path.exists(config) else None
    check(list(added.values()), [int], file, "an id")
    for i, token in (decoder if isinstance(decoder, dict) else {}).items():
        check(token, {"content": str}, config, "added_tokens_decoder")
        if i.isdigit() and token.get("special") is not True:   # special ones are the model's own
            added.setdefault(token["content"], int(i))
    return added


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, or tokenizer.model (the embedded model's,
    Llama 2's). decode(encode(text)) == text, but for the character ▁ (U+2581) in a tokenizer.json
    of Llama 2's kind, which takes it for a space.

    eos_ids: what ends a text: the eos_token_id, one or several, of generation_config.json, or of
    config.json, or the first of EOS_TOKENS that it has. eos_id: the first of them.
    bos_id: what the family's own tokenizer puts before a text (<s> of Llama), or None.
    fim_ids: the ids of FIM_TOKENS, or None.
    """

    def __init__(self, folder):
        self.folder = folder
        names = ("tokenizer.json", "tokenizer.model")
        files = [file for file in (os.path.join(folder, name) for name in names)
                 if os.path.exists(file)]
        if not files:
            raise BadInput(f"{folder}: holds neither tokenizer.json nor tokenizer.model")
        file = existing_file(files[0])
        try:
            self.backend = (JsonTokenizer if file.endswith(".json") else PieceTokenizer)(file)
        except BadInput:
            raise
        except Exception as e:  # tokenizers raises plain Exception
            raise BadInput(f"{file}: not a readable tokenizer ({e})") from e
        self.vocab_size, self.bos_id = self.backend.vocab_size, self.backend.bos_id
        self.token_id = self.backend.token_id   # (text of a token) -> its id, or None
        self.limit, self.eos_ids = self.read_configs()
        self.eos_id = self.eos_ids[0]
        fim_ids = [self.token_id(token) for token in FIM_TOKENS]
        self.fim_ids = None if None in fim_ids else fim_ids

    def read_configs(self):
        """-> (how many token ids the folder's model has, or None; eos_ids)."""
        ends, limit = [], None
        for name in ("generation_config.json", "config.json"):
            file = os.path.join(self.folder, name)
            values = read_json(file) if os.path.exists(file) else {}
            ends = ends or read_ends(values, file)
            limit = values.get("vocab_size")
        ends = ends or [i for i in map(self.token_id, EOS_TOKENS) if i is not None][:1]
        if not ends:
            raise BadInput(f"{self.folder}: its tokenizer has none of {', '.join(EOS_TOKENS)}, "
                           "and config.json no eos_token_id")
        limit = limit if is_a(limit, int) else None
        if limit is not None and max(ends) >= limit:
            raise BadInput(f"{self.folder}: eos_token_id is {max(ends)}, outside of the model's "
                           f"vocabulary of {limit}")
        return limit, ends

    def encode(self, text, bos=False):
        """text -> list of ids. No special token is added, but with bos=True the bos_id, if any.
        BadInput for text that is not Unicode, or has a token that the model does not have."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput(f"a text holds half of a surrogate pair ({ascii(text[:40])}), which is "
                           "not Unicode; write the character in full")
        ids = self.backend.encode(text)
        if self.limit is not None and ids and max(ids) >= self.limit:
            raise BadInput(f"a text has token id {max(ids)}, but the model of {self.folder} has "
                           f"ids 0 to {self.limit - 1}; encode it with this model's tokenizer")
        return ids if not bos or self.bos_id is None else [self.bos_id, *ids]

    def decode(self, ids, continues=False):
        """list of ids -> text; bytes that are not UTF-8 become U+FFFD. continues: the ids go on
        from a text (a prompt), so that a space at their start is part of the text."""
        if not continues:
            return self.backend.decode(list(ids))
        start = self.backend.encode("x")
        return self.backend.decode(start + list(ids))[len(self.backend.decode(start)):]

    def save(self, folder):
        """Copy the tokenizer, and which tokens end a text, into another model folder, in the place
        of any that is there."""
        if os.path.exists(folder) and os.path.samefile(self.folder, folder):
            return
        for name in TOKENIZER_FILES:
            source, target = (os.path.join(place, name) for place in (self.folder, folder))
            if os.path.isfile(source):
                with open(source, "rb") as read, open_output(target) as write:
                    shutil.copyfileobj(read, write)
            elif os.path.isfile(target):
                os.remove(target)


# ------------------------------------------------------------------------- what every script shares

EMBEDDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "base")


LARGEST = 2**31 - 1   # value of any flag


def add_common_flags(parser, dtypes):
    """The flags that mean the same in every script."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--weights", metavar="FOLDER", default=EMBEDDED,
                        help="base model, a Hugging Face folder (default: the embedded one)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32",
                        help="auto: the fastest here, if the script has it; "
                             "default: bfloat16 on cuda, otherwise float32")
    parser.add_argument("--quantize", choices=["int8", "int8-dynamic"],
                        help="hold the base's projections as int8, a scale per output; dynamic: on "
                             "an x86 CPU round what goes in as well, which is faster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def check_numbers(args, at_least_1=(), at_least_0=(), above_0=()):
    """BadInput unless the flags of these names are in range; one that was not given (None) is."""
    for flag in (*at_least_1, *at_least_0, *above_0):
        value = getattr(args, flag)
        for v in value if isinstance(value, list) else [value]:
            least = 1 if flag in at_least_1 else 0
            if v is None or least <= v <= LARGEST and not (v == 0 and flag in above_0):
                continue
            number = "whole number" if isinstance(v, int) else "number"
            range = "above 0" if flag in above_0 else f"of at least {least}"
            range = f"of at most {LARGEST}" if v > LARGEST else range
            raise BadInput(f"--{flag.replace('_', '-')} is {v}; use a {number} {range}")


def get_dtype(args):
    """--dtype as torch's. In the place of "auto" args keeps what extras/packed.py chose."""
    if args.dtype == "auto":
        packed = extra("packed", "--dtype auto")
        args.dtype, why = packed.choose_dtype(get_device(args.device))
        print(f"--dtype auto: {args.dtype}, {why}", file=sys.stderr)
    return getattr(torch, args.dtype)


def get_device(name):
    """"cpu", "cuda", "cuda:1" -> torch.device; BadInput where this machine has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"--device {name}: not usable here ({str(e).splitlines()[0]})") from None
    return torch.device(name)


def save_figure(figure, file, dpi=130):
    """Write a matplotlib figure as PNG."""
    figure.tight_layout()
    with open_output(file) as f:
        figure.savefig(f, format="png", dpi=dpi)


# Outputs: found out before the work, written after it, by one process at a time

JSON, PNG = (b"{", b"["), (b"\x89PNG",)   # how such files begin


def check_writable(file, flag, begins=None, make_folder=False):
    """BadInput, before the work, if `file`, which `flag` names, could not be written after it: for
    want of a folder, a permission or room for a small file, or because what is there is not of the
    kind that would replace it (`begins`: JSON or PNG). Nothing for None."""
    if file is None:
        return
    target, held = os.path.realpath(file), b""
    try:
        if os.path.isdir(target) or not os.path.basename(file):
            raise BadInput(f"{flag} {file}: is a folder; name a file")
        if stands(file):
            return
        if make_folder:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.exists(target):
            with open(target, "r+b") as f:
                held = f.read(64).lstrip()
        with temporary(target) as f:
            f.write(bytes(4096))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise BadInput(f"{flag} {file}: cannot be written ({e.strerror})") from None
    if begins and held and not held.startswith(begins):
        raise BadInput(f"{flag} {file}: holds something else than this writes; move it away, or "
                       f"choose another {flag}")


def write_each(*writes):
    """Call all of these functions, also after one that raises BadInput, which is raised last."""
    failed = []
    for write in writes:
        try:
            write()
        except BadInput as e:
            failed.append(str(e))
    if failed:
        raise BadInput("; ".join(failed))


@contextlib.contextmanager
def locked(path, flag):
    """Inside, this process alone writes `path`, a folder or a file; BadInput if another one does.
    The lock dies with its process. flag names the path."""
    import fcntl   # POSIX
    folder, mine = os.path.isdir(path), False
    if stands(path) and not folder:
        yield
        return
    path = os.path.realpath(path)
    lock = path
    if not folder:
        lock = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")
    try:
        handle = os.open(lock, os.O_RDONLY | (0 if folder else os.O_CREAT), 0o666)
    except OSError as e:
        raise BadInput(f"{flag} {path}: cannot be written ({e.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.stat(lock), os.fstat(handle))   # not removed meanwhile
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:   # a file system without locks
            mine = True
        if not mine:
            raise BadInput(f"{flag} {path}: another process is writing there; wait for its end, or "
                           f"choose another {flag}")
        yield
    finally:
        if mine and not folder:
            os.unlink(lock)
        os.close(handle)


# Identity is content, not a name


def digest(*parts):
    """16 hexadecimal digits for texts or bytes, in this order: others have others."""
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
                return f"{CONTENT[name]} (fingerprint {made[name]}, not {value})"
            return f"--{name.replace('_', '-')} {made[name]}, not {value}"
    return None


def provenance(device="cpu"):
    """What every file of results begins with: what made the figures, and on what."""
    return dict(run=describe_run(), machine=describe_machine(torch.device(device)))


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


def run_main(main):
    """Run a script's main(): bad input is one sentence and exit status 2, Ctrl-C is status 130, and
    a reader of the output that goes away, as head does, is status 141."""
    try:
        main()
    except BadInput as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for Python's last flush
        sys.exit(141)
