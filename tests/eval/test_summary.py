"""Rows, aggregates, paired comparisons and warnings."""

import numpy as np
import pytest
from made_up import made_up_tables, made_up_trials

from dist_decoder.eval.queries import merge_tables, pack_tables, unpack_tables
from dist_decoder.eval.summary import Settings, summarise

SETTINGS = Settings(confidence=0.99, resamples=400, seed=0)
FIELDS = {
    "dataset", "subject", "model", "metric", "value", "ci_low", "ci_high", "chance", "bayes",
    "pool", "num_stimuli", "repetitions", "protocol", "output", "seed",
}  # fmt: skip


def _find(rows, **wanted):
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


FORWARD = {"metric": "brain_to_image_top1", "output": "pooled"}


@pytest.fixture(scope="module")
def summary():
    tables = []
    for subject, signal in (("subj01", 1.2), ("subj02", 0.6)):
        person = made_up_trials(f"nsd/{subject}", bayes=0.95)
        tables += made_up_tables(person, "joint", signal)
        tables += made_up_tables(person, "single", signal - 0.1, seed=0)
        tables += made_up_tables(person, "ridge", 0.2, seed=4)
        tables += made_up_tables(person, "shuffled", signal, seed=4)
    new = made_up_trials("nsd/subj07", bayes=0.95, holdout=True)
    tables += made_up_tables(new, "adapted", 1.2)
    tables += made_up_tables(new, "adapted", 0.5, stage="start")
    tables += made_up_tables(new, "scratch", 0.3, seed=9)
    tables += made_up_tables(new, "ridge", 0.2, seed=4)
    return summarise(tables, SETTINGS)


def test_rows_have_the_promised_fields_and_an_interval(summary):
    for row in summary.results:
        assert row.keys() >= FIELDS
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["ci_high"] > row["ci_low"]
        assert row["repetitions"] == 1
        assert row["pool"] == row["num_stimuli"] == 23
        assert "/v1" in row["protocol"]


def test_all_pools_the_queries_and_keeps_an_image_one_cluster(summary):
    rows = [_find(summary.results, model="joint", subject=s, **FORWARD)
            for s in ("subj01", "subj02", "all")]  # fmt: skip
    assert rows[2]["value"] == pytest.approx((rows[0]["value"] + rows[1]["value"]) / 2)
    assert rows[2]["num_queries"] == 2 * 69
    assert rows[2]["num_stimuli"] == 23
    assert rows[2]["bayes"] == pytest.approx(0.95)


def test_held_out_subject_is_not_pooled_with_the_others(summary):
    rows = {s: _find(summary.results, model="ridge", subject=s, **FORWARD)
            for s in ("subj01", "subj02", "subj07", "all")}  # fmt: skip
    assert rows["all"]["value"] == pytest.approx(
        (rows["subj01"]["value"] + rows["subj02"]["value"]) / 2
    )
    adapted = _find(summary.results, model="adapted", subject="all", **FORWARD)
    assert adapted["num_queries"] == 69
    assert adapted["holdout"]


def test_step_zero_stands_beside_the_adapted_score(summary):
    row = _find(summary.results, model="adapted", subject="subj07", **FORWARD)
    assert row["step0"] < row["value"]
    assert row["step0_ci_low"] <= row["step0"] <= row["step0_ci_high"]
    assert not any("step0" in row for row in summary.results if row["model"] != "adapted")
    gain = _find(summary.comparisons, a="adapted", b="step 0", subject="all", **FORWARD)
    assert gain["difference"] == pytest.approx(row["value"] - row["step0"])


def test_comparisons_are_differences_over_the_same_queries(summary):
    for a, b, subject in (
        ("joint", "ridge", "all"),
        ("joint", "single", "subj02"),
        ("adapted", "scratch", "subj07"),
        ("adapted", "ridge", "all"),
        ("single", "ridge", "all"),
    ):
        row = _find(summary.comparisons, a=a, b=b, subject=subject, **FORWARD)
        values = [
            _find(
                summary.results,
                model=m,
                subject="subj07" if subject == "all" and a == "adapted" else subject,
                **FORWARD,
            )["value"]
            for m in (a, b)
        ]
        assert row["difference"] == pytest.approx(values[0] - values[1])
        assert row["ci_low"] < row["difference"] < row["ci_high"]
        assert row["paired"]
    clear = _find(summary.comparisons, a="joint", b="ridge", subject="all", **FORWARD)
    assert clear["ci_low"] > 0


def test_distance_to_bayes_is_stated(summary):
    row = _find(summary.comparisons, a="joint", b="bayes", subject="all", **FORWARD)
    value = _find(summary.results, model="joint", subject="all", **FORWARD)["value"]
    assert row["difference"] == pytest.approx(value - 0.95)
    assert not row["paired"]
    assert not [row for row in summary.comparisons
                if row["b"] == "bayes" and row["metric"] == "image_to_brain_top1"]  # fmt: skip


def test_honest_results_raise_no_warning(summary):
    assert summary.warnings == []


def test_score_above_bayes_is_suspected_leakage():
    found = summarise(
        made_up_tables(made_up_trials("nsd/subj01", bayes=0.3), "joint", 9.0), SETTINGS
    )
    # One sentence for both outputs each, not another one for every subject.
    assert len(found.warnings) == 2
    assert "suspected leakage: nsd all, joint pooled brain_to_image_top1" in found.warnings[0]
    row = _find(found.results, model="joint", subject="all", **FORWARD)
    assert row["above_bayes"]


def test_control_off_chance_is_a_warning():
    tables = made_up_tables(made_up_trials("nsd/subj01"), "shuffled", 1.0)
    broken = tables[0]
    values = np.ones_like(broken.values_Q)
    found = summarise([type(broken)(**{**vars(broken), "values_Q": values})], SETTINGS)
    assert found.warnings[0].startswith("control failed: nsd all")


def test_order_of_tables_does_not_matter(summary):
    tables = made_up_tables(made_up_trials("nsd/subj01"), "joint", 0.5)
    assert summarise(tables, SETTINGS) == summarise(tables[::-1], SETTINGS)


def test_seeds_stay_apart_and_are_paired_with_their_own():
    person = made_up_trials("nsd/subj01")
    tables = []
    for seed in (1, 2):
        tables += made_up_tables(person, "joint", 1.0, seed=seed)
        tables += made_up_tables(person, "single", 0.5, seed=seed)
    found = summarise(tables, SETTINGS)
    for seed in (1, 2):
        row = _find(found.comparisons, a="joint", b="single", subject="all", seed=seed, **FORWARD)
        pair = [_find(found.results, model=m, subject="all", seed=seed, **FORWARD)["value"]
                for m in ("joint", "single")]  # fmt: skip
        assert row["difference"] == pytest.approx(pair[0] - pair[1])


def test_averaged_trials_are_told_and_pooled_by_their_share():
    tables = []
    for subject, num_images, averaged in (("subj01", 23, 3.0), ("subj02", 46, 1.5)):
        person = made_up_trials(f"nsd/{subject}", num_images, repetitions=1, averaged=averaged)
        tables += made_up_tables(person, "joint", 1.0)
    tables = unpack_tables(pack_tables(tables), "test")
    rows = {row["subject"]: row for row in summarise(tables, SETTINGS).results
            if all(row[name] == value for name, value in FORWARD.items())}  # fmt: skip
    assert [rows[s]["repetitions"] for s in ("subj01", "subj02", "all")] == [3, 1.5, 2]
    fold = made_up_trials("nsd/subj01", 23, repetitions=1, averaged=1.0, trials="other")
    (merged,) = [
        table
        for table in merge_tables([tables, made_up_tables(fold, "joint", 1.0)])
        if table.key.subject == "subj01" and table.key.output == "pooled"
        and table.key.metric == FORWARD["metric"]
    ]  # fmt: skip
    assert merged.repetitions == 2
