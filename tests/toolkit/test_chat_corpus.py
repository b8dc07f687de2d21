"""A whole corpus of chats recounted: every token and label beside a walk over what transformers itself renders and tokenises.

QLORA_CHAT_CORPUS names a .jsonl of chats in ChatML's roles, QLORA_TOKENIZERS folders of tokenizers with a ChatML template,
parted as PATH is.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from config import DataConfig
from fast_path.loss import IGNORED
from quantization_utils import load_tokenizer
from toolkit.data_blocks import make_blocks
from toolkit.data_files import load_rows
from toolkit.data_formats import tokenize_rows

CORPUS = os.environ.get("QLORA_CHAT_CORPUS", "")
TOKENIZERS = [path for path in os.environ.get("QLORA_TOKENIZERS", "").split(os.pathsep) if path]
HEADER = "assistant\n"


def learned_by_walk(tokenizer, ids: list[int], begin: int, end: int) -> np.ndarray:
    """Return which tokens a run should learn, bool [tokens]: of each of the assistant's turns all behind its first line.

    A token that holds the end of that line and the beginning of the answer is learned.
    """
    learned, place = np.zeros(len(ids), bool), 0
    while place < len(ids):
        assert ids[place] == begin
        stop, first = ids.index(end, place), place + 1
        while first < stop and len(tokenizer.decode(ids[place + 1 : first + 1])) <= len(HEADER):
            first += 1
        learned[first : stop + 1] = tokenizer.decode(ids[place + 1 : stop]).startswith(HEADER)
        place = stop + 1
        while place < len(ids) and ids[place] != begin:
            assert not tokenizer.decode([ids[place]]).strip()  # the line break between two turns
            place += 1
    return learned


@pytest.mark.long
@pytest.mark.skipif(
    not (CORPUS and TOKENIZERS), reason="QLORA_CHAT_CORPUS and QLORA_TOKENIZERS name no corpus, no tokenizers"
)
@pytest.mark.parametrize("folder", TOKENIZERS)
def test_every_row_of_a_corpus_is_learned_as_a_walk_over_its_tokens_says(folder):
    tokenizer, data = load_tokenizer(folder), DataConfig(dataset=CORPUS, validation_fraction=0, max_length=2**20)
    begin, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    found = tokenize_rows(load_rows(data), tokenizer, data)
    lines = [json.loads(line) for line in Path(CORPUS).read_text(encoding="utf-8").splitlines()]
    assert len(found["train"]) == len(lines)
    total = tokens = 0
    for number, (row, line) in enumerate(zip(found["train"], lines, strict=True), 1):
        ids = tokenizer.apply_chat_template(line["messages"], tokenize=True, return_dict=False)
        expected = learned_by_walk(tokenizer, ids, begin, end)
        assert row["input_ids"] == ids, number
        assert row["labels"] == np.where(expected, ids, IGNORED).tolist(), number
        total, tokens = total + int(expected.sum()), tokens + len(ids)
    train = make_blocks(found, tokenizer, data, 1)["train"]
    assert (train.supervised, train.tokens) == (total, tokens)
    print(f"{folder}: {len(lines):,} rows, {tokens:,} tokens, {total:,} of them learned")
