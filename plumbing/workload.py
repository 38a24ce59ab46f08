"""The requests that bench.py serves: lengths like those of the paper's sample of ShareGPT."""
import numpy as np

from plumbing.files import BadInput
from plumbing.registry import extra
from plumbing.tokenizer import Tokenizer


def synthetic_lengths(n, seed):
    """n (prompt, output) lengths of 50 to 2,000 tokens together; log-normal, with the means that
    the paper's ShareGPT sample is known for, about 161 and 338."""
    rng, lengths = np.random.default_rng(seed), []
    while len(lengths) < n:
        prompt, output = np.maximum(1, rng.lognormal([4.588, 5.502], [1.05, 0.9]).astype(int))
        if 50 <= prompt + output <= 2000:
            lengths.append((int(prompt), int(output)))
    return lengths


def make_workload(args, config):
    """[(prompt ids, number of new tokens)], lengths scaled by --scale."""
    if args.dataset:
        tokenizer = None if args.random_weights else Tokenizer(args.weights)
        more = extra("bench_more", "--dataset")
        pairs = more.dataset_prompts(args.dataset, args.num_requests, args.seed, tokenizer)
    else:
        pairs = synthetic_lengths(args.num_requests, args.seed)
    rng, workload = np.random.default_rng(args.seed), []
    for prompt, output in pairs:
        if isinstance(prompt, int):   # a length alone
            prompt = rng.integers(0, config.vocab_size, prompt).tolist()
        length = max(1, round(len(prompt) * args.scale))
        workload.append((prompt[:length], max(1, round(output * args.scale))))
    longest = max(len(prompt) + output for prompt, output in workload)
    if longest > config.n_positions:
        fits = 0.99 * args.scale * config.n_positions / longest
        raise BadInput(f"--scale {args.scale}: the longest request has {longest} tokens, more than "
                       f"the model's context of {config.n_positions}; use --scale {fits:.2g}")
    return workload
