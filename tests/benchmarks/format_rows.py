"""Rows that teach a format: chats with tool calls, and chats with a thought before the answer.

python tests/benchmarks/format_rows.py rows                    writes rows/tools and rows/think
python train_qlora.py --model_name MODEL --dataset rows/think --num_epochs 2 --output_dir out
python train_qlora.py --evaluate --adapter out --generate 40   how many of 40 held-out answers are right, letter by letter

All questions differ, and each has one right answer, so that exact match measures whether the format was learned.
docs/experiments.md has what came out.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

CITIES = [
    "Taipei",
    "Tainan",
    "Paris",
    "London",
    "Madrid",
    "Berlin",
    "Rome",
    "Oslo",
    "Tokyo",
    "Osaka",
    "Seoul",
    "Lima",
    "Quito",
    "Cairo",
    "Dakar",
    "Delhi",
    "Perth",
    "Denver",
]
CURRENCIES = ["USD", "EUR", "TWD", "JPY", "GBP"]
NAMES = ["Ana", "Ben", "Chen", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jun"]
THINGS = ["apples", "pens", "coins", "books", "shells", "cards"]
WEATHER = [
    "What is the weather in {} right now, in {}?",
    "How warm is it in {}? Please use {}.",
    "Temperature in {} ({})?",
]
MONEY = ["How much is {} {} in {}?", "Convert {} {} to {}, please.", "I have {} {}; what is that in {}?"]


def tool(name: str, description: str, **types: str) -> dict:
    """Return the description of a function whose arguments are all required, as chat templates take it."""
    properties = {argument: {"type": kind} for argument, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("get_weather", "The weather of a city", city="string", unit="string"),
    tool("convert", "Convert an amount of money", amount="number", source="string", target="string"),
]


def with_tool_call(random_: random.Random) -> dict:
    """Return a question whose answer is a call of one of two functions."""
    if random_.random() < 0.5:
        values = {"city": random_.choice(CITIES), "unit": random_.choice(["celsius", "fahrenheit"])}
        name, question = "get_weather", random_.choice(WEATHER)
    else:
        source, target = random_.sample(CURRENCIES, 2)
        values = {"amount": random_.randint(2, 999), "source": source, "target": target}
        name, question = "convert", random_.choice(MONEY)
    call = {"type": "function", "function": {"name": name, "arguments": values}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"tools": TOOLS, "messages": [{"role": "user", "content": question.format(*values.values())}, answer]}


def with_thought(random_: random.Random) -> dict:
    """Return a sum whose answer begins with its steps, in <think> and </think>."""
    name, things = random_.choice(NAMES), random_.choice(THINGS)
    first, bought, given = random_.randint(3, 40), random_.randint(2, 30), random_.randint(1, 3)
    has = first + bought
    question = (
        f"{name} has {first} {things}, buys {bought} more and gives {given} away. How many {things} does {name} have?"
    )
    steps = f"Start: {first}. Bought: {first} + {bought} = {has}. Given away: {has} - {given} = {has - given}."
    answer = f"<think>\n{steps}\n</think>\n\n{name} has {has - given} {things}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(folder: Path, make: Callable[[random.Random], dict], train: int = 600, validation: int = 40) -> None:
    """Write train.jsonl and validation.jsonl with rows whose questions all differ."""
    random_, rows = random.Random(0), {}
    while len(rows) < train + validation:
        row = make(random_)
        rows[row["messages"][0]["content"]] = row
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(lines[:train]), encoding="utf-8")
    (folder / "validation.jsonl").write_text("".join(lines[train:]), encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "rows")
    write(out / "tools", with_tool_call)
    write(out / "think", with_thought)
