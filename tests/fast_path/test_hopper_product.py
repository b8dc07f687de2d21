"""The product for a Hopper: compiled by the installed Triton, and its roles in random orders; its numbers: test_fp8.py."""

import functools
import inspect
import random
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fast_path import fp8, hopper_product

LARGE, IN_TURN = hopper_product.LARGE, hopper_product.IN_TURN


@pytest.mark.triton
@pytest.mark.parametrize("columns", [0, 32, 64])
@pytest.mark.parametrize("form", [LARGE, IN_TURN])
def test_the_kernel_compiles_and_leaves_all_sums_in_registers(form, columns):
    triton = pytest.importorskip("triton")
    assert hopper_product.HAS_GLUON, f"Triton {triton.__version__}: try the kernel with it, then add it to VERSIONS"
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    gl, rows, inner = hopper_product.gl, hopper_product.ROWS, hopper_product.INNER

    def described(name: str, kind, rows: int, width: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, width], kind)
        return f"tensordesc<{name}[{rows}, {width}],{layout!r}>"

    eighth, half = ("fp8e4nv", gl.float8e4nv), ("bf16", gl.bfloat16)
    types = {"a": described(*eighth, rows, inner), "b": described(*eighth, form.outputs, inner), "bias": "*bf16"}
    types |= {"u": described(*half, rows, inner // 2), "B": described(*half, form.outputs, inner // 2)}
    types |= {"out": described(*half, rows, form.outputs), "a_scales": "*fp32", "b_scales": "*fp32"}
    constants = {"SCALED": columns > 0, "BIAS": columns == 64, "BLOCK_R": columns}
    constants |= {"STAGES": form.stages, "GROUP": form.group, "TURNS": form.turns}
    constants |= {name: getattr(hopper_product, name) for name in ("MULTIPLY_REGISTERS", "COPY_REGISTERS")}
    names = list(inspect.signature(hopper_product.hopper_product_kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"}
    source = GluonASTSource(hopper_product.hopper_product_kernel, signature, places, aligned)
    options = {"num_warps": hopper_product.warps(form)}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, tiles = (
        compiled.asm["ptx"],
        2 * form.turns if form.turns > 1 else 1,
    )  # in turn a group has 128 rows, two products
    assert compiled.metadata.shared <= 227 * 1024 and ".local" not in ptx
    eight, sixteen = (f"m64n{form.outputs}k{k}.f32.{kind}.{kind}" for k, kind in ((32, "e4m3"), (16, "bf16")))
    assert ptx.count(eight) == tiles * inner // 32 and ptx.count(sixteen) == tiles * columns // 16
    assert "setmaxnreg.dec.sync.aligned.u32" in ptx  # the warp that copies gives its registers away


@pytest.mark.parametrize(
    "programs, rows, outputs, inner, extra, form",
    [
        (132, 8192, 22016, 2048, 32, LARGE),
        (132, 8192, 2048, 11008, 16, LARGE),
        (132, 4096, 2560, 2048, 48, IN_TURN),  # 320 large tiles would leave most multiprocessors idle at the end
        (132, 2048, 2560, 2048, 48, None),  # and so would 320 small ones
        (132, 512, 2048, 2048, 16, None),
        (24, 2048, 22016, 2048, 32, IN_TURN),
        (60, 8192, 2048, 2048, 16, IN_TURN),
        (60, 8192, 2048, 11008, 16, None),  # few outputs of many products, on a part of the chip
        (132, 8192, 22016, 2048, 0, None),  # without an adapter torch multiplies
        (132, 8192, 22016, 2048, 12, None),  # rows of u must be multiples of 16 bytes
        (132, 8192, 22016, 2048, 512, None),
    ],
)
def test_it_multiplies_where_it_was_faster(monkeypatch, programs, rows, outputs, inner, extra, form):
    monkeypatch.setattr(hopper_product, "runs_on", lambda _: True)
    monkeypatch.setattr(fp8, "multiprocessors", lambda _: programs)
    assert fp8.hopper_form(torch.device("cuda"), rows, outputs, inner, extra) is form


def test_only_a_hopper_takes_it(monkeypatch):
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert hopper_product.runs_on(torch.device("cuda")) is (hopper_product.HAS_GLUON and capability == (9, 0))
    assert not hopper_product.runs_on(torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ the order of its roles


class Barrier:
    """An mbarrier with a count of one arrival: its phase ends once that has come and all announced copies have ended."""

    def __init__(self):
        self.phase, self.pending, self.copies = 0, 1, 0

    def change(self, arrivals: int, copies: int) -> None:
        self.pending -= arrivals
        self.copies += copies
        assert self.pending >= 0, "it was used again before its phase had ended"
        if self.pending == self.copies == 0:
            self.phase, self.pending = self.phase + 1, 1


class Roles:
    """Runs functions that wait for barriers, one at a time, in a random order; copies end in a random order as well."""

    def __init__(self, seed: int):
        self.rng, self.copies, self.waiting = random.Random(seed), [], {}
        self.weights, self.turn = [self.rng.choice([1, 5, 30]) for _ in range(4)], threading.Semaphore(0)

    def pause(self) -> None:
        mine = self.waiting[threading.current_thread()]
        self.turn.release()
        mine.acquire()

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.pause()
        while barrier.phase & 1 == parity:  # what the instruction asks: two phases apart are the same to it
            self.pause()

    def run(self, functions: list) -> None:
        failed: list[BaseException] = []

        def role(function):
            self.waiting[threading.current_thread()].acquire()
            try:
                function()
            except AssertionError as error:
                failed.append(error)
            del self.waiting[threading.current_thread()]
            self.turn.release()

        threads = [threading.Thread(target=role, args=(function,), daemon=True) for function in functions]
        self.waiting = {thread: threading.Semaphore(0) for thread in threads}
        for thread in threads:
            thread.start()
        for _ in range(20_000):
            if failed or not self.waiting:
                break
            here = [thread for thread in threads if thread in self.waiting]
            if self.copies and self.rng.random() < 0.2:
                self.copies.pop(self.rng.randrange(len(self.copies)))()
            weights = [self.weights[threads.index(thread)] for thread in here]
            self.waiting[self.rng.choices(here, weights)[0]].release()
            self.turn.acquire()
        assert not failed and not self.waiting, failed or "nothing goes on"


class Place:
    """Shared memory: a place of a tile, or several; it holds the names of what was copied to it."""

    def __init__(self, number: int, shape: tuple = ()):
        self.parts, self.shape, self.holds = [Place(0) for _ in range(number)], shape, None
        self.index = self.parts.__getitem__
        self.reinterpret = self._reinterpret = self.permute = self.slice = lambda *_: self
        self.store = lambda value: None


class Number:
    """Anything that the kernel computes with; only which tiles were multiplied is kept, in `tiles`."""

    def __init__(self):
        self.tiles = []

    def to(self, _):
        return self

    def __add__(self, _):
        return self

    __mul__ = __radd__ = __rmul__ = __lt__ = __add__


def fakes_of(roles: Roles, results: dict[tuple, list]) -> dict:
    """Return what replaces the names of the kernel's module, so that its functions are plain Python; they fill results."""

    def copy_in(descriptor, coordinates, barrier, place):
        def end():
            place.holds = (descriptor.name, *coordinates)
            barrier.change(0, -1)

        roles.copies.append(end)

    def multiply(left, right, total, is_async=False):
        total.tiles.append((left.holds, right.holds))
        roles.pause()
        assert total.tiles[-1] == (left.holds, right.holds), "overwritten while it was multiplied"
        return total

    def copy_out(_, coordinates, __):
        results[tuple(coordinates)] = latest[threading.current_thread()].tiles

    latest: dict = {}

    def zeros(*_):
        latest[threading.current_thread()] = Number()
        return latest[threading.current_thread()]

    same = SimpleNamespace(zeros=zeros, minimum=min, cdiv=lambda a, b: -(-a // b), program_id=lambda _: 0, float32=None)
    same.num_programs, same.num_warps = (lambda _: 1), (lambda: 8)
    for name in ("arange", "load", "expand_dims", "SliceLayout", "NVMMADistributedLayout"):
        setattr(same, name, lambda *_, **__: Number())
    same.convert_layout = lambda value, _: value
    barriers = SimpleNamespace(
        wait=roles.wait,
        expect=lambda barrier, _: barrier.change(1, 2),
        arrive=lambda barrier, pred=True: barrier.change(int(pred), 0),
    )
    fakes = {"gl": same, "mbarrier": barriers, "copy_in": copy_in, "copy_out": copy_out, "warpgroup_mma": multiply}
    fakes |= {"warpgroup_mma_wait": lambda num_outstanding, deps: deps[0], "fence_async_shared": lambda: None}
    fakes |= {"tma": SimpleNamespace(store_wait=lambda _: None), "RENAMED": True}
    names = ("_tile", "_seen_as", "_copy_step", "_copy", "_multiply")
    return fakes | {name: getattr(getattr(hopper_product, name), "fn", getattr(hopper_product, name)) for name in names}


def multiplied(seed: int, form, tiles: int, steps: int, added: int) -> dict[tuple, list]:
    """Run the kernel's own functions, whose tiles are names, in a random order; return what was multiplied for each tile."""
    roles, results = Roles(seed), {}
    fakes = fakes_of(roles, results)
    full, empty, turns = (Place(0) for _ in range(3))
    for barriers, count in ((full, form.stages), (empty, form.stages), (turns, 2)):
        barriers.parts = [Barrier() for _ in range(count)]
        barriers.index = barriers.parts.__getitem__
    width, rows = hopper_product.INNER, hopper_product.ROWS
    a, b, u, B, out = (
        SimpleNamespace(name=name, block_shape=shape, dtype=None, layout=None)
        for name, shape in zip("abuBo", [(rows, width)] * 2 + [(rows, width // 2)] * 2 + [(rows, rows)], strict=True)
    )
    a_tiles, b_tiles, inner, extra = (
        Place(form.stages, (0, 0, width)),
        Place(form.stages),
        steps * width,
        added * width // 2,
    )
    tail = full, empty, turns, tiles, 1, 0, 0, inner, extra, False, False, 64 if added else 0, form.stages, 1
    with mock.patch.multiple(hopper_product, **fakes):
        operands = a, b, u, B, a_tiles, b_tiles, full, empty, tiles, 1, inner, extra, tail[-3], form.stages, 1
        groups = [
            functools.partial(
                fakes["_multiply"], u, B, out, *[Number()] * 3, a_tiles, b_tiles, Place(0), *tail, i, form.turns
            )
            for i in range(form.turns)
        ]
        roles.run([functools.partial(fakes["_copy"], *operands), *groups])
    return results


@pytest.mark.parametrize("form", [LARGE, IN_TURN])
@pytest.mark.parametrize("added", range(hopper_product.MOST_ADAPTER_COLUMNS // hopper_product.ADAPTER_COLUMNS + 1))
def test_each_tile_is_made_of_its_own_operands_in_whatever_order_copies_end(form, added):
    """Without the wait for the adapters' copies before the turn is handed over, some orders with four steps went wrong."""
    rng, width = random.Random(added), hopper_product.INNER
    for seed in range(150 if (form, added) == (IN_TURN, 4) else 25):
        tiles, steps = rng.randrange(1, 8), rng.randrange(1, 9)
        results = multiplied(seed, form, tiles, steps, added)
        for tile in range(tiles):
            m = tile * hopper_product.ROWS
            want = [(("a", m, k * width), ("b", 0, k * width)) for k in range(steps)]
            want += [(("u", m, k * width // 2), ("B", 0, k * width // 2)) for k in range(added)]
            assert results[m, 0] == want, (seed, tiles, steps)
