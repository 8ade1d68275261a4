"""The steps of BASIC against their definitions in numpy, and the plan of a run."""

import numpy as np
import pandas as pd
import pytest
import torch

import run_retrieval
from benchmarks.icir import task_of_labels
from methods import find_method
from methods.basic import Parameters, prepare
from utils import UserError
from utils_blocks import make_blocks
from utils_retrieval import (
    Assets,
    Gallery,
    contrastive_components,
    expand_queries,
    kept_components,
    project,
    second_moment,
    unit_rows,
)
from utils_runs import Setting, ablation_points, parse_axis
from utils_sweeps import in_batches, once_each

BASIC = find_method("basic")


def random_unit(rows: int, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(rows, dim, generator=generator) + 0.3)


# --- the maths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_energy_share_keeps_the_fewest_components_that_hold_it(share):
    positive, negative = random_unit(50, seed=1), random_unit(40, seed=2)
    moments = second_moment(positive), second_moment(negative)
    values, vectors = contrastive_components(*moments, 0.2)

    p, m = positive.double().numpy(), negative.double().numpy()
    c = 0.8 * p.T @ p / 49 - 0.2 * m.T @ m / 39 + 1e-5
    expected = np.linalg.eigvalsh(c)[::-1]
    assert values.numpy() == pytest.approx(expected, abs=1e-12)
    assert c @ vectors.numpy() == pytest.approx(vectors.numpy() * expected, abs=1e-12)
    energy = expected[expected > 0]
    kept = kept_components(values, share)
    assert energy[:kept].sum() >= share * energy.sum() > energy[: kept - 1].sum()


def test_component_counts_end_at_the_positive_eigenvalues():
    values = torch.tensor([3.0, 2.0, 1.0, -0.5, -2.0])
    assert [kept_components(values, n) for n in (1, 2, 3, 4, 9999)] == [1, 2, 3, 3, 3]
    assert [kept_components(values, s) for s in (0.49, 0.51, 0.83, 0.84)] == [1, 2, 2, 3]


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_eigenvalues_that_are_zero_do_not_count(alpha):
    """Few prompts in many dimensions: most eigenvalues are zero, of either sign by rounding."""
    positive, negative = random_unit(20, dim=96, seed=1), random_unit(10, dim=96, seed=2)
    positive, negative = positive - positive.mean(0), negative - negative.mean(0)
    values, vectors = contrastive_components(
        second_moment(positive), second_moment(negative), alpha
    )
    kept = kept_components(values, 9999)
    assert kept <= 20  # 19 directions of the centred prompts, and one of the constant
    assert kept < int((values > 0).sum())
    span = torch.cat([positive, negative, torch.ones(1, 96)]).double()
    inside = torch.linalg.lstsq(span.T, vectors[:, :kept]).solution
    assert torch.allclose(span.T @ inside, vectors[:, :kept], atol=1e-6)


def test_a_projection_on_nothing_is_refused():
    everywhere = torch.cat([torch.eye(12), -torch.eye(12)])
    assets = Assets({"generic_subjects": random_unit(50), "generic_styles": everywhere})
    with pytest.raises(UserError, match="no positive eigenvalue"):
        prepare([Parameters(project_features=True, aa=1.0)], assets)


def test_gallery_works_on_raw_rows_as_on_centred_unit_rows():
    raw = random_unit(30, seed=3) * torch.linspace(0.5, 20, 30)[:, None]
    gallery, rows, queries, mean = (
        Gallery.of(raw),
        unit_rows(raw),
        random_unit(4),
        random_unit(1)[0],
    )
    assert torch.allclose(gallery.mean(), rows.mean(0), atol=1e-6)
    assert torch.allclose(gallery.similarity(queries), queries @ rows.T, atol=1e-6)
    centred = queries @ (rows - mean).T
    assert torch.allclose(gallery.similarity(queries, mean), centred, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 25, 40])
def test_query_expansion_is_the_weighted_mean_of_its_definition(k):
    """Also with fewer rows (30) than neighbours asked for."""
    raw, images, mean = random_unit(30, seed=3) * 7, random_unit(4, seed=4), random_unit(1)[0]
    basis = torch.linalg.qr(random_unit(12, seed=5)).Q[:, :5]
    gallery = Gallery.of(raw)
    centred = images - mean
    nearest = gallery.nearest(project(centred, basis), k, mean)
    expanded = expand_queries(centred, nearest, gallery, mean)
    for query in range(4):
        x = unit_rows(raw).numpy() - mean.numpy()
        s = x @ (basis @ basis.T).numpy() @ centred[query].numpy()
        nearest = np.argsort(-s, kind="stable")[:k]
        weights = np.exp(0.1 * np.append(1.0, s[nearest]))
        vectors = np.vstack([centred[query].numpy(), x[nearest]])
        expected = (weights / weights.sum()) @ vectors
        assert expanded[query].numpy() == pytest.approx(expected, abs=1e-6)


def test_what_points_agree_in_is_made_once():
    made = []
    values = once_each([3, 13, 4, 23], lambda n: n % 10, lambda n: made.append(n) or n * 2)
    assert values == [6, 6, 8, 6]
    assert made == [3, 4]


def test_batches_hold_at_most_so_many_different_keys():
    batches = list(in_batches("aabcab", str, 2))
    assert batches == [["a", "a", "b"], ["c", "a"], ["b"]]
    assert list(in_batches([], str, 2)) == []


# --- the plan of a run -------------------------------------------------------------------------


def plan_of(*flags: str):
    return run_retrieval.plan_of(run_retrieval.build_parser().parse_args(flags), "icir")


def plan(*flags: str):
    (run,) = plan_of(*flags).runs
    return run


def settle(given: dict, use_preset: bool):
    return Setting(given, use_preset, "icir", "clip").run("basic")


def test_an_explicit_flag_wins_over_the_preset_also_when_it_restates_a_default(monkeypatch):
    assert plan("--use_preset").parameters.contextualize
    assert not plan("--use_preset", "--no-contextualize").parameters.contextualize
    assert plan("--use_preset", "--harris_lambda", "0.1").variant == "basic"
    monkeypatch.setitem(BASIC.preset, "harris_lambda", 0.3)  # differs from the default
    assert plan("--use_preset").parameters.harris_lambda == 0.3
    assert plan("--use_preset", "--harris_lambda", "0.1").parameters.harris_lambda == 0.1


SWITCHES = [name for name, value in BASIC.preset.items() if value is True]


@pytest.mark.parametrize("spelling", ["_", "-"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_can_be_turned_off(switch, spelling):
    flag = switch.replace("_", spelling)
    run = plan("--use_preset", f"--no-{flag}")
    assert getattr(run.parameters, switch) is False
    assert run.variant.startswith("basic_no_")


def test_variants_name_what_departs_from_the_preset():
    names = {
        ("--use_preset",): "basic",
        ("--use_preset", "--no-do_query_expansion"): "basic_no_query_expansion",
        ("--use_preset", "--aa", "0.5"): "basic_aa0.5",
        ("--use_preset", "--aa", "0.2000000001"): "basic_aa0.2000000001",
        ("--use_preset", "--harris_lambda", "1e5"): "basic_lambda100000",
        ("--use_preset", "--harris_lambda", "1e6"): "basic_lambda1e06",
        ("--use_preset", "--harris_lambda", "1e-6"): "basic_lambda1e-06",
        ("--use_preset", "--no-standardize_features"): "basic_no_standardization",
        ("--method", "sum", "--contextualize"): "sum_contextualization",
        ("--use_preset", "--ties", "best"): "basic_ties_best",
        ("--use_preset", "--backbone", "siglip"): "basic_siglip",
        ("--method", "product", "--no-clamp", "--backbone", "RN50/openai"): (
            "product_no_clamp_RN50-openai"
        ),
    }
    assert {flags: plan(*flags).variant for flags in names} == names


def test_equal_computations_have_equal_parameters():
    bare = settle({}, use_preset=False).parameters
    assert settle({"aa": 0.7, "qe_k": 3}, use_preset=False).parameters == bare
    assert settle({}, use_preset=True).variant == "basic"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_laion_mean"], "--use_laion_mean has no effect without --standardize_features"),
        (["--aa", "0.2"], "--aa has no effect without --project_features"),
        (["--method", "sum", "--aa", "0.5"], "no effect on --method sum: only basic reads it"),
        (["--method", "image", "--contextualize"], "no effect on --method image"),
        (["--fusion_weight", "0.2"], "no effect on --method basic: only sum reads it"),
        (["--path_to_synthetic_data", "x"], "no effect without --normalize_similarities"),
        (["--use_preset", "--aa", "1.5"], "--aa 1.5: it has to be between 0 and 1"),
        (["--use_preset", "--qe_k", "0"], "--qe_k 0: it has to be at least 1"),
        (
            ["--use_preset", "--num_principal_components_for_projection", "2.5"],
            "whole number of components",
        ),
        (["--sweep", "nonsense=1"], "'nonsense' is none of"),
        (["--sweep", "aa=0.1,0.2"], "--aa has no effect without --project_features"),
        (["--use_preset", "--sweep", "aa=a"], "with values of type float"),
        (["--use_preset", "--sweep", "aa=0:1:0"], "with values of type float"),
        (["--use_preset", "--aa", "0.1", "--sweep", "aa=0.1,0.2"], "is swept and given"),
        (["--ablation"], "no component is on"),
    ],
)
def test_flags_without_effect_or_sense_are_errors(flags, message):
    with pytest.raises(UserError, match=message):
        plan_of(*flags)


def test_axes_of_a_sweep():
    assert parse_axis("aa=0:1:0.25") == ("aa", [0.0, 0.25, 0.5, 0.75, 1.0])
    assert parse_axis("harris-lambda=0:0.3:0.1,0.7") == ("harris_lambda", [0.0, 0.1, 0.2, 0.3, 0.7])
    assert parse_axis("qe_k=5,25") == ("qe_k", [5, 25])
    assert parse_axis("project_features=on,off") == ("project_features", [True, False])


def test_a_grid_runs_its_last_axis_fastest():
    sweep = plan_of("--use_preset", "--sweep", "aa=0.1,0.2", "harris_lambda=0,0.1,0.2")
    points = [tuple(point.values()) for point in sweep.points]
    assert points[:3] == [(0.1, 0.0), (0.1, 0.1), (0.1, 0.2)]
    assert [(r.parameters.aa, r.parameters.harris_lambda) for r in sweep.runs] == points


def test_the_ablation_adds_every_step_and_takes_each_away():
    run = settle({}, use_preset=True)
    full, points = run.parameters, ablation_points(run)
    labels = [label for label, _ in points]
    assert labels[0] == "bare fusion"
    assert points[0][1] == settle({"harris_lambda": 0.0}, use_preset=False).parameters
    assert labels[6] == "+ Harris (full)"
    assert points[6][1] == full
    assert labels[7:] == [
        f"full - {step}"
        for step in (
            "standardization",
            "projection",
            "query expansion",
            "contextualization",
            "normalisation",
            "Harris",
        )
    ]
    assert len({parameters for _, parameters in points}) == len(points) - 1  # "+ normalisation"
    assert points[5][1] == points[12][1]  # is "full - Harris"


# --- gallery blocks ----------------------------------------------------------------------------


def test_blocks_hold_an_instances_rows_and_positives_wherever_they_are():
    queries = [("1.jpg", "x", "b"), ("2.jpg", "y", "a"), ("3.jpg", "x", "b")]
    rows = [("x", "b"), ("x", "a"), ("y", "a"), ("z", "b"), ("x", "b"), ("x", "c")]
    b, a = make_blocks(task_of_rows(queries, rows))
    assert b.rows.tolist() == [0, 3, 4]
    assert a.rows == slice(1, 3)
    assert b.queries.tolist() == [0, 2]
    positives = b.views["all"].positives
    cells = list(zip(positives.query, positives.row, strict=True))
    assert cells == [(0, 0), (0, 2), (1, 0), (1, 2)]
    positives = a.views["all"].positives
    assert list(zip(positives.query, positives.row, strict=True)) == [(0, 1)]


def task_of_rows(queries: list, rows: list):
    table = pd.DataFrame(queries, columns=["image_path", "text", "instance"], dtype=str)
    labels = pd.DataFrame(rows, columns=["text", "instance"]).astype("category")
    paths, notes = [f"{row}.jpg" for row in range(len(rows))], [text for text, _ in rows]
    return task_of_labels("made", table, labels, paths, notes)


def test_related_rows_show_the_instance_under_a_text_that_is_asked_of_it():
    queries = [("1.jpg", "x", "b"), ("2.jpg", "y", "b"), ("3.jpg", "q", "a")]
    rows = [("x", "b"), ("y", "b"), ("z", "b"), ("x", "a"), ("", "b")]
    task = task_of_rows(queries, rows)
    positives = task.views["all"].positives
    assert [task.rows_of(task.related, q).tolist() for q in range(3)] == [[0, 1], [0, 1], []]
    assert [task.rows_of(positives, q).tolist() for q in range(3)] == [[0], [1], []]


def test_an_instance_without_rows_is_refused():
    with pytest.raises(UserError, match="query row 2: the instance 'c' has queries but no"):
        task_of_rows([("1.jpg", "x", "b"), ("2.jpg", "x", "c")], [("x", "b")])
