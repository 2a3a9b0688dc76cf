"""Knowledge adapters: the card's invariants, on tiny encoders of both families, and the authors' counts of parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import case
from hypothesis import given
from hypothesis import strategies as st
from mixing import PROPERTY, randomise
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

import anyadapter as aa
from anyadapter.methods.language.mlkg import MLKG, ROLES, WIDE, Fusion, Knowledge, embed, info_nce, pool

FOUR = tuple(ROLES)
ENCODERS = ["bert", "roberta"]


def adapted(name: str = "bert", std: float = 0.3, **settings: Any) -> tuple[nn.Module, MLKG]:
    model = case(name).build().requires_grad_(False)
    adapter = aa.attach(model, aa.MLKGConfig(reduction=4, **settings))
    assert isinstance(adapter, MLKG)
    return model, randomise(adapter, 1, std)  # type: ignore[return-value]


def run(model: nn.Module, name: str = "bert") -> Tensor:
    return case(name).output(model(**case(name).inputs(model, 2)))


# -------------------------------------------------------------------------- which act


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_with_none_in_use_the_base_is_exact_and_each_and_all_differ(name: str) -> None:
    model, adapter = adapted(name)
    with aa.disabled(model):
        base = run(model, name)
    outputs = {}
    for used in ((), *((role,) for role in FOUR), ("ep", "tp"), FOUR):
        adapter.use(*used)
        outputs[used] = run(model, name)
    assert torch.equal(outputs.pop(()), base)
    found = list(outputs.values())
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(found) for b in (base, *found[:i]))
    aa.detach(model)
    assert torch.equal(run(model, name), base)


@PROPERTY
@given(roles=st.permutations(FOUR), count=st.integers(2, 4), seed=st.integers(0, 99))
@torch.no_grad()
def test_the_order_in_which_they_are_named_is_of_no_account(roles: list[str], count: int, seed: int) -> None:
    model, adapter = adapted()
    randomise(adapter, seed)
    adapter.use(*roles[:count])
    one = run(model)
    adapter.use(*sorted(roles[:count]))
    torch.testing.assert_close(run(model), one, atol=1e-5, rtol=1e-4)


@PROPERTY
@given(
    width=st.integers(1, 24),
    count=st.integers(1, 5),
    lead=st.lists(st.integers(1, 4), max_size=2),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_fusion_weights_sum_to_one_and_a_fresh_fusion_of_one_is_that_one(
    width: int, count: int, lead: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    fusion = Fusion(width, 0.1).eval()
    x, z = torch.randn(*lead, width), torch.randn(*lead, count, width)
    weights = fusion.weights(x, z)
    assert weights.shape == (*lead, count)
    torch.testing.assert_close(weights.sum(-1), torch.ones(lead))
    torch.testing.assert_close(fusion(x, z[..., :1, :]), z[..., 0, :], atol=1e-3, rtol=0)
    low, high = z.amin(-2) - 1e-3, z.amax(-2) + 1e-3  # a mean with weights
    assert ((low <= fusion(x, z)) & (fusion(x, z) <= high)).all()


def test_the_formula_of_one_layer() -> None:
    """LN(Σ α (Wv z) + f + a), with f after the dropout and x = LN(f + a)."""
    model, adapter = adapted()
    (path, branch), *_ = adapter.branches.items()
    assert isinstance(branch, Knowledge)
    block = model.get_submodule(path.removeprefix("/").replace("/", "."))
    h, a = torch.randn(2, 3, block.dense.in_features), torch.randn(2, 3, block.dense.out_features)
    f = block.dense(h)
    x = block.LayerNorm(f + a)
    z = []
    for role in FOUR:
        part: Any = branch.adapters[role]
        z.append(part.adapter_up(F.relu(part.adapter_down(x))))
    fusion: Any = branch.fusion
    scores = torch.stack([(fusion.query(x) * fusion.key(each)).sum(-1) for each in z], -1)
    mixed = sum(w[..., None] * fusion.value(each) for w, each in zip(scores.softmax(-1).unbind(-1), z))
    torch.testing.assert_close(block(h, a), block.LayerNorm(mixed + f + a), atol=1e-5, rtol=1e-4)
    adapter.use("tp")
    torch.testing.assert_close(block(h, a), block.LayerNorm(z[1] + f + a), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("group", "used"), [*((role, (role,)) for role in FOUR), ("fusion", FOUR)])
def test_a_stage_gives_gradients_to_its_own_tensors_alone(group: str, used: tuple[str, ...]) -> None:
    model, adapter = adapted()
    adapter.train_only(group)
    adapter.use(*used)
    run(model).pow(2).mean().backward()
    mark = ".fusion." if group == "fusion" else f".adapters.{group}."
    for name, tensor in adapter.tensors().items():
        assert (tensor.grad is not None and bool(tensor.grad.abs().sum() > 0)) == (mark in name), name
    mine = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)


def test_any_set_of_knowledge_can_be_fused_and_one_alone_has_no_fusion() -> None:
    _, adapter = adapted(roles={"plants": "what plants are", "stars": "what stars are"}, use="stars")
    assert list(adapter.groups) == ["plants", "stars", "fusion"]
    assert adapter.config.use == ("stars",)
    _, alone = adapted(roles={"plants": "what plants are"})
    assert list(alone.groups) == ["plants"]
    assert not any("fusion" in name for name in alone.tensors())


# -------------------------------------------------------------------------- what the library asks of every method


@torch.no_grad()
def test_what_was_in_use_is_saved_and_a_step_of_training_is_not(tmp_path: Path) -> None:
    model, adapter = adapted()
    adapter.use("es", "tp")
    expected = run(model)
    adapter.act("ep")
    assert not torch.allclose(run(model), expected, atol=1e-3)
    aa.save_pretrained(model, tmp_path / "set")
    other = case("bert").build()
    loaded = aa.load(other, tmp_path / "set")
    assert loaded.config == adapter.config
    assert loaded.config.roles["tp"] == ROLES["tp"]  # the files say what each knows
    assert torch.equal(run(other), expected)
    model.eval()
    assert torch.equal(run(model), expected)


@torch.no_grad()
def test_scale_and_rows(tmp_path: Path) -> None:
    model, adapter = adapted()
    full = run(model)
    with aa.disabled(model):
        base = run(model)
    with adapter.routed(torch.tensor([1.0, 0.0])):
        mixed = run(model)
    torch.testing.assert_close(mixed, torch.stack([full[0], base[1]]), atol=1e-5, rtol=1e-4)
    adapter.scale = 0.0
    torch.testing.assert_close(run(model), base, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_average_has_the_mean_of_the_tensors() -> None:
    model, one = adapted()
    two = randomise(aa.attach(model, one.config, "two"), 2)
    mean = aa.average(model, {"default": 0.5, "two": 0.5}, "mean")
    for name, tensor in mean.tensors().items():
        torch.testing.assert_close(tensor, (one.tensors()[name] + two.tensors()[name]) / 2)


@torch.no_grad()
def test_a_copy_has_its_own_and_a_half_precision_base_keeps_its_dtype() -> None:
    model, adapter = adapted()
    twin = copy.deepcopy(model)
    copied = aa.adapters(twin)["default"]
    assert torch.equal(run(twin), run(model))
    randomise(copied, 7)
    assert not torch.allclose(run(twin), run(model), atol=1e-3)
    assert adapter.config == copied.config
    half = case("bert").build().to(torch.bfloat16)
    aa.attach(half, aa.MLKGConfig(reduction=4))
    assert run(half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"roles": {}}, "roles"),
        ({"roles": {"a.b": ""}}, "letters"),
        ({"roles": {"keys": ""}}, "torch's own"),
        ({"roles": {"fusion": ""}}, "fusion"),
        ({"use": "pe"}, "of ep, tp, es, ts"),
        ({"use": ("ep", "ep")}, "at most once"),
        ({"reduction": 0}, "positive"),
        ({"activation": "no"}, "relu"),
        ({"fusion_dropout": 1.0}, "below 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(aa.ConfigError, match=says):
        aa.MLKGConfig(**settings)


def test_an_unknown_adapter_or_another_architecture_is_refused_and_nothing_changes() -> None:
    _, adapter = adapted()
    with pytest.raises(aa.ConfigError, match="no adapter 'eq'. Did you mean .*'ep'"):
        adapter.use("eq")
    assert adapter.config.use == FOUR
    with pytest.raises(aa.TargetError, match="output_block"):
        aa.attach(case("llama").build(), aa.MLKGConfig())


XLMR = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("build", "base", "whole"),
    [
        (lambda: BertModel(BertConfig(vocab_size=119547)), 177_853_440, 202_683_648),
        (lambda: XLMRobertaModel(XLMRobertaConfig(**XLMR)), 278_043_648, 302_873_856),
        (lambda: XLMRobertaModel(XLMRobertaConfig(**XLMR, **LARGE)), 559_890_432, 648_124_416),
    ],
)
def test_the_authors_counts_of_parameters(build: Any, base: int, whole: int) -> None:
    with torch.device("meta"):
        model = build()
        assert sum(p.numel() for p in model.parameters()) == base
        assert aa.attach(model, aa.MLKGConfig()).parameter_count() == whole - base
        aa.detach(model)
        if base == 177_853_440:
            assert aa.attach(model, WIDE).parameter_count() == 28_348_416


# -------------------------------------------------------------------------- embeddings and the loss


@pytest.fixture(scope="module")
def encoder(letters_bert: Path) -> tuple[Any, Any]:
    """A tiny encoder with knowledge of nothing yet."""
    model = AutoModel.from_pretrained(letters_bert).eval()
    aa.attach(model, aa.MLKGConfig())
    return model, AutoTokenizer.from_pretrained(letters_bert)


TEXTS = ["Hund", "a dog that runs after a ball in the park", "собака", "un chien, une chaise et deux tables"]


def test_a_text_alone_and_among_others_has_one_embedding_unless_padding_counts(encoder: tuple[Any, Any]) -> None:
    together = embed(*encoder, TEXTS)
    alone = torch.cat([embed(*encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embed(*encoder, TEXTS, batch=2), together, atol=1e-5, rtol=1e-4)
    official = embed(*encoder, TEXTS, official=True)
    lengths = [len(ids) for ids in encoder[1](TEXTS)["input_ids"]]
    for i, length in enumerate(lengths):
        assert torch.allclose(official[i], alone[i], atol=1e-4) == (length == max(lengths))


@PROPERTY
@given(
    n=st.integers(1, 6), m=st.integers(1, 5), d=st.integers(2, 9), factor=st.floats(0.1, 50), seed=st.integers(0, 99)
)
def test_info_nce_knows_no_lengths_of_vectors_and_is_its_formula(
    n: int, m: int, d: int, factor: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, p, other = (torch.randn(rows, d, generator=draw, dtype=torch.float64) for rows in (n, n, m))
    near = F.cosine_similarity(q[:, None], p[None], dim=-1) / 0.1
    torch.testing.assert_close(info_nce(q, p), (near.logsumexp(1) - near.diagonal()).mean())
    torch.testing.assert_close(info_nce(q * factor, p / factor), info_nce(q, p))
    far = F.cosine_similarity(q[:, None], other[None], dim=-1) / 0.1
    whole = torch.cat([near.diagonal()[:, None], far], dim=1).logsumexp(1)
    torch.testing.assert_close(info_nce(q, p, other), (whole - near.diagonal()).mean())


def test_info_nce_is_not_symmetric() -> None:
    q, p = torch.eye(3), torch.tensor([[1.0, 0.2, 0.1], [0.9, 1.0, 0.0], [0.3, 0.0, 1.0]])
    assert abs(info_nce(q, p) - info_nce(p, q)) > 1e-3


def test_pooling_leaves_padding_out() -> None:
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(pool(hidden, mask), torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]))
    torch.testing.assert_close(pool(hidden, mask, official=True), hidden.mean(1))
