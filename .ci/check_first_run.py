"""Check that a run took a quarter off the perplexity: python .ci/check_first_run.py OUTPUT_DIR"""

import json
import sys
from pathlib import Path

rows = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
found = [row["perplexity"] for row in rows if "perplexity" in row]
print(f"perplexity {found[0]:.2f} before, {min(found):.2f} after")
sys.exit(len(found) < 2 or min(found) > 0.75 * found[0])
