"""Edits: what they keep is kept to the bit or to rounding, and what they do otherwise is a plain ascent."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dat_lightning.core import (
    Ascent,
    Constrained,
    Edit,
    FixedPixels,
    Langevin,
    Momentum,
    PixelAdam,
    PooledPixels,
    RandomLength,
    Steepest,
    ThreatModel,
    UpdateRule,
    denoising,
    harmonic,
    inpainting,
    negative_marginal_energy,
    pooled,
    super_resolution,
    targeted_logit,
    unbounded_ascent,
)
from dat_lightning.core.errors import InputError

RULES: tuple[UpdateRule, ...] = (
    Steepest(),
    RandomLength(0.4, Momentum(0.4, nesterov=True)),
    Momentum(0.4),
    PixelAdam(),
    Langevin(0.05),
)
CLASSES = 3


def network(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    """With curvature, so that no step is like the one before."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        flat = math.prod(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(flat, 12), nn.Tanh(), nn.Linear(12, CLASSES)).to(dtype)


def images(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """With black and white among their pixels."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ((x - 0.1) * 1.25).clamp(0, 1).to(dtype)


def climb(rule: UpdateRule = Steepest(), step_size: float = 0.7, num_steps: int = 6, **threat: Any) -> Ascent:
    threat = {"eps": math.inf, **threat}
    return Ascent(targeted_logit, ThreatModel(step_size=step_size, num_steps=num_steps, **threat), rule)


# A mask.


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("eps", [math.inf, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_outside_of_the_mask_keep_their_bits(rule: UpdateRule, eps: float, dtype: torch.dtype) -> None:
    x, y = images(5, (2, 6, 4), dtype), torch.arange(5) % CLASSES
    masks = torch.rand(5, 1, 6, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    model = network((2, 6, 4), dtype)
    states = inpainting(x, masks).snapshots(model, y, climb(rule, eps=eps), range(7))
    outside, inside = ~masks.expand_as(x), masks.expand_as(x)
    for state in states.values():
        assert torch.equal(state[outside], x[outside])
        assert bool(((state >= 0) & (state <= 1)).all())
    assert not bool((states[6][inside] == states[0][inside]).all())
    moved = (states[6] - states[0]).flatten(1).norm(dim=1)
    assert bool((moved <= eps * (1 + 1e-6)).all())


@pytest.mark.parametrize("rule", [Steepest(), Momentum(0.4, nesterov=True), PixelAdam(), Langevin(0.0)], ids=str)
def test_a_masked_walk_is_that_of_a_network_which_sees_the_masked_rows_alone(rule: UpdateRule) -> None:
    """With the other rows fixed, the network is a function of the masked ones: a plain ascent on that function."""
    x, y = images(4, (2, 6, 4)), torch.tensor([0, 1, 2, 0])
    model = network((2, 6, 4))
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[2:5] = True

    def of_rows(rows: Tensor) -> Tensor:
        logits: Tensor = model(torch.cat([x[:, :, :2], rows, x[:, :, 5:]], 2))
        return logits

    walk = climb(rule, step_size=0.2)
    rows = walk(of_rows, torch.full((4, 2, 3, 4), 0.3, dtype=torch.float64), y)
    edited = inpainting(x, mask, 0.3)(model, y, walk)
    torch.testing.assert_close(edited[:, :, 2:5], rows, rtol=0, atol=1e-12)
    assert float((rows - 0.3).abs().max()) > 0.1


def test_what_the_mask_hides_is_not_looked_at() -> None:
    x, y = images(4, (1, 4, 4)), torch.zeros(4, dtype=torch.long)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 2:] = True
    other = torch.where(mask, 1 - x, x)
    model = network((1, 4, 4))
    expected = inpainting(x, mask)(model, y, climb())
    for hidden in (other, torch.where(mask, math.nan, x)):
        assert torch.equal(inpainting(hidden, mask)(model, y, climb()), expected)
    seeds = images(4, (1, 4, 4)).flip(0)
    assert torch.equal(inpainting(x, mask, seeds).start[..., 2:], seeds[..., 2:])


def test_an_image_without_mask_stays_and_one_with_nothing_else_climbs_freely() -> None:
    x, y = images(3, (1, 4, 4), torch.float32), torch.tensor([0, 1, 2])
    model = network((1, 4, 4), torch.float32)
    assert torch.equal(inpainting(x, torch.zeros(4, 4, dtype=torch.bool))(model, y, climb()), x)
    free = inpainting(x, torch.ones(4, 4, dtype=torch.bool), x)(model, y, climb())
    torch.testing.assert_close(free, climb()(model, x, y), rtol=0, atol=1e-6)


def solved(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One channel, filled by solving for the masked pixels, each the mean of those neighbours that it has."""
    places = list(zip(*np.nonzero(mask), strict=True))
    matrix, right = np.zeros((len(places), len(places))), np.zeros(len(places))
    for row, (i, j) in enumerate(places):
        for at in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if 0 <= at[0] < mask.shape[0] and 0 <= at[1] < mask.shape[1]:
                matrix[row, row] += 1
                if mask[at]:
                    matrix[row, places.index(at)] -= 1
                else:
                    right[row] += image[at]
    filled = np.array(image)
    filled[mask] = np.linalg.solve(matrix, right)
    return filled


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_smoothest_filling_solves_the_laplace_equation(dtype: torch.dtype, rounding: float) -> None:
    x = images(6, (2, 12, 9), dtype)
    masks = torch.rand(6, 1, 12, 9, generator=torch.Generator().manual_seed(5)) < 0.7
    masks[0], masks[1] = False, False
    masks[1, 0, 6:], masks[2, 0, 3:9, 2:7] = True, True
    filled = harmonic(x, masks)
    for n, c in np.ndindex(6, 2):
        expected = solved(x[n, c].double().numpy(), masks[n, 0].numpy())
        np.testing.assert_allclose(filled[n, c].numpy(), expected, rtol=0, atol=rounding)
    assert torch.equal(filled[~masks.expand_as(x)], x[~masks.expand_as(x)])
    assert torch.equal(inpainting(x, masks).start, filled)
    alone = harmonic(x[3:4], masks[3:4])
    torch.testing.assert_close(alone, filled[3:4], rtol=0, atol=rounding)


def test_where_nothing_is_known_there_is_grey() -> None:
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert torch.equal(harmonic(images(2, (1, 4, 4)), everything), torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64))


# Pooled pixels.


def waterfilled(block: np.ndarray, wanted: float) -> np.ndarray:
    """The nearest block in [0, 1] with a mean, by halving the interval in which the shift lies."""
    low, high = block.min() - 1, block.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(block - middle, 0, 1).mean() >= wanted:
            low = middle
        else:
            high = middle
    return np.asarray(np.clip(block - low, 0, 1))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_nearest_images_with_given_averages_are_those_of_a_plain_search(factor: int) -> None:
    small = images(4, (2, 3, 2))
    small[0, 0, 0], small[1, 1] = 0.0, 1.0
    x = 0.5 + 1.5 * torch.randn(4, 2, 3 * factor, 2 * factor, dtype=torch.float64, generator=torch.manual_seed(0))
    x[2] = 0.25  # every pixel of a block alike
    x[3, 0] = x[3, 0].round()  # corners that coincide
    found = PooledPixels(small, factor).nearest(x).numpy()
    for n, c, i, j in np.ndindex(*small.shape):
        at = (n, c, slice(i * factor, (i + 1) * factor), slice(j * factor, (j + 1) * factor))
        wanted = waterfilled(x.numpy()[at], float(small[n, c, i, j]))
        np.testing.assert_allclose(found[at], wanted, rtol=0, atol=1e-12)
        assert found[at].mean() == pytest.approx(float(small[n, c, i, j]), abs=1e-14)


def test_no_image_with_those_averages_is_nearer() -> None:
    """The angle at a projection onto a convex set is never acute."""
    others = images(200, (1, 4, 4))
    x = 0.5 + torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    small = torch.tensor([[[[0.1, 0.5], [0.9, 0.3]]]], dtype=torch.float64)
    keeps = PooledPixels(small, 2)
    nearest = keeps.nearest(x)
    feasible = PooledPixels(small.expand(200, -1, -1, -1), 2).nearest(others)
    torch.testing.assert_close(pooled(feasible, 2), small.expand(200, -1, -1, -1), rtol=0, atol=1e-14)
    assert float(((x - nearest) * (feasible - nearest)).sum((1, 2, 3)).max()) <= 1e-12
    assert torch.equal(keeps.nearest(nearest), nearest) or float((keeps.nearest(nearest) - nearest).abs().max()) < 1e-15


def test_directions_along_the_averages_are_an_orthogonal_projection() -> None:
    keeps = PooledPixels(images(2, (3, 2, 2)), 4)
    a, b = images(2, (3, 8, 8)), images(4, (3, 8, 8))[2:]
    torch.testing.assert_close(pooled(keeps.tangent(a), 4), torch.zeros(2, 3, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(keeps.tangent(keeps.tangent(a)), keeps.tangent(a))
    torch.testing.assert_close((keeps.tangent(a) * b).sum(), (a * keeps.tangent(b)).sum())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("eps", [math.inf, 0.5])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 5e-7), (torch.float64, 1e-15)])
def test_every_state_has_the_averages_and_lies_in_ball_and_box(
    rule: UpdateRule, eps: float, dtype: torch.dtype, rounding: float
) -> None:
    original, y = images(5, (2, 8, 4), dtype), torch.arange(5) % CLASSES
    small = pooled(original, 2)
    states = super_resolution(small, 2).snapshots(network((2, 8, 4), dtype), y, climb(rule, eps=eps), range(7))
    for state in states.values():
        # Sums of four, rounded.
        assert float((pooled(state, 2) - small).abs().max()) <= rounding
        assert bool(((state >= 0) & (state <= 1)).all())
        assert bool(((state - states[0]).flatten(1).norm(dim=1) <= eps * (1 + 1e-6)).all())
    assert float((states[6] - states[0]).abs().max()) > 0.05


@pytest.mark.parametrize("factor", [2, 4])
def test_a_step_along_the_averages_has_its_whole_length(factor: int) -> None:
    """The gradient is projected before it is scaled, so that the way across blocks costs nothing."""
    small = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    side = 2 * factor
    states = super_resolution(small, factor).snapshots(
        network((1, side, side)), torch.tensor([0, 1, 2]), climb(step_size=0.05), [1]
    )
    torch.testing.assert_close((states[1] - 0.5).flatten(1).norm(dim=1), torch.full((3,), 0.05, dtype=torch.float64))


# Noise, and edits at large.


def test_denoising_stays_as_near_as_the_original_probably_is() -> None:
    x, y = images(4, (2, 8, 8)) * 0.2 + 0.4, torch.arange(4) % CLASSES
    edited = denoising(x, 0.05)(network((2, 8, 8)), y, climb(step_size=0.3, num_steps=20))
    expected = torch.full((4,), 0.05 * math.sqrt(128), dtype=torch.float64)
    torch.testing.assert_close((edited - x).flatten(1).norm(dim=1), expected)


def test_an_edit_that_keeps_nothing_is_the_ascent_itself() -> None:
    x, y, model = images(3, (1, 4, 4)), torch.tensor([2, 0, 1]), network((1, 4, 4))
    assert torch.equal(Edit(x, eps=0.4)(model, y, climb()), climb(eps=0.4)(model, x, y))
    assert torch.equal(Edit(x, eps=0.4)(model, y, climb(eps=0.2)), climb(eps=0.2)(model, x, y))


def test_without_a_class_the_marginal_energy_falls() -> None:
    x, model = images(6, (1, 4, 4)), network((1, 4, 4))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3] = True
    walk = Ascent(negative_marginal_energy, unbounded_ascent(0.1, 8))
    edit = inpainting(x, mask)
    edited = edit(model, torch.zeros(6, dtype=torch.long), walk)
    with torch.no_grad():
        assert bool((model(edited).logsumexp(1) > model(edit.start).logsumexp(1)).all())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_image_is_edited_for_itself(rule: UpdateRule) -> None:
    """Batches of another size and order give the same images, where ``draws`` names them."""
    x, y, model = images(7, (1, 8, 8)), torch.arange(7) % CLASSES, network((1, 8, 8))
    small, draws = pooled(x, 4), torch.arange(7) + 20
    together = super_resolution(small, 4)(model, y, climb(rule), draws=draws, seed=5)
    for rows in ([6, 2], [0], [5, 4, 1, 3]):
        apart = super_resolution(small[rows], 4)(model, y[rows], climb(rule), draws=draws[rows], seed=5)
        torch.testing.assert_close(apart, together[rows], rtol=0, atol=1e-12)


def test_constrained_steps_count_the_gradients_of_their_rule() -> None:
    @dataclass(frozen=True)
    class Twice(Steepest):
        gradients_per_step: int = 2

    edit = inpainting(images(2, (1, 4, 4)), torch.ones(4, 4, dtype=torch.bool))
    assert edit.ascent(climb(Twice())).network_evaluations() == 2 * 2 * 6
    # Rules are values by which samples are told apart.
    assert edit.constraint is not None
    assert hash(Constrained(edit.constraint)) == hash(Constrained(edit.constraint))


def test_an_edit_begins_where_its_constraint_holds() -> None:
    """Whatever images it is given: a walk of no steps, and one inside a ball, have what is known as well."""
    x, y, model = images(4, (1, 4, 4)), torch.arange(4) % CLASSES, network((1, 4, 4))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    fixed = Edit(1 - x, FixedPixels(x, mask), eps=0.3)
    assert torch.equal(fixed.start, torch.where(mask, 1 - x, x))
    averages = Edit(1 - x, PooledPixels(pooled(x, 2), 2), eps=0.3)
    for steps in (0, 5):
        edited = fixed(model, y, climb(num_steps=steps))
        assert torch.equal(edited[:, :, 2:], x[:, :, 2:])
        small = pooled(averages(model, y, climb(num_steps=steps)), 2)
        torch.testing.assert_close(small, pooled(x, 2), rtol=0, atol=1e-14)


def test_what_rounding_has_brought_out_of_the_box_is_clipped() -> None:
    """All that an evaluator accepts: a quarter of an eight-bit level, and no more."""
    exact = images(2, (1, 4, 4))
    rounded = exact + 9e-4 * ((exact == 1).double() - (exact == 0).double())
    mask = torch.tensor([False, True, True, False]).expand(4, 4)
    assert float(rounded.min()) < 0
    assert float(rounded.max()) > 1
    makers: list[Callable[[Tensor], Edit]] = [
        Edit,
        lambda x: denoising(x, 0.1),
        lambda x: inpainting(x, mask),
        lambda x: inpainting(torch.full_like(x, 0.5), mask, x),
        lambda x: super_resolution(x, 2),
    ]
    for make in makers:
        edits = [make(x) for x in (exact, rounded)]
        ends = [e(network(tuple(e.start.shape[1:])), torch.tensor([0, 1]), climb(step_size=0.1)) for e in edits]
        assert torch.equal(edits[0].start, edits[1].start)
        assert torch.equal(*ends)
        with pytest.raises(InputError, match=r"must be images in \[0, 1\], got values in \[-0.00[12]"):
            make(exact - 1.3e-3)


def test_what_is_made_of_images_that_want_gradients_wants_none() -> None:
    x, y = images(2, (1, 4, 4)).requires_grad_(), torch.tensor([0, 1])
    for edit in (inpainting(x, MASK), super_resolution(x, 2)):
        states = edit.snapshots(network(tuple(edit.start.shape[1:])), y, climb(), range(3))
        assert not any(state.requires_grad for state in states.values())


SMALL = images(2, (1, 4, 4))
MASK = torch.zeros(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: inpainting(SMALL, torch.ones(4, 4)), "mask must be of type bool"),
        (lambda: inpainting(SMALL, None), "mask must be of the class Tensor, got None"),  # type: ignore[arg-type]
        (lambda: inpainting(SMALL, torch.ones(4, 5, dtype=torch.bool)), r"broadcast to \(2, 1, 4, 4\), got \(4, 5\)"),
        (
            lambda: inpainting(SMALL, torch.ones(1, 4, 4, dtype=torch.bool)),
            r"must be \(H, W\), .* got \(1, 4, 4\)",
        ),
        (lambda: inpainting(SMALL[0], MASK), r"must be float images \(N, C, H, W\) .*, got torch.float64 \(1, 4, 4\)"),
        (lambda: inpainting((255 * SMALL).byte(), MASK), r"must be float images .* got torch.uint8"),
        (lambda: inpainting(255 * SMALL, MASK), r"known must be images in \[0, 1\], got values in \[0, 255\]"),
        (lambda: inpainting(SMALL * math.nan, MASK), r"known must be images in \[0, 1\], got values in \[nan, nan\]"),
        (lambda: inpainting(SMALL, MASK, SMALL[:, :, :2]), r"broadcasts to \(2, 1, 4, 4\), got \(2, 1, 2, 4\)"),
        (lambda: inpainting(SMALL, torch.ones(1, 2, 1, 4, 4, dtype=torch.bool)), r"got \(1, 2, 1, 4, 4\)"),
        (lambda: inpainting(SMALL, torch.ones(3, 1, 4, 4, dtype=torch.bool)), r"got \(3, 1, 4, 4\)"),
        (
            lambda: inpainting(SMALL, torch.ones(4, 4, dtype=torch.bool), 1.5),
            r"fill must be images in \[0, 1\], got values in \[1.5, 1.5\]",
        ),
        (lambda: super_resolution(SMALL, 0), "factor must be a whole number of at least 1, got 0"),
        (lambda: super_resolution(SMALL, 2.0), "factor must be a whole number of at least 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: super_resolution(SMALL + 0.5, 2), r"pooled must be images in \[0, 1\], got values in \[0.5, 1.5\]"),
        (lambda: super_resolution(SMALL[0], 2), r"pooled must be float images .* \(1, 4, 4\)"),
        (lambda: pooled(SMALL, 3), "factor must divide the images' sides 4 and 4, got 3"),
        (lambda: pooled(SMALL, 0), "factor must be a whole number of at least 1, got 0"),
        (lambda: pooled(SMALL[0], 2), r"x must be float images .* \(1, 4, 4\)"),
        (lambda: PooledPixels(SMALL, 2).nearest(SMALL), r"images must be 2 times as large as pooled, \(2, 1, 8, 8\)"),
        (lambda: denoising(SMALL, -0.1), r"sigma must lie in \[0, 1\], in units of \[0, 1\] pixels, got -0.1"),
        (lambda: denoising(SMALL, 25), r"sigma must lie in \[0, 1\], in units of \[0, 1\] pixels, got 25"),
        (lambda: denoising(SMALL, math.nan), "got nan"),
        (lambda: denoising(255 * SMALL, 0.1), r"x must be images in \[0, 1\], got values in \[0, 255\]"),
        (lambda: Edit(255 * SMALL), r"start must be images in \[0, 1\], got values in \[0, 255\]"),
        (lambda: Edit(SMALL, "a mask"), "constraint must be of the class Constraint"),  # type: ignore[arg-type]
        (lambda: Edit(SMALL).ascent(ThreatModel()), "climb must be of the class Ascent"),  # type: ignore[arg-type]
        (
            lambda: Edit(SMALL)(network((1, 4, 4)), torch.zeros(1).long(), climb()),
            r"y must have one integer for each of 2",
        ),
        (lambda: Edit(SMALL).ascent(climb(eps=1.0, random_start=True)), "random_start must be false"),
        (lambda: denoising(SMALL, 0.1).ascent(climb(norm="Linf")), "needs norm L2, got Linf and eps 0.4"),
        (lambda: Constrained("a mask"), "constraint must be of the class Constraint"),  # type: ignore[arg-type]
        (lambda: Constrained(FixedPixels(SMALL, torch.ones(4, 4, dtype=torch.bool)), None), "rule must be of"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_cost_a_sentence(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
