"""The estimators of hessian.py against the exact Hessian of tiny networks, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from networks import network
from torch import Tensor, nn
from torch.func import functional_call

from imbsam_fast.recipes.analysis.hessian import (
    Hessian,
    Spectrum,
    Tridiagonal,
    density,
    hutchinson_trace,
    lanczos,
    largest_eigenvalue,
    quadratic_forms,
    quadrature,
)
from imbsam_fast.recipes.analysis.modes import looked_at


def loss_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def mean_loss(model: nn.Module, batches) -> Callable[[Tensor], Tensor]:
    """Weights (n,) -> the mean over batches, without code of ours."""
    parameters = dict(model.named_parameters())
    shapes = [p.shape for p in parameters.values()]
    sizes = [p.numel() for p in parameters.values()]
    rows = sum(len(targets) for _, targets in batches)

    def loss(flat: Tensor) -> Tensor:
        pieces = [piece.view(s) for piece, s in zip(flat.split(sizes), shapes)]
        weights = dict(zip(parameters, pieces))
        return sum(loss_sum(functional_call(model, weights, (x,)), y) for x, y in batches) / rows

    return loss


def exact_hessian(model: nn.Module, batches) -> Tensor:
    """(n, n), in eval mode."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.func.hessian(mean_loss(model.eval(), batches))(weights)


def differenced_hessian(model: nn.Module, batches, batch_norm: str) -> Tensor:
    """(n, n), by central differences of the gradient, good to about 1e-8.

    torch.func.hessian is not symmetric under batch statistics (torch 2.14), so it is no judge.
    """
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.func.grad(mean_loss(model, batches))
    steps = 1e-6 * torch.eye(len(weights), dtype=torch.float64)
    with looked_at(model, batch_norm):
        columns = [(gradient(weights + e) - gradient(weights - e)) / 2e-6 for e in steps]
    return torch.stack(columns)


def tiny(norm: str = "batch") -> nn.Module:
    """76 to 92 weights, with running statistics that are not those of a batch."""
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm1d(6), "none": nn.Identity()}
    model = nn.Sequential(
        nn.Linear(4, 6), norms[norm], nn.Tanh(), nn.Linear(6, 5), nn.Dropout(0.5)
    ).double()
    model(torch.randn(20, 4, dtype=torch.float64))
    return model


def tiny_batches(rows: int = 12, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (rows,), generator=generator)
    return list(zip(inputs.split(size), targets.split(size)))


@pytest.fixture(scope="module")
def hessian() -> Hessian:
    return Hessian(tiny(), loss_sum, tiny_batches())


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return exact_hessian(tiny(), tiny_batches())


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_products_are_the_columns_of_the_exact_hessian(batch_norm, training):
    model = tiny().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hessian = Hessian(model, loss_sum, tiny_batches(), batch_norm)
    columns = hessian.products(torch.eye(hessian.size, dtype=torch.float64))
    differenced = differenced_hessian(tiny(), tiny_batches(), batch_norm)
    torch.testing.assert_close(columns, differenced, rtol=1e-6, atol=1e-7)
    if batch_norm == "running":
        exact = exact_hessian(tiny(), tiny_batches())
        torch.testing.assert_close(columns, exact, rtol=1e-10, atol=1e-12)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_batch_statistics_give_another_hessian():
    vector = normal(Hessian(tiny(), loss_sum, tiny_batches()).size)[None]
    running, batch = (
        Hessian(tiny(), loss_sum, tiny_batches(), mode).products(vector)
        for mode in ("running", "batch")
    )
    assert (running - batch).norm() > 0.1 * running.norm()


def test_running_statistics_make_the_hessian_independent_of_the_batches():
    whole, pieces = (Hessian(tiny(), loss_sum, tiny_batches(size=s)) for s in (12, 5))
    v = normal(whole.size)[None]
    torch.testing.assert_close(whole.products(v), pieces.products(v), rtol=1e-12, atol=1e-14)


def test_products_in_a_convolutional_network_in_float32():
    model = network("batch", torch.float32)
    images = torch.randn(8, 3, 6, 6)
    batches = [(images, torch.arange(8))]
    hessian = Hessian(model, loss_sum, batches)
    v = normal(hessian.size)[None]
    expected = Hessian(network("batch"), loss_sum, [(images.double(), torch.arange(8))]).products(v)
    found = hessian.products(v.float()).double()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)
    model = nn.Sequential(attention, nn.Flatten(), nn.Linear(12, 5)).double()
    batches = [(normal(36).view(3, 3, 4), torch.tensor([0, 3, 4]))]
    hessian = Hessian(model, loss_sum, batches)
    v, w = normal(hessian.size, 1)[None], normal(hessian.size, 2)[None]
    torch.testing.assert_close((w * hessian.products(v)).sum(), (v * hessian.products(w)).sum())


def test_parameters_without_influence_and_frozen_ones():
    model = tiny("none")
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    forward = model.forward
    hessian = Hessian(model, loss_sum, tiny_batches())
    names = [name for name, _ in model.named_parameters()]
    assert hessian.size == sum(p.numel() for p in model.parameters())
    first = names.index("unused")
    offset = sum(p.numel() for p in list(model.parameters())[:first])
    columns = hessian.products(torch.eye(hessian.size, dtype=torch.float64))
    assert not columns[offset : offset + 3].any() and columns.any()
    model.unused.requires_grad_(False)
    assert Hessian(model, loss_sum, tiny_batches()).size == hessian.size - 3
    assert model.forward == forward


def test_refusals():
    with pytest.raises(ValueError, match="batch_norm is 'eval', expected one of running, batch"):
        Hessian(tiny(), loss_sum, tiny_batches(), "eval")
    with pytest.raises(ValueError, match="batches hold no row"):
        Hessian(tiny(), loss_sum, [])
    with pytest.raises(ValueError, match="model has no trainable parameter"):
        Hessian(tiny().requires_grad_(False), loss_sum, tiny_batches())


def test_random_signs_depend_on_the_seed_alone(hessian):
    draw = [hessian.random_signs(2, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].abs().eq(1).all() and not torch.equal(draw[0][0], draw[0][1])


# ---------------------------------------------------------------- Lanczos


def test_lanczos_is_a_projection_onto_an_orthonormal_basis(exact):
    """H Q = Q T + residual q e_k^T: T and the residual from an explicit Krylov basis."""
    start, steps = normal(len(exact)), 12
    found = lanczos(lambda v: v @ exact, start, steps)
    krylov = [start / start.norm()]
    for _ in range(steps):  # Arnoldi by modified Gram-Schmidt, twice
        w = exact @ krylov[-1]
        for q in krylov * 2:
            w = w - (q @ w) * q
        krylov.append(w / w.norm())
    basis = torch.stack(krylov[:steps])
    projection = basis @ exact @ basis.T
    torch.testing.assert_close(found.diagonal, projection.diagonal())
    torch.testing.assert_close(found.off_diagonal, projection.diagonal(1).abs())
    assert found.residual == pytest.approx(float(krylov[steps] @ exact @ krylov[steps - 1]), 1e-6)


def test_lanczos_with_all_steps_finds_every_eigenvalue_once(exact):
    """Without reorthogonalisation copies of the outer eigenvalues would push others out."""
    separate = torch.linalg.eigvalsh(exact).unique()
    q, _ = torch.linalg.qr(normal(len(separate) ** 2).view(len(separate), -1))
    spread = q @ torch.diag(torch.logspace(-3, 3, len(separate), dtype=torch.float64)) @ q.T
    values, _ = lanczos(lambda v: v @ spread, normal(len(spread), 1), len(spread)).eigen()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(spread), rtol=1e-6, atol=1e-9)


def test_lanczos_ends_in_an_invariant_subspace():
    matrix = torch.diag(torch.tensor([5.0, 2.0, 2.0, -1.0], dtype=torch.float64))
    found = lanczos(lambda v: v @ matrix, torch.ones(4, dtype=torch.float64), 4)
    assert found.residual == 0.0
    torch.testing.assert_close(found.eigen()[0], torch.tensor([-1.0, 2.0, 5.0]).double())


def test_lanczos_of_a_zero_matrix():
    found = lanczos(torch.zeros_like, torch.ones(3, dtype=torch.float64), 3)
    assert found.eigen()[0].tolist() == [0.0] and found.residual == 0.0


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-8])
def test_largest_eigenvalue(hessian, exact, tolerance):
    expected = torch.linalg.eigvalsh(exact)
    found = largest_eigenvalue(hessian.products, normal(hessian.size), 100, tolerance)
    assert found.error <= tolerance * found.value
    assert (expected - found.value).abs().min() <= found.error + 1e-12
    assert found.value <= expected[-1] + 1e-12
    if tolerance < 1e-1:
        assert found.value == pytest.approx(float(expected[-1]), rel=tolerance)


def test_largest_eigenvalue_stops_as_soon_as_it_may_and_as_soon_as_it_must(hessian):
    start = normal(hessian.size)
    ticks = []
    rough = largest_eigenvalue(hessian.products, start, 100, 1e-1, lambda: ticks.append(1))
    fine = largest_eigenvalue(hessian.products, start, 100, 1e-8)
    cut = largest_eigenvalue(hessian.products, start, 3, 1e-8)
    assert len(ticks) == rough.steps < fine.steps < 100
    assert cut.steps == 3 and cut.error > 1e-8 * cut.value


def test_the_largest_eigenvalue_is_not_the_largest_absolute_one():
    matrix = torch.diag(torch.tensor([-50.0, 1.0, 2.0], dtype=torch.float64))
    found = largest_eigenvalue(lambda v: v @ matrix, normal(3), 3, 1e-10)
    assert found.value == pytest.approx(2.0)


# ---------------------------------------------------------------- trace


def test_all_sign_vectors_give_the_trace_exactly():
    q = normal(36).view(6, 6)
    matrix = q + q.T
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    found = hutchinson_trace(quadratic_forms(lambda v: v @ matrix, signs))
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-12)


def test_hutchinson_trace_within_its_known_variance(hessian, exact):
    probes = 400
    signs = hessian.random_signs(probes, torch.Generator().manual_seed(5))
    found = hutchinson_trace(quadratic_forms(lambda v: v @ exact, signs))
    variance = 2 * (exact.square().sum() - exact.diagonal().square().sum())
    error = math.sqrt(variance / probes)
    assert abs(found.value - float(exact.trace())) <= 4 * error
    assert found.error == pytest.approx(error, rel=0.25)
    assert found.probes == probes


def test_quadratic_forms_of_the_hessian(hessian, exact):
    signs = hessian.random_signs(3, torch.Generator().manual_seed(6))
    expected = [float(v @ exact @ v) for v in signs]
    assert quadratic_forms(hessian.products, signs) == pytest.approx(expected, rel=1e-10)


def test_the_error_of_one_probe_is_unknown():
    assert math.isnan(hutchinson_trace([3.0]).error)


# ---------------------------------------------------------------- density


def test_quadrature_is_exact_up_to_degree_2k_minus_1(exact):
    steps = 4
    v = normal(len(exact), 7)
    nodes, weights = quadrature(lanczos(lambda x: x @ exact, v, steps))
    power = v.clone()
    for degree in range(2 * steps + 1):
        expected = float(v @ power / (v @ v))
        moment = sum(w * x**degree for x, w in zip(nodes, weights))
        if degree < 2 * steps:
            assert moment == pytest.approx(expected, rel=1e-9), degree
        else:
            assert moment != pytest.approx(expected, rel=1e-3)
        power = exact @ power


def test_moments_of_the_density_within_their_known_variance(hessian, exact):
    probes = 60
    signs = hessian.random_signs(probes, torch.Generator().manual_seed(8))
    pairs = [quadrature(lanczos(lambda x: x @ exact, v, 5)) for v in signs]
    n = len(exact)
    for degree in (1, 2, 3):
        matrix = torch.linalg.matrix_power(exact, degree)
        variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / n**2
        moments = [sum(w * x**degree for x, w in zip(values, weights)) for values, weights in pairs]
        error = abs(sum(moments) / probes - float(matrix.trace()) / n)
        assert error <= 4 * math.sqrt(variance / probes)


def test_density_of_known_nodes():
    spectrum = Spectrum([[0.0, 4.0], [2.0]], [[0.25, 0.75], [1.0]])
    at = torch.linspace(-6, 10, 4001, dtype=torch.float64)
    found = density(spectrum, at, width=0.5)
    spacing = float(at[1] - at[0])
    assert float(found.sum()) * spacing == pytest.approx(1.0, abs=1e-6)
    assert float((at * found).sum()) * spacing == pytest.approx((3.0 + 2.0) / 2, abs=1e-6)
    peak = (0.75 / 2) / (0.5 * math.sqrt(2 * math.pi))
    assert float(found[at.sub(4.0).abs().argmin()]) == pytest.approx(peak, rel=1e-3)


def test_tridiagonal_eigen_of_a_known_matrix():
    """-1, 2, -1 has the eigenvalues 2 - 2 cos(i pi / (k + 1))."""
    k = 6
    matrix = Tridiagonal(torch.full((k,), 2.0).double(), -torch.ones(k - 1).double(), 0.0)
    expected = [2 - 2 * math.cos(i * math.pi / (k + 1)) for i in range(1, k + 1)]
    assert matrix.eigen()[0].tolist() == pytest.approx(expected)
