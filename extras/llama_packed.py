"""Llama's decoding step on a CPU in fewer operators: the packed form of extras/llama.py.

A step of a small Llama is many small operators between its products, each of which takes longer to
start than to compute. Here q, k and v are one product and gate and up another, where no adapter
comes between; queries, keys and values are turned together; RMSNorm is two operators; and in
bfloat16 the attention of several rows is two batched products, as torch's fused one takes each key
head for itself. Llama.pack puts it in place. Prompts, gradients, torch.compile and CUDA keep the
path of extras/llama.py, but for the two joint products, which serve prompts as well.

Shapes: B batch, T tokens, S cached tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from extras.int8 import serving
from extras.joint import Joint
from extras.llama import Llama, LlamaAttention, LlamaMLP
from extras.packed import PackedLinear, attend_to_cache
from flora import gather

MANY_HEADS = 16   # B K from which batched products are the faster attention (Zen 4, bfloat16)
ROUND = 32        # S is then padded to a multiple: oneDNN compiles a product for each new S


class Step(NamedTuple):
    """What is the same for all layers of a decoding step."""
    adapters: dict | None
    write: tuple                 # as in model.CacheAccess, as is mask
    mask: torch.Tensor
    turn: tuple                  # cos and sin [B, H + 2 K, D], for rotate_all
    length: torch.Tensor         # [B, 1], for norm
    room: torch.Tensor | None    # [2, B, K, S', D], for a layer's cache, S' being S padded
    seen: torch.Tensor | None    # [B, 1, S'], the mask padded


def norm(stream, length, weight):
    """RMSNorm of x, the first C numbers of stream [B, C + 1] -> [B, C]. The last number of stream
    is the root of C eps, by which its length has eps in it; `length` is the root of C."""
    return torch._weight_norm_interface(stream, length, 0)[0][:, :-1] * weight


def rotate_all(heads, cos, sin):
    """llama.rotate of all heads [B, H + 2 K, D], in float32; for values cos is 1 and sin 0."""
    return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sin)


def turn_of_heads(cos, sin, config, scale):
    """llama.LlamaAccess.rope of one token a row -> cos, sin [B, H + 2 K, D] for rotate_all, which
    also multiplies the queries by `scale`."""
    cos, sin = torch.cat([cos, cos], -1)[:, 0], torch.cat([-sin, sin], -1)[:, 0]   # [B, 1, D]
    one, zero = torch.ones_like(cos), torch.zeros_like(sin)
    heads = [config.n_head, config.n_kv_head, config.n_kv_head]
    return tuple(torch.cat([x.expand(-1, n, -1) for x, n in zip(each, heads)], 1)
                 for each in [(cos * scale, cos, one), (sin * scale, sin, zero)])


def attend_by_products(q, kv_cache, room, seen):
    """Attention of one token a row, q [B, H, D], scaled, to kv_cache [2, B, K, S, D] -> [B, H D].
    A batched product takes the cache without gaps only: `room` is where it is copied to."""
    room[:, :, :, :kv_cache.shape[-2]].copy_(kv_cache)
    k, v = room.flatten(1, 2)                                                 # [B K, S', D]
    scores = torch.bmm(q.reshape(len(k), -1, q.shape[-1]), k.mT)              # [B K, H / K, S']
    weights = scores.view(len(q), -1, k.shape[1]).add_(seen).softmax(-1)      # [B, H, S']
    return torch.bmm(weights.view(scores.shape), v).view(len(q), -1)


class PackedAttention(LlamaAttention):
    def heads(self, x, adapters):
        y = self.qkv.plain(x, adapters)
        if y is None:
            return super().heads(x, adapters)
        k = self.k_proj.out_features // self.head_dim
        y = y.unflatten(-1, (-1, self.head_dim))                              # [B, T, H + 2 K, D]
        return y.split([y.shape[-2] - 2 * k, k, k], dim=-2)

    def step(self, x, kv_cache, step):
        """forward for one token a row, x [B, C] -> [B, C]."""
        heads, K = self.qkv.step(x, step.adapters), kv_cache.shape[2]
        heads = rotate_all(heads.view(len(x), -1, self.head_dim), *step.turn).to(x.dtype)
        q, kv = heads.tensor_split([heads.shape[1] - 2 * K], 1)
        kv_cache[step.write] = kv.unflatten(1, (1, 2, K))
        if step.room is None:
            y = self.attend(q[:, :, None], *kv_cache, step.mask).view(len(x), -1)
        else:
            y = attend_by_products(q, kv_cache, step.room, step.seen)
        return self.out.step(y, step.adapters)


class PackedMLP(LlamaMLP):
    def gate_and_up(self, x, adapters):
        y = self.into.plain(x, adapters)
        return super().gate_and_up(x, adapters) if y is None else y.chunk(2, -1)

    def step(self, x, step):
        """forward for one token a row, x [B, C] -> [B, C]."""
        gate, up = self.into.step(x, step.adapters).chunk(2, -1)
        return self.out.step(self.activation(gate).mul_(up).to(x.dtype), step.adapters)


class PackedLlama(Llama):
    def hidden(self, ids, adapter_ids=None, kv_cache=None, positions=None):
        weight = self.wte.weight
        if kv_cache is None or positions is None or ids.shape[1] > 1 or not (
                serving(weight) and weight.dtype in (torch.float32, torch.bfloat16)):
            return super().hidden(ids, adapter_ids, kv_cache, positions)
        x, eps = self.embed(ids, positions), self.config.layer_norm_epsilon
        step = self.step(x, gather(self, adapter_ids), kv_cache, positions)
        stream = F.pad(x[:, 0], (0, 1), value=(x.shape[-1] * eps)**0.5)       # [B, C + 1]
        x = stream[:, :-1]                                                    # in place
        for block, layer_cache in zip(self.blocks, kv_cache):
            y = norm(stream, step.length, block.input_layernorm.weight)
            x += block.self_attn.step(y, layer_cache, step)
            y = norm(stream, step.length, block.post_attention_layernorm.weight)
            x += block.mlp.step(y, step)
        return self.ln_f(x[:, None])

    def step(self, x, adapters, kv_cache, positions):
        """The Step of x [B, 1, C]."""
        write, mask, rope = self.cache_access(x, kv_cache, positions)
        c, room, seen, scale = self.config, None, None, 1.0
        fused = self.blocks[0].self_attn.attend is attend_to_cache   # not plain math by choice
        if fused and x.dtype == torch.bfloat16 and len(x) * c.n_kv_head >= MANY_HEADS:
            S, scale = mask.shape[-1], c.head_dim**-0.5
            seen = F.pad(mask[:, 0], (0, -S % ROUND), value=float("-inf"))
            room = x.new_zeros(2, len(x), c.n_kv_head, seen.shape[-1], c.head_dim)
        turn = turn_of_heads(*rope, c, scale)
        return Step(adapters, write, mask, turn, x.new_full((len(x), 1), c.n_embd**0.5), room, seen)


FORMS = {Llama: PackedLlama, LlamaAttention: PackedAttention, LlamaMLP: PackedMLP}


def pack(model):
    """Put this file's forms in the place of a Llama's own, if extras/packed.py has packed it."""
    if type(model.times_output) is not PackedLinear:
        return
    for module in model.modules():
        if type(module) is LlamaAttention:
            module.qkv = Joint(module.q_proj, module.k_proj, module.v_proj)
            module.out = Joint(module.o_proj)
        if type(module) is LlamaMLP:
            module.into = Joint(module.gate_proj, module.up_proj)
            module.out = Joint(module.down_proj)
        module.__class__ = FORMS.get(type(module), type(module))
