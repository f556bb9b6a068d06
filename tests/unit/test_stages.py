"""Stages of a long run: what is there and was made from the same stays, all else is made again."""

import pytest

from cxr_triton.errors import InvalidRequest
from cxr_triton.triton_repo.stages import fingerprint, opened


def ran(folder, *stages, of="weights"):
    """Run stages (name, inputs) in a folder; names of those that were made."""
    made = []

    def make(path):
        path.mkdir()
        made.append(path.name)

    with opened(folder, of, lambda line: None) as run:
        for name, inputs in stages:
            assert run.run(name, inputs, make).is_dir()
    return made


def test_only_what_has_changed_is_made_again_with_all_that_follows(tmp_path):
    stages = [("export", 1), ("bundle", 2), ("repository", 3)]
    assert ran(tmp_path, *stages) == ["export", "bundle", "repository"]
    assert ran(tmp_path, *stages) == []
    assert ran(tmp_path, stages[0], ("bundle", "other"), stages[2]) == ["bundle", "repository"]
    assert ran(tmp_path, stages[0], ("bundle", "other"), stages[2], of="others") == ["export", "bundle", "repository"]
    (tmp_path / "bundle").rmdir()
    assert ran(tmp_path, stages[0], ("bundle", "other"), stages[2], of="others") == ["bundle", "repository"]


def test_what_another_run_made_behind_a_changed_stage_is_gone(tmp_path):
    ran(tmp_path, ("export", 1), ("bundle", 2), ("repository", 3))
    with pytest.raises(ZeroDivisionError), opened(tmp_path, "weights", lambda line: None) as run:
        run.run("export", "other", lambda path: 1 // 0)
    assert not any((tmp_path / name).exists() for name in ("export", "bundle", "repository"))
    assert ran(tmp_path, ("export", 1), ("bundle", 2)) == ["export", "bundle"]


def test_a_folder_is_one_process_alone(tmp_path):
    (tmp_path / ".bundle.killed").mkdir()
    with opened(tmp_path, "weights", lambda line: None):
        assert not (tmp_path / ".bundle.killed").exists()
        with pytest.raises(InvalidRequest, match="another make-engine works in"), opened(tmp_path, "", print):
            pass


def test_an_exchanged_file_changes_the_fingerprint(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no files"):
        fingerprint(tmp_path)
    (tmp_path / "a.png").write_bytes(b"1")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "a.png").write_bytes(b"12")
    assert fingerprint(tmp_path) != before
