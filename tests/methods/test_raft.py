"""RAFT: the invariants of its card, what it asks of a host, and how it is stacked, trained and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import anyadapter as aa
from anyadapter.methods.language.raft import (
    RAFT,
    RationaleAttention,
    RationalePredictor,
    masked_softmax,
    random_rationales,
    rationale_weights,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
DISTIL = {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 40}
HOSTS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=0)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL)),
}
IDS = torch.tensor([[2, 9, 13, 33, 21, 50, 3], [2, 44, 12, 3, 0, 0, 0]])
MASK = (IDS > 0).long()
kinds = pytest.mark.parametrize("attention", ["cross", "self"])
scores = st.floats(-60, 60)


def host(name: str = "bert", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = HOSTS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def attached(model: nn.Module, name: str = "default", **config: Any) -> RAFT:
    """RAFT with four heads, every tensor drawn anew."""
    adapter = aa.attach(model, aa.RAFTConfig(**{"heads": 4, "length": 12, **config}), name)
    assert isinstance(adapter, RAFT)
    for parameter in adapter.classifier.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


def reasons(mask: Tensor = MASK, seed: int = 0) -> Tensor:
    return random_rationales(mask, torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK, r: Tensor | None = None, **kw: Any) -> Tensor:
    with aa.signals(model, rationale_logits=reasons(mask) if r is None else r):
        return model(input_ids=ids, attention_mask=mask, **kw).logits


# ------------------------------------------------------------------ the weights


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.tuples(scores, st.booleans()), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_weights_are_a_softmax_over_real_tokens(rows: list[list[tuple[float, bool]]]) -> None:
    values = torch.tensor([[score for score, _ in row] for row in rows])
    mask = torch.tensor([[int(real) for _, real in row] for row in rows])
    weights = masked_softmax(values, mask)
    assert (weights >= 0).all()
    assert (weights[mask == 0] == 0).all()
    for row, real, out in zip(values, mask.bool(), weights):
        torch.testing.assert_close(out[real], row[real].softmax(-1))
        assert out.sum().item() == pytest.approx(1 if real.any() else 0, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(-1e6, -200), padding=st.floats(-1e30, 1e30))
def test_scores_far_below_zero_and_padding_of_any_size_do_no_harm(low: float, padding: float) -> None:
    values = torch.tensor([[low, low, padding], [padding] * 3], requires_grad=True)
    weights = masked_softmax(values, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()


def test_kept_special_tokens_have_weight_one_and_the_rest_is_as_before() -> None:
    r = reasons()
    plain, kept = rationale_weights(r, MASK), rationale_weights(r, MASK, keep_special=True)
    special = torch.tensor([[1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0, 0]]).bool()
    assert (kept[special] == 1).all()
    assert torch.equal(kept[~special], plain[~special])


def test_equal_reasons_are_the_mean_and_not_the_absence_of_reasons() -> None:
    weights = rationale_weights(torch.full((2, 7, 2), 1.7), MASK)
    torch.testing.assert_close(weights, MASK / MASK.sum(1, keepdim=True))
    model = host()
    attached(model)
    with_reasons = logits(model, r=torch.zeros(2, 7, 2))
    values = aa.adapters(model)["default"].tensors()
    aa.detach(model)
    aa.attach(model, aa.RAFTConfig(heads=4, rationales=False)).load_tensors(values)
    assert not torch.allclose(model(input_ids=IDS, attention_mask=MASK).logits, with_reasons, atol=1e-3)


# ------------------------------------------------------------------ what the answer hangs on


@kinds
@pytest.mark.parametrize("name", HOSTS)
def test_the_answer_hangs_on_the_reasons_of_real_tokens_alone(name: str, attention: str) -> None:
    model = host(name)
    attached(model, attention=attention)
    before, r = logits(model), reasons()
    other = r.clone()
    other[..., 0] = torch.randn(2, 7)
    other[MASK == 0] = 99.0
    torch.testing.assert_close(logits(model, r=other), before)
    other[0, 3, 1] += 4
    assert not torch.allclose(logits(model, r=other)[0], before[0], atol=1e-3)


@kinds
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("keep_special", [False, True])
def test_padding_makes_no_difference(name: str, attention: str, keep_special: bool) -> None:
    model = host(name)
    attached(model, attention=attention, keep_special=keep_special)
    before, r = logits(model), reasons()
    other = torch.where(MASK == 1, IDS, 17)
    torch.testing.assert_close(logits(model, other), before)
    longer = (F.pad(IDS, (0, 4), value=5), F.pad(MASK, (0, 4)), F.pad(r, (0, 0, 0, 4), value=3.0))
    torch.testing.assert_close(logits(model, *longer), before, atol=1e-5, rtol=1e-4)


def test_the_ablation_sees_padding_as_the_authors_does_only_when_asked() -> None:
    model = host()
    values = attached(model, rationales=False).tensors()
    assert aa.adapters(model)["default"].reads == ()

    def difference() -> float:
        longer = model(input_ids=F.pad(IDS, (0, 4)), attention_mask=F.pad(MASK, (0, 4))).logits
        return (longer - model(input_ids=IDS, attention_mask=MASK).logits).abs().max().item()

    assert difference() < 1e-5
    aa.detach(model)
    aa.attach(model, aa.RAFTConfig(heads=4, rationales=False, mask_padding=False)).load_tensors(values)
    assert difference() > 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(3, 9))
def test_cross_attention_does_not_know_the_order_and_self_attention_does(seed: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    hidden, pooled = torch.randn(2, tokens, 8, generator=draw), torch.randn(2, 8, generator=draw)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, tokens - 1 :] = 0
    weights = masked_softmax(torch.randn(2, tokens, generator=draw), mask)
    order = torch.arange(tokens).roll(1)
    for attention, same in (("cross", True), ("self", False)):
        config = aa.RAFTConfig(attention=attention, heads=2, length=tokens)
        head = RationaleAttention(config, 8, pools=False).eval()
        nn.init.normal_(head.classifier.weight, generator=draw)
        one = head.logits(hidden, pooled, mask, weights)
        other = head.logits(hidden[:, order], pooled, mask[:, order], weights[:, order])
        assert torch.allclose(one, other, atol=1e-5) is same, attention


# ------------------------------------------------------------------ what is trained


@kinds
def test_everything_of_a_whole_encoder_is_trained_but_a_pooler_nobody_reads(attention: str) -> None:
    model = host()
    adapter = attached(model, attention=attention, whole=("embeddings", "encoder", "pooler"))
    with aa.signals(model, rationale_logits=reasons()):
        model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    silent = {name.split(".whole")[0] for name, p in adapter.named_parameters() if p.grad is None}
    assert silent == (set() if attention == "cross" else {"branches./bert/pooler"})
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))


def test_updates_of_the_encoder_start_at_nothing_and_learn_with_the_head() -> None:
    model = host()
    values = attached(model).tensors()
    before = logits(model)
    aa.detach(model)
    adapter = attached(model, rank=3)
    adapter.load_tensors({**adapter.tensors(), **values})
    assert torch.equal(logits(model), before)
    linears = [p.path for p in adapter.placements if p.path.startswith("bert.encoder.layer")]
    assert len(linears) == 2 * 6
    encoder, head = adapter.group("encoder"), adapter.group("head")
    assert {id(p) for p in (*encoder, *head)} == {id(p) for p in adapter.parameters()}
    assert len(encoder) == 2 * len(linears)
    logits(model).pow(2).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_on_a_lora_both_learn_and_both_come_off() -> None:
    model = host()
    bare = model(input_ids=IDS, attention_mask=MASK).logits
    lora = aa.attach(model, aa.LoRAConfig(rank=2, targets="query"), "lora")
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    raft = attached(model, "raft")
    both = logits(model)
    with aa.disabled(model, "lora"):
        assert not torch.allclose(logits(model), both, atol=1e-3)
    both.pow(2).sum().backward()
    assert all(p.grad is not None for adapter in (lora, raft) for p in adapter.parameters())
    aa.detach(model, "raft")
    aa.detach(model, "lora")
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, bare)


@pytest.mark.parametrize("name", HOSTS)
def test_it_is_kept_without_the_hosts_own_head(name: str, tmp_path: Path) -> None:
    model = host(name)
    attached(model, attention="self", length=9, rank=2)
    before = logits(model)
    aa.save_pretrained(model, tmp_path)
    other = host(name)
    nn.init.normal_(other.get_submodule("classifier").get_parameter("weight" if name != "roberta" else "dense.weight"))
    adapter = aa.load(other, tmp_path)
    assert adapter.config.length == 9
    torch.testing.assert_close(logits(other), before)


@pytest.mark.parametrize(("attention", "classes"), [("cross", 2), ("cross", 3), ("self", 2), ("self", 3)])
def test_the_number_of_parameters_of_bert_base(attention: str, classes: int) -> None:
    config = aa.RAFTConfig(attention=attention, labels=tuple("abc"[:classes]))
    head = RationaleAttention(config, 768, pools=False)
    assert sum(p.numel() for p in head.attend.parameters()) == 2_362_368
    expected = 769 * classes if attention == "cross" else 98_304 * classes + classes
    assert sum(p.numel() for p in head.classifier.parameters()) == expected


# ------------------------------------------------------------------ the predictor


def predictor(**config: Any) -> tuple[nn.Module, RationalePredictor]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval().requires_grad_(False)
    adapter = aa.attach(model, aa.RationalePredictorConfig(**{"targets": ("a", "b", "c"), **config}))
    assert isinstance(adapter, RationalePredictor)
    return model, adapter


TAUGHT = {
    "labels": torch.tensor([0, 1]),
    "targets": torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
    "rationale_labels": torch.tensor([[0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0]]),
}


@settings(max_examples=10, deadline=None)
@given(taught=st.sets(st.sampled_from(sorted(TAUGHT))), impacts=st.tuples(st.floats(0, 9), st.floats(0, 9)))
def test_any_subset_of_labels_gives_the_sum_of_its_losses(taught: set[str], impacts: tuple[float, float]) -> None:
    model, _ = predictor(rationale_impact=impacts[0], target_impact=impacts[1])
    given = {"input_ids": IDS, "attention_mask": MASK}
    out = model(**given, **{key: TAUGHT[key] for key in taught})
    if not taught:
        assert out.loss is None
        return
    alone = [model(**given, **{key: TAUGHT[key]}).loss for key in taught]
    torch.testing.assert_close(out.loss, torch.stack(alone).sum())
    if taught == {"rationale_labels"}:
        real = MASK == 1
        by_hand = F.cross_entropy(out.rationale_logits[real], TAUGHT["rationale_labels"][real])
        torch.testing.assert_close(out.loss, impacts[0] * by_hand)


def test_what_is_not_known_does_not_count() -> None:
    model, _ = predictor()
    given = {"input_ids": IDS, "attention_mask": MASK}
    unknown = {
        "labels": torch.tensor([0, -100]),
        "targets": torch.tensor([[0.0, 1, 1], [torch.nan] * 3]),
        "rationale_labels": torch.where(torch.tensor([[True], [False]]), TAUGHT["rationale_labels"], -100),
    }
    first = {key: value[:1] for key, value in {**given, **TAUGHT}.items()}
    torch.testing.assert_close(model(**given, **unknown).loss, model(**first).loss)
    nothing = {k: torch.full_like(v, torch.nan if v.is_floating_point() else -100) for k, v in TAUGHT.items()}
    assert model(**given, **nothing).loss == 0


def test_the_predictor_takes_its_answers_in_the_authors_order_and_leaves_the_encoder() -> None:
    model, adapter = predictor()
    label_logits, target_probs, rationale_logits, loss = model(input_ids=IDS, attention_mask=MASK, **TAUGHT)
    assert (label_logits.shape, target_probs.shape, rationale_logits.shape) == ((2, 2), (2, 3), (2, 7, 2))
    assert ((target_probs > 0) & (target_probs < 1)).all()
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert {id(p) for p in adapter.group("heads")} == {id(p) for p in adapter.parameters()}
    assert model(IDS, MASK).rationale_logits.equal(rationale_logits)
    aa.detach(model)
    assert model(input_ids=IDS).last_hidden_state.shape == (2, 7, 16)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention": "both"}, "attention is 'both'; it must be 'cross' or 'self'"),
        ({"heads": 5}, "heads is 5; it must be a divisor of the encoder's width, 16"),
        ({"labels": ("a",)}, "labels .* two or more different names"),
        ({"labels": ("a", "b", "c")}, "labels .* 2 names, for BertForSequenceClassification"),
        ({"rationales": False, "keep_special": True}, "keep_special is True; it must be False without rationales"),
        ({"mask_padding": False}, "mask_padding is False; it must be True with rationales"),
        ({"rank": -1}, "rank is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(config: dict[str, Any], message: str) -> None:
    model = host()
    with pytest.raises(aa.ConfigError, match=message):
        aa.attach(model, aa.RAFTConfig(**{"heads": 4, **config}))
    assert not aa.adapters(model)


def test_a_host_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(aa.TargetError, match="BertModel has no encoder inside; load it with AutoModelForSequence"):
        aa.attach(BertModel(BertConfig(**SIZES)), aa.RAFTConfig(heads=4))
    with pytest.raises(aa.TargetError, match="BertForSequenceClassification has a head; load it with AutoModel"):
        aa.attach(host(), aa.RationalePredictorConfig())
    with pytest.raises(aa.TargetError, match=r"config\.hidden_size"):
        aa.attach(nn.Sequential(nn.Linear(2, 2)), aa.RationalePredictorConfig())
    gpt2 = GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    assert aa.attach(gpt2, aa.RationalePredictorConfig()).placements  # any token model may say what the reasons are


@kinds
def test_a_call_without_its_reasons_or_with_others_is_refused(attention: str) -> None:
    model = host()
    attached(model, attention=attention, length=6)
    with pytest.raises(aa.SignalError, match="needs the signal 'rationale_logits'|at most 6 tokens, and these have 7"):
        model(input_ids=IDS, attention_mask=MASK)
    short = {"input_ids": IDS[:, :5], "attention_mask": MASK[:, :5]}
    with pytest.raises(aa.SignalError, match="needs the signal 'rationale_logits'"):
        model(**short)
    with (
        aa.signals(model, rationale_logits=reasons()),
        pytest.raises(aa.SignalError, match=r"is \(2, 7, 2\); expected \(2, 5, 2\)"),
    ):
        model(**short)
    with pytest.raises(aa.SignalError, match="without the encoder before it"):
        model.get_submodule("classifier")(torch.zeros(2, 16))


def test_targets_need_a_head() -> None:
    model, _ = predictor(targets=())
    assert model(input_ids=IDS).target_probs is None
    with pytest.raises(aa.SignalError, match="knows no targets"):
        model(input_ids=IDS, targets=TAUGHT["targets"])
