"""Train the tiny model from nothing: a byte-level BPE tokenizer, then a 4.3 M parameter Qwen2.

python tiny/make_tiny_model.py --corpus DIR            # DIR holds articles.jsonl and chat.jsonl, see tiny/README.md
python tiny/make_tiny_model.py --corpus DIR --steps 20 --batch_size 4 --output /tmp/tiny   # tries the script on a CPU
"""

import argparse
import copy
import hashlib
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

LENGTH = 512  # tokens in a training sequence
CHAT_SHARE = 0.22  # of the training sequences; the rest is Wikipedia
TURNS = 6  # a chat is cut every so many messages, so that openings, all that a prompt gives, are not rare
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2: document end and padding, turn start, turn end
SPLIT = (  # Qwen2's: contractions, words with one leading character, single digits, punctuation, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_corpus(folder: Path) -> dict[str, list]:
    """Return article texts as train, validation and test (90/5/5 by a hash of the title) and chats in short pieces."""
    corpus = {"train": [], "validation": [], "test": [], "chat": []}
    for line in (folder / "articles.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        bucket = int(hashlib.sha256(row["title"].encode()).hexdigest(), 16) % 20
        corpus[{0: "validation", 1: "test"}.get(bucket, "train")].append(row["text"])
    for line in (folder / "chat.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        corpus["chat"] += [messages[i : i + TURNS] for i in range(0, len(messages), TURNS)]
    random.Random(0).shuffle(corpus["train"])  # neighbours in the file are about related things
    random.Random(0).shuffle(corpus["chat"])
    return corpus


def train_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train 4,096 byte-level tokens and save them; without a normalizer, so that decoding gives every text back."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "additional_special_tokens": [SPECIAL[1]]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": LENGTH, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all tokens in a row, a document end after each text, and where each text starts."""
    documents = [ids + [0] for ids in tokenizer(texts, verbose=False)["input_ids"]]
    starts = torch.tensor([0] + [len(ids) for ids in documents[:-1]]).cumsum(0)
    return torch.tensor([token for ids in documents for token in ids]), starts


def draw(tokens: torch.Tensor, starts: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw sequences, every other one from the start of a document, as a prompt is: [count, LENGTH + 1]."""
    picked = starts[torch.randint(len(starts), (count,), generator=generator)]
    picked[::2] = torch.randint(len(tokens), (len(picked[::2]),), generator=generator)
    return tokens[(picked[:, None] + torch.arange(LENGTH + 1)) % len(tokens)]


def build_model(dropout: float) -> Qwen2ForCausalLM:
    """Make the model, no side of whose linears is under 256, with dropout on what each attention and MLP adds."""
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "max_position_embeddings": 1024}
    # as many key heads as heads: a narrower key's adapter (rank 16) would be under bitsandbytes' 4,096 elements
    depth = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = Qwen2Config(**sizes, **depth, **ids, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.register_forward_hook(lambda module, _, output: F.dropout(output, dropout, module.training))
    return model


@torch.no_grad()
def evaluate(model: Qwen2ForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss in nats a token, over all of the tokens in sequences of LENGTH."""
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, LENGTH):
        part = tokens[None, start : start + LENGTH + 1].to(model.device)
        total += F.cross_entropy(model(part[:, :-1]).logits[0].float(), part[0, 1:], reduction="sum").item()
    model.train()
    return total / (len(tokens) - 1)


def main() -> None:
    """Train the tokenizer and the model, keep the step with the lowest validation loss and save it in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval_steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    corpus = read_corpus(args.corpus)
    spoken = ["\n".join(message["content"] for message in chat) for chat in corpus["chat"]]
    tokenizer = train_tokenizer(corpus["train"] + spoken[: len(spoken) // 10], args.output)
    chats = pack(tokenizer, [tokenizer.apply_chat_template(chat, tokenize=False) for chat in corpus["chat"]])
    articles = pack(tokenizer, corpus["train"])
    held_out = {name: pack(tokenizer, corpus[name])[0] for name in ("validation", "test")}
    model = build_model(args.dropout).to(args.device)
    print(f"{model.num_parameters():,} parameters; Wikipedia {len(articles[0]):,} tokens, chats {len(chats[0]):,}")
    groups = [  # norms and biases are not decayed
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    talk = round(CHAT_SHARE * args.batch_size)
    best, began = (math.inf, 0, None), time.time()
    for step in range(1, args.steps + 1):
        warm, done = min(1.0, step / 100), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        rows = [draw(*articles, args.batch_size - talk, generator), draw(*chats, talk, generator)]
        batch = torch.cat(rows).to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.eval_steps == 0 or step == args.steps:
            found = evaluate(model, held_out["validation"])
            if found < best[0]:
                best = (found, step, copy.deepcopy(model.state_dict()))
            seconds = time.time() - began
            print(f"step {step}: loss {loss.item():.4f}, validation {found:.4f}, {seconds:.0f} s", flush=True)
    model.load_state_dict(best[2])
    model.to(torch.bfloat16).save_pretrained(args.output)
    test = evaluate(model, held_out["test"])
    print(f"saved step {best[1]} in {args.output}: validation {best[0]:.4f}, test {test:.4f}, {math.exp(test):.2f} ppl")


if __name__ == "__main__":
    main()
