"""The lines of a run's log: what they say, and that they fit 80 columns in the largest usual run."""

import dataclasses

import datasets
import numpy as np
import pytest

from config import Config, DataConfig, TrainingConfig
from quantization_utils import load_tokenizer
from toolkit.data_blocks import make_blocks
from toolkit.run_lines import data_lines, step_line
from toolkit.text_width import width

ROW = {"step": 1234, "epoch": 2.06, "loss": 11.6042, "learning_rate": 1.234e-4, "grad_norm": 0.0342, "tokens": 10**9}
ROW |= {"tokens_per_second": 12530.4, "learned_tokens_per_second": 12505.9, "peak_gib": 7.123}


def test_a_step_is_one_line_of_a_terminal():
    line = step_line(ROW, 1782)
    assert line == "step 1234/1782 | loss 11.6042 | lr 1.23e-04 | grad norm 0.034 | 12,530 tokens/s"
    chat = step_line(ROW | {"learned_tokens_per_second": 9321.2, "loss": 1.6042}, 1782)
    assert chat == "step 1234/1782 | loss 1.6042 | grad norm 0.034 | 12,530 tokens/s (9,321 learned)"
    assert width(line) <= 80 and width(chat) <= 80
    assert "grad norm inf" in step_line(ROW | {"grad_norm": None}, 1782)  # float16's scaler has left the step out


@pytest.mark.parametrize("text", ["word " * 400, "所有的字都是寬的" * 60, "line\n" * 300])
def test_lines_about_data_fit_a_terminal(tiny_model, text):
    tokenizer = load_tokenizer(str(tiny_model))
    rows = datasets.Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"]] * 20})
    config = Config(data=DataConfig(max_length=32))
    blocks = make_blocks(datasets.DatasetDict(train=rows), tokenizer, config.data, seed=0)
    lines = data_lines(blocks, config, tokenizer, 891, 16)
    part, held = blocks["train"], blocks["validation"]
    assert max(map(width, lines)) <= 80
    assert lines[0].endswith(f"{part.tokens:,} tokens in {len(part):,} blocks of 32")
    assert lines[1] == f"data: held out: {held.tokens:,} tokens in {len(held)} block{'s' * (len(held) > 1)}"
    per_epoch = -(-len(part) // 16)
    rest = f", the last of {len(part) % 16}" if len(part) % 16 else ""
    assert (
        lines[2] == f"steps: 891 of 16 sequences; {per_epoch} per epoch{rest} ({-(-part.rows // 16)} without packing)"
    )
    assert lines[-1].startswith("first block: ") and lines[-1].endswith(" …")
    few = "steps: 2 in all learn little: more epochs, or fewer sequences per step, help"
    assert data_lines(blocks, config, tokenizer, 2, 10**6)[3] == few and width(few) <= 80
    assert few not in data_lines(blocks, config, tokenizer, 2, 1)  # --max_steps of a long run
    ended = dataclasses.replace(config, training=TrainingConfig(max_steps=2))
    few = "steps: 2 in all learn little: training.max_steps ends the run there"  # more epochs would change nothing
    assert data_lines(blocks, ended, tokenizer, 2, 10**6)[3] == few
    assert part.positions(np.arange(len(part))) == part.tokens and part.positions([0]) == len(part[0])
