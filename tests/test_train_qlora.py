"""Training, mostly through the real entry point: equalities with independent references, and what a run leaves."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_scheduler,
)

import config as schema
import quantization_utils
import train_qlora
from config import TrainingConfig
from fast_path.loss import CausalLMLoss, LogitForm
from fast_path.micro_step import be_deterministic
from quantization_utils import (
    create_bnb_config,
    create_lora_config,
    load_base,
    load_model_and_tokenizer,
    prepare_model_for_training,
)
from toolkit import evaluation, machine, memory, memory_plan, processes
from toolkit.adapters import load_adapter
from toolkit.checkpoints import read_checkpoint
from toolkit.data_formats import IGNORED, PLAIN_TEMPLATE
from toolkit.earlier_run import checkpoints
from toolkit.evaluation import block_losses, mean_loss
from train_qlora import create_scheduler, main, plot_training_curves

ROOT = Path(__file__).resolve().parent.parent
STEP = train_qlora.training_step
FP32 = ("--compute_dtype", "float32", "--optim", "adamw_torch", "--gradient_checkpointing", "false")
EPOCHS = ("--max_steps", "null", "--num_epochs")
VARYING = {
    "tokens_per_second",
    "learned_tokens_per_second",
    "peak_gib",
}  # of a row of metrics: speed and memory of the machine


# ------------------------------------------------------------------------------------------------ helpers


class Watch:
    """What passes through training_step: the session, each window's blocks, the gradients that the optimizer meets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable | None = None, after: Callable | None = None):
        self.windows, self.gradients, self.rates, self.session = [], [], [], None

        def step(session, number, window, *rest):
            if session is not self.session:
                self.session = session
                session.optimizer.register_step_pre_hook(self._keep)
            if before is not None:
                before(session, number)
            result = STEP(session, number, window, *rest)
            self.windows.append(window.tolist())
            if after is not None:
                after(session, number)
            return result

        monkeypatch.setattr(train_qlora, "training_step", step)

    def _keep(self, optimizer, *_) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])


@pytest.fixture
def watch(monkeypatch) -> Callable[..., Watch]:
    return lambda **hooks: Watch(monkeypatch, **hooks)


@pytest.fixture(scope="module")
def few(tmp_path_factory, corpus) -> Path:
    """A .txt of six documents, 14 blocks of 32 tokens beside what is held out."""
    documents = corpus.read_text(encoding="utf-8").split("\n\n")[:6]
    path = tmp_path_factory.mktemp("few") / "few.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def rows_of(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, which is JSON as others read it: without NaN and Infinity."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def steps_of(folder: Path) -> list[dict]:
    return [row for row in rows_of(folder) if "loss" in row]


def evaluations_of(folder: Path) -> list[dict]:
    return [row for row in rows_of(folder) if "eval_loss" in row]


def same_rows(a: Path, b: Path) -> bool:
    """Whether two runs logged the same numbers, speed and memory aside."""
    fixed = [[{k: v for k, v in row.items() if k not in VARYING} for row in rows_of(folder)] for folder in (a, b)]
    return fixed[0] == fixed[1]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """How far apart two lists of tensors are, relative to the second."""
    apart = sum((x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True))
    return float((apart / sum(y.double().square().sum() for y in b)).sqrt())


def load(folder, adapter: bool = True, dtype: str = "float32", attention: str = "sdpa", **lora):
    """A model in 4 bit with an adapter whose B is off zero, on the CPU."""
    bnb_config = create_bnb_config(compute_dtype=dtype)
    model, _ = load_model_and_tokenizer(str(folder), bnb_config, device="cpu", attn_implementation=attention)
    if not adapter:
        return model
    torch.manual_seed(0)
    model = prepare_model_for_training(model, create_lora_config(**{"dropout": 0.0, **lora}), False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch_of(length: int = 20, batch: int = 3) -> dict[str, torch.Tensor]:
    """Random ids; some labels are masked, and the last row is padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 4096, (batch, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, IGNORED)
    ids[-1, length // 2 :], labels[-1, length // 2 :] = 0, IGNORED
    return {"input_ids": ids, "labels": labels}


# ------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
def test_summed_loss_is_the_dense_one_with_its_gradients(random_models, family):
    """Tied and untied heads, fp32; the window of Mistral is shorter than the sequences."""
    model, batch = load(random_models(family)).train(), batch_of()
    loss = CausalLMLoss(model, torch.float32)
    assert loss.chunked
    value = loss(**batch)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    logits = model(batch["input_ids"]).logits
    dense = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    dense.backward()
    torch.testing.assert_close(value, dense, rtol=1e-6, atol=1e-6)
    assert distance(gradients, [p.grad for p in model.parameters() if p.requires_grad]) < 1e-5


FORMS = {"gemma2": LogitForm(1.0, 5.0), "granite": LogitForm(1 / 6, 0.0), "cohere": LogitForm(0.0625, 0.0)}


@pytest.mark.parametrize("family", FORMS)
def test_capped_and_scaled_logits_are_found_and_their_loss_is_the_models_own(random_models, family):
    """In fp32, with all gradients; without the cap or the scale the loss is another."""
    attention = "eager" if family == "gemma2" else "sdpa"
    model, batch = load(random_models(family), attention=attention).train(), batch_of()
    loss = CausalLMLoss(model, torch.float32)
    assert loss.form == pytest.approx(FORMS[family])
    loss.logit_chunk = 16
    value = loss(**batch)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    own = model(**batch).loss * (batch["labels"][:, 1:] != IGNORED).sum()
    own.backward()
    torch.testing.assert_close(value, own, rtol=2e-6, atol=1e-5)
    assert distance(gradients, [p.grad for p in model.parameters() if p.requires_grad]) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(loss.sequence_sums(**batch).sum(), own.detach(), rtol=2e-6, atol=1e-5)
    loss.form = LogitForm()
    assert abs(loss(**batch) - own) > 1


def test_capped_logits_err_no_more_in_bfloat16_than_the_models_own(random_models):
    """Both against fp64 from the same hidden states; the model rounds each step of its cap."""
    model, batch = load(random_models("gemma2"), dtype="bfloat16", attention="eager"), batch_of()
    loss = CausalLMLoss(model, torch.bfloat16)
    targets = batch["labels"][:, 1:].flatten()
    with torch.no_grad(), loss.autocast():
        value, logits = loss(**batch), model.eval()(batch["input_ids"]).logits
        hidden = loss.decoder(input_ids=batch["input_ids"]).last_hidden_state
    exact = torch.tanh(hidden.double() @ loss.head.weight.double().T / 5.0) * 5.0
    own, want = (F.cross_entropy(x[:, :-1].flatten(0, 1).double(), targets, reduction="sum") for x in (logits, exact))
    assert abs(value - want) <= max(1.1 * abs(own - want), 1e-3 * want)


@pytest.mark.parametrize(
    "change", [lambda x: x - 3.0, lambda x: x.abs(), lambda x: x.clamp(-9, 9), lambda x: x[..., :9]]
)
def test_a_model_that_does_something_else_to_its_logits_computes_all_of_them(random_models, change):
    model = load(random_models("qwen2"))
    head = model.get_base_model().get_output_embeddings()

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    own, model.get_base_model().forward = model.get_base_model().forward, forward
    loss = CausalLMLoss(model, torch.float32)
    assert not loss.chunked and not head._forward_hooks


def test_head_with_an_adapter_takes_the_models_own_logits_and_learns(random_models):
    model, batch = load(random_models("qwen2"), target_modules=["q_proj", "lm_head"]).train(), batch_of()
    loss = CausalLMLoss(model, torch.float32)
    assert not loss.chunked
    value = loss(**batch)
    value.backward()
    own = model(**batch).loss * (batch["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(value, own, rtol=1e-5, atol=1e-3)
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lm_head.lora" in name)


def test_probing_the_head_leaves_the_model_as_it_was(random_models):
    model = load(random_models("qwen2"))
    for training in (True, False):
        model.train(training)
        CausalLMLoss(model, torch.float32)
        assert {module.training for module in model.get_base_model().modules()} == {training}
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------ one optimizer step


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_micro_batch_shapes_learn_the_same(train, watch, tmp_path, dropout):
    """1 x 4, 2 x 2 and 4 x 1: gradients within 1e-5, and adapters after three steps."""
    gradients, adapters, losses = [], [], []
    for size, accumulation in ((1, 4), (2, 2), (4, 1)):
        seen, folder = watch(), tmp_path / f"{size}x{accumulation}"
        shape = ("--batch_size", size, "--gradient_accumulation_steps", accumulation, "--lora.dropout", dropout)
        assert train(*FP32, *shape, "--logging_steps", 1, output_dir=folder)[0] == 0
        assert seen.session.plan.micro_batch == size
        gradients.append(seen.gradients)
        adapters.append(read_checkpoint(folder / "checkpoint-3")[0])
        losses.append([row["loss"] for row in steps_of(folder)])
    assert len(gradients[0]) == 3
    for other in (1, 2):
        assert distance(gradients[other][0], gradients[0][0]) < 1e-5
        for step in (1, 2):  # of weights that AdamW has moved: it divides rounding by the root of its square
            assert distance(gradients[other][step], gradients[0][step]) < 1e-4
        assert distance(list(adapters[other].values()), list(adapters[0].values())) < 1e-4
        assert losses[other] == pytest.approx(losses[0], rel=1e-5)


def test_dropout_is_felt_and_depends_on_the_seed_alone(train, watch, tmp_path):
    first = []
    for i, dropout in enumerate((0.0, 0.05, 0.05)):
        seen = watch()
        flags = ("--lora.dropout", dropout, "--max_steps", 1)
        assert train(*FP32, *flags, output_dir=tmp_path / str(i))[0] == 0
        first.append(seen.gradients[0])
    assert distance(first[2], first[1]) == 0 < 1e-3 < distance(first[0], first[1])


def test_every_block_is_seen_once_an_epoch_and_the_short_window_is_flushed(train, watch, few):
    seen = watch()
    flags = ("--dataset", few, "--max_length", 32, "--batch_size", 3, "--gradient_accumulation_steps", 2)
    code, folder = train(*flags, *EPOCHS, 2, "--logging_steps", 1)
    blocks = seen.session.blocks["train"]
    count = len(blocks)
    assert code == 0 and count % 6, "the test needs a short last window"
    per_epoch = math.ceil(count / 6)
    assert len(seen.windows) == 2 * per_epoch == seen.session.steps_per_epoch * 2
    epochs = [list(itertools.chain(*seen.windows[i * per_epoch : (i + 1) * per_epoch])) for i in range(2)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [len(window) for window in seen.windows[:per_epoch]] == [6] * (per_epoch - 1) + [count % 6]
    rows = steps_of(folder)
    assert rows[-1]["step"] == 2 * per_epoch and rows[-1]["epoch"] == 2.0
    assert rows[-1]["tokens"] == 2 * blocks.supervised
    assert [row["step"] for row in evaluations_of(folder)] == [0, per_epoch, 2 * per_epoch]
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{2 * per_epoch}", f"checkpoint-{per_epoch}"]


def test_max_steps_repeats_epochs(train, watch, few):
    seen = watch()
    code, folder = train("--dataset", few, "--max_length", 32, "--max_steps", 13, "--num_epochs", 1)
    assert code == 0 and len(seen.windows) == 13 > 2 * seen.session.steps_per_epoch
    per_epoch = seen.session.steps_per_epoch
    assert steps_of(folder)[-1] | {"step": 13, "epoch": round(13 / per_epoch, 4)} == steps_of(folder)[-1]
    assert sorted(itertools.chain(*seen.windows[per_epoch : 2 * per_epoch])) == sorted(
        itertools.chain(*seen.windows[:per_epoch])
    )


def test_logged_loss_is_the_mean_over_the_tokens_since_the_last_row(train, tmp_path):
    """Rows of three steps against rows of one step, weighted by tokens."""
    flags = ("--max_steps", 7)
    one, three = (train(*flags, "--logging_steps", every, output_dir=tmp_path / str(every))[1] for every in (1, 3))
    each = steps_of(one)
    tokens = np.diff([0] + [row["tokens"] for row in each])
    losses = np.array([row["loss"] for row in each])
    for row, span in zip(steps_of(three), (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        assert row["loss"] == pytest.approx(np.average(losses[span], weights=tokens[span]), rel=1e-6)


def test_window_without_anything_to_predict_is_no_failure(train, few, tmp_path):
    """Unpacked rows one token longer than max_length leave blocks of one token."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    ids = tokenizer(few.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    texts = [tokenizer.decode(ids[i : i + 16]) for i in range(0, 160, 16)]  # 16 tokens and the document end
    exact = [t for t in texts if len(tokenizer(t, add_special_tokens=False)["input_ids"]) == 16]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in exact), encoding="utf-8")
    flags = ("--dataset", path, "--max_length", 16, "--packing", "false", "--batch_size", 1, "--logging_steps", 1)
    code, folder = train(*flags, "--gradient_accumulation_steps", 1, *EPOCHS, 1)
    assert code == 0
    assert all(math.isfinite(row["loss"]) for row in steps_of(folder))


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
def test_every_optimizer_learns(train, optim):
    code, folder = train("--optim", optim, "--max_steps", 6, "--learning_rate", "2e-3")
    rows = evaluations_of(folder)
    assert code == 0 and rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.01


def test_two_processes_learn_what_one_does(train, watch, few, tmp_path):
    """torchrun and gloo: the same adapter within rounding; the second process has no block in the last window."""
    flags = [*FP32, "--dataset", few, "--max_length", 34, "--logging_steps", 1, *EPOCHS, 1]
    flags += ["--batch_size", 2, "--gradient_accumulation_steps", 2]
    seen = watch()
    assert train(*flags, output_dir=tmp_path / "one")[0] == 0
    assert [len(window) for window in seen.windows][-2:] == [4, 1], "the test needs a last window of one block"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = ["--config", ROOT / "tiny" / "config.yaml", "--compile", "off", *flags, "--output_dir", tmp_path / "two"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_qlora.py"), *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) + 1, "each line once, but for the two rules around the device block"
    assert any("processes: 2" in line for line in lines)
    one, two = ({**adapter_of(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == two.keys() and distance(list(two.values()), list(one.values())) < 1e-4
    for name in ("loss", "grad_norm", "tokens", "learning_rate", "epoch"):
        values = [[row[name] for row in steps_of(tmp_path / folder)] for folder in ("one", "two")]
        assert values[1] == pytest.approx(values[0], rel=1e-4), name
    losses = [[row["eval_loss"] for row in evaluations_of(tmp_path / folder)] for folder in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_float16_learns_with_the_loss_scaler(train, watch):
    try:
        with torch.autocast("cpu", torch.float16):
            torch.ones(2, 2) @ torch.ones(2, 2)
        torch.amp.GradScaler("cpu")
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no float16 autocast with a scaler on CPUs: {error}")
    seen = watch()
    # Short, since CPUs emulate half precision.
    flags = ("--max_length", 16, "--max_steps", 4, "--learning_rate", "4e-3", "--max_train_samples", 90)
    code, folder = train("--compute_dtype", "float16", "--validation_fraction", 0.01, *flags)
    assert (
        code == 0 and seen.session.learner.scaler.is_enabled() and seen.session.learner.objective.dtype is torch.float16
    )
    rows = evaluations_of(folder)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.01
    assert steps_of(folder)[-1]["grad_norm"] < 20  # unscaled before it was clipped and logged


def test_float16_overflow_skips_the_step_and_lowers_the_scale(train, watch):
    scales = []

    def overflow(session, number):
        if number:
            session.learner.scaler.update(2.0**40 if number == 1 else 2.0**6)  # the former overflows half precision

    seen = watch(before=overflow, after=lambda session, number: scales.append(session.learner.scaler.get_scale()))
    flags = ("--max_length", 16, "--validation_fraction", 0, "--logging_steps", 1)
    code, folder = train("--compute_dtype", "float16", *flags)
    assert code == 0 and scales == [2.0**6, 2.0**39, 2.0**6]
    assert len(seen.gradients) == 2  # the optimizer was left out of the second step
    assert all(t.isfinite().all() for t in adapter_of(folder).values())
    assert [row["step"] for row in steps_of(folder)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup_ratio", "warmup"), [(1, 0.03, 1), (7, 0.0, 0), (100, 0.03, 3), (6, 0.5, 3)])
def test_schedule_warms_up_from_the_first_step(name, total, warmup_ratio, warmup):
    """Step k of W takes k / W; the steps after it take what transformers' own schedule gives them."""

    def rates(make) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
        scheduler, found = make(optimizer), []
        for _ in range(total):
            assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    settings = TrainingConfig(lr_scheduler=name, warmup_ratio=warmup_ratio)
    mine = rates(lambda optimizer: create_scheduler(optimizer, settings, total))
    theirs = "constant_with_warmup" if name == "constant" else name
    after = rates(lambda optimizer: get_scheduler(theirs, optimizer, warmup, total))[warmup:]
    assert len(mine) == total and mine[warmup:] == after
    for k, rate in enumerate(mine, 1):
        done = (k - 1 - warmup) / max(1, total - warmup)
        shape = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[name]
        assert rate == pytest.approx(2e-4 * (k / warmup if k <= warmup else shape), abs=1e-12) and rate > 0


def test_a_run_of_one_step_learns(train):
    code, folder = train("--max_steps", 1)
    assert code == 0 and steps_of(folder)[0]["learning_rate"] == 4e-3
    moved = [t.abs().max() for name, t in adapter_of(folder).items() if "lora_B" in name]
    assert all(size > 0 for size in moved)  # B begins at zero


@pytest.mark.parametrize("before", [False, True])
def test_resumed_run_goes_on_with_the_schedule(train, watch, monkeypatch, before):
    """Also one that transformers' warm-up began: the steps that are left take this run's rates, which are logged."""
    flags = ("--warmup_ratio", 0.5, "--lr_scheduler", "linear", "--logging_steps", 1, "--learning_rate", "4e-3")
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(2, signal.SIGTERM))
        if before:
            patch.setattr(
                train_qlora, "create_scheduler", lambda optimizer, *_: get_scheduler("linear", optimizer, 4, 8)
            )
        code, folder = train(*flags, "--max_steps", 8)
    assert code == 143 and [row["step"] for row in steps_of(folder)] == [1, 2]
    seen = watch()
    code, folder = train(*flags, "--max_steps", 8)
    expected = [1e-3, 2e-3, 3e-3, 4e-3, 4e-3, 3e-3, 2e-3, 1e-3]
    assert code == 0 and seen.rates == pytest.approx(expected[2:])
    started = [0.0, 1e-3] if before else expected[:2]
    assert [row["learning_rate"] for row in steps_of(folder)] == pytest.approx(started + expected[2:])


def test_logged_rate_is_the_one_of_the_step(train, watch):
    seen = watch()
    flags = ("--max_steps", 5, "--logging_steps", 1, "--warmup_ratio", 0.4, "--lr_scheduler", "linear")
    code, folder = train(*flags, "--learning_rate", "3e-3")
    assert code == 0
    expected = [1.5e-3, 3e-3, 3e-3, 2e-3, 1e-3]
    assert [row["learning_rate"] for row in steps_of(folder)] == pytest.approx(expected)
    assert seen.rates == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_is_the_mean_over_tokens(train, watch):
    """Against a loop over single blocks and whole logits; with a short last block a mean of means would differ."""
    seen = watch()
    code, folder = train(*FP32, "--validation_fraction", 0.2)
    session = seen.session
    blocks = session.blocks["validation"]
    assert code == 0 and len(blocks) > 4 and len(blocks[len(blocks) - 1]) < 64
    model = session.model.eval()
    table = []
    with torch.no_grad():
        for i in range(len(blocks)):
            ids = torch.from_numpy(blocks[i])[None]
            logits = model(input_ids=ids).logits.double()
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            table.append((loss, ids.shape[1] - 1))
    expected = sum(loss for loss, _ in table) / sum(count for _, count in table)
    for size in (1, 3, 4):
        sums_of, pad = session.learner.objective.sequence_sums, session.tokenizer.pad_token_id
        found = block_losses(sums_of, blocks, session.accelerator, size, pad)
        torch.testing.assert_close(found, torch.tensor(table, dtype=torch.float64), rtol=1e-5, atol=0)
        assert mean_loss(found) == pytest.approx(expected, rel=1e-5)
    assert evaluations_of(folder)[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)  # the last step is the best one
    assert evaluations_of(folder)[-1]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_step_0_evaluates_the_base(train, watch, tiny_model):
    seen = watch()
    code, folder = train(*FP32)
    assert code == 0 and rows_of(folder)[0].keys() == {"step", "eval_loss", "perplexity"}
    assert rows_of(folder)[0]["step"] == 0
    loss = CausalLMLoss(load(tiny_model, adapter=False), torch.float32)
    value = mean_loss(
        block_losses(loss.sequence_sums, seen.session.blocks["validation"], seen.session.accelerator, 2, 0)
    )
    assert rows_of(folder)[0]["eval_loss"] == pytest.approx(value, rel=1e-6)


def test_evaluate_command_agrees_with_the_run(train, capsys):
    code, folder = train(*FP32)
    assert code == 0
    ended = re.search(r"adapter - base: loss (.*) ± (.*) \(standard error", capsys.readouterr().out)
    assert main(["--evaluate", "--adapter", str(folder)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    first, *_, last = evaluations_of(folder)
    assert result["base"]["loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert float(ended[1]) == pytest.approx(result["difference"]["loss"], abs=1e-4) and float(ended[2]) > 0
    assert result["adapter"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert f"{first['perplexity']:.3f}" in printed and f"{last['perplexity']:.3f}" in printed


def check_evaluation_of_packed_chats(train, chats, tolerance: float, *flags: object) -> None:
    """Train on packed chats, several samples per block and several blocks per batch, and evaluate what was left."""
    code, folder = train("--dataset", chats, "--validation_fraction", 0.5, "--max_length", 128, *flags)
    assert code == 0 and main(["--evaluate", "--adapter", str(folder)]) == 0
    assert "varlen attention" in (folder / "training_log.txt").read_text(encoding="utf-8")
    losses = [row["eval_loss"] for row in evaluations_of(folder)]
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["blocks"] > 2, "a batch must hold more samples than a block does"
    assert result["base"]["loss"] == pytest.approx(losses[0], rel=tolerance)
    assert result["adapter"]["loss"] == pytest.approx(min(losses), rel=tolerance)


def test_evaluate_sees_every_sample_of_every_block_of_a_batch(train, chats, varlen_on_cpu):
    """A run's own evaluation knew how many samples a batch holds; --evaluate knew it for a single block: 9.36, not 1.79."""
    varlen_on_cpu()
    check_evaluation_of_packed_chats(train, chats, 1e-5, *FP32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its attention is what this is about")
def test_evaluate_on_the_gpu_agrees_with_the_run_on_packed_chats(train, chats):
    check_evaluation_of_packed_chats(train, chats, 2e-3)  # bfloat16; the run's layers are compiled


# ------------------------------------------------------------------------------------------------ resume


RESUMABLE = ("--max_length", 32, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 4, "--lora.dropout", 0.05)


def stop_after(number: int, signum: int) -> Callable:
    """A hook for `watch` that sends this process a signal at the end of a step, as Ctrl-C in it would."""

    def hook(session, step: int) -> None:
        if step + 1 == number:  # steps count from 0
            os.kill(os.getpid(), signum)

    return hook


@pytest.mark.faults
@pytest.mark.parametrize(
    "optim, checkpointing, signum",
    [
        ("adamw_8bit", "true", signal.SIGINT),
        ("adamw_torch", "true", signal.SIGTERM),
        ("adamw_8bit", 2, getattr(signal, "SIGHUP", signal.SIGTERM)),
    ],
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    train, watch, few, tmp_path, monkeypatch, optim, checkpointing, signum
):
    """Stopped by a signal at step 3 of 6, within an epoch and between two logged rows, and started again."""
    flags = (*RESUMABLE, "--dataset", few, "--optim", optim, "--gradient_checkpointing", checkpointing)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*flags, output_dir=whole)[0] == 0
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(3, signum))
        assert train(*flags, output_dir=parts)[0] == 128 + signum
    assert [path.name for path in checkpoints(parts)] == ["checkpoint-3"]
    assert not (parts / "adapter_model.safetensors").exists()
    seen = watch()
    assert train(*flags, output_dir=parts)[0] == 0
    assert len(seen.windows) == 3, "it went on, it did not start over"
    if optim == "adamw_8bit":
        kinds = {t.dtype for t in load_file(parts / "checkpoint-6" / "training_state.safetensors").values()}
        assert torch.uint8 in kinds
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        assert (parts / "checkpoint-6" / name).read_bytes() == (whole / "checkpoint-6" / name).read_bytes(), name
    ends = [(folder / "training_log.txt").read_text(encoding="utf-8").splitlines()[-4] for folder in (parts, whole)]
    assert ends[0] == ends[1] and "(standard error over" in ends[0]
    assert same_rows(parts, whole)
    assert len(rows_of(parts)) == len({json.dumps(row) for row in rows_of(parts)})


@pytest.mark.faults
def test_killed_run_goes_on_from_its_checkpoint_and_repeats_nothing_in_the_log(
    train, watch, few, tmp_path, monkeypatch
):
    """No chance to save: the process dies in step 6; the row after the checkpoint of step 4 is written anew, once."""

    class Killed(BaseException):
        pass

    def die(session, number):
        if number == 5:
            raise Killed

    flags = (*RESUMABLE, "--dataset", few, "--logging_steps", 1)
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        Watch(patch, before=die)
        with pytest.raises(Killed):
            train(*flags, output_dir=tmp_path / "parts")
    assert len(steps_of(tmp_path / "parts")) == 5 and checkpoints(tmp_path / "parts")[0].name == "checkpoint-4"
    assert train(*flags, output_dir=tmp_path / "parts")[0] == 0
    assert same_rows(tmp_path / "parts", tmp_path / "whole")
    assert (tmp_path / "parts" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.faults
def test_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    train, watch, few, tmp_path, monkeypatch, capsys
):
    flags = (*RESUMABLE, "--dataset", few, "--save_steps", 2, "--max_steps", 8)
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(5, signal.SIGINT))
        assert train(*flags, output_dir=tmp_path / "parts")[0] == 130
    newest = checkpoints(tmp_path / "parts")[0]
    assert newest.name == "checkpoint-5"
    (newest / "training_state.safetensors").write_bytes(b"half")
    capsys.readouterr()
    seen = watch()
    assert train(*flags, output_dir=tmp_path / "parts")[0] == 0
    assert "checkpoint-5 is damaged" in capsys.readouterr().out
    assert len(seen.windows) == 8 - 4
    assert same_rows(tmp_path / "parts", tmp_path / "whole")
    assert {p.name for p in checkpoints(tmp_path / "parts")} == {p.name for p in checkpoints(tmp_path / "whole")}


def test_a_process_that_fails_while_the_others_log_a_step_loses_no_row(train, few, tmp_path, monkeypatch):
    """The step is complete: a checkpoint of it without its row would make the next row the mean of two steps."""
    flags, logged = (*RESUMABLE, "--dataset", few, "--logging_steps", 1), []

    def gathered(value, patience=None):
        logged.extend([value] * (isinstance(value, float) and math.isfinite(value)))  # the peak, in GiB
        if len(logged) == 2:
            raise processes.RankFailed("rank 1 has ended")
        return [value]

    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(processes, "gathered", gathered)
        assert train(*flags, output_dir=tmp_path / "parts")[0] == 1
    assert [row["step"] for row in steps_of(tmp_path / "parts")] == [1, 2]
    assert train(*flags, output_dir=tmp_path / "parts")[0] == 0
    assert same_rows(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_while_the_compiler_runs_is_no_fault_of_the_compiler(train, few, tmp_path, monkeypatch, capsys):
    """A terminal sends Ctrl-C to the compiler too, which then fails; without a stop the setting is named."""
    failure = type("InductorError", (RuntimeError,), {})
    ways = (
        (signal.SIGINT, 130, "stopped after step 0 of 6; to continue:"),
        (None, 2, "performance.compile: torch.compile failed"),
    )
    for signum, wanted, words in ways:

        def fails(run, request, signum=signum):
            request.signum = signum
            raise failure("CppCompileError: C++ compile error")

        monkeypatch.setattr(train_qlora, "train", fails)
        code, _ = train(*RESUMABLE, "--dataset", few, output_dir=tmp_path / str(wanted))
        said = capsys.readouterr()
        assert code == wanted and words in said.out + said.err
        assert ("performance.compile" in said.out + said.err) == (signum is None)


def test_a_stopped_run_says_how_to_continue(train, few, tmp_path, monkeypatch, capsys):
    """The command as it is printed: without what would start over."""
    flags = (*RESUMABLE, "--dataset", few)
    assert train(*flags, output_dir=tmp_path / "whole")[0] == 0
    assert train(*flags, output_dir=tmp_path / "parts")[0] == 0  # a finished run that the next one replaces
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(2, signal.SIGINT))
        code, folder = train(*flags, "--overwrite", "--resume", "never", output_dir=tmp_path / "parts")
    said, command = capsys.readouterr().out.splitlines()[-2:]
    assert code == 130 and said == "stopped after step 2 of 6; to continue:"
    assert said in (folder / "training_log.txt").read_text(encoding="utf-8")
    assert eval(command, {"train_qlora": train_qlora}) == 0
    assert f"resuming from {folder / 'checkpoint-2'} at step 2 of 6" in capsys.readouterr().out
    assert same_rows(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    "limit, asked",
    [
        (["--max_steps", "1"], "training.max_steps asks for 1 step"),
        (["--max_steps", "null", "--num_epochs", "1"], "training.num_epochs asks for 4 steps"),
    ],
)
def test_a_run_that_has_more_steps_than_are_asked_for(train, few, tmp_path, capsys, limit, asked):
    flags = (*RESUMABLE, "--dataset", few)
    assert train(*flags, output_dir=tmp_path / "out")[0] == 0
    capsys.readouterr()
    assert train(*flags, *limit, output_dir=tmp_path / "out")[0] == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"resuming from {tmp_path / 'out' / 'checkpoint-6'} at step 6")
    assert lines[start + 1] == f"nothing left to train: {asked}"
    assert lines[start + 2].startswith("perplexity ") and not any("schedule" in line for line in lines)


def test_a_stopped_run_that_is_asked_for_fewer_steps_is_evaluated_where_it_stands(
    train, few, tmp_path, monkeypatch, capsys
):
    """Its only evaluation was at step 0, so the adapter of that step, which has learned nothing, would be the best."""
    flags = (*RESUMABLE, "--dataset", few, "--eval_steps", 5)
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(3, signal.SIGINT))
        assert train(*flags, output_dir=tmp_path / "out")[0] == 130
    code, folder = train(*flags, "--max_steps", 2, output_dir=tmp_path / "out")
    assert code == 0 and re.search(r"^step 3: validation loss .* best$", capsys.readouterr().out, flags=re.M)
    assert [row["step"] for row in evaluations_of(folder)] == [0, 3]
    assert any(weight.any() for name, weight in adapter_of(folder).items() if "lora_B" in name)


def test_ctrl_c_before_the_first_step_leaves_nothing(train, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_qlora, "load_base", interrupted)
    code, folder = train("--max_steps", 1)
    assert code == 130 and not folder.exists()
    assert capsys.readouterr().out.splitlines()[-1] == "stopped before the first step; the same command starts again"


@pytest.mark.parametrize("flags, saved", [(("--save_minutes", "1e-9"), [3, 2]), (("--save_minutes", "null"), [3])])
def test_checkpoints_come_by_the_clock_too(train, flags, saved):
    code, folder = train(*flags)
    assert code == 0 and [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in saved]


def test_loss_scale_outlives_a_stop(train, watch):
    scales = []
    flags = ("--compute_dtype", "float16", "--max_length", 16, "--validation_fraction", 0)
    watch(after=lambda session, number: session.learner.scaler.update(2.0**9))
    assert train(*flags, "--max_steps", 1)[0] == 0
    watch(before=lambda session, number: scales.append(session.learner.scaler.get_scale()))
    assert train(*flags, "--max_steps", 2)[0] == 0
    assert scales == [2.0**9]


def test_longer_run_goes_on_from_the_end_of_a_shorter_one(train, watch, few):
    flags = ("--dataset", few, "--max_length", 32)
    assert train(*flags, "--max_steps", 3)[0] == 0
    seen = watch()
    code, folder = train(*flags, "--max_steps", 5)
    assert code == 0 and len(seen.windows) == 2
    assert [row["step"] for row in steps_of(folder)] == [3, 5]


@pytest.mark.parametrize("flags", [("--rank", 8), ("--learning_rate", "1e-3"), ("--batch_size", 4), ("--seed", 1)])
def test_resume_that_would_learn_something_else_is_refused_and_writes_nothing(train, few, capsys, flags):
    code, folder = train("--dataset", few, "--max_length", 32, "--max_steps", 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train("--dataset", few, "--max_length", 32, "--max_steps", 2, *flags)[0] == 2
    assert "choose another --output_dir, or use --overwrite to replace it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert train("--dataset", few, "--max_length", 32, "--max_steps", 1, *flags, "--overwrite")[0] == 0


def test_going_back_to_an_older_checkpoint_makes_it_the_course_of_the_run(train, watch, few, monkeypatch):
    """After --resume checkpoint-2, what auto finds is what was written since, not the folder of step 6."""
    flags = (*RESUMABLE, "--dataset", few, "--save_steps", 2, "--save_total_limit", 3)
    code, folder = train(*flags)
    assert code == 0 and [p.name for p in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(4, signal.SIGINT))
        assert train(*flags, "--resume", folder / "checkpoint-2")[0] == 130
    seen = watch()
    assert train(*flags)[0] == 0
    assert len(seen.windows) == 2


# ------------------------------------------------------------------------------------------------ best and failure


@pytest.fixture
def scripted(monkeypatch) -> Callable[[list[float]], None]:
    """Give the evaluations of the next run these losses; the choice that follows is what is tested."""

    def script(losses: list[float]) -> None:
        values = iter(losses)

        def block_losses(loss, blocks, *_):
            sums = torch.zeros(len(blocks), 2, dtype=torch.float64)
            sums[0] = torch.tensor([next(values), 1.0])
            return sums

        monkeypatch.setattr(evaluation, "block_losses", block_losses)

    return script


def test_adapter_of_the_lowest_validation_loss_is_the_one_saved(train, scripted, capsys):
    scripted([5.0, 4.0, 3.0, 3.5, 3.0, 6.0])  # steps 0 to 5; the first of two equals
    flags = ("--max_steps", 5, "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 9)
    code, folder = train(*flags)
    assert code == 0
    saved = adapter_of(folder)
    for step in range(1, 6):
        adapter, _ = read_checkpoint(folder / f"checkpoint-{step}")
        assert all(torch.equal(adapter[name], saved[name]) for name in saved) == (step == 2)
    lines = capsys.readouterr().out.splitlines()
    assert "step 2" in lines[-5] and lines[-4] == "adapter - base: loss -2.0000"  # one block has no standard error
    assert f"{math.exp(5):.3f} before, {math.exp(3):.3f} with" in (folder / "README.md").read_text(encoding="utf-8")


def test_best_adapter_outlives_a_stop_between(train, watch, scripted, monkeypatch):
    """The best came before the checkpoint that the run goes on from."""
    flags = ("--max_steps", 4, "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 9)
    scripted([5.0, 3.0])
    with monkeypatch.context() as patch:
        Watch(patch, after=stop_after(2, signal.SIGINT))
        assert train(*flags)[0] == 130
    scripted([3.5, 3.2, 3.1])  # that of step 2 had no time when the signal came
    code, folder = train(*flags)
    assert code == 0
    best = read_checkpoint(folder / "checkpoint-1")[0]
    assert all(torch.equal(best[name], value) for name, value in adapter_of(folder).items())


def test_without_validation_the_last_adapter_is_saved(train):
    code, folder = train("--validation_fraction", 0)
    assert code == 0 and not evaluations_of(folder)
    last = read_checkpoint(folder / "checkpoint-3")[0]
    assert all(torch.equal(last[name], value) for name, value in adapter_of(folder).items())
    assert "not evaluated" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("patience, stops", [(1, 3), (2, 6), (None, 8)])
def test_early_stopping_counts_evaluations_without_a_better_loss(train, scripted, patience, stops):
    scripted([9.0, 8.0, 7.0, 7.5, 6.0, 6.5, 6.4, 6.3, 6.2])
    flags = ("--max_steps", 8, "--eval_steps", 1, "--early_stopping_patience", "null" if patience is None else patience)
    code, folder = train(*flags)
    assert code == 0 and evaluations_of(folder)[-1]["step"] == stops
    assert checkpoints(folder)[0].name == f"checkpoint-{stops}"
    assert (folder / "adapter_model.safetensors").is_file() and (folder / "README.md").is_file()
    log = (folder / "training_log.txt").read_text(encoding="utf-8")
    assert ("stopping early" in log) == (patience is not None)


def poison(at: int) -> Callable:
    def hook(session, number: int) -> None:
        if number == at:
            next(p for name, p in session.model.named_parameters() if "lora_B" in name).data[0, 0] = math.nan

    return hook


def test_numbers_that_go_wrong_are_told_when_the_data_is_gone_too(train, watch, few, tmp_path, capsys):
    data = Path(shutil.copy(few, tmp_path / "gone.txt"))
    poisoned = poison(1)

    def hook(session, number: int) -> None:
        poisoned(session, number)
        data.unlink(missing_ok=True)

    watch(before=hook)
    assert train("--dataset", data, "--max_steps", 3)[0] == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("error: "))
    assert "step 2: loss nan" in line and "its rows are out of reach, data.dataset: " in line


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(train, watch, capsys):
    seen = watch(before=poison(3))
    code, folder = train("--max_steps", 6, "--save_steps", 2, "--logging_steps", 1)
    # The optimizer meets it before the CPU has read the numbers; what it spoils is in memory only, and goes with the process.
    assert code == 1 and len(seen.gradients) == 4
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("error: ")]
    assert (
        len(lines) == 1 and "step 4" in lines[0] and " …)" in lines[0] and "Traceback" not in printed.out + printed.err
    )
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    adapter, state = read_checkpoint(folder / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in adapter.values()) and state["progress"]["step"] == 2
    assert not (folder / "adapter_model.safetensors").exists()
    assert all(math.isfinite(value) for row in rows_of(folder) for value in row.values())


def test_gradient_that_is_not_finite_stops(train, watch):
    def explode(session, number):
        if number == 1:
            next(p for p in session.learner.parameters).register_hook(lambda grad: grad * math.inf)

    seen = watch(before=explode)
    code, folder = train("--save_steps", 1)
    assert code == 1 and len(seen.gradients) == 2 and checkpoints(folder)[0].name == "checkpoint-1"


def test_validation_loss_that_is_not_finite_stops(train, scripted, capsys):
    scripted([5.0, math.nan])
    code, folder = train("--eval_steps", 2, "--save_steps", 1)
    assert code == 1 and checkpoints(folder)[0].name == "checkpoint-1"
    assert "validation loss is nan" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["log", "curves"])
def test_last_files_that_cannot_be_written_do_not_hide_the_adapter(train, monkeypatch, capsys, what):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    if what == "curves":
        monkeypatch.setattr(train_qlora, "plot_training_curves", fails)
    else:
        monkeypatch.setattr(train_qlora.checkpoints.Log, "flush", fails)
    code, folder = train("--max_steps", 1)
    line = capsys.readouterr().out.splitlines()[-1]
    assert code == 1 and (folder / "adapter_model.safetensors").is_file()
    assert line.startswith("error: step 1: the curves or the log cannot be written") and "; the adapter is comp" in line


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_main_memory_that_runs_out_is_one_line(train, monkeypatch, capsys, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(train_qlora, "train", fails)
    code, _ = train("--max_steps", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 3 and line.startswith("error: out of main memory: ")


# ------------------------------------------------------------------------------------------------ what a run leaves

LEFT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "training_curves.png",
    "training_log.txt",
    "config.yaml",
    "metrics.jsonl",
    "README.md",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_output_folder_holds_what_the_spec_promises_and_nothing_else(train, tiny_model, corpus, tmp_path):
    code, folder = train("--save_steps", 1)
    assert code == 0
    assert {path.name for path in folder.iterdir()} == LEFT | {"checkpoint-2", "checkpoint-3"}
    assert {tensor.dtype for tensor in adapter_of(folder).values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    # config.yaml: every effective value, local paths absolute, and the same configuration again from any folder
    again = schema.load_config(folder / "config.yaml")
    assert again.model.name == str(tiny_model) and again.data.dataset == str(corpus)
    tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert {f"{section}.{key}" for section, body in tree.items() for key in body} == set(schema.LEAVES)
    # the log is what the console showed
    log = (folder / "training_log.txt").read_text(encoding="utf-8")
    for words in ("trainable params: ", "Device: cpu", "perplexity", "checkpoint-3", str(folder)):
        assert words in log
    # the rows of metrics.jsonl
    (row,) = steps_of(folder)
    keys = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"]
    keys += ["tokens_per_second", "learned_tokens_per_second", "peak_gib"]
    assert list(row) == keys and row["peak_gib"] > 0
    assert 0 < row["learned_tokens_per_second"] < row["tokens_per_second"]  # a block's first token is only read
    # the model card: peft's header, and nothing left open
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and str(tiny_model) in card and "[More Information Needed]" not in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and header["base_model"] == str(tiny_model)
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_each_checkpoint_is_an_adapter_that_peft_loads(train, tiny_model):
    code, folder = train()
    assert code == 0
    model = PeftModel.from_pretrained(load(tiny_model, adapter=False), folder / "checkpoint-3")
    expected, _ = read_checkpoint(folder / "checkpoint-3")
    state = model.state_dict()
    for name, tensor in expected.items():
        found = state[name.replace(".weight", ".default.weight")]
        assert torch.equal(found.float(), tensor)
    a, b = (json.loads((f / "adapter_config.json").read_text("utf-8")) for f in (folder, folder / "checkpoint-3"))
    assert {k: sorted(v) if isinstance(v, list) else v for k, v in a.items()} == {
        k: sorted(v) if isinstance(v, list) else v for k, v in b.items()
    }


def test_adapter_config_is_what_was_asked(train, tiny_model):
    code, folder = train("--rank", 8, "--alpha", 16, "--target_modules", "[q_proj, v_proj]")
    assert code == 0
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (8, 16.0, 0.05)
    assert set(saved["target_modules"]) == {"q_proj", "v_proj"} and saved["task_type"] == "CAUSAL_LM"
    assert saved["base_model_name_or_path"] == str(tiny_model)


def edit_functions(monkeypatch, quantization: dict | None = None, lora: dict | None = None) -> None:
    """Have create_bnb_config and create_lora_config return these values whatever they are asked for."""
    bnb_config, lora_config = quantization_utils.create_bnb_config, quantization_utils.create_lora_config
    if quantization:
        monkeypatch.setattr(
            quantization_utils, "create_bnb_config", lambda **asked: bnb_config(**(asked | quantization))
        )
    for module in (quantization_utils, train_qlora) if lora else ():
        monkeypatch.setattr(module, "create_lora_config", lambda **asked: lora_config(**(asked | lora)))


QUANTIZATION = {"load_in_4bit": True, "quant_type": "nf4", "compute_dtype": "bfloat16", "use_double_quant": True}


@pytest.mark.parametrize(
    ("quantization", "lora"),
    [
        ({"quant_type": "fp4", "use_double_quant": False}, {}),
        ({"load_in_4bit": False}, {"rank": 4, "alpha": 8, "use_rslora": True}),
        ({"compute_dtype": "float32"}, {"dropout": 0.5, "target_modules": ["v_proj", "q_proj"]}),
        ({}, {"target_modules": "all-linear", "rank": 8}),
        ({}, {"target_modules": r".*layers\.[01]\.mlp\.up_proj"}),
    ],
)
def test_what_the_model_really_has_is_recorded(train, watch, monkeypatch, few, capsys, quantization, lora):
    """The tutorial tells people to edit create_bnb_config and create_lora_config; config.yaml says otherwise."""
    edit_functions(monkeypatch, quantization, lora)
    seen = watch()
    flags = ("--dataset", few, "--max_length", 32, "--fused_lora", "on" if not lora else "auto")
    flags = flags if quantization.get("load_in_4bit", True) else flags[:4]
    code, folder = train(*flags, "--max_steps", 1)
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.count("not as configured: ") == 1
    found = schema.load_config(folder / "config.yaml")  # what inference reads
    kinds = {
        m.weight.quant_state.quant_type
        for m in seen.session.model.modules()
        if hasattr(m, "quant_state") and m.quant_state
    }
    doubles = {
        m.weight.quant_state.nested for m in seen.session.model.modules() if hasattr(m, "quant_state") and m.quant_state
    }
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert found.quantization.load_in_4bit is bool(kinds)
    if kinds:
        assert (kinds, doubles) == ({found.quantization.quant_type}, {found.quantization.use_double_quant})
    assert vars(found.quantization) == {**QUANTIZATION, "products": "bf16", "experts": "gpu", **quantization}
    assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (
        saved["r"],
        saved["lora_alpha"],
        saved["lora_dropout"],
    )
    assert found.lora.use_rslora is saved["use_rslora"] is lora.get("use_rslora", False)
    ranks = {p.shape[0] for name, p in seen.session.model.named_parameters() if "lora_A" in name}
    assert ranks == {found.lora.rank} == {lora.get("rank", 16)}
    adapted = {
        name.split(".lora_A")[0].removeprefix("base_model.model.") for name in adapter_of(folder) if "lora_A" in name
    }
    asked = found.lora.target_modules
    linears = {name for name, m in seen.session.model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    if asked == "all-linear":
        assert adapted == linears and len(adapted) == 7 * seen.session.model.config.num_hidden_layers
    elif isinstance(asked, str):
        assert adapted == {name for name in linears if re.fullmatch(asked, name)} and len(adapted) == 2
    else:
        assert adapted == {name for name in linears if any(name == t or name.endswith("." + t) for t in asked)}
    if "mlp" in str(lora):
        assert len(adapted) == 2
    card = (folder / "README.md").read_text(encoding="utf-8")
    kind = found.quantization.quant_type
    assert (f"in 4 bit ({kind}, " in card and f"bnb_4bit_quant_type={kind!r}" in card) is bool(kinds)
    assert f"rank {found.lora.rank}, alpha {found.lora.alpha}, dropout {found.lora.dropout}, on " in card
    state = read_checkpoint(folder / "checkpoint-1")[1]
    assert state["effective"]["lora.rank"] == found.lora.rank and state["config"]["lora.rank"] == 16
    # The same command goes on with the same edit, and says what differs without it.
    assert train(*flags, "--max_steps", 2)[0] == 0
    monkeypatch.undo()
    capsys.readouterr()
    assert train(*flags, "--max_steps", 3)[0] == 2
    name = "quantization." + next(iter(quantization)) if quantization else "lora." + min(lora)
    assert f"{name}: was " in capsys.readouterr().err


def test_dropout_of_an_edited_create_lora_config_is_the_one_that_acts(train, watch, monkeypatch, few, tmp_path):
    """As the flag of the same value: the stateless mask must not take config.yaml's."""
    flags, first = (*FP32, "--dataset", few, "--max_length", 32, "--max_steps", 1), []
    for edited, asked in ((0.5, 0.05), (None, 0.5), (None, 0.05)):
        with monkeypatch.context() as patch:
            edit_functions(patch, lora={"dropout": edited} if edited else None)
            seen = Watch(patch)
            assert train(*flags, "--lora.dropout", asked, output_dir=tmp_path / f"{edited}{asked}")[0] == 0
            first.append(seen.gradients[0])
    assert distance(first[0], first[1]) == 0 < distance(first[0], first[2])


def test_compute_type_of_an_edited_create_bnb_config_is_the_runs(train, watch, monkeypatch, few):
    edit_functions(monkeypatch, {"compute_dtype": "float16"})
    seen = watch()
    code, folder = train("--dataset", few, "--max_length", 16, "--max_steps", 1)
    assert (
        code == 0 and seen.session.learner.objective.dtype is torch.float16 and seen.session.learner.scaler.is_enabled()
    )
    assert schema.load_config(folder / "config.yaml").quantization.compute_dtype == "float16"


def test_a_type_that_the_machine_replaced_is_recorded_as_configured(train, monkeypatch, few, capsys):
    monkeypatch.setattr(quantization_utils, "slow_bf16", lambda: True)
    code, folder = train("--dataset", few, "--max_length", 32, "--max_steps", 1)
    assert code == 0 and "not as configured" not in capsys.readouterr().out
    assert schema.load_config(folder / "config.yaml").quantization.compute_dtype == "bfloat16"


def test_a_base_stored_in_4_bit_is_recorded_as_it_is_stored(train, tiny_model, few, tmp_path, capsys):
    base, tokenizer = load_model_and_tokenizer(
        str(tiny_model),
        create_bnb_config(quant_type="fp4", use_double_quant=False, compute_dtype="float16"),
        device="cpu",
    )
    base.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    flags = ("--model_name", tmp_path / "stored", "--dataset", few, "--max_length", 32, "--load_in_4bit", "false")
    code, folder = train(*flags, *FP32, "--max_steps", 1)
    assert code == 0 and "quantization.quant_type is fp4 (configured: nf4)" in capsys.readouterr().out
    found = schema.load_config(folder / "config.yaml").quantization
    assert (found.load_in_4bit, found.quant_type, found.use_double_quant) == (True, "fp4", False)
    assert found.compute_dtype == "float32"  # the run's: only the quantisation is the stored model's own
    assert train(*flags, *FP32, "--max_steps", 2)[0] == 0


def test_checkpoint_from_before_the_record_goes_on(train, few, monkeypatch):
    """It kept what was configured alone, so that an edited function must not be taken for a change."""
    edit_functions(monkeypatch, {"quant_type": "fp4"})
    real = train_qlora.checkpoints.write_checkpoint

    def write(output_dir, step, adapter, peft_config, state, keep):
        return real(output_dir, step, adapter, peft_config, {k: v for k, v in state.items() if k != "effective"}, keep)

    monkeypatch.setattr(train_qlora.checkpoints, "write_checkpoint", write)
    flags = ("--dataset", few, "--max_length", 32)
    assert train(*flags, "--max_steps", 1)[0] == 0
    assert train(*flags, "--max_steps", 2)[0] == 0


TEXTS = [
    "3 apples, 1234567 items",
    "量化是 4 位元 12 個",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "  a\n\n b's 7don't",
]


def with_split(source: Path, target: Path) -> None:
    """Write a tokenizer.json whose pre-tokenizer cuts at each letter e, as no class of transformers has it."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"]["pretokenizers"].insert(0, split)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("template", [True, False])
def test_tokenizer_lies_beside_the_adapter(train, watch, tiny_model, chats, tmp_path, named, template):
    """AutoTokenizer loads what was trained with, to the id, and with the chat template that was taught."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    with_split(tiny_model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8")) | {"tokenizer_class": named}
    if not template:
        del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    seen = watch()
    code, folder = train("--model_name", model, "--dataset", chats, "--max_steps", 1)
    assert code == 0
    assert {p.name for p in folder.iterdir()} == LEFT | {"checkpoint-1"} | (
        set() if template else {"chat_template.jinja"}
    )
    ours, found = seen.session.tokenizer, AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert found(text)["input_ids"] == ours(text)["input_ids"] and found.decode(ours(text)["input_ids"]) == text
    assert (found.pad_token_id, found.eos_token_id) == (ours.pad_token_id, ours.eos_token_id)
    assert sorted(found.all_special_ids) == sorted(ours.all_special_ids) and len(found) == len(ours)
    chat = [{"role": "user", "content": "To be"}, {"role": "assistant", "content": "or not"}]
    expected = ours.apply_chat_template(chat, chat_template=None if template else PLAIN_TEMPLATE)["input_ids"]
    assert found.apply_chat_template(chat)["input_ids"] == expected
    assert (
        json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    assert content["truncation"] is None and content["padding"] is None


def test_named_class_would_lose_the_pre_tokenizer(tiny_model, tmp_path):
    """What the test above guards against is real: a copy of the files does not load as the same tokenizer."""
    with_split(tiny_model, tmp_path)
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    lost = []
    for named in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(settings | {"tokenizer_class": named}), encoding="utf-8"
        )
        exact, copied = quantization_utils.load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
        lost.append([exact(text)["input_ids"] != copied(text)["input_ids"] for text in TEXTS])
    assert any(map(any, lost))


def test_flags_of_the_tutorial(few, tmp_path, capsys, monkeypatch):
    """python train_qlora.py --num_epochs 5 --rank 8 --alpha 16 --output_dir output_r8, beside the tiny model's file."""
    monkeypatch.chdir(tmp_path)
    flags = ["--num_epochs", "1", "--rank", "8", "--alpha", "16", "--output_dir", "output_r8", "--compile", "off"]
    assert main(["--config", str(ROOT / "tiny" / "config.yaml"), *flags, "--data.dataset", str(few)]) == 0
    folder = tmp_path / "output_r8"
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8
    assert "trainable params: 157,696 ||" in capsys.readouterr().out  # 4 layers x 8 x (4 x 512 + 3 x 960)
    assert steps_of(folder)[-1]["epoch"] == 1.0


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_tutorials_own_loading_gives_the_same_logits(train, tiny_model, few, compute_dtype):
    code, folder = train("--compute_dtype", compute_dtype, "--learning_rate", "5e-3")
    assert code == 0
    dtype = getattr(torch, compute_dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model), quantization_config=quantization, dtype=dtype)
    theirs = PeftModel.from_pretrained(base, folder)
    bnb_config = create_bnb_config(compute_dtype=compute_dtype)
    ours = load_adapter(load_model_and_tokenizer(str(tiny_model), bnb_config, device="cpu")[0], folder)
    ids = batch_of()["input_ids"]
    # In training mode, since theirs would repack its weights on a CPU with AVX512-BF16; peft's dropout is off by hand.
    for module in theirs.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    with ours.disable_adapter():
        without = ours(ids).logits
    assert (ours(ids).logits - without).abs().max() > 0.05  # the adapter does something
    with torch.no_grad():  # and in eval mode, kernels of bitsandbytes' own included, they agree within bfloat16
        torch.testing.assert_close(theirs.eval()(ids).logits.float(), ours(ids).logits.float(), rtol=0.05, atol=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    inputs = tokenizer("HAMLET. To be", return_tensors="pt", return_token_type_ids=False)
    made = ours.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("history", ["both", "no evaluation", "one row"])
def test_curves_are_a_picture(tmp_path, history):
    rows = [{"step": i, "loss": 4 - i / 10, "learning_rate": 1e-4} for i in range(1, 9)]
    if history == "both":
        rows += [{"step": i, "eval_loss": 4 - i / 20, "perplexity": 9.0} for i in (0, 8)]
    path = tmp_path / "training_curves.png"
    plot_training_curves(rows[:1] if history == "one row" else rows, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000
    assert [p.name for p in tmp_path.iterdir()] == ["training_curves.png"]


# ------------------------------------------------------------------------------------------------ data of one's own


def tutorials_prepare_dataset(files: dict[str, str], padding: bool | str = False, loaded: Callable | None = None):
    """The function that the tutorial tells people to write in place of ours."""

    def prepare_dataset(config, tokenizer):
        dataset = datasets.load_dataset("text", data_files=files)

        def tokenize(examples):
            return tokenizer(
                examples["text"], truncation=True, max_length=config["data"]["max_length"], padding=padding
            )

        return dataset.map(tokenize, batched=True)

    return prepare_dataset


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("padding", [False, "max_length"])
def test_tutorials_own_prepare_dataset_trains(train, watch, few, monkeypatch, packing, validation, padding):
    """Unpacked, without labels, the text column left in, with or without a validation split, even padded."""
    files = {"train": str(few)} | ({"validation": str(few)} if validation else {})
    monkeypatch.setattr(train_qlora, "prepare_dataset", tutorials_prepare_dataset(files, padding))
    seen = watch()
    # Its data is its own business: ours names a hub data set that nothing may ask for.
    code, folder = train("--dataset", "somebody/data", "--packing", packing, "--max_length", 32)
    assert code == 0
    train_part, held = seen.session.blocks["train"], seen.session.blocks["validation"]
    assert held is not None and len(held) >= 1 and len(evaluations_of(folder)) == 2
    tokenizer, words = seen.session.tokenizer, few.read_text(encoding="utf-8").split()
    text = " ".join(tokenizer.decode(train_part[i], skip_special_tokens=True) for i in range(len(train_part)))
    known = set(words)
    assert sum(word in known for word in text.split()) > 0.7 * len(text.split())
    ids = np.concatenate([train_part[i] for i in range(len(train_part))])
    if validation:  # no pad went in: as many tokens as the rows have, and an end for each document
        rows = [line for line in few.read_text(encoding="utf-8").splitlines() if line.strip()]
        expected = sum(min(32, len(i)) for i in tokenizer(rows)["input_ids"])
        assert expected < len(ids) <= expected + len(rows)


PASTED = """
def prepare_dataset(config, tokenizer):
    dataset = load_dataset({kind!r}, data_files={files!r})

    def tokenize(examples):
        out = tokenizer(examples["text"], truncation=True, max_length=config["data"]["max_length"], padding="max_length")
        {labels}
        return out

    return dataset.map(tokenize, batched=True)
"""
# As people write it: the first five tokens are the prompt, and pads are masked too.
MASKED = "out['labels'] = [[t if i >= 5 and m else -100 for i, (t, m) in enumerate(zip(*row))] for row in zip(out['input_ids'], out['attention_mask'])]"
COPIED = "out['labels'] = [list(row) for row in out['input_ids']]"


@pytest.fixture
def paste(monkeypatch, few, tmp_path) -> Callable[..., Callable]:
    """A function that puts the tutorial's text in the place of train_qlora.prepare_dataset and returns what it makes."""
    lines = [line for line in few.read_text(encoding="utf-8").splitlines() if line.strip()]
    frame = datasets.Dataset.from_dict({"text": lines, "title": ["a play"] * len(lines)})

    def put(kind: str = "csv", splits: tuple[str, ...] = ("train",), labels: str = "pass") -> Callable:
        files = {}
        for split in splits:
            files[split] = str(tmp_path / f"{split}.{kind}")
            if kind == "text":
                Path(files[split]).write_text("\n".join(lines), encoding="utf-8")
            else:
                getattr(frame, f"to_{kind}")(files[split])
        monkeypatch.setattr(train_qlora, "prepare_dataset", None)  # put back at the end
        exec(PASTED.format(kind=kind, files=files, labels=labels), vars(train_qlora))
        return train_qlora.prepare_dataset

    return put


def blocks_as_samples(blocks) -> list[tuple[list[int], list[int]]]:
    """The tokens and labels of each sample in blocks, found by the positions that begin anew."""
    found = []
    for number in range(len(blocks)):
        ids, labels, *positions = blocks[number].tolist()
        starts = [i for i, p in enumerate(positions[0]) if p == 0] if positions else [0]
        found += [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise([*starts, len(ids)])]
    return found


@pytest.mark.parametrize("labels", ["pass", COPIED])
@pytest.mark.parametrize(
    "kind, splits, packing",
    [("csv", ("train",), "true"), ("text", ("train", "validation", "test"), "false"), ("json", ("train",), "false")],
)
def test_pasted_function_makes_documents(train, watch, paste, capsys, kind, splits, packing, labels):
    """config.yaml names Wikitext, whose rows are lines; that was not read. Labels that mask nothing change nothing."""
    function, seen = paste(kind, splits, labels), watch()
    code, folder = train("--dataset", "Salesforce/wikitext", "--packing", packing, "--max_length", 32)
    assert code == 0
    blocks, tokenizer, printed = seen.session.blocks, seen.session.tokenizer, capsys.readouterr().out
    rows = [
        [t for t, m in zip(r["input_ids"], r["attention_mask"], strict=True) if m]
        for r in function(seen.session.config, tokenizer)["train"]
    ]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    parts = [blocks["train"]] if "validation" in splits else list(blocks.values())
    documents = []
    for part in parts:
        stream = list(itertools.chain(*(part[i].tolist() for i in range(len(part)))))
        stream += [end] * (stream[-1] != end)  # a lonely last one predicts nothing
        cuts = [i + 1 for i, token in enumerate(stream) if token == end]
        documents += [stream[a : b - 1] for a, b in itertools.pairwise([0, *cuts])]
        assert part.documents == part.rows == len(cuts)
    assert sorted(documents) == sorted(rows) and len(rows) > 20
    assert "read as rows of prepare_dataset of train_qlora.py, each row a document" in printed
    assert ("not used: the split test of prepare_dataset" in printed) is ("test" in splits)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| data | prepare_dataset of train_qlora.py: " in card and "wikitext" not in card.lower()
    assert main(["--evaluate", "--adapter", str(folder)]) == 0
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["dataset"] == "prepare_dataset of train_qlora.py"


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("rows", ["auto", "lines"])
def test_pasted_functions_labels_are_learned(train, watch, paste, capsys, packing, rows):
    function, seen = paste("csv", ("train", "validation"), MASKED), watch()
    flags = ("--dataset", "Salesforce/wikitext", "--packing", packing, "--rows", rows, "--max_length", 32)
    code, folder = train(*flags, *EPOCHS, 1)
    assert code == 0
    expected, learned = [], 0
    for row in function(seen.session.config, seen.session.tokenizer)["train"]:
        real = [i for i, m in enumerate(row["attention_mask"]) if m]
        if len(real) > 5:  # else nothing in it is learned
            expected.append(([row["input_ids"][i] for i in real], [row["labels"][i] for i in real]))
            learned += len(real) - 5
    assert sorted(blocks_as_samples(seen.session.blocks["train"])) == sorted(expected) and len(expected) > 20
    assert steps_of(folder)[-1]["tokens"] == learned
    assert (
        "prepare_dataset of train_qlora.py, each row a sample whose labels say which tokens are supervised"
        in capsys.readouterr().out
    )


def test_places_of_pasted_rows_name_no_file_that_was_not_read(train, watch, paste, few, capsys):
    paste()

    def break_it(session, number):
        session.learner.parameters[1].data.fill_(math.inf)

    watch(before=break_it)
    assert train("--dataset", few, "--max_length", 32)[0] == 1
    printed = capsys.readouterr().out
    assert re.search(r"look at its blocks: \d+ \(prepare_dataset of train_qlora.py rows? \d+", printed)
    assert few.name not in printed[printed.index("look at its blocks") :]


def test_functions_of_your_own_take_effect_in_every_command(train, few, monkeypatch, tmp_path, capsys):
    """A prepare_dataset also for --plan and --evaluate, and a plot_training_curves."""
    calls, drawn = [], []
    own = tutorials_prepare_dataset({"train": str(few)})
    monkeypatch.setattr(train_qlora, "prepare_dataset", lambda *a: calls.append(a) or own(*a))
    monkeypatch.setattr(train_qlora, "plot_training_curves", lambda history, path: drawn.append((len(history), path)))
    code, folder = train("--dataset", "somebody/data", "--max_length", 32, "--max_steps", 1)
    assert code == 0 and len(calls) == 1
    assert drawn == [(len(rows_of(folder)), folder / "training_curves.png")]
    assert main(["--evaluate", "--adapter", str(folder)]) == 0 and len(calls) == 2
    capsys.readouterr()
    assert main(["--plan", "--config", str(folder / "config.yaml")]) == 0 and len(calls) == 3
    assert re.search(r"^one epoch: [\d,]+ tokens, \d+ optimizer steps? of 4 sequences$", capsys.readouterr().out, re.M)


def test_prepare_dataset_without_a_train_split_is_one_line(train, few, monkeypatch, capsys):
    monkeypatch.setattr(train_qlora, "prepare_dataset", tutorials_prepare_dataset({"test": str(few)}))
    assert train()[0] == 2
    assert "prepare_dataset" in capsys.readouterr().err


def test_a_regular_expression_of_your_own_is_written_as_the_modules_that_it_matched(train, few, monkeypatch):
    """In checkpoints too: whoever loads the adapter matches nothing."""
    made = train_qlora.create_lora_config

    def edited(**asked):
        config = made(**asked)
        config.target_modules, config.exclude_modules = r".*\.(q|v)_proj", r".*\.1\..*"
        return config

    monkeypatch.setattr(train_qlora, "create_lora_config", edited)
    code, folder = train("--dataset", few, "--max_steps", 1)
    assert code == 0
    expected = [f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 2, 3) for kind in "qv"]
    for place in (folder, folder / "checkpoint-1"):
        found = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        assert (found["target_modules"], found["exclude_modules"]) == (expected, None)
        names = {name.split(".lora_")[0] for name in load_file(place / "adapter_model.safetensors")}
        assert names == {f"base_model.model.{name}" for name in expected}
    assert main(["--evaluate", "--adapter", str(folder)]) == 0


def test_a_secret_is_not_in_the_model_card_and_config_yaml_is_named(train, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "tell-nobody-17")
    data = tmp_path / "data-tell-nobody-17.txt"
    data.write_bytes(few.read_bytes())
    prompt = "I am hf_abcdefghijklmnopqrstuv"
    code, folder = train("--dataset", data, "--max_steps", 1, "--system_prompt", prompt)
    assert code == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "tell-nobody-17" not in card and "data-***.txt" in card
    line = f"config.yaml and the checkpoints in {folder} hold what looks like a secret, in data.dataset, "
    assert line + "generation.system_prompt: take it out before you share the folder" in capsys.readouterr().out
    assert prompt in (folder / "config.yaml").read_text(encoding="utf-8")  # a resumed run compares it
    code, plain = train("--dataset", few, "--max_steps", 1, output_dir=tmp_path / "plain")
    assert code == 0 and "looks like a secret" not in capsys.readouterr().out


@pytest.mark.parametrize("targets", ["all-linear", "[lm_head, q_proj]"])
def test_other_targets_train_and_come_back(train, tiny_model, targets, capsys):
    code, folder = train(*FP32, "--target_modules", targets)
    assert code == 0 and "not as configured" not in capsys.readouterr().out
    model = load_adapter(load(tiny_model, adapter=False), folder)
    last = evaluations_of(folder)[-1]["eval_loss"]
    assert main(["--evaluate", "--adapter", str(folder)]) == 0
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["adapter"]["loss"] == pytest.approx(last, rel=1e-6)
    assert any("lm_head" in name for name, _ in model.named_parameters() if "lora_" in name) == ("lm_head" in targets)


@pytest.mark.parametrize("flags", [("--use_dora", "true"), ("--use_rslora", "true"), ("--load_in_4bit", "false")])
def test_other_adapters_and_an_unquantised_base_train(train, flags):
    code, folder = train(*flags, "--learning_rate", "1e-3", "--optim", "adamw_torch")
    rows = evaluations_of(folder)
    assert code == 0 and rows[-1]["eval_loss"] < rows[0]["eval_loss"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_other_families_train(train, random_models, family):
    code, folder = train("--model_name", random_models(family), "--learning_rate", "1e-2")
    rows = evaluations_of(folder)
    assert code == 0 and rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_soft_capped_family_trains(train, random_models):
    code, folder = train("--model_name", random_models("gemma2"), "--learning_rate", "1e-2")
    rows = evaluations_of(folder)
    assert code == 0 and rows[-1]["eval_loss"] < rows[0]["eval_loss"]


# ------------------------------------------------------------------------------------------------ another machine


def test_console_in_cp950_without_sigusr1_and_fcntl(few, tmp_path):
    """What a Windows console and Python lack: a run finishes, its files are UTF-8."""
    shim = (
        "import runpy, signal, sys\n"
        "for name in ('SIGUSR1', 'SIGUSR2', 'SIGHUP', 'SIGALRM'): delattr(signal, name)\n"
        "sys.modules['fcntl'] = None\n"
        "script, sys.argv = sys.argv[1], sys.argv[1:]\n"
        "sys.path.insert(0, script.rpartition('/')[0])\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    text = few.read_text(encoding="utf-8")
    path = tmp_path / "ünï 中文 ✓.txt"
    path.write_text("naïve ✓ 😀 Ελληνικά\n" * 3 + text, encoding="utf-8")
    argv = ["--config", ROOT / "tiny" / "config.yaml", "--compile", "off", "--dataset", path, "--max_steps", 2]
    argv += ["--max_length", 32, "--batch_size", 2, "--output_dir", tmp_path / "out ✓"]
    done = subprocess.run(
        [sys.executable, "-c", shim, str(ROOT / "train_qlora.py"), *map(str, argv)],
        env={**os.environ, "PYTHONIOENCODING": "cp950", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout.decode("cp950") + done.stderr.decode("cp950")
    assert "perplexity" in done.stdout.decode("cp950")
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    log = (tmp_path / "out ✓" / "training_log.txt").read_text(encoding="utf-8")
    assert "out ✓" in log
    assert str(path) in (tmp_path / "out ✓" / "config.yaml").read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "out ✓").iterdir()} == LEFT | {"checkpoint-2"}


def test_launch_that_announces_more_processes_than_there_are_is_refused(train, monkeypatch, capsys):
    """`accelerate launch --multi_gpu` without GPUs makes two worlds of one, and both would write the same files."""
    alone = SimpleNamespace(num_processes=1, log_with=[], is_main_process=True, device=torch.device("cpu"))
    monkeypatch.setattr(machine, "Accelerator", lambda **keywords: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, folder = train()
    assert code == 2 and "torchrun --nproc_per_node 2" in capsys.readouterr().err and not folder.exists()


def test_blocks_longer_than_the_models_positions_are_said(train, tiny_model, corpus, tmp_path, capsys):
    """By a run and by an evaluation; both go on."""
    folder = tmp_path / "short"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}), encoding="utf-8")
    line = "warning: data.max_length: 64 tokens are more than the 48 positions that the model supports"
    code, output = train("--model_name", folder, "--max_steps", 1)
    assert code == 0 and line in capsys.readouterr().out.splitlines()
    assert main(["--evaluate", "--adapter", str(output)]) == 0
    assert line in capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------------------------------------ the embedded default


@pytest.mark.long  # in CI README's first command is this run, whole, and .ci/check_first_run.py checks the same of it
def test_embedded_default_takes_a_quarter_off_the_perplexity_and_leaves_what_was_promised(tmp_path):
    """A quarter of what tiny/config.yaml does, into another folder: 10 s to a minute, by the CPU."""
    folder = tmp_path / "output_tiny"
    flags = ["--output_dir", str(folder), "--num_epochs", "0.5"]
    assert main(["--config", str(ROOT / "tiny" / "config.yaml"), *flags]) == 0
    rows = evaluations_of(folder)
    best = min(row["perplexity"] for row in rows)
    assert rows[0]["step"] == 0 and best <= 0.75 * rows[0]["perplexity"]
    losses = [row["loss"] for row in steps_of(folder)]
    assert losses[-1] < losses[0]
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == LEFT
    assert 1 <= len(checkpoints(folder)) <= 2


# ------------------------------------------------------------------------------------------------ the same bits


def test_a_deterministic_run_refuses_an_operator_without_such_a_form(train, monkeypatch, capsys):
    """By its name and in one line: a warning, after which it would go on, is what nobody reads."""

    def step(*arguments):
        torch.ones(4).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr(train_qlora, "training_step", step)
    code, _ = train("--deterministic", "true")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: performance.deterministic: put_ has no form that gives the same bits")


def test_a_deterministic_run_learns_what_the_default_does_on_a_cpu(train, tmp_path):
    found = [train(*flags, output_dir=tmp_path / str(len(flags)))[1] for flags in ((), ("--deterministic", "true"))]
    a, b = ((folder / "adapter_model.safetensors").read_bytes() for folder in found)
    assert a == b


def test_a_deterministic_plan_does_not_depend_on_free_memory_or_a_stopwatch(qwen_3b, monkeypatch):
    """The same shape and chunk of logits whatever is free; a run that continues keeps its own chunk."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(memory, "measure_rates", lambda device: pytest.fail("a stopwatch"))
    device, config = (
        torch.device("cuda"),
        schema.load_config([], {"model.name": str(qwen_3b), "performance.deterministic": True}),
    )
    shape, plans = memory_plan.configured_shape(config), []
    for free in (3, 7):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 8 * 2**30))
        limit = memory.memory_limit(device, None, fixed=True)
        plans.append(memory.choose_plan(shape, config, 16, device, limit, saved={}))
    assert plans[0] == plans[1] and plans[0].logit_chunk
    saved = {"micro_batch": 2, "checkpointed": 36, "logit_chunk": 128}
    assert memory.choose_plan(shape, config, 16, device, 8 * 2**30, saved).logit_chunk == 128


def gradients_of_a_micro_batch(folder: Path, repeats: int) -> list[list[torch.Tensor]]:
    """Return the adapter's gradients of one captured micro-batch of 4 x 512 tokens, computed several times."""
    config = schema.load_config([], {"model.name": str(folder), "performance.deterministic": True})
    model, _ = load_base(config, torch.device("cuda"))
    learner = train_qlora.build_learner(config, model, memory_plan.unplanned(config, 4, 2), lambda line: None)
    learner.reshape(4, 0, False)
    ids = torch.randint(4096, (4, 512), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():  # a fresh B is zero, and so are the gradients of A
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    found = []
    for _ in range(repeats):
        learner.train()
        learner.zero_gradients()
        learner.micro_step(0, torch.arange(4), {"input_ids": ids, "labels": ids})
        found.append([parameter.grad.clone() for parameter in learner.parameters])
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its attention is what this is about")
def test_a_deterministic_runs_gradients_repeat_at_the_3bs_head_width(tiny_model, tmp_path):
    """With Qwen2.5-3B's heads and length, since a smaller head gets another attention, which repeats by itself."""
    sizes = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 4096}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    try:
        be_deterministic()
        first, *others = gradients_of_a_micro_batch(tmp_path, 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(gradient.any() for gradient in first)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, for which the CPU could wait")
def test_the_update_is_launched_without_waiting_for_the_gpu(train, corpus, monkeypatch):
    """From the last micro-batch to the update nothing waits for the GPU: it always has work in its queue."""
    launched = []

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error" if launched else "default")  # the first step looks at the gradients
        return sum_numbers(*arguments)

    def step(self, optimizer):
        launched.append(torch.cuda.get_sync_debug_mode())
        optimizer.step()  # bitsandbytes' counters of steps are numbers of the CPU
        torch.cuda.set_sync_debug_mode("default")

    sum_numbers = processes.sum_numbers
    monkeypatch.setattr(processes, "sum_numbers", watched)
    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    try:
        code, _ = train("--dataset", corpus, "--max_length", 64, "--max_steps", 4, "--optim", "adamw_8bit")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert code == 0 and launched == [0, 2, 2, 2]
