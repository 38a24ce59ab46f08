"""HiRA (Huang et al., ICLR 2025): W_i = W0 ∘ (1 + B_i A_i).

  python train.py --adapter hira --rank 1

A FLoRA of rank r + 1 with one fixed component of ones: 1 + B A = [B, 1] [A; 1]. So it runs by Eq. 6
or Eq. 4 and mixes with every other kind in one batch. As in PEFT, A starts as zeros and B at random.
"""
import torch
import torch.nn.functional as F
from torch import nn

from flora import LowRank


class HiRA(LowRank):
    """ΔW = 1 + B A, B [d, r] and A [r, hi - lo]; 1 outside of the columns [lo, hi)."""
    kind = "hira"
    scales = True
    learning_rate = 4.5e-3   # of PEFT's own benchmark (method comparison, Llama-3.2-3B)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.kaiming_uniform_(self.B.T, a=5**0.5)

    def scale(self, columns):
        lo, hi = self.columns
        A, B = F.pad(self.A, (lo, columns - hi)), self.B.T                   # [r, columns], [r, d]
        return torch.cat([A, torch.ones_like(A[:1])]), torch.cat([B, torch.ones_like(B[:1])])


ADAPTER = HiRA
