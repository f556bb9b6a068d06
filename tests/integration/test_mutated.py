"""The short form of `mutated.py`: some thousand mutated inputs through every door, the same ones each time."""

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("sqlalchemy")
pytest.importorskip("pylibjpeg")

from mutated import DOORS, run


def test_mutated_inputs_are_taken_or_refused_and_nothing_else(tmp_path):
    record = run(list(DOORS), 3000, seed=2, minutes=5, keep=str(tmp_path), processes=2)
    doors = record["doors"]
    assert record["findings"] == 0, {name: door.get("examples") for name, door in doors.items()}
    assert record["inputs"] == 3000 and not list(tmp_path.glob("*differs*"))
    for name in ("dicom", "png"):
        compared = doors[name]["compared"]
        assert compared["equal to an original"] > 20 and "differs" not in compared
        assert compared["equal to a reference's reading of the mutated file"] > 10
    for name in ("dicom", "png", "jpeg", "request"):
        taken = doors[name]["outcomes"]["taken"]
        assert 0.02 < taken / doors[name]["inputs"] < 0.9, name
