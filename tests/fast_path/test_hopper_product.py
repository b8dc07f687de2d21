"""The product for a Hopper, compiled by the Triton that is installed; test_fp8.py compares its numbers on a GPU."""

import inspect

import pytest
import torch

from fast_path import fp8, hopper_product

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("columns", [0, 32, 64])
@pytest.mark.parametrize("form", [hopper_product.LARGE, hopper_product.IN_TURN])
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


LARGE, IN_TURN = hopper_product.LARGE, hopper_product.IN_TURN


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
