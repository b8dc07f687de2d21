"""The decode kernels compute the same as the model's own forward, in Triton's interpreter and on a GPU."""

import functools
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import StaticCache

from fast_path import decode_step, families
from fast_path.decode_step import DecodeStep, Tile, Unsupported
from fast_path.decoder import cache_argument
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from tests.fast_path.test_layers import CAPABILITIES, SHARED_LIMIT, prepared
from tests.interpreter import interpret

LENGTH = 160  # of the cache: five tiles of 32 positions

# family, options of `prepared` (None: the base without peft), each sequence's first slot, slots before the first step
CASES = [
    ("qwen2", {}, [0], 150),
    ("qwen2", {"double": False, "targets": ["k_proj", "v_proj", "up_proj"]}, [0], 1),
    ("qwen3", {"quant_type": "fp4", "targets": ["q_proj", "down_proj"]}, [0], 64),
    ("llama", None, [0], 33),
    ("mistral", {"quant_type": "fp4", "double": False, "targets": ["o_proj", "gate_proj"]}, [0], 31),
    ("qwen2", {}, [0, 3, 149, 64, 32], 150),
    ("qwen2", {"double": False, "targets": ["k_proj", "v_proj", "up_proj"]}, [0, 0], 1),
    ("qwen3", {"quant_type": "fp4", "targets": ["q_proj", "down_proj"]}, [7, 0, 63, 40, 0], 64),
    ("llama", None, list(range(17)), 33),
    ("mistral", {"quant_type": "fp4", "double": False, "targets": ["o_proj", "gate_proj"]}, [30, 0], 31),
    ("granite", {}, [0], 40),
    ("smollm3", {"targets": ["q_proj", "up_proj"]}, [0], 65),
    ("granite", {"double": False, "targets": ["o_proj", "down_proj"]}, [5, 0], 40),
    ("smollm3", None, [0, 9], 33),
    ("gemma2", {"targets": ["o_proj", "down_proj", "q_proj"]}, [0], 40),
    ("gemma3", {}, [5, 0], 40),
    ("phi3", {}, [0], 40),
    ("phi3", {"double": False, "targets": ["qkv_proj", "gate_up_proj"]}, [3, 0], 33),
    ("olmo2", {"targets": ["q_proj", "o_proj", "up_proj"]}, [0], 40),
    ("olmo3", {}, [0, 5], 40),
    ("phi3_96", {}, [0], 40),
    ("phi3_96", {"double": False, "targets": ["qkv_proj", "o_proj"]}, [3, 0], 33),
    ("gemma3", {}, [0], 40),
    ("olmo3", {"double": False}, [0], 65),
]
# One sequence and several, NF4 and FP4, double quantisation and none, each family, adapters on all linears and on few.
EACH_KIND = (0, 2, 3, 6, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21)
# In the interpreter, cases of two layers: one sequence, several, a layer without rotation, norms after a layer. And cases of
# two steps, since the second shows what the first leaves behind; in case 5, one sequence's errors in one position of the
# cache are up to 1.4 times the model's own otherwise.
TWO_LAYERS, TWO_STEPS = (0, 1, 5, 6, 8, 11, 14), (2, 5, 9)
REST = tuple(number for number in range(len(CASES)) if number not in EACH_KIND)
NAMES = [f"{family}-{len(starts)}" for family, _, starts, _ in CASES]


@pytest.fixture(scope="module")
def folders(random_models, tmp_path_factory):
    """Return the families' folders; none has a sliding window here, other than in `random_models`."""
    found = {}
    for name in ("mistral", "gemma2", "gemma3", "olmo3"):
        found[name] = tmp_path_factory.mktemp(name) / "without_window"
        shutil.copytree(random_models(name), found[name])
        config = json.loads((found[name] / "config.json").read_text(encoding="utf-8"))
        kinds = {"layer_types": ["full_attention"] * 2} if "layer_types" in config else {"sliding_window": None}
        (found[name] / "config.json").write_text(json.dumps(config | kinds), encoding="utf-8")
    return {
        **found,
        **{
            name: random_models(name)
            for name in ("qwen2", "qwen3", "llama", "granite", "smollm3", "phi3", "phi3_96", "olmo2")
        },
    }


def loaded(folder, options, dtype, device, layers: int | None = None):
    """Return a model with transformers' own attention and, if there are options, with a non-zero adapter.

    layers: how many to keep, if not all.
    Biases and the norms' weights are zeros and ones in a new model; they get random values, so that a kernel that
    forgets them fails.
    """
    if options is None:
        base = model = load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype=dtype), device=device)[0]
    else:
        model = prepared(folder, dtype=dtype, p=0.0, device=device, **options)[0]
        base = model.get_base_model()
        base.set_attn_implementation("eager" if families.of(base).score_cap else "sdpa")
    decoder, config = families.decoder_of(base), base.config
    decoder.layers = decoder.layers[:layers]
    config.num_hidden_layers = len(decoder.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or "norm" in name:
            noise = torch.randn(parameter.shape, generator=generator).bfloat16() / 4
            parameter.data += noise.to(parameter)
    return model.eval()


def new_cache(model, length=LENGTH):
    return StaticCache(model.config, max_cache_len=length)


def filled(caches: list[StaticCache], starts: list[int], before: int, model) -> StaticCache:
    """Return one cache with the contents of several, each from its start on; before a start there is NaN."""
    joint, config = new_cache(model), model.config
    width = families.head_width(config)
    joint.early_initialization(len(starts), config.num_key_value_heads, width, model.dtype, model.device)
    for layer, *own in zip(joint.layers, *(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            for i, start in enumerate(starts):
                getattr(layer, name)[i, :, :start] = float("nan")
                getattr(layer, name)[i, :, start:before] = getattr(own[i], name)[0, :, : before - start]
    return joint


def check_cache(mine: StaticCache, plain: list, reference: list, starts: list[int], before: int, steps: int) -> None:
    """Compare the keys and values that were written, and check that nothing else was changed."""
    for i, start in enumerate(starts):
        written = slice(before - start, before - start + steps)
        for a, b, c in zip(mine.layers, plain[i].layers, reference[i].layers, strict=True):
            for name in ("keys", "values"):
                found, own, want = getattr(a, name)[i].float(), *(getattr(x, name)[0].float() for x in (b, c))
                assert found[:, :start].isnan().all()
                found, own, want = found[:, start:], own[:, : LENGTH - start], want[:, : LENGTH - start]
                error, limit = ((x - want)[:, written].norm() for x in (found, own))
                assert error <= 1.1 * limit + 2e-4 * want[:, written].norm(), (i, name, error, limit)
                rest = torch.ones(LENGTH - start, dtype=torch.bool)
                rest[written] = rest[-1] = False  # the last: where a capture warms up
                assert torch.equal(found[:, rest], own[:, rest])


@torch.no_grad()
def check_case(
    folder, options, starts, before: int, dtype: str, device: str, wrap=lambda step: step, steps: int = 2,
    layers: int | None = None,
) -> None:  # fmt: skip
    """Compare steps after prompts with the model's own forward pass, which takes one sequence at a time.

    Both are measured by their distance from fp32 on the same 4-bit weights.
    """
    ids = torch.randint(0, 4096, (len(starts), before + steps), generator=torch.Generator().manual_seed(5)).to(device)
    model, exact = (loaded(folder, options, kind, device, layers) for kind in (dtype, "float32"))
    plain, reference = ([new_cache(m) for _ in starts] for m in (model, exact))

    def forward(m, caches: list[StaticCache], end: int, count: int | None = None) -> torch.Tensor:
        """Return the last logits of each sequence after its slots up to `end`, all or the last few."""
        rows = [row[start:end][-count if count else 0 :] for row, start in zip(ids, starts, strict=True)]
        return torch.cat(
            [
                m(
                    input_ids=row[None],
                    position_ids=torch.arange(end - start - len(row), end - start, device=device)[None],
                    **cache_argument(m, cache),
                    use_cache=True,
                ).logits[:, -1]
                for row, start, cache in zip(rows, starts, caches, strict=True)
            ]
        ).float()

    for m, caches in ((model, plain), (exact, reference)):
        forward(m, caches, before)
    mine = filled(plain, starts, before, model)
    step, first = wrap(DecodeStep(model, mine)), torch.tensor(starts, device=device)[:, None]
    for position in range(before, before + steps):
        found = step(ids[:, position : position + 1], torch.tensor([position], device=device), first)
        own, want = (forward(m, caches, position + 1, 1) for m, caches in ((model, plain), (exact, reference)))
        assert found.shape == want.shape and found.dtype is torch.float32
        error, limit = ((x - want).norm() / want.norm() for x in (found, own))
        assert error <= 1.1 * limit + 2e-4, (position, error, limit)
        # Also of every sequence by itself: of bfloat16 the model's own is 0.9998 here.
        alike, own_alike = (torch.cosine_similarity(x, want).min().item() for x in (found, own))
        assert alike >= 1 - 1.3 * (1 - own_alike) - 1e-6, (position, alike, own_alike)
    check_cache(mine, plain, reference, starts, before, steps)


def use_few_programs() -> decode_step.Layout:
    """Divide the work among few, large programs, since one costs the interpreter as much whatever its size."""
    layout = decode_step.LAYOUT
    # Rows in pieces, and a program that takes several; adapters of q, k and v in three programs.
    layout.warps, layout.resident, layout.programs, decode_step.ADAPTERS = 16, 2, 1, 4
    layout.tile, layout.swiglu_tile = Tile(128, 16, 2), Tile(256, 32, 2)
    layout.batch_programs = 8  # of products that add up, and products of several steps
    return layout


def check_all(folders: dict[str, str], dtype: str, device: str, numbers: tuple[int, ...]) -> None:
    layout = use_few_programs()
    for number in numbers:
        family, options, starts, before = CASES[number]
        layout.resident = 2 + 30 * (number % 2)  # the adapters of q, k and v in their launch, or ahead of it
        steps, layers = 1 + (number in TWO_STEPS), 1 + (number in TWO_LAYERS)
        check_case(folders[family], options, starts, before, dtype, device, steps=steps, layers=layers)


@pytest.mark.triton
@pytest.mark.minutes
@pytest.mark.parametrize("numbers", [EACH_KIND, pytest.param(REST, marks=pytest.mark.long)], ids=["kinds", "rest"])
def test_a_step_equals_the_models_own_in_tritons_interpreter(folders, numbers):
    """In float16, because the interpreter rounds bfloat16 wrongly."""
    paths = {name: str(folder) for name, folder in folders.items()}
    interpret("tests.fast_path.test_decode_step", f"check_all({paths!r}, 'float16', 'cpu', {numbers!r})")


@torch.no_grad()
def check_swapped(folder) -> None:
    """Copy other numbers into the adapter's own memory: an existing step computes with them as a new one does."""
    use_few_programs()
    model, ids, position = loaded(folder, {}, "float16", "cpu", 1), torch.tensor([[7]]), torch.tensor([0])

    def new_step() -> DecodeStep:
        cache = new_cache(model.get_base_model())
        cache.early_initialization(1, model.config.num_key_value_heads, 64, model.dtype, model.device)
        return DecodeStep(model, cache)

    step = new_step()  # made while the adapter was another one
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in adapters:
        assert parameter.abs().max() > 0
        parameter.copy_(parameter.flip(0) * 2)
    assert torch.equal(step(ids, position), new_step()(ids, position))


@pytest.mark.triton
@pytest.mark.minutes
def test_a_step_reads_an_adapter_that_is_copied_into_place(folders):
    interpret("tests.fast_path.test_decode_step", f"check_swapped({str(folders['qwen2'])!r})")


def check_attention(device: str) -> None:
    """Compare attention in a window and under a cap, of one sequence and of two, with the same by hand in fp32."""
    torch.manual_seed(0)
    heads, kv_heads, position, window, cap, splits = 4, 2, 90, 41, 1.5, 4
    for size, starts in itertools.product((32, 96), ([0], [0, 70])):
        m, sequences = 1 if len(starts) == 1 else 16, len(starts)
        keys, values = (torch.randn(sequences, kv_heads, 96, size).half().to(device) for _ in range(2))
        qkv = torch.randn(1, m, (heads + 2 * kv_heads) * size, device=device)
        shape = {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HALF": size // 2,
            "GROUP": 16,
            "SPLITS": splits,
            "POSITIONS": 16,
        }
        shape |= {"NORM": "", "M": m, "PARTS": 1, "CAPPED": True}
        x = torch.zeros(heads * size * m, dtype=torch.float16, device=device)
        out = SimpleNamespace(x=x, A=[x], u=torch.zeros(1, device=device), ranks=[0], rank=0, columns=heads * size)
        zeros = functools.partial(torch.zeros, sequences, heads, splits, device=device)
        scratch = SimpleNamespace(qkv=qkv, mixed=zeros(size), logs=zeros(), roots=zeros())
        layer = SimpleNamespace(
            out=out, shape=shape, keys=keys, values=values, m=m, window=window, head_norms=(x, x),
            numbers=(1e-6, 0.3, 96, cap, window),
        )  # fmt: skip
        still = decode_step.Rotary(torch.ones(96, size, device=device), torch.zeros(96, size, device=device), size // 2)
        at, first = torch.tensor([position], device=device), torch.tensor(starts, device=device)[:, None]
        decode_step.Layer.attend(layer, at, first if m > 1 else at, still, scratch)
        for i, start in enumerate(starts):
            q, k, v = qkv[0, i].view(-1, size).half().float().split([heads, kv_heads, kv_heads])
            seen = slice(max(start, position + 1 - window), position)
            key, value = (
                torch.cat([old[i, :, seen].float(), new[:, None]], 1) for old, new in ((keys, k), (values, v))
            )
            score = cap * torch.tanh(torch.einsum("hd,hnd->hn", q, key.repeat_interleave(2, 0)) * 0.3 / cap)
            want = torch.einsum("hn,hnd->hd", score.softmax(-1), value.repeat_interleave(2, 0)).flatten()
            index = torch.arange(heads * size)
            place = index.view(-1, 4, 4, 8).transpose(1, 2).flatten().argsort()  # `input_place` for one sequence
            place = place if m == 1 else (index % 8 * (heads * size // 8) + index // 8) * m + i
            torch.testing.assert_close(x[place.to(device)].float(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.triton
def test_attention_in_a_window_and_under_a_cap_in_tritons_interpreter():
    interpret("tests.fast_path.test_decode_step", "check_attention('cpu')")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels as they run there")
def test_attention_in_a_window_and_under_a_cap_on_the_gpu():
    check_attention("cuda")


class Captured:
    """A step captured as one CUDA graph, which is how the decoder runs it."""

    def __init__(self, step: DecodeStep):
        self.step = step  # a graph does not keep the buffers that it reads alive
        shapes = (len(step.last), 1), (1,), (len(step.last), 1)
        self.inputs = [torch.zeros(shape, dtype=torch.long, device="cuda") for shape in shapes]
        self.inputs[1].fill_(LENGTH - 1)  # what warming up writes lies behind what is compared
        self.inputs[2].fill_(LENGTH - 1)
        step(*self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.logits.clone()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels as they run there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_captured_step_on_the_gpu_equals_the_models_own(folders, case, dtype):
    family, *rest = case
    check_case(folders[family], *rest, dtype, "cuda", Captured)


# ------------------------------------------------------------------------------------------------ what cannot be done


def two_adapters(model):
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.triton
@pytest.mark.parametrize(
    "family, options, change, reason",
    [
        ("mistral", {}, None, "no plain static cache"),
        ("cwm", {}, None, "CwmForCausalLM: no row in families.py"),
        ("qwen2", {"dora": True}, None, "q_proj is no plain LoRA"),
        ("qwen2", {}, two_adapters, "2 active adapters: default, other"),
        ("qwen2", {"dtype": "float32"}, None, "computes in torch.float32"),
        ("qwen2", {}, None, "the model is on cpu"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_in_one_line(random_models, family, options, change, reason):
    model, _, _ = prepared(random_models(family), **{"dtype": "bfloat16", **options})
    if change:
        change(model)
    config = model.config
    cache = new_cache(model)
    cache.early_initialization(1, config.num_key_value_heads, 64, model.dtype, "cpu")
    with pytest.raises(Unsupported, match=reason) as caught:
        DecodeStep(model, cache)
    assert "\n" not in str(caught.value)


@pytest.mark.triton
def test_an_unquantised_model_and_an_empty_cache_are_refused(random_models):
    model, _ = load_model_and_tokenizer(str(random_models("qwen2")), device="cpu")
    cache = new_cache(model)
    with pytest.raises(Unsupported, match="early_initialization"):
        DecodeStep(model, cache)
    cache.early_initialization(1, 4, 64, model.dtype, "cpu")
    with pytest.raises(Unsupported, match="q_proj is not a 4-bit linear"):
        DecodeStep(model, cache)


# ------------------------------------------------------------------------------------------------ other cards

# Types of the kernels' arguments, by name without the number of a member; the rest are 32-bit integers.
POINTERS = {
    "*bf16": "x hidden total keys values cos sin q_weight k_weight weight next_weight bias after",
    "*fp32": "u inverse lut code2 second offset qkv roots mixed logs parts A B",
    "fp32": "scale eps after_eps cap",
    "*i32": "codes count count_before pairs",
    "*u8": "absmax",
    "*i64": "position starts",
}


def compiled(
    capability: int, kernel, constants: dict, warps: int, stages: int = 3, maxnreg: int | None = None, **types: str
):  # fmt: skip
    """Return a kernel compiled for a card, with pointers aligned as PyTorch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {name: kind for kind, names in POINTERS.items() for name in names.split()} | types
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else known.get(name, known.get(name.rstrip("012"), "i32"))
        signature[name] = kind
        if kind.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def packed(capability: int) -> dict:
    """Return the constants that all products share, for Qwen2.5's quantisation and an adapter of rank 16."""
    import triton

    constants = {"BIAS": False, "NESTED": True, "BLOCKSIZE": 64, "BLOCKSIZE2": 256, "RANK": 16}
    return constants | {"SHUFFLE": True, "HALF": triton.language.bfloat16, "OVERLAP": capability >= 90}


def attention(capability: int, splits: int, m: int, parts: int, half: int = 64) -> dict:
    shape = {
        "HEADS": 16,
        "KV_HEADS": 2,
        "HALF": half,
        "PAD": 1 << (half - 1).bit_length(),
        "CAPPED": half > 64,
        "GROUP": 16,
        "POSITIONS": decode_step.LAYOUT.positions,
    }
    return shape | {"SPLITS": splits, "NORM": "", "TURN": half, "M": m, "PARTS": parts, "OVERLAP": capability >= 90}


def check_compiled(capability: int, done: list) -> None:
    for kernel in done:
        assert kernel.metadata.shared <= SHARED_LIMIT[capability]
        assert f"sm_{capability}" in kernel.asm["ptx"]
        assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == (capability >= 90)


@pytest.mark.triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_within_the_shared_memory_of_each_card(capability):
    """With the constants of Qwen2.5-3B."""
    from fast_path import decode_kernels as kernels
    from fast_path import decode_products

    every = packed(capability) | {"OUTPUTS": 11008, "WARPS": 8, "TURING": False, "ACTIVATION": "silu"}
    narrow, wide = every | {"K": 2048, "WIDE": 8}, every | {"K": 11008, "LOOP": 1, "WIDE": 8}
    apart = narrow | {"WIDE": 1}  # each warp by itself
    linear, half, single = decode_products.linear_kernel, "*bf16", "*fp32"
    first = {"RANK": 16, "TAKE": 1, "CHUNK": 2048, "BLOCK": 2048, "NORM": True}
    one = {"PARTS": 1, "NEXT": False, **first}
    qkv = {"MODE": "stack", "MEMBERS": 3, "BIAS": True, "LOOP": 1, "ADAPTERS": 0}
    gate_up = {"MODE": "swiglu", "MEMBERS": 2, "LOOP": 6, "ADAPTERS": 4}
    down = {"MODE": "residual", "MEMBERS": 1, "NORM": False, "NEXT": True, "ADAPTERS": 24, "TAKE": 4}
    down |= {"CHUNK": 2048, "BLOCK": 1024, "PARTS": 6}
    overlap = {"OVERLAP": capability >= 90}
    combine = {"K": 2048, "M": 1, "SIZE": 128, "PAD": 128, "SPLITS": 64, "POSITIONS": 32, "RANK": 16, "TILE": 16}
    done = [
        compiled(capability, decode_products.adapter_kernel, first | {"K": 2048, "MEMBERS": 3} | overlap, 4),
        compiled(capability, linear, narrow | one | qkv, 8, maxnreg=128, out=single),
        compiled(capability, linear, narrow | one | gate_up, 8, maxnreg=128, out=half),
        compiled(capability, linear, apart | one | gate_up, 8, maxnreg=128, out=half),
        compiled(
            capability, linear, apart | one | gate_up | {"ACTIVATION": "gelu_pytorch_tanh"}, 8, maxnreg=128, out=half
        ),
        compiled(capability, linear, wide | down, 8, maxnreg=128, out=half),
        compiled(capability, kernels.norm_kernel, {"K": 2048, "FIRST": False, "BLOCK": 2048, **overlap}, 4, out=half),
        compiled(capability, kernels.attention_kernel, attention(capability, 64, 1, 1), 4),
        compiled(capability, kernels.attention_kernel, attention(capability, 64, 1, 1) | {"TURN": 48}, 4),
        compiled(capability, kernels.attention_kernel, attention(capability, 64, 1, 1, half=48), 4),
        compiled(capability, kernels.combine_kernel, combine | overlap, 4, out=half),
        compiled(capability, kernels.combine_kernel, combine | overlap | {"K": 3072, "SIZE": 96}, 4, out=half),
    ]
    check_compiled(capability, done)


@pytest.mark.triton
@pytest.mark.parametrize("m", [32, 64])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_batchs_kernels_compile_within_the_shared_memory_of_each_card(capability, m):
    """With the constants of Qwen2.5-3B. Words of weights must be loaded 16 bytes at a time."""
    from fast_path import decode_batch_kernels
    from fast_path import decode_kernels as kernels

    (rows, words, warps), (rows2, words2, warps2) = decode_step.LAYOUT.tile, decode_step.LAYOUT.swiglu_tile
    every = packed(capability) | {"M": m, "ACTIVATION": "silu"}
    rank = {name: every[name] for name in ("RANK", "M", "OVERLAP")}
    tile, tile2 = every | {"ROWS": rows, "STEP": words}, every | {"ROWS": rows2, "STEP": words2}
    qkv = {"SWIGLU": False, "MEMBERS": 3, "BIAS": True, "K": 2048, "OUTPUTS": 2560, "PARTS": 1, "SPLITS": 4}
    gate_up = {"SWIGLU": True, "MEMBERS": 2, "K": 2048, "OUTPUTS": 11008, "PARTS": 1, "SPLITS": 1}
    down = {"SWIGLU": False, "MEMBERS": 1, "K": 11008, "OUTPUTS": 2048, "PARTS": 43, "SPLITS": 8}
    norm = {
        "K": 2048,
        "PARTS": 8,
        "MEMBERS": 3,
        "ORDERED": True,
        "BLOCK": 2048,
        "TILE": 8,
        "AFTER": False,
        "NORM": True,
    }
    combine = {"K": 2048, "SIZE": 128, "PAD": 128, "SPLITS": 8, "POSITIONS": 32, "TILE": 16}
    products = [
        compiled(capability, decode_batch_kernels.batch_linear_kernel, tile | qkv, warps, 1, out="*fp32"),
        compiled(capability, decode_batch_kernels.batch_linear_kernel, tile2 | gate_up, warps2, 1, out="*bf16"),
        compiled(capability, decode_batch_kernels.batch_linear_kernel, tile | down, warps, 1, out="*fp32"),
    ]
    gelu, single = tile2 | gate_up | {"ACTIVATION": "gelu_pytorch_tanh"}, dict.fromkeys(("weight", "after"), "*fp32")
    products.append(compiled(capability, decode_batch_kernels.batch_linear_kernel, gelu, warps2, 1, out="*bf16"))
    for kernel in products:
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
    done = [
        compiled(capability, decode_batch_kernels.batch_norm_kernel, norm | rank, 8, out="*bf16"),
        compiled(
            capability, decode_batch_kernels.batch_norm_kernel, norm | rank | {"AFTER": True}, 8, out="*bf16", **single
        ),
        compiled(
            capability,
            decode_batch_kernels.batch_norm_kernel,
            norm | rank | {"AFTER": True, "NORM": False},
            8,
            out="*bf16",
        ),
        compiled(capability, kernels.attention_kernel, attention(capability, 8, m, 4, half=128), 4),
        compiled(capability, kernels.attention_kernel, attention(capability, 8, m, 4) | {"NORM": "all"}, 4),
        compiled(
            capability,
            decode_batch_kernels.roots_kernel,
            {"Q": 4096, "KV": 4096, "M": m, "PARTS": 4, "BLOCK": 4096, "OVERLAP": capability >= 90},
            8,
        ),
        compiled(
            capability,
            decode_batch_kernels.batch_inner_kernel,
            {"K": 11008, "BLOCK": decode_step.BATCH_CHUNK, **rank},
            4,
        ),
        compiled(capability, kernels.attention_kernel, attention(capability, 8, m, 4), 4),
        compiled(capability, kernels.combine_kernel, combine | rank, 4, out="*bf16"),
    ]
    check_compiled(capability, products + done)
