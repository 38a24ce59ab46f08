"""A figure of held-out loss against steps, of one or more trainings.

  python train.py --plot out/flora-r1/log.json out/lora-r1/log.json --out figures/heldout.png
"""
from plumbing.files import check_json, read_json
from plumbing.names import full_name
from plumbing.outputs import PNG, check_writable, save_figure

UNRANKED = ("ia3", "none")   # adapters whose rank says nothing
REPORT = {"adapter": str, "rank": float, "trainable_parameters": int,   # what is read of a run's
          "log": [{"step": int, "heldout_loss": float}]}


def plot(json_files, png):
    """One line for each --json report of train.py; BadInput for another JSON file."""
    check_writable(png, "--out", PNG, make_folder=True)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    ends = []
    for file in json_files:
        run = read_json(file)
        check_json(run, REPORT, f"--plot {file}: not a --json report of train.py")
        steps, losses = ([point[key] for point in run["log"]] for key in ("step", "heldout_loss"))
        rank = "" if run["adapter"] in UNRANKED else f" r{run['rank']:g}"
        name = full_name(run["adapter"]) + rank
        label = f"{name}, {run['trainable_parameters']:,} parameters"
        axes.plot(steps, losses, "o-", ms=3, label=label)
        ends += [(losses[-1], name)] if losses else []
    told = ", ".join(f"{name} at {loss:.3f}" for loss, name in sorted(ends))
    axes.set_title(f"ends, best first: {told}; one run each", fontsize=9)
    axes.set(xlabel="steps", ylabel="held-out loss, nats per token (lower is better)")
    axes.legend()
    save_figure(figure, png, dpi=150)
