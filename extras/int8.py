"""An 8-bit base (App. A): the projections as whole numbers with a scale per output, weight-only.

  python train.py --adapter flora --quantize int8 ...        generate.py and bench.py likewise

Rounded to nearest; activations and matmul keep their dtype. Adapters train on it, and backward
makes W0 from its int8 values again instead of keeping a float copy of every layer.
"""
import torch
import torch.nn.functional as F
from torch import nn

from flora import Plain, adapter_layers


class Int8Matmul(torch.autograd.Function):
    """x [..., d] @ W0, for values int8 [k, d] and scale [k] -> [..., k] in x's dtype."""

    @staticmethod
    def forward(ctx, x, values, scale):
        ctx.save_for_backward(values, scale)
        ctx.dtype = x.dtype
        y = F.linear(x, values.to(x.dtype))
        return y * scale.to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        values, scale = ctx.saved_tensors
        return ((grad * scale.to(grad.dtype)) @ values.to(grad.dtype)).to(ctx.dtype), None, None


class Int8(Plain):
    """The form of a layer whose weight is int8 [k, d]; scale [k], in the dtype that the weight had."""

    def __init__(self, scale):
        self.scale = scale

    def product(self, layer, x, lo, hi, bias):
        y = Int8Matmul.apply(x, layer.weight[lo:hi], self.scale[lo:hi])
        return y if bias is None else y + bias

    def W0(self, layer):
        return layer.weight.T * self.scale


@torch.no_grad()
def quantize_int8(model):
    """Hold the projections of the base as int8. Adapters, embeddings and norms stay as they are."""
    model.fingerprint  # read before the weights change: adapters belong to the model as it was stored
    for _, layer in adapter_layers(model):
        scale = layer.weight.abs().amax(1).float() / 127                      # [k]
        values = (layer.weight / scale[:, None]).round().to(torch.int8)
        layer.form = Int8(scale.to(layer.weight.dtype))
        layer.weight = nn.Parameter(values, requires_grad=False)
