"""Distractors that look like positives, against all cosines in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from distractor_world import write_pool

import distractors.pool
from distractors.alike import FOUND, Alike, Bound, Images, UnitAlike, describe_alike
from distractors.passes import LEFT_OUT, Kept, run_pass
from distractors.pool import open_pool
from utils_ranks import Group

LEAST = 0.95
CPU = torch.device("cpu")


def make_images(width: int) -> tuple[list[Images], np.ndarray]:
    """Images in two groups with few main directions, and rows of which some nearly show them."""
    random = np.random.default_rng(width)
    main = random.normal(size=(20, width)) * 3
    images = random.normal(size=(90, 20)) @ main + random.normal(size=(90, width))
    rows = random.normal(size=(400, 20)) @ main + random.normal(size=(400, width))
    near = random.choice(400, 60, replace=False)
    noise = random.normal(size=(60, width)) * np.linalg.norm(images[:60], axis=1)[:, None]
    shares = np.linspace(0, 0.6, 60)[:, None] / np.sqrt(width)
    rows[near] = (images[random.permutation(90)[:60]] + shares * noise) * 0.3
    rows[7] = images[3] * 2
    names = [f"image {number}" for number in range(90)]
    groups = [
        Images("a positive's image", ", and more", images[:70].astype(np.float32), names[:70]),
        Images("a query's image", "", images[70:].astype(np.float16), names[70:]),
    ]
    return groups, rows.astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("width", [40, 300])
def test_rows_that_look_like_an_image_are_found(tmp_path, monkeypatch, width):
    """Whether their cosines are bounded first or not, and however the pool is cut."""
    monkeypatch.setattr(distractors.pool, "ROWS_OF_A_UNIT", 64)
    monkeypatch.setattr("distractors.alike.MOST_ROWS", 25)
    monkeypatch.setattr("distractors.alike.SCORES_HELD", 500)
    groups, rows = make_images(width)
    cosine = unit(rows) @ np.concatenate([unit(group.raw) for group in groups]).T
    assert np.abs(cosine - LEAST).min() > 1e-6
    assert (Alike.of(groups, LEAST, CPU).bound is None) == (width == 40)
    pool = open_pool([write_pool(tmp_path / "pool", rows, [150])])
    work = Alike.of(groups, LEAST, CPU)
    found = run_pass(work, pool, ["image"], CPU, Kept(tmp_path / "kept"), Group())
    for group, images in enumerate((slice(0, 70), slice(70, 90))):
        best = cosine[:, images].max(1)
        first = int(np.argmax(best >= LEAST))
        expected = ((best >= LEAST).sum(), first, cosine[first, images].argmax() + images.start)
        assert tuple(found[name][group] for name in FOUND[:3]) == expected
        assert found["alike_cosine"][group] == pytest.approx(best[first], abs=1e-9)
    assert 5 < found["alike"][0] < 60
    lines = describe_alike(found, groups, LEAST, pool)
    assert len(lines) == 2
    assert f"{found['alike'][0]} of 400 distractors have a cosine of 0.95 or more with" in lines[0]
    place = pool.place(int(found["alike_row"][0]))
    assert f"image, and more; the first: {place}, 0." in lines[0]


def make_close(width: int, rows: int = 40, images: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and as many images of each whose cosine with it is LEAST but for 1e-8: one above it."""
    random = np.random.default_rng(width)
    found, axis = [], unit(random.normal(size=(rows, width)).astype(np.float32))
    for row in axis.astype(np.float32):
        across = random.normal(size=(1000, width))
        across -= (across @ row)[:, None] * row / (row.astype(np.float64) @ row)
        share = LEAST + random.uniform(-1e-8, 1e-8, (1000, 1))
        drawn = share * unit(row[None]) + np.sqrt(1 - share**2) * unit(across)
        drawn = drawn.astype(np.float32)
        excess = (unit(drawn) @ unit(row[None]).T)[:, 0] - LEAST
        above, below = (drawn[(sign * excess > 3e-9) & (sign * excess < 1e-8)] for sign in (1, -1))
        found += [*below[: images // 2], above[0], *below[images // 2 : images - 1]]
    return axis.astype(np.float32), np.stack(found)


@pytest.mark.parametrize("width", [40, 300])
def test_the_best_image_in_float64_decides(tmp_path, monkeypatch, width):
    """Where others, that are not alike, are as good or better in float32."""
    monkeypatch.setattr("distractors.alike.PAIRS_AT_ONCE", 50 * width)
    rows, images = make_close(width)
    cosine = unit(rows) @ unit(images).T
    assert ((cosine >= LEAST).sum(1) == 1).all()
    pool = open_pool([write_pool(tmp_path / "pool", rows, [])])
    names = [f"image {number}" for number in range(len(images))]
    halves = [Images(half, "", some, names) for half, some in (("a", images), ("b", images[::-1]))]
    work = Alike.of(halves, LEAST, CPU)
    found = run_pass(work, pool, ["image"], CPU, Kept(tmp_path / "kept"), Group())
    assert found["alike"].tolist() == [len(rows), len(rows)]
    best = int(cosine[0].argmax())
    assert found["alike_image"].tolist() == [best, 2 * len(images) - 1 - best]
    assert found["alike_cosine"] == pytest.approx([cosine[0, best]] * 2, abs=1e-9)


def test_only_rows_that_the_bound_leaves_open_are_compared(monkeypatch):
    groups, rows = make_images(300)
    bound = Alike.of(groups, LEAST, CPU).bound
    units = torch.from_numpy(unit(rows)).float()
    highest = bound.highest(units)
    cosine = unit(rows) @ np.concatenate([unit(group.raw) for group in groups]).T
    assert (highest.numpy() >= cosine.max(1)).all()
    assert float((highest >= LEAST - 1e-4).float().mean()) < 0.5


def test_an_exact_copy_alone_is_alike_by_1(tmp_path):
    groups, rows = make_images(300)
    pool = open_pool([write_pool(tmp_path / "pool", rows, [])])
    kept = Kept(tmp_path / "kept")
    work = Alike.of(groups, 1.0, CPU)
    found = run_pass(work, replace(pool, rows=20), ["image"], CPU, kept, Group())
    assert (found["alike"][0], found["alike_row"][0], found[LEFT_OUT][0]) == (1, 7, 0)
    small = replace(pool, rows=7)
    found = run_pass(work, small, ["image"], CPU, kept, Group())
    assert describe_alike(found, groups, 1.0, small) == [
        "note: no distractor has a cosine of 1 or more with a positive's image or a query's image"
    ]


def test_no_bound_of_narrow_vectors():
    assert Bound.of(torch.ones(3, 200)) is None


def test_works_on_one_reading_are_kept_apart(tmp_path, monkeypatch):
    groups, rows = make_images(40)
    pool = open_pool([write_pool(tmp_path / "pool", rows, [])])
    exact, near = Alike.of(groups, 1.0, CPU), Alike.of(groups, LEAST, CPU)
    kept = Kept(tmp_path / "kept")
    first = run_pass(exact, pool, ["image"], CPU, kept, Group())
    alone = run_pass(near, pool, ["image"], CPU, Kept(tmp_path / "alone"), Group())
    counted = []
    monkeypatch.setattr(Alike, "counter", lambda work: counted.append(work) or UnitAlike(work))
    again = run_pass(exact, pool, ["image"], CPU, kept, Group(), also=[near])
    assert counted == [near]
    assert again["alike"].tolist() == first["alike"].tolist() != alone["alike"].tolist()
    assert run_pass(near, pool, ["image"], CPU, kept, Group()).keys() == alone.keys()
    assert counted == [near]
