"""The report: its schema, its three files, a page that needs no network, curves, merged folds."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up import made_up_tables, made_up_trials

from dist_decoder.commands.report import run
from dist_decoder.config.evaluate import ReportConfig
from dist_decoder.errors import DataError, FormatError
from dist_decoder.eval.curves import loss_terms, read_metrics
from dist_decoder.eval.evaluation import Evaluation, read_evaluation, write_evaluation
from dist_decoder.eval.gallery import Gallery, Retrieved, contact_sheet, thumbnail
from dist_decoder.eval.summary import Settings


def _evaluation(tables, gallery=None, **changes):
    values = {
        "settings": Settings(0.99, 200, 0),
        "tables": tuple(tables),
        "gallery": gallery or Gallery((), {}),
        "fingerprints": {"shards": "abc"},
        "versions": {"numpy": "2"},
        "notes": ("a <note>",),
        "contaminated": False,
        "command": "dist-decoder evaluate x.yaml",
    }
    return Evaluation(**{**values, **changes})


def _tables():
    found = []
    for subject in ("subj01", "subj02"):
        person = made_up_trials(f"nsd/{subject}", bayes=0.95)
        for model, signal in (("joint", 0.9), ("ridge", 0.3), ("shuffled", 0.9)):
            found += made_up_tables(person, model, signal)
    new = made_up_trials("nsd/subj07", holdout=True, bayes=0.95)
    for stage, signal in (("final", 0.9), ("start", 0.4)):
        found += made_up_tables(new, "adapted", signal, stage=stage)
    return found + made_up_tables(new, "scratch", 0.2)


def _gallery():
    uids = [f"nsd:{image:03d}" for image in range(6)]
    pictures = {
        uid: thumbnail(np.full((8, 8, 3), 40 * k, np.uint8)) for k, uid in enumerate(uids[:5])
    }
    row = Retrieved("nsd", "subj01", "joint", "pooled", uids[0], tuple(uids[1:6]),
                    (0.9, 0.8, 0.7, 0.6, 0.5), 7, 23)  # fmt: skip
    right = replace(row, subject="subj02", retrieved=tuple(uids[:5]), rank=1)
    return Gallery((row, right), pictures)


@pytest.fixture
def report(tmp_path):
    write_evaluation(tmp_path / "evaluation", _evaluation(_tables(), _gallery()))
    runs = tmp_path / "joint"
    runs.mkdir()
    lines = [
        {"step": step, "loss/total": 3 / step, "loss/prior": 1 / step, "lr": 1e-3}
        for step in (1, 2, 3)
    ]
    (runs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ReportConfig(
        evaluation=(tmp_path / "evaluation",),
        output=tmp_path / "report",
        runs=(runs,),
        title="A <title> & more",
    )
    return run(config), tmp_path / "report"


def test_json_has_the_promised_schema(report):
    _, folder = report
    content = json.loads((folder / "report.json").read_text())
    assert {"results", "fingerprints", "versions", "command"} <= content.keys()
    fields = {
        "dataset", "subject", "model", "metric", "value", "ci_low", "ci_high", "chance", "bayes",
        "pool", "num_stimuli", "repetitions", "protocol", "output", "seed",
    }  # fmt: skip
    assert all(row.keys() >= fields for row in content["results"])
    assert {row["model"] for row in content["results"]} == {
        "joint", "ridge", "shuffled", "adapted", "scratch"
    }  # fmt: skip
    assert content["fingerprints"] == {"shards": "abc"}
    assert content["evaluation_command"] == "dist-decoder evaluate x.yaml"
    assert content["command"].startswith("dist-decoder")


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids, self.images, self.stack = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href", "xlink:href") if values.get(name)]
        self.ids += [values["id"]] if values.get("id") else []
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "img", "br", "use", "path", "rect"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "br", "use", "path", "rect"):
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "br", "use", "path", "rect"):
            assert self.stack.pop() == tag


def test_page_needs_no_network_and_is_well_formed(report):
    _, folder = report
    text = (folder / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.stack == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))


def test_page_shows_scores_gallery_curves_and_escapes_text(report):
    _, folder = report
    text = (folder / "report.html").read_text()
    assert "A &lt;title&gt; &amp; more" in text
    assert "a &lt;note&gt;" in text
    assert "<title> " not in text
    content = json.loads((folder / "report.json").read_text())
    joint = next(r for r in content["results"] if r["model"] == "joint" and r["subject"] == "all")
    assert f"{100 * joint['value']:.1f}<small>" in text
    assert "at step 0" in text
    page = _Page()
    page.feed(text)
    assert len(page.images) == 1 + 4 + 5  # seen; one of five retrieved has no picture; five
    assert text.count('<figure class="hit"') == 1
    assert '<div class="blank">nsd:005</div>' in text
    assert "rank 7 of 23" in text
    assert 'aria-label="losses of joint"' in text
    assert "var(--ink)" in text


def test_markdown_has_a_table_of_all_subjects(report):
    _, folder = report
    text = (folder / "report.md").read_text()
    assert text.count("| nsd | joint | brain_to_image_top1 | pooled |") == 1
    assert "## A new subject" in text
    assert "| nsd | joint - ridge |" in text


def test_same_input_same_bytes(report, tmp_path):
    _, folder = report
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = ReportConfig(
        evaluation=(tmp_path / "evaluation",), output=tmp_path / "again",
        runs=(tmp_path / "joint",), title="A <title> & more",
    )  # fmt: skip
    run(config)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_min_top1_fails_weak_models_only(tmp_path):
    write_evaluation(tmp_path / "evaluation", _evaluation(_tables()))
    values = {"evaluation": (tmp_path / "evaluation",), "output": tmp_path / "report"}
    assert run(ReportConfig(**values, min_top1=0.2))["failures"] == []
    failures = run(ReportConfig(**values, min_top1=0.99))["failures"]
    assert len(failures) == 2
    assert "nsd: joint pooled brain_to_image_top1" in failures[0]


def test_folds_become_one_row_of_all_their_queries(tmp_path):
    means = []
    for run_number in range(3):
        person = made_up_trials("miyawaki/S2", num_images=5, repetitions=2, bayes=None,
                                trials=f"run{run_number}:")  # fmt: skip
        tables = made_up_tables(person, "joint", 0.4 + 0.3 * run_number)
        means.append(tables[0].values_Q.mean())
        write_evaluation(tmp_path / str(run_number), _evaluation(tables))
    folders = tuple(tmp_path / str(number) for number in range(3))
    run(ReportConfig(evaluation=folders, output=tmp_path / "report"))
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = [r for r in content["results"] if r["subject"] == "S2" and r["output"] == "pooled"]
    forward = next(row for row in rows if row["metric"] == "brain_to_image_top1")
    assert forward["value"] == pytest.approx(np.mean(means))
    assert forward["num_queries"] == 30
    assert forward["num_stimuli"] == forward["pool"] == 5
    assert len(rows) == 2


def test_leakage_is_the_first_thing_on_the_page(tmp_path):
    tables = made_up_tables(made_up_trials("nsd/subj01", bayes=0.2), "joint", 5.0)
    write_evaluation(tmp_path / "evaluation", _evaluation(tables))
    result = run(ReportConfig(evaluation=(tmp_path / "evaluation",), output=tmp_path / "report"))
    assert "suspected leakage" in result["warnings"][0]
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.index("suspected leakage") < text.index('id="scores"')


def test_incomplete_and_damaged_evaluations_are_named(tmp_path):
    with pytest.raises(DataError, match=r"evaluation\.json is missing.*dist-decoder evaluate"):
        read_evaluation(tmp_path)
    write_evaluation(tmp_path, _evaluation(_tables()))
    (tmp_path / "gallery.npz").write_bytes(b"no archive")
    with pytest.raises(FormatError, match=r"gallery\.npz is damaged"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(FormatError, match="damaged"):
        read_evaluation(tmp_path)


def test_an_interrupted_evaluation_does_not_look_whole(tmp_path, monkeypatch):
    write_evaluation(tmp_path, _evaluation(_tables()))
    monkeypatch.setattr(
        "dist_decoder.eval.evaluation.pack_gallery", lambda _: (_ for _ in ()).throw(OSError())
    )
    with pytest.raises(OSError):
        write_evaluation(tmp_path, _evaluation(_tables()[:4]))
    with pytest.raises(DataError, match="no complete evaluation"):
        read_evaluation(tmp_path)


def test_metrics_of_a_resumed_and_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss/total": 4.0, "loss/prior": 1.0, "note": "x"}\n'
        '{"step": 2, "loss/total": 9.0}\n'
        '{"step": 2, "loss/total": 3.0, "samples_per_s": 5}\n'
        '{"step": 3, "loss/to'
    )
    terms = loss_terms(read_metrics(path))
    assert list(terms) == ["total", "prior"]
    assert terms["total"].tolist() == [[1, 4], [2, 3]]
    path.write_text('broken\n{"step": 1, "loss/total": 4.0}\n')
    with pytest.raises(FormatError, match="line 1"):
        read_metrics(path)


def test_run_without_metrics_is_named(tmp_path):
    write_evaluation(tmp_path / "evaluation", _evaluation(_tables()))
    (tmp_path / "empty").mkdir()
    config = ReportConfig(
        evaluation=(tmp_path / "evaluation",), output=tmp_path / "r", runs=(tmp_path / "empty",)
    )
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        run(config)


def test_small_pictures_are_enlarged_without_smoothing():
    pattern = np.zeros((10, 10, 3), np.uint8)
    pattern[::2] = 255
    assert set(np.unique(thumbnail(pattern))) == {0, 255}


def test_contact_sheet_keeps_a_place_for_missing_pictures():
    tile = np.zeros((112, 112, 3), np.uint8)
    sheet = contact_sheet([[tile, None], [None, tile]], ["a", "b"], first_is_seen=False)
    assert sheet[60, 150 + 60, 0] == 0
    assert sheet[60, 150 + 118 + 60, 0] == 220
    assert sheet[60 + 118, 150 + 60, 0] == 220


def test_recipes_and_seeds_stand_side_by_side(tmp_path):
    found = []
    signals = {("lora", 0): 0.3, ("lora", 1): 0.5, ("full", 0): 0.7, ("full", 1): 0.9}
    for subject in ("subj05", "subj07"):
        new = made_up_trials(f"nsd/{subject}", holdout=True, bayes=0.95)
        for (variant, seed), signal in signals.items():
            for table in made_up_tables(new, "adapted", signal):
                found.append(replace(table, key=replace(table.key, variant=variant, seed=seed)))
    half = len(found) // 2
    for name, tables in (("one", found[:half]), ("two", found[half:])):
        write_evaluation(tmp_path / name, _evaluation(tables))
    run(ReportConfig(evaluation=(tmp_path / "one", tmp_path / "two"), output=tmp_path / "report"))
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    single = [row for row in rows if row["subject"] != "all" and row["output"] == "pooled"]
    top1 = {
        (row["subject"], row["variant"], row["seed"]): row["value"]
        for row in single
        if row["metric"] == "brain_to_image_top1"
    }
    assert len(top1) == 8
    assert top1["subj05", "lora", 0] < top1["subj05", "full", 1]
    page = (tmp_path / "report" / "report.html").read_text()
    for subject in ("subj05", "subj07"):
        for variant, seed in signals:
            assert f"<small>{subject}, {variant}, seed {seed}</small>" in page
    text = (tmp_path / "report" / "report.md").read_text()
    assert "adapted lora" in text
    assert "adapted full" in text
