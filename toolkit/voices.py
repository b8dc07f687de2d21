"""Who answers: the base, or one of its adapters. Each voice stops where its own adapter was taught to."""

import dataclasses
from pathlib import Path
from typing import Any

from peft import PeftModel

from toolkit.adapter_set import AdapterSet
from toolkit.side_by_side import BASE
from toolkit.turn_ends import adapter_ends, end_tokens


class Voices:
    """The base and its adapters by name, of which one answers.

    engine: the script's, with its model and tokenizer. folders: those of the adapters by name; with several of them
    `adapters` holds them. The first adapter answers, or the base where there is none.
    """

    def __init__(self, engine: Any, model_name: str, folders: dict[str, Path], adapters: AdapterSet | None = None):
        self.adapters, self.labels = adapters, {BASE: f"base: {model_name}"}
        self.engines = {BASE: engine}
        base = engine.model.get_base_model() if folders else engine.model
        for name, folder in folders.items():
            learned = adapter_ends(folder, engine.tokenizer)
            ends = sorted({*engine.ends, *end_tokens(base, engine.tokenizer, learned)}) if adapters else engine.ends
            self.engines[name], self.labels[name] = dataclasses.replace(engine, ends=ends), f"adapter: {folder}"
        self.active = next(iter(folders), BASE)
        if adapters:
            adapters.generator = engine.generator

    @property
    def engine(self) -> Any:
        """The engine of the voice that answers."""
        return self.engines[self.active]

    def use(self, name: str) -> Any:
        """Have a voice answer from now on, and return its engine."""
        model = self.engine.model
        if isinstance(model, PeftModel) and (name == BASE) != (self.active == BASE):
            (model.base_model.disable_adapter_layers if name == BASE else model.base_model.enable_adapter_layers)()
        if self.adapters and name != BASE:
            self.adapters.use(name)
        self.active = name
        return self.engine
