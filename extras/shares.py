"""How often what an adapter of train.py writes is C++: a figure beside the held-out loss.

  python -m extras.shares out/flora-r1 out/lora-r1 out/ia3

After a line from the middle of each held-out C++ header, the embedded base, and it with each
adapter, sample 64 tokens at temperature 0.8. Such a text counts as C++ if more than a third of its
lines end in ; { or }, or begin with // or a preprocessor directive (empty lines, and the last,
which the 64th token cuts, aside). The same test of what really stands there, and of what stands
after a line from the middle of held-out Python files, tells how often it errs either way.

Folders that differ in their seed alone share a line of the table: mean ± standard deviation.
"""
import argparse
import re
from pathlib import Path

import train
from extras.results import shares as table_of
from extras.table1 import LOG, over_seeds
from generate import generate, load_adapters
from model import GPT
from plumbing.files import read_json
from plumbing.flags import EMBEDDED, Help, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.prompts import new_text
from plumbing.provenance import provenance
from plumbing.texts import load_texts, middle_line
from plumbing.tokenizer import Tokenizer

NEW, TEMPERATURE = 64, 0.8   # tokens of a text, and how they are drawn
SEEDS = [0, 1, 2]            # of the base's texts; an adapter's have the seed of its training
SAME = ("adapter", "rank", "targets", "lr", "steps", "trainable_parameters")   # in a line
RUN = LOG | dict(adapter=str, rank=float, targets=[str], lr=float, steps=int, seed=int)
MARK = re.compile(r"//|#\s*(include|define|undef|if|ifdef|ifndef|elif|else|endif|pragma|error)\b"
                  r"|.*[;{}]$")


def is_cpp(text):
    lines = [line.strip() for line in text.split("\n")[:-1] if line.strip()]
    return 3 * sum(MARK.match(line) is not None for line in lines) > len(lines)


def share(texts):
    return sum(map(is_cpp, texts)) / len(texts)


def what_follows(text, tokenizer):
    """What really stands after the line in the middle of a text, as long as a sampled text."""
    line = middle_line(text)
    begin = text.find(line, len(text) // 2) + len(line)
    return tokenizer.decode(tokenizer.encode(text[begin:begin + 20 * NEW])[:NEW])


def sampled(model, tokenizer, adapter, texts, seed):
    """What an adapter's file, or "none", writes after the line in the middle of each text."""
    adapter_id = load_adapters(model, [adapter])[adapter]
    prompts = [tokenizer.encode(middle_line(text), bos=True)[:NEW] for text in texts]
    ids = generate(model, prompts, [adapter_id] * len(prompts), max_new_tokens=NEW, seed=seed,
                   temperature=TEMPERATURE, eos_id=tokenizer.eos_ids)
    return [new_text(tokenizer, row) for row in ids]


def measure(folders):
    """-> what --json holds."""
    logs = [read_json(Path(folder, "log.json"), RUN) for folder in folders]
    cpp, python = (load_texts(train.parse_args(["--adapter", kind]))[1] for kind in ("flora", "none"))
    model, tokenizer = GPT.from_pretrained(EMBEDDED).requires_grad_(False), Tokenizer(EMBEDDED)
    base = [share(sampled(model, tokenizer, "none", cpp, seed)) for seed in SEEDS]
    lines = {}
    for folder, log in zip(folders, logs):
        adapter = str(Path(folder, "adapter.safetensors"))
        found = share(sampled(model, tokenizer, adapter, cpp, log["seed"]))
        print(f"{folder}: {log['heldout_bpb_after']:.4f} bits per byte, C++ {found:.3f}", flush=True)
        lines.setdefault(str([log[name] for name in SAME]), []).append((log, found))
    rows = [{name: runs[0][0][name] for name in SAME} | dict(
        bpb=over_seeds([log["heldout_bpb_after"] for log, _ in runs]),
        share=over_seeds([found for _, found in runs])) for runs in lines.values()]
    return dict(texts=len(cpp), python_texts=len(python), rows=rows, base=over_seeds(base),
                base_bpb=logs[0]["heldout_bpb_before"],
                real_cpp=share([what_follows(text, tokenizer) for text in cpp]),
                real_python=share([what_follows(text, tokenizer) for text in python]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="--out of a run of train.py")
    parser.add_argument("--json", metavar="FILE", help="write the results there as JSON")
    args = parser.parse_args()
    check_writable(args.json, "--json", JSON)
    data = provenance() | measure(args.folders)
    print(table_of(data))
    if args.json:
        write_json(args.json, data)


if __name__ == "__main__":
    run_main(main)
