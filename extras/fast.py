"""Faster training on a CPU: the same losses and gradients, up to rounding, by other means.

  python train.py --adapter flora --fast

- The allocator keeps freed memory: asking Linux for the pages of each large tensor anew takes up to
  a seventh of a step.
- `BothWays`: W0 packed for oneDNN (extras/packed.py), once for x W0 and once for its gradient's
  product with W0ᵀ. In bfloat16 a frozen W0 is then rounded once, not in each step. Both copies stay
  beside the weights themselves.
- `OutputLoss`: the loss and its gradient a few rows at a time, so that no copy of all logits, in
  float32, is ever held.
- `CausalAttention`: in bfloat16, attention by plain matmuls, which torch's fused one for CPUs runs
  at half of their speed.

For one process on a CPU, without --compile. What it gains: RESULTS.md.
"""
import ctypes
from functools import partial

import torch
from torch.autograd import Function

import flora
import model as plain
from flora import BadInput
from train import WORLD

ROWS = 512        # of the logits that OutputLoss holds at once
QUERIES = 128     # of CausalAttention's blocks
LONGEST = 1024    # tokens up to which its probabilities are kept for the backward pass


def speed_up(model, args):
    """Change `model` in place, for train.py's flags -> the loss function that replaces loss_of."""
    if model.wte.weight.device.type != "cpu" or args.compile or WORLD > 1:
        raise BadInput("--fast is for one process on a CPU, without --compile; leave it out")
    keep_memory()
    dtype = getattr(torch, args.dtype)
    if dtype == torch.bfloat16:
        replace_attention(model)
    form = BothWays(dtype)
    for _, layer in flora.adapter_layers(model):
        if type(layer.form) is flora.Plain and not layer.weight.requires_grad:
            layer.form = form
    return partial(loss_of, dtype)


def keep_memory():
    """Have glibc serve all allocations from memory that it keeps; elsewhere nothing happens."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ------------------------------------------------------------------------------ frozen projections


def pack(weight):
    """weight [k, d] -> the same for `times`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def times(x, packed, bias=None):
    """x [..., d], a packed weight [k, d] -> x weightᵀ + bias [..., k] in the weight's dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class FrozenLinear(Function):
    """x [..., d] -> x W0 + bias, differentiable in x alone."""

    @staticmethod
    def forward(ctx, x, weight, transposed, bias):
        ctx.transposed, ctx.dtype = transposed, x.dtype
        return times(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        grad = times(grad.to(ctx.transposed.dtype), ctx.transposed)
        return grad.to(ctx.dtype), None, None, None


class BothWays(flora.Plain):
    """W0 packed in `dtype` for both directions, when a product first asks for some of its columns."""

    def __init__(self, dtype):
        self.dtype, self.packed = dtype, {}

    def product(self, layer, x, lo, hi, bias):
        columns = (layer, lo, hi)
        if columns not in self.packed:
            weight = layer.weight.detach()[lo:hi].to(self.dtype)
            self.packed[columns] = pack(weight), pack(weight.T)
        bias = None if bias is None else bias.to(self.dtype)
        return FrozenLinear.apply(x, *self.packed[columns], bias)


# ---------------------------------------------------------------------------------------- the loss


class OutputLoss(Function):
    """Mean cross-entropy of the logits x Eᵀ: x [n, C], E [vocab, C], targets int64 [n], of which
    -100 does not count -> [] in float32. Differentiable in x and E."""

    @staticmethod
    def forward(ctx, x, E, targets, dtype):
        counted = (targets != -100)[:, None]
        y, n = targets.clamp(min=0)[:, None], counted.sum()
        total, grad_x, grad_E = torch.zeros(()), torch.empty_like(x), None
        low = E.detach().to(dtype)
        if ctx.needs_input_grad[1]:
            grad_E = torch.zeros_like(E)
        for rows in torch.arange(len(x)).split(ROWS):
            rows = slice(rows[0], rows[-1] + 1)
            part = x[rows].to(dtype)
            logits = (part @ low.T).float()                                   # [ROWS, vocab]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(1, y[rows])) * counted[rows]).sum()
            grad = logits.sub_(log_sum).exp_()                                # probabilities
            grad.scatter_add_(1, y[rows], -torch.ones_like(log_sum))
            grad = grad.mul_(counted[rows] / n).to(dtype)
            grad_x[rows] = grad @ low
            if grad_E is not None:
                grad_E += grad.T @ part
        ctx.save_for_backward(grad_x, grad_E)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_E = ctx.saved_tensors
        return grad_x * grad, None if grad_E is None else grad_E * grad, None, None


def loss_of(dtype, model, x, y, adapter_ids):
    """train.loss_of by OutputLoss."""
    hidden = model.hidden(x, adapter_ids).flatten(0, 1)                       # [B T, C]
    return OutputLoss.apply(hidden, model.output.weight, y.flatten(), dtype)


# --------------------------------------------------------------------------------------- attention


def replace_attention(model):
    for block in model.blocks:
        for part in block.children():
            if isinstance(part, plain.Attention):
                part.attend = attend


def attend(q, k, v, mask=None):
    """model.attend, by CausalAttention in bfloat16 where it can."""
    B, H, T, D = q.shape
    if mask is not None or not q.requires_grad or T > LONGEST:
        return plain.attend(q, k, v, mask)
    with torch.autocast("cpu", enabled=False):
        return CausalAttention.apply(*(x.to(torch.bfloat16) for x in (q, k, v)))


class CausalAttention(Function):
    """q [B, H, T, D] over k, v [B, K, T, D] -> [B, H, T, D]. A block of queries at a time looks at
    the keys up to its end; the query heads of a key head are rows of one matmul."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, weights = torch.empty_like(q), []
        for rows, end in blocks(q.shape[2]):
            scores = heads(q[:, :, rows] * q.shape[-1]**-0.5, k) @ k[:, :, :end].mT
            masked = scores.view(*k.shape[:2], -1, rows.stop - rows.start, end)[..., rows.start:]
            masked += torch.full(masked.shape[-2:], float("-inf"), dtype=q.dtype).triu(1)
            weights.append(scores.softmax(-1))                      # [B, K, H / K * rows, end]
            out[:, :, rows] = (weights[-1] @ v[:, :, :end]).view(out[:, :, rows].shape)
        ctx.save_for_backward(q, k, v, out, *weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, *weights = ctx.saved_tensors
        grad, scale = grad.to(q.dtype), q.shape[-1]**-0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        through = (grad * out).sum(-1, keepdim=True)                # [B, H, T, 1]
        for (rows, end), p in zip(blocks(q.shape[2]), weights):
            g = heads(grad[:, :, rows], k)                          # [B, K, H / K * rows, D]
            grad_v[:, :, :end] += p.mT @ g
            ds = g @ v[:, :, :end].mT - heads(through[:, :, rows], k)
            ds = ds.mul_(p).mul_(scale)                             # [B, K, H / K * rows, end]
            grad_q[:, :, rows] = (ds @ k[:, :, :end]).view(grad_q[:, :, rows].shape)
            grad_k[:, :, :end] += ds.mT @ heads(q[:, :, rows], k)
        return grad_q, grad_k, grad_v


def blocks(T):
    """[(slice of queries, its end)]"""
    ends = [min(start + QUERIES, T) for start in range(0, T, QUERIES)]
    return [(slice(start, end), end) for start, end in zip(range(0, T, QUERIES), ends)]


def heads(x, k):
    """[B, H, rows, D] -> [B, K, H / K * rows, D], by the key heads of k."""
    return x.reshape(*k.shape[:2], -1, x.shape[-1])
