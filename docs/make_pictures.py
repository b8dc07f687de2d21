"""Draw the pictures of README.md as PNG files on white, readable in dark mode too.

python docs/make_pictures.py                        every picture of docs/pictures but those of runs
python docs/make_pictures.py --run output_tiny      training_curves.png too, copied from the folder of a finished run
python docs/make_pictures.py --compare compare.png  compare.png too, as train_qlora.py --compare drew it
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bitsandbytes.functional import get_4bit_type
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script of docs/ imports the toolkit

FROZEN, TRAINED, KEPT, BRIEF, SPARE = "#b8c4d6", "#f4a259", "#5b8e7d", "#f2e394", "#e6e6e6"
PICTURES: dict[str, Callable[[Path], None]] = {}


def picture(draw: Callable[[Path], None]) -> Callable[[Path], None]:
    """Enter a function that draws into a file of its own name."""
    PICTURES[draw.__name__] = draw
    return draw


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure whose axes are measured in tenths of an inch, from the lower left."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", **style: object
) -> None:
    """Draw a rectangle from its lower left corner, with a text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black", linewidth=0.6, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "->") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "linewidth": 1})


def say(axes: Axes, x: float, y: float, text: str, ha: str = "left") -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=9)


# ------------------------------------------------------------------------------------------------ the pictures


@picture
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


@picture
def double_quantisation(path: Path) -> None:
    """Draw the bits of a block of weights with a constant of its own, and of 256 blocks whose constants are quantised."""
    figure, axes = canvas(70, 19)
    say(axes, 1, 17, "one level: each block of 64 weights has a constant of 32 bits: 4 + 32/64 = 4.5 bits per weight")
    box(axes, 1, 12, 24, 3.4, FROZEN, "64 weights x 4 bits")
    box(axes, 25, 12, 12, 3.4, TRAINED, "c: 32 bits")
    say(
        axes,
        1,
        9,
        "two levels: 256 such constants in 8 bits, with one of 32 bits: 4 + 8/64 + 32/(64 x 256) = 4.127 bits",
    )
    for x in (1, 30):
        box(axes, x, 4, 24, 3.4, FROZEN, "64 weights x 4 bits")
        box(axes, x + 24, 4, 3, 3.4, TRAINED, "8")
    say(axes, 58, 5.7, "...")
    box(axes, 1, 0.6, 56, 2.4, SPARE, "256 blocks")
    box(axes, 57, 0.6, 12, 2.4, TRAINED, "32 bits")
    figure.savefig(path, dpi=100)


@picture
def bf16_products(path: Path) -> None:
    """Draw how a product unpacks a layer's weights for a moment and computes in bfloat16."""
    figure, axes = canvas(70, 14)
    box(axes, 1, 3, 7, 8, FROZEN, "W\n4 bits")
    say(axes, 4.5, 1.5, "stays", "center")
    arrow(axes, (8.5, 7), (15.5, 7))
    say(axes, 12, 8.5, "unpack", "center")
    box(axes, 16, 1, 14, 12, BRIEF, "W in bfloat16\n\nfor a moment,\none layer at a time")
    say(axes, 32, 7, "×", "center")
    box(axes, 34, 4, 9, 6, KEPT, "x\nbfloat16")
    arrow(axes, (43.5, 7), (55.5, 7))
    say(axes, 49.5, 8.5, "products", "center")
    say(axes, 49.5, 5.5, "summed in fp32", "center")
    box(axes, 56, 4, 12, 6, KEPT, "y = W x\nbfloat16")
    figure.savefig(path, dpi=100)


@picture
def lora(path: Path) -> None:
    """Draw the frozen weight and, beside it, the two thin matrices that are trained."""
    figure, axes = canvas(70, 24)
    box(axes, 1, 9, 6, 6, SPARE, "x\n2,048")
    arrow(axes, (7.5, 13), (19.5, 17))
    arrow(axes, (7.5, 11), (19.5, 5))
    box(axes, 20, 11, 20, 12, FROZEN, "W: 2,048 × 2,048\n4,194,304 weights\nfrozen, 4 bits")
    box(axes, 20, 3.6, 14, 2.8, TRAINED, "A: 16 × 2,048")
    arrow(axes, (34.5, 5), (38.5, 5))
    box(axes, 39, 1, 2.6, 8, TRAINED, "B")
    say(axes, 42.3, 2, "2,048 × 16, zero at first")
    say(axes, 9, 1.6, "A and B: 32,768 weights each, trained")
    arrow(axes, (40.5, 17), (57.2, 13.2))
    arrow(axes, (42, 6), (57.2, 10.8))
    say(axes, 46, 6, "times alpha / r")
    axes.text(58.5, 12, "+", ha="center", va="center", fontsize=14)
    arrow(axes, (59.8, 12), (63, 12))
    box(axes, 63.4, 9, 6, 6, SPARE, "y\n2,048")
    figure.savefig(path, dpi=100)


@picture
def paged_adam(path: Path) -> None:
    """Draw the optimizer states in 32 and 8 bits to scale, and where the paged ones may lie."""
    figure, axes = canvas(70, 16)
    say(axes, 1, 14.4, "Adam's two averages of 29,933,568 weights")
    box(axes, 1, 8.6, 30, 4, TRAINED, "32 bits: 228 MiB")
    box(axes, 1, 3.4, 30 * 58 / 228, 4, TRAINED, "58 MiB")
    say(axes, 10, 5.4, "8 bits, with a constant per 256")
    box(axes, 38, 3, 13, 10, SPARE, "")
    say(axes, 44.5, 14.4, "GPU memory", "center")
    box(axes, 39, 6.8, 11, 5.4, FROZEN, "model, adapter,\nactivations")
    box(axes, 40, 4, 9, 2, TRAINED, "")
    box(axes, 59, 3, 10, 10, SPARE, "")
    say(axes, 64, 14.4, "main memory", "center")
    box(axes, 60, 4, 8, 2, TRAINED, "states")
    arrow(axes, (49.4, 5), (59.6, 5), "<->")
    say(axes, 44.5, 1.5, "states, while there is room", "center")
    say(axes, 64, 1.5, "otherwise", "center")
    figure.savefig(path, dpi=100)


@picture
def checkpointing(path: Path) -> None:
    """Draw what eight layers keep for the backward pass, without and with gradient checkpointing."""
    figure, axes = canvas(70, 22)
    for base, title, every in (
        (12.5, "without: each layer keeps all that its backward pass needs", True),
        (1, "", False),
    ):
        for i in range(8):
            x = 2 + 8.2 * i
            box(axes, x, base, 6.4, 1.6, KEPT)
            live = i == 5 and not every
            if every or live:
                box(axes, x, base + 1.6, 6.4, 5.4, KEPT if every else BRIEF, "computed\nagain" if live else "")
        say(
            axes,
            2,
            base + 8.3,
            title or "with: each keeps its input; the rest of one layer at a time is computed again",
        )
    say(axes, 5.2, 1.8, "input", "center")
    say(axes, 5.2, 13.3, "input", "center")
    say(axes, 5.2, 16.8, "the rest", "center")
    figure.savefig(path, dpi=100)


@picture
def packing(path: Path) -> None:
    """Draw five texts, each padded to a sequence of its own, and the same texts joined and cut into blocks."""
    figure, axes = canvas(70, 21)
    lengths, colors = (14, 5, 22, 9, 10), ("#b8c4d6", "#f4a259", "#5b8e7d", "#f2e394", "#c98bb9")
    say(axes, 1, 19.8, "one text per sequence: 5 sequences of 30 tokens, 60 of 150 tokens are text")
    for i, (length, color) in enumerate(zip(lengths, colors, strict=True)):
        box(axes, 1, 17 - 1.9 * i, 30, 1.6, SPARE, "padding" if i == 1 else "")
        box(axes, 1, 17 - 1.9 * i, length, 1.6, color)
    say(axes, 1, 6.6, "packed: 2 blocks of 30 tokens, all of them text; a text may run on in the next block")
    filled = 0
    for length, color in zip(lengths, colors, strict=True):
        while length:
            block, place = divmod(filled, 30)
            part = min(length, 30 - place)
            box(axes, 1 + place, 3.6 - 1.9 * block, part, 1.6, color)
            filled, length = filled + part, length - part
    figure.savefig(path, dpi=100)


@picture
def chunked_loss(path: Path) -> None:
    """Draw the logits of a sequence as a matrix of which only some rows exist at a time."""
    figure, axes = canvas(70, 19)
    box(axes, 1, 2, 4, 14, KEPT, "8,192\nposi-\ntions")
    say(axes, 3, 17.4, "hidden", "center")
    arrow(axes, (5.4, 9), (11, 9))
    say(axes, 8.2, 10.4, "head", "center")
    box(axes, 11.5, 2, 34, 14, SPARE, "", linestyle="--")
    box(axes, 11.5, 9.4, 34, 2.6, BRIEF, "logits of one chunk: 1,024 positions")
    say(axes, 28.5, 17.4, "8,192 × 151,936 logits: 4.64 GiB in fp32, never whole", "center")
    say(axes, 28.5, 13.8, "done: only loss and gradient are left", "center")
    say(axes, 28.5, 5.4, "still to come", "center")
    arrow(axes, (46, 10.7), (51.5, 13))
    arrow(axes, (46, 10.7), (51.5, 7.2))
    box(axes, 52, 11.4, 17, 3.2, TRAINED, "loss: summed up")
    box(axes, 52, 5, 17, 4.4, KEPT, "gradient of the\nhidden states")
    figure.savefig(path, dpi=100)


@picture
def captured_step(path: Path) -> None:
    """Draw a GPU that waits for Python between kernels, and one that replays them as one graph."""
    figure, axes = canvas(70, 15)
    say(axes, 1, 13.6, "each kernel is launched from Python: the GPU waits in between")
    for i in range(11):
        box(axes, 1 + 6.2 * i, 9, 2.4, 3, KEPT)
        box(axes, 3.4 + 6.2 * i, 9, 3.8, 3, SPARE, linestyle="--")
    say(axes, 1, 6, "the same kernels recorded once as a CUDA graph: one launch per micro-batch")
    for i in range(11):
        box(axes, 1 + 2.4 * i, 1.4, 2.4, 3, KEPT)
    arrow(axes, (68, 2.9), (28, 2.9), "<-")
    say(axes, 48, 4.2, "time saved", "center")
    figure.savefig(path, dpi=100)


@picture
def memory_bar(path: Path) -> None:
    """Draw the plan of Qwen2.5-3B's shape for two shapes of a step of 512 tokens, beside what an H200 measured."""
    # Not imported above: torch and transformers take seconds, and the other pictures do not need them.
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from config import Config
    from toolkit.memory_plan import GIB, plan_memory
    from toolkit.model_shape import shape_of

    sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        )
    shape = shape_of(model)
    listed = {name for names, _ in PURPOSES.values() for name in names}
    figure, axes = canvas(70, 17)
    for y, micro_batch, layers, limit, measured in ((9.8, 1, 36, None, 2.78), (3.4, 4, 0, 8 * GIB, 7.11)):
        parts, x = plan_memory(shape, Config(), micro_batch, layers, limit=limit).parts, 1.0
        del parts["CUDA context"]  # which torch's allocator, whose figure is measured, does not count
        for names, color in PURPOSES.values():
            size = sum(parts[name] for name in names or set(parts) - listed) / GIB
            box(axes, x, y, 9 * size, 2.8, color, f"{size:.2f}" if size > 0.3 else "")
            x += 9 * size
        axes.plot([1 + 9 * measured] * 2, [y - 0.6, y + 3.2], color="black", linewidth=2)
        shape_words = f"{micro_batch} x 512 tokens, {'all layers' if layers else 'no layer'} checkpointed"
        say(axes, 1, y + 4.2, f"{shape_words}: planned {(x - 1) / 9:.2f} GiB, measured {measured} GiB")
    x = 1.0
    for name, (_, color) in PURPOSES.items():
        box(axes, x, 0.5, 1.4, 1.2, color)
        say(axes, x + 1.8, 1.1, name)
        x += 3.8 + 0.62 * len(name)
    axes.plot([x, x], [0.2, 2], color="black", linewidth=2)
    say(axes, x + 0.6, 1.1, "measured")
    figure.savefig(path, dpi=100)


# What a part of the plan is for, and the colour; without names: all the rest.
PURPOSES: dict[str, tuple[tuple[str, ...], str]] = {
    "weights in 4 bits": (("packed weights", "quantisation constants", "norms and biases"), FROZEN),
    "embedding": (("embedding and head",), "#8d9db6"),
    "adapters, gradients": (("adapters (fp32)", "gradients (fp32)"), TRAINED),
    "activations and the rest": ((), KEPT),
}


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--compare", type=Path, help="picture that train_qlora.py --compare wrote")
    options = parser.parse_args()
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw(folder / f"{name}.png")
    if options.run:
        shutil.copy(options.run / "training_curves.png", folder)
    if options.compare:
        shutil.copy(options.compare, folder / "compare.png")


if __name__ == "__main__":
    main()
