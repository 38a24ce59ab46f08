"""The figures of the texts, drawn anew from the data in extras/results/; nothing is measured.

  python -m extras.figures                     all of FIGURES
  python -m extras.figures fig2_cpu.png        some of them

figures/figure1.png shows what the model writes: python -m extras.demo --png figures/figure1.png.
figures/serve.png is a picture of the server's page (extras/tests/test_serve_page.py).
"""
import argparse

from extras import bench_more, blend_losses, curves, table1, toys
from extras.results import DATA, ROOT
from plumbing.figures import draw
from plumbing.files import BadInput, read_json
from plumbing.flags import Help, run_main


def bench(png, file):
    draw(read_json(file), png, ("throughput", "latency"))


def learning(png, file):
    table1.draw(png, read_json(file)["table"], *table1.SAVED)


def programs(png, file):
    table1.draw(png, read_json(file)["table"], *toys.PASSED)


def together(png, *files):
    bench_more.draw_together(files, png)


def losses(png, *files):
    curves.plot(files, png)


def blends(png, file):
    blend_losses.draw(read_json(file)["rows"], png)


FIGURES = {   # in figures/: (its files in extras/results/, what draws it)
    "fig2_cpu.png": ("fig2.json", bench),
    "fig2_1b_cpu.png": ("fig2_1b.json", bench),
    "fig3_cpu.png": ("starcoder_cpu.json llama_cpu.json", together),
    "table1_losses.png": ("table1.json", learning),
    "table1_smollm2.png": ("smollm2.json", learning),
    "table1_toys.png": ("toys.json", programs),
    "heldout.png": ("default_flora.json default_lora.json default_ia3.json", losses),
    "blend.png": ("blend.json", blends),
}


def redraw(name, folder):
    files, make = FIGURES[name]
    make(str(folder / name), *(str(DATA / file) for file in files.split()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"of {', '.join(FIGURES)} (default: all)")
    names = parser.parse_args().names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            raise BadInput(f"{name}: no figure that is drawn from data; use some of "
                           f"{', '.join(FIGURES)}")
        redraw(name, ROOT / "figures")
        print(f"drew figures/{name}")


if __name__ == "__main__":
    run_main(main)
