"""Poly and MHR: the invariants of their card, tasks by name, and the ways from many tasks to one."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.layouts import by_name
from anyadapter.formats.native import restore
from anyadapter.methods.language.mhr import MHR, MHRConfig, Tasks
from anyadapter.parts.routing import discreteness, efficiency, groups_of, sparsity
from anyadapter.quantize import quantised
from anyadapter.training.objectives import choice_loss, label_smoothed_loss

NAMES = ("rte", "cb", "wic")
HOSTS = ("bert", "gpt2", "llama", "t5", "bart", "gptj")
hosts = pytest.mark.parametrize("family", HOSTS)


def build(family: str) -> nn.Module:
    return case(family).build().requires_grad_(False)


def attached(model: nn.Module, std: float | None = 0.3, name: str = "default", **config: Any) -> MHR:
    """An adapter of three tasks; with ``std``, all its tensors are drawn anew."""
    settings = {"tasks": NAMES, "rank": 2, "skills": 3, "splits": 4, **config}
    adapter = aa.attach(model, MHRConfig(**settings), name)
    assert isinstance(adapter, MHR)
    for parameter in adapter.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return adapter


def again(model: nn.Module, new: tuple[aa.AdapterConfig, dict[str, Tensor]], name: str = "new") -> aa.Adapter:
    """The adapter of these settings and tensors, in place."""
    adapter = aa.attach(model, new[0], name)
    adapter.load_tensors(new[1])
    return adapter


@torch.no_grad()
def outputs(family: str, model: nn.Module, batch: int = 3, **signals: Any) -> Tensor:
    given = case(family)
    if not signals:
        return given.output(model(**given.inputs(model, batch)))
    with aa.signals(model, **signals):
        return given.output(model(**given.inputs(model, batch)))


sizes = st.fixed_dictionaries(
    {
        "d": st.integers(1, 3),
        "o": st.integers(1, 3),
        "splits": st.integers(1, 4),
        "skills": st.integers(1, 4),
        "rank": st.integers(1, 3),
        "tokens": st.integers(1, 3),
        "seed": st.integers(0, 999),
    }
)


def linear(size: dict[str, int], **config: Any) -> tuple[nn.Module, MHR, Tensor]:
    """A single linear with an adapter on it, and an input of three rows."""
    torch.manual_seed(size["seed"])
    s = size["splits"]
    model = nn.Sequential(nn.Linear(s * size["d"], s * size["o"]))
    size = {**size, "rank": min(size["rank"], s * max(size["d"], size["o"]))}
    chosen = {k: size[k] for k in ("splits", "skills", "rank")}
    return (
        model,
        attached(model, 0.7, targets="0", **{**chosen, **config}),
        torch.randn(3, size["tokens"], s * size["d"]),
    )


@torch.no_grad()
def run(model: nn.Module, x: Tensor, tasks: Any = NAMES) -> Tensor:
    with aa.signals(model, task_ids=tasks):
        return model(x)


# ------------------------------------------------------------------ the card's invariants


@hosts
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(family: str) -> None:
    model = build(family)
    before = outputs(family, model)
    adapter = attached(model, None)
    nn.init.normal_(next(p for n, p in adapter.named_parameters() if n.endswith("module_logits")))
    assert torch.equal(outputs(family, model, task_ids=NAMES), before)
    aa.detach(model)
    adapter = attached(model)
    one, two = (outputs(family, model, task_ids=task) for task in ("rte", "cb"))
    assert not torch.allclose(one, before, atol=1e-4)
    assert not torch.allclose(one, two, atol=1e-4)
    with aa.disabled(model):
        assert torch.equal(outputs(family, model), before)
    adapter.scale = 0
    assert torch.equal(outputs(family, model, task_ids="rte"), before)


@settings(max_examples=30, deadline=None)
@given(size=sizes, alpha=st.floats(-4, 4))
def test_each_row_has_its_own_mixture_head_by_head(size: dict[str, int], alpha: float) -> None:
    model, adapter, x = linear(size, alpha=alpha)
    z, a, b = (adapter.tensors()[f"0.{name}"] for name in ("selector.module_logits", "lora_a", "lora_b"))
    expected = []
    for task, row in enumerate(x):
        weights = torch.sigmoid(z[task]).view(size["splits"], size["skills"])
        weights = weights / weights.sum(-1, keepdim=True)
        big_a = torch.cat([sum(w * each for w, each in zip(weights[s], a[s])) for s in range(size["splits"])], dim=0)
        big_b = torch.cat([sum(w * each for w, each in zip(weights[s], b[s])) for s in range(size["splits"])], dim=1)
        expected.append(model[0].forward.base(row) + alpha / adapter.config.rank * row @ big_a @ big_b)
    torch.testing.assert_close(run(model, x), torch.stack(expected).detach(), atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(size=sizes, order=st.permutations([0, 1, 2]))
def test_batches_do_not_matter_and_collapsing_is_exact(size: dict[str, int], order: list[int]) -> None:
    model, adapter, x = linear(size)
    mixed = run(model, x)
    torch.testing.assert_close(run(model, x[order], [NAMES[i] for i in order]), mixed[order])
    for i, task in enumerate(NAMES):
        torch.testing.assert_close(run(model, x[i : i + 1], task)[0], mixed[i])
    for i, task in enumerate(NAMES):
        again(model, adapter.collapse(task), f"lora-{task}")
        torch.testing.assert_close(alone(model, x, f"lora-{task}")[i], mixed[i])


@torch.no_grad()
def alone(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The output with one adapter on and no other."""
    with aa.disabled(model, *(other for other in aa.adapters(model) if other != name)):
        return model(x)


@settings(max_examples=30, deadline=None)
@given(size=sizes, parts=st.integers(1, 3))
def test_poly_cut_into_heads_is_the_same_function(size: dict[str, int], parts: int) -> None:
    model, adapter, x = linear({**size, "d": size["d"] * parts, "o": size["o"] * parts})
    before = run(model, x)
    new = adapter.with_splits(size["splits"] * parts)
    aa.detach(model)
    again(model, new, "default")
    torch.testing.assert_close(run(model, x), before)


@settings(max_examples=30, deadline=None)
@given(size=sizes)
def test_one_skill_is_a_plain_lora_and_equal_rows_are_the_average(size: dict[str, int]) -> None:
    model, adapter, x = linear({**size, "skills": 1})
    a, b = adapter.tensors()["0.lora_a"], adapter.tensors()["0.lora_b"]
    big_a, big_b = a[:, 0].flatten(0, 1), torch.cat(list(b[:, 0]), dim=1)
    expected = model[0].forward.base(x) + x @ big_a @ big_b / adapter.config.rank
    torch.testing.assert_close(run(model, x), expected.detach(), atol=1e-4, rtol=1e-4)
    model, adapter, x = linear(size)
    with torch.no_grad():
        adapter.tensors()["0.selector.module_logits"].fill_(0.37)
    routed, new = run(model, x), adapter.to_average()
    aa.detach(model)
    average = again(model, new)
    assert average.reads == ()
    torch.testing.assert_close(model(x).detach(), routed)


@settings(max_examples=30, deadline=None)
@given(size=sizes, data=st.data())
def test_the_order_of_skills_is_free_and_a_constant_added_to_z_is_not(
    size: dict[str, int], data: st.DataObject
) -> None:
    model, adapter, x = linear(size)
    before, tensors = run(model, x), adapter.tensors()
    order = data.draw(st.permutations(range(size["skills"])))
    shape = (3, size["splits"], size["skills"])
    z = tensors["0.selector.module_logits"].detach().view(shape)
    moved = {"0.lora_a": tensors["0.lora_a"].detach()[:, order], "0.lora_b": tensors["0.lora_b"].detach()[:, order]}
    adapter.load_tensors({**moved, "0.selector.module_logits": z[..., order].flatten(1)})
    torch.testing.assert_close(run(model, x), before)
    adapter.load_tensors({**moved, "0.selector.module_logits": z[..., order].flatten(1) + 2})
    if size["skills"] > 1:
        assert not torch.allclose(run(model, x), before, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(size=sizes, weights=st.sampled_from(["sigmoid", "relaxed", "straight-through"]), train=st.booleans())
def test_weights_are_shares(size: dict[str, int], weights: str, train: bool) -> None:
    model, adapter, _ = linear(size, weights=weights)
    model.train(train)
    alpha = adapter.routed_branches()["0"].selector(torch.tensor([0, 1, 2, 0]))
    assert alpha.shape == (4, size["splits"], size["skills"])
    assert (alpha >= 0).all()
    total = alpha.sum(-1)
    ones = torch.ones_like(total)
    torch.testing.assert_close(total, torch.where(total == 0, total, ones) if weights == "straight-through" else ones)


def test_a_row_of_z_learns_from_its_task_alone_and_the_average_moves_all_skills_alike() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 2, 8)
    adapter = attached(model, targets="0")
    z = adapter.tensors()["0.selector.module_logits"]
    with aa.signals(model, task_ids=[0, 2, 2, 0]):
        model(x).pow(2).sum().backward()
    assert z.grad is not None
    assert z.grad[1].abs().max() == 0
    assert (z.grad[[0, 2]].abs().sum(1) > 0).all()
    adapter.zero_grad()
    adapter.train_only("routing")
    assert [n for n, p in adapter.named_parameters() if p.requires_grad] == ["branches./0.selector.module_logits"]
    new = adapter.to_average()
    aa.detach(model)
    average = again(model, new)
    average.train_only("inventory")
    model(x).pow(2).sum().backward()
    for tensor in average.tensors().values():
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, tensor.grad[:, :1].expand_as(tensor.grad))


def test_private_skills_are_one_lora_a_task() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 2, 8)
    adapter = attached(model, targets="0", selector="private", splits=1)
    a, b = adapter.tensors()["0.lora_a"][0], adapter.tensors()["0.lora_b"][0]
    torch.testing.assert_close(run(model, x), (model[0].forward.base(x) + x @ a @ b / 2).detach())
    with pytest.raises(aa.ConfigError, match="no rows to add"):
        adapter.with_task("new")


# ------------------------------------------------------------------ tasks


def test_tasks_by_name_number_and_tensor() -> None:
    model = build("llama")
    attached(model)
    byname = outputs("llama", model, task_ids=["cb", "wic", "cb"])
    assert torch.equal(outputs("llama", model, task_ids=[1, 2, 1]), byname)
    assert torch.equal(outputs("llama", model, task_ids=torch.tensor([1, 2, 1])), byname)
    one = outputs("llama", model, task_ids=["cb"] * 3)
    for task in ("cb", 1, torch.tensor(1)):
        torch.testing.assert_close(outputs("llama", model, task_ids=task), one)


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        ("rtf", r"no task 'rtf'\. Did you mean 'rte'"),
        (3, r"no task 3\. There are 3: rte, cb, wic"),
        (-1, "no task -1"),
        (torch.tensor([0, 3, 1]), "no task 3"),
        (torch.tensor([0, -1, 1]), "no task -1"),
        (torch.tensor([0.5, 1.0, 1.0]), "expected integers"),
        (["rte", "cb"], "2 task_ids, and a module inside works on 3 rows"),
        (Tasks(["rte", "cb"], copies=2), "2 task_ids, and a module inside works on 3 rows"),
    ],
)
def test_what_is_not_a_task_is_refused_by_name(task_ids: Any, message: str) -> None:
    model = build("llama")
    attached(model)
    with pytest.raises(aa.SignalError, match=message):
        outputs("llama", model, task_ids=task_ids)


def test_a_missing_task_is_an_error_and_an_average_needs_none() -> None:
    model = build("llama")
    adapter = attached(model)
    with pytest.raises(aa.SignalError, match="needs the signal 'task_ids'"):
        outputs("llama", model)
    new = adapter.to_average()
    aa.detach(model)
    again(model, new)
    outputs("llama", model)
    with pytest.raises(aa.SignalError, match="No attached adapter reads"):
        outputs("llama", model, task_ids="rte")


def test_beams_are_told_and_the_ids_stay_as_they_are() -> None:
    model, family = build("t5"), case("t5")
    attached(model)
    ids = torch.tensor([0, 2])
    inputs = {k: v for k, v in family.inputs(model, 2).items() if k != "decoder_input_ids"}
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with aa.signals(model, task_ids=Tasks(ids, copies=3)):
        both = model.generate(**inputs, **options)
    assert ids.tolist() == [0, 2]
    for row, task in enumerate(ids.tolist()):
        with aa.signals(model, task_ids=task):
            one = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **options)
        assert torch.equal(both[row], one[0])
    with pytest.raises(aa.SignalError, match="copies"), aa.signals(model, task_ids=ids):
        model.generate(**inputs, **options)


def test_a_new_task_beside_the_others_or_alone() -> None:
    model = build("llama")
    adapter = attached(model)
    before = outputs("llama", model, task_ids=NAMES)
    copied, alone_, uniform = (
        adapter.with_task("boolq", init, alone=only)
        for init, only in (("copy:cb", False), ("copy:cb", True), ("uniform", True))
    )
    aa.detach(model)
    assert copied[0].tasks == (*NAMES, "boolq")
    assert alone_[0].tasks == ("boolq",)
    more = again(model, copied)
    assert torch.equal(outputs("llama", model, task_ids=NAMES), before)
    expected = outputs("llama", model, task_ids="cb")
    assert torch.equal(outputs("llama", model, task_ids="boolq"), expected)
    assert isinstance(more, MHR)
    average = more.to_average()
    aa.detach(model, "new")
    again(model, alone_)
    assert torch.equal(outputs("llama", model, task_ids="boolq"), expected)
    aa.detach(model, "new")
    again(model, uniform)
    evenly = outputs("llama", model, task_ids="boolq")
    aa.detach(model, "new")
    again(model, average)
    torch.testing.assert_close(outputs("llama", model), evenly)


@pytest.mark.parametrize("selector", ["learned", "private"])
def test_each_task_from_the_run_it_was_best_in(selector: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("llama")
    runs = {"early": attached(model, name="early", selector=selector)}
    runs["late"] = again(model, (runs["early"].config, runs["early"].tensors()), "late")
    ends = ".module_logits" if selector == "learned" else (".lora_a", ".lora_b")
    for name, tensor in runs["late"].tensors().items():
        if name.endswith(ends):
            nn.init.normal_(tensor)
    aa.save_pretrained(model, tmp_path / "early", "early")

    def alone(name: str, task: str) -> Tensor:
        with aa.disabled(model, *(other for other in aa.adapters(model) if other != name)):
            return outputs("llama", model, task_ids=task)

    expected = [alone(run, task) for run, task in zip(("late", "early", "late"), NAMES)]
    assert not torch.allclose(alone("late", "cb"), expected[1], atol=1e-2)
    aa.slice_merge(model, {0: "late", 1: tmp_path / "early", 2: "late"}, "best")
    assert all(torch.equal(alone("best", task), logits) for task, logits in zip(NAMES, expected))


def test_what_has_no_part_for_each_task_is_not_sliced() -> None:
    model = build("llama")
    attached(model, name="one"), attached(model, name="other")
    with pytest.raises(aa.ConfigError, match="lora_a is shared by all slices and differs between 'one' and 'other'"):
        aa.slice_merge(model, {0: "one", 1: "other", 2: "one"})
    again(model, aa.adapters(model)["one"].to_average(), "average")  # type: ignore[attr-defined]
    with pytest.raises(aa.ConfigError, match="MHR cannot slice_merge; it can: average, route, scale"):
        aa.slice_merge(model, {0: "average"})


@pytest.mark.parametrize("form", ["dense", "in training", "packed"])
def test_all_ways_to_a_new_adapter_keep_the_scale_and_what_is_computed_with(form: str) -> None:
    model = build("llama")
    adapter = attached(model, alpha=3.0, granularity="layer", normalise=True)
    adapter.scale, adapter.uniformity = 0.4, 0.5
    if form != "dense":
        aa.quantize(adapter, bits=2)
    if form == "packed":
        aa.pack(adapter)
    before, one = (outputs("llama", model, task_ids=task) for task in (NAMES, "cb"))
    news = {
        "task": adapter.with_task("boolq", "copy:cb"),
        "alone": adapter.with_task("boolq", "copy:cb", alone=True),
        "splits": adapter.with_splits(8),
        "collapsed": adapter.collapse("cb"),
        "average": adapter.to_average(),
    }
    adapter.uniformity = 1.0
    even, found = outputs("llama", model, task_ids="cb"), {}
    aa.detach(model)
    for way, new in news.items():
        made = again(model, new)
        assert made.scale == 1
        assert not quantised(made)
        signals = {"task": {"task_ids": NAMES}, "splits": {"task_ids": NAMES}, "alone": {"task_ids": "boolq"}}
        found[way] = outputs("llama", model, **signals.get(way, {}))
        if way == "task":
            torch.testing.assert_close(outputs("llama", model, task_ids="boolq"), one, atol=1e-5, rtol=1e-5)
        aa.detach(model, "new")
    expected = {"task": before, "splits": before, "alone": one, "collapsed": one, "average": even}
    for way in news:
        torch.testing.assert_close(
            found[way], expected[way], atol=1e-5, rtol=1e-5, msg=lambda m, way=way: f"{way}: {m}"
        )


def test_a_fresh_row_is_nearly_uniform_and_bad_starts_are_refused() -> None:
    adapter = attached(build("llama"))
    fresh = [t for n, t in adapter.with_task("x", alone=True)[1].items() if n.endswith("logits")]
    assert all(0 < t.abs().max() <= 1e-3 and t.shape[0] == 1 for t in fresh)
    with pytest.raises(aa.ConfigError, match="already"):
        adapter.with_task("cb")
    with pytest.raises(aa.ConfigError, match=r"not 'copy:cc'. Did you mean 'cb'"):
        adapter.with_task("x", "copy:cc")
    with pytest.raises(aa.ConfigError, match="Name the task"):
        adapter.collapse()
    with pytest.raises(aa.ConfigError, match="multiple"):
        adapter.with_splits(6)


# ------------------------------------------------------------------ what shares a selector


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("t5", {"linear": 36, "sublayer": 10, "layer": 4, "stack": 2, "model": 1}),
        ("bart", {"linear": 32, "sublayer": 10, "layer": 4, "stack": 2, "model": 1}),
        ("bert", {"linear": 12, "sublayer": 4, "layer": 2, "stack": 1, "model": 1}),
        ("llama", {"linear": 14, "sublayer": 4, "layer": 2, "stack": 1, "model": 1}),
        ("gpt2", {"linear": 8, "sublayer": 4, "layer": 2, "stack": 1, "model": 1}),
    ],
)
def test_groups_come_from_the_hosts_structure(family: str, counts: dict[str, int]) -> None:
    model = build(family)
    layers = aa.Host.of(model).paths("layer")
    paths = [p for p in aa.Host.of(model).paths("all-linear") if any(p.startswith(f"{layer}.") for layer in layers)]
    for granularity, count in counts.items():
        groups = groups_of(aa.Host.of(model), paths, granularity)
        assert len(set(groups.values())) == count, granularity
    if family in ("t5", "bart"):
        by_layer = groups_of(aa.Host.of(model), paths, "layer")
        sides = {path: "encoder" if "encoder." in path and "decoder." not in path else "decoder" for path in paths}
        assert all(len({sides[p] for p in paths if by_layer[p] == key}) == 1 for key in set(by_layer.values()))


def test_a_host_without_layers_says_so_where_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert len(attached(model, targets=("0", "1"), granularity="model").tensors()) == 5
    with pytest.raises(aa.TargetError, match="no registered family"):
        attached(model, name="other", targets=("0", "1"), granularity="layer")


def test_a_shared_selector_is_saved_once_and_shared_again(tmp_path: Path) -> None:
    model = build("t5")
    adapter = attached(model, granularity="layer")
    names = [name for name in adapter.tensors() if name.endswith("module_logits")]
    assert len(names) == 4
    assert len(set(map(id, adapter.aliases()))) > 4
    before = outputs("t5", model, task_ids=NAMES)
    aa.save_pretrained(model, tmp_path / "saved")
    aa.detach(model)
    loaded = aa.load(model, tmp_path / "saved", trainable=True)
    assert torch.equal(outputs("t5", model, task_ids=NAMES), before)
    assert isinstance(loaded, MHR)
    assert loaded.config == adapter.config
    one, *others = [b.selector for p, b in loaded.routed_branches().items() if p.startswith("encoder.block.0.")]
    assert all(other is one for other in others)
    with aa.signals(model, task_ids=NAMES):
        case("t5").output(model(**case("t5").inputs(model, 3))).pow(2).mean().backward()
    assert one.module_logits.grad is not None


# ------------------------------------------------------------------ collapsed, averaged, saved, copied


@hosts
def test_a_collapsed_task_merges_and_goes_to_peft(family: str, tmp_path: Path) -> None:
    model = build(family)
    adapter = attached(model, alpha=3.0)
    adapter.scale = 0.5
    expected, new = outputs(family, model, task_ids="wic"), adapter.collapse("wic")
    aa.detach(model)
    lora = again(model, new, "lora")
    torch.testing.assert_close(outputs(family, model), expected, atol=1e-4, rtol=1e-4)
    assert by_name("peft").writes(lora)
    aa.save_pretrained(model, tmp_path / "peft", "lora", layout="peft")
    aa.merge(model, "lora")
    torch.testing.assert_close(outputs(family, model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_twin_of_the_model_routes_for_itself(twin_of: Any) -> None:
    model = build("t5")
    attached(model, granularity="sublayer")
    before = outputs("t5", model, task_ids=NAMES)
    twin = twin_of(model)
    assert torch.equal(outputs("t5", twin, task_ids=NAMES), before)
    for parameter in aa.adapters(twin)["default"].parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(outputs("t5", model, task_ids=NAMES), before)


def test_z_stays_in_fp32_under_a_16_bit_base() -> None:
    model = build("llama").to(torch.bfloat16)
    adapter = aa.attach(model, MHRConfig(tasks=NAMES, splits=4), dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in adapter.tensors().items()}
    assert dtypes == {"lora_a": torch.bfloat16, "lora_b": torch.bfloat16, "module_logits": torch.float32}
    assert outputs("llama", model, task_ids=NAMES).dtype == torch.bfloat16
    values = {n: t.clone() for n, t in adapter.tensors().items() if n.endswith("logits")}
    model.half()
    assert all(torch.equal(adapter.tensors()[name], value) for name, value in values.items())


# ------------------------------------------------------------------ how Z becomes weights


def weights(train: bool, z: Tensor, **config: Any) -> Tensor:
    """α of one task whose row of Z is (S, K)."""
    model = nn.Sequential(nn.Linear(z.shape[0], z.shape[0]))
    adapter = attached(model, targets="0", tasks=("a",), splits=z.shape[0], skills=z.shape[1], **config)
    with torch.no_grad():
        adapter.tensors()["0.selector.module_logits"].copy_(z.view(1, -1))
    model.train(train)
    return adapter.routed_branches()["0"].selector(torch.tensor([0]))[0]


Z = torch.tensor([[1.0, -2.0, 0.5], [-0.3, 3.0, -1.0]])


def test_shared_skill_then_average_correction_and_l2() -> None:
    p = Z.sigmoid()
    p[:, -1] = 1
    torch.testing.assert_close(weights(False, Z, shared_skill=True), p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(weights(False, Z, shared_skill=True, normalise=False), p * math.sqrt(2 / 3))
    torch.testing.assert_close(weights(True, Z, weights="l2"), Z / Z.norm(dim=-1, keepdim=True))
    rounded = (Z > 0).float()
    torch.testing.assert_close(weights(False, Z, weights="straight-through"), rounded / rounded.sum(-1, keepdim=True))


def test_noise_is_of_training_alone_and_official_dropout_is_not() -> None:
    plain = Z.sigmoid() / Z.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(weights(False, Z, weights="relaxed"), plain)
    assert not torch.allclose(weights(True, Z, weights="relaxed"), plain)
    torch.testing.assert_close(weights(False, Z, dropout=0.9), plain)
    torch.manual_seed(0)
    assert not torch.allclose(weights(True, Z, dropout=0.9), plain)
    assert not torch.allclose(weights(False, Z, dropout=0.9, official=True), plain)


def test_rows_of_one_task_draw_their_own_noise() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(1, 2, 8).expand(2, 2, 8)
    attached(model, targets="0", weights="relaxed")
    model.train()
    one, two = run(model, x, "rte")
    assert not torch.allclose(one, two)
    model.eval()
    one, two = run(model, x, "rte")
    torch.testing.assert_close(one, two)


def test_on_the_way_to_uniform() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 2, 8)
    adapter = attached(model, targets="0")
    selector, ids = adapter.routed_branches()["0"].selector, torch.tensor([0, 1])
    start = selector(ids)
    adapter.uniformity = 0.5
    c = math.cos(math.pi / 4)
    torch.testing.assert_close(selector(ids), c * start + (1 - c) / 3)
    adapter.uniformity = 1
    end, new = run(model, x), adapter.to_average()
    aa.detach(model)
    again(model, new)
    torch.testing.assert_close(model(x).detach(), end)
    assert new[0].uniformity == 0
    for value in (2, -0.1, math.nan):
        with pytest.raises(aa.ConfigError, match="0 to 1"):
            adapter.uniformity = value
    assert adapter.uniformity == 1
    for selector in ("average", "private"):
        other = attached(
            nn.Sequential(nn.Linear(8, 8)), targets="0", selector=selector, tasks=NAMES * (selector != "average")
        )
        with pytest.raises(aa.ConfigError, match="0 where the weights are not learned"):
            other.uniformity = 0.5


@pytest.mark.parametrize("uniformity", [0.5, 1.0])
def test_saved_on_the_way_to_uniform_it_computes_the_same(uniformity: float, tmp_path: Path) -> None:
    model = build("llama")
    adapter = attached(model, granularity="layer")
    start = outputs("llama", model, task_ids=NAMES)
    adapter.uniformity = uniformity
    before = outputs("llama", model, task_ids=NAMES)
    assert not torch.allclose(before, start, atol=1e-4)
    aa.save_pretrained(model, tmp_path / "saved")
    aa.detach(model)
    loaded = aa.load(model, tmp_path / "saved")
    assert torch.equal(outputs("llama", model, task_ids=NAMES), before)
    assert isinstance(loaded, MHR)
    assert loaded.uniformity == uniformity
    loaded.uniformity = 0
    assert torch.equal(outputs("llama", model, task_ids=NAMES), start)


def test_training_goes_on_at_the_uniformity_and_scale_of_the_checkpoint(tmp_path: Path) -> None:
    model, other = build("llama"), build("llama")
    adapter = attached(model, granularity="layer")
    adapter.uniformity, adapter.scale = 0.5, 2.0
    folder = aa.save_pretrained(model, tmp_path / "checkpoint")
    restore(attached(other, granularity="layer"), folder)
    assert torch.equal(outputs("llama", other, task_ids=NAMES), outputs("llama", model, task_ids=NAMES))
    aa.detach(other)
    before = {name: tensor.clone() for name, tensor in attached(other, alpha=4.0).tensors().items()}
    with pytest.raises(aa.ArtefactError, match="other settings than this one; they differ in alpha, granularity"):
        restore(aa.adapters(other)["default"], folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in aa.adapters(other)["default"].tensors().items())


def test_a_compiled_model_routes_too() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 2, 8)
    attached(model, targets="0")
    compiled = torch.compile(model, backend="eager")
    for tasks in (torch.tensor([0, 2, 1]), torch.tensor([1, 1, 0]), list(NAMES), "cb"):
        with torch.no_grad(), aa.signals(model, task_ids=tasks):
            torch.testing.assert_close(compiled(x), model(x))


def test_monitors_tell_a_dead_routing_from_a_live_one() -> None:
    adapter = attached(build("llama"), None)
    start = adapter.monitor()
    assert start["discreteness"] == pytest.approx(1, abs=1e-3)
    assert start["efficiency"] == pytest.approx(1, abs=1e-3)
    model = build("t5")
    routed = attached(model)
    sides = [routed.monitor(side)["discreteness"] for side in ("encoder.", "decoder.")]
    assert min(sides) < routed.monitor()["discreteness"] < max(sides)
    hard = torch.tensor([[50.0, -50, -50, -50], [50, -50, -50, -50]])
    assert discreteness(hard) == pytest.approx(0, abs=1e-6)
    assert sparsity(hard) == 0.25
    assert efficiency(hard) == pytest.approx(0, abs=1e-6)
    spread = torch.tensor([[50.0, -50], [-50, 50]])
    assert efficiency(spread) == pytest.approx(1)


# ------------------------------------------------------------------ losses


def test_label_smoothing_counts_rows_and_leaves_labels_alone() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [4, -100, -100]])
    kept, logs = labels.clone(), logits.log_softmax(-1)
    by_hand = sum(-0.9 * logs[b, t, labels[b, t]] - 0.1 * logs[b, t].mean() for b, t in ((0, 0), (0, 1), (1, 0)))
    torch.testing.assert_close(label_smoothed_loss(logits, labels), by_hand / 2)
    assert torch.equal(labels, kept)


def test_choice_loss_by_hand() -> None:
    logits, labels = torch.randn(1, 2, 2, 5), torch.tensor([[[1, 2], [3, -100]]])
    logs = logits.log_softmax(-1)
    right, wrong = logs[0, 0, [0, 1], [1, 2]], logs[0, 1, 0, 3]
    scores = torch.stack([right.mean(), wrong])
    expected = -right.mean() - torch.log(1 - wrong.exp()) - scores.log_softmax(0)[0]
    torch.testing.assert_close(choice_loss(logits, labels, torch.tensor([0])), expected)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tasks": ()}, "tasks .* names of the tasks"),
        ({"tasks": ("a", "a")}, "different names"),
        ({"splits": 0}, "splits is 0"),
        ({"selector": "random"}, "selector is 'random'"),
        ({"weights": "softmax"}, "weights is 'softmax'"),
        ({"granularity": "blockwise"}, "granularity is 'blockwise'"),
        ({"weights": "l2", "dropout": 0.1}, "another where"),
        ({"selector": "private"}, "skills is 8"),
        ({"selector": "average"}, "left out"),
        ({"uniformity": 1.5}, "from 0 to 1"),
        ({"selector": "private", "skills": 3, "uniformity": 0.5}, "0 where the weights are not learned"),
        ({"selector": "private", "skills": 3, "weights": "relaxed"}, "'learned' where"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(aa.ConfigError, match=message):
        MHRConfig(**{"tasks": NAMES, **setting})


def test_heads_that_do_not_divide_a_linear_name_it() -> None:
    with pytest.raises(
        aa.ConfigError, match=r"splits is 5; .* 16 and 16, the widths of model\.layers\.0\.self_attn\.q_proj"
    ):
        attached(build("llama"), splits=5)
    with pytest.raises(aa.TargetError, match="wraps linears"):
        attached(build("llama"), targets="embed_tokens", splits=1)


def test_the_routed_adapter_does_not_merge() -> None:
    model = build("llama")
    attached(model)
    with pytest.raises(aa.AttachError, match="not linear in the weights"):
        aa.merge(model)
