"""Print a set-up command of README.md as it stands there, for .ci/run to run: python3 .ci/readme_command.py 1"""

import re
import shutil
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def setup_commands() -> list[str]:
    """Return the blocks of the section "Set up" that are commands for this system: those without a `#` line of another."""
    section = re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.M)
    (setup,) = [part for part in section if part.startswith("Set up")]
    return re.findall(r"^```sh\n(.*?)```$", setup, flags=re.M | re.S)


if __name__ == "__main__":
    command = setup_commands()[int(sys.argv[1]) - 1]
    # root in a container often has no sudo; for root the word changes nothing
    print(command if shutil.which("sudo") else command.replace("sudo ", ""))
