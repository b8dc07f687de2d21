"""Several adapters on one base: each answers as it does alone, whatever was active before, and the decoder is kept."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

from config import ConfigError
from fast_path.decoder import Watch
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer
from toolkit.adapter_set import AdapterSet
from toolkit.adapters import load_adapter
from toolkit.generation import Generator

IDS = [[5, 9, 33, 120, 77, 8, 41, 3]]


def load_base(folder: Path, dtype: str = "float32", device: str = "cpu", **options: object):
    config = create_bnb_config(compute_dtype=dtype)
    model, _ = load_model_and_tokenizer(str(folder), config, device=device, **options)
    model.generation_config = GenerationConfig()  # no end token: answers have their whole length
    return model


def make(model_folder: Path, folder: Path, seed: int, lora: LoraConfig) -> Path:
    model = get_peft_model(load_base(model_folder), lora)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("adapters")
    kinds = {
        "r8": create_lora_config(rank=8, alpha=16),
        "r8 too": create_lora_config(rank=8, alpha=16),
        "r4": create_lora_config(rank=4, alpha=16),
        "attention": create_lora_config(rank=8, alpha=16, target_modules=("q_proj", "v_proj")),
        "pattern": LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
            alpha_pattern={"q_proj": 5}, task_type="CAUSAL_LM",
        ),
    }  # fmt: skip
    return {name: make(tiny_model, top / name, seed, lora) for seed, (name, lora) in enumerate(kinds.items())}


def greedy(generator: Generator, new: int = 12) -> list[int]:
    return generator.generate(IDS, GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0), Watch())[0]


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    return model(input_ids=torch.tensor(IDS)).logits


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tiny_model: Path) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Logits and greedy tokens of plain peft with each adapter, and of the base."""
    found = {}
    for name, folder in folders.items():
        model = PeftModel.from_pretrained(load_base(tiny_model), folder).eval()
        found[name] = logits(model), greedy(Generator(model, pytest.fail))
    with model.disable_adapter():
        found["base"] = logits(model), greedy(Generator(model, pytest.fail))
    assert len({tuple(tokens) for _, tokens in found.values()}) == len(found), "the adapters must differ"
    return found


@pytest.mark.parametrize("fast", [False, True])
def test_each_answers_as_alone_in_any_order(fast, folders, alone, tiny_model):
    adapters = AdapterSet(load_base(tiny_model), folders)
    adapters.generator = generator = Generator(adapters.model, pytest.fail, fast)
    for name in ["r8", "r4", "r8 too", "attention", "r8", "pattern", "r8 too", "r4", "pattern"]:
        adapters.use(name)
        expected, tokens = alone[name]
        assert (logits(adapters.model) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert greedy(generator) == tokens, name
        with adapters.model.disable_adapter():
            assert greedy(generator) == alone["base"][1]
        assert greedy(generator) == tokens  # the cache of the base's answer is not taken for the adapter's


def test_adapters_of_one_shape_share_memory_and_decoder(folders, tiny_model):
    adapters = AdapterSet(load_base(tiny_model), folders)
    adapters.generator = generator = Generator(adapters.model, pytest.fail, fast=True)
    layer = adapters.layers[0]

    def seen(name: str) -> tuple:
        adapters.use(name)
        return layer.lora_A["default"].weight.data_ptr(), layer.lora_B["default"].weight.data_ptr(), generator.decoder

    first, small = seen("r8"), seen("r4")
    assert seen("r8 too") == first == seen("attention") and seen("r4") == small
    assert all(one != other for one, other in zip(first, small, strict=True))


def test_fused_operators_read_the_active_adapter(folders, alone, tiny_model):
    """What a GPU's prompts go through, with the operators that need no Triton."""
    from fast_path.dropout import DropoutClock
    from fast_path.layers import fuse

    adapters = AdapterSet(load_base(tiny_model), folders)
    assert fuse(adapters.model, DropoutClock(0, torch.device("cpu")), 0.0, False, pieces=2)
    adapters.generator = Generator(adapters.model, pytest.fail, fast=False)
    for name in ["r4", "r8", "pattern", "r8 too", "attention"]:
        adapters.use(name)
        expected = alone[name][0]
        assert (logits(adapters.model) - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_the_base_is_in_memory_once_and_as_it_was(folders, tiny_model):
    base = load_base(tiny_model)
    before = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    adapters = AdapterSet(base, folders)
    kept = {n.replace(".base_layer", ""): p.data_ptr() for n, p in base.named_parameters() if ".lora_" not in n}
    assert kept == before
    with adapters.model.disable_adapter():
        assert torch.equal(logits(adapters.model), load_base(tiny_model)(input_ids=torch.tensor(IDS)).logits)
    adapted = {name.partition(".base_layer")[0] for name, _ in base.named_parameters() if ".base_layer." in name}
    kinds = {name.rpartition(".")[2] for name in adapted}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("odd", [{"use_dora": True}, {"train_tokens": True}], ids=["dora", "tokens"])
def test_what_cannot_be_swapped_is_refused_in_one_line(odd, folders, tiny_model, tmp_path):
    if "train_tokens" in odd:
        lora = LoraConfig(r=8, target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    else:
        lora = create_lora_config(rank=8, alpha=16, use_dora=True)
    folder = make(tiny_model, tmp_path / "odd", 9, lora)
    with pytest.raises(ConfigError, match="expected plain LoRA on linear layers.*give it alone") as found:
        AdapterSet(load_base(tiny_model), {"r8": folders["r8"], "odd": folder})
    assert len(found.value.problems) == 1 and str(folder) in found.value.problems[0]


def test_loading_says_nothing(folders, tiny_model, recwarn):
    AdapterSet(load_base(tiny_model), dict(itertools.islice(folders.items(), 2)))
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: graphs that are captured")
def test_switching_on_a_gpu_keeps_the_graphs_and_the_answers(folders, tiny_model):
    names = ["r8", "r8 too", "r4"]

    def answers(generator: Generator) -> list[list[int]]:
        return [greedy(generator) for _ in range(3)]  # the first without graphs

    alone = {}
    for name in names:
        model = load_adapter(load_base(tiny_model, "bfloat16", "cuda"), folders[name])
        alone[name] = answers(Generator(model, pytest.fail))[-1]
    adapters = AdapterSet(load_base(tiny_model, "bfloat16", "cuda"), {name: folders[name] for name in names})
    adapters.generator = generator = Generator(adapters.model, pytest.fail)
    captured: dict[str, int] = {}
    for name in [*names, *names[::-1], *names]:
        adapters.use(name)
        assert answers(generator)[-1] == alone[name], name
        captured.setdefault(name, len(generator.decoder.captured))
        assert len(generator.decoder.captured) == captured[name], "a switch captures nothing anew"
    assert captured["r8"] == captured["r8 too"] and len(set(map(tuple, alone.values()))) > 1
