"""Answers of base and adapter to held-out prompts, beside the reference: what --evaluate --generate writes and counts."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from config import Config, ConfigError
from fast_path.decoder import Watch
from fast_path.loss import IGNORED
from quantization_utils import load_base
from toolkit.adapters import load_adapter
from toolkit.chat_templates import adopt_template
from toolkit.checkpoints import write_atomically
from toolkit.data_blocks import Blocks, SampleBlocks
from toolkit.data_sources import samples_of
from toolkit.file_lines import some
from toolkit.generation import Generator, by_length
from toolkit.locks import exclusive, lock_of
from toolkit.turn_ends import adapter_ends, end_tokens

ROWS = {"cuda": 32, "cpu": 8}  # prompts answered together: above 32 rows the arithmetic of a step takes the time
# Chinese and Japanese characters, and Korean syllables: each is a token of ROUGE-L and BLEU, since no spaces part words.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"

# ------------------------------------------------------------------------------------------------ prompts


def answerable(blocks: Blocks, say: Callable[[str], None]) -> list[SampleBlocks]:
    """Return the held-out blocks of each source that has prompts and answers, and name those that have none.

    Raise ConfigError if no source has.
    """
    if not (found := samples_of(blocks)):
        raise ConfigError(
            "--generate: expected chats or pairs, whose answers are learned; data.dataset is running text"
        )
    texts = [part.dataset for part in blocks.parts if not isinstance(part, SampleBlocks)]
    for line in some(
        [f"no prompts from {name}, which is running text" for name in texts], "more sources of running text"
    ):
        say(f"--generate: {line}")
    return found


def in_turn(parts: list[SampleBlocks]) -> Iterator[tuple[list[int], list[int], str]]:
    """Yield the tokens of a prompt and of its answer, and the name of its data set, from each of `parts` in turn."""
    for pairs in itertools.zip_longest(*map(samples, parts)):
        yield from ((*pair, part.dataset) for pair, part in zip(pairs, parts, strict=True) if pair)


def samples(blocks: SampleBlocks) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of each sample's prompt and of its answer: the last part that is learned, without the rest."""
    for number in range(len(blocks)):
        block, end = blocks[number], 0
        for start, stop in blocks.spans(number):
            ids, labels = block[:2, end : (end := end + int(stop - start))]
            learned = np.flatnonzero(labels != IGNORED)
            if len(learned):
                first = learned[np.flatnonzero(np.diff(learned, prepend=-2) > 1)[-1]]
                yield ids[:first].tolist(), ids[first : learned[-1] + 1].tolist()


# ------------------------------------------------------------------------------------------------ scores


class Words:
    """A tokenizer for rouge-score, whose own one drops all that is not a Latin letter or a digit."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"[{CJK}]|[^\W{CJK}]+", text.lower())


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """Return the share of exact matches and, where rouge-score and sacrebleu are installed, ROUGE-L and BLEU, in 0 to 100.

    ROUGE-L is the mean of F1 over the answers (Lin, 2004), BLEU that of the corpus (Post, 2018), with sacrebleu's zh
    tokenizer where more than a tenth of the references' characters are CJK.
    """
    pairs = list(zip(answers, references, strict=True))
    found = {"exact match": 100 * sum(a.strip() == b.strip() for a, b in pairs) / len(pairs)}
    with contextlib.suppress(ImportError):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], tokenizer=Words())
        found["ROUGE-L"] = 100 * sum(scorer.score(b, a)["rougeL"].fmeasure for a, b in pairs) / len(pairs)
    with contextlib.suppress(ImportError):
        from sacrebleu import corpus_bleu

        text = "".join(references)
        chinese = len(re.findall(f"[{CJK}]", text)) > len(text) / 10
        found["BLEU"] = corpus_bleu(answers, [references], tokenize="zh" if chinese else "13a").score
    return found


def score_lines(scores: dict[str, dict[str, float]]) -> list[str]:
    """Return a line per voice, and one that says what is not installed."""
    lines = [f"{name:<8} " + " | ".join(f"{key} {value:.2f}" for key, value in s.items()) for name, s in scores.items()]
    known = next(iter(scores.values()))
    absent = [name for name, key in (("rouge-score", "ROUGE-L"), ("sacrebleu", "BLEU")) if key not in known]
    return lines + ([f"for more scores: pip install {' '.join(absent)}"] if absent else [])


# ------------------------------------------------------------------------------------------------ answers


def answer_held_out(
    config: Config,
    adapter: Path | None,
    parts: list[SampleBlocks],
    count: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Write the greedy answers to `count` held-out prompts into answers.jsonl, and return the scores of each voice.

    The file lies in the adapter's folder, or in the current one. The model is loaded anew, once for all voices: for
    answers its layers are fused in another way than for losses. parts: the held-out blocks of each source with answers; each gives a prompt in
    turn, and if there are several, the file names the data set of each prompt.
    """
    model, tokenizer = load_base(config, device)
    adopt_template(tokenizer, adapter)
    ends = end_tokens(model, tokenizer, adapter_ends(adapter, tokenizer))
    base, live = model, load_adapter(model, adapter) if adapter else model
    base.generation_config = GenerationConfig()  # or generate() would add the settings of the model's file
    pairs = list(itertools.islice(in_turn(parts), count))
    how = GenerationConfig(
        max_new_tokens=config.generation.max_new_tokens,
        do_sample=False,
        **({"num_beams": config.generation.num_beams} if config.generation.num_beams > 1 else {}),
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    generator, made = Generator(live.eval(), say), {}
    voices: dict[str, Any] = {"base": live.disable_adapter if isinstance(live, PeftModel) else contextlib.nullcontext}
    voices |= {"adapter": contextlib.nullcontext} if adapter else {}
    for name, voice in voices.items():
        with voice():
            made[name] = texts_of(generator, tokenizer, [prompt for prompt, *_ in pairs], how, ROWS[device.type])
    decode = tokenizer.batch_decode
    references = decode([answer for _, answer, _ in pairs], skip_special_tokens=True)
    prompts = decode([prompt for prompt, *_ in pairs])
    rows = [
        ({"dataset": pairs[i][2]} if len(parts) > 1 else {})
        | {"prompt": prompt, "reference": reference}
        | {name: texts[i] for name, texts in made.items()}
        for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
    ]
    path = (adapter or Path()) / "answers.jsonl"
    with exclusive(lock_of(path), f"--generate: another command is writing {path}"):
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    scores = {name: score(texts, references) for name, texts in made.items()}
    for line in (*score_lines(scores), f"{len(rows)} answers beside their references are in {path}"):
        say(line)
    return scores


def texts_of(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], how: GenerationConfig, size: int
) -> list[str]:
    """Return the answer to each prompt as text, answering prompts of similar length together."""
    texts = [""] * len(rows)
    for batch in by_length(rows, size, len(rows)):
        answers = generator.generate([rows[i] for i in batch], how, Watch(), batch=size)
        for i, text in zip(batch, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts
