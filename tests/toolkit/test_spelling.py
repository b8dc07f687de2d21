"""The names that other tools use, against those of the settings; messages with them: tests/test_config.py."""

from config import SHORT
from toolkit.spelling import USUAL_NAMES


def test_usual_names_lead_to_one_key_each_and_are_no_keys():
    names = [name for names in USUAL_NAMES.values() for name in names]
    assert len(names) == len(set(names))
    assert set(USUAL_NAMES) - set(SHORT) == {"adapter"}
    assert set(names) & set(SHORT) == {"output_dir"}  # which inference has not
