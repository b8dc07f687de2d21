"""Talk to a model with its adapter, compare base and adapter, answer files of prompts, or merge both into one model.

python inference_example.py                                   chat with the adapter of config.yaml; /help lists commands
python inference_example.py --adapter output_r8 --mode demo   answer the same prompts with the base and the adapter
python inference_example.py --mode text --prompt "Hello"      print only the answer; --prompt - reads stdin
python inference_example.py --mode text --prompts questions.txt --output answers.jsonl     run it again to continue
python inference_example.py --adapter output_r8 output_r16 --mode demo    several adapters of one base, side by side
python inference_example.py --adapter none --raw              continue plain text with the base alone
python inference_example.py --mode merge --output merged      write a bfloat16 model that needs no peft or bitsandbytes
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import toolkit.startup

sys.excepthook = toolkit.startup.in_one_line  # a package that is not installed is named in one line

from config import Config, ConfigError, counted
from toolkit.adapter_choice import config_with_adapters, find_adapters, names_of
from toolkit.chat import Conversation, Keyboard, chat, remark, show
from toolkit.encodings import check_config
from toolkit.flags import build_parser, parse_arguments
from toolkit.local_paths import missing_model
from toolkit.locks import exclusive, lock_of
from toolkit.prompt_files import Prompt, clean, finished_rows, read_prompts
from toolkit.startup import (
    announced,
    before_heavy_imports,
    out_of_memory,
    reader_gone,
    report,
    run_and_exit,
    unusable,
    visible,
    wake_gpu,
)
from toolkit.template_files import check_template_files
from toolkit.text_width import for_stream

BEGAN = time.perf_counter()  # when the user began to wait, but for the start of Python itself
# What config.yaml has beside these is for training.
TAKES = ("model", "quantization", "data.template_options", "performance", "generation")
# The flags that --help shows first.
EVERYDAY = ["mode", "adapter", "prompt", "prompts", "output", "raw", "max_new_tokens"]
EVERYDAY += ["temperature", "top_p", "system_prompt"]


def say(line: str) -> None:
    """Print a line that is not part of an answer, on stderr."""
    print(for_stream(visible(line), sys.stderr), file=sys.stderr, flush=True)


say_once = functools.cache(say)  # for what holds for every prompt


# ------------------------------------------------------------------------------------------------ command line


def check_options(options: argparse.Namespace) -> None:
    """Raise a ConfigError with one line per option that is missing or cannot be used in this mode."""
    text, merge = options.mode == "text", options.mode == "merge"
    output = Path(options.output) if options.output else None
    there = next(p for p in Path(os.path.abspath(output or ".")).parents if p.exists())
    given = {name for name, value in vars(options).items() if value is not None}
    owners = {"prompt": "text", "prompts": "text", "merge_base": "merge", "no_history": "interactive"}
    wrong = [name for name, mode in owners.items() if name in given and mode != options.mode]
    problems = [f"--{name}: only works with --mode {owners[name]}" for name in wrong]
    if text and len(given & {"prompt", "prompts"}) != 1:
        problems.append('--mode text: expected one of --prompt "...", --prompt - and --prompts FILE')
    if options.prompt is not None and not options.prompt.strip():
        problems.append("--prompt: expected a text, got an empty one")
    if (merge or (text and options.prompts is not None)) != (output is not None):
        problems.append(
            "--output: needed by --mode merge (a folder) and --prompts (a .jsonl file), and used by nothing else"
        )
    elif merge and os.path.lexists(output) and (output.is_symlink() or not output.is_dir() or any(output.iterdir())):
        problems.append(f"--output: {output} already exists and is not an empty folder; choose another folder")
    elif output and text and (output.suffix.lower() != ".jsonl" or output.resolve() == Path(options.prompts).resolve()):
        problems.append(f"--output: expected a .jsonl file other than --prompts, got {output}")
    elif output and not os.access(there, os.W_OK):
        problems.append(f"--output: cannot write in {there}")
    if merge and options.adapter == ["none"]:
        problems.append("--mode merge: expected an adapter, got --adapter none")
    if len(options.adapter or []) > 1 and (merge or options.prompt is not None):
        problems.append("--adapter: several only work with demo, interactive and --prompts; expected one here")
    if problems:
        raise ConfigError(*problems)


@contextlib.contextmanager
def writing(options: argparse.Namespace) -> Iterator[None]:
    """Hold the lock of --output, if one is given, and look at it again: another call may have written it meanwhile."""
    if options.output is None:
        yield
        return
    output = Path(options.output)
    busy = f"--output: another call is writing {output}; wait until it ends, or choose another --output"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive(lock_of(output), busy, say))
        except OSError as error:
            raise ConfigError(f"--output: cannot write {output}: {error.strerror or error}") from None
        check_options(options)
        options.finished = finished_rows(output, options.rows, options.names) if options.rows else (0, 0)
        yield


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's own options and of the settings that it accepts as flags."""
    parser = build_parser(__doc__, TAKES, [f"--{name}" for name in EVERYDAY])
    add = parser.add_argument
    add(
        "--mode",
        choices=("interactive", "demo", "text", "merge"),
        default="interactive",
        help="what to do (default: interactive)",
    )
    add(
        "--adapter",
        nargs="+",
        metavar="DIR|none",
        help="the adapter's folder (default: training.output_dir), several of one base, or none for the base alone",
    )
    add("--prompt", metavar="TEXT", help="with --mode text: the prompt to answer; - reads it from stdin")
    add(
        "--prompts",
        metavar="FILE",
        help="with --mode text: a file of prompts, .txt (one per line) or .jsonl (`prompt` or `messages`)",
    )
    add(
        "--output",
        metavar="PATH",
        help="the .jsonl file for the answers to --prompts, or the folder for the merged model",
    )
    add(
        "--no_history",
        action="store_true",
        default=None,
        help="do not keep what is typed into the chat for the next chat, and do not offer what was typed before",
    )
    add(
        "--raw",
        action="store_true",
        help="continue plain text, without a chat template and without the messages before",
    )
    add("--seed", metavar="N", help="random seed of sampling (default: the run's training.seed)")
    add(
        "--merge_base",
        choices=("dequantized", "original"),
        help="the base to add the adapter to: the dequantised weights, or the original ones (default: dequantized)",
    )
    return parser


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Return the script's own options, and the configuration that `config_with_adapter` puts together."""
    options, overrides = parse_arguments(option_parser(), argv)
    if problems := unusable(vars(options)):
        raise ConfigError(*problems)
    check_options(options)
    options.rows = read_prompts(Path(options.prompts)) if options.prompts else []
    given, beside = [Path(options.config)] if options.config else [], Path(__file__).with_name("config.yaml")
    for path in given or [beside]:
        check_config(path)
    options.folders = find_adapters(options.adapter, given or [beside], overrides)
    options.names = names_of(options.folders)
    if options.output is None or not lock_of(Path(options.output)).exists():
        rows, output = options.rows, Path(options.output or "")
        options.finished = finished_rows(output, rows, options.names) if rows else (0, 0)
    else:  # a first answer, before torch is imported
        with writing(options):
            pass
    if options.seed is not None:
        overrides["training.seed"] = options.seed
    config, options.notes = config_with_adapters(options.folders, given, beside, overrides)
    if problems := missing_model(config.model.name):
        raise ConfigError(*problems)
    check_template_files(config.model.name)
    return options, config


def refuse_launcher() -> None:
    """Raise ConfigError if this process is one of several; only the first one says so."""
    if announced():
        if os.environ["RANK"] != "0":
            sys.exit(2)
        several = f"got one of {os.environ['WORLD_SIZE']}: start it with python, without a launcher"
        raise ConfigError(f"inference_example.py: expected to be the only process, {several}")


if __name__ == "__main__":  # --help and errors in options or configuration appear before torch is imported
    try:
        refuse_launcher()
        name = parse(sys.argv[1:])[1].model.name
    except ConfigError as error:
        sys.exit(report(error))
    if sys.stderr.isatty():  # the imports alone take seconds
        say(f"loading {name} ...")
    before_heavy_imports()
    wake_gpu()

import dataclasses
import signal
from collections.abc import Callable

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from config import LEAVES, GenerationConfig
from fast_path import families
from fast_path.decoder import Watch
from fast_path.families import known_positions
from fast_path.loss import reading
from quantization_utils import (
    SLOW_BF16,
    keep_packing,
    load_base,
    quiet_libraries,
    replaces_bf16,
)
from toolkit.adapter_set import AdapterSet, warn_of_other_bases
from toolkit.adapters import load_adapter
from toolkit.chat_templates import CHANGES, adopt_template, changes_words, prepare_child, render_chats, template_file
from toolkit.checkpoints import edited_line, effective
from toolkit.generation import Generator, VisibleStreamer, by_length
from toolkit.machine import no_gpu_reason
from toolkit.memory import cap_memory, free_bytes
from toolkit.merge import check_logits, logits_on, merge_adapter, moved_by_rounding, plain_copy, with_ends, write_folder
from toolkit.modelfile import modelfile, next_commands
from toolkit.side_by_side import BASE, BlindTest, beside
from toolkit.turn_ends import adapter_ends, adopt_end, end_tokens
from toolkit.voices import Voices

# Limits of a batch of --prompts. Above 32 rows the time of a step goes into arithmetic and no longer into reading the
# weights, so that larger batches gain little.
GPU_ROWS, FREE_SHARE = 32, 0.5  # half of the free memory for the cache, the other half for activations and graphs
CPU_ROWS, CPU_TOKENS = 8, 8192  # 8,192 tokens in the cache of a 3B model need 0.28 GiB
WINDOW = 512  # batches are formed of prompts of similar length within so many prompts

DEMO_PROMPTS = (
    "Continue this article of an encyclopedia: The octopus is a soft-bodied animal that",
    "Explain in two sentences why the sky is blue.",
    "Hello! What did you do last weekend?",
    "Write four lines about the sea at night.",
)

# Text on which the logits of the merged model are compared with those of base and adapter.
REFERENCE_TEXT = """\
A lighthouse is a tower that shows sailors where they are. The first ones were fires on hills; later ones burned oil,
gas and, in the end, electricity. In 1822 Augustin Fresnel built a lens of many thin rings of glass, which sent the
light of one lamp more than thirty kilometres out to sea. Today nearly every light runs by itself."""


# ------------------------------------------------------------------------------------------------ loading


def load(config: Config, adapter: Path | None = None, quantized: bool = True) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the configured base and its tokenizer on the first GPU or the CPU; quantized=False: bfloat16 on the CPU.

    adapter: its folder. A tokenizer without a chat template gets the one that the adapter was trained with, if any.
    """
    device = torch.device("cuda:0" if quantized and torch.cuda.is_available() else "cpu")
    if quantized and device.type == "cpu" and config.model.name == LEAVES["model.name"].field.default:
        say(f"{config.model.name} will be slow on this CPU: {no_gpu_reason()}")
    cap_memory(device, config.performance.memory_limit_gib)
    prepare_child(config.model)  # it imports what it needs while the weights are read
    model, tokenizer = load_base(config, device, quantized)
    for line in edited_line(config, effective(config, model)) if quantized else ():
        say(line)  # an adapter works best on the base that it was trained on
    adopt_template(tokenizer, adapter)
    adopt_end(tokenizer, adapter)
    return model, tokenizer


def attach(base: PreTrainedModel, adapter: Path, model_name: str) -> PeftModel:
    """Return the base with the adapter; print a warning if the adapter was trained on another base."""
    model = load_adapter(base, adapter)
    warn_of_other_bases({adapter: model.peft_config["default"].base_model_name_or_path}, model_name, say)
    return model


# ------------------------------------------------------------------------------------------------ tokens


@dataclasses.dataclass(frozen=True)
class Engine:
    """All that is needed to make answers."""

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ends: list[int]  # tokens that end an answer
    limit: float  # positions that the model supports
    raw: bool  # plain continuation instead of the chat template
    generator: Generator
    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def create_engine(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, raw: bool, adapter: Path | None = None
) -> Engine:
    """Return the model in eval mode, so that only the settings under `generation` decide how it answers.

    adapter: its folder, which names the tokens that training ended answers with.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = end_tokens(base, tokenizer, adapter_ends(adapter, tokenizer))
    # generate() fills settings that are not given from this, and Qwen2.5's file has top_k 20, repetition_penalty 1.05.
    base.generation_config = transformers.GenerationConfig()
    if not raw and tokenizer.chat_template is None:
        say("the tokenizer has no chat template: continuing plain text, as with --raw")
    limit = known_positions(base.config) or float("inf")
    return Engine(model.eval(), tokenizer, ends, limit, raw or tokenizer.chat_template is None, Generator(model, say))


def encode(engine: Engine, prompt: Prompt, system_prompt: str | None) -> list[int]:
    """Return the tokens of a prompt: its chat, up to where the assistant's answer begins, or its plain text."""
    if engine.raw and isinstance(prompt, str):
        return engine.tokenizer(prompt)["input_ids"]
    if engine.raw:
        raise ConfigError("--prompts: `messages` need a chat template: the tokenizer has none, or --raw was given")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    (text,) = render_chats(engine.tokenizer, [messages], add_generation_prompt=True, **engine.template_options)
    if changes_words(messages, text):
        say_once(f"warning: the chat template of {template_file(engine.tokenizer)} {CHANGES}")
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def room_after(engine: Engine, length: int, settings: GenerationConfig) -> int:
    """Return how many tokens may follow a prompt of `length` tokens: max_new_tokens, or fewer if positions run out."""
    if length >= engine.limit:
        raise ConfigError(
            f"a prompt (--prompt, a row of --prompts or a chat so far) has {counted(length, 'token')}, but the model "
            f"supports only {engine.limit:,} positions"
        )
    return int(min(settings.max_new_tokens, engine.limit - length))


@contextlib.contextmanager
def stopped_by_ctrl_c(watch: Watch) -> Iterator[None]:
    """Have Ctrl-C end the answer after the current token, instead of raising an exception in the middle of the work."""
    previous = signal.signal(signal.SIGINT, lambda signum, frame: setattr(watch, "stop", True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def generate_ids(
    engine: Engine,
    rows: list[list[int]],
    settings: GenerationConfig,
    watch: Watch,
    streamer: Any = None,
    batch: int = 1,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and including an end token. All modes get their tokens here.

    rows: the tokens of the prompts; batch: as in `Generator.generate`. A temperature of 0 chooses the likeliest token.
    Raises ConfigError for what the model's own code raises.
    """
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or 0}
    how = transformers.GenerationConfig(
        max_new_tokens=room_after(engine, max(map(len, rows)), settings),
        do_sample=settings.temperature > 0,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=engine.ends or None,
        pad_token_id=engine.tokenizer.pad_token_id or 0,
        **({"num_beams": settings.num_beams} if settings.num_beams > 1 else {}),
        **(sampling if settings.temperature > 0 else {}),
    )
    model = engine.model.get_base_model() if isinstance(engine.model, PeftModel) else engine.model
    with stopped_by_ctrl_c(watch), reading(model, f"{max(map(len, rows)):,} tokens"):
        return engine.generator.generate(rows, how, watch, streamer, batch)


def stream_answer(
    engine: Engine,
    ids: list[int],
    settings: GenerationConfig,
    note: Callable,
    began: float | None = None,
    as_generated: bool = False,
    shown: bool = True,
) -> tuple[str, bool]:
    """Print the answer to one prompt while it is made, give its speed to `note`; return it and whether Ctrl-C came.

    began: see Watch. as_generated: print control characters as they are. shown: False prints nothing.
    """
    kind = TextStreamer if as_generated else VisibleStreamer
    watch, streamer = Watch(began), kind(engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with stopped_by_ctrl_c(watch):  # also after the last token, so that a Ctrl-C just too late does nothing else
        beams = settings.num_beams > 1  # of which the answer is known only at the end
        new = generate_ids(engine, [ids], settings, watch, streamer if shown and not beams else None)[0]
        if beams and shown:
            streamer.on_finalized_text(engine.tokenizer.decode(new, skip_special_tokens=True), stream_end=True)
        traffic = engine.generator.traffic()
        traffic.add(watch, 1, len(ids))
        note(watch.line(new[-1] not in engine.ends, traffic.line()))
        return engine.tokenizer.decode(new, skip_special_tokens=True), watch.stop


# ------------------------------------------------------------------------------------------------ text and demo


def answer_prompt(engine: Engine, config: Config, prompt: str) -> int:
    """Print the answer to one prompt, and nothing else, on stdout; return the exit code."""
    ids = encode(engine, prompt, config.generation.system_prompt)
    transformers.set_seed(config.training.seed)
    _, stopped = stream_answer(engine, ids, config.generation, say, BEGAN, as_generated=not sys.stdout.isatty())
    return 130 if stopped else 0


def batch_size(engine: Engine, config: Config, positions: int) -> int:
    """Return how many prompts are answered together if each needs so many positions, answer included: a power of two.

    With a power of two, a little more or less free memory does not change the batches. A second call that continues
    the first one then samples the same answers as the first call would have. It is 1 where the rotary scale would follow
    the longest prompt of a batch.
    """
    if positions > (families.steady_positions(engine.model.config) or positions):
        return 1
    device, tokens = engine.model.device, CPU_TOKENS
    if device.type == "cuda":
        free = free_bytes(device, config.performance.memory_limit_gib)
        tokens = int(FREE_SHARE * free / engine.generator.position_bytes)
    rows = min(GPU_ROWS if device.type == "cuda" else CPU_ROWS, tokens // positions) // config.generation.num_beams
    return 1 << max(0, rows.bit_length() - 1)


def answer_file(voices: Voices, config: Config, prompts: list[Prompt], output: Path, finished: tuple[int, int]) -> int:
    """Append, in order, an answer for each prompt that the output file lacks; return the exit code.

    With several adapters, a row has an answer of each one. Prompts of similar length are answered together. An answer is written as soon as all answers before it are written.
    So a call that is stopped loses at most the answers of one window of prompts, and the next call makes them again.
    """
    settings, (first, good_bytes), engine = config.generation, finished, voices.engine
    names = [name for name in voices.engines if name != BASE]
    several = names if len(names) > 1 else []
    rows = [encode(engine, prompt, settings.system_prompt) for prompt in prompts]
    longest = max(map(len, rows))  # room_after refuses a prompt that is too long, before anything is written
    size = batch_size(engine, config, longest + room_after(engine, longest, settings))
    start, tokens, traffic, written = time.perf_counter(), 0, engine.generator.traffic(), first
    waiting: dict[int, dict[str, Any]] = {}
    if first:
        say(f"continuing {output} after {counted(first, 'answer')}, which keep the settings of the call that made them")
    bar = tqdm(total=len(prompts), initial=first, unit="prompt", disable=not sys.stderr.isatty())
    with open(output, "ab") as file, bar:
        file.truncate(good_bytes)
        for batch in by_length(rows, size, WINDOW):
            if max(batch) < first:
                continue
            texts: list[dict[str, str]] = [{} for _ in batch]
            for name in several or [voices.active]:
                transformers.set_seed(config.training.seed + batch[0])  # so that a continued call samples the same
                engine, some = voices.use(name), [rows[i] for i in batch]
                answers = generate_ids(engine, some, settings, watch := Watch(), batch=size)
                if watch.stop:
                    say(
                        f"stopped: {output} has {written} of {counted(len(prompts), 'answer')}; "
                        "run the same command again to continue"
                    )
                    return 130
                for text, answer in zip(
                    texts, engine.tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True
                ):
                    text[name] = answer
                # Answers that an earlier call has written are made again for the sake of the batch, and do not count.
                tokens += sum(len(answer) for i, answer in zip(batch, answers, strict=True) if i >= first)
                traffic.add(watch, len(batch), max(map(len, some)))
            for i, found in zip(batch, texts, strict=True):
                if i >= first:
                    waiting[i] = {"completions": found} if several else {"completion": next(iter(found.values()))}
            while written in waiting:
                row = {"prompt": prompts[written]} | waiting.pop(written)
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                written += 1
            file.flush()
            bar.update(written + len(waiting) - bar.n)
    speed = tokens / (time.perf_counter() - start)
    made = f"{counted(tokens, 'token')} | {speed:.1f} tokens/s | {traffic.line()}"
    say(f"{counted(len(prompts) - first, 'answer')} in {output} [{made}]")
    return 0


def demo(voices: Voices, config: Config) -> int:
    """Print the answers of the base and of each adapter to each of DEMO_PROMPTS; return the exit code.

    Those of several adapters stand beside each other.
    """
    several, columns = len(voices.engines) > 2, shutil.get_terminal_size().columns
    for number, prompt in enumerate(DEMO_PROMPTS, 1):
        show(f"{'=' * min(80, columns)}\n[{number}/{len(DEMO_PROMPTS)}] {prompt}")
        texts: dict[str, str] = {}
        for name, label in voices.labels.items():
            engine = voices.use(name)
            ids = encode(engine, prompt, config.generation.system_prompt)
            transformers.set_seed(config.training.seed)
            note = (lambda line, name=name: remark(f"{name}: {line}")) if several else remark
            if not several:
                show(f"\n--- {label}")
            texts[name], stopped = stream_answer(engine, ids, config.generation, note, shown=not several)
            if stopped:
                return 130
        if several:
            print(f"\n{beside(texts, columns)}", flush=True)
    return 0


# ------------------------------------------------------------------------------------------------ interactive


def fitted(engine: Engine, messages: list[dict[str, str]], settings: GenerationConfig) -> list[int]:
    """Return the tokens of a conversation; drop its oldest turns, and say so, until a whole answer fits too.

    A quarter of the positions is freed at once, since all that follows a dropped turn must be computed again.
    """
    for first in range(0, len(messages), 2):
        ids = encode(engine, messages[first:], settings.system_prompt)
        if len(ids) + settings.max_new_tokens <= engine.limit * (0.75 if first else 1):
            break
    room_after(engine, len(ids), settings)
    if first:
        del messages[:first]
        dropped = counted(first // 2, "oldest turn").removeprefix("1 ")
        remark(f"[dropped the {dropped}: the chat no longer fits the {engine.limit:,}-token context]")
    return ids


def answer_turn(engine: Engine, line: str, talk: Conversation, note: Callable = remark) -> tuple[list, str, bool]:
    """Print the answer to a line, after the conversation so far unless the engine is raw.

    Return the messages that it answers, the answer, and whether Ctrl-C came. Raise ConfigError if it cannot be made.
    """
    messages = [*talk.messages, {"role": "user", "content": line}]
    ids = encode(engine, line, None) if engine.raw else fitted(engine, messages, talk.settings)
    try:
        return messages, *stream_answer(engine, ids, talk.settings, note)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise ConfigError(
            "out of GPU memory: the message was dropped; use /reset, or /set a smaller max_new_tokens"
        ) from None


def take_turn(engine: Engine, line: str, talk: Conversation) -> None:
    """Answer a line and add both to the conversation. A turn that fails changes nothing."""
    messages, text, _ = answer_turn(engine, line, talk)
    talk.messages = [*messages, {"role": "assistant", "content": text}]


def interactive(voices: Voices, config: Config, keeps_history: bool = True) -> int:
    """Chat until the user leaves; return 0. keeps_history: for the next chat, what the user types."""
    how = "plain continuation of each message" if voices.engine.raw else "chat"
    names = ", ".join(label.removeprefix("adapter: ") for name, label in voices.labels.items() if name != BASE)
    several = f" ({voices.active} answers)" if len(voices.labels) > 2 else ""
    show(f"{config.model.name} | adapter: {names or 'none'}{several} | {how} | /help lists the commands")
    transformers.set_seed(config.training.seed)

    def blind(line: str, talk: Conversation) -> str:
        _, text, stopped = answer_turn(voices.engine, line, talk, lambda line: None)
        if stopped:  # half an answer is not compared with a whole one
            raise KeyboardInterrupt
        return text

    test = BlindTest(voices.labels, voices.active, voices.use, blind)

    def turn(line: str, talk: Conversation) -> None:
        test.turn(line, talk) if test.file else take_turn(voices.engine, line, talk)

    try:
        return chat(Conversation(config.generation), turn, Keyboard(keeps_history), test.commands())
    finally:
        test.end()


# ------------------------------------------------------------------------------------------------ merge


def merge(config: Config, adapter: Path, folder: Path, base: str) -> int:
    """Write base + adapter as one bfloat16 model and print how far its logits are from those of both; return 0."""
    live, tokenizer = load(config, adapter)
    source = live if base == "dequantized" else load(config, quantized=False)[0]
    plain = plain_copy(source)
    ids = tokenizer(REFERENCE_TEXT)["input_ids"]
    expected = logits_on(attach(live, adapter, config.model.name), ids)
    del live, source
    both = load_adapter(plain, adapter)
    unmerged = logits_on(both, ids)
    merged = merge_adapter(both)
    found = logits_on(merged, ids)
    check_logits(found, unmerged, moved_by_rounding(merged, ids, found))
    difference = (found - expected).abs()
    ends = end_tokens(merged, tokenizer, adapter_ends(adapter, tokenizer))
    with_ends(merged, ends)
    text, lines = modelfile(tokenizer, ends, config.generation, config.data.template_options or {})
    lines += write_folder(merged, tokenizer, folder, config.model.revision, {"Modelfile": text})
    show(
        f"merged the {base} base and {adapter} in bfloat16; the model is in {folder}\n"
        f"largest logit difference to base + adapter on {counted(len(ids), 'token')} of text: {difference.max():.4f} "
        f"(mean {difference.mean():.4f}, logits up to {expected.abs().max():.1f}, the same most likely token at "
        f"{100 * (found.argmax(-1) == expected.argmax(-1)).float().mean():.1f} % of positions)"
    )
    for line in lines:
        say(line)
    show("\n".join(next_commands(folder)))
    return 0


# ------------------------------------------------------------------------------------------------ main


def run(options: argparse.Namespace, config: Config) -> int:
    """Run the mode that was chosen and return the exit code."""
    if options.rows and options.finished[0] == len(options.rows):
        say(
            f"nothing left to do: {options.output} has an answer to each of {counted(len(options.rows), 'prompt')}, made "
            "with the adapter and settings of an earlier call; choose another --output for new answers"
        )
        return 0
    prompt = clean(sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt or "")
    if options.prompt and not prompt.strip():
        raise ConfigError("--prompt: expected a text on stdin, got nothing")
    adapter = next(iter(options.folders), None)
    if options.mode == "merge":
        return merge(config, adapter, Path(options.output), options.merge_base or "dequantized")
    model, tokenizer = load(config, adapter)
    keep_packing(model, keep=False)  # a faster layout, which only training and merging do not allow
    folders, adapters = dict(zip(options.names, options.folders, strict=True)), None
    if len(folders) > 1:
        adapters = AdapterSet(model, folders)
        model = adapters.model
        warn_of_other_bases({a.folder: a.base for a in adapters.adapters.values()}, config.model.name, say)
    elif adapter:
        model = attach(model, adapter, config.model.name)
    if replaces_bf16(config):
        say(SLOW_BF16)
    engine = create_engine(model, tokenizer, options.raw, adapter)
    engine = dataclasses.replace(engine, template_options=config.data.template_options or {})
    voices = Voices(engine, config.model.name, folders, adapters)
    if options.rows:
        return answer_file(voices, config, options.rows, Path(options.output), options.finished)
    if options.mode == "text":
        return answer_prompt(engine, config, prompt)
    if options.mode == "demo":
        return demo(voices, config)
    return interactive(voices, config, not options.no_history)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: parse → load → answer or merge."""
    try:
        options, config = parse(argv)
        for line in options.notes:
            say(line)
        quiet_libraries()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on Ctrl-C stops an answer, or the session
        with writing(options):
            return run(options, config)
    except ConfigError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError as error:
        say(f"error: out of GPU memory: {str(error).splitlines()[0]}")
        return 3
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if out_of_memory(error):
            say(f"error: out of main memory: {' '.join(str(error).split())[:200]}")
            return 3
        if isinstance(error, RuntimeError):
            raise
        if not (isinstance(error, BrokenPipeError) and reader_gone("\n")):
            say(f"error: {' '.join(str(error).split())}")
        return 1
    finally:
        reader_gone()


if __name__ == "__main__":
    run_and_exit(main)
