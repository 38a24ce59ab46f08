"""Seconds of a function, and the limits of the device that they are held against."""
import time

import numpy as np
import torch

BYTES = 1 << 28   # of the tensors that memory bandwidth is measured with


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(f, device, repeats=7):
    """Median seconds of f(), called often enough for a clock; untimed first calls warm up. One that
    takes seconds is called three times in all."""
    def timed(calls):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            f()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    once = timed(1)
    if once > 1:
        return min(timed(1), timed(1))
    timed(1)
    calls = max(1, min(100, int(0.01 / max(timed(1), 1e-6))))
    return float(np.median([timed(calls) for _ in range(repeats)]))


@torch.inference_mode()
def measure_limits(device, dtype):
    """The device's bytes/s (the better of a copy and a sum) and FLOP/s (of a large matmul)."""
    a = torch.ones(BYTES // dtype.itemsize, dtype=dtype, device=device)
    b = torch.empty_like(a)
    copied = 2 * BYTES / seconds(lambda: b.copy_(a), device)
    summed = BYTES / seconds(lambda: a.sum(), device)
    n = 8192 if device.type == "cuda" else 1024
    square = torch.randn(n, n, device=device).to(dtype)
    return max(copied, summed), 2 * n**3 / seconds(lambda: square @ square, device)


def seconds_on_one_thread(f, device):
    """Median seconds of f() when it may use one core alone; None where it uses no more anyway."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return None
    torch.set_num_threads(1)
    try:
        return seconds(f, device)
    finally:
        torch.set_num_threads(threads)


def tell_of_threads(several, one):
    """Say so where a decoding step of `several` seconds would take `one`, fewer, on one core."""
    if one and several > 1.2 * one:
        print(f"A decoding step takes {1e3 * several:.1f} ms on {torch.get_num_threads()} threads "
              f"and {1e3 * one:.1f} on one: other programs hold cores that it waits for, or the "
              "model is small. On one core this is faster: OMP_NUM_THREADS=1 python bench.py ...",
              flush=True)


@torch.inference_mode()
def share_of_limits(model, weights, slots, bandwidth, flops):
    """Both limits, and the base's share of them in decoding and prefilling `slots` requests; says so
    where one thread decodes faster than all. weights: of the projections."""
    device, T = model.wte.weight.device, min(256, model.config.n_positions // 2)
    ids = torch.zeros(slots, T, dtype=torch.int64, device=device)
    cache, position = model.new_kv_cache(slots, T + 1), torch.full((slots, 1), T, device=device)

    def step():
        model(ids[:, :1], None, cache, position)

    decode, one = seconds(step, device), seconds_on_one_thread(step, device)
    tell_of_threads(decode, one)
    prefill = seconds(lambda: model.hidden(ids, None, cache[:, :, :, :, :T]), device)
    read = [*weights, model.wte.weight, cache]   # wte is the output's matrix, or as large
    decode_bytes = sum(tensor.numel() * tensor.element_size() for tensor in read)
    prefill_flops = 2 * slots * T * sum(weight.numel() for weight in weights)
    return dict(bandwidth_gb_s=bandwidth / 1e9, matmul_gflop_s=flops / 1e9,
                decode_batch=slots, decode_ms=1e3 * decode,
                decode_ms_on_one_thread=1e3 * one if one else None,
                decode_share_of_bandwidth=decode_bytes / decode / bandwidth,
                prefill_tokens=slots * T, prefill_ms=1e3 * prefill,
                prefill_share_of_matmul=prefill_flops / prefill / flops)
