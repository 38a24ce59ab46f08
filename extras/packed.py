"""W0 packed for oneDNN: faster decoding on a CPU, at the cost of a second copy of W0.

  python generate.py --dtype auto --prompt 'def f('       bfloat16 where this processor gains by it

PyTorch's CPU matmul repacks W0 in each call, and in float32 (MKL) keeps to AVX2 on an AMD CPU; a W0
packed once spares the few rows of a decoding step that work where d and k are large. generate.py
and bench.py serve with it by default (GPT.pack), in float32, and in bfloat16 where the processor
computes in it. Training, gradients and torch.compile use the plain product. The operators,
torch.ops.mkldnn, are not a public interface of PyTorch.
"""
import torch
import torch.nn.functional as F

from flora import adapter_layers
from model import ACTIVATIONS, MLP, attend


def pack_weight(weight):
    """weight [k, d] -> the same as oneDNN wants it, for times_packed."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def times_packed(x, weight, bias=None):
    """x [..., d], a packed or plain weight [k, d] of its dtype -> x weightᵀ + bias [..., k]."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class Copies(dict):
    """{(lo, hi): (a weight, its address and version, its rows [lo, hi) packed)}. Copied or pickled it
    is empty: oneDNN's tensors allow neither."""

    def __reduce__(self):
        return Copies, ()


class PackedLinear:
    """F.linear(x, weight[lo:hi], bias) by packed copies of one weight, made at first use and again
    when it has changed. A subclass may pack and multiply otherwise (extras/int8.py)."""

    def __init__(self):
        self.copies = Copies()

    def __call__(self, x, weight, bias=None, lo=0, hi=None):
        packed = self.copy(weight, lo, hi)
        if packed is None:
            return F.linear(x, weight[lo:hi], bias)
        return self.times(x, packed, bias)

    def copy(self, weight, lo=0, hi=None):
        """The packed copy of weight[lo:hi]; None where the plain product is to be taken."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        now = weight.data_ptr(), weight._version
        held, then, packed = self.copies.get((lo, hi), (None, None, None))
        if held is not weight or then != now:
            if weight.device.type != "cpu":   # moved there after it served on a CPU
                return None
            packed = self.pack(weight.detach(), lo, hi)
            self.copies[lo, hi] = weight, now, packed
        return packed

    def pack(self, weight, lo, hi):
        return pack_weight(weight[lo:hi])

    def times(self, x, packed, bias):
        return times_packed(x, packed, bias)


class Packed:
    """The form of a layer whose products are PackedLinears: of its weight, and of one that is made
    from it (extras/ffba.py)."""

    def __init__(self):
        self.linear, self.times = PackedLinear(), PackedLinear()

    def product(self, layer, x, lo, hi, bias):
        return self.linear(x, layer.weight, bias, lo, hi)

    def W0(self, layer):
        return layer.weight.T


GELUS = {ACTIVATIONS["gelu_pytorch_tanh"]: "tanh", ACTIVATIONS["gelu"]: "none"}   # in oneDNN's words


class GeluMLP(MLP):
    """model.MLP, its GELU being the last step of c_fc's product, where no adapter comes between."""

    def forward(self, x, adapters):
        c_fc, packed = self.c_fc, None
        if type(c_fc.form) is Packed and self.activation in GELUS and c_fc not in (adapters or {}):
            packed = c_fc.form.linear.copy(c_fc.weight)
        if packed is None:
            return super().forward(x, adapters)
        h = torch.ops.mkldnn._linear_pointwise.default(x, packed, c_fc.bias, "gelu", [],
                                               GELUS[self.activation])
        return self.c_proj(h, adapters)


def attend_to_cache(q, k, v, mask=None):
    """model.attend, with one token, q [B, H, 1, D], by torch's fused attention: the query heads of a
    key head are its rows, so that keys and values are not copied. Not for float16, where the fused
    one takes an overflow for a masked key."""
    B, H, T, D = q.shape
    if T > 1 or mask is None:
        return attend(q, k, v, mask)
    q = q.reshape(B, k.shape[1], -1, D)                                       # [B, K, H / K, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, 1, D)


def computes_bfloat16():
    """Whether this processor multiplies in bfloat16 (AVX512_BF16; those with AMX have it too).
    Elsewhere a bfloat16 weight is widened in each product, and float32 is the faster one."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def packs_bfloat16():
    """Whether oneDNN takes weights in bfloat16 here at all: it wants AVX-512."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(device):
    """--dtype auto: the fastest dtype to serve in on a torch.device, and why."""
    if device.type != "cpu":
        return "bfloat16", f"as this is {device.type}"
    if computes_bfloat16():
        return "bfloat16", "as this processor multiplies in it (AVX512_BF16)"
    return "float32", "as this processor does not multiply in bfloat16 (AVX512_BF16)"


def pack(model):
    """Serve with packed weights and attend_to_cache where that is faster: on a CPU, in a dtype that
    it computes in, W0 and the output embedding held plainly, attention not by plain math."""
    weight = model.wte.weight
    dtypes = [torch.float32, torch.bfloat16] if computes_bfloat16() else [torch.float32]
    if weight.device.type != "cpu" or weight.dtype not in dtypes:
        return
    for attention in model.attentions():
        if attention.attend is attend:
            attention.attend = attend_to_cache
    if not torch.backends.mkldnn.is_available() or isinstance(model.times_output, PackedLinear):
        return
    model.times_output = PackedLinear()
    for _, layer in adapter_layers(model):
        if layer.form is None:
            layer.form = Packed()
    for mlp in model.modules():
        if type(mlp) is MLP:
            mlp.__class__ = GeluMLP
