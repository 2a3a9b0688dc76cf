"""MixDA: the invariants of its card, and each option against its formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

import anyadapter as aa
from anyadapter.methods.language.mixda import FFN, MixDA, Retriever, combine
from anyadapter.parts.bottleneck import After
from anyadapter.parts.mixture import Gate, Mixture, Shared

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
IDS = torch.tensor([[0, 5, 9, 3, 33, 2], [0, 8, 4, 12, 6, 2]])
PATHS = [f"roberta.encoder.layer.{layer}.output" for layer in (1, 2)]
small = {"layers": (1, 2), "gate_width": 6}


def roberta(seed: int = 0, labels: int = 0) -> nn.Module:
    cls: Any = RobertaForSequenceClassification if labels else RobertaForMaskedLM
    model = cls(RobertaConfig(**SIZES, **({"num_labels": labels} if labels else {}))).eval()
    torch.manual_seed(seed)  # the encoder comes first, so that it is the same under either head
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


def attached(model: nn.Module, name: str = "default", std: float | None = 0.4, **config: Any) -> MixDA:
    """An adapter in layers 1 and 2; with ``std``, its tensors are drawn anew, so that none is zero."""
    adapter = aa.attach(model, aa.MixDAConfig(**{**small, **config}), name)
    assert isinstance(adapter, MixDA)
    for parameter in adapter.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return adapter


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


# ------------------------------------------------------------------ the formula, and its limits


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    domains=st.integers(1, 3),
    seed=st.integers(0, 999),
    gate=st.sampled_from(["code", "paper"]),
)
def test_the_mix_is_the_formula_for_any_batch_and_length(
    batch: int, tokens: int, domains: int, seed: int, gate: str
) -> None:
    torch.manual_seed(seed)
    model = roberta(seed)
    adapter = attached(model, domains=tuple("abc"[:domains]), gate=gate)
    block: Any = model.get_submodule(PATHS[0])
    u, residual, q = torch.randn(batch, tokens, 32), torch.randn(batch, tokens, 16), torch.randn(batch, tokens, 16)
    mixture = adapter.mixtures[PATHS[0]]
    mixture.pool, mixture.q = "mean", q
    adapter.shared.calling = True
    with adapter.recording():
        out = block(u, residual)
        assert mixture.mixed is not None
        weights = mixture.mixed[1]
    adapter.shared.calling = False
    assert out.shape == (batch, tokens, 16)
    assert weights.shape == (batch, tokens if gate == "paper" else 1, domains + 1)
    assert bool((weights >= 0).all())
    if gate == "code":
        torch.testing.assert_close(weights.sum(-1), torch.ones(batch, 1))
        assert mixture.gating is not None
        torch.testing.assert_close(weights, mixture.gating.linear(u.mean(1, keepdim=True)).softmax(-1))
    else:
        first, _, last = mixture.gating.linear  # type: ignore[union-attr, misc]
        torch.testing.assert_close(weights, torch.sigmoid(last(torch.relu(q @ first.weight.T))))
    parts = [
        nn.functional.gelu(u @ ka.adapter_down.weight.T + ka.adapter_down.bias) @ ka.adapter_up.weight.T
        + ka.adapter_up.bias
        for ka in mixture.kas
    ]
    parts.append(u @ block.dense.weight.T + block.dense.bias)
    mixed = sum(weights[..., i, None] * part for i, part in enumerate(parts))
    torch.testing.assert_close(out, block.LayerNorm(mixed + residual), atol=1e-5, rtol=1e-5)


def test_a_fresh_domain_is_zero_and_the_gate_still_weighs_the_feed_forward() -> None:
    model = roberta()
    before = logits(model)
    adapter = attached(model, std=None)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.recording() as mixtures:
        logits(model)
        for mixture in mixtures.values():
            assert mixture.mixed is not None
            (domain, _), weights = mixture.mixed
            assert torch.equal(domain, torch.zeros_like(domain))
            torch.testing.assert_close(weights, torch.full((2, 1, 2), 0.5), atol=0.02, rtol=0)
    aa.detach(model)
    attached(model, std=None, ffn_logit=20.0)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", ["code", "paper"])
def test_all_weight_on_the_feed_forward_is_the_base_bit_for_bit(gate: str) -> None:
    model = roberta()
    before = logits(model)
    adapter = attached(model, gate=gate, domains=("a", "b"))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.weighted({FFN: 1}):
        assert torch.equal(logits(model), before)
    with adapter.weighted({"b": 1}):
        alone = logits(model)
    assert not torch.allclose(alone, before, atol=1e-3)
    with (
        pytest.raises(aa.ConfigError, match=r"no domain 'c'\. There are: a, b, ffn|no domain 'c'"),
        adapter.weighted({"c": 1}),
    ):
        pass
    aa.detach(model)
    assert torch.equal(logits(model), before)


def test_no_domains_is_the_task_adapter_alone_and_fresh_it_is_the_base() -> None:
    model = roberta()
    before = logits(model)
    adapter = attached(model, std=None, domains=(), task_adapter="houlsby")
    assert not adapter.mixtures
    assert torch.equal(logits(model), before)


def test_without_a_gate_the_one_domain_replaces_the_feed_forward() -> None:
    model = roberta()
    adapter = attached(model, gate=None)
    assert not any(".gating." in name for name in adapter.tensors())
    without = logits(model)
    for path in PATHS:
        nn.init.normal_(model.get_parameter(f"{path}.dense.weight"))
    assert torch.equal(logits(model), without)
    with pytest.raises(aa.ConfigError, match="given where there are several domains"):
        aa.MixDAConfig(gate=None, domains=("a", "b"))


def test_the_order_of_domains_does_not_matter() -> None:
    model = roberta()
    adapter = attached(model, domains=("a", "b", "c"))
    before = logits(model)
    order = [2, 0, 1]
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    moved = dict(tensors)
    for name, tensor in tensors.items():
        path, kas, rest = name.partition(".kas.")
        if kas:
            number, leaf = rest.split(".", 1)
            moved[f"{path}.kas.{order.index(int(number))}.{leaf}"] = tensor
        elif ".gating.linear.10." in name:
            moved[name] = tensor[[*order, 3]]
    adapter.load_tensors(moved)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_named_are_not_touched() -> None:
    model = roberta()
    adapter = attached(model, layers=(-1,))
    assert {p.path for p in adapter.placements} == {PATHS[1], f"{PATHS[1]}.dropout", "roberta"}
    with pytest.raises(aa.TargetError, match=r"3 layers and no layer 7; say which of them remember"):
        aa.attach(model, aa.MixDAConfig(), "other")


# ------------------------------------------------------------------ the position that the gate reads


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 6), padding=st.integers(1, 4), pool=st.sampled_from(["last_token", "mean"]))
def test_padding_does_not_change_the_result(tokens: int, padding: int, pool: str) -> None:
    model = roberta()
    attached(model, pool=pool)
    ids = IDS[:1, :tokens]
    padded = torch.cat([ids, torch.ones(1, padding, dtype=torch.long)], dim=1)
    mask = (torch.arange(tokens + padding) < tokens).long()[None]
    torch.testing.assert_close(logits(model, padded, mask)[:, :tokens], logits(model, ids), atol=1e-5, rtol=1e-5)


def test_the_position_of_the_authors_code_depends_on_padding() -> None:
    model = roberta()
    attached(model, pool="last", gate_dropout=0.0)
    padded, mask = torch.cat([IDS, torch.ones(2, 2, dtype=torch.long)], 1), (torch.arange(8) < 6).long().expand(2, 8)
    assert not torch.allclose(logits(model, padded, mask)[:, :6], logits(model), atol=1e-3)


def test_a_gate_that_cannot_know_the_padding_says_so() -> None:
    model = roberta()
    attached(model)
    hidden = torch.randn(1, 3, 16)
    with pytest.raises(aa.SignalError, match="needs the attention mask, .* passed by"):
        model.get_submodule("roberta.encoder")(hidden)
    with pytest.raises(aa.SignalError, match=r"one value per token, \(1, 6\), not \(1, 1, 6, 6\)"):
        model(input_ids=IDS[:1], attention_mask=torch.ones(1, 1, 6, 6))


def test_the_report_names_the_weights_of_each_example() -> None:
    model = roberta()
    adapter = attached(model, domains=("law", "news"), std=1.0)
    rows = adapter.report(model, input_ids=IDS)
    assert len(rows) == 2
    assert all(list(row) == PATHS and list(row[PATHS[0]]) == ["law", "news", FFN] for row in rows)
    assert sum(rows[0][PATHS[0]].values()) == pytest.approx(1)
    assert rows[0] != rows[1]
    with adapter.weighted({"law": 0.25, FFN: 0.75}):
        assert adapter.report(model, input_ids=IDS)[1][PATHS[1]] == {"law": 0.25, "news": 0.0, FFN: 0.75}
    with aa.disabled(model), pytest.raises(aa.SignalError, match="did not act in this call"):
        adapter.report(model, input_ids=IDS)


# ------------------------------------------------------------------ what is learnt


def test_the_gate_has_as_many_parameters_as_the_authors() -> None:
    gate = Gate(4096, 2, aa.MixDAConfig().gate_width, aa.MixDAConfig().gate_layers)
    assert sum(p.numel() for p in gate.parameters()) == 4_329_218  # of RoBERTa-large with one domain
    mixture = Mixture((4096, 1024), 256, 1, None, "last", Shared())
    assert sum(p.numel() for p in mixture.kas.parameters()) == 4096 * 256 + 256 + 256 * 1024 + 1024


def trained(model: nn.Module, adapter: MixDA, *groups: str) -> set[str]:
    """The parts that a loss reaches when these groups are trained."""
    adapter.train_only(*groups)
    model(input_ids=IDS).logits.pow(2).mean().backward()
    mine = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    found = {name for name, tensor in adapter.tensors().items() if tensor.grad is not None}
    return {part for part in ("kas", "gating", "task", "whole") if any(f".{part}." in name for name in found)}


def test_each_stage_trains_its_groups() -> None:
    for groups, parts in ((("domains",), {"kas"}), (("domains", "gate"), {"kas", "gating"})):
        model = roberta()
        assert trained(model, attached(model), *groups) == parts
    model = roberta(labels=3)
    adapter = attached(model, task_adapter="pfeiffer", whole="classifier")
    assert trained(model, adapter, "gate", "task", "head") == {"gating", "task", "whole"}


def test_the_sampling_loss_is_zero_only_where_the_domain_is_the_feed_forward() -> None:
    model = roberta()
    adapter = attached(model, std=None)
    mask = (torch.arange(6) < torch.tensor([[6], [4]])).long()
    at_start = adapter.sampling_loss(model, input_ids=IDS, attention_mask=mask)
    with adapter.recording() as mixtures:
        model(input_ids=IDS, attention_mask=mask)
        squares = [m.mixed[0][1].square()[mask.bool()] for m in mixtures.values() if m.mixed]  # K = 0
    assert at_start.item() == pytest.approx(torch.stack([s.mean() for s in squares]).mean().item(), rel=1e-5)
    assert at_start > 0
    at_start.backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for n, t in adapter.tensors().items() if "adapter_up" in n)
    for path, mixture in adapter.mixtures.items():  # a domain that cannot but give what the feed-forward gives
        nn.init.zeros_(model.get_parameter(f"{path}.dense.weight"))
        with torch.no_grad():
            mixture.kas[0].adapter_up.bias.copy_(model.get_parameter(f"{path}.dense.bias"))  # type: ignore[union-attr]
    assert adapter.sampling_loss(model, input_ids=IDS).item() == 0
    with pytest.raises(aa.ConfigError, match="no domain adapter"):
        attached(roberta(), domains=(), task_adapter="pfeiffer").sampling_loss(model, input_ids=IDS)


def test_the_sampling_loss_as_a_sum() -> None:
    model = roberta()
    mean = attached(model).sampling_loss(model, input_ids=IDS)
    tensors = {name: t.detach().clone() for name, t in aa.adapters(model)["default"].tensors().items()}
    aa.detach(model)
    adapter = attached(model, sampling="sum")
    adapter.load_tensors(tensors)
    torch.testing.assert_close(adapter.sampling_loss(model, input_ids=IDS), mean * 6 * 16)


# ------------------------------------------------------------------ several domains, folders


def test_domains_of_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    folders = []
    for name in ("law", "news"):
        model = roberta()
        adapter = attached(model, domains=(name,), width=5, whole="lm_head.dense")
        aa.save_pretrained(model, tmp_path / name)
        folders.append((tmp_path / name, {n: t.detach().clone() for n, t in adapter.tensors().items()}))
    model = roberta(labels=2)
    adapter = combine(
        model, [folder for folder, _ in folders], task_adapter="pfeiffer", whole="classifier", gate_width=6
    )
    assert adapter.config.sources == ()
    assert (adapter.config.domains, adapter.config.layers, adapter.config.width) == (("law", "news"), (1, 2), 5)
    for k, (_, tensors) in enumerate(folders):
        for name, tensor in tensors.items():
            if ".kas." in name:
                assert torch.equal(adapter.tensors()[name.replace(".kas.0.", f".kas.{k}.")], tensor)
    assert adapter.mixtures[PATHS[0]].gating.linear[-1].out_features == 3  # type: ignore[union-attr, index, operator]
    aa.save_pretrained(model, tmp_path / "both", "mixed")
    for folder, _ in folders:  # what is saved holds the domains
        (folder / "adapter_model.safetensors").unlink()
    other = roberta(labels=2)
    aa.load(other, tmp_path / "both", check_base=False)
    torch.testing.assert_close(logits(other), logits(model))


def test_a_single_source_brings_its_gate(tmp_path: Path) -> None:
    model = roberta()
    first = attached(model, domains=("law",))
    aa.save_pretrained(model, tmp_path / "law")
    expected = logits(model)
    second = combine(model, [tmp_path / "law"], "again", gate_width=6)
    first.enabled = False
    assert torch.equal(logits(model), expected)
    third = combine(model, ["again"], "other", domains=("renamed",), gate_width=7)  # another gate, so a fresh one
    assert not second.enabled
    assert third.config.branches == ("renamed", FFN)
    assert all(torch.equal(t, second.tensors()[n]) for n, t in third.tensors().items() if ".kas." in n)


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name, config in {
        "a": {},
        "b": {"domains": ("b",), "width": 3},
        "c": {"domains": (), "task_adapter": "pfeiffer"},
    }.items():
        model = roberta()
        attached(model, **config)
        aa.save_pretrained(model, tmp_path / name)
    host = roberta()
    with pytest.raises(aa.ConfigError, match=r"differ in width: 2, 3|differ in width: 3, 2"):
        combine(host, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(aa.ConfigError, match=r"hold the domains domain, domain; give a name of its own"):
        combine(host, [tmp_path / "a", tmp_path / "a"])
    with pytest.raises(aa.ArtefactError, match="holds no domain adapters"):
        combine(host, [tmp_path / "c"])
    with pytest.raises(aa.ArtefactError, match="does not exist|no folder"):
        combine(host, [tmp_path / "nowhere"])
    with pytest.raises(aa.BaseMismatchError, match="other values"):
        combine(roberta(seed=9), [tmp_path / "a"])
    assert not aa.adapters(host)


def test_a_copy_of_the_model_has_a_mixture_of_its_own(tmp_path: Path) -> None:
    model = roberta()
    attached(model, task_adapter="houlsby")
    twin = copy.deepcopy(model)
    other: Any = aa.adapters(twin)["default"]
    expected = logits(model)
    with other.weighted({FFN: 1}):
        assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(twin), expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), expected)


# ------------------------------------------------------------------ hosts


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_other_encoders(family: str) -> None:
    host = case(family)
    model = host.build()
    with torch.no_grad():
        before = host.output(model(**host.inputs(model, 2)))
        adapter = attached(model, layers=(0, -1), task_adapter="pfeiffer")
        assert not torch.allclose(host.output(model(**host.inputs(model, 2))), before, atol=1e-3)
        aa.detach(model)
        adapter = attached(model, layers=(0, -1), std=None, task_adapter="pfeiffer")
        with adapter.weighted({FFN: 1}):
            assert torch.equal(host.output(model(**host.inputs(model, 2))), before)
    blocks = [p for p in adapter.placements if isinstance(p.branch, After)]
    assert bool(blocks) == (family != "bert")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_that_generate_have_the_gate_of_the_paper(family: str) -> None:
    host = case(family)
    model = host.build()
    with pytest.raises(aa.ConfigError, match="has not seen when it generates"):
        attached(model, layers=(0,))
    adapter = attached(model, layers=(0,), gate="paper", task_adapter="pfeiffer")
    ids = host.inputs(model, 2)["input_ids"]
    out = logits(model, ids)
    torch.testing.assert_close(
        logits(model, ids[:, :4]), out[:, :4], atol=1e-4, rtol=1e-4
    )  # it does not see what follows
    assert len(adapter.report(model, input_ids=ids)) == 2


def test_the_retriever_finds_the_nearest_documents() -> None:
    retriever = Retriever(3, 2)
    nn.init.eye_(retriever.embed_head.weight)
    nn.init.zeros_(retriever.embed_head.bias)
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    assert retriever(torch.tensor([[1.0, 0.1, 9.0]]), documents, 2).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": ("ffn",)}, "different names, none of them 'ffn'"),
        ({"domains": ("a", "a")}, "different names"),
        ({"domains": ("a.b",)}, "different names"),
        ({"gate": "softmax"}, "'code', 'paper' or None"),
        ({"pool": "first"}, "one of last_token, last, mean"),
        ({"width": 0}, "at least 1"),
        ({"gate_layers": None}, "at least 1"),
        ({"gate_dropout": 1.0}, "at least 0 and below 1"),
        ({"task_adapter": "lora"}, "'pfeiffer', 'houlsby' or None"),
        ({"knowledge_weight": -1}, "at least 0"),
        ({"sampling": "max"}, "'mean' or 'sum'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(aa.ConfigError, match=message):
        aa.MixDAConfig(**settings)
