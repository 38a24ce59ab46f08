"""vLLM as a worker of extras/peers.py: imports vLLM and the standard library alone.

  PYTHONSAFEPATH=1 PYTHON_WITH_VLLM extras/peers_vllm.py SETTINGS

SETTINGS, a JSON object: model, a folder; dtype; loras, PEFT's folders, one for each request, or
none; their rank; requests, at most so many at once; length, tokens of each; threads. Once the model
is open, prints {"ready": vLLM's version}. Then, for each line of standard input, a JSON object of
prompts and new, decodes all prompts greedily and prints their new tokens. It ends with its input
and, since it may be stopped then, with the process that started it.
"""
import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1   # Linux's number
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)   # that vLLM can be opened for
CACHE = 2**28   # bytes of keys and values: five times what the Llama takes of 8 requests in float32


def open_vllm(settings):
    """-> (the package vllm, the engine, for each request its LoRA or for all None)"""
    cores = sorted(os.sched_getaffinity(0))[:settings["threads"]]
    os.environ |= dict(
        HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
        OMP_NUM_THREADS=str(len(cores)), VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)))
    import vllm
    from vllm.lora.request import LoRARequest
    loras = [LoRARequest(f"lora{i}", i, os.path.abspath(folder))
             for i, folder in enumerate(settings["loras"], 1)]
    more = {}
    if loras:
        rank = next(rank for rank in RANKS if rank >= settings["rank"])
        more = dict(enable_lora=True, max_loras=len(loras), max_lora_rank=rank)
    engine = vllm.LLM(
        settings["model"], dtype=settings["dtype"], max_model_len=settings["length"],
        max_num_seqs=settings["requests"], skip_tokenizer_init=True,
        enable_prefix_caching=False, kv_cache_memory_bytes=CACHE, **more)
    return vllm, engine, loras or None


def decode(vllm, engine, loras, prompts, new):
    """-> the new tokens of each prompt"""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    outputs = engine.generate([dict(prompt_token_ids=prompt) for prompt in prompts], sampling,
                              lora_request=loras, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)   # what vLLM prints goes to the log
    vllm, engine, loras = open_vllm(json.loads(sys.argv[1]))
    print(json.dumps(dict(ready=vllm.__version__)), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = decode(vllm, engine, loras, asked["prompts"], asked["new"])
        print(json.dumps(tokens), file=answers, flush=True)


if __name__ == "__main__":
    main()
