"""The result of a benchmark: its schema, summaries, intervals and the waterfall."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import bench_results  # noqa: E402

SCHEMA = json.loads((ROOT / "docs" / "bench.schema.json").read_text())


def test_the_example_is_whole():
    jsonschema.validate(bench_results.result(), SCHEMA)


@pytest.mark.parametrize("gone", ["scenarios", "environment", "baselines", "notice"])
def test_the_schema_refuses_a_result_that_lacks_something(gone):
    result = bench_results.result(repeats=1)
    del result[gone]
    with pytest.raises(jsonschema.ValidationError, match=gone):
        jsonschema.validate(result, SCHEMA)
