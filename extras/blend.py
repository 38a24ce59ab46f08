"""Blends: several adapters in one request, each with a weight.

  python generate.py --prompt 'sub f {' --adapter 'perl.safetensors*0.7 + cpp.safetensors*0.3'

    from extras.blend import blend
    i = blend(model, {perl: 0.7, cpp: 0.3})     # an adapter id, beside those of its parts

A blend adds up what its parts change, each times its weight s_i:

    W = W0 + Σ_i s_i (W_i - W0) = W0 ∘ (1 + Σ_i s_i (ΔW_i - 1)) + Σ_i s_i ΔL_i

where part i multiplies W0 by ΔW_i (FLoRA, IA3, HiRA) or adds ΔL_i (LoRA); a bias is summed likewise.
One part of weight s is that adapter at another strength: 0 is the base model, 1 the adapter itself, bit
for bit. Weights may be negative, and need not sum to 1.

Factors are concatenated, so a blend is one more row of the bank, and mixes with all others in a batch. Its
rank is the sum of its parts' ranks, and one more for the identity unless the multiplicative parts' weights
sum to 1. Other rows of the bank are padded to that rank.

Others call it task arithmetic (Ilharco et al., ICLR 2023), LoRA composition (LoraHub, Huang et al., COLM
2024), PEFT's add_weighted_adapter with "cat". For one layer it is the same as merging the weighted adapters
into W0 before: the layer is linear in its weight. The model is not, so two half adapters are not half of
each one's effect on the text. A kind that is no sum of such terms (FFBA) is refused.
"""
import math
import re

import torch
import torch.nn.functional as F

import flora
from flora import BASE, Adapter
from plumbing.files import BadInput

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
TERM = re.compile(rf"\s*(?P<name>.+?)\s*\*\s*(?P<weight>{NUMBER})\s*(?:\+|$)")
LARGEST = 100   # weight, either sign: any more is a mistake, and soon overflows


class Blend(Adapter):
    """The weighted parts of one layer. They stay shared with the adapters they are, and are no parameters
    of the blend; one that is later removed from the model lives on in it."""
    kind = "blend"

    def __init__(self, parts):
        """parts: [(weight, Adapter)], at least one, all of the same layer; weight 0 counts for nothing."""
        first = parts[0][1]
        super().__init__(sum(part.rank for _, part in parts), first.target, first.d, None,
                         (min(part.columns[0] for _, part in parts), max(part.columns[1] for _, part in parts)))
        self.parts = [(weight, part) for weight, part in parts if weight]

    def scale(self, columns):
        """1 + Σ s_i (ΔW_i - 1) = Σ s_i ΔW_i + (1 - Σ s_i): A [R, columns], B [R, d]; None twice without a part."""
        found = self.of_parts(lambda part: part.scale(columns))
        if not found:
            return None, None
        A, B = [weight * A for weight, (A, _) in found], [B for _, (_, B) in found]
        if rest := rest_of(found):
            A.append(torch.full_like(A[0][:1], rest))
            B.append(torch.ones_like(B[0][:1]))
        return torch.cat(A), torch.cat(B)

    def added(self, k):
        """Σ s_i ΔL_i: A [R, k], B [R, d]; None twice without a part."""
        found = self.of_parts(lambda part: part.added(k))
        if not found:
            return None, None
        return torch.cat([weight * A for weight, (A, _) in found]), torch.cat([B for _, (_, B) in found])

    def bias(self, bias):
        """bias [k] -> bias + Σ s_i (bias_i - bias) [k]; None if no part changes it."""
        found = self.of_parts(lambda part: part.bias(bias))
        if not found:
            return None
        return sum(weight * changed for weight, changed in found) + rest_of(found) * bias

    def of_parts(self, what):
        """[(weight, what(part))] of the parts for which it is neither None nor a pair of it."""
        found = [(weight, what(part)) for weight, part in self.parts]
        return [(weight, value) for weight, value in found if value is not None and value[0] is not None]

    @classmethod
    def to_save(cls, model, adapters):
        """{layer name: Blend} as one kind that a file can hold -> {layer name: FLoRA or LoRA}, equal within
        1e-6; BadInput if it takes two, or a kind whose biases no FLoRA has."""
        factors, targets, kind = {}, {}, kind_of(model, adapters)
        for name, mine in adapters.items():
            lo, hi = mine.columns
            A, B = mine.scale(hi) if kind == "flora" else mine.added(hi)
            used = A[:, lo:].any(1)
            factors[name] = A[used, lo:], B[used]
            # the target of the part that is as wide as all of them
            wide = [part.target for _, part in mine.parts if part.columns == mine.columns]
            if not wide:
                raise BadInput(f"a blend adapts {name} by targets none of which holds the others; "
                               "it cannot be saved, only served")
            targets[wide[0]] = True
        rank = max(len(A) for A, _ in factors.values())
        made = flora.make_adapters(model, kind, rank, list(targets), alpha=rank)
        if made.keys() != adapters.keys():
            raise BadInput("a blend adapts some layers of a target and not others; it cannot be saved, only served")
        with torch.no_grad():
            for name, (A, B) in factors.items():
                A = A * rank if kind == "flora" else A         # FLoRA.scale divides it; LoRA's alpha / rank is 1
                made[name].A.copy_(F.pad(A, (0, 0, 0, rank - len(A))))
                made[name].B.copy_(F.pad(B, (0, 0, 0, rank - len(B))).T)
        return made


def rest_of(found):
    """1 - the sum of the weights of [(weight, ...)]: the identity's weight, 0 but for rounding being 0."""
    rest = 1 - math.fsum(weight for weight, _ in found)
    return 0.0 if abs(rest) < 1e-12 else rest


def kind_of(model, adapters):
    """"flora" or "lora", which can hold all of {layer name: Blend}, or BadInput."""
    multiplied = added = biases = False
    for name, mine in adapters.items():
        layer = model.get_submodule(name)
        multiplied |= mine.scale(layer.out_features)[0] is not None
        added |= mine.added(layer.out_features)[0] is not None
        biases |= mine.bias(layer.bias) is not None
    if biases or multiplied == added:
        why = "it changes nothing" if not (multiplied or added) else (
            "it changes biases, as IA3 does" if biases else "it multiplies and adds")
        raise BadInput(f"a blend can be saved where a FLoRA or a LoRA alone holds it; not this one: {why}")
    if any(not mine.parts for mine in adapters.values()):
        raise BadInput("a blend of which a part has the weight 0 cannot be saved; leave that part out")
    return "flora" if multiplied else "lora"


def blend(model, weights):
    """Add the blend {adapter id: weight} to a model -> its adapter id, as flora.add_adapter's.

    The base (id 0) may be among them and counts for nothing; a blend of it alone is the base. BadInput
    for an unknown id, a weight that is not a number within LARGEST, a kind that is no sum.
    """
    parts = {}
    for i, weight in weights.items():
        check_weight(i, weight)
        for name, part in flora.adapters_of(model, i).items() if i != BASE else ():
            kind = type(part)
            if kind.scale is Adapter.scale and kind.added is Adapter.added and kind.bias is Adapter.bias:
                raise BadInput(f"adapter {i} is of the kind {part.kind}, which is no sum of components and "
                               "cannot be blended; use it alone")
            parts.setdefault(name, []).append((float(weight), part))
    if not parts:
        return BASE
    return flora.attach(model, {name: Blend(found) for name, found in parts.items()})


def check_weight(name, weight):
    if type(weight) not in (int, float) or not abs(weight) <= LARGEST:
        raise BadInput(f"the weight of {name} in a blend is {weight!r}; use a number from -{LARGEST} to {LARGEST}")


# ------------------------------------------------------------------------------ files with weights


def parse(text):
    """'FILE*0.7 + FILE*0.3' -> {FILE: weight}; a file named twice has the sum. BadInput otherwise."""
    weights, end = {}, 0
    while end < len(text) or not weights:
        term = TERM.match(text, end)
        if term is None or (term.end() == len(text)) == term[0].endswith("+"):
            raise BadInput(f"{text}: no such adapter file, and no blend; write FILE*WEIGHT + FILE*WEIGHT")
        name, end = term["name"], term.end()
        weights[name] = weights.get(name, 0.0) + float(term["weight"])
    return weights


def load(model, weights, loaded):
    """Add the blend {file: weight}, or such a text for parse(), to a model -> its adapter id.

    loaded: {file: adapter id} of what the model has already; files that it lacks are loaded and entered.
    """
    weights = parse(weights) if isinstance(weights, str) else weights
    for name, weight in weights.items():   # before the work of loading
        check_weight(name, weight)
    for name in weights:
        if name not in loaded:
            loaded[name] = flora.load_adapter(model, name)
    return blend(model, {loaded[name]: weight for name, weight in weights.items()})
