"""The Reformer with a cache: steps equal the forward over all tokens; generation."""

import pytest
import torch
from helpers.tiny_reformer import config, ids, model

from pyfast import ReformerCache


def test_a_refused_call_leaves_the_cache_as_it_was():
    m, x = model(n_buckets=4).eval(), ids(30)
    cache, other = ReformerCache(m), ReformerCache(m)
    m(x[:, :20], cache=cache), m(x[:, :20], cache=other)
    with pytest.raises(
        ValueError, match="n_hashes is 7; it must be the 2 that cache was begun with"
    ):
        m(x[:, 20:21], cache=cache, n_hashes=7)
    assert (
        torch.equal(m(x[:, 20:21], cache=cache), m(x[:, 20:21], cache=other)) and cache.length == 21
    )
    with pytest.raises(ValueError, match="cache is of another model"):
        model().eval()(x, cache=cache)


def test_a_cache_of_a_compiled_model_is_of_the_model_inside():
    m, x = model(layers=("local",)).eval(), ids(30)
    compiled = torch.compile(m, backend="eager")
    cache, other = ReformerCache(compiled), ReformerCache(m)
    assert torch.equal(m(x, cache=cache), m(x, cache=other)) and cache.length == 30
    cache.check(compiled._orig_mod)
    with pytest.raises(TypeError, match="model must be a Reformer, not Linear"):
        ReformerCache(torch.nn.Linear(2, 2))


def test_a_step_keeps_no_graph():
    m, x = model(layers=("local",)).eval(), ids(30)
    cache = ReformerCache(m)
    m(x, cache=cache)
    held = [tensor for layer in cache.layers for tensor in layer.held.values()]
    assert len(held) == 3 and not any(tensor.requires_grad for tensor in held)


@pytest.mark.parametrize("positions", ["axial", "learned", "rotary", "none"])
@pytest.mark.parametrize("steps", [[1] * 10, [16, 1, 1, 5]], ids=str)
def test_steps_with_a_cache_are_the_whole_where_buckets_do_not_matter(positions, steps):
    m, x = model(positions=positions, layers=("local", "local")).eval(), ids(sum(steps))
    cache, found = ReformerCache(m), []
    for some in x.split(steps, 1):
        found.append(m(some, cache=cache))
    assert (torch.cat(found, 1) - m(x)).abs().max() < 1e-4


@pytest.mark.parametrize("positions", ["axial", "rotary"])
def test_the_last_step_is_the_whole_of_one_layer(positions, device):
    m, x = (
        model(positions=positions, layers=("lsh",), n_buckets=4).to(device).eval(),
        ids(70, device=device),
    )
    cache = ReformerCache(m)
    m(x[:, :50], cache=cache)
    for i in range(50, 70):
        last = m(x[:, i : i + 1], cache=cache)
        assert (last[:, 0] - m(x[:, : i + 1])[:, -1]).abs().max() < 1e-4
    cache.reorder(torch.tensor([1, 0], device=device))
    x = x.flip(0)
    last = m(x[:, :1], cache=cache)
    assert (
        cache.length == 71
        and (last[:, 0] - m(torch.cat([x, x[:, :1]], 1))[:, -1]).abs().max() < 1e-4
    )


def test_greedy_generation_takes_the_most_likely(device):
    m, x = model(layers=("local",)).to(device), ids(9, device=device)
    found = m.generate(x, 8)
    for i in range(9, 17):
        assert torch.equal(found[:, i], m.eval()(found[:, :i])[:, -1].argmax(-1))
    assert torch.equal(found[:, :9], x)


def test_generation_leaves_the_model_in_training():
    m = model(dropout=0.5)
    assert (
        torch.equal(m.generate(ids(9).fill_(1), 4), m.generate(ids(9).fill_(1), 4)) and m.training
    )


def test_generation_ends():
    m, x = model(layers=("local",)).eval(), ids(9)
    first = m.generate(x, 1)[:, -1]
    m.config = config(layers=("local",), end_id=int(first[0]))
    found = m.generate(x, 20)
    rest = found[0, 9:]
    assert bool((rest == first[0]).all())
    assert m.generate(x[:1], 20).shape[1] == 10


def test_draws_are_the_generator_s_and_of_the_most_likely():
    m, x = model().eval(), ids(9, 1).expand(200, -1)

    def draw(**options):
        return m.generate(x, 1, generator=torch.Generator().manual_seed(3), **options)[:, -1]

    probabilities = m(x[:1])[0, -1].softmax(-1)
    assert torch.equal(draw(temperature=1.0), draw(temperature=1.0))
    assert len(draw(temperature=5.0).unique()) > 10
    assert set(draw(temperature=1.0, top_k=3).tolist()) <= set(
        probabilities.topk(3).indices.tolist()
    )
    assert set(draw(temperature=1.0, top_k=1).tolist()) == {int(probabilities.argmax())}
    ranked = probabilities.sort(descending=True)
    kept = int((ranked.values.cumsum(0) < 0.3).sum()) + 1
    assert set(draw(temperature=1.0, top_p=0.3).tolist()) <= set(ranked.indices[:kept].tolist())
