"""What blending two adapters does: held-out loss in both languages, by the weights of the blend.

  python -m extras.blend_losses --json extras/results/blend.json --png figures/blend.png

The shipped Perl and C++ adapters, each at 0, 0.25, … 1, in all pairs. Perl: the held-out problems of toy_problems.py
with their solutions, whose tasks the adapter has not seen; C++: the held-out headers of its training (extras/blend.py).
"""
import argparse
from types import SimpleNamespace

import flora
from extras.blend import blend
from extras.toy_problems import make_tasks, solved
from flora import BASE
from model import GPT
from plumbing.flags import EMBEDDED, run_main
from plumbing.outputs import JSON, PNG, check_writable, save_figure, write_json
from plumbing.provenance import provenance
from plumbing.texts import load_texts
from plumbing.tokenizer import Tokenizer
from train import Data, heldout_blocks, heldout_loss

WEIGHTS = [0.0, 0.25, 0.5, 0.75, 1.0]
LANGUAGES = {"perl": "Perl", "cpp": "C++"}
BLOCK, TOKENS = 128, 32768   # as in the adapters' own reports


def heldout_texts():
    """{language: texts that its adapter has not seen}"""
    headers = SimpleNamespace(data=None, ext=[], adapter="flora", keep_duplicates=False)
    return {"perl": [solved("pl", *task) for task in make_tasks()[0]], "cpp": load_texts(headers)[1]}


def measure():
    """-> rows of {perl, cpp: weights, perl_bpb, cpp_bpb: held-out bits per byte}, and the size of what is held out."""
    model, tokenizer = GPT.from_pretrained(EMBEDDED).requires_grad_(False), Tokenizer(EMBEDDED)
    data = {language: Data(None, *heldout_blocks(texts, tokenizer, BLOCK, TOKENS))
            for language, texts in heldout_texts().items()}
    ids = {language: flora.load_adapter(model, f"{EMBEDDED}/adapters/{language}.safetensors") for language in LANGUAGES}
    rows = []
    for perl in WEIGHTS:
        for cpp in WEIGHTS:
            i = blend(model, {ids["perl"]: perl, ids["cpp"]: cpp})
            flora.freeze_bank(model)
            losses = {f"{language}_bpb": held.bits_per_byte(heldout_loss(model, held, i, "float32"))
                      for language, held in data.items()}
            rows.append(dict(perl=perl, cpp=cpp) | losses)
            told = f"Perl {losses['perl_bpb']:.4f}, C++ {losses['cpp_bpb']:.4f}"
            print(f"{perl:4} Perl + {cpp:4} C++: {told}", flush=True)
            if i != BASE:
                flora.remove_adapter(model, i)
    return rows, {language: dict(tokens=held.heldout_tokens, bytes=held.heldout_bytes)
                  for language, held in data.items()}


def draw(rows, file):
    """A panel for each language: its loss by its own adapter's weight, a line for each weight of the other's."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for axis, own, other in zip(panels, ("perl", "cpp"), ("cpp", "perl")):
        for number, weight in enumerate(WEIGHTS):
            mine = [row for row in rows if row[other] == weight]
            axis.plot([row[own] for row in mine], [row[f"{own}_bpb"] for row in mine], "o-", ms=3,
                      color=plt.cm.viridis(number / len(WEIGHTS)), label=f"{LANGUAGES[other]} at {weight:g}")
        halves = [row for row in rows if row["perl"] + row["cpp"] == 1]
        axis.plot([row[own] for row in halves], [row[f"{own}_bpb"] for row in halves], "k--", lw=1,
                  label="weights sum to 1")
        axis.set_title(f"{LANGUAGES[own]}: {tell_finding(rows, own)}", fontsize=9)
        axis.set(xlabel=f"weight of the {LANGUAGES[own]} adapter",
                 ylabel="held-out bits per byte (lower is better)")
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, file, dpi=150)


def tell_finding(rows, own):
    """What a panel says: a part of both adapters beside all of the language's own."""
    part = WEIGHTS[len(WEIGHTS) // 2]
    at = {(row["perl"], row["cpp"]): row[f"{own}_bpb"] for row in rows}
    alone = at[1, 0] if own == "perl" else at[0, 1]
    return (f"both adapters at {part:g} reach {at[part, part]:.2f}, its own alone {alone:.2f}, "
            f"none {at[0, 0]:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    args = parser.parse_args()
    check_writable(args.json, "--json", JSON, make_folder=True)
    check_writable(args.png, "--png", PNG, make_folder=True)
    rows, sizes = measure()
    if args.json:
        write_json(args.json, provenance() | dict(heldout=sizes, rows=rows))
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    run_main(main)
