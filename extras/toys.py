"""Does FLoRA learn as well as LoRA? Table 1's form in pass@1, on problems made for small models.

  python -m extras.toys --i-trust-the-code

The embedded model has learnt a family of toy problems (extras/toy_problems.py) in Python alone. It
is adapted to the other languages, and scored by running what it writes for held-out problems.
Trainings, learning rates, seeds and what is kept: as in extras/table1.py. Scores are kept too.

Generated programs are untrusted: read the top of extras/sandbox.py.
"""
import json
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import flora
from extras import table1, toy_problems
from extras.passk import add_consent_flag, check_languages, evaluate_problems, read_problems, require_consent, summary
from generate import load_adapters, load_model
from plumbing.files import BadInput, read_json
from plumbing.flags import run_main
from plumbing.outputs import write_json
from plumbing.provenance import adapter_digest, base_digest, difference, digest

METHODS = {  # name in the table: flags of train.py
    "flora-r4": "--adapter flora --rank 4 --targets all",
    "lora-r4": "--adapter lora --rank 4 --targets all",
    "ia3": "--adapter ia3 --targets all",
}


def pass_rate(base, x):
    return x


PASSED = "pass@1 on held-out problems", pass_rate   # what the figure shows


def toys(args):
    """Make the problems, train, run programs, print pass@1."""
    require_consent(args)
    with table1.outputs(args):
        held_out = make_problems(f"{args.out}/problems", ["py", *args.languages])
        for problems in held_out.values():
            check_languages(problems)
        data = {language: ["--data", f"{args.out}/problems/{language}", "--keep-duplicates"]
                for language in args.languages}
        logs, sweep = table1.train_table(args, data)
        table, in_python = score_all(args, held_out, logs)
        print(f"\nthe base model passes {in_python:.4f} of the held-out problems in Python")
        table1.print_accuracy(
            table, "pass@1 on held-out problems (change) ± standard deviation over seeds",
            lambda base, x: f"{x - base:+.4f}")
        table1.finish(args, table, sweep, *PASSED, base_in_python=in_python)


def make_problems(folder, languages):
    """Make the toy problems, unless they are there -> {language: its held-out problems}."""
    if not os.path.exists(folder):
        try:
            toy_problems.write(f"{folder}.tmp")
            os.replace(f"{folder}.tmp", folder)
        except OSError as e:
            raise BadInput(f"{folder}: cannot be written ({e.strerror})") from None
    return {language: read_problems(f"{folder}/{language}.jsonl") for language in languages}


def score_all(args, held_out, logs):
    """pass@1 of {language: problems} by the base and by every adapter.

    logs: {language: {method: [log.json of each seed]}}. -> ({language: {"base" or method: cell}},
    the base's pass@1 in Python)
    """
    model, tokenizer = load_model(args)
    now = dict(samples=args.samples, dtype=args.dtype, quantize=args.quantize,
               base=base_digest(args.weights))

    def score(language, adapter, file):
        problems = digest(json.dumps(held_out[language]))
        made = now | dict(adapter_file=adapter_digest(adapter), problems=problems)
        if not os.path.exists(file):
            counts = run_adapter(model, tokenizer, adapter, held_out[language], args.samples)
            write_json(file, dict(counts=counts, made_with=made))
        counts = [Counter(outcomes) for outcomes in read_score(file, made)["counts"]]
        return summary(held_out[language], counts, [1])[0]["pass@1"]

    in_python = score("py", "none", f"{args.out}/pass.json")
    table = {}
    adapters = sum(len(seeds) for methods in logs.values() for seeds in methods.values())
    with tqdm(total=adapters, unit="adapter") as bar:
        for language, methods in logs.items():
            base = score(language, "none", f"{args.out}/{language}/pass.json")
            table[language] = {"base": table1.over_seeds([base])}
            for method, seeds in methods.items():
                passed = []
                for log in seeds:
                    file = Path(log["adapter_file"])
                    passed.append(score(language, str(file), str(file.with_name("pass.json"))))
                    bar.update()
                table[language][method] = table1.over_seeds(
                    passed, parameters=seeds[0]["trainable_parameters"])
    return table, in_python


def read_score(file, made):
    """A file of counts. BadInput where other settings, another model or other problems made it."""
    stored = read_json(file, {"counts": [{}], "made_with?": {}})
    other = difference(stored.get("made_with") or {}, made)
    if other:
        raise BadInput(f"{file} was made with {other}; choose another --out, or delete it")
    if not stored.get("made_with"):
        print(f"{file}: was written before there were fingerprints; whether the model and the "
              "problems are the same is not checked", file=sys.stderr)
    return stored


def run_adapter(model, tokenizer, adapter, problems, samples):
    """Sample and run programs with an adapter file, or "none" -> a Counter for each problem."""
    adapter_id = load_adapters(model, [adapter])[adapter]
    counts = evaluate_problems(model, tokenizer, adapter_id, problems, samples, max_new_tokens=96,
                               temperature=0.1, slots=16)
    if adapter_id != flora.BASE:
        flora.remove_adapter(model, adapter_id)
    return counts


def parse_args(argv=None):
    parser = table1.new_parser(__doc__, "toys", ["pl", "js", "sh"], METHODS, steps=300)
    parser.add_argument("--samples", type=int, default=5, help="per problem, at temperature 0.1")
    add_consent_flag(parser)
    return table1.parse(parser, METHODS, argv)


def main():
    toys(parse_args())


if __name__ == "__main__":
    run_main(main)
