"""``evaluate`` from shards and checkpoints to rows, queries and gallery."""

import json

import numpy as np
import pytest
from decoded_world import HOLDOUT, IMAGES, MODEL, uid, write_run, write_world

from dist_decoder.commands.evaluate import render, run
from dist_decoder.config.evaluate import EvaluateConfig
from dist_decoder.errors import CheckpointError, ConfigError, DataError, FormatError
from dist_decoder.eval.evaluation import read_evaluation

JOINT = ("alpha/s1", "alpha/s2", "beta/s1")
FORWARD = {"metric": "brain_to_image_top1", "output": "pooled"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = write_world(folder / "shards")
    write_run(folder / "joint", shards, JOINT, seed=3)
    write_run(folder / "single", shards, ("alpha/s1", "alpha/s2"), blur=0.05)
    write_run(folder / "adapted", shards, (HOLDOUT,), config={"sessions": 1})
    write_run(folder / "adapted" / "start", shards, (HOLDOUT,), blur=0.2, config={"sessions": 1})
    write_run(folder / "scratch", shards, (HOLDOUT,), blur=0.3, config={"sessions": 1})
    bayes = {"brain_to_image_top1": {"value": 0.97, "se": 0.01}}
    names = ("alpha/s1", "alpha/s2", HOLDOUT)
    truth = {name: {"pool": IMAGES["test"], "bayes": bayes} for name in names}
    truth["beta/s1"] = {**truth["alpha/s1"], "pool": 99}
    header = {"format": "dist-decoder-ground-truth", "version": 1, "subjects": truth}
    (folder / "ground_truth.json").write_text(json.dumps(header))
    return folder


def _config(world, output, **changes):
    models = [
        {"model": name, "run": world / name} for name in ("joint", "single", "adapted", "scratch")
    ]
    values = {
        "shards": str(world / "shards"),
        "output": output,
        "models": models,
        "ground_truth": world / "ground_truth.json",
        "bootstrap": 200,
        "gallery_images": 3,
        "gallery_top": 4,
        "device": "cpu",
    }
    return EvaluateConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def content(world, tmp_path_factory):
    return run(_config(world, tmp_path_factory.mktemp("evaluation")))


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    run(_config(world, output))
    return read_evaluation(output)


def _find(rows, **wanted):
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


def test_every_model_dataset_and_output_has_its_rows(content):
    found = {(r["dataset"], r["subject"], r["model"], r["output"]) for r in content["results"]}
    for dataset, subjects in (("alpha", ("s1", "s2", "all")), ("beta", ("s1", "all"))):
        for subject in subjects:
            for model in ("joint", "ridge", "shuffled"):
                outputs = (
                    ("pooled", "tokens") if model == "ridge" else ("pooled", "tokens", "prior")
                )
                assert {(dataset, subject, model, output) for output in outputs} <= found
    assert ("alpha", "s2", "single", "pooled") in found
    assert ("beta", "s1", "single", "pooled") not in found
    for model in ("adapted", "scratch", "ridge"):
        assert ("alpha", "new", model, "pooled") in found
    assert ("alpha", "new", "shuffled", "pooled") not in found


def test_decoders_of_a_linear_world_are_good_and_the_control_is_at_chance(content):
    rows = content["results"]
    for dataset in ("alpha", "beta"):
        joint = _find(rows, dataset=dataset, subject="all", model="joint", **FORWARD)
        ridge = _find(rows, dataset=dataset, subject="all", model="ridge", **FORWARD)
        control = _find(rows, dataset=dataset, subject="all", model="shuffled", **FORWARD)
        assert 0.4 < joint["value"] < 0.97
        assert 0.4 < ridge["value"] < 0.97
        assert joint["pool"] == joint["num_stimuli"] == IMAGES["test"]
        assert control["ci_low"] <= control["chance"] <= control["ci_high"]
    assert joint["seed"] == 3
    assert not content["warnings"]


def test_score_is_that_of_a_plain_loop_over_the_decoder(world, content):
    """An oracle apart from the evaluation code: numpy on the predictions of each trial."""
    from dist_decoder.data.rows import read_rows
    from dist_decoder.predict import Predictor

    rows = read_rows(str(world / "shards"), "test", subjects=("alpha/s2",))["alpha/s2"]
    predicted = Predictor(world / "joint", "cpu").predict("alpha/s2", rows.voxels_NV, False, 0)
    hits = []
    for row, image in enumerate(rows.image_N):
        cosines = [
            predicted.pooled_NE[row] @ target / np.linalg.norm(target)
            for target in rows.standard_pooled_ME
        ]
        hits.append(int(np.argmax(cosines)) == image)
    row = _find(content["results"], dataset="alpha", subject="s2", model="joint", **FORWARD)
    assert row["value"] == pytest.approx(np.mean(hits))


def test_category_rows_exist_where_there_are_categories(content):
    rows = [row for row in content["results"] if row["metric"] == "category_top1"]
    assert {row["dataset"] for row in rows} == {"alpha"}
    joint = _find(rows, subject="all", model="joint", output="pooled", dataset="alpha")
    assert joint["chance"] == pytest.approx(5 / 14)  # c0 and c1 have 5 of 14 test images
    assert joint["pool"] == 3


def test_adapted_carries_the_score_of_its_start(content):
    row = _find(content["results"], subject="new", model="adapted", dataset="alpha", **FORWARD)
    assert row["step0"] < row["value"]
    gain = _find(content["comparisons"], a="adapted", b="step 0", subject="new", **FORWARD)
    assert gain["difference"] == pytest.approx(row["value"] - row["step0"])


def test_recipes_of_one_subject_are_told_apart(world, tmp_path):
    """Two adapted models with the same seed: without a variant their scores have one name."""
    write_run(tmp_path / "other", world / "shards", (HOLDOUT,), blur=0.3, config={"sessions": 1})
    runs = {"plain": world / "adapted", "blurred": tmp_path / "other"}
    models = [{"model": "adapted", "run": place, "variant": name} for name, place in runs.items()]
    content = run(_config(world, tmp_path / "out", models=models))
    plain, blurred = (
        _find(content["results"], subject="new", model="adapted", variant=name, **FORWARD)
        for name in runs
    )
    assert plain["value"] != blurred["value"]
    assert plain["num_queries"] == blurred["num_queries"]
    assert {"adapted plain adapted", "adapted blurred other"} <= content["fingerprints"].keys()
    assert "adapted blurred" in render(content)
    unnamed = [{"model": "adapted", "run": place} for place in runs.values()]
    with pytest.raises(ConfigError, match="give them different `variant`s"):
        run(_config(world, tmp_path / "out", models=unnamed))


def test_ridge_of_a_new_subject_uses_the_sessions_it_may(world, evaluated, tmp_path):
    """The adapted models say 1 session: with 2 the ridge has twice the rows."""
    for name in ("adapted", "scratch"):
        write_run(tmp_path / name, world / "shards", (HOLDOUT,), config={"sessions": 2})
    models = [{"model": name, "run": tmp_path / name} for name in ("adapted", "scratch")]
    run(_config(world, tmp_path / "out", models=models))

    def ridge(evaluation):
        return next(
            t.values_Q
            for t in evaluation.tables
            if (t.key.model, t.key.subject, t.key.output) == ("ridge", "new", "pooled")
        )

    one, two = ridge(evaluated), ridge(read_evaluation(tmp_path / "out"))
    assert (one != two).any()


def test_models_of_a_subject_with_other_sessions_are_refused(world, tmp_path):
    write_run(tmp_path / "scratch", world / "shards", (HOLDOUT,), config={"sessions": 2})
    models = [
        {"model": "adapted", "run": world / "adapted"},
        {"model": "scratch", "run": tmp_path / "scratch"},
    ]
    with pytest.raises(ConfigError, match="different numbers of sessions"):
        run(_config(world, tmp_path / "out", models=models))


def test_bayes_stands_beside_the_scores_of_its_own_pool_only(content):
    rows = content["results"]
    assert _find(rows, dataset="alpha", subject="s1", model="ridge", **FORWARD)["bayes"] == 0.97
    assert _find(rows, dataset="beta", subject="s1", model="joint", **FORWARD)["bayes"] is None
    assert any("beta/s1" in note and "99" in note for note in content["notes"])


def test_gallery_shows_the_same_images_of_every_subject(evaluated):
    rows = evaluated.gallery.rows
    alpha = [row for row in rows if row.dataset == "alpha"]
    assert {(row.subject, row.model) for row in alpha} == {
        ("s1", "joint"), ("s2", "joint"), ("new", "adapted")
    }  # fmt: skip
    shown = {row.image_uid for row in alpha}
    assert len(shown) == 3
    assert len(alpha) == 9
    for row in rows:
        assert len(row.retrieved) == len(set(row.retrieved)) == 4
        assert list(row.scores) == sorted(row.scores, reverse=True)
        if row.rank <= 4:
            assert row.retrieved[row.rank - 1] == row.image_uid
        else:
            assert row.image_uid not in row.retrieved


def test_switches_act(world, tmp_path):
    models = [{"model": "joint", "run": world / "joint", "subjects": ["alpha/s2"]}]
    small = run(
        _config(world, tmp_path / "small", models=models, ridge=False, shuffled=False,
                prior_samples=False, gallery_images=0, ground_truth=None, split="validation")
    )  # fmt: skip
    rows = small["results"]
    assert {(row["subject"], row["model"]) for row in rows} == {("s2", "joint"), ("all", "joint")}
    assert {row["output"] for row in rows} == {"pooled", "tokens"}
    assert {row["pool"] for row in rows if "category" not in row["metric"]} == {
        IMAGES["validation"]
    }
    assert read_evaluation(tmp_path / "small").gallery.rows == ()
    wide = run(_config(world, tmp_path / "wide", models=models, ridge_max_features=3,
                       confidence=0.5))  # fmt: skip
    assert not [r for r in wide["results"] if r["model"] == "ridge" and r["output"] == "tokens"]
    narrow = _find(wide["results"], subject="s2", model="joint", **FORWARD)
    broad = run(_config(world, tmp_path / "broad", models=models))
    broad = _find(broad["results"], subject="s2", model="joint", **FORWARD)
    assert narrow["ci_high"] - narrow["ci_low"] < broad["ci_high"] - broad["ci_low"]


def test_ridge_penalties_are_those_of_the_config(world, content, tmp_path):
    models = [{"model": "joint", "run": world / "joint", "subjects": ["alpha/s1"]}]
    strong = run(_config(world, tmp_path / "a", models=models, ridge_alphas=[1e9]))
    first = _find(strong["results"], subject="s1", model="ridge", **FORWARD)
    second = _find(content["results"], subject="s1", dataset="alpha", model="ridge", **FORWARD)
    assert first["value"] != second["value"]
    with pytest.raises(DataError, match="cross-validation with 1000 folds"):
        run(_config(world, tmp_path / "b", models=models, ridge_folds=1000))


def test_same_call_same_files(world, tmp_path):
    models = [{"model": "joint", "run": world / "joint", "datasets": ["beta"]}]
    for name in ("a", "b"):
        run(_config(world, tmp_path / name, models=models))
    for name in ("queries.npz", "gallery.npz", "evaluation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_prior_noise_follows_the_seed(world, tmp_path):
    models = [{"model": "joint", "run": world / "joint", "subjects": ["alpha/s1"]}]
    scores = []
    for seed in (0, 1):
        run(_config(world, tmp_path / str(seed), models=models, seed=seed, ridge=False))
        tables = read_evaluation(tmp_path / str(seed)).tables
        scores.append(
            next(t.values_Q for t in tables if (t.key.model, t.key.output) == ("joint", "prior"))
        )
    assert (scores[0] != scores[1]).any()


def test_wrong_models_are_refused_with_the_reason(world, tmp_path):
    def evaluate(**changes):
        run(_config(world, tmp_path / "out", **changes))

    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(models=[{"model": "joint", "run": tmp_path / "nowhere"}])
    with pytest.raises(ConfigError, match="did you mean 'alpha/s1'"):
        evaluate(models=[{"model": "joint", "run": world / "joint", "subjects": ["alpha/s11"]}])
    with pytest.raises(ConfigError, match="knows no subject of dataset 'gamma'"):
        evaluate(models=[{"model": "joint", "run": world / "joint", "datasets": ["gamma"]}])
    with pytest.raises(FormatError, match="data-tools fabricate"):
        evaluate(ground_truth=tmp_path / "missing.json")


def test_a_model_of_other_targets_is_refused(world, tmp_path):
    from dist_decoder.formats import EncoderEntry

    other = EncoderEntry(id="other", kind="analytic", pooled_dim=5, token_shape=(3, 4))
    write_run(tmp_path / "other", world / "shards", ("alpha/s1",), encoder=other)
    with pytest.raises(ConfigError, match="encoder other"):
        run(_config(world, tmp_path / "out",
                    models=[{"model": "joint", "run": tmp_path / "other"}]))  # fmt: skip


def test_model_without_prior_or_tokens_gives_fewer_outputs(world, tmp_path):
    plain = MODEL.model_copy(
        update={"tokens": False, "prior": MODEL.prior.model_copy(update={"enabled": False})}
    )
    write_run(tmp_path / "plain", world / "shards", ("alpha/s1",), model=plain)
    found = run(_config(world, tmp_path / "out", ridge=False,
                        models=[{"model": "joint", "run": tmp_path / "plain"}]))  # fmt: skip
    assert {row["output"] for row in found["results"]} == {"pooled"}


def test_contaminated_split_is_told(tmp_path):
    shards = write_world(tmp_path / "shards", contaminated=True)
    write_run(tmp_path / "joint", shards, ("alpha/s1",))
    found = run(_config(tmp_path, tmp_path / "out", ground_truth=None, ridge=False,
                        models=[{"model": "joint", "run": tmp_path / "joint"}]))  # fmt: skip
    assert found["contaminated"]
    assert "split: alpha shares two images with beta" in found["notes"]
    assert "shards: normalise leaky:session leaks" in found["notes"]


def test_rendered_text_names_the_rows(content):
    text = render(content)
    assert "alpha        joint     pooled  " in text
    assert " 0.970 " in text
    assert "image_to_brain" not in text
    scored = [line.split()[:2] for line in text.splitlines() if "pooled" in line]
    assert len(scored) == len({tuple(pair) for pair in scored})
    assert text.splitlines()[-1].startswith(f"{len(content['results'])} rows of scores")
    assert uid("alpha", "test", 0) not in text


def test_averaged_trials_are_counted_and_have_no_optimum_of_single_trials(world, tmp_path):
    shards = write_world(tmp_path / "shards", averaged=4)
    write_run(tmp_path / "joint", shards, ("alpha/s1",), seed=3)
    found = run(_config(world, tmp_path / "out", shards=str(shards), ridge=False,
                        models=[{"model": "joint", "run": tmp_path / "joint"}]))  # fmt: skip
    assert {row["repetitions"] for row in found["results"]} == {4}
    assert {row["bayes"] for row in found["results"]} == {None}
    assert "alpha/s1: a query is the mean of 4 trials" in " ".join(found["notes"])
