"""The demonstration model on phantoms in the layouts of three data sets, through the real server."""

import json
from pathlib import Path

import evaluate
import layouts
import pytest
import yaml
from click.testing import CliRunner

from cxr_triton.cli import main
from cxr_triton.evaluate import rows
from cxr_triton.pixels import image
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
STUDIES = 12


@pytest.fixture(scope="module")
def phantoms():
    return evaluate.held_out(STUDIES)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    pytest.importorskip("pytriton")
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository

    folder = tmp_path_factory.mktemp("evaluate")
    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    return folder / "repository"


@pytest.fixture(scope="module")
def results(repository, phantoms, tmp_path_factory):
    """Layout and kind of file to the result's path; the first is run on the repository, the others on its server."""
    from cxr_triton.triton_repo.serve import Server

    folder, found = tmp_path_factory.mktemp("data"), {}
    pairs = [(layout, kind) for layout in ("nih", "chexpert", "vindr-cxr") for kind in layouts.SUFFIXES]

    def evaluated(layout, kind, *where):
        place, out = folder / f"{layout}-{kind}", folder / f"{layout}-{kind}.jsonl"
        keys = layouts.write(place, layout, kind, phantoms)
        (folder / f"{place.name}.yaml").write_text(yaml.safe_dump({"path": place.name, **keys}))
        command = ["evaluate", str(folder / f"{place.name}.yaml"), *where, "-o", str(out), "--json", "-"]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["rows"] == {"ok": STUDIES}
        found[layout, kind] = out

    evaluated(*pairs[0], str(repository))
    with Server(repository, grpc_port=0, metrics_port=0) as server:
        for layout, kind in pairs[1:]:
            evaluated(layout, kind, "--url", server.grpc)
    return found


@pytest.mark.triton
def test_every_layout_and_kind_of_file_gives_the_same_table(results):
    tables = {
        pair: [(row.truth.labels, row.answer.labels, row.answer.whole) for row in rows.read(out)]
        for pair, out in results.items()
    }
    assert len(tables) == 6
    assert all(table == tables["nih", "dicom"] for table in tables.values())
    headers = [rows.read(out).header for out in results.values()]
    assert {header.model["bundle"] for header in headers} == {headers[0].model["bundle"]}
    assert len({header.data["pictures"] for header in headers}) == 2  # DICOM and PNG


@pytest.mark.triton
def test_the_accuracy_is_that_of_transformers(results, phantoms):
    import torch

    torch.set_num_threads(2)
    profile = load_profile(PHANTOM / "profile.yaml")
    budget = {"min_pixels": profile.min_pixels, "max_pixels": profile.max_pixels}
    pictures = [each.picture("mimic_jpg", evaluate.variant(i)[1]) for i, each in enumerate(phantoms)]
    answers = evaluate.Reference().read([image.resize(p, image.target_size(*p.shape, **budget)) for p in pictures])
    expected = [evaluate.labels_of(answer, profile) for answer in answers]
    drawn = [frozenset(each.labels) for each in phantoms]
    for out in results.values():
        known, said = (
            [frozenset(label for label, value in labels.items() if value) for labels in side]
            for side in zip(*((row.truth.labels, row.answer.labels) for row in rows.read(out)), strict=True)
        )
        assert known == drawn
        assert said == expected and evaluate.score(said, drawn)["exact"] >= 0.8
