"""Layers whose activations wait in main memory learn what recomputed ones do, and hold as little as the plan says."""

import json
import shutil
from unittest import mock

import pytest
import torch
import transformers

from config import load_config
from fast_path import families, swapping
from fast_path.compiled import compile_layers, recompute
from fast_path.kept_outputs import NOTHING_KEPT, Kept
from fast_path.layers import fuse
from fast_path.micro_step import Captured
from fast_path.swapping import NoMainMemory, Swap, is_activation, swapped_layers
from quantization_utils import set_gradient_checkpointing
from tests.fast_path.test_layers import furthest, gradients, prepared
from toolkit import memory_plan

LAYERS = 7


@pytest.fixture(scope="module")
def deep(random_models, tmp_path_factory):
    """A function that returns the folder of a random model of a family with seven layers."""

    def make(family):
        source, folder = random_models(family), tmp_path_factory.mktemp(f"deep_{family}")
        settings = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": LAYERS}
        if kinds := settings.get("layer_types"):
            settings["layer_types"] = [kinds[number % len(kinds)] for number in range(LAYERS)]
        if "no_rope_layers" in settings:
            settings["no_rope_layers"] = [int(number % 2) for number in range(LAYERS)]
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder)
        return folder

    return make


@pytest.fixture
def everything(monkeypatch):
    """Let small tensors be worth a copy, too."""
    monkeypatch.setattr(swapping, "SMALL", 4096)


def compiled(folder, **how):
    """Return what `prepared` does, with compiled layers that are all checkpointed, and the layers."""
    torch._dynamo.reset()
    model, clock, loss = prepared(folder, **how)
    set_gradient_checkpointing(model, True)
    fuse(model, clock, 0.05, kernels=how.get("device") == "cuda")
    compile_layers(model)
    return model, clock, loss, families.decoder_layers(model.get_base_model())


def test_swapped_layers_are_spread_over_the_checkpointed_ones():
    assert swapped_layers(36, 3, 36) == [0, 11, 23]
    assert swapped_layers(32, 4, 36) == [0, 8, 16, 24]  # the first of each group, which the backward pass needs last
    assert swapped_layers(6, 6, 7) == swapped_layers(7, 99, 7) == [0, 1, 2, 3, 4, 5]  # never the last layer
    assert swapped_layers(0, 5, 36) == swapped_layers(36, 0, 36) == swapped_layers(1, 1, 1) == []


@pytest.mark.compiled
@pytest.mark.parametrize("family", ["qwen2", pytest.param("gemma3", marks=pytest.mark.long)])
def test_swapped_layers_learn_what_recomputed_ones_do(deep, everything, monkeypatch, family):
    """With any number of them, bit for bit, with no more code to compile, and with two layers' tensors at most."""
    model, clock, loss, layers = compiled(deep(family))
    recompute(layers, 7, Kept(attention=1))
    value, repeated = gradients(model, clock, loss)
    recompute(layers, 0, NOTHING_KEPT)
    model.zero_grad()
    _, free = gradients(model, clock, loss)
    graphs, held = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    leave, fetch = Swap._leave, Swap._fetch

    def noted(function):
        def run(self, *arguments):
            result = function(self, *arguments)
            held.append(sum(map(bool, self.here)))
            return result

        return run

    monkeypatch.setattr(Swap, "_leave", noted(leave))
    monkeypatch.setattr(Swap, "_fetch", noted(fetch))
    for checkpointed, swapped, expected in ((7, 1, [0]), (7, 3, [0, 2, 4]), (7, 7, [*range(6)]), (4, 2, [0, 2])):
        recompute(layers, checkpointed, Kept(attention=1), swapped)
        swap = layers[0].swap
        assert [n for n, layer in enumerate(layers) if n < checkpointed and not layer.recompute] == expected
        assert [layer.keeps_attention for layer in layers].count(True) == 1
        for _ in range(2):
            model.zero_grad()
            again, found = gradients(model, clock, loss)
            assert again == value and furthest(found, repeated) == furthest(found, free) == 0
        assert [*swap.turns] == expected and not any(swap.here)
        assert all(
            len(sizes) > 4 and len(hosts) == len(sizes) for sizes, hosts in zip(swap.sizes, swap.hosts, strict=True)
        )
    assert max(held) == 2
    another = family == "gemma3"  # where the layer that keeps attention's output may be of the other kind
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + another


@pytest.mark.compiled
def test_batches_of_other_sizes(deep, everything):
    model, clock, loss, layers = compiled(deep("qwen2"))
    for length in (24, 40, 16):
        recompute(layers, 7, NOTHING_KEPT)
        model.zero_grad()
        value, repeated = gradients(model, clock, loss, length)
        recompute(layers, 7, NOTHING_KEPT, 3)
        model.zero_grad()
        again, found = gradients(model, clock, loss, length)
        assert again == value and furthest(found, repeated) == 0
    model.eval()
    with torch.no_grad():
        loss(*[torch.zeros(2, 24, dtype=torch.int64)] * 2)  # nothing is saved
    assert not any(layers[0].swap.here) and not any(layers[0].swap.away)


@pytest.mark.compiled
@pytest.mark.parametrize("family", ["qwen2", pytest.param("olmo2", marks=pytest.mark.long)])
def test_what_leaves_is_what_the_plan_counts(deep, everything, family):
    """Of a layer's saved bytes; the rest of them are a few numbers per token."""
    folder = deep(family)
    model, clock, loss, layers = compiled(folder)
    recompute(layers, 7, NOTHING_KEPT, 3)
    gradients(model, clock, loss, 64)
    left = sum(host.nbytes for host in layers[0].swap.hosts[0])
    overrides = {"model.name": str(folder), "quantization.compute_dtype": "bfloat16", "lora.rank": "8"}
    config = load_config((), overrides)
    counted = memory_plan.saved_bytes(memory_plan.configured_shape(config), config, memory_plan.COMPILED) * 2 * 64
    assert 0.9 < left / 2 / counted < 1.05  # in fp32 here


def test_memory_that_cannot_be_pinned_is_one_line(monkeypatch):
    def refuse(size, pin):
        raise RuntimeError("CUDA error:\nout of memory")

    monkeypatch.setattr(swapping, "pinned", refuse)
    swap = Swap([0], 1, torch.device("cpu"))
    expected = "main memory holds 0.00 GiB of swapped layers, and 2 MiB more cannot be pinned"
    with pytest.raises(NoMainMemory, match=rf"{expected} \(CUDA error: out of memory\)"):
        swap._leave(0, torch.zeros(2**19))


def test_activations_leave_once_and_come_back_as_they_were(everything):
    """Parts of one memory share a copy; weights and what all layers are given stay."""
    swap = Swap([0], 1, torch.device("cpu"))
    joined = torch.arange(2.0 * 32 * 64).view(2, 32, 64)
    parts = joined[..., :20], joined[..., 20:], joined.transpose(1, 2)
    memory, mask = torch.zeros(100, 64), torch.zeros(2, 64, 64)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(
        memory[:64]
    )  # a part of the memory of all adapters, with as many rows as there are tokens
    weight = layer.weight.detach()
    hooks = []
    with swap.around(0, layer, torch.zeros(2, 32, 8), {"mask": [mask]}):
        hooks += torch._C._autograd._top_saved_tensors_default_hooks(True)
        packed = [hooks[0](x) for x in (*parts, weight, mask)]
    assert [type(x) for x in packed] == [swapping.Waiting] * 3 + [torch.Tensor] * 2
    assert swap.sizes == [[joined.nbytes]]
    out = torch.zeros(2, requires_grad=True).sum()
    swap.after(1, out)
    assert swap.here == [[]]
    joined_before, _ = joined.clone(), joined.zero_()
    out.backward()
    expected = joined_before[..., :20], joined_before[..., 20:], joined_before.transpose(1, 2)
    for part, waiting in zip(expected, packed[:3], strict=True):
        back = hooks[1](waiting)
        assert torch.equal(back, part) and back.stride() == part.stride()
    assert swap.here == [[]]
    assert not is_activation(torch.zeros(2, 64), {2, 8})  # too small
    assert not is_activation(torch.zeros(2**19), {2, 2**19})


@pytest.mark.compiled
def test_where_everything_is_small_nothing_waits_for_copies(deep):
    """A capture would fail at an event that was recorded outside of it."""
    model, clock, loss, layers = compiled(deep("qwen2"))
    value, repeated = gradients(model, clock, loss)
    recompute(layers, 7, NOTHING_KEPT, 3)
    swap, called = layers[0].swap, mock.Mock()
    swap.stream, swap.copied = called, [called] * 3
    model.zero_grad()
    again, found = gradients(model, clock, loss)
    assert again == value and furthest(found, repeated) == 0
    assert not called.mock_calls and swap.sizes == [[], [], []]


# ------------------------------------------------------------------------------------------------ on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: streams, pinned memory and graphs")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "olmo2", "phi3"])
def test_a_captured_step_with_swapped_layers_learns_the_same(deep, everything, family):
    folder, device = deep(family), torch.device("cuda")
    parts = compiled(folder, dtype="bfloat16", device="cuda")
    model, clock, loss, layers = parts
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = [
        torch.randint(0, 4096, (4, 512), generator=torch.Generator().manual_seed(n)).to(device) for n in range(3)
    ]

    def step(input_ids, labels):
        total = loss(input_ids, labels)
        total.backward()
        return total.detach()

    def learn():
        """Return the gradients of three batches, each from a replayed graph."""
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        graph = Captured(step, device, 4, 512, ["input_ids", "labels"])
        graph.capture(torch.cuda.graph_pool_handle())
        found = []
        for batch in batches:
            for parameter in trained.values():
                parameter.grad.zero_()
            graph(input_ids=batch, labels=batch)
            found.append({name: p.grad.clone() for name, p in trained.items()})
        return found

    clock.set(3, torch.arange(4))
    for checkpointed, swapped in ((7, 2), (7, 6), (5, 3)):
        recompute(layers, checkpointed, NOTHING_KEPT, swapped)
        with_swaps = learn()
        for (
            layer
        ) in layers:  # which layers are recomputed stays, since a norm after an MLP keeps 8 bits where they are not
            layer.swap = None
        for found, known in zip(with_swaps, learn(), strict=True):
            # The order of atomic sums may differ between two backward passes of the same numbers.
            assert furthest(found, known) < 1e-3


@pytest.mark.gpu
@gpu
def test_swapped_layers_take_less_memory_on_the_gpu(deep):
    model, clock, loss, layers = compiled(deep("qwen2"), dtype="bfloat16", device="cuda")
    ids, peaks = torch.randint(0, 4096, (8, 1024), device="cuda"), []
    for checkpointed, swapped in ((0, 0), (6, 6)):
        recompute(layers, checkpointed, NOTHING_KEPT, swapped)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss(ids, ids).backward()
            model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    each = sum(host.nbytes for host in layers[0].swap.hosts[0])
    assert each > 2**25 and peaks[0] - peaks[1] > 3 * each
