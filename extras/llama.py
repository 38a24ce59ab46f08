"""Llama (App. B.2): a second family of base models, loaded from and written to Hugging Face folders.

  python generate.py --weights Llama-2-7b-hf --prompt 'The paper says that' --dtype bfloat16
  python bench.py --model llama-2-7b --random-weights --dtype float16 --ranks 1 2 4 8 16    Fig. 3

Beside StarCoder: RMSNorm for LayerNorm, rotary positions (RoPE) for learned ones, n_kv_head keys
and values for one, SwiGLU for GELU, no biases, an output embedding that is tied or not. Linear and
Llama 3's RoPE scaling. model.py finds this file by the model_type of a config.json.

Shapes as in model.py: B batch, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim.
"""
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from flora import AdapterLinear
from model import ACTIVATIONS, GPT, Attention, GPTConfig, attend, cached_attention
from plumbing.files import BadInput, check_json, is_json
from plumbing.folders import StarCoderFolder, check_supported


@dataclass
class LlamaConfig(GPTConfig):
    """Sizes, by the names of GPTConfig. The defaults are Llama 2's."""
    vocab_size: int = 32000
    n_positions: int = 4096
    bos_token_id: int = 1
    eos_token_id: int | list = 2
    activation_function: str = "silu"
    n_kv_head: int = 1                   # key/value heads, each shared by n_head / n_kv_head query heads
    head_dim: int | None = None          # None is n_embd / n_head
    tie_word_embeddings: bool = False    # whether the output embedding is the input's
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None     # rope_type (linear or llama3), factor, ...
    model_type: ClassVar[str] = "llama"

    def __post_init__(self):
        if self.head_dim is None:
            super().__post_init__()
        if type(self.head_dim) is not int or self.head_dim < 2 or self.head_dim % 2:
            raise BadInput(f"head_dim is {self.head_dim!r}, but must be an even whole number above 0")
        if self.n_head % self.n_kv_head:
            raise BadInput(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")


PRESETS = {
    "llama-2-7b": LlamaConfig(n_embd=4096, n_layer=32, n_head=32, n_kv_head=32, n_inner=11008),
    "llama-2-13b": LlamaConfig(n_embd=5120, n_layer=40, n_head=40, n_kv_head=40, n_inner=13824),
    # As large as model.PRESETS["starcoder-cpu"], 27 M parameters
    "llama-cpu": LlamaConfig(vocab_size=8192, n_positions=2048, n_embd=512, n_layer=8, n_head=8,
                             n_kv_head=8, n_inner=1152, tie_word_embeddings=True),
    "llama-smollm2": LlamaConfig(vocab_size=49152, n_positions=2048, n_embd=576, n_layer=30,
                                 n_head=9, n_kv_head=3, n_inner=1536, tie_word_embeddings=True),
}
ROPE_TYPES = {  # the values of rope_scaling["rope_type"], each with the numbers it needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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


class LlamaAccess(NamedTuple):
    """model.CacheAccess, and the cos and sin [B or 1, T, 1, D / 2] by which its tokens are turned."""
    write: tuple | None
    mask: torch.Tensor | None   # [B, 1, T, S]
    rope: tuple


class LlamaAttention(Attention):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config):
        nn.Module.__init__(self)
        C, self.head_dim, self.attend = config.n_embd, config.head_dim, attend
        self.q_proj = AdapterLinear(C, config.n_head * self.head_dim, bias=False)
        self.k_proj = AdapterLinear(C, config.n_kv_head * self.head_dim, bias=False)
        self.v_proj = AdapterLinear(C, config.n_kv_head * self.head_dim, bias=False)
        self.o_proj = AdapterLinear(config.n_head * self.head_dim, C, bias=False)

    def heads(self, x, adapters):
        """Queries [B, T, H, D], keys and values [B, T, K, D]."""
        return (project(x, adapters).unflatten(-1, (-1, self.head_dim))
                for project in (self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x, adapters, kv_cache, access):
        q, k, v = self.heads(x, adapters)
        q, kv = rotate(q, *access.rope), torch.stack([rotate(k, *access.rope), v], dim=2)
        return self.o_proj(cached_attention(q, kv, kv_cache, access, self.attend), adapters)


class LlamaMLP(nn.Module):
    """SwiGLU: down_proj(silu(gate_proj x) ∘ up_proj x)."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.gate_proj = AdapterLinear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = AdapterLinear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = AdapterLinear(config.n_inner, config.n_embd, bias=False)

    def gate_and_up(self, x, adapters):
        return self.gate_proj(x, adapters), self.up_proj(x, adapters)

    def forward(self, x, adapters):
        gate, up = self.gate_and_up(x, adapters)
        return self.down_proj(self.activation(gate) * up, adapters)


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = LlamaMLP(config)

    def forward(self, x, adapters, kv_cache, access):
        x = x + self.self_attn(self.input_layernorm(x), adapters, kv_cache, access)
        return x + self.mlp(self.post_attention_layernorm(x), adapters)


class LlamaFolder(StarCoderFolder):
    """How a folder holds a Llama."""
    ARCHITECTURE = dict(architectures=["LlamaForCausalLM"])
    KEYS = dict(n_positions="max_position_embeddings", n_embd="hidden_size", n_layer="num_hidden_layers",
                n_head="num_attention_heads", n_inner="intermediate_size", layer_norm_epsilon="rms_norm_eps",
                activation_function="hidden_act", n_kv_head="num_key_value_heads")
    SUPPORTED = {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
                 "tie_word_embeddings": [False, True]}
    SIZES = (*StarCoderFolder.SIZES, "n_kv_head")
    IGNORED = ("rotary_emb.inv_freq",)   # RoPE's frequencies, which old files hold

    @classmethod
    def complete(cls, found, values, file):
        found = dict(layer_norm_epsilon=1e-6, n_kv_head=found.get("n_head"),
                     tie_word_embeddings=False) | found
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}   # transformers 5's, or before
        check_json(rope, {}, file, "rope_scaling")
        kind = rope.get("rope_type", rope.get("type", "default"))
        check_supported(file, "rope_type", kind, list(ROPE_TYPES))
        for key in ROPE_TYPES[kind]:
            if not is_json(rope.get(key), float) or rope[key] <= 0:
                raise BadInput(f"{file}: rope_type {kind} needs a number {key} above 0, not {rope.get(key)!r}")
        theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        if not is_json(theta, float) or theta <= 0:
            raise BadInput(f"{file}: rope_theta is {theta!r}, but must be a number above 0")
        scaling = {"rope_type": kind} | {key: rope[key] for key in ROPE_TYPES[kind]}
        if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise BadInput(f"{file}: high_freq_factor is not above low_freq_factor")
        return found | dict(rope_theta=theta, rope_scaling=None if kind == "default" else scaling)


class Llama(GPT):
    """Llama, by Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`)."""

    TARGETS = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {
        name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    DEFAULT_TARGETS = {"flora": ("q_proj", "v_proj"), "lora": ("q_proj", "v_proj"),
                       "ia3": ("k_proj", "v_proj", "down_proj")}
    SCALES_INPUT = {"down_proj"}

    RESIDUAL = ("o_proj.weight", "down_proj.weight")
    FOLDER = LlamaFolder
    CONFIG = LlamaConfig

    def build(self, config):
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer)),
            norm=nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def wte(self):
        return self.model.embed_tokens

    @property
    def blocks(self):
        return self.model.layers

    @property
    def ln_f(self):
        return self.model.norm

    @property
    def output(self):
        return self.wte if self.config.tie_word_embeddings else self.lm_head

    def columns(self, target):
        return None

    def embed(self, ids, positions):
        return self.wte(ids)

    def cache_access(self, x, kv_cache, positions):
        tokens = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
        angles = tokens[:, :, None, None] * rope_frequencies(self.config, x.device)   # [B or 1, T, 1, D / 2]
        return LlamaAccess(*super().cache_access(x, kv_cache, positions), (angles.cos(), angles.sin()))

    def pack(self):
        super().pack()
        from extras.llama_packed import pack   # which imports this file
        pack(self)


MODEL = Llama
