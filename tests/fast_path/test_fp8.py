"""Products in FP8: the reference against e4m3's own grid, kernels against the reference, layers against fp32."""

import itertools
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from config import ConfigError, load_config
from fast_path import fp8, fp8_kernels, fused_linear, hopper_product, micro_step
from fast_path import layers as layers_module
from fast_path.choice import FastPath
from fast_path.compiled import compile_layers
from fast_path.fused_linear import Adapters, Masks, Norm
from fast_path.layers import fuse, fuse_for_training, groups_of
from fast_path.loss import kernel_chunk_loss
from fast_path.packed_weights import Packed, dequantize, stack_adapters
from tests.fast_path.test_layers import (
    HALF,
    MASKS,
    SINGLE,
    WHOLE,
    apart,
    compile_for,
    furthest,
    gpu,
    gradients,
    packed_weights,
    prepared,
)  # fmt: skip
from tests.interpreter import interpret


def grid() -> np.ndarray:
    """Return the finite numbers of e4m3, from its definition: 4 bits of exponent, 3 of mantissa, bias 7."""
    exponent, mantissa = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    numbers = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    positive = np.sort(numbers.ravel())[:-1]  # all bits set is NaN
    return np.concatenate([-positive[:0:-1], positive])


def nearest(x: np.ndarray) -> np.ndarray:
    """Return the nearest numbers of e4m3; where two are as near, the one whose last bit is 0."""
    numbers = grid()
    place = np.searchsorted(numbers, x).clip(1, len(numbers) - 1)
    low, high = numbers[place - 1], numbers[place]
    even = (np.abs(place - len(numbers) // 2) % 2) == 0  # zero stands in the middle
    below = (x - low < high - x) | ((x - low == high - x) & ~even)
    return np.where(below, low, high)


def scaled(weight: Packed) -> Packed:
    """Return weights whose products are in FP8."""
    return weight._replace(row_scales=fp8.row_scales(weight))


def some_numbers(device: str = "cpu") -> torch.Tensor:
    """Return rows of several magnitudes, with e4m3's own numbers, what lies between two of them, and zeros."""
    torch.manual_seed(0)
    numbers = torch.tensor(grid(), dtype=torch.float32)
    between = (numbers[1:] + numbers[:-1]) / 2
    rows = torch.stack(
        [numbers[:252], between, between * 1e-9, torch.randn(252), torch.randn(252) * 1e4, torch.zeros(252)]
    )
    rows[:2, 0] = 448.0  # so that the scale is 1
    return rows.to(device)


def test_rows_become_the_nearest_numbers_of_e4m3():
    x = some_numbers()
    found, scales = fp8.quantise_rows(x)
    assert scales[:2].tolist() == [1.0, 1.0] and found.dtype is torch.float8_e4m3fn
    want = nearest((x * (1 / scales)[:, None]).double().numpy())
    assert np.array_equal(found.float().numpy(), want.astype(np.float32))
    assert found[-1].float().abs().max() == 0 and found.float()[:-1].abs().amax(1).tolist() == [448.0] * 5


@pytest.mark.parametrize("quant_type, double", [("nf4", True), ("nf4", False), ("fp4", True)])
def test_unpacked_weights_have_one_set_of_bytes_and_a_scale_per_output_row(quant_type, double):
    weight = scaled(packed_weights((64, 32), 192, quant_type, double, "cpu", torch.float32))
    exact = dequantize(weight, torch.float32)
    torch.testing.assert_close(weight.row_scales * 448, exact.abs().amax(1), rtol=1e-6, atol=0)
    found = fp8.unpack(weight, False, False)
    assert torch.equal(fp8.unpack(weight, True, False).view(torch.uint8), found.t().contiguous().view(torch.uint8))
    want = nearest((exact / weight.row_scales[:, None]).double().numpy())
    same = found.float().numpy() == want  # the kernel divides the constant of a block, which may round once more
    assert same.mean() > 0.999 and np.abs(found.float().numpy() - want).max() <= 32
    assert apart(found.float() * weight.row_scales[:, None], exact) < 0.03


# ------------------------------------------------------------------------------------------------ operators and layers


def passes(weight: Packed, x: torch.Tensor, dtype: torch.dtype, swiglu: bool, kernels: bool = False) -> dict:
    """Return y and all gradients of an operator with two members in a dtype, from the same numbers."""
    torch.manual_seed(3)
    outputs, columns = weight.codes.numel() * 2 // weight.columns, weight.columns
    draw = [torch.randn(shape, device=x.device) * 0.05 for shape in [(8, columns)] * 2 + [(outputs // 2, 8)] * 2]
    A, B = ([part.requires_grad_() for part in half] for half in (draw[:2], draw[2:]))
    grad, x = torch.randn(len(x), outputs, device=x.device), x.detach().to(dtype).clone().requires_grad_()
    step = torch.tensor(1, dtype=torch.int32, device=x.device)
    masks = Masks(step, step[None], step, len(x), 0.1)
    norm = (
        None
        if swiglu
        else Norm(torch.ones(columns, device=x.device), fused_linear.inverse_rms(x.detach(), 1e-6, False))
    )
    y, _ = fused_linear.run_linear(
        x, weight, Adapters(A, B, 2.0), masks, norm=norm, swiglu=swiglu, kernels=kernels
    )  # fmt: skip
    y.backward(grad.to(dtype))
    return {"y": y.detach(), "dx": x.grad, "dA": torch.cat([a.grad for a in A]), "dB": torch.cat([b.grad for b in B])}


@pytest.mark.parametrize("swiglu", [False, True])
def test_only_products_with_the_base_are_less_exact_although_some_channels_are_100_times_the_rest(swiglu):
    plain = packed_weights((64, 64), 256, "nf4", True, "cpu", torch.float32)
    x = torch.randn(48, 512 if swiglu else 256)
    x[:, [3, 70, 200]] *= 100
    exact, half, eighth = (
        passes(weight, x, dtype, swiglu)
        for weight, dtype in ((plain, torch.float32), (plain, torch.bfloat16), (scaled(plain), torch.float32))
    )
    far = {name: (apart(half[name], exact[name]), apart(eighth[name], exact[name])) for name in exact}
    # 2.2 % of a weight and 2.6 % of an input, as far apart as the numbers of e4m3 are
    assert 0.01 < far["y"][1] < 0.05 and 0.01 < far["dx"][1] < 0.06, far
    assert far["dA"][1] < 1e-5 and far["dB"][1] < 1e-5, far  # of one operator: u and du are not quantised
    assert far["dA"][0] > 1e-4 and far["y"][0] < far["y"][1], far


def test_a_large_row_costs_no_other_row_its_bits():
    weight = scaled(packed_weights((64, 64), 256, "nf4", True, "cpu", torch.float32))
    x = torch.randn(8, 512)
    alone = passes(weight, x, torch.float32, True)["y"]
    x[5] *= 1e4
    assert torch.equal(passes(weight, x, torch.float32, True)["y"][:5], alone[:5])


def test_opcheck_of_the_operators_with_scales():
    weight = scaled(packed_weights((64, 32), 128, "nf4", True, "cpu", torch.float32))
    A, B = [torch.randn(8, 128) for _ in range(2)], [torch.randn(n, 8) for n in (64, 32)]
    step = torch.tensor(1, dtype=torch.int32)
    masks, x = Masks(step, step[None], step, 6, 0.1), torch.randn(6, 128)
    arguments = (x, A, B, None, 0.5, [], False, False, None, [], *weight, *masks, False, 1, "silu", False)
    torch.library.opcheck(fused_linear.linear, arguments)
    u = fused_linear.linear(*arguments)[1]
    backward = (torch.randn(6, 96), x, u, A, B, 0.5, [], False, False, None, [], *weight, *masks, False, 1, "silu")
    torch.library.opcheck(fused_linear.linear_backward, backward)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "phi3"])
def test_a_model_in_fp8_learns_nearly_the_same_and_is_evaluated_in_full(random_models, kind):
    folder = random_models(kind)
    exact_loss, exact = gradients(*prepared(folder))
    found = []
    for checkpointing in (False, True):
        model, clock, loss = prepared(folder, checkpointing=checkpointing)
        count = 8 if kind == "phi3" else 14
        assert f"those of {count} of {count} linears" in fuse_for_training(model, clock, 0.05, False, True)[0]
        found.append(gradients(model, clock, loss))
    (value, some), (again, same) = found
    assert value == again and furthest(same, some) < 1e-6
    assert value == pytest.approx(exact_loss, rel=2e-2) and 0.003 < furthest(some, exact) < 0.5  # of random weights
    ids = torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.eval()
        full, (other, clock, loss) = loss(ids, ids), prepared(folder)
        fuse(other, clock, 0.05, kernels=False)
        other.eval()
        assert torch.equal(full, loss(ids, ids))


@pytest.mark.compiled
@pytest.mark.long
def test_compiled_layers_in_fp8_are_the_same(random_models):
    found = []
    for compiled in (False, True):
        model, clock, loss = prepared(random_models("qwen2"), checkpointing=True)
        fuse_for_training(model, clock, 0.05, False, True)
        if compiled:
            compile_layers(model)
        found.append(gradients(model, clock, loss))
    # where a compiler rounds otherwise, a number may become e4m3's neighbour
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3) and furthest(found[1][1], found[0][1]) < 0.1


def guarded(folder, limit: float, monkeypatch) -> tuple[list[str], list]:
    """Return what the guard says with a limit, and the groups of the model."""
    model, clock, loss = prepared(folder)
    fuse_for_training(model, clock, 0.05, False, True)
    monkeypatch.setattr(layers_module, "MOST_ERROR", limit)
    learner, lines, ids = SimpleNamespace(model=model, objective=loss), [], np.arange(30, 62)
    assert layers_module.guard(learner, np.stack([ids, ids]), lines.append) is learner
    groups = groups_of(model)
    assert model.training and not any("run" in vars(group) for group in groups)
    return lines, groups


def test_operators_that_fp8_would_change_too_much_stay_in_bfloat16_by_name(random_models, monkeypatch):
    folder = random_models("qwen2")
    lines, groups = guarded(folder, 0.5, monkeypatch)
    assert len(lines) == 1 and all(group.row_scales is not None for group in groups)
    most = float(lines[0].split(" by ")[2].split("%")[0]) / 100
    assert 0.02 < most < 0.2, lines  # a hundredth or two of each operand
    lines, groups = guarded(folder, most - 0.0006, monkeypatch)  # the line is rounded to a tenth of a per cent
    left = [group for group in groups if group.row_scales is None]
    assert (
        1 <= len(left) < len(groups)
        and "model.layers." in lines[1]
        and lines[1].count("_proj") == sum(len(group.members) for group in left)
    ), lines
    assert guarded(folder, most - 0.0006, monkeypatch)[0] == lines  # as after a resume
    lines, groups = guarded(folder, 0.0, monkeypatch)
    assert all(group.row_scales is None for group in groups)


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_in_fp8_says_so_keeps_it_and_goes_on_with_the_same_bits(train, corpus, tmp_path, capsys):
    flags = ("--products", "fp8", "--compute_dtype", "float32", "--save_steps", 2)
    code, whole = train(*flags, "--max_steps", 4, output_dir=tmp_path / "whole")
    log = (whole / "training_log.txt").read_text(encoding="utf-8")
    assert code == 0 and "fast path: fused_lora" in log
    assert "products in FP8: those of 28 of 28 linears in 4 bit, in training alone, computed by the reference" in log
    assert load_config([whole / "config.yaml"]).quantization.products == "fp8"
    adapter = (whole / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(whole / "checkpoint-4")
    capsys.readouterr()
    code, _ = train(*flags[2:], "--max_steps", 4, output_dir=whole)
    assert code == 2 and "quantization.products: was fp8 in checkpoint-2, is bf16 now" in capsys.readouterr().err
    code, _ = train(*flags, "--max_steps", 4, output_dir=whole)
    assert code == 0 and (whole / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    "flags, problem",
    [
        (("--fused_lora", "off"), "needs the fused operators, use bf16: performance.fused_lora is off"),
        (
            ("--use_dora", "true"),
            "needs the fused operators, use bf16: no plain LoRA",
        ),
        (
            ("--load_in_4bit", "false"),
            "needs the fused operators, use bf16: no plain LoRA",
        ),
    ],
)
def test_fp8_is_refused_where_no_operator_could_compute_it(train, capsys, flags, problem):
    code, folder = train("--products", "fp8", *flags)
    assert code == 2 and problem in capsys.readouterr().err and not (folder / "config.yaml").exists()


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 3060")
    for capability, problem in (((8, 6), "RTX 3060 has no FP8 .compute capability 8.6"), ((8, 0), "has no FP8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(ConfigError, match=f"quantization.products: fp8 cannot run here, use bf16: .*{problem}"):
            fp8.refuse("fp8", device, torch.bfloat16)
        fp8.refuse("bf16", device, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(fp8, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match="use bf16: Triton is not installed"):
        fp8.refuse("fp8", device, torch.bfloat16)
    monkeypatch.setattr(fp8, "HAS_TRITON", True)
    fp8.refuse("fp8", device, torch.bfloat16)
    with pytest.raises(ConfigError, match="needs quantization.compute_dtype bfloat16 on a GPU, got float16"):
        fp8.refuse("fp8", device, torch.float16)


def test_torch_multiplies_on_a_whole_hopper_and_the_own_kernel_elsewhere(monkeypatch):
    """The tall operands of gate and up, [22,016, 2,048], and the small ones of the output projection."""
    device, wide, square = torch.device("cuda"), (22016, 2048), (2048, 2048)
    cases = (
        ((9, 0), 132, True, True),
        ((9, 0), 60, True, False),
        ((8, 9), 128, False, False),
        ((12, 0), 170, False, False),
    )
    for capability, count, of_wide, of_square in cases:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(fp8, "multiprocessors", lambda _, found=count: found)
        found = [fp8.torch_multiplies.__wrapped__(device, *shape) for shape in (wide, square)]
        assert found == [of_wide, of_square], (capability, count)
    assert not fp8.torch_multiplies.__wrapped__(torch.device("cpu"), *wide)


@pytest.mark.parametrize(
    "multiprocessors, rows, columns, shares",
    [
        (132, 8192, 22016, 1),
        (132, 2048, 22016, 10),
        (60, 2048, 22016, 5),
        (24, 2048, 11008, 2),
        (60, 2048, 2048, 4),
        (132, 16, 22016, 16),
    ],
)
def test_few_rows_of_the_adapters_product_are_shared_among_programs(
    monkeypatch, multiprocessors, rows, columns, shares
):
    monkeypatch.setattr(fused_linear, "multiprocessors", lambda _: multiprocessors)
    launch, share = fused_linear.thin_launch(rows, columns, False, torch.device("cuda"))
    assert -(-columns // share) in (shares, shares - 1) and share % launch.block_k == 0


def test_the_plan_knows_fp8_and_refuses_a_card_without_it(train, capsys):
    """A gradient's copy in 8 bit and the scales of the rows are a little more; what is unpacked shares memory."""
    needed = []
    for products in ("bf16", "fp8"):
        assert train("--plan", "--card", "RTX 4060", "--products", products)[0] == 0
        needed.append(float(re.search(r"total +([\d.]+)", capsys.readouterr().out)[1]))
    assert needed[0] <= needed[1] < 1.05 * needed[0]
    assert train("--plan", "--card", "RTX 3060", "--products", "fp8")[0] == 2
    problem = "quantization.products: fp8 cannot run there, use bf16: RTX 3060 has no FP8 (compute capability 8.6;"
    assert problem in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ kernels


def check_fp8_kernels(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare each kernel with the torch calls, with sizes that no tile divides; numbers in e4m3 must be the same."""
    for quant_type, double in (("nf4", True), ("nf4", False), ("fp4", True)):
        weight = scaled(packed_weights((64, 48), 192, quant_type, double, device, dtype))
        for transposed, width in ((False, 4), (True, 2), (True, 4)):
            with mock.patch.object(fp8, "TRANSPOSED_RUNS", width):
                found, want = (fp8.unpack(weight, transposed, kernels) for kernels in (True, False))
            assert torch.equal(found.float(), want.float()), (quant_type, double, transposed)
    x = some_numbers(device)[:, :240].to(dtype)
    none = Masks(x, x, x, len(x), 0.0)
    for folded in (None, torch.rand(240, device=device) + 0.1):
        found, want = (fused_linear.narrow(x, x[:0], none, 0.0, False, k, folded=folded) for k in (True, False))
        assert torch.equal(found[1], want[1]) and torch.equal(found[0].float(), want[0].float()), folded is None
    check_narrow(device, dtype, tolerance)
    check_product(device, dtype, tolerance)


def check_narrow(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the pass that quantises: with a norm or SwiGLU before it, dropout, and the adapters' product."""
    torch.manual_seed(1)
    columns, length = 160, 5
    step, salt = (torch.tensor(n, dtype=torch.int32, device=device) for n in (3, -12345))
    sequences = torch.tensor([5, 9], dtype=torch.int32, device=device)
    # Chunks that are held, their columns, most adapter columns of the own product, and over how many columns it sums up.
    # There are four, so that each kind has several.
    ways = itertools.cycle([(14, 64, 64, 160), (2, 64, 0, 160), (1, 1024, 64, 64), (5, 32, 64, 32)])
    for swiglu, members, p in ((False, 1, 0.1), (False, 3, 0.0), (False, 9, 0.1), (True, 1, 0.1)):
        masks = Masks(step, sequences, salt, length, p)
        x = torch.randn(2 * length, columns * (2 if swiglu else 1), device=device).to(dtype)
        A = stack_adapters([torch.randn(8, columns, device=device) * 0.1 for _ in range(members)], dtype)
        norm = Norm(torch.rand(columns, device=device).to(dtype), fused_linear.inverse_rms(x, 1e-6, False))
        once = Norm(norm.weight.float() + 1, norm.inverse)  # rounded after its factor alone, as in Gemma
        kinds = [(None, "silu"), (None, "gelu_pytorch_tanh")] if swiglu else [(n, "silu") for n in (None, norm, once)]
        for (norm, activation), (held, block, most, share) in zip(kinds, ways, strict=False):
            launch = fused_linear.Launch(block_m=1, block_k=block, warps=4)
            thin = fused_linear.Launch(block_m=16, block_k=32, warps=4), share
            own = {"MOST_HELD": held, "MOST_THIN_COLUMNS": most, "narrow_launch": lambda *_, own=launch: own}
            own["thin_launch"] = lambda *_, own=thin: own
            with mock.patch.multiple(fused_linear, **own):
                found = fused_linear.narrow(x, A, masks, 0.5, swiglu, True, norm, activation)
            want = fused_linear.narrow(x, A, masks, 0.5, swiglu, False, norm, activation)
            case = swiglu, members, p, activation, held, block, share
            assert apart(found[1], want[1]) < tolerance and apart(found[2], want[2]) < tolerance, case
            there = (side[0].float() * side[1][:, None] for side in (found, want))
            assert apart(*there) < 0.01, case  # a rounding in 16 bit before may choose the neighbour in e4m3
    folded, B = torch.rand(columns, device=device), torch.randn(columns, 16, device=device).to(dtype)
    x = torch.randn(2 * length, columns, device=device).to(dtype)
    found, want = (fused_linear.narrow(x, B.t(), masks, 0.5, False, k, folded=folded) for k in (True, False))
    assert torch.equal(found[0].float(), want[0].float()) and apart(found[2], want[2]) < tolerance


def check_product(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the product with the torch calls, with and without scales of b, an adapter and a bias."""
    torch.manual_seed(2)
    a, a_scales = fp8.quantise_rows(torch.randn(70, 208, device=device))
    b, b_scales = fp8.quantise_rows(torch.randn(80, 208, device=device))
    u, B, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((70, 48), (80, 48), (80,)))
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    cases = (b_scales, True, bias, True), (None, True, None, False), (b_scales, False, bias, False)
    described = (False, True) if device == "cpu" or torch.cuda.get_device_capability()[0] == 9 else (False,)
    for (scales, adapted, added, exact), own_engine in itertools.product(cases, described):
        extra = 16 if exact else 48  # few adapter columns are loaded before the loop, many after it
        own = (u[:, :extra].contiguous(), B[:, :extra].contiguous()) if adapted else (None, None)
        tile["DESCRIBED"] = own_engine
        found = fp8._product_kernel(a, a_scales, b, scales, dtype, *own, added, exact, tile)
        want = fp8.product(a, a_scales, b, scales, torch.float32, False, *own, added)
        assert apart(found, want) < tolerance, (scales is None, adapted, added is None, exact, own_engine)


@pytest.mark.triton
def test_kernels_in_tritons_interpreter():
    """In float16, because the interpreter rounds bfloat16 wrongly."""
    interpret("tests.fast_path.test_fp8", "check_fp8_kernels('cpu', torch.float16, 2e-3)")


@pytest.mark.triton
@pytest.mark.long  # the interpreted test translates each launch for sm_89 already
@pytest.mark.parametrize("capability", (89, 90, 120))
def test_kernels_compile_within_the_shared_memory_of_each_card(capability):
    eighth = "*fp8e4nv"
    for transposed in (False, True):
        weights = {"packed": WHOLE, "absmax": "*u8", "scales": SINGLE, "out": eighth}
        weights |= dict.fromkeys(("absmax2", "offset", "code2", "lut"), SINGLE)
        constants = {"NESTED": True, "BLOCKSIZE": 64, "BLOCKSIZE2": 256, "ROW_BLOCKS": 172, "TRANSPOSED": transposed}
        constants |= {"ROWS": fp8.UNPACK_ROWS[transposed], "SHUFFLE": True, "ROUND": False}
        unpack = compile_for(
            capability, fp8_kernels.dequantize_e4m3_kernel, weights, constants, fp8.UNPACK_WARPS[transposed]
        )
        assert "cvt.rn.satfinite.e4m3x2.f32" in unpack  # two numbers per instruction, saturated
        kernel = fp8_kernels.unpack_e4m3_transposed_kernel if transposed else fp8_kernels.unpack_e4m3_kernel
        constants = {"NESTED": True, "RUNS": 1, "BLOCKSIZE2": 256, "ROW_RUNS": 172}
        runs = fp8.TRANSPOSED_RUNS
        own = {"WIDTH": runs, "PTX": fp8_kernels.unpack_transposed_in_ptx(runs, 22016)}
        constants |= own if transposed else {"THREADS": 32 * fp8.RUN_WARPS}
        warps = 2 * runs if transposed else fp8.RUN_WARPS
        unpack = compile_for(capability, kernel, weights, constants, warps)
        assert unpack.count("prmt.b32") >= 48 and ".local" not in unpack
    pointers = {"x": HALF, "narrow": eighth, "read": HALF, "norm": HALF, **MASKS, "smallest": "fp32"}
    pointers |= dict.fromkeys(("inverse_rms", "scales", "folded"), SINGLE)
    for swiglu, norm, folded, columns in (
        (True, False, False, 11008),
        (True, False, False, 16384),
        (False, True, False, 2048),
        (False, False, True, 22016),
    ):
        how = {"SWIGLU": swiglu, "NORM": norm, "FOLDED": folded, "ACTIVATION": "silu", "DROPOUT": not folded}
        launch = fused_linear.narrow_launch(columns, swiglu)
        how |= {"KEEP": not folded, "BLOCK": launch.block_k, "CHUNKS": -(-columns // launch.block_k), "ROUND": False}
        narrow = compile_for(capability, fp8_kernels.narrow_kernel, pointers, how | {"HELD": True}, launch.warps)
        assert "cvt.rn.satfinite.e4m3x2.f32" in narrow and ".local" not in narrow
    for (extra, stages), norm in itertools.product(((32, 4), (64, 3)), (False, True)):
        how = {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_R": extra, "NORM": norm}
        thin = {"x": HALF, "A": HALF, "u": HALF, "norm": HALF, "inverse_rms": SINGLE}
        compile_for(capability, fp8_kernels.thin_kernel, thin, how, 8 if norm else 4, num_stages=stages)
    settle = {"sums": SINGLE, "u": HALF}
    compile_for(capability, fp8_kernels.settle_thin_kernel, settle, {"BLOCK": fused_linear.SETTLE_BLOCK}, 4)
    operands = {"a": eighth, "b": eighth, "a_scales": SINGLE, "b_scales": SINGLE}
    operands |= dict.fromkeys(("u", "B", "bias", "out"), HALF)
    for exact in (True, False):
        tile = fp8.product_tile((capability // 10, capability % 10), 2048, 11008)  # pointers, not descriptors
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        how = {"SCALED": True, "BIAS": True, "EXACT": exact, "BLOCK_R": 64, **tile}
        product = compile_for(capability, fp8_kernels.product_kernel, operands, how, warps, num_stages=stages)
        assert (
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" if capability == 90 else ".e4m3.e4m3"
        ) in product


@gpu
@pytest.mark.gpu
def test_kernels_on_the_gpu():
    check_fp8_kernels("cuda", torch.bfloat16, 1e-2)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("form", [hopper_product.LARGE, hopper_product.IN_TURN])
@pytest.mark.parametrize(
    "rows, outputs, inner, extra", [(300, 896, 208, 8), (70, 512, 1008, 144), (8192, 2560, 2048, 48)]
)
def test_hoppers_product_on_the_gpu(rows, outputs, inner, extra, form):
    """Partial tiles, more tiles than programs, and adapter columns in one and in three steps."""
    if not hopper_product.runs_on(torch.device("cuda")):
        pytest.skip("needs a Hopper, and a Triton whose Gluon the kernel knows")
    torch.manual_seed(2)
    a, a_scales = fp8.quantise_rows(torch.randn(rows, inner, device="cuda"))
    b, b_scales = fp8.quantise_rows(torch.randn(outputs, inner, device="cuda"))
    u, B, bias = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((rows, extra), (outputs, extra), (outputs,))
    )
    for scales, adapted, added in ((b_scales, (u, B), bias), (None, (None, None), None), (b_scales, (u, B), None)):
        found = hopper_product.product(a, a_scales, b, scales, torch.bfloat16, *adapted, added, form)
        want = fp8.product(a, a_scales, b, scales, torch.float32, False, *adapted, added)
        assert apart(found, want) < 5e-3, (scales is None, adapted[0] is None, added is None)
        again = hopper_product.product(a, a_scales, b, scales, torch.bfloat16, *adapted, added, form)
        assert torch.equal(again, found)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("swiglu", [False, True])
def test_operators_on_the_gpu_are_as_far_from_fp32_as_the_reference_is(swiglu):
    """With either product: torch's and the kernel's own."""
    plain = packed_weights((256, 256), 512, "nf4", True, "cuda", torch.bfloat16)
    x = torch.randn(200, 1024 if swiglu else 512, device="cuda")
    x[:, [3, 70, 200]] *= 100
    exact = passes(plain, x, torch.float32, swiglu)
    reference, half = passes(scaled(plain), x, torch.float32, swiglu), passes(plain, x, torch.bfloat16, swiglu, True)
    for own in (True, False):
        with mock.patch.object(fp8, "torch_multiplies", lambda *_, own=own: not own):
            found = passes(scaled(plain), x, torch.bfloat16, swiglu, True)
        for name in exact:
            most = 1.1 * apart(reference[name], exact[name]) + 1.5 * apart(half[name], exact[name])
            assert apart(found[name], exact[name]) < most, (name, own)


@gpu
@pytest.mark.gpu
def test_captured_layers_in_fp8_learn_what_the_reference_does(random_models):
    """Compiled, checkpointed and in a graph, in bfloat16; the second replay has the same bits as the first."""
    folder, ids = random_models("qwen3"), torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(5))
    errors, reference = {}, {}
    for path, dtype in (("fp32", "float32"), ("reference", "float32"), ("bf16", "bfloat16"), ("captured", "bfloat16")):
        model, clock, loss = prepared(folder, dtype=dtype, device="cuda", checkpointing=1)
        fast = path in ("captured", "bf16")
        if path != "fp32":
            fuse_for_training(model, clock, 0.05, fast, path != "bf16")
        if fast:
            compile_layers(model)
            loss.chunk_loss = kernel_chunk_loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        parts = FastPath(fast, fast, path == "captured", fast, "")
        learner = micro_step.Learner(model, trained, loss, clock, scaler, parts, (2, 64))
        learner.train()
        batch, found = {"input_ids": ids.cuda(), "labels": ids.cuda()}, []
        for _ in range(2):
            learner.zero_gradients()
            learner.micro_step(3, torch.tensor([5, 7]), batch)
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        assert path != "captured" or all(torch.equal(found[0][n], found[1][n]) for n in found[0])
        reference = reference or found[0]
        errors[path] = sum((found[0][n] - reference[n]).square().sum() for n in reference).sqrt().item()
    assert errors["captured"] < 1.2 * errors["reference"] + errors["bf16"], errors


@gpu
@pytest.mark.gpu
def test_a_deterministic_run_in_fp8_goes_on_with_the_same_bits_on_the_gpu(train, tmp_path):
    flags = ("--products", "fp8", "--deterministic", "true", "--save_steps", 2, "--max_steps", 4)
    adapters = []
    for name in ("whole", "parts"):
        code, folder = train(*flags, output_dir=tmp_path / name)
        assert code == 0
        if name == "parts":
            shutil.rmtree(folder / "checkpoint-4")
            code, folder = train(*flags, output_dir=folder)
            assert code == 0
        adapters.append((folder / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
