"""The parts of extras/gpu.py that no other program measures; each runs in a process of its own.

  python -m extras.gpu_parts tokens --json out/gpu/tokens.json

tokens: whether all engines give the same tokens, on the GPU and on the CPU. graphs: a decoding step with CUDA graphs
and without. training: tokens/s, beside PEFT's where it is installed. memory: what a training of the 15B model takes.
"""
import argparse
import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import flora
import train
from extras.graphs import GraphEngine
from extras.int8 import quantize_int8
from generate import Engine
from model import GPT, model_from_config, preset
from plumbing.flags import EMBEDDED, Help, get_device, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import peak_memory
from plumbing.timing import synchronize

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny"
BLOCK = 8   # steps that are timed together, as a GPU's tokens are read together
BATCH = 8   # rows of a training step


def random_model(args, name, dtype):
    """A published size, or in a rehearsal the tiny one, with random weights."""
    if args.rehearse:
        return GPT.from_pretrained(TINY).requires_grad_(False)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(args.device):
            return model_from_config(preset(name)).requires_grad_(False)
    finally:
        torch.set_default_dtype(default_dtype)


def tokens(args):
    """The same requests, of seven adapters, by each engine in float32 -> of how many the tokens are the plain one's."""
    torch.manual_seed(0)
    model = GPT.from_pretrained(TINY if args.rehearse else EMBEDDED).requires_grad_(False)
    kinds = [("flora", 1), ("flora", 4), ("lora", 4), ("ia3", 1), ("hira", 2), ("ffba", 2)]
    for kind, rank in kinds:
        adapter_id = flora.add_adapter(model, kind, rank)
        for p in flora.adapter_parameters(model, adapter_id).values():
            p.data += 0.1 * torch.randn_like(p)
    prompts = torch.randint(1, model.config.vocab_size, (14, 7)).tolist()
    new = 12 if args.rehearse else 300   # beyond the first cache length of a graph

    def run(make, device, **settings):
        model.to(device)
        flora.freeze_bank(model)
        engine = make(model, 4, **settings)
        requests = [engine.submit(prompt, adapter_id=i % 7, max_new_tokens=new) for i, prompt in enumerate(prompts)]
        engine.run()
        return [request.ids for request in requests]

    plain, same = run(Engine, args.device), {}
    others = {"graphs": (GraphEngine, args.device, {}),
              "graphs, compiled": (GraphEngine, args.device, dict(compile=True)),
              "the CPU's engine": (Engine, "cpu", {})}
    for name, (make, device, settings) in others.items():
        try:
            ids = run(make, device, **settings)
        except Exception as e:   # of a machine without a compiler, for one
            same[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        else:
            same[name] = sum(a == b for a, b in zip(ids, plain))
    return dict(requests=len(prompts), new_tokens=new, same=same)


def graphs(args):
    """Milliseconds of a decoding step with CUDA graphs and without, in turns, medians: the base, and FLoRA r1."""
    model, slots, found = random_model(args, "starcoderbase-1b", torch.float16), 2 if args.rehearse else 32, {}
    new = (3 if args.rehearse else 16) * BLOCK
    for row in ("base", "flora r1"):
        for i in range(slots if row != "base" else 0):
            flora.add_adapter(model, "flora", 1)
        flora.freeze_bank(model)
        engines = {"plain": Engine(model, slots, length=4 + new), "graphs": GraphEngine(model, slots, length=4 + new)}
        for engine in engines.values():
            for i in range(slots):
                engine.submit([1, 2, 3, 4], adapter_id=i + 1 if row != "base" else 0, max_new_tokens=new)
        blocks = [{name: block_seconds(engine) for name, engine in engines.items()} for _ in range(new // BLOCK)]
        blocks = blocks[1:-1]   # the first runs prompts and captures, the last ends
        found[row] = {name: 1e3 * float(np.median([block[name] for block in blocks])) / BLOCK for name in engines}
    return dict(model=name_of(args, "starcoderbase-1b"), slots=slots, milliseconds=found)


def name_of(args, model):
    return "tiny" if args.rehearse else model


def block_seconds(engine):
    start = time.perf_counter()
    for _ in range(BLOCK):
        engine.step()
    synchronize(engine.device)
    return time.perf_counter() - start


def training(args):
    """Tokens/s of rank-1 adapters on c_attn of the 1B model, and of PEFT's LoRA where PEFT is installed."""
    model = random_model(args, "starcoderbase-1b", torch.bfloat16)
    rows = {}
    for kind in flora.KINDS:
        adapter_id = flora.add_adapter(model, kind, 1, ["c_attn"])
        rows[kind] = training_speed(args, model, flora.adapter_parameters(model, adapter_id), adapter_id)
        flora.remove_adapter(model, adapter_id)
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        rows["PEFT's lora"] = training_speed(args, *peft_model(model.config, model.wte.weight))
    return dict(model=name_of(args, "starcoderbase-1b"), batch_size=BATCH, block_size=block_of(args),
                tokens_per_second=rows)


def block_of(args):
    return 16 if args.rehearse else 256


def peft_model(config, like):
    """PEFT's LoRA on transformers' model of the same sizes -> (model, {name: Parameter})."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPTBigCodeConfig
    sizes = {name: getattr(config, name) for name in
             ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function")}
    with like.device:
        base = AutoModelForCausalLM.from_config(GPTBigCodeConfig(**sizes, multi_query=True)).to(like.dtype)
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["c_attn"], task_type="CAUSAL_LM")).train()
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_speed(args, model, parameters, adapter_id=None, block=None, steps=None):
    """Tokens/s of steps of train.fit, of which the first two warm up. Without an adapter_id the model is PEFT's."""
    block, steps = block or block_of(args), steps or (2 if args.rehearse else 10)
    device, optimizer = next(iter(parameters.values())).device, train.adamw(parameters.values())
    loop = SimpleNamespace(grad_accum=1, dtype="float32" if args.rehearse else "bfloat16")
    words = torch.randint(0, 300, (BATCH, block + 1))

    def loss(model, x, y):
        if adapter_id is None:
            return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1).float(), y.flatten())
        return train.loss_of(model, x, y, train.row_ids(adapter_id, len(x), x.device))

    for step in range(2 + steps):
        if step == 2:
            synchronize(device)
            start = time.perf_counter()
        train.backward(model, lambda step, micro: (words[:, :-1], words[:, 1:]), loss, step, loop)
        train.update(optimizer, parameters, 1e-3, 1.0)
    synchronize(device)
    return steps * BATCH * block / (time.perf_counter() - start)


def memory(args):
    """Gigabytes at most while the 15B base is made int8, and in training steps of the recipe in RESULTS_APPENDIX.md."""
    model = random_model(args, "starcoder", torch.bfloat16)
    quantize_int8(model)
    device, model.gradient_checkpointing = model.wte.weight.device, True
    loading = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    adapter_id = flora.add_adapter(model, "flora", 1, ["c_attn.qk"])
    speed = training_speed(args, model, flora.adapter_parameters(model, adapter_id), adapter_id,
                           block=16 if args.rehearse else 1024, steps=1)
    return dict(loading_gb=loading / 1e9, training_gb=peak_memory(device) / 1e9, tokens_per_second=speed)


PARTS = {"tokens": tokens, "graphs": graphs, "training": training, "memory": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("part", choices=list(PARTS), help="what is measured")
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--json", metavar="FILE", required=True, help="write the results there as JSON")
    args = parser.parse_args()
    get_device(args.device)
    check_writable(args.json, "--json", JSON, make_folder=True)
    write_json(args.json, PARTS[args.part](args))


if __name__ == "__main__":
    run_main(main)
