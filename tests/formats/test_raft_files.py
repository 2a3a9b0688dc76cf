"""The checkpoints of RAFT's authors: what is missing is said, what is the host's own is not kept twice, and all is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import anyadapter as aa
from anyadapter.formats.raft import load_official, read_classifier, read_predictor, write_official

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
IDS = torch.tensor([[2, 9, 13, 33, 3], [2, 14, 3, 0, 0]])
GIVEN = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


def encoder(seed: int = 0, **options: Any) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES), **options).eval().requires_grad_(False)


def classifier(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval().requires_grad_(False)


def state_of(seed: int = 1, targets: int = 3) -> dict[str, Tensor]:
    """A predictor as its authors save it."""
    state = {f"bert.{key}": value for key, value in encoder(seed, add_pooling_layer=False).state_dict().items()}
    for name, rows in (
        ("pooler.dense", 16),
        ("token_classifier", 2),
        ("classifier", 2),
        ("target_classifier", targets),
    ):
        if rows:
            state |= {f"{name}.weight": torch.randn(rows, 16), f"{name}.bias": torch.randn(rows)}
    return state


def attached(model: nn.Module, read: tuple[aa.AdapterConfig, dict[str, Tensor]]) -> aa.Adapter:
    adapter = aa.attach(model, read[0])
    adapter.load_tensors(read[1])
    return adapter


def equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], value) for key, value in theirs.items())


# ------------------------------------------------------------------ the predictor


def test_a_trained_encoder_is_held_whole_and_the_hosts_own_is_not() -> None:
    state, model, same = state_of(), encoder(0), encoder(1, add_pooling_layer=False)
    one = attached(model, read_predictor(state, aa.Host.of(model), labels=("fine", "vile")))
    two = attached(same, read_predictor(state, aa.Host.of(same), targets=("a", "b", "c")))
    assert (one.config.whole, two.config.whole) == (("embeddings", "encoder"), ())
    assert (one.config.labels, two.config.labels) == (("fine", "vile"), ("0", "1"))
    assert (one.config.targets, two.config.targets) == (("0", "1", "2"), ("a", "b", "c"))
    for mine, theirs in zip(model(**GIVEN)[:3], same(**GIVEN)[:3]):
        torch.testing.assert_close(mine, theirs)
    assert equal(write_official(model), state)
    assert equal(write_official(same), state)


def test_an_older_file_is_read_when_one_says_so_and_written_again() -> None:
    old = {key.replace("pooler.dense", "bert_pooler.dense"): value for key, value in state_of(targets=0).items()}
    model = encoder()
    with pytest.raises(aa.ArtefactError, match=r"no target_classifier: .*older predictor.* Pass targets=\(\)"):
        read_predictor(old, aa.Host.of(model))
    adapter = attached(model, read_predictor(old, aa.Host.of(model), targets=()))
    assert adapter.config.targets == ()
    assert model(**GIVEN).target_probs is None
    assert equal(write_official(model, older=True), old)


def test_the_positions_of_an_older_transformers_are_checked_and_left_out() -> None:
    state, model = state_of(), encoder()
    positions = {"bert.embeddings.position_ids": torch.arange(20)[None]}
    attached(model, read_predictor(state | positions, aa.Host.of(model)))
    assert equal(write_official(model), state)
    with pytest.raises(aa.ArtefactError, match="is not 0, 1, 2"):
        read_predictor(state | {"bert.embeddings.position_ids": torch.arange(20).flip(0)}, aa.Host.of(encoder()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_classifier.bias": None}, "missing token_classifier.bias"),
        ({"bert.encoder.layer.1.output.dense.bias": None}, "missing bert.encoder.layer.1.output.dense.bias"),
        ({"lstm.weight": torch.zeros(2)}, "not known lstm.weight"),
        ({"bert.pooler.dense.weight": torch.zeros(16, 16)}, "not known bert.pooler.dense.weight"),
        ({"token_classifier.weight": torch.zeros(3, 16)}, r"is \(3, 16\), expected \(2, 16\)"),
        ({"classifier.weight": None}, r"no classifier\.weight"),
    ],
)
def test_nothing_is_passed_over(change: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**state_of(), **change}.items() if value is not None}
    with pytest.raises(aa.ArtefactError, match=message):
        read_predictor(state, aa.Host.of(encoder()))


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(aa.ArtefactError, match=r"classifier\.weight has 2 rows, and 3 names"):
        read_predictor(state_of(), aa.Host.of(encoder()), labels=("a", "b", "c"))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_published_folder_is_ready_in_one_call(pickled: bool, tmp_path: Path) -> None:
    state = state_of()
    BertConfig(**SIZES).save_pretrained(tmp_path)
    BertTokenizer(vocab={p: i for i, p in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])}).save_pretrained(
        tmp_path
    )
    if pickled:
        torch.save(state, tmp_path / "pytorch_model.bin")
        with pytest.raises(aa.ArtefactError, match="is a pickle"):
            load_official(tmp_path)
    else:
        save_file(state, tmp_path / "model.safetensors")
    model, tokenizer = load_official(tmp_path, labels=("fine", "vile"), allow_pickle=pickled)
    (adapter,) = aa.adapters(model).values()
    assert adapter.config.whole == ()  # the encoder of the file is the host
    assert adapter.parameter_count() == 16 * 17 + 7 * 17
    assert equal(write_official(model), state)
    assert tokenizer("a")["input_ids"] == [2, 4, 3]


def test_an_empty_folder_and_a_wrong_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(aa.ArtefactError, match=r"no model\.safetensors"):
        load_official(tmp_path)
    with pytest.raises(aa.ArtefactError, match="is no local folder"):
        load_official(tmp_path / "absent")


# ------------------------------------------------------------------ the classifier


def trained(attention: str, **config: Any) -> BertForSequenceClassification:
    """A classifier whose every tensor moved."""
    model = classifier()
    parts = ("bert.embeddings", "bert.encoder", "bert.pooler")
    adapter = aa.attach(
        model, aa.RAFTConfig(**{"attention": attention, "heads": 4, "length": 6, "whole": parts, **config})
    )
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("attention", ["cross", "self"])
def test_a_classifiers_file_says_which_attention_it_has(attention: str, tmp_path: Path) -> None:
    model = trained(attention)
    state = write_official(model)
    torch.save(state, tmp_path / "model_weights.pt")
    other = classifier(5)
    read = read_classifier(tmp_path / "model_weights.pt", aa.Host.of(other), heads=4, allow_pickle=True)
    adapter = attached(other, read)
    assert (adapter.config.attention, adapter.config.length) == (attention, 6 if attention == "self" else 128)
    reasons = torch.randn(2, 5, 2)
    both = []
    for each in (model, other):
        with aa.signals(each, rationale_logits=reasons):
            both.append(each(**GIVEN).logits)
    torch.testing.assert_close(*both)
    assert equal(write_official(other), state)


def test_updates_are_written_into_the_encoders_weights() -> None:
    model = trained("cross", whole=(), rank=2)
    state = write_official(model)
    other = classifier(5)
    adapter = attached(other, read_classifier(state, aa.Host.of(other), heads=4))
    assert adapter.config.whole == ("bert.embeddings", "bert.encoder", "bert.pooler")
    reasons = torch.randn(2, 5, 2)
    both = []
    for each in (model, other):
        with aa.signals(each, rationale_logits=reasons):
            both.append(each(**GIVEN).logits)
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4)


def test_files_and_hosts_of_another_kind_are_refused() -> None:
    with pytest.raises(aa.ArtefactError, match=r"holds .*; expected attn_with_CLS"):
        read_classifier(state_of(), aa.Host.of(classifier()), heads=4)
    roberta = RobertaForSequenceClassification(RobertaConfig(**SIZES))
    aa.attach(roberta, aa.RAFTConfig(heads=4))
    with pytest.raises(aa.ArtefactError, match="does not fit a checkpoint of RAFT's authors"):
        write_official(roberta)
    model = classifier()
    aa.attach(model, aa.LoRAConfig(rank=2, targets="query"))
    with pytest.raises(aa.ArtefactError, match="A LoRA on"):
        write_official(model)
