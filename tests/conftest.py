"""What the tests share: a quiet, offline environment, small models and texts, and the two ways to run a script."""

import functools
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.forked import Forker

ROOT = Path(__file__).resolve().parent.parent

# Before datasets, huggingface_hub and torch are imported, here or in a child: they read these once. Nothing of the
# developer's caches is seen or changed, and nothing asks the network.
CACHE = tempfile.mkdtemp(prefix="qlora-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = CACHE
os.environ["HF_HUB_CACHE"] = str(Path(CACHE) / "hub")
os.environ["HF_DATASETS_CACHE"] = str(Path(CACHE) / "datasets")
# One thread: these models are too small for more, and threads waiting for each other on two busy cores made runs up to
# twenty times slower (measured).
os.environ["OMP_NUM_THREADS"] = "1"
for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHONIOENCODING"):
    os.environ.pop(name, None)
# Tests are to be stopped by these; nohup's runs ignore the one, those that a script starts in the background the other.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests whose parameter says that they compile, skip what needs Triton where it is not installed, and begin with
    the tests that take a minute or more, so that none of them keeps one core busy at the end.
    """
    for item in items:
        if "compiled" in getattr(item, "callspec", SimpleNamespace(params={})).params.values():
            item.add_marker(pytest.mark.compiled)
    if importlib.util.find_spec("triton") is None:
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(pytest.mark.skip(reason="pip install triton: the kernels need it"))
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Have the next test compile anew: after eight models dynamo compiles no more, and what broke a graph stays known."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


# ------------------------------------------------------------------------------------------------ models and texts


QWEN_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained Qwen2 of 4.3 M parameters with its tokenizer."""
    return ROOT / "tiny" / "model"


@pytest.fixture(scope="session")
def qwen_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the config.json of Qwen2.5-3B's shape."""
    folder = tmp_path_factory.mktemp("qwen-3b")
    (folder / "config.json").write_text(json.dumps(QWEN_3B), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def qwen_30b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the config.json of Qwen3-30B-A3B's shape, a mixture of 128 experts."""
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen-30b")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def random_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a random two-layer model of a family, made on its first use.

    qwen2 (tied, biases on q, k, v), llama (own head, no bias), mistral (grouped heads, a window of 16 positions), qwen3
    (norms on q and k, grouped heads), gemma2 (soft-capped logits); ministral and gemma, which have no row in
    fast_path/families.py, the first much like Mistral, the second with another activation and other norms. Hidden size
    and the width of k and v are 256: at rank 16 an adapter matrix has 4,096 elements or more, from which on bitsandbytes
    keeps its states in 8 bit. Their tokenizer is the tiny model's.
    """
    import torch
    import transformers

    KINDS, PART = ["full_attention", "sliding_attention"], {"partial_rotary_factor": 0.75}
    CAP = {"attn_logit_softcapping": 2.0, "sliding_window": 16}
    # attention_multiplier: 1, the default, would saturate the softmax, and gradients in 16 bit would be noise
    GRANITE = {
        "logits_scaling": 6.0,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
    }
    # family: (class prefix, grouped heads, what sets it apart)
    families = {
        "qwen2": ("Qwen2", 4, {"tie_word_embeddings": True}),
        "llama": ("Llama", 4, {"tie_word_embeddings": False, "attention_bias": False}),
        "mistral": ("Mistral", 8, {"tie_word_embeddings": False, "sliding_window": 16}),
        "qwen3": ("Qwen3", 8, {"tie_word_embeddings": True}),
        "gemma2": ("Gemma2", 4, {"query_pre_attn_scalar": 64, "final_logit_softcapping": 5.0, **CAP}),
        "gemma3": ("Gemma3", 8, {"query_pre_attn_scalar": 64, "sliding_window": 16, "layer_types": KINDS}),
        "phi3": ("Phi3", 8, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **PART}}),
        "phi3_96": ("Phi3", 4, {"head_dim": 96}),  # Phi-3-mini's
        "smollm3": ("SmolLM3", 8, {"no_rope_layers": [0, 1], "tie_word_embeddings": True}),
        "olmo2": ("Olmo2", 8, {}),
        "olmo3": ("Olmo3", 8, {"sliding_window": 16, "layer_types": KINDS}),
        "ministral": ("Ministral", 8, {"tie_word_embeddings": False, "sliding_window": 16, "layer_types": KINDS}),
        "cwm": ("Cwm", 8, {"tie_word_embeddings": False, "sliding_window": 64, "bos_token_id": 1}),
        "gemma": ("Gemma", 4, {}),
        "granite": ("Granite", 8, GRANITE),
        "cohere": ("Cohere", 4, {"logit_scale": 0.0625}),
    }

    @functools.cache
    def make(family: str) -> Path:
        prefix, heads, own = families[family]
        sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        attention = {"num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 64}
        # ids of the tiny tokenizer; weights large enough that no two tokens are as good as equal
        rest = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.08}
        kind = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
        config = kind(**(sizes | attention | rest | own))
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for name, weight in model.named_parameters():
            if "norm" in name and not prefix.startswith(
                "Gemma"
            ):  # whose norms add 1; at 1 a norm's weight could be forgotten
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        model = model.to(torch.bfloat16)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model / name, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt of 60 documents of eight lines, about 5,600 tokens of Shakespeare."""
    text = (ROOT / "tiny" / "text" / "train.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    documents = ["\n".join(lines[i : i + 8]) + "\n" for i in range(0, 480, 8)]
    path = tmp_path_factory.mktemp("corpus") / "plays.txt"
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 chats made of the plays' lines."""
    text = (ROOT / "tiny" / "text" / "train.txt").read_text(encoding="utf-8")
    lines, rows = iter([line for line in text.splitlines() if line.strip()]), []
    for size in itertools.islice(itertools.cycle([2, 4, 2, 6, 3]), 60):
        turns = enumerate(itertools.islice(lines, size))
        rows.append({"messages": [{"role": ("user", "assistant")[i % 2], "content": line} for i, line in turns]})
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list]:
    """A function that has packed samples take varlen attention here, from SDPA a sample; returns the list of cu_seqlens
    that it is called with. While a layer is compiled, which cannot look at numbers, it is a mask made of them.
    """
    import torch
    import torch.nn.functional as F

    from fast_path import attention as attention_module

    calls = []

    def attend(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa=False):
        assert key_starts is starts and longest == longest_key and window_size == (-1, 0)
        how = {"scale": scale, "enable_gqa": k.shape[1] < q.shape[1]}
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if torch.compiler.is_compiling():
            sample = torch.searchsorted(starts, torch.arange(q.shape[2], dtype=torch.int32), right=True)
            mask = (sample[:, None] == sample[None]).tril()
            return F.scaled_dot_product_attention(q, k, v, mask, **how)[0].transpose(0, 1)
        calls.append(starts)
        assert starts.dtype is torch.int32 and starts[0] == 0 and starts[-1] == q.shape[2]
        parts = []
        for start, stop in itertools.pairwise(starts.tolist()):
            assert stop - start <= longest
            if stop > start:
                part = (x[:, :, start:stop] for x in (q, k, v))
                parts.append(F.scaled_dot_product_attention(*part, is_causal=True, **how))
        return torch.cat(parts, 2)[0].transpose(0, 1)

    def switch() -> list:
        monkeypatch.setattr(attention_module, "varlen_obstacle", lambda model, length: None)
        monkeypatch.setattr(attention_module, "varlen_attn", attend)
        return calls

    return switch


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.fixture
def train(corpus: Path, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    """A function that runs train_qlora.main here, on the tiny model: train(*flags) -> (exit code, output_dir).

    Without flags it makes three optimizer steps of 4 sequences of 64 tokens of `corpus`; a flag replaces that.
    """
    import torch

    import train_qlora

    def run(*flags: object, output_dir: Path | None = None) -> tuple[int, Path]:
        output_dir = output_dir or tmp_path / "output"
        argv = ["--config", ROOT / "tiny" / "config.yaml", "--dataset", corpus, "--output_dir", output_dir]
        argv += ["--max_length", 64, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 3]
        argv += ["--compile", "off"]  # compiling takes longer than the three steps; tests of it say on
        try:
            return train_qlora.main([str(word) for word in (*argv, *flags)]), output_dir
        finally:
            torch.use_deterministic_algorithms(False)

    return run


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """The process that has imported the scripts and forks children of itself."""
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture
def run_cli(tmp_path: Path, forker: Forker) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs a script of the toolkit as a child: run_cli("train_qlora.py", *flags, env=, input=, cwd=).

    The child's folder is `tmp_path`, so that nothing it leaves by mistake lands in the repository. fresh: a new Python, as a
    user starts it, instead of a child of a process that has imported the scripts (tests/forked.py).
    """

    def run(
        script: str,
        *flags: object,
        env: dict[str, str] | None = None,
        input: str | None = None,
        cwd: Path | None = None,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        arguments, environment = list(map(str, flags)), {**os.environ, **(env or {})}
        if not fresh and hasattr(os, "fork"):
            return forker.run(Path(script).stem, arguments, cwd or tmp_path, environment, input, 300)
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=cwd or tmp_path,
            env=environment,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=300,
        )

    return run
