"""What tells a base model from others: digests of its weights, whatever the dtype of a load."""
import hashlib

import torch


def fingerprints(parameters):
    """{name: tensor} -> two times 16 hexadecimal digits: from all their values, and, as in older
    adapter files, from a sample of 64 of each tensor."""
    return digests_of({name: sample(p.detach()) for name, p in parameters.items()})


def digests_of(samples):
    """{name: of `sample`} -> the fingerprints."""
    whole, sampled = hashlib.sha256(), hashlib.sha256()
    for name in sorted(samples):
        picked, total = samples[name]
        sampled.update(name.encode() + picked)
        whole.update(name.encode() + picked + total)
    return whole.hexdigest()[:16], sampled.hexdigest()[:16]


def sample(tensor):
    """64 values spread over a tensor, with its shape; and a sum over the bits of all its values as
    float32, each row's times the row's number."""
    flat = tensor.reshape(-1)
    picked = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()]
    matrix, total = tensor.reshape(len(tensor), -1), 0
    columns = matrix.shape[1]
    some = matrix.new_zeros(64, columns + columns % 2, dtype=torch.float32)   # rows at a time
    for start in range(0, len(matrix), 64):
        part = matrix[start:start + 64]
        some[:len(part), :columns] = part
        rows = some[:len(part)].view(torch.int64).sum(1)   # two values of 32 bits as one of 64
        total += (rows * (1 + start + torch.arange(len(rows), device=rows.device))).sum()
    return (str(list(tensor.shape)).encode() + picked.float().cpu().numpy().tobytes(),
            str(int(total)).encode())
