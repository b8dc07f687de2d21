"""Time several adapters on one base in memory: how long a switch takes, and decoding beside one adapter alone.

    python tests/benchmarks/bench_adapters.py MODEL --ranks 8 16 16 --new 256

MODEL: a folder. The adapters are random ones of these ranks on all seven projections. Each adapter alone, and then all
of them in one process, decode greedily after the same prompt; the first two answers of each warm up. A switch is timed
until the GPU has copied the adapter. Exit code 1 if a switch takes 50 ms or more, decoding is below 95 % of alone, or
the tokens are not those of the adapter alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWITCH_MS, SHARE = 50, 0.95
PROMPT = list(range(100, 164))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 16])
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--make", help=argparse.SUPPRESS)  # the folder for the adapters: a child's part
    parser.add_argument("--single", nargs="+", help=argparse.SUPPRESS)  # folders of adapters: a child's part
    return parser.parse_args()


def load_base(model: str):
    from config import load_config
    from inference_example import load
    from quantization_utils import keep_packing

    base, _ = load(load_config((), {"model.name": model}))
    keep_packing(base, keep=False)
    return base


def make_adapters(arguments: argparse.Namespace, folder: Path) -> None:
    """Write random adapters into folders named 0, 1, …"""
    import torch
    from peft import get_peft_model

    from quantization_utils import create_lora_config

    base = load_base(arguments.model)
    for number, rank in enumerate(arguments.ranks):
        torch.manual_seed(number)
        model = get_peft_model(base, create_lora_config(rank=rank, alpha=2 * rank))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / str(number), save_embedding_layers=False)
        model.unload()
        vars(base).pop("peft_config", None)


def run_single(arguments: argparse.Namespace) -> dict:
    """Return tokens/s and tokens of each adapter, and the times of the switches between them."""
    import torch
    from transformers import GenerationConfig

    from fast_path.decoder import Watch
    from toolkit.adapter_set import AdapterSet
    from toolkit.adapters import load_adapter
    from toolkit.generation import Generator

    base, folders = load_base(arguments.model), {Path(name).name: Path(name) for name in arguments.single}
    base.generation_config = GenerationConfig()
    adapters = AdapterSet(base, folders) if len(folders) > 1 else None
    model = adapters.model if adapters else load_adapter(base, arguments.single[0])
    generator = Generator(model.eval(), lambda line: print(line, file=sys.stderr))
    if adapters:
        adapters.generator = generator
    how = GenerationConfig(max_new_tokens=arguments.new, do_sample=False, pad_token_id=0)
    speeds: dict[str, list[float]] = {name: [] for name in folders}
    tokens, switches = {}, []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for turn in range(arguments.repeat + 2):
        for name in folders:
            wait()
            start = time.perf_counter()
            if adapters:
                adapters.use(name)
            else:  # forget the prompt, as a switch does, so that both compute it the same way
                generator.adapter_changed(None, None)
            wait()
            switch = (time.perf_counter() - start) * 1e3
            tokens[name] = generator.generate([PROMPT], how, watch := Watch())[0]
            if turn >= 2:
                switches.append(switch)
                speeds[name].append((watch.tokens - 1) / (watch.last - watch.first))
    found = {name: statistics.median(values) for name, values in speeds.items()}
    return {"tokens_per_s": found, "tokens": tokens, "switch_ms": switches}


def child(arguments: argparse.Namespace, *part: object) -> dict:
    """Return the result of a part of the work, done in a fresh process."""
    words = ["--ranks", *arguments.ranks, "--new", arguments.new, "--repeat", arguments.repeat, *part]
    command = [sys.executable, __file__, arguments.model, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    if arguments.single or arguments.make:
        from toolkit.startup import leave

        print(json.dumps(run_single(arguments) if arguments.single else make_adapters(arguments, Path(arguments.make))))
        leave(0)
    with tempfile.TemporaryDirectory() as made:
        child(arguments, "--make", made)
        folders = [Path(made) / str(number) for number in range(len(arguments.ranks))]
        together = child(arguments, "--single", *folders)
        good = max(together["switch_ms"]) < SWITCH_MS
        for folder, rank in zip(folders, arguments.ranks, strict=True):
            name, alone = folder.name, child(arguments, "--single", folder)
            before, now = alone["tokens_per_s"][name], together["tokens_per_s"][name]
            pairs = zip(alone["tokens"][name], together["tokens"][name], strict=True)
            first = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
            good &= first is None and now >= SHARE * before
            same = "the same tokens" if first is None else f"other tokens from token {first} on"
            speeds = f"alone {before:.1f} tokens/s, among {len(folders)} {now:.1f} ({now / before:.1%})"
            print(f"rank {rank}: {speeds}, {same}", flush=True)
    times = together["switch_ms"]
    print(f"switch: median {statistics.median(times):.1f} ms, longest {max(times):.1f} ms")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
