"""An evaluation against an endpoint whose answers the test writes: rows, errors, what ends a run, and going on."""

import json
import subprocess
import sys
import time
from collections import Counter

import pytest
from click.testing import CliRunner
from fake_server import FakeServer, failure, response

from cxr_triton.cli import main
from cxr_triton.errors import InvalidRequest, ServerMismatch, Unavailable
from cxr_triton.evaluate import rows
from cxr_triton.evaluate.config import Data
from cxr_triton.evaluate.journal import work_folder
from cxr_triton.evaluate.run import Server, opened
from cxr_triton.identity import sha256
from cxr_triton.reading import Reading, parse

LABELS = ("Edema", "No Finding", "Pneumonia")
PICTURE = b"\x89PNG picture "
MODEL = {"profile": "test", "bundle": "b1", "labels": list(LABELS)}


def reading(
    text, sent, answer="labels", finish_reason="stop", model=MODEL, sizes=((100, 200),), grammar="plain", scores=None
):
    parsed = parse(text, grammar=grammar, answer=answer, labels=LABELS, finish_reason=finish_reason, image_sizes=sizes)
    return Reading.of(
        parsed,
        task=None,
        prompt="Find.",
        model=model,
        images=tuple(
            {"rows": rows_, "columns": columns, "flags": [], "identity": {"file_sha256": sha256(image)}}
            for image, (rows_, columns) in zip(sent, sizes, strict=False)
        ),
        usage={"prompt_tokens": 7, "completion_tokens": 3},
        timings_ms={"decode": 2.5, "total": 5.0},
        notice="A test double answered.",
        scores=scores or {},
    ).to_json()


class Double(FakeServer):
    """Answers a request with what `say` makes of its picture and REQUEST, and counts how often each was asked."""

    def __init__(self, say, **options):
        self.say, self.options, self.seen = say, options, Counter()
        super().__init__(self.respond)

    def respond(self, request, context):
        tensors = dict(zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True))
        images, at = [], 0
        while at < len(tensors["IMAGES"]):
            size = int.from_bytes(tensors["IMAGES"][at : at + 4], "little")
            images.append(tensors["IMAGES"][at + 4 : at + 4 + size])
            at += 4 + size
        asked = json.loads(tensors["REQUEST"][4:])
        key = images[0].removeprefix(PICTURE).decode() if images else ""
        self.seen[key] += 1
        said = self.say(key, asked)
        if isinstance(said, str) and said.startswith("["):
            yield failure(said)
            return
        text, more = said if isinstance(said, tuple) else (said, {})
        yield response("", reading(text, images, **{**self.options, **more}), final=True)


def write_table(folder, **answers):
    """A table of studies, each with a picture of its own name, and their labels."""
    lines = ["study,image,labels", *(f"{name},{name}.png,{labels}" for name, labels in answers.items())]
    folder.mkdir(exist_ok=True)
    (folder / "own.csv").write_text("\n".join(lines))
    for name in answers:
        (folder / f"{name}.png").write_bytes(PICTURE + name.encode())
    return folder / "own.csv"


def run(path, out, server, restart=False, concurrency=3, **keys):
    data = Data(
        path=str(path), format="table", **{"labels": LABELS if keys.get("kind", "labels") == "labels" else ()} | keys
    )
    with opened(data, out, restart=restart) as evaluation:
        if not evaluation.is_complete:
            evaluation.run(Server(url=server.url, concurrency=concurrency, timeout_s=60.0))
    result = rows.read(out)
    return result.header, {row.study: row for row in result}


def test_rows_of_answers_flags_and_errors(tmp_path):
    said = {
        "good": "Edema",
        "none": "No Finding",
        "cut": ("Edema", {"finish_reason": "length"}),
        "drift": "Edema, Pleural_Thickening",
        "empty": "",
        "refused": "[NOT_A_CHEST] a knee; send a chest",
    }
    table = write_table(tmp_path / "d", **dict.fromkeys([*said, "gone"], "Edema;Pneumonia"))
    (tmp_path / "d" / "gone.png").unlink()
    with Double(lambda key, asked: said[key]) as server:
        header, found = run(table, tmp_path / "result.jsonl", server)
    assert [row.number for row in found.values()] == list(range(7)) and header.data["studies"] == 7
    assert {name: (row.status, row.code) for name, row in found.items()} == {
        "good": ("ok", ""),
        "none": ("ok", ""),
        "cut": ("flagged", "truncated"),
        "drift": ("flagged", "out_of_vocabulary"),
        "empty": ("flagged", "malformed"),
        "refused": ("error", "NOT_A_CHEST"),
        "gone": ("error", "MISSING_FILE"),
    }
    assert found["good"].truth.labels == {"Edema": 1, "No Finding": 0, "Pneumonia": 1}
    assert found["good"].answer.labels == {"Edema": 1, "No Finding": 0, "Pneumonia": 0}
    assert found["drift"].answer.unknown_labels == ("Pleural_Thickening",)
    assert found["empty"].answer.labels is None and found["refused"].answer is None
    assert found["refused"].said == "a knee; send a chest" and found["gone"].said.endswith("No such file or directory")
    assert found["good"].completion_tokens == 3 and found["good"].times["decode"] == 2.5
    assert header.model == MODEL and header.notice == "A test double answered."
    assert header.counted == {"missing file": 1} and header.request["sent"] == "Find."
    assert header.versions["fake"] == "0.0" and header.times["runs"] == 1
    assert not work_folder(tmp_path / "result.jsonl").exists()


def test_a_queue_that_is_full_is_waited_for(tmp_path):
    table = write_table(tmp_path / "d", a="Edema", b="Edema")
    with Double(lambda key, asked: "[QUEUE_FULL] later" if server.seen[key] < 3 else "Edema") as server:
        _, found = run(table, tmp_path / "result.jsonl", server)
    assert [row.status for row in found.values()] == ["ok", "ok"] and set(server.seen.values()) == {3}


def test_a_server_that_goes_ends_the_run_and_the_next_one_goes_on(tmp_path):
    table = write_table(tmp_path / "d", **dict.fromkeys("abcdefgh", "Edema"))
    out = tmp_path / "result.jsonl"

    def say(key, asked):
        return "[UNAVAILABLE] stopping" if len(server.seen) > 4 else "Edema"

    with Double(say) as server, pytest.raises(Unavailable):
        run(table, out, server, concurrency=1)
    assert not out.exists()
    with Double(lambda key, asked: "Edema") as second:
        header, found = run(table, out, second)
    assert len(found) == 8 and header.times["runs"] == 2
    assert sum(second.seen.values()) == 4  # what was there was not asked again
    with Double(lambda key, asked: "Edema") as third:
        run(table, out, third)
    assert not third.seen
    with Double(lambda key, asked: "Pneumonia") as fourth:
        _, found = run(table, out, fourth, restart=True)
    assert sum(fourth.seen.values()) == 8 and found["a"].answer.labels["Pneumonia"] == 1


def test_a_run_goes_on_only_with_the_same_data_questions_and_model(tmp_path):
    table, out = write_table(tmp_path / "d", **dict.fromkeys("abcd", "Edema")), tmp_path / "result.jsonl"
    answers = iter(["Edema", "Edema"])
    with Double(lambda key, asked: next(answers, "[UNAVAILABLE] stopping")) as server, pytest.raises(Unavailable):
        run(table, out, server, concurrency=1)
    with Double(lambda key, asked: "Edema", model=MODEL | {"bundle": "b2"}) as other:
        with pytest.raises(ServerMismatch, match=r"another model \(bundle\)"):
            run(table, out, other)
        with pytest.raises(InvalidRequest, match=r"other request\.task"):
            run(table, out, other, task="examine")
        write_table(tmp_path / "d", **dict.fromkeys("abcd", "Pneumonia"))
        with pytest.raises(InvalidRequest, match=r"other data\.digest"):
            run(table, out, other)
    write_table(tmp_path / "d", **dict.fromkeys("abcd", "Edema"))
    with Double(lambda key, asked: "Edema") as server:
        run(table, out, server)
        with pytest.raises(InvalidRequest, match=r"is a result with other seed"):
            run(table, out, server, seed=1)
    assert len(rows.read(out)) == 4


def test_two_at_once_do_not_write_one_result(tmp_path):
    data = Data(path=str(write_table(tmp_path, **{"1": "Edema"})), format="table")
    with opened(data, tmp_path / "result.jsonl"):
        with pytest.raises(InvalidRequest, match=r"result\.jsonl: another evaluation writes it"):
            with opened(data, tmp_path / "result.jsonl", restart=True):
                pass
        with opened(data, tmp_path / "other.jsonl"):
            pass
    with opened(data, tmp_path / "result.jsonl"):
        pass


def test_a_row_that_a_crash_cut_off_is_asked_again(tmp_path):
    table, out = write_table(tmp_path / "d", **dict.fromkeys("abcd", "Edema")), tmp_path / "result.jsonl"
    answers = iter(["Edema", "Edema"])
    with Double(lambda key, asked: next(answers, "[UNAVAILABLE] stopping")) as server, pytest.raises(Unavailable):
        run(table, out, server, concurrency=1)
    whole = next(iter(server.seen))  # which file has been read first is chance
    journal = work_folder(out) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    with Double(lambda key, asked: "Edema") as server:
        _, found = run(table, out, server)
    assert set(server.seen) == set("abcd") - {whole} and list(found) == list("abcd")


def test_closed_questions_by_letter_and_by_a_free_prompt(tmp_path):
    table = write_table(tmp_path / "d", a="")
    table.write_text(
        "study,image,question,options,answer\na,a.png,Which?,left|right,right\nb,a.png,Which?,left|right,up\n"
    )
    with Double(lambda key, asked: ("(B)", {"answer": "option"})) as server:
        _, found = run(table, tmp_path / "one.jsonl", server, kind="options")
        assert server.asked["task"] == "vqa" and server.asked["identifiers"] == "hashed"
        assert server.asked["variables"] == {"question": "Which?", "options": ["left", "right"]}
    assert found["a"].truth.options == found["a"].answer.options == ("B",)
    assert (found["b"].status, found["b"].code) == ("error", "BAD_TRUTH")
    with Double(lambda key, asked: ("B", {"answer": "text"})) as server:
        prompt = "{question}\n{options}\nin \\boxed{}"
        _, found = run(table, tmp_path / "two.jsonl", server, kind="options", prompt=prompt)
        assert server.asked["prompt"] == "Which?\n(A) left\n(B) right\nin \\boxed{}" and "variables" not in server.asked
    assert found["a"].answer.options == ("B",)


def test_labels_by_one_question_each_and_as_options(tmp_path):
    table = write_table(tmp_path / "d", a="Edema")
    yes = {"edema": "Yes", "pneumonia": "No", "no finding": "perhaps"}
    with Double(lambda key, asked: (yes[asked["variables"]["disease"]], {"answer": "option"})) as server:
        _, found = run(table, tmp_path / "one.jsonl", server, ask="each")
    assert found["a"].answer.labels == {"Edema": 1, "No Finding": None, "Pneumonia": 0}
    assert found["a"].code == "malformed" and found["a"].completion_tokens == 9
    with Double(lambda key, asked: ("A, C", {"answer": "option"})) as server:
        _, found = run(table, tmp_path / "two.jsonl", server, ask="options")
        assert server.asked["variables"] == {"options": list(LABELS)}
    assert found["a"].answer.labels == {"Edema": 1, "No Finding": 0, "Pneumonia": 1}


def test_scores_are_asked_for_and_stand_in_the_rows_as_shares(tmp_path):
    table = write_table(tmp_path / "d", a="Edema", b="Pneumonia")
    scores = {"Edema": 2.0, "No Finding": -800.0, "Pneumonia": -0.5, "Fracture": 3.0}
    with Double(lambda key, asked: ("Edema", {"scores": scores if key == "a" else {}})) as server:
        header, found = run(table, tmp_path / "set.jsonl", server, scores=True)
        assert server.asked["scores"] is True and header.request["scores"] is True
    assert found["a"].answer.scores == pytest.approx({"Edema": 0.880797, "No Finding": 0.0, "Pneumonia": 0.377541})
    assert found["b"].answer.scores is None
    letters = {"A": 1.0, "B": -1.0, "C": 0.0}
    with Double(lambda key, asked: ("A", {"answer": "option", "scores": letters})) as server:
        _, found = run(table, tmp_path / "options.jsonl", server, ask="options", scores=True)
    assert found["a"].answer.scores == pytest.approx({"Edema": 0.7310586, "No Finding": 0.2689414, "Pneumonia": 0.5})
    with Double(lambda key, asked: ("No", {"answer": "option", "scores": {"Yes": -1.0, "No": 1.0}})) as server:
        _, found = run(table, tmp_path / "each.jsonl", server, ask="each", scores=True)
    assert found["a"].answer.scores == pytest.approx(dict.fromkeys(LABELS, 0.268941), rel=1e-5)
    with Double(lambda key, asked: "Edema") as server:
        header, found = run(table, tmp_path / "none.jsonl", server)
        assert "scores" not in server.asked and "scores" not in header.request
    assert found["a"].answer.scores is None


def test_boxes_of_both_sides_are_in_pixels(tmp_path):
    table = write_table(tmp_path / "d", a="")
    table.write_text(
        'image,phrase,boxes\na.png,it,"[{""label"": ""it"", ""x1"": 20, ""y1"": 10, ""x2"": 40, ""y2"": 50}]"\n'
    )
    with Double(lambda key, asked: ("<|box|>(10,10),(20,50)<|/box|>", {"answer": "boxes"})) as server:
        _, found = run(table, tmp_path / "one.jsonl", server, kind="boxes")
        assert server.asked["variables"] == {"phrase": "it"}
    (row,) = found.values()
    assert row.truth.boxes[0].corners == row.answer.boxes[0].corners == (20.0, 10.0, 40.0, 50.0)
    assert row.answer.boxes[0].unit == "pixels"


def test_the_command_says_what_was_met_and_ends_as_it_went(tmp_path):
    table, out = write_table(tmp_path / "d", a="Edema", b="Oedema"), tmp_path / "result.jsonl"
    command = ["evaluate", str(table), "--format", "table", "-o", str(out), "--json", "-", "--concurrency", "1"]
    with Double(lambda key, asked: "Edema" if key == "a" else "[NO_PIXELS] none") as server:
        done = CliRunner().invoke(main, [*command, "--url", server.url])
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout)["rows"] == {"ok": 1, "error": 1, "NO_PIXELS": 1}
    assert "1 x label without a place: Oedema" in done.stderr and "label Oedema: without a place" in done.stderr
    assert "A test double answered." in done.stderr
    with Double(lambda key, asked: "[NO_PIXELS] none") as server:
        done = CliRunner().invoke(main, [*command, "--url", server.url, "--restart"])
    assert done.exit_code == 1
    wrong = CliRunner().invoke(main, command)
    assert wrong.exit_code == 2 and "give REPOSITORY, --url or --archive" in wrong.stderr


@pytest.mark.slow
def test_a_server_that_is_not_there_is_worth_trying_again(tmp_path):
    table = write_table(tmp_path / "d", a="Edema")
    command = ["evaluate", str(table), "--format", "table", "-o", str(tmp_path / "out"), "--url", "127.0.0.1:1"]
    gone = CliRunner().invoke(main, command)
    assert gone.exit_code == 75 and "UNAVAILABLE" in gone.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_again_and_again_the_result_is_the_same(tmp_path):
    names = [f"s{n:02}" for n in range(40)]
    table, out = write_table(tmp_path / "d", **dict.fromkeys(names, "Edema")), tmp_path / "result.jsonl"

    def say(key, asked):
        time.sleep(0.02)
        return "Edema" if int(key[1:]) % 3 else "[INVALID_IMAGE] damaged"

    with Double(say) as server:
        arguments = ["evaluate", str(table), "--format", "table", "--url", server.url, "--concurrency", "2"]
        code = "from cxr_triton.cli import main; main()"
        kills = 0
        while not out.exists():
            process = subprocess.Popen([sys.executable, "-c", code, *arguments, "-o", str(out)], stderr=subprocess.PIPE)
            before = len(server.seen)
            if kills < 3:
                while len(server.seen) < before + 7 and process.poll() is None:
                    time.sleep(0.005)
                process.kill()
                kills += 1
            process.communicate()
        run_at_once = tmp_path / "once.jsonl"
        subprocess.run(
            [sys.executable, "-c", code, *arguments, "-o", str(run_at_once)], capture_output=True, check=False
        )
    assert kills == 3 and rows.read(out).header.times["runs"] == 4
    assert rows.timeless_digest(out) == rows.timeless_digest(run_at_once)
    assert max(server.seen.values()) <= 1 + 1 + kills
