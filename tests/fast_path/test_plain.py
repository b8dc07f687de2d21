"""The fast path's plain twins: stateless dropout, attention without a mask tensor, cross entropy over a frozen head."""

import itertools
import json
import math

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fast_path import micro_step, optimizers
from fast_path.attention import use_causal_attention
from fast_path.dropout import DropoutClock, StatelessDropout, drop_threshold, use_stateless_dropout
from fast_path.loss import (
    IGNORED,
    CausalLMLoss,
    chunked_cross_entropy,
    default_logit_chunk,
    position_losses,
    shift_labels,
)
from quantization_utils import (
    create_bnb_config,
    create_lora_config,
    load_model_and_tokenizer,
    prepare_model_for_training,
)

P = 0.05


def clock_at(step: int = 0, sequences: tuple[int, ...] = (0,), seed: int = 42) -> DropoutClock:
    clock = DropoutClock(seed, torch.device("cpu"))
    clock.set(step, torch.tensor(sequences))
    return clock


def adapted(folder, dropout: float = P, checkpointing: bool | int = False, clock: DropoutClock | None = None, **lora):
    """Return (model in training mode with stateless dropout, its clock); no lora_B is zero."""
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype="float32"), device="cpu")
    torch.manual_seed(0)
    model = prepare_model_for_training(model, create_lora_config(dropout=dropout, **lora), checkpointing)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    clock = clock or clock_at(3, (0, 1))
    use_stateless_dropout(model, dropout, clock)
    return model.train(), clock


def dropouts(model) -> dict[str, StatelessDropout]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StatelessDropout)}


def ids_of(length: int = 24, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 4096, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients_of(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------ the mask


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_keep_rate_is_right_within_five_sigma(p):
    keep = clock_at(7, (0, 1, 2, 3)).keep(123, 256, 1024, p)
    assert keep.shape == (4, 256, 1024) and keep.dtype is torch.bool
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):  # overall, and for each sequence, position and feature
        kept = keep.double().sum(axes)
        count = keep.numel() / kept.numel()
        sigma = math.sqrt(count * p * (1 - p))
        assert ((kept - count * (1 - p)).abs() <= 5 * sigma).all(), axes


def test_what_drops_is_a_share_of_all_hashes():
    assert [drop_threshold(p) for p in (0.0, 0.25, 0.5)] == [0, 2**14, 2**15]
    assert clock_at().keep(1, 64, 64, 0.0).all()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Pearson's correlation, in units of its standard deviation under independence."""
    a, b = (x.double().flatten() for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


def test_masks_are_independent_in_every_direction():
    """Neighbours in each coordinate of the counter, near and far, are uncorrelated within five sigma."""
    salt, length, features, p = 99, 64, 512, 0.3
    keep = clock_at(5, tuple(range(8))).keep(salt, length, features, p)
    for distance in (1, 2, 3, 4, 7, 8, 16, 32):
        assert abs(correlation(keep[..., distance:], keep[..., :-distance])) < 5, f"features {distance} apart"
        assert abs(correlation(keep[:, distance:], keep[:, :-distance])) < 5, f"positions {distance} apart"
        if distance < 8:
            assert abs(correlation(keep[distance:], keep[:-distance])) < 5, f"sequences {distance} apart"
        diagonal = correlation(keep[:, distance:, distance:], keep[:, :-distance, :-distance])
        assert abs(diagonal) < 5, f"positions and features {distance} apart"
    others = {
        "step": clock_at(6, tuple(range(8))).keep(salt, length, features, p),
        "far step": clock_at(5 + 2**20, tuple(range(8))).keep(salt, length, features, p),
        "module": clock_at(5, tuple(range(8))).keep(salt + 1, length, features, p),
        "seed": clock_at(5, tuple(range(8)), seed=43).keep(salt, length, features, p),
        "step and sequence swapped": clock_at(0, (5,) * 8).keep(salt, length, features, p),
    }
    for name, other in others.items():
        assert not torch.equal(keep, other), name
        assert abs(correlation(keep, other)) < 5, name
    # No sequence has the mask of another step's sequence, as a key made by adding or by xor of the two would give.
    masks = [clock_at(s, (q,)).keep(salt, length, features, p) for s, q in itertools.product(range(6), range(6))]
    for a, b in itertools.combinations(masks, 2):
        assert not torch.equal(a, b) and abs(correlation(a, b)) < 5


def test_modules_of_a_model_have_masks_of_their_own_but_readers_of_one_x_share(random_models):
    model, clock = adapted(random_models("qwen2"), dropout=0.5)
    found = dropouts(model)
    assert len(found) == 2 * 7
    masks = {name: clock.keep(module.salt, 16, 256, 0.5) for name, module in found.items()}
    by_layer = {}
    for name, mask in masks.items():
        layer, leaf = int(name.split("layers.")[1].split(".")[0]), name.split(".lora_dropout")[0].rpartition(".")[2]
        by_layer.setdefault(layer, {})[leaf] = mask
    groups = []
    for leaves in by_layer.values():
        assert torch.equal(leaves["q_proj"], leaves["k_proj"]) and torch.equal(leaves["q_proj"], leaves["v_proj"])
        assert torch.equal(leaves["gate_proj"], leaves["up_proj"])
        groups += [leaves[leaf] for leaf in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    assert len(groups) == 8
    for a, b in itertools.combinations(groups, 2):
        assert abs(correlation(a, b)) < 5


def test_mask_depends_on_nothing_but_its_coordinates():
    """It does not depend on the batch, its order or its padding, so accumulation and processes do not change it."""
    whole = clock_at(2, (0, 1, 2, 3)).keep(5, 32, 64, P)
    again = clock_at(2, (3, 1)).keep(5, 32, 64, P)
    assert torch.equal(again, whole[[3, 1]])
    assert torch.equal(clock_at(2, (2,)).keep(5, 20, 64, P), whole[2:3, :20])
    assert torch.equal(clock_at(2, (2,)).keep(5, 32, 48, P), whole[2:3, :, :48])
    clock = clock_at(9, (7, 8))  # a clock that was elsewhere before, with another batch size
    clock.keep(5, 32, 64, P)
    clock.set(2, torch.arange(4))
    assert torch.equal(clock.keep(5, 32, 64, P), whole)


def test_asking_in_turn_for_other_masks_does_not_mix_them_up():
    clock = clock_at(1, (0, 1))
    asked = [(5, 16, 32, 0.1), (6, 16, 32, 0.1), (5, 16, 32, 0.1), (5, 16, 32, 0.5), (5, 8, 32, 0.1), (5, 16, 64, 0.1)]
    for arguments in asked:
        assert torch.equal(clock.keep(*arguments), clock_at(1, (0, 1)).keep(*arguments))


# ------------------------------------------------------------------------------------------------ the module


def test_dropout_is_identity_in_eval_mode_and_scales_in_training():
    clock = clock_at(4, (0, 1, 2))
    module, x = StatelessDropout(0.25, clock, 11), torch.randn(3, 8, 40)
    assert module.eval()(x) is x
    keep = clock.keep(11, 8, 40, 0.25)
    expected = x * keep / 0.75
    torch.testing.assert_close(module.train()(x), expected)
    assert torch.equal(module(x) == 0, ~keep)
    assert module(x.bfloat16()).dtype is torch.bfloat16


def test_dropout_of_infinite_input_drops_it():
    module = StatelessDropout(0.5, clock_at(), 1)
    out = module(torch.full((1, 4, 64), math.inf))
    assert not out.isnan().any() and (out == 0).any()  # a product with the mask would give NaN


def test_tokens_in_one_dimension_get_the_masks_of_their_sequences():
    """OPT and the shared expert of Qwen2-MoE hand adapters [batch * length, features]; a router any number of rows."""
    module, x = StatelessDropout(0.5, clock_at(sequences=(3, 8)), 1), torch.ones(2, 6, 16)
    assert torch.equal(module(x.flatten(0, 1)), module(x).flatten(0, 1))
    assert torch.equal(module(x.view(2, 2, 3, 16)), module(x).view(2, 2, 3, 16))
    some = module(torch.ones(5, 16))
    assert some.shape == (5, 16) and (some == 0).any() and (some == 2).any()


def test_gradient_is_autograds_of_explicit_masking(random_models):
    """One adapted layer instead of a model: y = base(x) + scale * B A (mask * x / (1 - p))."""
    model, clock = adapted(random_models("llama"), dropout=0.2)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    clock.set(6, torch.tensor([0, 1]))
    keep = clock.keep(layer.lora_dropout["default"].salt, 10, 512, 0.2)
    x = torch.randn(2, 10, 512, generator=torch.Generator().manual_seed(0))
    mine, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    upstream = torch.randn(2, 10, 256, generator=torch.Generator().manual_seed(1))
    (layer(mine) * upstream).sum().backward()
    got = [mine.grad, a.grad.clone(), b.grad.clone()]
    a.grad = b.grad = None
    masked = reference * (keep / (1 - 0.2))
    ((layer.base_layer(reference) + 2.0 * (masked @ a.t() @ b.t())) * upstream).sum().backward()
    for value, expected in zip(got, [reference.grad, a.grad, b.grad], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_reaches_the_whole_model_and_eval_has_none(random_models, use_dora):
    """In training mode the loss changes with the step. In eval mode it does not, and equals that without dropout."""
    ids = ids_of()
    model, clock = adapted(random_models("qwen2"), dropout=0.3, use_dora=use_dora)
    losses = []
    for step in (0, 1, 0):
        clock.set(step, torch.arange(2))
        losses.append(model(ids).logits.square().mean().item())
    assert losses[0] == losses[2] != losses[1]
    plain, _ = adapted(random_models("qwen2"), dropout=0.0, use_dora=use_dora)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_no_dropout_replaces_nothing(random_models):
    model, _ = adapted(random_models("qwen2"), dropout=0.0)
    assert not dropouts(model)
    assert use_stateless_dropout(model, 0.0, clock_at()) == 0


@pytest.mark.parametrize("checkpointing", [True, 1])
def test_recompute_sees_the_same_mask(random_models, checkpointing):
    ids, results = ids_of(), []
    for layers in (False, checkpointing):
        model, clock = adapted(random_models("qwen2"), dropout=0.3, checkpointing=layers)
        clock.set(5, torch.tensor([4, 9]))
        torch.manual_seed(len(results))  # masks come from the clock, so torch's generator plays no part
        results.append(gradients_of(model, ids))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    model, clock = adapted(random_models("qwen2"), dropout=0.3)
    clock.set(6, torch.tensor([4, 9]))
    other = gradients_of(model, ids)
    assert not any(torch.equal(results[0][name], other[name]) for name in other)  # another step's masks do show


def test_gradients_of_a_batch_are_the_sum_of_its_rows(random_models):
    """The sequences of a batch keep their masks when they are processed one by one."""
    model, clock = adapted(random_models("qwen2"), dropout=0.3)
    ids, total = ids_of(batch=3), {}
    clock.set(2, torch.arange(3))
    whole = gradients_of(model, ids)
    for row in range(3):
        clock.set(2, torch.tensor([row]))
        for name, grad in gradients_of(model, ids[row : row + 1]).items():
            total[name] = total.get(name, 0) + grad / 3
    for name, grad in whole.items():
        assert (grad - total[name]).norm() <= 1e-5 * grad.norm(), name


def test_saved_adapter_keeps_peft_own_dropout(random_models, tmp_path):
    model, _ = adapted(random_models("qwen2"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["lora_dropout"] == P


# ------------------------------------------------------------------------------------------------ attention

LENGTHS = (1, 2, 15, 16, 17, 40)  # around the random Mistral's window of 16


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_without_a_mask_tensor_are_those_of_sdpa(random_models, family, dtype):
    def load():
        return AutoModelForCausalLM.from_pretrained(
            random_models(family), dtype=dtype, attn_implementation="sdpa"
        ).eval()

    plain, switched = load(), load()
    assert use_causal_attention(switched) is True
    for length in LENGTHS:
        ids = ids_of(length)
        with torch.no_grad():
            assert torch.equal(switched(ids).logits, plain(ids).logits), length
            mask = torch.ones_like(ids)
            torch.testing.assert_close(
                switched(ids).logits, plain(ids, attention_mask=mask).logits, rtol=0.05, atol=0.1
            )


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
def test_gradients_without_a_mask_tensor_are_those_of_sdpa(random_models, family):
    results = []
    for switch in (False, True):
        model, _ = adapted(random_models(family))
        assert not switch or use_causal_attention(model)
        results.append(gradients_of(model, ids_of(40)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_padding_on_the_right_does_not_reach_the_left(random_models, family):
    """No mask is needed, because a real token never attends to a pad."""
    model, _ = adapted(random_models(family), dropout=0.0)
    use_causal_attention(model)
    ids = ids_of(30, batch=1)
    padded = F.pad(ids, (0, 10), value=0)
    with torch.no_grad():
        short, long = model.eval()(ids).logits, model(padded).logits
    torch.testing.assert_close(long[:, :30], short, rtol=1e-4, atol=1e-4)


def test_sliding_window_still_slides(random_models):
    """Beyond the window a token is out of reach in one layer, and two layers reach twice as far."""
    model = AutoModelForCausalLM.from_pretrained(
        random_models("mistral"), dtype=torch.float32, attn_implementation="sdpa"
    )
    use_causal_attention(model.eval())
    ids = ids_of(48, batch=1)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 4096
    with torch.no_grad():
        changed = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 0
    assert changed[:16].all() and not changed[31:].any()  # 2 x (16 - 1) + 1


def test_only_sdpa_is_switched(random_models):
    folder = random_models("qwen2")
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert use_causal_attention(eager) is False and eager.config._attn_implementation == "eager"


# ------------------------------------------------------------------------------------------------ cross entropy


def dense_loss(hidden, weight, labels, bias=None):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum")


def problem(rows: int = 37, width: int = 24, vocabulary: int = 101, bias: bool = False, masked: str = "some"):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    if masked != "none":
        labels[torch.rand(rows, generator=generator) < 0.4] = -100
    if masked == "chunk":
        labels[8:16] = -100  # with chunks of 8 the second has nothing to learn
    if masked == "all":
        labels[:] = -100
    return hidden, weight, labels, torch.randn(vocabulary, generator=generator) if bias else None


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", ["none", "some", "chunk", "all"])
def test_chunked_loss_and_gradient_are_the_dense_ones(chunk, bias, masked):
    hidden, weight, labels, offset = problem(bias=bias, masked=masked)
    reference = hidden.detach().double().requires_grad_()
    expected = dense_loss(reference, weight.double(), labels, offset.double() if bias else None)
    loss = chunked_cross_entropy(hidden, weight, labels, offset, chunk)
    assert loss.dtype is torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (loss * 0.37).backward()  # what comes from above matters, as with a loss scaler
    (expected * 0.37).backward()
    torch.testing.assert_close(hidden.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)
    assert hidden.grad.isfinite().all() and (masked != "all" or (loss == 0 and not hidden.grad.any()))


def test_chunked_loss_is_finite_where_exp_would_overflow():
    hidden, weight, labels, _ = problem()
    loss = chunked_cross_entropy(hidden * 1e3, weight, labels, None, 8)
    torch.testing.assert_close(loss.double(), dense_loss(hidden * 1e3, weight, labels), rtol=1e-5, atol=1e-2)
    loss.backward()
    assert hidden.grad.isfinite().all()


def test_chunked_loss_in_bfloat16_stays_near_the_dense_one():
    """Products are computed in bfloat16 and summed in fp32, for 64 rows and a vocabulary of 4,096."""
    hidden, weight, labels, _ = problem(rows=64, width=64, vocabulary=4096)
    weight = weight / 8
    low = hidden.detach().bfloat16().requires_grad_()
    loss, expected = chunked_cross_entropy(low, weight.bfloat16(), labels, None, 10), dense_loss(hidden, weight, labels)
    loss.backward(), expected.backward()
    assert low.grad.dtype is torch.bfloat16
    assert abs(loss.item() / expected.item() - 1) < 2e-3
    assert (low.grad.float() - hidden.grad).norm() < 0.02 * hidden.grad.norm()


def test_chunked_loss_needs_no_gradient_in_evaluation():
    hidden, weight, labels, _ = problem()
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels).requires_grad
    assert torch.equal(
        chunked_cross_entropy(hidden.detach(), weight, labels), chunked_cross_entropy(hidden, weight, labels).detach()
    )


@pytest.mark.parametrize("chunk", [1, 8, 36, 1000, None])
@pytest.mark.parametrize("masked", ["none", "some", "chunk", "all"])
def test_losses_of_positions_are_the_dense_ones(chunk, masked):
    hidden, weight, labels, offset = problem(bias=True, masked=masked)
    logits = hidden.detach().double() @ weight.double().T + offset.double()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    found = position_losses(hidden, weight, labels, offset, chunk)
    assert found.dtype is torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_chunks_bound_the_logits():
    assert default_logit_chunk(151_936) * 151_936 * 4 <= 256 * 2**20 < (default_logit_chunk(151_936) + 1) * 151_936 * 4
    assert default_logit_chunk(10**9) == 16


def test_the_mean_of_an_objective_does_not_depend_on_how_a_batch_is_divided():
    """Its weight is the divisor of cross_entropy: the number of labels that an earlier position predicts."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 11, (6, 9), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    labels[:, 0] = 3  # the first token is predicted from nothing
    logits = torch.randn(6, 9, 11, generator=generator, dtype=torch.float64)
    targets = shift_labels(labels)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for size in (1, 2, 3, 6):
        weight = sum(CausalLMLoss.weights({"labels": part}).sum() for part in labels.split(size))
        assert weight == int((targets != IGNORED).sum())
        total = sum(part.sum() for part in losses.split(size))
        assert CausalLMLoss.mean(total.item(), weight) == pytest.approx(expected.item(), rel=1e-12)
        assert CausalLMLoss.mean(1, torch.tensor(float(weight))).item() == pytest.approx(1 / weight)
    nothing = {"labels": torch.full((2, 4), IGNORED)}
    assert CausalLMLoss.weights(nothing).sum() == 0 and CausalLMLoss.mean(0.0, 0) == 0.0


class TornBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("injected")


def test_gradient_sums_are_autograds_own_in_the_same_memory():
    """150 matrices need two launches of 64 and one of the rest. Two more: no loss uses one, one has no gradient yet."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(152)]
    idle, fresh = parameters[150:]
    x, sums = torch.randn(4, 3), micro_step.GradientSums(parameters)
    used = [*parameters[:150], fresh]

    def backward(scale: float) -> None:
        sum(((x @ parameter) ** 2).sum() for parameter in used).mul(scale).backward()

    backward(1.0), backward(0.3)
    want = [parameter.grad.clone() for parameter in used]
    for parameter in parameters:
        parameter.grad = None if parameter is fresh else torch.zeros_like(parameter)
    held = [parameter.grad for parameter in parameters[:151]]
    for scale in (1.0, 0.3):
        with sums.of_backward():
            backward(scale)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(used, want, strict=True))
    assert all(p.grad is gradient for p, gradient in zip(parameters[:151], held, strict=True)) and not idle.grad.any()
    with pytest.raises(torch.OutOfMemoryError), sums.of_backward():
        (TornBackward.apply(parameters[0]).sum() + parameters[1].sum()).backward()
    assert all(p.grad is gradient for p, gradient in zip(parameters[:151], held, strict=True))
    sums_after = [parameter.grad.clone() for parameter in used]
    parameters[1].sum().backward()  # outside, autograd adds as ever
    assert torch.equal(parameters[1].grad, sums_after[1] + 1)


def test_labels_move_one_to_the_left():
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit])
def test_the_quick_optimizer_steps_as_bitsandbytes_does(kind):
    torch.manual_seed(0)
    start = [torch.randn(64, 128), torch.randn(16)]
    runs = []
    for optimizer in (kind, optimizers.quick(kind)):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        adam = optimizer(parameters, lr=1e-2, weight_decay=0.1)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            adam.step()
        runs.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
