"""An 8-bit base (App. A): the projections as whole numbers with a scale per output.

  python train.py --adapter flora --quantize int8 ...        generate.py and bench.py likewise
  python generate.py --quantize int8-dynamic ...             what goes in is rounded too: faster

int8 is weight-only: rounded to nearest; activations and matmul keep their dtype. Adapters train on
it, and backward makes W0 from its int8 values again instead of keeping a float copy of every layer.

int8-dynamic, when serving on an x86 CPU, also rounds each row of a product's input to 8 bits, by the
row's own largest value, so that no row depends on what is beside it, and holds the output embedding
likewise. The products are whole numbers' (FBGEMM's, by operators that are not a public interface of
PyTorch). It holds each weight twice, in two bytes. With gradients it is weight-only.
"""
import threading
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from flora import adapter_layers
from plumbing.files import BadInput


from .packed import PackedLinear, times_packed

FEW_ROWS = 6   # up to which torch._weight_int8pack_mm is the faster one (Zen 4, bfloat16)


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


def serving(x):
    """Whether a product of x may take operators of the CPU that neither gradients, torch.compile nor
    autocast know."""
    aside = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not aside and not torch.is_autocast_enabled("cpu")


def serve_int8(x, values, scale):
    """Int8Matmul's product on a CPU, for x in float32, bfloat16 or float16."""
    if x.dtype == scale.dtype == torch.bfloat16 and x.numel() <= FEW_ROWS * x.shape[-1]:
        y = torch._weight_int8pack_mm(x.flatten(0, -2), values, scale)
        return y.view(*x.shape[:-1], -1)
    W0 = made(values, x.dtype)
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        y = times_packed(x, W0)
    else:
        y = F.linear(x, W0)
    return y * scale


room = threading.local()   # one tensor for each dtype, in which W0 is made for one product


def made(values, dtype):
    """values in `dtype`, until the next call in this thread. In memory that is new each time the
    system's pages cost more than the product."""
    kept = vars(room).setdefault("kept", {})
    if dtype not in kept or kept[dtype].numel() < values.numel():
        with torch.inference_mode(False):
            kept[dtype] = torch.empty(values.numel(), dtype=dtype)
    return kept[dtype][:values.numel()].view(values.shape).copy_(values)


class Int8:
    """The form of a layer whose weight is int8 [k, d]; scale [k], in the dtype that the weight had."""

    def __init__(self, scale):
        self.scale = scale

    def product(self, layer, x, lo, hi, bias):
        times = serve_int8 if serving(x) else Int8Matmul.apply
        y = times(x, layer.weight[lo:hi], self.scale[lo:hi])
        return y if bias is None else y + bias

    def W0(self, layer):
        return layer.weight.T * self.scale


def round_rows(weight):
    """[k, d] -> (int8 values [k, d], scale [k], float32)."""
    scale = weight.abs().amax(1).float() / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class DynamicLinear(PackedLinear):
    """x weightᵀ + bias in whole numbers of 8 bits, each row of x rounded by its own largest value.
    weight: int8 [k, d] and its scale [k], or floating point."""

    # On either side of zero. AVX2 alone adds pairs of products in 16 bits: 2 x 127 x 127 just fit
    LEVELS = 127 if torch.cpu._is_vnni_supported() else 63

    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale

    def pack(self, weight, lo, hi):
        values, scale = (weight, self.scale) if weight.dtype == torch.int8 else round_rows(weight)
        values, scale = values[lo:hi].contiguous(), scale[lo:hi].double()
        engine = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = "fbgemm"
            with warnings.catch_warnings():   # of these operators' age
                warnings.simplefilter("ignore")
                zero = torch.zeros(len(scale), dtype=torch.int64)
                weight = torch._make_per_channel_quantized_tensor(values, scale, zero, 0)
                return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = engine

    def times(self, x, packed, bias):
        dtype, x = x.dtype, x.float()
        largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
        # a row of zeros is 0 / 0 here, rounded to some number, and 0 again in the end
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / self.LEVELS, self.LEVELS + 1, packed)
        y = y * largest if bias is None else torch.addcmul(bias, y, largest)
        return y.to(dtype)


class Int8Dynamic(Int8):
    """The form of a layer that serves by a DynamicLinear."""

    def __init__(self, scale):
        super().__init__(scale)
        self.linear = DynamicLinear(scale)

    def product(self, layer, x, lo, hi, bias):
        if serving(x):
            return self.linear(x, layer.weight, bias, lo, hi)
        return super().product(layer, x, lo, hi, bias)


@torch.no_grad()
def quantize_int8(model, dynamic=False):
    """Hold the projections of the base as int8. Adapters, embeddings and norms stay as they are.

    dynamic: as int8-dynamic does. BadInput where that cannot be had."""
    if dynamic and not can_be_dynamic(model.wte.weight.device):
        raise BadInput("--quantize int8-dynamic needs an x86 CPU; use --quantize int8")
    if any(layer.weight.dtype == torch.int8 for _, layer in adapter_layers(model)):
        raise BadInput("the base is int8 already; load it anew to hold it in another form")
    model.fingerprint  # read before the weights change: adapters belong to the model as it was stored
    for _, layer in adapter_layers(model):
        values, scale = round_rows(layer.weight)
        layer.form = (Int8Dynamic if dynamic else Int8)(scale.to(layer.weight.dtype))
        layer.weight = nn.Parameter(values, requires_grad=False)
    if dynamic:
        model.times_output = DynamicLinear()


def can_be_dynamic(device):
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
