"""A figure of held-out loss against steps, of one or more trainings.

  python train.py --plot out/flora-r1/log.json out/lora-r1/log.json --out figures/heldout.png
"""
from plumbing.files import check_json, read_json
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
    figure, axes = plt.subplots(figsize=(6, 4))
    for file in json_files:
        run = read_json(file)
        check_json(run, REPORT, f"--plot {file}: not a --json report of train.py")
        rank = "" if run["adapter"] in UNRANKED else f" rank {run['rank']}"
        label = f"{run['adapter']}{rank}, {run['trainable_parameters']:,} parameters"
        steps = [point["step"] for point in run["log"]]
        axes.plot(steps, [point["heldout_loss"] for point in run["log"]], "o-", ms=3, label=label)
    axes.set(xlabel="steps", ylabel="held-out loss (nats per token)")
    axes.legend()
    save_figure(figure, png, dpi=150)
