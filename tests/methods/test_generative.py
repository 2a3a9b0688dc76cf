"""GenerativeAdapter: the card's invariants, states as data, and the LoRA they stand for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Case, case
from generated import IDS, attached, logits, ready, same, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.methods.language.generative import Generative, GenerativeConfig
from anyadapter.parts.context import digest, windows
from anyadapter.parts.spectrum import TOLERANCE, leading, randomised

HOSTS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "gptj", "gpt_neo", "opt", "bloom"]
hosts = pytest.mark.parametrize("family", [pytest.param(c, id=c.name) for c in FAMILIES if c.name in HOSTS])
# ------------------------------------------------------------------ absent until something was read


@hosts
def test_a_fresh_generator_and_an_empty_state_change_nothing(family: Case) -> None:
    model, adapter = ready(family, std=0.0)
    with aa.disabled(model):
        before = logits(model)
    state = adapter.read(model, tokens(11))
    assert torch.equal(logits(model, state=state), before)
    for path in adapter.layer_of:
        nn.init.normal_(adapter.generator(path).B.weight)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert not torch.allclose(logits(model, state=state), before, atol=1e-3)
    assert torch.equal(logits(model, state=[None, state])[0], before[0])
    assert torch.equal(logits(model, state=adapter.read(model, tokens(5)) - adapter.read(model, tokens(5))), before)
    aa.detach(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("target", ["self_attention.output", "feed_forward.down"])
@pytest.mark.parametrize("norm", ["frobenius", "spectral", "svd"])
def test_the_update_is_the_papers(target: str, norm: str) -> None:
    model, adapter = ready(norm=norm, targets=target)
    context = tokens(4)
    state = adapter.read(model, context, mode="concat")
    hidden = model(input_ids=context[None], output_hidden_states=True).hidden_states
    for layer, path in enumerate(adapter.layer_of):
        g, h = adapter.generator(path), hidden[layer][0]
        h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * g.norm.weight
        S = (h @ g.A2.weight.T).T @ (h @ g.A3.weight.T)
        torch.testing.assert_close(state.outer[path], S, atol=1e-4, rtol=1e-4)
        u, s, vt = torch.linalg.svd(S)
        scaled = {"frobenius": s / (s.pow(2).sum() + 1e-6).sqrt(), "spectral": s / (s[0] + 1e-6)}
        values = scaled.get(norm, (torch.arange(len(s)) < adapter.config.max_rank).float())
        core, linear = u[:, : len(s)] * values @ vt, model.get_submodule(path)
        x = torch.randn(2, 3, g.A1.in_features)
        with aa.signals(model, state=state), torch.no_grad():
            y = linear(x)
        with aa.disabled(model):
            expected = linear(x) + 10 / 5 * x @ g.A1.weight.T @ core @ g.B.weight.T
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_svd_has_as_many_directions_as_the_context_but_no_more_than_asked(count: int) -> None:
    model, adapter = ready()
    state = adapter.read(model, tokens(count))
    for path in adapter.layer_of:
        core = adapter.known(path, state)
        ones = torch.linalg.svdvals(core[0])
        kept = min(count, adapter.config.max_rank)
        torch.testing.assert_close(ones, (torch.arange(len(ones)) < kept).float(), atol=1e-5, rtol=0)


def test_the_official_svd_fills_short_contexts_with_noise() -> None:
    model, adapter = ready(official=True, inner=12, rank=12, max_rank=8)
    state = adapter.read(model, tokens(2))
    path = next(iter(adapter.layer_of))
    torch.testing.assert_close(torch.linalg.svdvals(adapter.known(path, state)[0])[:8], torch.ones(8))
    torch.manual_seed(5)
    again = adapter.read(model, tokens(2))
    assert torch.equal(adapter.known(path, state), adapter.known(path, again))  # the seed is its own


@pytest.mark.parametrize("norm", ["svd", "spectral", "frobenius"])
@pytest.mark.parametrize("projection", ["A2", "A3"])
def test_the_length_of_keys_and_values_does_not_matter(norm: str, projection: str) -> None:
    model, adapter = ready(norm=norm)
    before = logits(model, state=adapter.read(model, tokens(9), mode="parallel"))
    with torch.no_grad():
        for path in adapter.layer_of:
            getattr(adapter.generator(path), projection).weight.mul_(7.0)
    after = logits(model, state=adapter.read(model, tokens(9), mode="parallel"))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_the_mean_is_the_sum_divided_by_the_windows() -> None:
    model, adapter = ready(norm="frobenius", merge="mean")
    state = adapter.read(model, tokens(12), mode="parallel", window=4)
    path = next(iter(adapter.layer_of))
    total = state.outer[path] / 3
    expected = total / (total.pow(2).sum() + 1e-6).sqrt()
    torch.testing.assert_close(adapter.known(path, state)[0], expected)


# ------------------------------------------------------------------ reading


@given(length=st.integers(1, 60), window=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_windows_have_one_length_and_lose_nothing(length: int, window: int) -> None:
    ids, mask = windows(torch.arange(1, length + 1), window)
    assert len(ids) == -(-length // window)
    assert ids.shape[1] == -(-length // len(ids)) <= window
    assert ids[mask.bool()].tolist() == list(range(1, length + 1))
    assert mask[:-1].all()
    assert mask[-1].any()


@given(
    length=st.integers(1, 24),
    window=st.integers(1, 9),
    at_once=st.integers(1, 7),
    mode=st.sampled_from(["concat", "sequential", "parallel"]),
    old=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_windows_at_once_or_one_by_one(length: int, window: int, at_once: int, mode: str, old: bool) -> None:
    model, adapter = ready(norm="frobenius")
    state = adapter.read(model, tokens(5, seed=7)) if old else None
    read = {"mode": mode, "window": window, "state": state}
    slow = adapter.read(model, tokens(length), **read)
    same(adapter.read(model, tokens(length), at_once=at_once, **read), slow, atol=2e-4, rtol=1e-3)
    assert slow.recipe["reads"][-1]["tokens"] == length


@given(parts=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_in_parallel_windows_have_no_order_and_append_is_one_read(parts: list[int], seed: int) -> None:
    model, adapter = ready()
    whole = tokens(4 * sum(parts), seed)
    together = adapter.read(model, whole, mode="parallel", at_once=3)
    state = None
    for part in whole.view(-1, 4).split(parts):
        state = adapter.read(model, part.flatten(), mode="parallel", state=state)
    same(state, together, atol=1e-4, rtol=1e-4)
    order = torch.randperm(sum(parts), generator=torch.Generator().manual_seed(seed))
    shuffled = adapter.read(model, whole.view(-1, 4)[order].flatten(), mode="parallel")
    same(shuffled, together, atol=1e-4, rtol=1e-4)


@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=3))
@settings(max_examples=20, deadline=None)
def test_states_are_added_and_forgotten(lengths: list[int]) -> None:
    model, adapter = ready()
    states = [adapter.read(model, tokens(n, seed=i), mode="parallel") for i, n in enumerate(lengths)]
    total = states[0]
    for state in states[1:]:
        total = total + state
    chained = None
    for i, n in enumerate(lengths):
        chained = adapter.read(model, tokens(n, seed=i), mode="parallel", state=chained)
    same(total, chained, atol=1e-4, rtol=1e-4)
    left = total - states[0]
    same(left, total - states[0] + states[0] - states[0], atol=1e-4, rtol=1e-4)
    assert len(left.recipe["reads"]) == len(lengths) - 1
    if len(lengths) == 2:
        same(left, states[1], atol=1e-4, rtol=1e-4)


def test_what_was_not_read_cannot_be_forgotten() -> None:
    model, adapter = ready()
    one, other = (adapter.read(model, tokens(6, seed=i)) for i in range(2))
    with pytest.raises(aa.ConfigError, match="6 tokens is to be forgotten that was not read"):
        one - other
    again = ready(norm="spectral")
    with pytest.raises(aa.ConfigError, match="not read with the same config"):
        one + again[1].read(again[0], tokens(6))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    other=st.integers(1, 9),
    mode=st.sampled_from(["sequential", "concat"]),
)
@settings(max_examples=20, deadline=None)
def test_contexts_read_one_after_the_other_are_forgotten_together(lengths: list[int], other: int, mode: str) -> None:
    model, adapter = ready()
    states = [adapter.read(model, tokens(lengths[0]), mode=mode)]
    for i, n in enumerate(lengths[1:], 1):
        states.append(adapter.read(model, tokens(n, seed=i), mode=mode, state=states[-1]))
    chain, beside = states[-1], adapter.read(model, tokens(other, seed=9), mode=mode)
    apart = adapter.read(model, tokens(other, seed=9), mode="parallel")
    extended = adapter.read(model, tokens(other, seed=9), mode="parallel", state=chain)
    for total, left in ((chain + beside, beside), (beside + chain, beside), (extended, apart)):
        same(total - chain, left, atol=1e-4, rtol=1e-4)
        assert [read["after"] for read in (total - chain).recipe["reads"]] == [0]
    same(extended - apart, chain, atol=1e-4, rtol=1e-4)
    same((beside + chain) - beside, chain, atol=1e-4, rtol=1e-4)
    after = adapter.read(model, tokens(2, seed=8), mode=mode, state=chain + beside)
    for part in (chain, beside, *states[:-1]):
        with pytest.raises(aa.ConfigError, match="with others after it that hold something of it"):
            after - part
    assert (after - after).windows == 0


def test_what_is_read_knowing_something_is_not_what_is_read_alone() -> None:
    model, adapter = ready(norm="frobenius")
    before, alone = (adapter.read(model, tokens(6, seed=i)) for i in range(2))
    after = adapter.read(model, tokens(6, seed=1), state=before)
    first, *_, last = adapter.layer_of
    share = after.outer[last] - before.outer[last]
    torch.testing.assert_close(after.outer[first] - before.outer[first], alone.outer[first], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(share, alone.outer[last], atol=1e-2)
    for total, part in ((after, alone), (after, before), (alone, after)):
        with pytest.raises(
            aa.ConfigError, match="6 tokens is to be forgotten that was read into this state in another way"
        ):
            total - part
    twice = before + after
    assert [read["after"] for read in twice.recipe["reads"]] == [0, 0, 1]
    same(twice - after, before, atol=1e-4, rtol=1e-4)
    same(twice - before, after, atol=1e-4, rtol=1e-4)


def test_a_reading_that_is_not_done_is_not_the_whole() -> None:
    model, adapter = ready()
    *_, part, whole = adapter.reading(model, tokens(12), mode="parallel")
    assert [state.recipe["reads"][0]["windows"] for state in (part, whole)] == [2, 3]
    same(whole - whole + part, part, atol=1e-4, rtol=1e-4)
    with pytest.raises(aa.ConfigError, match="in another way"):
        whole - part


@given(length=st.integers(1, 20_000), where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_every_token_of_a_context_counts(length: int, where: float) -> None:
    ids = tokens(length)
    other = ids.clone()
    other[int(where * length)] += 1
    assert digest(ids) == digest(ids.clone()) != digest(other)
    assert digest(ids) != digest(ids[:-1])


def test_a_state_of_another_generator_is_refused_in_use() -> None:
    model, adapter = ready()
    state, mask = adapter.read(model, tokens(6)), torch.ones(2, 7)
    trained = adapter.recall(adapter.record(model, IDS, mask), mask)
    expected = logits(model, state=state)
    with adapter.disabled():
        others = []
        for i, changed in enumerate(({"max_rank": 2}, {"norm": "frobenius"}, {"official": True}, {})):
            other = aa.attach(model, replace(adapter.config, **changed), f"other-{i}")
            assert isinstance(other, Generative)
            other.load_tensors(adapter.tensors())
            others.append(other)
            other.enabled = False
        twin = others[-1]
        with torch.no_grad():
            twin.generator(next(iter(twin.layer_of))).A1.weight.mul_(1.01)
        for other in others:
            other.enabled = True
            for call in (
                lambda: logits(model, state=state),
                lambda: logits(model, state=[None, state]),
                lambda: logits(model, state=trained),
                lambda: logits(model, state=state, sees=torch.ones(2, 2).tril(-1), context_mask=mask),
                lambda other=other: other.read(model, tokens(3), state=state),
                lambda other=other: other.export(state),
            ):
                with pytest.raises(aa.BaseMismatchError, match=f"another generator than '{other.name}'"):
                    call()
            other.enabled = False
        twin.load_tensors(adapter.tensors())
        twin.enabled = True
        torch.testing.assert_close(logits(model, state=state), expected)
        same(twin.read(model, tokens(3), state=state), twin.read(model, tokens(3), state=state))
        twin.enabled = False
    torch.testing.assert_close(logits(model, state=state), expected)


def test_what_is_kept_of_a_state_is_what_the_call_needs() -> None:
    model, adapter = ready(official=True)
    path = next(iter(adapter.layer_of))
    state = adapter.read(model, tokens(2))  # fewer than max_rank: noise, which the guard of training drops
    used = adapter.known(path, state)
    adapter.train()
    guarded = adapter.known(path, state)
    assert used.any()
    assert torch.equal(guarded, adapter.normalised(state.outer[path][None], torch.ones(1)))
    adapter.eval()
    assert adapter.known(path, state) is used
    hidden = adapter.record(model, IDS, torch.ones(2, 7))
    trained = adapter.recall(hidden, torch.ones(2, 7))
    with torch.no_grad():
        assert not adapter.known(path, trained).requires_grad
    assert adapter.known(path, trained).requires_grad


def test_states_without_a_recipe_are_for_use_alone() -> None:
    model, adapter = ready()
    state, mask = adapter.read(model, tokens(6)), torch.ones(2, 7)
    for bare in (adapter.read_windows(model, IDS, mask), adapter.recall(adapter.record(model, IDS, mask), mask)):
        for call in (state.__add__, state.__sub__, bare.__add__, bare.__sub__):
            with pytest.raises(aa.ConfigError, match="does not say what was read into it"):
                call(bare)
        with pytest.raises(aa.ConfigError, match="does not say what was read into it"):
            adapter.read(model, tokens(3), state=bare)
        assert logits(model, state=bare).isfinite().all()


def test_the_order_matters_when_windows_are_read_one_after_the_other() -> None:
    model, adapter = ready(norm="frobenius")
    context = tokens(8).view(2, 4)
    there, back = (adapter.read(model, c.flatten()) for c in (context, context.flip(0)))
    first, *_, last = adapter.layer_of
    torch.testing.assert_close(there.outer[first], back.outer[first])  # before it, no adapter has acted
    assert not torch.allclose(there.outer[last], back.outer[last], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(side: str) -> None:
    model, adapter = ready()
    ids, mask = tokens(5)[None], torch.ones(1, 5, dtype=torch.long)
    alone = adapter.read_windows(model, ids, mask)
    pad = (3, 0) if side == "left" else (0, 3)
    ids, mask = (nn.functional.pad(t, pad) for t in (ids, mask))
    same(adapter.read_windows(model, ids, mask), alone, atol=1e-4, rtol=1e-4)


def test_each_row_has_its_own_state() -> None:
    model, adapter = ready()
    states = [adapter.read(model, tokens(6, seed=i)) for i in range(2)]
    both = logits(model, state=states)
    for i, state in enumerate(states):
        torch.testing.assert_close(both[i : i + 1], logits(model, IDS[i : i + 1], state), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both, logits(model, state=states[::-1]), atol=1e-3)


def test_generation_from_a_cache_is_as_without() -> None:
    model, adapter = ready()
    with aa.signals(model, state=adapter.read(model, tokens(6))):
        fast, slow = (model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(fast, slow)
    assert not torch.equal(fast, model.generate(IDS, max_new_tokens=6, do_sample=False))


# ------------------------------------------------------------------ training


def grad(model: nn.Module, adapter: Generative, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    adapter.zero_grad()
    call().pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


def chain(model: nn.Module) -> Tensor:
    """Three rows, each of which knows those before it; only the last is asked."""
    ids = tokens(21).view(3, 7)
    with aa.signals(model, sees=torch.ones(3, 3).tril(-1), context_mask=torch.ones(3, 7)):
        return model(input_ids=ids).logits[-1]


def test_gradients_reach_the_generator_alone_and_pass_through_what_was_read() -> None:
    model, adapter = ready()
    found = grad(model, adapter, lambda: chain(model))
    assert all(g.abs().sum() > 0 for g in found.values())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))
    # Row 1 alone passes on what row 0 left in it at layer 0: its S at layer 1 depends on that generator.
    ids, sees = tokens(21).view(3, 7), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0.0]])
    asked = {"sees": sees, "context_mask": torch.ones(3, 7)}
    last = adapter.generator(list(adapter.layer_of)[-1])
    recorded: list[Tensor] = []
    outer = last.outer
    last.outer = lambda h, m: recorded.append(outer(h, m)) or recorded[-1]  # type: ignore[method-assign]
    with aa.signals(model, **asked):
        model(input_ids=ids)
    first = adapter.generator(next(iter(adapter.layer_of)))
    assert torch.autograd.grad(recorded[0][1].sum(), first.B.weight)[0].abs().sum() > 0


def test_a_record_gives_the_gradients_of_a_joint_call() -> None:
    model, adapter = ready(norm="frobenius")
    context, mask = tokens(7)[None], torch.ones(1, 7)

    def joint() -> Tensor:
        ids = torch.cat([context, IDS])
        read = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0.0]])
        with aa.signals(model, sees=read, context_mask=torch.ones(3, 7) * torch.tensor([[1], [0], [0]])):
            return model(input_ids=ids).logits[1:]

    hidden = adapter.record(model, context, mask)

    def apart() -> Tensor:
        with aa.signals(model, state=adapter.recall(hidden, mask)):
            return model(input_ids=IDS).logits

    torch.testing.assert_close(apart(), joint(), atol=1e-5, rtol=1e-4)
    one, other = grad(model, adapter, joint), grad(model, adapter, apart)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-3)


def test_a_checkpointed_or_copied_model_gives_the_same() -> None:
    model, adapter = ready(norm="frobenius")
    expected = grad(model, adapter, lambda: chain(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin = aa.adapters(other)["default"]
        assert isinstance(twin, Generative)
        for name, gradient in grad(other, twin, lambda model=other: chain(model)).items():
            torch.testing.assert_close(gradient, expected[name])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter.zero_grad()
    asked = {"sees": torch.ones(3, 3).tril(-1), "context_mask": torch.ones(3, 7)}
    with aa.signals(model, **asked):
        model(input_ids=tokens(21).view(3, 7)).logits[-1].pow(2).mean().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_compiled_model_follows_the_state() -> None:
    model, adapter = ready()
    states = [None, adapter.read(model, tokens(6)), adapter.read(model, tokens(6, seed=1))]
    expected = [logits(model, state=state) for state in states]
    compiled = torch.compile(model, backend="eager")
    for state, result in zip(states * 2, expected * 2):
        torch.testing.assert_close(logits(compiled, state=state), result)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    rank=st.integers(1, 6),
    kept=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_gradient_of_the_svd_norm(rows: int, columns: int, rank: int, kept: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.arange(min(rows, columns, rank), 0, -1.0) + torch.rand(min(rows, columns, rank)) / 2
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.double))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.double))[0]
    matrix = (left * values.double() @ right.mT).requires_grad_()
    result = leading(matrix, kept)
    q = min(kept, len(values))
    torch.testing.assert_close(result, left[:, :q] @ right[:, :q].mT)
    weight = torch.randn_like(matrix)
    (gradient,) = torch.autograd.grad((result * weight).sum(), matrix)
    step = left @ torch.randn(len(values), len(values), dtype=torch.double) @ right.mT  # within the matrix's directions
    ahead, behind = (leading(matrix.detach() + 1e-6 * sign * step, kept) for sign in (1, -1))
    numeric = ((ahead - behind) * weight).sum() / 2e-6
    torch.testing.assert_close((gradient * step).sum(), numeric, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "matrix", [torch.eye(4), torch.zeros(4, 4), torch.ones(4, 3), torch.diag(torch.tensor([2, 2, 2, 1.0]))]
)
def test_equal_singular_values_leave_gradients_finite(matrix: Tensor) -> None:
    matrix = matrix[None].clone().requires_grad_()
    for rank in (1, 2, 3):
        (gradient,) = torch.autograd.grad(leading(matrix, rank).sum(), matrix)
        assert gradient.isfinite().all()
    assert 0 < TOLERANCE < 1e-3


def test_the_officials_guard_drops_adapters_with_close_singular_values() -> None:
    torch.manual_seed(0)
    sound, close = torch.diag(torch.tensor([4.0, 3, 2, 1])), torch.eye(4)
    pair = torch.stack([sound, close])
    kept = randomised(pair, 4, guard=True)
    torch.testing.assert_close(kept[0], torch.eye(4), atol=1e-5, rtol=0)
    assert (kept[1] == 0).all()
    assert (randomised(pair, 4, guard=False)[1] != 0).any()


def test_a_half_precision_base_is_read_in_fp32() -> None:
    model = case("llama").build().to(torch.bfloat16)
    adapter = attached(model)
    assert {t.dtype for t in adapter.tensors().values()} == {torch.float32}
    state = adapter.read(model, tokens(6))
    assert {S.dtype for S in state.outer.values()} == {torch.float32}
    out = logits(model, state=state)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    core = next(iter(state.cores.values()))
    assert core.dtype == torch.float32
    torch.testing.assert_close(torch.linalg.svdvals(core[0])[:3], torch.ones(3), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(S.dtype == torch.float32 for S in adapter.read(model, tokens(6)).outer.values())


# ------------------------------------------------------------------ errors and settings


def test_calls_that_are_refused() -> None:
    model, adapter = ready()
    state = adapter.read(model, tokens(5))
    for call, error, message in (
        (lambda: adapter.read(model, "text"), aa.ConfigError, "pass the base's tokenizer"),
        (lambda: adapter.read(model, []), aa.ConfigError, "one row of token ids"),
        (lambda: adapter.read(model, IDS), aa.ConfigError, r"not \(2, 7\)"),
        (lambda: adapter.read(model, [1, 2], mode="serial"), aa.ConfigError, "no mode 'serial'"),
        (lambda: adapter.export(state, 0), aa.ConfigError, "rank is 0"),
        (lambda: adapter.read(case("llama").build(), [1, 2]), aa.AttachError, "not attached to this model"),
        (lambda: logits(model, state="yes"), aa.SignalError, "is a str; expected a State"),
        (lambda: logits(model, state=[state] * 3), aa.SignalError, "3 states for 2 rows"),
    ):
        with pytest.raises(error, match=message):
            call()
    with aa.signals(model, sees=torch.ones(3, 3), context_mask=torch.ones(2, 7)), pytest.raises(aa.SignalError) as info:
        model(input_ids=IDS)
    assert "(2, 2) and (2, 7)" in str(info.value)
    with aa.signals(model, sees=torch.ones(2, 2)), pytest.raises(aa.SignalError, match="context_mask"):
        model(input_ids=IDS)
    with adapter.disabled(), pytest.raises(aa.AttachError, match="is disabled"):
        adapter.read(model, [1, 2])
    assert adapter.products is None
    assert not adapter.signals.values


@given(
    norm=st.sampled_from(["svd", "frobenius", "spectral"]),
    merge=st.sampled_from(["sum", "mean"]),
    layers=st.one_of(st.none(), st.lists(st.integers(-4, 4), min_size=1).map(tuple)),
)
@settings(max_examples=20)
def test_settings_survive_their_dictionary(norm: Any, merge: Any, layers: Any) -> None:
    config = GenerativeConfig(norm=norm, merge=merge, layers=layers, targets=("o_proj",), official=True)
    assert GenerativeConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm": "softmax"}, "norm is 'softmax'; it must be 'svd', 'frobenius' or 'spectral'"),
        ({"merge": "max"}, "merge is 'max'"),
        ({"inner": 0}, "inner is 0; it must be a positive integer"),
        ({"rank": 64, "inner": 32, "max_rank": 33}, "max_rank is 33; it must be at most 32"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(aa.ConfigError) as error:
        GenerativeConfig(**config)
    assert message in str(error.value)


def test_the_papers_sizes_on_seven_billion_parameters() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig())
        adapter = aa.attach(model, GenerativeConfig())
    assert round(adapter.parameter_count() / 1e6) == 537
    assert len(adapter.layer_of) == 32
    assert replace(adapter.config, norm="frobenius").generated_rank == 1024
    lora = 32 * 2 * adapter.config.generated_rank * 4096
    assert round(lora / 1e6, 1) == 33.6


def test_a_real_model(smollm: nn.Module, smollm_tokenizer: Any) -> None:
    text = "Nora lives in Lima. Omar lives in Oslo."
    adapter = aa.attach(smollm, GenerativeConfig(inner=32, rank=32, max_rank=8, layers=(-4, -3, -2, -1)))
    assert isinstance(adapter, Generative)
    question = smollm_tokenizer("Nora lives in", return_tensors="pt")["input_ids"]
    state = adapter.read(smollm, text, tokenizer=smollm_tokenizer)
    before = logits(smollm, question)
    assert torch.equal(logits(smollm, question, state), before)
    for path in adapter.layer_of:
        nn.init.normal_(adapter.generator(path).B.weight, std=0.1)
    used = logits(smollm, question, state)
    assert not torch.allclose(used, before, atol=1e-2)
    config, tensors = adapter.export(state)
    aa.attach(smollm, config, "lora").load_tensors(tensors)
    torch.testing.assert_close(logits(smollm, question), used, atol=1e-2, rtol=1e-3)


def test_windows_filled_up_say_the_same() -> None:
    """Of 19 tokens in two windows, of 10 and 9: filled up to 16, and to 12 where the window is no longer."""
    model, adapter = ready()
    lengths: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    plain = adapter.read(model, tokens(19), window=12)
    for window, wanted in ((12, 12), (18, 16)):
        lengths.clear()
        *_, filled = adapter.reading(model, tokens(19), window=window, multiple=16)
        assert lengths == [wanted, wanted]
        same(filled, plain, atol=1e-5, rtol=1e-4)
