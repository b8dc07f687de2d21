"""What tests of settings and of flags share: loading from flags, and the lines that refuse."""

import pytest

from config import Config, ConfigError, load_config
from toolkit.flags import build_parser, parse_arguments


def from_flags(*argv: str) -> Config:
    """Load the schema with these flags."""
    return load_config([], parse_arguments(build_parser("test"), argv)[1])


def problems(load, *arguments) -> tuple[str, ...]:
    """Return what ConfigError says of a call that must fail, each problem one line."""
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert all(problem and "\n" not in problem for problem in caught.value.problems)
    return caught.value.problems
