"""How fast adapters train, beside PEFT.

  python -m extras.peers_training --weights base --json out/training.json

Needs transformers and peft, which this project does not: an environment of their own, with
  pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 -r requirements.txt

Rank-1 adapters on c_attn, --batch-size windows of --block-size random tokens, AdamW. Every row is a
process of its own, since --fast changes the allocator of the whole process; they are run in turns,
--repeats times each. Prints tokens/s, median [lowest-highest], its ratio to PEFT's LoRA in the same
dtype, and peak memory. All must find the same loss at their first step, the base model's.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flora
import train
from extras import fast
from extras.results import beside_peft as table_of
from model import GPT, read_config
from plumbing.files import BadInput
from plumbing.flags import Help, check_numbers, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import peak_memory, provenance

ROWS = ["PEFT's LoRA", "LoRA", "FLoRA", "IA3", "LoRA --fast", "FLoRA --fast", "IA3 --fast"]
WARM_UP = 2   # steps


def our_step(args, name):
    """-> (loss(x, y), what trains)"""
    model = GPT.from_pretrained(args.weights).requires_grad_(False)
    adapter_id = flora.add_adapter(model, name.split()[0].lower(), 1, ["c_attn"])
    loss, ids = train.loss_of, torch.full((args.batch_size,), adapter_id)
    if name.endswith("--fast"):
        loss = fast.speed_up(model, SimpleNamespace(compile=False, dtype=args.dtype))
    parameters = flora.adapter_parameters(model, adapter_id).values()
    return lambda x, y: loss(model, x, y, ids), list(parameters)


def peft_step(args):
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise BadInput(f"{e.name} is not installed; the top of extras/peers_training.py says how") from e
    base = AutoModelForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
    config = LoraConfig(r=1, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()

    def loss(x, y):
        return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1).float(), y.flatten())
    return loss, [p for p in model.parameters() if p.requires_grad]


def run_row(args):
    """One row in this process; prints its figures as JSON."""
    loss, parameters = peft_step(args) if args.row == ROWS[0] else our_step(args, args.row)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    torch.manual_seed(args.seed)
    tokens = torch.randint(0, args.vocab, (args.batch_size, args.block_size + 1))
    losses = []
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        with train.autocast(torch.device("cpu"), args.dtype):
            value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
    rate = args.steps * args.batch_size * args.block_size / (time.perf_counter() - begin)
    print(json.dumps(dict(tokens_per_second=rate, first_loss=losses[0],
                          peak_memory_bytes=peak_memory(torch.device("cpu")))))


def measure(args, name, dtype):
    """run_row in a process."""
    flags = ["--row", name, "--dtype", dtype, "--weights", str(Path(args.weights).resolve())]
    for flag in ("steps", "batch_size", "block_size", "vocab", "seed"):
        flags += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    done = subprocess.run([sys.executable, "-m", "extras.peers_training", *flags],
                          capture_output=True, text=True, cwd=Path(train.__file__).parent)
    if done.returncode:
        raise BadInput(f"{name}, {dtype}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args):
    check_writable(args.json, "--json", JSON)
    cases = [(name, dtype) for dtype in args.dtypes for name in ROWS]
    found = {case: [] for case in cases}
    for case in tqdm(cases * args.repeats, unit="run"):
        found[case].append(measure(args, *case))
    rows = [summary(found, *case) for case in cases]
    check_losses(rows)
    settings = {name: getattr(args, name) for name in
                ("weights", "batch_size", "block_size", "steps", "repeats")}
    data = provenance() | dict(rows=rows, **settings)
    print(table_of(data))
    if args.json:
        write_json(args.json, data)


def summary(found, name, dtype):
    """The medians of one row; ratio: of the rates in the same round, their median."""
    rates = [run["tokens_per_second"] for run in found[name, dtype]]
    peft = [run["tokens_per_second"] for run in found[ROWS[0], dtype]]
    return dict(name=name, dtype=dtype, tokens_per_second=statistics.median(rates),
                tokens_per_second_min=min(rates), tokens_per_second_max=max(rates),
                ratio=statistics.median(ours / theirs for ours, theirs in zip(rates, peft)),
                first_loss=found[name, dtype][0]["first_loss"],
                peak_memory_bytes=max(run["peak_memory_bytes"] for run in found[name, dtype]))


def check_losses(rows):
    """BadInput unless all rows of a dtype start at PEFT's loss."""
    tolerance = {"float32": 1e-4, "bfloat16": 1e-2}
    for row in rows:
        expected = next(r["first_loss"] for r in rows if r["dtype"] == row["dtype"])
        if abs(row["first_loss"] - expected) > tolerance[row["dtype"]]:
            raise BadInput(f"{row['name']}, {row['dtype']}: its first loss is {row['first_loss']}, "
                           f"PEFT's {expected}; they do not train the same model")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--weights", default="base", help="a StarCoder, as a Hugging Face folder")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"],
        help="a table for each")
    add("--batch-size", type=int, default=8, help="sequences per step")
    add("--block-size", type=int, default=256, help="tokens per sequence")
    add("--vocab", type=int, default=4096, help="the tokens are drawn from the first of this number")
    add("--steps", type=int, default=5, help="that are timed, of each run")
    add("--repeats", type=int, default=5, help="rounds, each row once in each")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--json", metavar="FILE", help="write the results there as JSON")
    add("--row", choices=ROWS, help="run this row alone and print its figures as JSON")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of --row")
    args = parser.parse_args()
    check_numbers(args, ["batch_size", "block_size", "vocab", "steps", "repeats"],
                  at_least_0=["seed"])
    size = read_config(args.weights).vocab_size
    if args.vocab > size:
        raise BadInput(f"--vocab {args.vocab}: the model of {args.weights} has {size} tokens")
    if args.row:
        run_row(args)
    else:
        compare(args)


if __name__ == "__main__":
    run_main(main)
