import entmax as exact
import pytest
import torch

from dashattn.ops.entmax.reference import entmax


@pytest.mark.parametrize(("alpha", "solver"), [(1.5, exact.entmax15), (2.0, exact.sparsemax)])
def test_equals_the_exact_solver(alpha, solver):
    scores = torch.randn(20, 37, dtype=torch.float64) * 3
    p, log_p = entmax(scores, alpha)
    torch.testing.assert_close(p, solver(scores, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_p.exp(), p, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 2.0])
def test_sums_to_one_at_any_number_of_chunks(dtype, alpha):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for chunks in (1, 2, 256, 16384):
        for spread in (0.0, 0.01, 1.0, 100.0):
            p, _ = entmax(torch.randn(4, chunks, dtype=dtype) * spread + 40, alpha)
            assert (p.double().sum(-1) - 1).abs().max() <= tolerance


@pytest.mark.parametrize("output", [0, 1])
def test_gradcheck_scores_and_alpha(output):
    scores = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    candidates = torch.rand(3, 4, 9) < 0.8
    candidates[0, 0] = False

    def fn(scores, alpha):
        result = entmax(scores, alpha, candidates)
        return torch.where(result[0] > 0, result[output], 0)

    assert torch.autograd.gradcheck(fn, (scores, alpha))


@pytest.mark.parametrize("alpha", [1.01, 1.02, 1.05, 1.25, 1.5, 2.0])
@pytest.mark.parametrize(("chunks", "spread"), [(40, 0.1), (50, 1.0), (500, 3.0), (2000, 8.0)])
def test_gradient_of_alpha_is_as_exact_as_float32_at_any_alpha(alpha, chunks, spread):
    scores, weight, weight_log = torch.randn(1, chunks) * spread, *torch.randn(2, 1, chunks)
    grads = []
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(alpha, dtype=dtype, requires_grad=True)
        p, log_p = entmax(scores.to(dtype), tensor)
        log_p = torch.where(p > 0, log_p, 0)
        grads += torch.autograd.grad((weight * p + weight_log * p.detach() * log_p).sum(), tensor)
    assert abs(grads[0] - grads[1]) <= 1e-4 * abs(grads[1])


@pytest.mark.parametrize("alpha", [1.1, 1.5])
def test_a_row_is_solved_as_it_would_be_alone(alpha):
    """Beside rows that take more steps: to rounding, and not to the tolerance only that all have."""
    scores = torch.randn(50, 200) * torch.logspace(-2, 1.5, 50)[:, None]
    together = entmax(scores, alpha)[0]
    alone = torch.cat([entmax(row[None], alpha)[0] for row in scores])
    assert (together - alone).abs().max() < 5e-7


def test_gradient_matches_the_exact_solver():
    scores = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 30, dtype=torch.float64)
    (ours,) = torch.autograd.grad((entmax(scores, 1.5)[0] * weight).sum(), scores)
    (theirs,) = torch.autograd.grad((exact.entmax15(scores, -1) * weight).sum(), scores)
    torch.testing.assert_close(ours, theirs)


def test_rows_without_candidates_are_zero_with_zero_gradient():
    scores = torch.randn(2, 5, requires_grad=True)
    p, log_p = entmax(scores, 1.5, torch.tensor([[False] * 5, [True] * 5]))
    assert (p[0] == 0).all()
    assert (log_p[0] == -torch.inf).all()
    p.square().sum().backward()
    assert (scores.grad[0] == 0).all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.5, 2.0])
def test_gradient_of_log_p_is_finite_at_the_edge_of_the_support(alpha):
    scores = (torch.randn(64, 200) * 20).requires_grad_()
    p, log_p = entmax(scores, torch.full((64, 1), alpha).requires_grad_())
    torch.where(p > 0, log_p, 0).sum().backward()
    assert scores.grad.isfinite().all()


def test_a_second_derivative_is_refused():
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(entmax(scores, 1.5)[0].square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_log_p_and_its_gradient_know_the_support_where_p_underflows():
    scores = torch.linspace(0, -90, 50)[None]
    exact = scores.double().requires_grad_()
    scores.requires_grad_()
    p, log_p = entmax(scores, 1.01)
    expected_p, expected = entmax(exact, 1.01)
    support = expected_p > 0
    assert (p[support] == 0).any()  # p = z ** 100
    assert torch.equal(log_p > -torch.inf, support)
    torch.testing.assert_close(log_p[support], expected[support].float(), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(log_p[support].sum(), scores)
    (expected_grad,) = torch.autograd.grad(expected[support].sum(), exact)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-5)
