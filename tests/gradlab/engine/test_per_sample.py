"""Every form of per-sample gradients against the gradients written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradlab.engine.per_sample import Lookup, Outer, Rows, SquaredLengths

KINDS = ("rows", "scalar rows", "outer", "lookup", "lookup of numbers")


def make(kind, agents, samples, uses, seed=0, dtype=torch.float64):
    """Gradients in some form, and written out by loops [agent, sample, *shape]."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(agents, samples, *shape, generator=random, dtype=dtype)

    if kind == "rows":
        values = draw(3, 2)
        return Rows(values), values
    if kind == "scalar rows":
        values = draw()
        return Rows(values), values
    if kind == "outer":
        a, d = draw(uses, 4), draw(uses, 3)
        out = torch.zeros(agents, samples, 3, 4, dtype=dtype)
        for i in range(agents):
            for s in range(samples):
                for u in range(uses):
                    out[i, s] += torch.outer(d[i, s, u], a[i, s, u])
        return Outer(a, d), out
    row = () if kind == "lookup of numbers" else (2,)
    index = torch.randint(5, (agents, samples, uses), generator=random)
    d = draw(uses, *row)
    out = torch.zeros(agents, samples, 5, *row, dtype=dtype)
    for i in range(agents):
        for s in range(samples):
            for u in range(uses):
                out[i, s, index[i, s, u]] += d[i, s, u]
    return Lookup(index, d, torch.Size((5, *row))), out


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(
    agents=st.integers(1, 3),
    clusters=st.integers(1, 3),
    each=st.integers(1, 3),
    uses=st.integers(1, 5),
)
def test_all_reductions_equal_those_of_the_written_out_gradients(
    kind, agents, clusters, each, uses
):
    found, rows = make(kind, agents, clusters * each, uses)
    flat = rows.reshape(agents, clusters * each, -1)
    assert found.shape == rows.shape[2:]
    close(found.rows(), rows)
    close(found.sum(), rows.sum(1))
    close(found.squared_norms(), flat.square().sum(-1))
    close(found.squares(), rows.square().sum(1))
    everyone = flat.flatten(0, 1)
    close(found.gram(), everyone @ everyone.mT)
    sums = rows.unflatten(1, (clusters, each)).sum(2)
    out = torch.full_like(sums, torch.nan)
    found.add_sums(out, fresh=True)
    close(out, sums)
    found.add_sums(out)
    close(out, 2 * sums)
    some = found.some(slice(1, 3))
    close(some.rows(), rows[:, 1:3])
    close(some.squared_norms(), flat[:, 1:3].square().sum(-1))
    assert found.nbytes == clusters * each * found.some(slice(0, 1)).nbytes > 0


@pytest.mark.parametrize("uses", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("kind", ["outer", "lookup", "lookup of numbers"])
def test_squared_norms_agree_on_both_sides_of_their_threshold(kind, uses):
    # 50 uses of a 3 x 4 weight or a 5 x 2 table take more memory than the gradient; 2 do not
    found, rows = make(kind, 2, 3, uses)
    close(found.squared_norms(), rows.flatten(2).square().sum(-1))


@pytest.mark.parametrize("kind", ["outer", "lookup"])
def test_squared_norms_of_uses_that_cancel_are_not_negative(kind):
    random = torch.Generator().manual_seed(0)
    d = torch.randn(2, 200, 2, 40, generator=random)
    d = torch.cat([d, -d.sum(2, keepdim=True)], 2)  # 0 in all, but for rounding
    if kind == "outer":
        found = Outer(torch.randn(2, 200, 1, 30, generator=random).expand(-1, -1, 3, -1), d)
    else:
        found = Lookup(torch.zeros(2, 200, 3, dtype=torch.int64), d, torch.Size((5, 40)))
    norms = found.squared_norms()
    assert (norms >= 0).all()
    assert norms.max() < 1e-2


@pytest.mark.parametrize("kind", ["outer", "lookup"])
def test_squares_form_no_more_at_once_than_is_kept(kind, monkeypatch):
    random = torch.Generator().manual_seed(0)
    d = torch.randn(2, 64, 2, 40, generator=random)
    if kind == "outer":
        found = Outer(torch.randn(2, 64, 2, 50, generator=random), d)
    else:
        found = Lookup(torch.randint(50, (2, 64, 2), generator=random), d, torch.Size((50, 40)))
    formed = []
    plain = type(found).rows

    def counted(self):
        rows = plain(self)
        formed.append(rows.numel() * rows.element_size())
        return rows

    expected = found.rows().square().sum(1)
    monkeypatch.setattr(type(found), "rows", counted)
    torch.testing.assert_close(found.squares(), expected, rtol=1e-5, atol=1e-5)
    one_sample = 2 * 50 * 40 * 4
    assert max(formed) <= max(found.nbytes, one_sample)


def test_non_finite_gradients_have_norms_that_are_not_finite():
    for kind in KINDS:
        for uses in (1, 2):
            for bad in (torch.nan, torch.inf):
                found, _ = make(kind, 2, 3, uses)
                values = found.values if isinstance(found, Rows) else found.output_gradients
                values[1, 2] = bad
                finite = found.squared_norms().isfinite()
                assert finite.tolist() == [[True] * 3, [True, True, False]], kind


def test_lengths_are_computed_once():
    lengths = SquaredLengths(torch.ones(2, 3, 4))
    assert lengths() is lengths()
    close(lengths(), torch.full((2, 3), 4.0))
