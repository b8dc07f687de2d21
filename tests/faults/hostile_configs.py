"""Settings that a stranger could send: config.yaml and flags."""

from collections.abc import Callable
from pathlib import Path

from tests.faults.adversary import CODE, Attack, Ground, train


def config(text: str, says: str = "") -> Callable[[Path, Ground], Attack]:
    """Return a function that writes a config.yaml and trains with it."""

    def build(folder: Path, ground: Ground) -> Attack:
        (folder / "hostile.yaml").write_text(text, encoding="utf-8")
        return train("--config", folder / "hostile.yaml", says=says)

    return build


ATTACKS: dict[str, Callable[[Path, Ground], Attack]] = {
    "python object": config(f'model: !!python/object/apply:builtins.exec ["{CODE}"]\n', "hostile.yaml"),
}
