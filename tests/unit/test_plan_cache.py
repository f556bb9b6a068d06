"""The plan cache: what comes out is what went in, or nothing."""

import threading

import pytest

from cxr_triton.engines.plan_cache import PlanCache, plan_key

REPORT = {"engine": "none", "seconds": 1.5}


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "built").write_bytes(b"plan" * 1000)
    cache, key = PlanCache(tmp_path / "cache"), plan_key({"graph": "a"})
    cache.put(key, tmp_path / "built", REPORT)
    return cache, key


def test_a_plan_comes_back_with_its_report(kept, tmp_path):
    cache, key = kept
    assert cache.get(key, tmp_path / "out") == REPORT
    assert (tmp_path / "out").read_bytes() == b"plan" * 1000
    assert cache.get(plan_key({"graph": "b"}), tmp_path / "other") is None
    assert not (tmp_path / "other").exists()


def damage(entry, how):
    if how == "byte":
        data = bytearray((entry / "plan").read_bytes())
        data[7] ^= 1
        (entry / "plan").write_bytes(data)
    elif how == "short":
        (entry / "plan").write_bytes(b"plan")
    elif how == "json":
        (entry / "entry.json").write_text("{")
    elif how == "other":
        text = (entry / "entry.json").read_text()
        (entry / "entry.json").write_text(text.replace(entry.name, "0" * 64))
    else:
        (entry / how).unlink()


@pytest.mark.parametrize("how", ["byte", "short", "json", "other", "plan", "entry.json"])
def test_a_damaged_entry_is_dropped_and_can_be_built_again(kept, tmp_path, caplog, how):
    cache, key = kept
    damage(cache.folder / key[:2] / key, how)
    assert cache.get(key, tmp_path / "out") is None
    assert not (tmp_path / "out").exists() and "damaged" in caplog.text
    cache.put(key, tmp_path / "built", REPORT)
    assert cache.get(key, tmp_path / "out") == REPORT


def test_writers_of_one_key_do_not_disturb_each_other(kept, tmp_path):
    cache, key = kept
    threads = [threading.Thread(target=cache.put, args=(key, tmp_path / "built", REPORT)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get(key, tmp_path / "out") == REPORT
    assert [path.name for path in (cache.folder / key[:2]).iterdir()] == [key]


def test_a_key_depends_on_every_value():
    inputs = {"graphs": ["a", "b"], "shapes": [{"x": ((1,), (2,))}], "version": "1", "compute_capability": "8.9"}
    keys = {plan_key(inputs | {name: "changed"}) for name in inputs} | {plan_key(inputs)}
    assert len(keys) == len(inputs) + 1
