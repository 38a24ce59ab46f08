"""StarCoder (GPTBigCode) and Llama in one file: the transformer, its KV cache, Hugging Face folders, tokenizers.

One pre-norm decoder with a few choices, all made by `GPTConfig.model_type`:

                  gpt_bigcode (StarCoder)                llama
  norm            LayerNorm                              RMSNorm
  positions       learned, added to the embedding        rotary (RoPE), of query and key
  attention       c_attn: query, one key, one value      q_proj, k_proj, v_proj: n_kv_head keys and values
  MLP             c_proj(gelu(c_fc x))                   down_proj(silu(gate_proj x) ∘ up_proj x), SwiGLU
  biases          everywhere                             none
  output          tied to the input embedding            tied or not

The projections of each block are `flora.AdapterLinear`, so every row of a batch may run its own
adapter. Parameters carry the names that Hugging Face gives them in either family.

Shapes: B batch, T tokens, S cached tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim.
"""
import hashlib
import math
import os
import pickle
import shutil
import sys
import zipfile
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from flora import (AdapterLinear, BadInput, PackedCopies, adapter_layers, matmul, packed_columns, read_json,
                   save_tensors, write_json)


@dataclass
class GPTConfig:
    """Sizes, by the names of StarCoder's config.json. The defaults are StarCoder's, 15B parameters."""
    vocab_size: int = 49152
    n_positions: int = 8192       # context length, in tokens
    n_embd: int = 6144
    n_layer: int = 40
    n_head: int = 48
    n_inner: int = 24576
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int = 0         # <|endoftext|>
    activation_function: str = "gelu_pytorch_tanh"   # the 15B checkpoint says "gelu": the exact one
    model_type: str = "gpt_bigcode"      # or "llama"
    bos_token_id: int = 0
    n_kv_head: int = 1                   # key/value heads, each shared by n_head / n_kv_head query heads
    head_dim: int | None = None          # None is n_embd / n_head
    tie_word_embeddings: bool = True     # the output embedding is the input's
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None     # as in config.json: rope_type (linear or llama3), factor, ...

    def __post_init__(self):
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise BadInput(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise BadInput(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")


def llama_config(**sizes):
    """A GPTConfig with Llama 2's choices."""
    return GPTConfig(**dict(vocab_size=32000, n_positions=4096, model_type="llama", activation_function="silu",
                            bos_token_id=1, eos_token_id=2, tie_word_embeddings=False) | sizes)


PRESETS = {
    "tiny_starcoder_py": GPTConfig(n_embd=768, n_layer=20, n_head=12, n_inner=3072),
    "starcoderbase-1b": GPTConfig(n_embd=2048, n_layer=24, n_head=16, n_inner=8192),
    "starcoderbase-3b": GPTConfig(n_embd=2816, n_layer=36, n_head=22, n_inner=11264),
    "starcoderbase-7b": GPTConfig(n_embd=4096, n_layer=42, n_head=32, n_inner=16384),
    "starcoder": GPTConfig(activation_function="gelu"),
    "llama-2-7b": llama_config(n_embd=4096, n_layer=32, n_head=32, n_kv_head=32, n_inner=11008),
    "llama-2-13b": llama_config(n_embd=5120, n_layer=40, n_head=40, n_kv_head=40, n_inner=13824),
    # Both families at 27 M parameters, to compare them on a CPU (bench.py)
    "starcoder-cpu": GPTConfig(vocab_size=8192, n_positions=2048, n_embd=512, n_layer=8, n_head=8, n_inner=2048),
    "llama-cpu": llama_config(vocab_size=8192, n_positions=2048, n_embd=512, n_layer=8, n_head=8, n_kv_head=8,
                              n_inner=1152, tie_word_embeddings=True),
}


def rope_frequencies(config, device):
    """RoPE: the angle per token by which each pair of a head's D dimensions turns, float32 [D / 2]."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # llama3: waves longer than the context that it was pretrained with are stretched, short ones kept
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)   # in that context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return torch.lerp(slow, frequencies, ((waves - low) / (high - low)).clamp(0, 1))


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + D/2}) of x [B, T, h, D] by angles of cos, sin [B or 1, T, 1, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q, k, v, mask=None, flash=True):
    """Grouped-query attention: q [B, H, T, D] over k, v [B, K, S, D], H / K query heads to each key
    head (K = 1 is multi-query attention) -> [B, H, T, D].

    mask [B, T, S], in q's dtype: 0 where a query may look, else -inf; None is causal, with S = T.
    flash=False writes the scores out, as the paper's measurements did (no FlashAttention). All query
    heads of a key head are rows of one matmul, which for one token on a CPU is the faster way.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    mask = None if mask is None else mask[:, None]                            # [B, 1, T, S]
    if flash and not (T == 1 and q.device.type == "cpu"):
        k, v = (x[:, :, None].expand(B, K, H // K, -1, D).flatten(1, 2) for x in (k, v))   # [B, H, S, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.full((T, T), float("-inf"), device=q.device).triu(1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                                   # [B K, S, D]
    scores = (q.reshape(B * K, H // K * T, D) @ k.mT).view(B, H, T, -1)
    weights = torch.add(mask, scores.float(), alpha=D**-0.5).softmax(-1).to(q.dtype)   # [B, H, T, S]
    return (weights.view(B * K, H // K * T, -1) @ v).view(B, H, T, D)


def activation(config):
    """The activation of the MLP: GELU, exact or by tanh, or SiLU."""
    exact = {"gelu": F.gelu, "silu": F.silu}
    return exact.get(config.activation_function, partial(F.gelu, approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.head_dim = config.n_embd, config.head_dim
        self.width, self.kv_width = (n * config.head_dim for n in (config.n_head, config.n_kv_head))
        self.flash = True
        self.activation = activation(config)   # for an FFBA adapter that asks for it
        self.fused = config.model_type == "gpt_bigcode"
        if self.fused:
            self.c_attn = AdapterLinear(C, self.width + 2 * self.kv_width)   # rows: [query C | key D | value D]
            self.c_proj = AdapterLinear(C, C)
        else:
            self.q_proj = AdapterLinear(C, self.width, bias=False)
            self.k_proj, self.v_proj = (AdapterLinear(C, self.kv_width, bias=False) for _ in range(2))
            self.o_proj = AdapterLinear(self.width, C, bias=False)

    def forward(self, x, adapter_ids, kv_cache, index, mask, rope):
        B, T, C = x.shape
        if self.fused:
            qkv, hidden = self.c_attn.with_hidden(x, adapter_ids, self.activation)   # hidden: FFBA's, for c_proj
            q, kv = qkv.split([self.width, 2 * self.kv_width], dim=-1)
            q, kv = q.view(B, T, -1, self.head_dim), kv.view(B, T, 2, 1, self.head_dim)
        else:
            q, hidden = self.q_proj.with_hidden(x, adapter_ids, self.activation)
            q, k, v = (y.view(B, T, -1, self.head_dim)
                       for y in (q, self.k_proj(x, adapter_ids), self.v_proj(x, adapter_ids)))
            q, kv = rotate(q, *rope), torch.stack([rotate(k, *rope), v], dim=2)
        if index is None:      # prefill: the cache is empty, attend among the new tokens
            kv = kv.permute(2, 0, 3, 1, 4)                                    # [2, B, K, T, D]
            if kv_cache is not None:
                kv_cache[:, :, :, :T] = kv
        else:                  # decode: attend to all that each row has cached so far
            kv_cache[index] = kv                                              # [B, T, 2, K, D], into
            kv = kv_cache                                                     # [2, B, K, S, D]
        k, v = kv
        y = attend(q.transpose(1, 2), k, v, mask, self.flash).transpose(1, 2).reshape(B, T, -1)
        return (self.c_proj if self.fused else self.o_proj)(y, adapter_ids, hidden=hidden)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.n_embd, config.n_inner
        self.activation = activation(config)
        self.gated = config.model_type == "llama"
        if self.gated:
            self.gate_proj, self.up_proj = (AdapterLinear(C, inner, bias=False) for _ in range(2))
            self.down_proj = AdapterLinear(inner, C, bias=False)
        else:
            self.c_fc = AdapterLinear(C, inner)
            self.c_proj = AdapterLinear(inner, C)

    def forward(self, x, adapter_ids):
        first, second = (self.gate_proj, self.down_proj) if self.gated else (self.c_fc, self.c_proj)
        y, hidden = first.with_hidden(x, adapter_ids, self.activation)        # hidden: FFBA's, for the second
        y = self.activation(y)
        return second(y * self.up_proj(x, adapter_ids) if self.gated else y, adapter_ids, hidden=hidden)


def new_norm(config):
    return (nn.RMSNorm if config.model_type == "llama" else nn.LayerNorm)(config.n_embd, eps=config.layer_norm_epsilon)


class Block(nn.Module):
    NAMES = {"gpt_bigcode": ("ln_1", "attn", "ln_2", "mlp"),
             "llama": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")}

    def __init__(self, config):
        super().__init__()
        parts = new_norm(config), Attention(config), new_norm(config), MLP(config)
        for name, part in zip(self.NAMES[config.model_type], parts):
            self.add_module(name, part)

    def forward(self, x, adapter_ids=None, kv_cache=None, index=None, mask=None, rope=None):
        ln_1, attn, ln_2, mlp = self.children()
        x = x + attn(ln_1(x), adapter_ids, kv_cache, index, mask, rope)
        return x + mlp(ln_2(x), adapter_ids)


class GPT(nn.Module):
    """The language model. Parameters carry Hugging Face's names (`transformer.h.0.attn.c_attn.weight`,
    `model.layers.0.self_attn.q_proj.weight`); `wte` and `blocks` are those of either family."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.llama = config.model_type == "llama"
        self.gradient_checkpointing = False   # recompute each block in backward, to save memory
        self.packed = None                    # flora.PackedCopies once it serves on a CPU
        self._fingerprint = None
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        wpe = None if self.llama else nn.Embedding(config.n_positions, config.n_embd)
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        ln_f = new_norm(config)
        if self.llama:
            self.model = nn.ModuleDict(dict(embed_tokens=wte, layers=blocks, norm=ln_f))
        else:
            self.transformer = nn.ModuleDict(dict(wte=wte, wpe=wpe, h=blocks, ln_f=ln_f))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:  # the norms' gains stay ones; residual projections start smaller, as in GPT-2
                last = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))
                depth = 2 * config.n_layer if last else 1
                nn.init.normal_(p, std=config.initializer_range / depth**0.5)

    @property
    def wte(self):
        """The input embedding."""
        return self.model.embed_tokens if self.llama else self.transformer.wte

    @property
    def blocks(self):
        return self.model.layers if self.llama else self.transformer.h

    def hidden(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """All of `forward` but the output embedding -> [B, T, C]."""
        B, T = ids.shape
        if T > self.config.n_positions:
            raise BadInput(f"{T} tokens are more than the model's context of "
                           f"{self.config.n_positions} (n_positions); shorten or truncate the prompt")
        x = self.wte(ids)                                                     # [B, T, C]
        index = mask = rope = None
        if self.llama:
            where = torch.arange(T, device=ids.device)[None] if positions is None else positions
            angles = where[:, :, None, None] * rope_frequencies(self.config, ids.device)   # [B or 1, T, 1, D / 2]
            rope = angles.cos(), angles.sin()
        else:
            wpe = self.transformer.wpe
            x = x + (wpe.weight[:T] if positions is None else wpe(positions))
        if positions is not None and kv_cache is not None:
            row, every = torch.arange(B, device=ids.device)[:, None], slice(None)
            index = every, row, every, positions                              # where the new keys and values go
            unseen = torch.arange(kv_cache.shape[-2], device=ids.device) > positions[:, :, None]
            mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, float("-inf"))
        for i, block in enumerate(self.blocks):
            layer_cache = None if kv_cache is None else kv_cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, adapter_ids, rope=rope, use_reentrant=False)
            else:
                x = block(x, adapter_ids, layer_cache, index, mask, rope)
        return (self.model.norm if self.llama else self.transformer.ln_f)(x)

    def logits(self, x):
        """x [..., C] from `hidden` -> logits [..., vocab_size], by the output embedding."""
        output = self.wte if self.config.tie_word_embeddings else self.lm_head
        return matmul(x, packed_columns(output.weight, self.packed))

    def forward(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """ids int64 [B, T] -> logits [B, T, vocab_size], in the model's dtype.

        adapter_ids: int64 [B] or [B, T], 0 for the base model; None is the base model for all.
        kv_cache: from `new_kv_cache`, written in place. Without `positions` it is filled from its
        start (prefill; pad shorter rows on the right, causality keeps the padding out of sight).
        With positions int64 [B, T], each row's tokens are written there and see what that row has
        cached up to them (decode).
        """
        return self.logits(self.hidden(ids, adapter_ids, kv_cache, positions))

    def new_kv_cache(self, batch, length):
        """An empty static cache [n_layer, 2, B, K, S, D], in the model's dtype, for `length` = S tokens."""
        c, weight = self.config, self.wte.weight
        return torch.zeros(c.n_layer, 2, batch, c.n_kv_head, length, c.head_dim,
                           dtype=weight.dtype, device=weight.device)

    def set_attention(self, flash):
        """Choose F.scaled_dot_product_attention (True) or plain math (False), as `attend` explains."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.flash = flash

    def pack(self):
        """Serve with packed weights where that is faster (flora.matmul): on a CPU, in float32. Costs
        a second copy of the weights, made at first use; training ignores it."""
        weight = self.wte.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and self.packed is None \
                and torch.backends.mkldnn.is_available():
            for module in [self, *(layer for _, layer in adapter_layers(self))]:
                module.packed = PackedCopies()

    def base_parameters(self):
        """{name: parameter} of the base model, adapters left out."""
        return {name: p for name, p in self.named_parameters() if ".adapters." not in name}

    @property
    def fingerprint(self):
        """16 hexadecimal digits that tell this base model from others, from a sample of its weights
        as they were stored (so a load in another dtype keeps it)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint({n: sample(p) for n, p in self.base_parameters().items()})
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, value):
        self._fingerprint = value

    # ------------------------------------------------------------------ Hugging Face folders

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Load a Hugging Face GPTBigCode or Llama folder: config.json and weights as safetensors or
        pytorch_model*.bin (never unpickled beyond tensors), in one file or in shards.

        Each tensor is read into place in `dtype`, so memory peaks near one copy of the model.
        Raises BadInput, naming the file or key, for what is missing, misshaped or not supported.
        """
        with torch.device("meta"):
            model = cls(read_config(folder))
        model = model.to(dtype).to_empty(device=device)
        parameters, samples = model.base_parameters(), {}
        for file, name, tensor in stored_tensors(folder):
            if name not in parameters and name.endswith(("lm_head.weight", "rotary_emb.inv_freq")):
                continue  # a copy of the tied embedding; RoPE's frequencies, which old Llama files hold
            if name not in parameters:
                raise BadInput(f"{file}: unexpected tensor {name}; the model of {folder}/config.json "
                               "has no such parameter")
            if parameters[name].shape != tensor.shape:
                raise BadInput(f"{file}: {name} has shape {list(tensor.shape)}, but config.json "
                               f"needs {list(parameters[name].shape)}")
            parameters[name].data.copy_(tensor)
            samples[name] = sample(tensor)
        missing = sorted(parameters.keys() - samples.keys())
        if missing:
            raise BadInput(f"{folder}: tensor {missing[0]} is missing from the weight files"
                           + (f", and {len(missing) - 1} more" if missing[1:] else ""))
        model.fingerprint = fingerprint(samples)
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors that Hugging Face transformers opens.

        dtype: the stored one (None keeps the model's). Adapters are not written: merge one first,
        or use flora.save_adapter.
        """
        os.makedirs(folder, exist_ok=True)
        tensors = {name: p.detach().to(dtype or p.dtype).contiguous().cpu()
                   for name, p in self.base_parameters().items()}
        save_tensors(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        write_json(os.path.join(folder, "config.json"), to_json(self.config, dtype or self.wte.weight.dtype))


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


KEYS = {  # by family, {field of GPTConfig: key of config.json}, where the two differ
    "gpt_bigcode": {},
    "llama": dict(n_positions="max_position_embeddings", n_embd="hidden_size", n_layer="num_hidden_layers",
                  n_head="num_attention_heads", n_inner="intermediate_size", layer_norm_epsilon="rms_norm_eps",
                  activation_function="hidden_act", n_kv_head="num_key_value_heads"),
}
SUPPORTED = {  # {key of config.json: the values that are implemented, the default first}
    "gpt_bigcode": {"multi_query": [True], "scale_attn_weights": [True], "tie_word_embeddings": [True],
                    "activation_function": ["gelu_pytorch_tanh", "gelu"]},
    "llama": {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
              "tie_word_embeddings": [False, True]},
}
ROPE_TYPES = {  # the values of rope_scaling["rope_type"], each with the numbers it needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(folder):
    """The GPTConfig of a Hugging Face folder; BadInput names the key that is not supported."""
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such model folder")
    file = os.path.join(folder, "config.json")
    config = read_json(file)

    def check(key, value, values):
        if value not in values:
            raise BadInput(f"{file}: {key} is {value!r}, but only {' or '.join(map(repr, values))} is supported")

    family = config.get("model_type")
    check("model_type", family, list(KEYS))
    for key, values in SUPPORTED[family].items():
        check(key, config.get(key, values[0]), values)
    keys = {field: KEYS[family].get(field, field) for field in GPTConfig.__dataclass_fields__}
    fields = {field: config[key] for field, key in keys.items() if config.get(key) is not None}
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = fields["eos_token_id"][0]
    if family == "llama":
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}   # transformers 5's, and before
        kind = rope.get("rope_type", rope.get("type", "default"))
        check("rope_type", kind, list(ROPE_TYPES))
        for key in ROPE_TYPES[kind]:
            if not isinstance(rope.get(key), (int, float)):
                raise BadInput(f"{file}: rope_type {kind} needs a number {key}, not {rope.get(key)!r}")
        scaling = {"rope_type": kind} | {key: rope[key] for key in ROPE_TYPES[kind]}
        fields = dict(layer_norm_epsilon=1e-6, n_kv_head=fields.get("n_head"), tie_word_embeddings=False) | fields
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        if not isinstance(theta, (int, float)):
            raise BadInput(f"{file}: rope_theta is {theta!r}, but must be a number")
        fields |= dict(rope_theta=theta, rope_scaling=None if kind == "default" else scaling)
    elif "n_inner" not in fields and isinstance(fields.get("n_embd"), int):
        fields["n_inner"] = 4 * fields["n_embd"]
    for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "n_kv_head", "head_dim"):
        value = fields.get(field, 1 if field in ("n_kv_head", "head_dim") else None)
        if type(value) is not int or value < 1:
            raise BadInput(f"{file}: {keys[field]} is {value!r}, but must be a positive whole number")
    return GPTConfig(**fields)


def to_json(config, dtype):
    """The config.json of a GPTConfig, for transformers 4 and 5 and for read_config."""
    family, value = config.model_type, vars(config)
    fields = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon",
              "initializer_range", "bos_token_id", "eos_token_id", "activation_function", "tie_word_embeddings"]
    if family == "llama":
        fields += ["n_kv_head", "head_dim", "rope_theta", "rope_scaling"]
        rest = dict(architectures=["LlamaForCausalLM"])
    else:
        rest = dict(architectures=["GPTBigCodeForCausalLM"], attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return (dict(model_type=family) | {key: values[0] for key, values in SUPPORTED[family].items()}
            | {KEYS[family].get(field, field): value[field] for field in fields}
            | rest | dict(torch_dtype=str(dtype).removeprefix("torch.")))


def stored_tensors(folder):
    """Yield (file, name, CPU tensor) for every tensor of a folder, one at a time."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        file = os.path.join(folder, f"{stem}.{ending}")
        index = f"{file}.index.json"
        if os.path.exists(file):
            files = [file]
        elif os.path.exists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index}: has no weight_map; download it again")
            shards = sorted(set(weight_map.values()))
            files = [os.path.join(folder, os.path.basename(shard)) for shard in shards]
        else:
            continue
        for shard in files:
            if not os.path.exists(shard):
                raise BadInput(f"{shard}: this shard, named in {index}, is missing; download it again")
        for shard in files:
            try:
                if ending == "bin":
                    mmap = zipfile.is_zipfile(shard)  # files of torch before 1.6 are no zip
                    tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=mmap)
                    yield from ((shard, name, tensor) for name, tensor in tensors.items())
                else:
                    with safe_open(shard, "pt") as f:
                        for name in f.keys():
                            yield shard, name, f.get_tensor(name)
            except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
                    AttributeError) as e:
                reason = (str(e) or type(e).__name__).splitlines()[0]
                raise BadInput(f"{shard}: truncated or not a weight file ({reason}); download it again"
                               ) from e
        return
    raise BadInput(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of shards")


# -------------------------------------------------------------------------------------- tokenizers

FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>")


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json (by `tokenizers`) or tokenizer.model (by
    `sentencepiece`; the embedded model's, Llama 2's). decode(encode(text)) == text, but for the
    character ▁ (U+2581) in a tokenizer.json of Llama 2's kind, which takes it for a space.

    eos_id: what ends a text: config.json's eos_token_id (of several the first; generate.py's --stop
    takes the others), else the first of EOS_TOKENS that it has.
    bos_id: what the family's own tokenizer puts before a text (<s> of Llama), or None.
    fim_ids: the ids of FIM_TOKENS, or None.
    """

    def __init__(self, folder):
        self.files = [f for f in (os.path.join(folder, name) for name in
                                  ("tokenizer.json", "tokenizer.model")) if os.path.isfile(f)]
        if not self.files:
            raise BadInput(f"{folder}: holds neither tokenizer.json nor tokenizer.model")
        try:
            if self.files[0].endswith(".json"):
                from tokenizers import Tokenizer as HFTokenizer
                self.hf, self.sp = HFTokenizer.from_file(self.files[0]), None
                marked, plain = (self.hf.encode("a", add_special_tokens=add).ids for add in (True, False))
                self.bos_id = None if marked[:1] == plain[:1] else marked[0]
            else:
                from sentencepiece import SentencePieceProcessor
                with open(self.files[0], "rb") as f:
                    proto = f.read()
                normal = SentencePieceProcessor(model_proto=proto).normalize("a")
                # Llama's puts a space before a text. encode does that instead, so that a text may come in
                # parts: a field at the end of a protobuf, normalizer_spec.add_dummy_prefix = 0, overrides
                self.hf, self.sp = None, SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
                self.prefix = " " if normal.startswith("▁") else ""
                self.bos_id = None if self.sp.bos_id() < 0 else self.sp.bos_id()
        except Exception as e:  # tokenizers raises plain Exception
            raise BadInput(f"{self.files[0]}: not a readable tokenizer ({e})") from e
        config = os.path.join(folder, "config.json")
        ends = read_json(config).get("eos_token_id") if os.path.isfile(config) else None
        ends = ends if isinstance(ends, list) else [ends, *map(self.token_id, EOS_TOKENS)]
        self.eos_id = next((i for i in ends if i is not None), None)
        if self.eos_id is None:
            raise BadInput(f"{self.files[0]}: has none of {', '.join(EOS_TOKENS)}, and config.json no eos_token_id")
        fim_ids = [self.token_id(token) for token in FIM_TOKENS]
        self.fim_ids = None if None in fim_ids else fim_ids

    def token_id(self, token):
        if self.hf:
            return self.hf.token_to_id(token)
        i = self.sp.piece_to_id(token)
        return None if i == self.sp.unk_id() else i

    @property
    def vocab_size(self):
        return self.hf.get_vocab_size() if self.hf else self.sp.vocab_size()

    def encode(self, text, bos=False):
        """text -> list of ids. No special token is added, but with bos=True the bos_id, if there is one."""
        if bos and self.bos_id is not None:
            return [self.bos_id] + self.encode(text)
        if self.hf:
            return self.hf.encode(text, add_special_tokens=False).ids
        text = self.prefix + text if text else text
        # sentencepiece writes a space as ▁, so that a ▁ of the text must go in as its UTF-8 bytes
        low_line = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        first, *rest = (self.sp.encode(part) for part in text.split("▁"))
        return first + [i for part in rest for i in low_line + part]

    def decode(self, ids, continues=False):
        """list of ids -> text; bytes that are no UTF-8 become U+FFFD. continues: the ids go on from a text
        (a prompt), so that a space at their start is none that the tokenizer put before it."""
        ids = (self.encode("x") if continues else []) + list(ids)
        text = (self.hf.decode(ids, skip_special_tokens=False) if self.hf
                else self.sp.decode(ids).removeprefix(self.prefix))
        return text[1:] if continues else text

    def save(self, folder):
        """Copy the tokenizer's file into another model folder."""
        for file in self.files:
            if not os.path.exists(os.path.join(folder, os.path.basename(file))):
                shutil.copy(file, folder)


# ------------------------------------------------------------------------- what every script shares

EMBEDDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "base")


def add_common_flags(parser, dtypes):
    """--weights, --device, --dtype, --quantize, --seed and --json, with the same meaning in every script."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--weights", metavar="FOLDER", default=EMBEDDED,
                        help="base model, a Hugging Face folder (default: the embedded one)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32",
                        help="default: bfloat16 on cuda, else float32")
    parser.add_argument("--quantize", choices=["int8"], help="hold the base's projections as int8, a scale per output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")


def get_device(name):
    """"cpu", "cuda", "cuda:1" -> torch.device; BadInput where this machine has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"--device {name}: not usable here ({str(e).splitlines()[0]})") from None
    return torch.device(name)


def save_figure(figure, file, dpi=130):
    """Write a matplotlib figure as PNG whole: under a temporary name, then renamed."""
    figure.tight_layout()
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    figure.savefig(f"{file}.tmp", format="png", dpi=dpi)
    os.replace(f"{file}.tmp", file)


def run_main(main):
    """Run a script's main(): bad input is one sentence and exit status 2, Ctrl-C is status 130."""
    try:
        main()
    except BadInput as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
