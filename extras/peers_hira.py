"""Many different HiRA adapters in one batch, beside PEFT, which runs one adapter after another.

  python -m extras.peers_hira --weights base

Needs transformers and peft, which this project does not: an environment of their own, with
  pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2 -r requirements.txt

PEFT writes n random HiRAs as folders, and one request each is decoded greedily, three ways:
  ours          the folders opened by flora.load_adapter, all requests in one continuous batch
  PEFT          set_adapter and generate, one after another: PEFT 0.21 ignores adapter_names, its way
                to mix adapters, for HiRA; it makes W0 ∘ BA in each call
  PEFT, merged  the same with each adapter merged into the base before, and out of it afterwards
The runs are interleaved, and their tokens compared. Prints tokens/s, median [lowest, highest].
"""
import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import HiraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import flora
from extras.results import hira_peers as table_of
from generate import Engine
from model import GPT
from plumbing.flags import Help, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.provenance import provenance


def write_folders(base, folder, n, rank):
    """n random HiRAs of the Hugging Face model `base`, as PEFT writes them -> their folders."""
    config = HiraConfig(task_type="CAUSAL_LM", r=rank)
    model, folders = get_peft_model(copy.deepcopy(base), config), []
    for i in range(n):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_(0, 0.1)
        folders.append(str(Path(folder, str(i))))
        model.save_pretrained(folders[-1])
    return folders


def our_run(weights, folders, prompts, new):
    """-> a function that decodes each prompt with its own adapter -> lists of new tokens."""
    model = GPT.from_pretrained(weights)
    ids = [flora.load_adapter(model, folder) for folder in folders]
    flora.freeze_bank(model)

    def run():
        engine = Engine(model, slots=len(ids), length=prompts.shape[1] + new)
        requests = [engine.submit(prompt, adapter_id=i, max_new_tokens=new)
                    for prompt, i in zip(prompts.tolist(), ids)]
        engine.run()
        return [request.ids for request in requests]
    return run


def peft_run(base, folders, prompts, new, merged):
    """The same by PEFT, one adapter after another."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    model.eval().generation_config.eos_token_id = None   # every request to its last token

    def run():
        tokens = []
        for i, prompt in enumerate(prompts):
            model.set_adapter(str(i))
            if merged:
                model.merge_adapter([str(i)])
            row = model.generate(input_ids=prompt[None], max_new_tokens=new, do_sample=False,
                                 attention_mask=torch.ones_like(prompt[None]), pad_token_id=0)
            if merged:
                model.unmerge_adapter()
            tokens.append(row[0, len(prompt):].tolist())
        return tokens
    return run


def compare(args):
    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
    prompts = torch.randint(1, base.config.vocab_size, (args.adapters, args.prompt))
    with tempfile.TemporaryDirectory() as folder:
        folders = write_folders(base, folder, args.adapters, args.rank)
        runs = {"ours": our_run(args.weights, folders, prompts, args.new),
                "PEFT": peft_run(base, folders, prompts, args.new, merged=False),
                "PEFT, merged": peft_run(base, folders, prompts, args.new, merged=True)}
    tokens, seconds = {name: run() for name, run in runs.items()}, {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    report(args, tokens, seconds)


def report(args, tokens, seconds):
    """Print the table, and write it to --json."""
    work, rows = args.adapters * args.new, []
    for name, times in seconds.items():
        same = sum(ours == theirs for ours, theirs in zip(tokens["ours"], tokens[name]))
        rows.append(dict(name=name, same=same, tokens_per_second=work / statistics.median(times),
                         tokens_per_second_min=work / max(times),
                         tokens_per_second_max=work / min(times)))
    data = provenance() | dict(rows=rows)
    data |= {name: getattr(args, name) for name in ("adapters", "rank", "prompt", "new", "repeats")}
    print(f"{args.adapters} HiRAs of rank {args.rank}, {args.prompt} + {args.new} tokens each, "
          f"{args.repeats} repeats\n{table_of(data)}")
    if args.json:
        write_json(args.json, data)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--weights", default="base", help="a Hugging Face folder")
    add("--adapters", type=int, default=32, help="in memory, one for each request")
    add("--rank", type=int, default=4, help="of each")
    add("--prompt", type=int, default=32, help="tokens")
    add("--new", type=int, default=32, help="tokens")
    add("--repeats", type=int, default=3, help="rounds, each engine once in each")
    add("--seed", type=int, default=0, help="of all that is drawn at random")
    add("--json", metavar="FILE", help="write the results there as JSON")
    args = parser.parse_args()
    check_writable(args.json, "--json", JSON, make_folder=True)
    compare(args)


if __name__ == "__main__":
    run_main(main)
