"""Ranks and targets: those that cannot be are refused."""
import pytest

import flora
from plumbing.files import BadInput
from test_flora import tiny_model


@pytest.mark.parametrize("kind,rank,targets,sentence", [
    ("dora", 1, None,
     "unknown adapter kind 'dora'; use one of flora, lora, ia3, or a kind that extras/ holds"),
    ("lora", 1, ["attn"], "unknown target 'attn'; use one of c_attn"),
    ("flora", 0, None, "rank is 0; use a whole number of at least 1"),
    ("lora", 1.5, None, "rank is 1.5; use a whole number"),
    ("lora", 10**30, None, "rank is 10.*; use a whole number"),
    ("flora", 1, ["wq"], "unknown target 'wq'; use one of c_attn, c_attn.qk.*or all"),
    ("flora", 1, ["q_proj"],
     "unknown target 'q_proj'; use one of c_attn, c_attn.qk, .*mlp.c_proj, or all"),
    ("flora", 1, ["c_attn", "c_attn.qk"], "adapt transformer.h.0.attn.c_attn twice"),
])
def test_adapters_that_cannot_be_are_refused_in_a_sentence(kind, rank, targets, sentence):
    with pytest.raises(BadInput, match=sentence):
        flora.add_adapter(tiny_model(), kind, rank, targets)
