"""The instructions of a decode step's products, which Triton's interpreter cannot run, on a warp made of numpy arrays."""

import re

import numpy as np
import pytest
import torch

from fast_path import decode_products
from fast_path.decode_step import level_pairs

LANES = np.arange(32)
ROW, RUN = LANES // 4, LANES % 4  # j and t of decode_products.py
LEVELS = torch.linspace(-1, 1, 16)  # of no kind that bitsandbytes has: the table decides


class Warp:
    """Threads that run PTX one instruction after the other; registers are arrays over the threads."""

    def __init__(self, memory: np.ndarray, shared: np.ndarray, threads: int = 32, **registers: np.ndarray):
        self.memory, self.shared, self.threads = memory, shared, threads
        self.of = {f"${name[1:]}": value for name, value in registers.items()}

    def value(self, text: str) -> np.ndarray:
        text = text.strip()
        if text in self.of:
            return self.of[text]
        if text == "0f00000000":
            return np.zeros(self.threads, np.float32)
        return np.full(self.threads, int(text, 0), np.uint32)

    def run(self, text: str) -> None:
        for line in re.sub(r"^\{|\}$", "", text).split(";"):
            if (line := line.strip()) and not line.startswith((".reg", ".shared", "bar.warp.sync")):
                self.step(line)

    def step(self, line: str) -> None:
        guard, line = line[1:].split(" ", 1) if line.startswith("@") else ("", line)
        name, rest = line.split(" ", 1)
        parts = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        getattr(self, name.split(".")[0])(parts, name, self.of[guard] if guard else np.ones(self.threads, bool))

    def place(self, text: str) -> np.ndarray:
        base, _, offset = text.strip("[]").partition("+")
        return self.value(base) + int(offset or 0)

    def mov(self, parts, name, mask):
        self.of[parts[0]] = (
            self.value(parts[1]).copy() if parts[1] != "nf4_tables" else np.zeros(self.threads, np.uint32)
        )

    def setp(self, parts, name, mask):
        self.of[parts[0]] = self.value(parts[1]) != self.value(parts[2])

    def prmt(self, parts, name, mask):
        self.of[parts[0]] = self.value(parts[1]) >> (8 * (self.value(parts[3]) & 0xF)) & 0xFF

    def mad(self, parts, name, mask):
        self.of[parts[0]] = self.value(parts[1]) * self.value(parts[2]) + self.value(parts[3])

    def add(self, parts, name, mask):
        self.of[parts[0]] = self.value(parts[1]) + self.value(parts[2])

    def __getattr__(self, name):  # `and` is no name for a method
        if name != "and":
            raise AttributeError(name)
        return lambda parts, *_: self.of.update({parts[0]: self.value(parts[1]) & self.value(parts[2])})

    def selp(self, parts, name, mask):
        self.of[parts[0]] = np.where(self.of[parts[3]], self.value(parts[1]), self.value(parts[2]))

    def shfl(self, parts, name, mask):
        self.of[parts[0]] = self.value(parts[1])[LANES ^ int(parts[2])]

    def ld(self, parts, name, mask):
        if "shared" in name:
            place = self.place(parts[1])
            assert len({*(place // 4 % 32)}) == 32, "two threads wait for one memory bank"
            self.of[parts[0]] = self.shared[place // 4]
            return
        for i, register in enumerate(parts[0].strip("{}").split(",")):
            words = self.place(parts[1])[mask] // 4 + i
            self.of[register.strip()][mask] = self.memory[words]

    def st(self, parts, name, mask):
        place, wide = self.place(parts[0]), "v4" in name
        for lanes in place.reshape(-1, 8 if wide else 32):  # what is written at a time
            banks = [(first // 4 + i) % 32 for first in lanes for i in range(4 if wide else 1)]
            assert len({*banks}) == 32, "two threads wait for one memory bank"
        for i, register in enumerate(parts[1].strip("{}").split(",")):
            self.shared[place // 4 + i] = self.value(register).view(np.uint32)

    def mma(self, parts, name, mask):
        """Fragments as PTX defines them for m16n8k8 and m16n8k16, with 16-bit operands."""
        kind = torch.bfloat16 if ".bf16." in name else torch.float16
        total, left, right, added = ([self.value(x) for x in part.strip("{}").split(",")] for part in parts)
        depth, (group, inner) = 4 * len(left), (ROW, RUN)
        A, B = np.zeros((16, depth), np.float32), np.zeros((depth, 8), np.float32)
        for i, word in enumerate(left):
            A[group + 8 * (i % 2), (i // 2 * 8 + 2 * inner + np.arange(2)[:, None])] = halves(word, kind)
        for i, word in enumerate(right):
            B[(i * 8 + 2 * inner + np.arange(2)[:, None]), group] = halves(word, kind)
        D = A @ B
        for i, register in enumerate(parts[0].strip("{}").split(",")):
            self.of[register.strip()] = added[i] + D[group + 8 * (i // 2), 2 * inner + i % 2]


def halves(words: np.ndarray, kind: torch.dtype) -> np.ndarray:
    """Return the two 16-bit numbers of each word, [2, words]."""
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).view(kind).float().numpy().reshape(-1, 2).T


def filled(kind: torch.dtype) -> np.ndarray:
    """Return the shared memory after the program's 256 threads have filled their tables."""
    shared = np.zeros(256 * 33, np.uint32)
    pairs = level_pairs(LEVELS, kind).numpy().view(np.uint32)
    constants = np.arange(256, dtype=np.float32) / 7
    threads = Warp(shared, shared, 256, _1=np.arange(256, dtype=np.uint32), _2=pairs, _3=constants)
    threads.run(decode_products._fill_in_ptx())
    assert np.array_equal(shared[256 * 32 :].view(np.float32), constants)
    return shared


@pytest.mark.parametrize("kind, depth", [("bf16", 16), ("f16", 16), ("f16", 8)])
def test_a_warps_sums_are_those_of_the_levels_that_the_codes_stand_for(kind, depth):
    """16 rows of 256 weights, of which each thread gets the sums of one run of 64 of two rows."""
    random, dtype = np.random.default_rng(0), {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    codes = random.integers(0, 256, (16, 128), dtype=np.uint8)  # the first of two weights is in the high half
    x = torch.from_numpy(random.normal(size=256).astype(np.float32)).to(dtype)
    place = np.arange(256).reshape(2, 4, 4, 8).swapaxes(1, 2).flatten()  # the input at each place of x
    memory = x[torch.from_numpy(place)].contiguous().view(torch.int32).numpy().view(np.uint32)
    words = codes.view(np.uint32).reshape(16, 8, 4)  # of a row: eight chunks of four words
    chunk, even = ROW % 2 * 4 + RUN, ROW % 2 == 0
    rows = [first + ROW - ROW % 2 + odd for first in (0, 8) for odd in (0, 1)]
    registers = {f"_{2 + 4 * i + w}": words[row, chunk, w] for i, row in enumerate(rows) for w in range(4)}
    registers |= {"_18": (LANES * 4).astype(np.uint32), "_19": (ROW // 4 * 256 + RUN * 16).astype(np.uint32)}
    registers |= {"_20": even & (ROW // 2 % 2 == RUN // 2), "_21": even, "_22": even == (RUN < 2)}
    warp = Warp(memory, filled(dtype), **registers)
    warp.run(decode_products._sums_in_ptx(kind, depth))
    level = LEVELS.to(dtype).float().numpy()
    weights = level[np.stack([codes >> 4, codes & 15], 2)].reshape(16, 4, 64)
    wanted = (weights * x.float().numpy().reshape(4, 64)).sum(2)
    np.testing.assert_allclose(warp.of["$0"], wanted[ROW, RUN], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(warp.of["$1"], wanted[ROW + 8, RUN], rtol=1e-4, atol=1e-4)
