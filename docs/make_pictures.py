"""Draw the pictures of README.md as PNG files on white, readable in dark mode too.

python docs/make_pictures.py --run output_tiny      docs/pictures/training_curves.png and nf4_levels.png

--run: the folder of a finished run, whose training_curves.png is copied. Without it only the levels of NF4 are drawn.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from bitsandbytes.functional import get_4bit_type
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def nf4_levels(path: Path) -> None:
    """Draw the 16 levels of NF4 under the normal distribution for which they were chosen.

    A block's 64 weights are divided by the largest of them. That is about 2.4 standard deviations, so the density of a
    normal distribution with this scale shows how many weights lie near each level.
    """
    levels = get_4bit_type("nf4", device="cpu").numpy()
    largest = np.abs(np.random.default_rng(0).standard_normal((100_000, 64))).max(1).mean()
    x = np.linspace(-1, 1, 400)
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(x, np.exp(-0.5 * (x * largest) ** 2), alpha=0.25, label="how many weights are there")
    axes.vlines(levels, 0, np.exp(-0.5 * (levels * largest) ** 2), color="tab:red", label="the 16 levels of NF4")
    axes.set(xlabel="weight / largest weight of its block of 64", yticks=[], ylim=(0, 1.35))
    axes.legend(loc="upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    nf4_levels(folder / "nf4_levels.png")
    if run:
        shutil.copy(run / "training_curves.png", folder)


if __name__ == "__main__":
    main()
