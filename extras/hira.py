"""HiRA (Huang et al., ICLR 2025): W_i = W0 ∘ (1 + B_i A_i).

  python train.py --adapter hira --rank 1

HiRA and FLoRA are one family; each is the other with one more component that does not train:

    1 + B A = [B, 1] [A; 1]                a HiRA of rank r is a FLoRA of rank r + 1
    B A / r = 1 + [B, 1] [A / r; -1]       a FLoRA of rank r is a HiRA of rank r + 1

So HiRA runs by Eq. 6 or Eq. 4 and mixes with every other kind in one batch, and a FLoRA opens in
PEFT, which has HiRA (extras/peft.py). As in PEFT, A starts as zeros and B at random.
"""
import torch
import torch.nn.functional as F

from flora import LoRA, LowRank


class HiRA(LowRank):
    """ΔW = 1 + B A, B [d, r] and A [r, hi - lo]; 1 outside of the columns [lo, hi)."""
    kind = "hira"
    learning_rate = 4.5e-3   # of PEFT's own benchmark (method comparison, Llama-3.2-3B)

    reset_parameters = LoRA.reset_parameters

    def scale(self, columns):
        lo, hi = self.columns
        return with_component(F.pad(self.A, (lo, columns - hi)), self.B, 1)


def with_component(A, B, value):
    """A [r, k], B [d, r] -> A [r + 1, k], B.T [r + 1, d]: one more component, value * 1ᵀ and 1."""
    return (torch.cat([A, torch.full_like(A[:1], value)]),
            torch.cat([B.T, torch.ones_like(B.T[:1])]))


def hira_of_flora(A, B):
    """The HiRA that a FLoRA A [r, k], B [d, r] is -> A [r + 1, k], B.T [r + 1, d]."""
    return with_component(A / len(A), B, -1)


def flora_of_hira(A, B):
    """The FLoRA that a HiRA A [r, k], B [d, r] is -> A [r + 1, k], B.T [r + 1, d]."""
    A, Bt = with_component(A, B, 1)
    return A * len(A), Bt


def flora_in_hira(A, B):
    """Undo hira_of_flora: HiRA's A [r + 1, k], B [d, r + 1] -> the FLoRA's A [r, k], B.T [r, d].

    None if its last component is another, so that it was not made from a FLoRA. A / r comes back
    bit for bit, A itself where r is a power of 2.
    """
    if len(A) == 1 or (A[-1] != -1).any() or (B[:, -1] != 1).any():
        return None
    return A[:-1] * (len(A) - 1), B.T[:-1]


ADAPTER = HiRA
