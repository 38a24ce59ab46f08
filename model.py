"""StarCoder (GPTBigCode): the transformer, its KV cache, its sizes.

A pre-norm decoder with learned positions, multi-query attention, a GELU MLP, biases everywhere and
a tied output embedding. The projections of each block are `flora.AdapterLinear`, so every row of a
batch may run its own adapter. Parameters carry Hugging Face's names. Other families subclass `GPT`
in extras/ (llama.py) and are found by their config.json's model_type.

Shapes: B batch, T tokens, S cached tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim.
"""
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flora import AdapterLinear, gather
from plumbing import folders
from plumbing.files import BadInput
from plumbing.fingerprint import fingerprints
from plumbing.registry import extra, find
from plumbing.tokenizer import Tokenizer  # noqa: F401, a folder holds both


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


class CacheAccess(NamedTuple):
    """How one call uses the KV cache, the same for every layer."""
    write: tuple | None = None         # where its keys and values go; None: to the start (prefill)
    mask: torch.Tensor | None = None   # [B, 1, T, S], 0 where it may look, or -inf; None: causal


def attend(q, k, v, mask=None, flash=True):
    """Grouped-query attention: q [B, H, T, D] over k, v [B, K, S, D], H / K query heads to each key
    head (K = 1 is multi-query attention) -> [B, H, T, D].

    mask [B, 1, T, S], in q's dtype: 0 where a query may look, or -inf; None is causal, S = T.
    flash=False writes the scores out, as the paper's measurements did (no FlashAttention). All
    query heads of a key head are rows of one matmul: for one token on a CPU that is faster.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
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


def cached_attention(q, kv, kv_cache, access, attend):
    """Attention of new tokens, q [B, T, H, D] and kv [B, T, 2, K, D], -> [B, T, H D].

    kv_cache [2, B, K, S, D] or None takes the new keys and values in place. Prefill (access.write
    None) attends among the new tokens; decoding to all that each row has cached so far. attend:
    the function of this name, or one like it.
    """
    B, T = q.shape[:2]
    if access.write is not None:
        kv_cache[access.write] = kv
        kv = kv_cache
    else:
        kv = kv.permute(2, 0, 3, 1, 4)                                        # [2, B, K, T, D]
        if kv_cache is not None:
            kv_cache[:, :, :, :T] = kv
    k, v = kv
    return attend(q.transpose(1, 2), k, v, access.mask).transpose(1, 2).reshape(B, T, -1)


ACTIVATIONS = {   # by the names of config.json
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}


class Attention(nn.Module):
    """Multi-query attention. The rows of c_attn's weight are [query C | key D | value D]."""

    def __init__(self, config):
        super().__init__()
        C, self.head_dim, self.attend = config.n_embd, config.head_dim, attend
        self.c_attn = AdapterLinear(C, C + 2 * self.head_dim)
        self.c_proj = AdapterLinear(C, C)

    def forward(self, x, adapters, kv_cache, access):
        B, T, C = x.shape
        q, kv = self.c_attn(x, adapters).split([C, 2 * self.head_dim], dim=-1)
        q, kv = q.view(B, T, -1, self.head_dim), kv.view(B, T, 2, 1, self.head_dim)
        return self.c_proj(cached_attention(q, kv, kv_cache, access, self.attend), adapters)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
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

    def forward(self, x, adapters, kv_cache, access):
        x = x + self.attn(self.ln_1(x), adapters, kv_cache, access)
        return x + self.mlp(self.ln_2(x), adapters)


class GPT(nn.Module):
    """StarCoder, by Hugging Face's names (`transformer.h.0.attn.c_attn.weight`)."""

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
    RESIDUAL = ("c_proj.weight",)     # projections into the residual stream
    FOLDER = folders.StarCoderFolder  # how a Hugging Face folder holds this family
    CONFIG = GPTConfig

    times_output = staticmethod(F.linear)   # (x, output embedding) -> logits

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False   # recompute each block in backward, to save memory
        self.build(config)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:  # not the norms' gains; residual projections start smaller (GPT-2)
                depth = 2 * config.n_layer if name.endswith(self.RESIDUAL) else 1
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

    def cache_access(self, x, kv_cache, positions):
        """The CacheAccess of x [B, T, C] at positions [B, T]; prefill if either is None."""
        if positions is None or kv_cache is None:
            return CacheAccess()
        row, every = torch.arange(len(x), device=x.device)[:, None], slice(None)
        cached = torch.arange(kv_cache.shape[-2], device=x.device)            # [S]
        unseen = cached > positions[:, None, :, None]                         # [B, 1, T, S]
        mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, float("-inf"))
        return CacheAccess((every, row, every, positions), mask)

    def hidden(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        """All of `forward` but the output embedding -> [B, T, C]."""
        if ids.shape[1] > self.config.n_positions:
            raise BadInput(f"{ids.shape[1]} tokens are more than the model's context of "
                           f"{self.config.n_positions} (n_positions); "
                           "shorten or truncate the prompt")
        adapters = gather(self, adapter_ids)
        x = self.embed(ids, positions)                                        # [B, T, C]
        access = self.cache_access(x, kv_cache, positions)
        for i, block in enumerate(self.blocks):
            layer_cache = None if kv_cache is None else kv_cache[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, adapters, layer_cache, access, use_reentrant=False)
            else:
                x = block(x, adapters, layer_cache, access)
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
        with suppress(BadInput):   # without extras/ the product stays plain
            extra("packed", "packing").pack(self)

    def base_parameters(self):
        """{name: parameter} of the base model, adapters left out."""
        return {name: p for name, p in self.named_parameters() if ".adapters." not in name}

    @cached_property
    def fingerprints(self):
        """Of its weights as they were stored: the fingerprint, and that of older adapter files."""
        return fingerprints(self.base_parameters())

    @property
    def fingerprint(self):
        """16 hexadecimal digits that tell this base model from others, whatever its dtype now."""
        return self.fingerprints[0]

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=torch.float32):
        """Load a Hugging Face folder of StarCoder's family, or of one in extras/, in `dtype`.
        BadInput names the file or key that is missing, misshaped or not supported."""
        return folders.load(folder, read_config(folder), model_from_config, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors that Hugging Face transformers opens, in `dtype`
        (None: the model's). Adapters are not written: merge one first, or flora.save_adapter."""
        folders.save(self, folder, dtype)


# ------------------------------------------------------------------------- families, by their names


def model_class(model_type):
    """The model of a config.json's model_type: GPT, or the MODEL of extras/MODEL_TYPE.py."""
    return find(model_type, {"gpt_bigcode": GPT}, "MODEL",
                f"model_type is {model_type!r}, but only 'gpt_bigcode' or a family that extras/ "
                f"holds is supported (there is no extras/{model_type}.py for it)")


def model_from_config(config):
    """A model of random weights, of the class that the config's family has."""
    return model_class(config.model_type)(config)


def read_config(folder):
    """The config of a Hugging Face folder; BadInput names the key that is not supported."""
    return folders.read_config(folder, model_class)


def preset(name):
    """The GPTConfig of a published size: of PRESETS, or of another family's in extras/."""
    sentence = (f"--model {name}: unknown; use one of {', '.join(PRESETS)}, "
                "or one of extras/llama.py's")
    family = PRESETS if name in PRESETS else find(name.split("-")[0], {}, "PRESETS", sentence)
    return find(name, family, "PRESETS", sentence)
