"""Adapters on small files in the published layouts, mapping, policies, and what is wrong with a data set."""

import dataclasses
import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest

from cxr_triton.config import build, read_yaml
from cxr_triton.errors import InvalidConfig, InvalidRequest
from cxr_triton.evaluate.adapters import FORMATS
from cxr_triton.evaluate.config import Data, load_data
from cxr_triton.evaluate.dataset import prepare
from cxr_triton.evaluate.rows import Box
from cxr_triton.evaluate.study import age_band
from cxr_triton.evaluate.vocabulary import CHEXPERT, OF_NIH, OF_VINDR

ROOT = Path(__file__).resolve().parents[2]


def put(folder: Path, **files: str) -> Path:
    """Files by path, with their text."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def cases(folder: Path, tmp_path: Path, format_: str, **keys):
    """Cases by study, and the data set."""
    dataset = prepare(Data(path=str(folder), format=format_, **keys), tmp_path / "spool.jsonl")
    return {case.row.study: case for case in dataset}, dataset


def present(case) -> set[str]:
    return {label for label, value in case.row.truth.labels.items() if value}


@pytest.fixture
def chexpert(tmp_path):
    base = "CheXpert-v1.0-small/valid"
    labels = ",".join(CHEXPERT)
    rows = [
        f"{base}/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0,1,-1,1,,,,,,,,,,1",
        f"{base}/patient64541/study1/view2_lateral.jpg,Male,73,Lateral,,0,1,-1,1,,,,,,,,,,1",
        f"{base}/patient64542/study1/view1_frontal.jpg,Female,17,Frontal,PA,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        f"{base}/patient64543/study2/view1_lateral.jpg,Female,90,Lateral,,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    ]
    folder = put(
        tmp_path / "chexpert", **{"valid.csv": f"Path,Sex,Age,Frontal/Lateral,AP/PA,{labels}\n" + "\n".join(rows)}
    )
    return put(folder, **{f"valid/patient6454{n}/study1/view1_frontal.jpg": "x" for n in (1, 2)})


@pytest.mark.parametrize(("uncertain", "counts"), [("zeros", 0), ("ones", 1), ("ignore", None)])
def test_chexpert(chexpert, tmp_path, uncertain, counts):
    found, dataset = cases(chexpert, tmp_path, "chexpert", split="valid", uncertain=uncertain)
    case = found["patient64541/study1"]
    assert case.row.truth.labels["Cardiomegaly"] == counts
    assert case.row.truth.labels["Edema"] == 0  # empty
    assert {"Enlarged Cardiomediastinum", "Lung Opacity", "Support Devices"} == present(case) - {"Cardiomegaly"}
    assert case.row.images == ("valid/patient64541/study1/view1_frontal.jpg",)
    assert case.row.groups == {"age_band": "65-79", "sex": "M", "view": "AP"}
    assert found["patient64542/study1"].row.groups["age_band"] == "0-17"
    assert list(found) == ["patient64541/study1", "patient64542/study1", "patient64543/study2"]
    assert dataset.labels == CHEXPERT and dataset.counted == {"missing file": 1}


def test_chexpert_with_all_pictures_of_a_study_or_each_alone(chexpert, tmp_path):
    found, _ = cases(chexpert, tmp_path, "chexpert", split="valid", pictures="all", blank="ignore")
    both = found["patient64541/study1"].row
    assert [Path(image).name for image in both.images] == ["view1_frontal.jpg", "view2_lateral.jpg"]
    assert both.truth.labels["Edema"] is None
    each, dataset = cases(chexpert, tmp_path, "chexpert", split="valid", pictures="each", views=("LATERAL",))
    assert list(each) == ["patient64541/study1/valid/patient64541/study1/view2_lateral.jpg", "patient64543/study2"]
    assert dataset.counted["study without a picture of the views that are read"] == 1


def test_chexpert_by_study(tmp_path):
    text = "Study,No Finding,Edema\nCheXpert-v1.0/test/patient64741/study1,0,1\n"
    folder = put(tmp_path / "c", **{"groundtruth.csv": text, "test/patient64741/study1/view1_frontal.jpg": "x"})
    found, _ = cases(folder, tmp_path, "chexpert")
    case = found["patient64741/study1"]
    assert present(case) == {"Edema"} and case.row.images == ("test/patient64741/study1/view1_frontal.jpg",)


NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
    "00000001_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA,2682,2749,0.143,0.143,\n"
    "00000001_001.png,No Finding,1,1,58,M,AP,2682,2749,0.143,0.143,\n"
    "00000002_000.png,Mass|Nodule|Effusion,0,2,81,F,PA,2500,2048,0.171,0.171,\n"
)


@pytest.fixture
def nih(tmp_path):
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000002_000.png,Infiltrate,10,20,30,40,,,\n"
    return put(
        tmp_path / "nih",
        **{
            "Data_Entry_2017_v2020.csv": NIH,
            "BBox_List_2017.csv": boxes + "00000002_000.png,Mass,1,2,3,4,,,\n00000002_000.png,Mass,5,6,7,8,,,\n",
            "test_list.txt": "00000002_000.png\n00000001_000.png\n00000009_000.png\n",
            "images_001/images/00000001_000.png": "x",
            "images_012/images/00000002_000.png": "x",
        },
    )


def test_nih(nih, tmp_path):
    found, dataset = cases(nih, tmp_path, "nih")
    assert list(found) == ["00000001_000.png", "00000002_000.png"]
    assert present(found["00000001_000.png"]) == {"Cardiomegaly"}
    assert present(found["00000002_000.png"]) == {"Lung Lesion", "Pleural Effusion"}
    assert found["00000001_000.png"].row.images == ("images_001/images/00000001_000.png",)
    assert found["00000002_000.png"].row.groups == {"age_band": "80+", "sex": "F", "view": "PA"}
    assert "Fracture" not in dataset.labels and len(dataset.labels) == 11  # what the data set says nothing of
    assert dataset.mapping["Hernia"] is None and dataset.mapping["Effusion"] == "Pleural Effusion"
    assert dataset.counted == {
        "label without a place: Emphysema": 1,
        "picture of the split's list that is not in the table": 1,
    }


def test_a_mapping_is_laid_over_the_formats_own(nih, tmp_path):
    found, dataset = cases(nih, tmp_path, "nih", split="all", mapping={"Emphysema": "Emphysema", "Mass": ""})
    assert present(found["00000001_000.png"]) == {"Cardiomegaly", "Emphysema"}
    assert dataset.labels[-1] == "Emphysema" and dataset.counted["label without a place: Mass"] == 1
    judged, dataset = cases(nih, tmp_path, "nih", split="all", labels=("Cardiomegaly",))
    assert list(judged["00000002_000.png"].row.truth.labels) == ["Cardiomegaly"]
    assert dataset.counted["label that is not judged: Effusion"] == 1


def test_nih_boxes(nih, tmp_path):
    found, _ = cases(nih, tmp_path, "nih", kind="boxes")
    opacity, lesion = found["00000002_000.png/Infiltration"], found["00000002_000.png/Mass"]
    assert opacity.variables["disease"] == "lung opacity"
    assert opacity.row.truth.boxes == (Box(label="Infiltration", corners=(10.0, 20.0, 40.0, 60.0)),)
    assert [box.corners for box in lesion.row.truth.boxes] == [(1.0, 2.0, 4.0, 6.0), (5.0, 6.0, 12.0, 14.0)]


@pytest.mark.parametrize("labeller", ["chexpert", "negbio", "radiologist"])
@pytest.mark.parametrize("suffix", ["jpg", "dcm"])
def test_mimic(tmp_path, labeller, suffix):
    opacity = "Airspace Opacity" if labeller == "radiologist" else "Lung Opacity"
    name = "2.1.0-test-set-labeled.csv" if labeller == "radiologist" else f"2.0.0-{labeller}.csv"
    tables = {
        "2.0.0-split.csv": "dicom_id,study_id,subject_id,split\n"
        "a,5,10000032,test\nb,5,10000032,test\nc,6,10000032,train\nd,7,10000033,test\n",
        "2.0.0-metadata.csv": "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition\n"
        "b,10000032,5,CHEST (PORTABLE AP),LATERAL\na,10000032,5,CHEST (PORTABLE AP),AP\n"
        "c,10000032,6,,PA\nd,10000033,7,,PA\n",
        name: f"study_id,Edema,{opacity},Pneumonia\n5,1.0,,-1.0\n6,1.0,,\n",
    }
    folder = put(tmp_path / "mimic", **{f"files/p10/p10000032/s5/a.{suffix}": "x"})
    for table, text in tables.items():
        (folder / f"mimic-cxr-{table}.gz").write_bytes(gzip.compress(text.encode()))
    found, dataset = cases(folder, tmp_path, "mimic-cxr", labeller=labeller)
    assert list(found) == ["5"] and dataset.counted == {f"study without labels of {labeller}": 1}
    row = found["5"].row
    assert row.images == (f"files/p10/p10000032/s5/a.{suffix}",)
    assert row.groups == {"portable": "yes", "view": "AP"} and present(found["5"]) == {"Edema"}
    assert row.truth.labels["Lung Opacity"] == 0 and row.truth.labels["Pneumonia"] is None


VINDR = "image_id,rad_ID,Cardiomegaly,Lung Opacity,Rib fracture,Aortic enlargement,No finding\n"


@pytest.mark.parametrize(
    ("readers", "expected"),
    [("any", {"Cardiomegaly", "Fracture"}), ("majority", {"Cardiomegaly"}), ("all", set())],
)
def test_vindr_with_several_readers(tmp_path, readers, expected):
    labels = VINDR + "p,R1,1,0,0,1,0\np,R2,1,0,0,0,0\np,R3,0,0,1,0,0\n"
    folder = put(tmp_path / "v", **{"annotations/image_labels_train.csv": labels, "train/p.dicom": "x"})
    found, dataset = cases(folder, tmp_path, "vindr-cxr", split="train", readers=readers)
    assert present(found["p"]) == expected and found["p"].row.images == ("train/p.dicom",)
    assert found["p"].row.truth.readers["R3"]["Fracture"] == 1
    assert dataset.counted == {"label without a place: Aortic enlargement": 1}
    assert dataset.data.blank == "zeros" and found["p"].row.truth.labels["Edema"] == 0


def test_vindr_boxes(tmp_path):
    boxes = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
    boxes += "p,R1,Nodule/Mass,1,2,3,4\np,R2,Nodule/Mass,2,2,3,4\np,R1,No finding,,,,\n"
    folder = put(tmp_path / "v", **{"image_labels_test.csv": VINDR + "p,,0,0,0,0,0\n", "annotations_test.csv": boxes})
    found, _ = cases(folder, tmp_path, "vindr-cxr", kind="boxes")
    assert list(found) == ["p/Nodule/Mass"]
    assert [box.reader for box in found["p/Nodule/Mass"].row.truth.boxes] == ["R1", "R2"]


def test_padchest(tmp_path):
    head = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,"
    head += "Manufacturer_DICOM,MethodLabel,Labels\n"
    rows = [
        "0,1.png,0,20140915,s1,p1,1930.0,F,L,Maker,Physician,\"['cardiomegaly', 'scoliosis', '']\"",
        "1,2.png,3,20140915,s1,p1,1930.0,F,PA,Maker,Physician,\"['cardiomegaly', 'scoliosis', '']\"",
        "2,3.png,0,20140915,s2,p2,,M,PA,Maker,RNN_model,['exclude']",
        "3,4.png,0,20140915,s3,p2,,M,AP_horizontal,Maker,RNN_model,['normal']",
    ]
    folder = put(
        tmp_path / "p",
        **{"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": head + "\n".join(rows), "3/2.png": "x"},
    )
    found, dataset = cases(folder, tmp_path, "padchest")
    row = found["s1"].row
    assert (
        row.images == ("3/2.png",)
        and present(found["s1"]) == {"Cardiomegaly"}
        and present(found["s3"]) == {"No Finding"}
    )
    assert row.groups == {"age_band": "80+", "labelled_by": "Physician", "sex": "F", "source": "Maker", "view": "PA"}
    assert dataset.counted["label without a place: scoliosis"] == 1
    assert dataset.counted["study that the data set marks to be excluded"] == 1


def test_rexvqa(tmp_path):
    asked = {
        "q1": {
            "study_id": "s",
            "ImagePath": ["../deid_png/P/A/1.png", "../deid_png/P/A/2.png"],
            "ImageViewPosition": ["LATERAL", "PA"],
            "PatientSex": "F",
            "PatientAge": "045Y",
            "task_name": "negation_detection",
            "question": "What is absent?",
            "options": ["A. Effusion", "B. A. fissure"],
            "correct_answer": "B",
        },
        "q2": {"image": "1.png", "question": "Which?", "options": ["left", "right"], "answer": "right"},
        "q3": {"image": "1.png", "question": "Which?", "options": ["left", "right"], "answer": "E"},
    }
    folder = put(tmp_path / "r", **{"metadata/test_vqa_data.json": json.dumps(asked), "deid_png/P/A/2.png": "x"})
    found, _ = cases(folder, tmp_path, "questions")
    first = found["q1"]
    assert first.variables == {"question": "What is absent?", "options": ["Effusion", "A. fissure"]}
    assert first.row.truth.options == ("B",) and first.row.images == ("deid_png/P/A/2.png",)
    assert first.row.groups == {"age_band": "40-64", "question": "negation_detection", "sex": "F", "view": "PA"}
    assert found["q2"].row.truth.options == ("B",)
    assert found["q3"].fault == "the answer 'E' is none of the 2 options"


def test_ms_cxr(tmp_path):
    head = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split\n"
    path = "files/p10/p10000032/s5/a.jpg"
    rows = [
        f"a,Pneumonia,left base,{path},10,20,30,40,100,200,test",
        f"a,Pneumonia,left base,{path},0,0,100,200,100,200,test",
    ]
    rows.append(f"a,Edema,mild,{path},0,0,1,1,100,200,train")
    folder = put(tmp_path / "m", **{"MS_CXR_Local_Alignment_v1.1.0.csv": head + "\n".join(rows), path: "x"})
    found, _ = cases(folder, tmp_path, "ms-cxr")
    (case,) = found.values()
    assert case.variables["phrase"] == "left base" and case.row.images == (path,)
    assert [(box.corners, box.unit) for box in case.row.truth.boxes] == [
        ((10.0, 10.0, 40.0, 30.0), "percent"),
        ((0.0, 0.0, 100.0, 100.0), "percent"),
    ]


def test_a_table_of_ones_own_as_csv_json_lines_and_parquet(tmp_path):
    rows = [
        {"study": "1", "image": "a.png", "labels": "Edema; ?Pneumonia", "sex": "female", "age": "40", "ward": "3"},
        {"study": "2", "image": "b.png", "labels": "No Finding|Oedema", "sex": "", "age": "", "ward": ""},
    ]
    folder = put(tmp_path / "t", **{"a.png": "x", "b.png": "x"})
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    put(folder, **{"own.csv": "\ufeff" + "\n".join(lines), "own.jsonl": "\n".join(map(json.dumps, rows))})
    tables = ["own.csv", "own.jsonl"]
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), folder / "own.parquet")
        tables.append("own.parquet")
    digests = set()
    for table in tables:
        found, dataset = cases(folder / table, tmp_path, "table", groups=("ward",))
        assert found["1"].row.truth.labels | {"Edema": 1, "Pneumonia": None} == found["1"].row.truth.labels
        assert found["1"].row.groups == {"age_band": "40-64", "sex": "F", "ward": "3"}
        assert present(found["2"]) == {"No Finding"} and dataset.counted == {"label without a place: Oedema": 1}
        digests.add(dataset.digest)
    assert len(digests) == 1


def test_a_table_of_questions_boxes_and_reports(tmp_path):
    text = "images,question,options,answer,boxes,phrase,report\n"
    text += 'a.png;b.png,Which?,left|right,left,"[{""x1"":1,""y1"":2,""x2"":3,""y2"":4}]",it,Clear.\n'
    table = put(tmp_path / "t", **{"own.csv": text}) / "own.csv"
    (asked,) = cases(table, tmp_path, "table", kind="options", pictures="all")[0].values()
    assert asked.row.truth.options == ("A",) and asked.row.images == ("a.png", "b.png")
    (boxed,) = cases(table, tmp_path, "table", kind="boxes")[0].values()
    assert boxed.row.truth.boxes == (Box(label=None, corners=(1.0, 2.0, 3.0, 4.0)),)
    (reported,) = cases(table, tmp_path, "table", kind="report")[0].values()
    assert reported.row.truth.text == "Clear."


def test_a_sample_is_that_of_its_seed(tmp_path):
    lines = ["study,image,labels", *(f"{n},{n}.png,Edema" for n in range(50))]
    table = put(tmp_path / "t", **{"own.csv": "\n".join(lines)}) / "own.csv"
    first, dataset = cases(table, tmp_path, "table", limit=10, seed=3)
    again, _ = cases(table, tmp_path, "table", limit=10, seed=3)
    other, _ = cases(table, tmp_path, "table", limit=10, seed=4)
    assert list(first) == list(again) != list(other) and len(first) == 10
    assert [case.row.number for case in first.values()] == list(range(10))
    assert dataset.counted["study that was not drawn"] == 40


@pytest.mark.parametrize(
    ("format_", "files", "keys", "said"),
    [
        ("nih", {"Data_Entry_2017.csv": "Image Index,Findings,Patient ID,View Position\n", "test_list.txt": ""}, {},
         "no column 'Finding Labels' in Data_Entry_2017.csv; did you mean 'Findings'"),
        ("nih", {}, {}, "has no Data_Entry_2017.csv"),
        ("nih", {"Data_Entry_2017.csv": NIH}, {"split": "valid"}, "'valid' is none of test, train_val, all"),
        ("nih", {}, {"kind": "options"}, "format nih has no options, only labels, boxes; options: questions, table"),
        ("chest", {}, {}, "unknown format 'chest'"),
        ("chexpert", {"test.csv": "Path,Age\nx,1\n"}, {}, "none of CheXpert's 14 labels"),
        ("chexpert", {"test.csv": "Path,Edema\na/b.jpg,1\n"}, {}, "names no patient and study"),
        ("chexpert", {"test.csv": "Path,Edema\npatient1/study1/a.jpg,yes\n"}, {},
         "a label is 'yes', expected 1, 0, -1 or nothing"),
        ("table", {"own.csv": "image,labels\na.png,Edema\n"}, {"groups": ("ward",)}, "no column 'ward'"),
        ("table", {"own.csv": "study,image,labels\n1,a,Edema\n1,b,Edema\n"}, {}, "study '1' is there twice"),
        ("table", {"own.csv": "image,labels\n"}, {}, "no study of split test is left"),
        ("table", {"own.csv": "image,labels\n\xff\x00,\x00\n"}, {"kind": "boxes"}, "no column 'boxes'"),
        ("questions", {"test.json": "{"}, {}, "is no JSON of questions"),
        ("questions", {"test.json": '[{"question": "?", "image": "a"}]'}, {},
         "question 0 has no options; it has question, image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, format_, files, keys, said):
    folder = put(tmp_path / "data", **files) if files else tmp_path
    with pytest.raises(InvalidRequest, match=said):
        cases(folder, tmp_path / "data" if files else tmp_path, format_, **keys)


def test_a_yaml_file_says_it_all_and_the_command_line_wins(tmp_path):
    put(tmp_path, **{"data.yaml": "path: nih\nformat: nih\nmapping: {Hernia: Hernia}\nlimit: 5\n", "nih/x": "x"})
    data = load_data(tmp_path / "data.yaml", limit=7, task=None)
    assert data.folder == tmp_path / "nih" and data.limit == 7 and data.mapping == {"Hernia": "Hernia"}
    with pytest.raises(InvalidRequest, match="give --format"):
        load_data(tmp_path / "nih")
    (tmp_path / "data.yaml").write_text("format: nih\nmaping: {}\n")
    with pytest.raises(InvalidConfig, match="did you mean 'mapping'"):
        load_data(tmp_path / "data.yaml")
    (tmp_path / "data.yaml").write_text("format: nih\nuncertain: maybe\n")
    with pytest.raises(InvalidConfig, match="'maybe' is none of zeros, ones, ignore"):
        load_data(tmp_path / "data.yaml")


def test_every_label_of_ours_is_one_of_the_14():
    ours = {label for each in FORMATS.values() for label in each.mapped.values()}
    assert ours - {None} == set(CHEXPERT)


@pytest.mark.parametrize(
    ("age", "band"),
    [("058Y", "40-64"), ("000Y", "0-17"), ("18", "18-39"), ("80.0", "80+"), ("", ""), ("?", ""), ("414", "")],
)
def test_ages_come_in_bands(age, band):
    assert age_band(age) == band


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "evaluation").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_of_formats_and_tasks_that_there_are(path):
    from cxr_triton.profile import load_profile

    data = build(Data, read_yaml(path, InvalidConfig), path.name)
    assert data.format in FORMATS
    profile = load_profile("chexone" if path.stem.startswith("chexone") else "nv-reason-cxr-3b")
    task = profile.tasks[data.task]
    assert set(data.variables) == set(task.placeholders)
    assert data.mode is None or data.mode in profile.modes
    assert set(data.labels) <= set(CHEXPERT)


def test_the_guide_has_the_mapping_and_the_keys():
    guide = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in guide.splitlines() if line[:1] == "|"]
    told = {row[0]: row[1:3] for row in rows if row[0] in (*CHEXPERT, "no place")}
    assert set(told) == {*CHEXPERT, "no place"}
    for column, mapped in enumerate((OF_NIH, OF_VINDR)):
        said = {theirs: ours for ours, cells in told.items() for theirs in cells[column].split(", ") if theirs}
        named = {theirs: ours or "no place" for theirs, ours in mapped.items()}
        assert {theirs: ours for theirs, ours in said.items() if theirs in mapped} == {
            theirs: ours for theirs, ours in named.items() if ours != "no place" or mapped is OF_NIH
        }
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row[0]) if len(row) == 2}
    assert {field.name for field in dataclasses.fields(Data)} - keys == {"labeller", "groups"}
