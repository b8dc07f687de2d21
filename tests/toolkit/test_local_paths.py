"""Names of the hub and names on the disk; what the command line says of missing ones: tests/test_command_line.py."""

from toolkit.local_paths import missing_data


def test_names_of_the_hub_are_not_looked_for_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Salesforce/wikitext", "wikitext", "a-b_c/d.e-f", "some.body/data.v2"):
        assert missing_data(name) == []
    (tmp_path / "here.txt").touch()
    assert missing_data("here.txt") == [] and missing_data(f"{tmp_path}") == []
