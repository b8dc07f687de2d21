"""The decode kernels give what the model's own forward does: in Triton's interpreter, and on a GPU if there is one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import StaticCache

import decode_ops
from decode_ops import DecodeStep, Unsupported
from generation_utils import cache_argument
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from tests.test_fused_ops import SHARED_LIMIT, prepared

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 160  # of the cache: five tiles of 32 positions

# family, options of `prepared` (None: the base without peft), tokens before the first step
CASES = [
    ("qwen2", {}, 150),
    ("qwen2", {"double": False, "targets": ["k_proj", "v_proj", "up_proj"]}, 1),
    ("qwen3", {"quant_type": "fp4", "targets": ["q_proj", "down_proj"]}, 64),
    ("llama", None, 33),
    ("mistral", {"quant_type": "fp4", "double": False, "targets": ["o_proj", "gate_proj"]}, 31),
]


@pytest.fixture(scope="module")
def folders(random_models, tmp_path_factory):
    """The families' folders; Mistral's without its window of 16 positions."""
    mistral = tmp_path_factory.mktemp("mistral") / "without_window"
    shutil.copytree(random_models("mistral"), mistral)
    config = json.loads((mistral / "config.json").read_text(encoding="utf-8"))
    (mistral / "config.json").write_text(json.dumps(config | {"sliding_window": None}), encoding="utf-8")
    return {"mistral": mistral, **{name: random_models(name) for name in ("qwen2", "qwen3", "llama")}}


def loaded(folder, options, dtype, device):
    """Return a model, with a non-zero adapter if there are options, that attends as transformers does.

    Biases and the norms' weights, zeros and ones in a new model, become what a wrong kernel would show.
    """
    if options is None:
        base = model = load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype=dtype), device=device)[0]
    else:
        model = prepared(folder, dtype=dtype, p=0.0, device=device, **options)[0]
        base = model.get_base_model()
        base.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or "norm" in name:
            noise = torch.randn(parameter.shape, generator=generator).bfloat16() / 4
            parameter.data += noise.to(parameter)
    return model.eval()


def new_cache(model, length=LENGTH):
    return StaticCache(model.config, max_cache_len=length)


@torch.no_grad()
def check_case(folder, options, before: int, dtype: str, device: str, wrap=lambda step: step) -> None:
    """Compare two steps after a prompt with the model's own, both against fp32 on the same 4-bit weights."""
    ids = torch.randint(0, 4096, (1, before + 2), generator=torch.Generator().manual_seed(5)).to(device)
    model, exact = (loaded(folder, options, kind, device) for kind in (dtype, "float32"))
    plain, mine, reference = (new_cache(m) for m in (model, model, exact))
    for m, cache in ((model, plain), (model, mine), (exact, reference)):
        m(input_ids=ids[:, :before], **cache_argument(m, cache), use_cache=True)
    step = wrap(DecodeStep(model, mine))
    for position in range(before, before + 2):
        token, where = ids[:, position : position + 1], torch.tensor([position], device=device)
        found = step(token, where)
        own, want = (
            m(input_ids=token, position_ids=where[None], **cache_argument(m, cache)).logits[0].float()
            for m, cache in ((model, plain), (exact, reference))
        )
        assert found.shape == want.shape and found.dtype is torch.float32
        error, limit = ((x - want).norm() / want.norm() for x in (found, own))
        assert error <= 1.1 * limit + 2e-4, (position, error, limit)
        assert torch.cosine_similarity(found, want).item() > 0.9999
    written = slice(before, before + 2)
    for a, b, c in zip(mine.layers, plain.layers, reference.layers, strict=True):
        for name in ("keys", "values"):
            found, own, want = (getattr(layer, name).float() for layer in (a, b, c))
            error, limit = ((x - want)[:, :, written].norm() for x in (found, own))
            assert error <= 1.1 * limit + 2e-4 * want[:, :, written].norm(), (name, error, limit)
            rest = torch.ones(LENGTH, dtype=torch.bool)
            rest[written] = rest[-1] = False  # the last: where a capture warms up
            assert torch.equal(found[:, :, rest], own[:, :, rest])  # nothing else was touched


def check_all(folders: dict[str, str], dtype: str, device: str) -> None:
    decode_ops.LAYOUT.rows = 128  # a program costs the interpreter as much whatever its size
    for family, options, before in CASES:
        check_case(folders[family], options, before, dtype, device)


def test_a_step_equals_the_models_own_in_tritons_interpreter(folders):
    """In a process of its own: Triton's import chooses the interpreter. In float16: it rounds bfloat16 wrongly."""
    pytest.importorskip("triton", reason="pip install triton: the kernels need it")
    paths = {name: str(folder) for name, folder in folders.items()}
    program = f"from tests.test_decode_ops import check_all; check_all({paths!r}, 'float16', 'cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Captured:
    """A step as one CUDA graph, as its callers run it."""

    def __init__(self, step: DecodeStep):
        self.step = step  # a graph does not keep the buffers that it reads alive
        self.ids, self.position = (torch.zeros(n, dtype=torch.long, device="cuda") for n in ((1, 1), (1,)))
        self.position.fill_(LENGTH - 1)  # what warming up writes lies behind what is compared
        step(self.ids, self.position)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.ids, self.position)

    def __call__(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(ids)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits.clone()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the kernels as they run there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_captured_step_on_the_gpu_equals_the_models_own(folders, case, dtype):
    family, *rest = case
    check_case(folders[family], *rest, dtype, "cuda", Captured)


# ------------------------------------------------------------------------------------------------ what cannot be done


def two_adapters(model):
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    "family, options, change, reason",
    [
        ("gemma2", {}, None, "Gemma2ForCausalLM is unknown"),
        ("mistral", {}, None, "sliding window"),
        ("qwen2", {"dora": True}, None, "q_proj is no plain LoRA"),
        ("qwen2", {}, two_adapters, "2 active adapters: default, other"),
        ("qwen2", {"dtype": "float32"}, None, "computes in torch.float32"),
        ("qwen2", {}, None, "the model is on cpu"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_in_one_line(random_models, family, options, change, reason):
    pytest.importorskip("triton", reason="pip install triton: the kernels need it")
    model, _, _ = prepared(random_models(family), **{"dtype": "bfloat16", **options})
    if change:
        change(model)
    config = model.config
    cache = new_cache(model)
    cache.early_initialization(1, config.num_key_value_heads, 64, model.dtype, "cpu")
    with pytest.raises(Unsupported, match=reason) as caught:
        DecodeStep(model, cache)
    assert "\n" not in str(caught.value)


def test_an_unquantised_model_and_an_empty_cache_are_refused(random_models):
    pytest.importorskip("triton", reason="pip install triton: the kernels need it")
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
    "*bf16": "residual flat keys values cos sin q_weight k_weight weight bias",
    "*fp32": "u lut code2 second offset qkv mixed logs A B",
    "fp32": "scale eps",
    "*i32": "codes",
    "*u8": "absmax",
    "*i64": "position",
}


def compiled(capability: int, kernel, constants: dict, warps: int, **types: str):
    """Return a kernel compiled for a card, its pointers aligned as PyTorch aligns them."""
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
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_compile_within_the_shared_memory_of_each_card(capability):
    """With the constants of Qwen2.5-3B."""
    triton = pytest.importorskip("triton", reason="pip install triton: the kernels need it")
    rank = {"RANK": 16, "OVERLAP": capability >= 90}
    packed = {"BIAS": False, "NESTED": True, "BLOCKSIZE": 64, "BLOCKSIZE2": 256, "ROWS": decode_ops.LAYOUT.rows}
    packed |= {"SHUFFLE": True, "HALF": triton.language.bfloat16, "OUTPUTS": 11008, **rank}
    narrow, wide = packed | {"K": 2048, "BLOCKS": 32}, packed | {"K": 11008, "BLOCKS": 64}
    one = {"PARTS": 1, "PARTS_2": 1}
    shape = {"HEADS": 16, "KV_HEADS": 2, "HALF": 64, "GROUP": 16, "SPLITS": 64, "POSITIONS": 32, "NORM": False}
    shape |= {"OVERLAP": capability >= 90}
    linear, half, single, pairs = decode_ops._linear_kernel, "*bf16", "*fp32", "*i32"
    member = {"MODE": "residual", "MEMBERS": 1, "PARTS": 6, "PARTS_2": 8}
    norm, combine = {"K": 2048, "ORDERED": True, "BLOCK": 2048}, {"K": 2048, "SIZE": 128, "SPLITS": 64, "TILE": 16}
    qkv, gate_up = {"MODE": "stack", "MEMBERS": 3, "BIAS": True}, {"MODE": "swiglu", "MEMBERS": 2}
    done = [
        compiled(capability, linear, narrow | one | qkv, 1, x=pairs, out=single),
        compiled(capability, linear, narrow | one | gate_up, 1, x=pairs, out=half),
        compiled(capability, linear, wide | member, 2, x=pairs, out=half),
        compiled(capability, decode_ops._norm_kernel, norm | rank, 4, x=half, out=half),
        compiled(capability, decode_ops._inner_kernel, {"K": 11008, "BLOCK": decode_ops.CHUNK, **rank}, 4, x=half),
        compiled(capability, decode_ops._attention_kernel, shape, 4),
        compiled(capability, decode_ops._combine_kernel, combine | rank, 4, out=half),
    ]
    for kernel in done:
        assert kernel.metadata.shared <= SHARED_LIMIT[capability]
        assert f"sm_{capability}" in kernel.asm["ptx"]
        assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == (capability >= 90)
