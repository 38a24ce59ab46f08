"""Faster training on a CPU: the same losses and gradients, up to rounding, by other means.

  python train.py --adapter flora --fast

- The allocator keeps freed memory: asking Linux for the pages of each large tensor anew takes up to
  a seventh of a step.
- `BothWays`: W0 packed for oneDNN (extras/packed.py), once for x W0 and once for its gradient's
  product with W0ᵀ. In bfloat16, for which it wants AVX-512, a frozen W0 is then rounded once, not in
  each step. Both copies stay beside the weights themselves.
- `OutputLoss`: the loss and its gradient a few rows at a time, so that no copy of all logits, in
  float32, is ever held.
- `CausalAttention`: attention by plain matmuls, which torch's fused one for CPUs runs at half of
  their speed.
- `Gelu`: by a sigmoid, which costs a fifth of torch's tanh, once for both directions.

For one process on a CPU, without --compile. extras/peers_training.py measures what it gains.
"""
import ctypes
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd import Function

import flora
import model as plain
from extras.packed import pack_weight, packs_bfloat16, times_packed
from plumbing.files import BadInput
from plumbing.processes import WORLD

ROWS = 512        # of the logits that OutputLoss holds at once, and of what Gelu works on
QUERIES = 64      # of CausalAttention's blocks
LONGEST = 1024    # tokens up to which its probabilities are kept for the backward pass


def speed_up(model, args):
    """Change `model` in place, for train.py's flags -> the loss function that replaces loss_of."""
    if model.wte.weight.device.type != "cpu" or args.compile or WORLD > 1:
        raise BadInput("--fast is for one process on a CPU, without --compile; leave it out")
    dtype = getattr(torch, args.dtype)
    check_packs(dtype)
    keep_memory()
    for attention in model.attentions():
        attention.attend = attend
    if model.config.activation_function == "gelu_pytorch_tanh":
        for block in model.blocks:
            block.mlp.activation = gelu
    pack_both_ways(model, dtype)
    E = model.output.weight
    return partial(loss_of, dtype, None if E.requires_grad else both_ways(E, dtype))


def check_packs(dtype):
    """BadInput where weights of this dtype cannot be packed."""
    if not torch.backends.mkldnn.is_available():
        raise BadInput("--fast packs weights for oneDNN, which this PyTorch lacks; leave it out")
    if dtype == torch.bfloat16 and not packs_bfloat16():
        raise BadInput("--dtype bfloat16: weights cannot be packed in it on this processor, which "
                       "has no AVX-512; use --dtype float32, which is faster here")


def keep_memory():
    """Have glibc serve all allocations from memory that it keeps; elsewhere nothing happens."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ------------------------------------------------------------------------------ frozen projections


class FrozenLinear(Function):
    """x [..., d] -> x W0 + bias, differentiable in x alone."""

    @staticmethod
    def forward(ctx, x, weight, transposed, bias):
        ctx.transposed, ctx.dtype = transposed, x.dtype
        return times_packed(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        grad = times_packed(grad.to(ctx.transposed.dtype), ctx.transposed)
        return grad.to(ctx.dtype), None, None, None


def both_ways(weight, dtype):
    """weight [k, d] -> packed in `dtype` for x weightᵀ, and for its gradient's product with weight."""
    weight = weight.detach().to(dtype)
    return pack_weight(weight), pack_weight(weight.T)


class BothWays:
    """W0 packed in `dtype` for both directions, when a product first asks for some of its columns."""

    def __init__(self, dtype):
        self.dtype, self.packed = dtype, {}

    def product(self, layer, x, lo, hi, bias):
        columns = (layer, lo, hi)
        if columns not in self.packed:
            self.packed[columns] = both_ways(layer.weight[lo:hi], self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        return FrozenLinear.apply(x, *self.packed[columns], bias)

    def W0(self, layer):
        return layer.weight.T


def pack_both_ways(model, dtype):
    """Hold the frozen projections of a model that are held plainly as BothWays."""
    form = BothWays(dtype)
    for _, layer in flora.adapter_layers(model):
        if layer.form is None and not layer.weight.requires_grad:
            layer.form = form


# ---------------------------------------------------------------------------------------- the loss


class OutputLoss(Function):
    """Mean cross-entropy of the logits x Eᵀ: x [n, C], E [vocab, C], targets int64 [n], of which
    -100 does not count -> [] in float32. Differentiable in x and E. packed: E both_ways."""

    @staticmethod
    def forward(ctx, x, E, targets, dtype, packed):
        share = (targets != -100)[:, None] / (targets != -100).sum()         # of each row's loss
        y, total, grad_x, grad_E = targets.clamp(min=0)[:, None], 0.0, torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            grad_E = torch.zeros_like(E)
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            part = x[rows].to(dtype)
            logits = times_packed(part, packed[0]).float()                    # [ROWS, vocab]
            p = logits.softmax(-1)
            log_sum = logits.amax(-1, True) - p.amax(-1, True).log()          # logsumexp
            total += ((log_sum - logits.gather(1, y[rows])) * share[rows]).sum()
            grad = p.scatter_add_(1, y[rows], -torch.ones_like(log_sum)).to(dtype)
            grad_x[rows] = times_packed(grad, packed[1]) * share[rows]
            if grad_E is not None:
                grad_E += grad.T @ (part * share[rows]).to(dtype)
        ctx.save_for_backward(grad_x, grad_E)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_E = ctx.saved_tensors
        return grad_x * grad, None if grad_E is None else grad_E * grad, None, None, None


def loss_of(dtype, packed, model, x, y, adapter_ids):
    """train.loss_of by OutputLoss. packed: the output embedding both_ways; None where it trains."""
    E = model.output.weight
    hidden = model.hidden(x, adapter_ids).flatten(0, 1)                       # [B T, C]
    return OutputLoss.apply(hidden, E, y.flatten(), dtype, packed or both_ways(E, dtype))


# --------------------------------------------------------------------------------------- attention


def attend(q, k, v, mask=None):
    """model.attend, by CausalAttention where it can."""
    if mask is not None or not q.requires_grad or q.shape[2] > LONGEST:
        return plain.attend(q, k, v, mask)
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return CausalAttention.apply(q, k, v)


class CausalAttention(Function):
    """q [B, H, T, D] over k, v [B, K, T, D] -> [B, H, T, D]. A block of queries at a time looks at
    the keys up to its end. The rows of its matmuls are tokens and, of each, the query heads of a
    key head: as c_attn writes them, so that a block of them is not copied."""

    @staticmethod
    def forward(ctx, q, k, v):
        K, q = k.shape[1], q * q.shape[-1]**-0.5
        k, v = k.flatten(0, 1), v.flatten(0, 1)                     # [B K, T, D]
        out, weights = torch.empty_like(q), []
        for rows, end in blocks(q.shape[2]):
            into = by_key_head(out[:, :, rows], K)                  # [B, K, rows, H / K, D]
            n = rows.stop - rows.start
            scores = matrices(q[:, :, rows], K) @ k[:, :end].mT     # [B K, rows H / K, end]
            masked = scores.view(len(k), n, -1, end)[..., rows]
            masked += torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)[:, None]
            weights.append(scores.softmax(-1))
            into.copy_((weights[-1] @ v[:, :end]).view(into.shape))
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *weights = ctx.saved_tensors
        K, grad = len(k) // len(q), grad.to(q.dtype)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, end), p in zip(blocks(q.shape[2]), weights):
            into, g = by_key_head(grad_q[:, :, rows], K), matrices(grad[:, :, rows], K)
            grad_v[:, :end] += p.mT @ g
            ds = torch._softmax_backward_data(g @ v[:, :end].mT, p, -1, p.dtype)
            into.copy_((ds @ k[:, :end]).view(into.shape))
            grad_k[:, :end] += ds.mT @ matrices(q[:, :, rows], K)
        grad_k, grad_v = (x.unflatten(0, (-1, K)) for x in (grad_k, grad_v))
        return grad_q.mul_(q.shape[-1]**-0.5), grad_k, grad_v


def blocks(T):
    """[(slice of queries, its end)]"""
    ends = [min(start + QUERIES, T) for start in range(0, T, QUERIES)]
    return [(slice(start, end), end) for start, end in zip(range(0, T, QUERIES), ends)]


def by_key_head(x, K):
    """[B, H, rows, D] -> a view of it, [B, K, rows, H / K, D]."""
    return x.unflatten(1, (K, -1)).transpose(2, 3)


def matrices(x, K):
    """[B, H, rows, D] -> [B K, rows H / K, D]."""
    return by_key_head(x, K).flatten(2, 3).flatten(0, 1)


# -------------------------------------------------------------------------------------------- gelu


def gelu(x):
    """GELU by tanh, by Gelu where a gradient is wanted."""
    return Gelu.apply(x) if x.requires_grad else F.gelu(x, approximate="tanh")


class Gelu(Function):
    """y = x s(z), z = 2 sqrt(2 / pi) (x + 0.044715 x³), s the sigmoid: GELU by tanh. Its slope,
    s + s (1 - s) x dz/dx, is made with it, a few rows at a time, which stay in the cache."""

    @staticmethod
    def forward(ctx, x):
        y, slope = torch.empty_like(x), torch.empty_like(x)
        parts = [tensor.flatten(0, -2).split(ROWS) for tensor in (x, y, slope)]
        for x, y_part, slope_part in zip(*parts):
            x = x.float()
            linear = x * (8 / math.pi)**0.5
            z = torch.addcmul(linear, linear, x * x, value=0.044715)
            s = z.sigmoid()
            y_part.copy_(x * s)
            x_dz = torch.add(z, linear, alpha=-2 / 3)               # x dz/dx / 3
            slope_part.copy_(torch.addcmul(s, s.addcmul(s, s, value=-1), x_dz, value=3))
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]
