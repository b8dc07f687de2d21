"""Graphics cards by name, for the plan of a card that is not at hand: memory, bandwidth and speed. Imports no torch."""

import dataclasses
import difflib
import re

from config import ConfigError

# Shares of a data sheet's two rates with which `step_seconds` gives the tokens/s that were measured on an H100, on 24
# and 60 of its multiprocessors, within 10 %, and on an H200, within 16 % (docs/measurements.md; tests/toolkit/test_cards.py).
# They are no shares of one product or one copy: whatever the formula leaves out is in them. No other card was measured.
PRODUCT_SHARE, COPY_SHARE = 0.85, 0.45
RATES_ERROR, BEST_ERROR = 0.16, 0.10  # of all measured cards; of an H100, and of mixtures of experts on an H200

# GB/s of a lane in one direction by PCIe's generation, and the share of 16 lanes' that copies from pinned main memory had
# on an H200: 54.5 GB/s (docs/measurements.md). On no other card was it measured.
LANE, LINK_SHARE = {3: 0.985, 4: 1.969, 5: 3.938}, 0.865

SOLD_GB = (6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 141)  # memory as it is sold; nvidia-smi may show less

# What the driver keeps of a card, and what a desktop takes of one that has a screen.
DRIVER_GIB, DESKTOP_GIB = 0.5, 0.5


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speed of a GPU: FLOP/s of a large product, bytes/s of a large copy within it, and of one from main memory.

    The defaults are those of an RTX 4060. main_memory: bytes that activations may take there; 0 for a card that is not at hand.
    """

    flops: float = PRODUCT_SHARE * 30.2e12
    bytes: float = COPY_SHARE * 272e9
    link: float = LINK_SHARE * 8 * LANE[4] * 1e9
    main_memory: int = 0

    def of_products(self, rows: float) -> float:
        """Return the FLOP/s of a product with so many rows: small ones use the GPU badly."""
        return self.flops * (rows / (rows + 256))


@dataclasses.dataclass(frozen=True)
class Card:
    """A graphics card as its data sheet describes it."""

    name: str
    memory_mib: int  # as nvidia-smi shows it
    bandwidth: float  # of its memory, GB/s
    tensor: float  # TFLOP/s of dense products in bfloat16, or float16 where that is missing, that are summed in fp32
    multiprocessors: int
    capability: float
    pcie: tuple[int, int]  # generation and lanes, of the card; its slot may have less

    @property
    def rates(self) -> Rates:
        generation, lanes = self.pcie
        link = LINK_SHARE * lanes * LANE[generation] * 1e9
        return Rates(PRODUCT_SHARE * self.tensor * 1e12, COPY_SHARE * self.bandwidth * 1e9, link)

    @property
    def sold_gb(self) -> int:
        """The memory as it is sold."""
        return next(size for size in SOLD_GB if self.memory_mib / 1024 <= size)

    @property
    def free_gib(self) -> float:
        """The memory that a process can expect to have, with its CUDA context."""
        desktop = DESKTOP_GIB if self.name.startswith("RTX") else 0.0
        return self.memory_mib / 1024 - DRIVER_GIB - desktop


# GeForce: the tables of NVIDIA's architecture papers (Turing, GA102, Ada, RTX Blackwell), "Peak FP16 / BF16 Tensor
# TFLOPS with FP32 Accumulate" without sparsity. It is half of what is printed on the box, which sums in 16 bit: 512
# FLOP per multiprocessor and cycle, at the boost clock. A laptop's clock depends on the power that it gives the card.
# The others: NVIDIA's data sheets of T4, RTX A6000, L40S, L4, A10, A100, H100 SXM and H200, without sparsity. T4 and L4 rarely reach
# their rates within 70 W.
# docs/measurements.md lists what was compared with other people's tables of those papers. PCIe: written from memory;
# press reports agree for the RTX 3060, 3090, 4060, 4060 Ti and 5060. A laptop's board often has 8 of a chip's lanes, so 8 count.
CARDS = (
    Card("RTX 2060", 6144, 336, 25.8, 30, 7.5, (3, 16)),
    Card("RTX 2070", 8192, 448, 29.9, 36, 7.5, (3, 16)),
    Card("RTX 3050", 8192, 224, 18.2, 20, 8.6, (4, 8)),
    Card("RTX 3060", 12288, 360, 25.5, 28, 8.6, (4, 16)),
    Card("RTX 3060 Laptop", 6144, 336, 26.2, 30, 8.6, (4, 8)),
    Card("RTX 3070", 8192, 448, 40.6, 46, 8.6, (4, 16)),
    Card("RTX 3080", 10240, 760, 59.5, 68, 8.6, (4, 16)),
    Card("RTX 3090", 24576, 936, 71.0, 82, 8.6, (4, 16)),
    Card("RTX 4060", 8188, 272, 30.2, 24, 8.9, (4, 8)),
    Card("RTX 4060 Laptop", 8188, 256, 29.1, 24, 8.9, (4, 8)),
    Card("RTX 4060 Ti 8GB", 8188, 288, 44.1, 34, 8.9, (4, 8)),
    Card("RTX 4060 Ti 16GB", 16380, 288, 44.1, 34, 8.9, (4, 8)),
    Card("RTX 4070", 12282, 504, 58.3, 46, 8.9, (4, 16)),
    Card("RTX 4080", 16376, 717, 97.5, 76, 8.9, (4, 16)),
    Card("RTX 4090", 24564, 1008, 165.2, 128, 8.9, (4, 16)),
    Card("RTX 5060", 8151, 448, 38.4, 30, 12.0, (5, 8)),
    Card("RTX 5070", 12227, 672, 61.7, 48, 12.0, (5, 16)),
    Card("RTX 5080", 16303, 960, 112.6, 84, 12.0, (5, 16)),
    Card("RTX 5090", 32607, 1792, 209.5, 170, 12.0, (5, 16)),
    Card("T4", 15360, 320, 65.0, 40, 7.5, (3, 16)),
    Card("A6000", 49140, 768, 154.8, 84, 8.6, (4, 16)),
    Card("L40S", 46068, 864, 362.0, 142, 8.9, (4, 16)),
    Card("L4", 23034, 300, 121.0, 58, 8.9, (4, 16)),
    Card("A10", 23028, 600, 125.0, 72, 8.6, (4, 16)),
    Card("A100 40GB", 40960, 1555, 312.0, 108, 8.0, (4, 16)),
    Card("A100 80GB", 81920, 2039, 312.0, 108, 8.0, (4, 16)),
    Card("H100", 81559, 3350, 989.0, 132, 9.0, (5, 16)),
    Card("H200", 143771, 4800, 989.0, 132, 9.0, (5, 16)),
)


def _words(name: str) -> list[str]:
    """Return the words of a card's name that tell it from another: `NVIDIA GeForce RTX 4060Ti (16 GB)` is 4060, ti, 16."""
    maker = ("nvidia", "geforce", "tesla", "rtx", "gpu", "gb", "gib", "sxm", "pcie", "hbm")
    found = re.findall(r"(?:sxm|hbm)\d|[a-z]?\d+|[a-z]+", name.lower())
    return [word for word in found if word not in maker and not re.fullmatch(r"(?:sxm|hbm)\d", word)]


def find_card(name: str) -> Card:
    """Return the card with this name, however its words are written; ConfigError with the known names if there is none."""
    words, alike = _words(name), []
    for card in CARDS:
        own, size = _words(card.name), str(round(card.memory_mib / 1024))
        if words in (own, [*own, size]):
            return card
        short = min(len(own), len(words))
        if own[:short] == words[:short] and short:
            alike.append(card.name)
    known = [card.name for card in CARDS]
    alike = alike or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
    raise ConfigError(f"--card: expected one of {', '.join(known)}, got {name!r}{hint}")
