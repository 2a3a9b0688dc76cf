"""P-Adapters that lay out the query anew: prefix, P-tuning, experts; and rewrites of what the model makes of the query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.p_adapter import read_official, write_official
from anyadapter.methods.language.p_adapter import PAdapter, fit_relations, query_features

CLS, MASK, SEP = 2, 4, 3
BOTH = ("mask", "subject")
SIGNALS = ("subject_mask", "relation")
PTUNING = {"variant": "ptuning", "keep": BOTH, "mask_token_id": MASK, "template": (2, 1, 3)}
EXPERTS = {**PTUNING, "variant": "experts", "relations": ("capital", "tongue", "coin")}
CHANGED: dict[str, dict[str, Any]] = {
    "prefix": {"variant": "prefix", "prompts": 4},
    "ptuning": PTUNING,
    "ptuning-mo": {**PTUNING, "keep": ("mask",)},
    "experts": EXPERTS,
    "ensemble": {**EXPERTS, "ensemble": 5},
}
MODELS = {name: case(name).build().requires_grad_(False) for name in ("bert", "roberta", "distilbert", "llama")}


def adapted(model: nn.Module, **config: Any) -> PAdapter:
    torch.manual_seed(0)
    for name in list(aa.adapters(model)):
        aa.detach(model, name)
    adapter = aa.attach(model, aa.PAdapterConfig(**config))
    assert isinstance(adapter, PAdapter)
    return adapter


@st.composite
def queries(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows: CLS, words with one mask token and a subject of some tokens, SEP; and the relation asked for."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        words = draw(st.lists(st.integers(6, 60), min_size=0, max_size=4))
        subject = draw(st.lists(st.integers(6, 60), min_size=1, max_size=3))
        at = draw(st.integers(0, len(words)))
        ids = words[:at] + subject + words[at:]
        marks = [0] * at + [1] * len(subject) + [0] * (len(words) - at)
        gap = draw(st.sampled_from([i for i in range(len(ids) + 1) if not at < i < at + len(subject)]))
        rows.append(
            {
                "ids": [CLS, *ids[:gap], MASK, *ids[gap:], SEP],
                "subject_mask": [0, *marks[:gap], 0, *marks[gap:], 0],
                "relation": draw(st.integers(0, 2)),
            }
        )
    return rows


def batch(rows: list[dict[str, Any]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """Rows padded on one side."""
    length = max(len(row["ids"]) for row in rows)

    def padded(key: str, filling: int) -> Tensor:
        lists = [(row[key], [filling] * (length - len(row["ids"]))) for row in rows]
        return torch.tensor([p + x if left else x + p for x, p in lists])

    rows = [{**row, "attention_mask": [1] * len(row["ids"])} for row in rows]
    return {
        "input_ids": padded("ids", pad),
        "attention_mask": padded("attention_mask", 0),
        "subject_mask": padded("subject_mask", 0),
        "relation": torch.tensor([row["relation"] for row in rows]),
    }


def ask(model: nn.Module, given: dict[str, Tensor], **more: Any) -> Any:
    """The model's outputs, with the signals its adapter reads."""
    (adapter,) = aa.adapters(model).values()
    values = {name: given[name] for name in adapter.reads}
    with torch.no_grad(), aa.signals(model, **values):
        return model(**{k: v for k, v in given.items() if k not in SIGNALS}, **more)


def pad_of(name: str) -> int:
    return MODELS[name].config.pad_token_id or 0  # type: ignore[union-attr]


@torch.no_grad()
def expected(model: nn.Module, adapter: PAdapter, row: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """Logits of one row alone, laid out by hand, and which of its tokens stand where in them (−1: a vector)."""
    config, table = adapter.config, model.get_input_embeddings()
    ids, n = row["ids"], len(row["ids"])
    if config.variant == "experts":
        vectors = adapter.experts[row["relation"]]()
    else:
        hidden = adapter.lstm_head(table(torch.tensor([ids])))[0][0].amax(0)
        vectors = adapter.mlp_head(hidden).view(adapter.count, -1)
    subject = [i for i in range(n) if row["subject_mask"][i]] if "subject" in config.keep else []
    a, b, c = ([-1] * count for count in config.template)
    place = [0, *a, ids.index(MASK), *b, *subject, *c, n - 1]
    if config.variant == "prefix":
        place = [-1] * config.prompts + list(range(n))
    parts = iter(vectors)
    embeddings = torch.stack([next(parts) if i < 0 else table.weight[ids[i]] for i in place])
    with adapter.disabled():
        return model(inputs_embeds=embeddings[None]).logits[0], place


# ------------------------------------------------------------------ what the model reads, and what comes back


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("variant", CHANGED)
@given(rows=queries())
@settings(max_examples=8, deadline=None)
def test_every_row_is_answered_as_if_laid_out_by_hand_alone(
    name: str, variant: str, rows: list[dict[str, Any]]
) -> None:
    model = MODELS[name]
    adapter = adapted(model, **CHANGED[variant])
    given = batch(rows, pad_of(name))
    logits = ask(model, given).logits
    assert logits.shape[:2] == given["input_ids"].shape
    for row, mine in zip(rows, logits):
        wanted, place = expected(model, adapter, row)
        for spot, token in enumerate(place):
            if token >= 0:
                torch.testing.assert_close(mine[token], wanted[spot], atol=1e-4, rtol=1e-3)


@given(rows=queries())
@settings(max_examples=8, deadline=None)
def test_padding_may_be_on_the_left(rows: list[dict[str, Any]]) -> None:
    """In the P-tuning layout nothing is seen of it; before a prefix, RoBERTa counts positions without it."""
    for name, config in (("bert", PTUNING), ("roberta", PTUNING), ("roberta", CHANGED["prefix"])):
        model = MODELS[name]
        adapted(model, **config)
        right, left = (batch(rows, pad_of(name), side) for side in (False, True))
        there, here = (ask(model, each).logits[each["input_ids"] == MASK] for each in (right, left))
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-3)


def test_types_and_positions_are_moved_along() -> None:
    model, rows = MODELS["bert"], [{"ids": [CLS, 9, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 0}]
    adapted(model, **CHANGED["prefix"])
    given = batch(rows, 0)
    seen: dict[str, Any] = {}
    handle = model.bert.embeddings.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    ask(model, given, token_type_ids=torch.tensor([[0, 0, 0, 1, 1]]), position_ids=torch.arange(5)[None] + 6)
    handle.remove()
    assert seen["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 1]]
    assert seen["position_ids"].tolist() == [list(range(6, 15))]
    whole = ask(model, given, output_hidden_states=True)
    assert all(h.shape[1] == 5 for h in whole.hidden_states)
    assert torch.equal(ask(model, given, return_dict=False)[0], whole.logits)


def test_tokens_without_a_place_come_back_as_zero() -> None:
    model = case("bert").build().bert.requires_grad_(False)  # type: ignore[union-attr]
    adapted(model, **PTUNING)
    row = {"ids": [CLS, 30, 9, MASK, 8, SEP], "subject_mask": [0, 0, 1, 0, 0, 0], "relation": 0}
    hidden = ask(model, batch([row], 0)).last_hidden_state[0]
    assert (hidden != 0).any(-1).tolist() == [True, False, True, True, False, True]


def test_the_loss_is_the_models_own_and_only_the_adapter_learns() -> None:
    model = MODELS["bert"]
    rows = [{"ids": [CLS, 9, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 2}] * 2
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for config in CHANGED.values():
        adapter = adapted(model, **config)
        given = batch(rows, 0)
        labels = torch.where(given["input_ids"] == MASK, 17, -100)
        with aa.signals(model, **{name: given[name] for name in adapter.reads}):
            out = model(given["input_ids"], given["attention_mask"], labels=labels)
        picked = nn.functional.cross_entropy(out.logits[:, 2], labels[:, 2])
        torch.testing.assert_close(out.loss, picked)
        out.loss.backward()
        asked = [p for name, p in adapter.named_parameters() if not name.startswith(("experts.0", "experts.1"))]
        assert asked
        assert all(p.grad is not None and (p.grad != 0).any() for p in asked)
        assert all(p.grad is None for p in adapter.parameters() if all(p is not each for each in asked))
        torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    aa.detach(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ invariants of the variants


@given(rows=queries())
@settings(max_examples=10, deadline=None)
def test_a_row_does_not_depend_on_the_others_unless_officially(rows: list[dict[str, Any]]) -> None:
    model = MODELS["bert"]
    for config in CHANGED.values():
        adapted(model, **config)
        given = batch(rows, 0)
        together = ask(model, given).logits[given["input_ids"] == MASK]
        for row, mine in zip(rows, together):
            alone = ask(model, batch([row], 0)).logits[0, row["ids"].index(MASK)]
            torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-3)


def test_the_official_prefix_depends_on_padding() -> None:
    short = {"ids": [CLS, 9, MASK, SEP], "subject_mask": [0, 1, 0, 0], "relation": 0}
    long = {"ids": [CLS, 9, 8, 7, 11, MASK, SEP], "subject_mask": [0, 1, 0, 0, 0, 0, 0], "relation": 0}
    difference = {}
    for official in (False, True):
        adapted(MODELS["bert"], variant="prefix", official=official)
        alone, together = (ask(MODELS["bert"], batch(rows, 0)).logits[0, 2] for rows in ([short], [short, long]))
        difference[official] = float((alone - together).abs().max())
    assert difference[False] < 1e-5 < 1e-4 < difference[True]


def test_ptuning_sees_the_words_only_through_the_pooled_vector() -> None:
    model = MODELS["bert"]
    adapter = adapted(model, **PTUNING)
    one = {"ids": [CLS, 9, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 0}
    other = {"ids": [CLS, 33, 44, MASK, 21, 9, SEP], "subject_mask": [0, 0, 0, 0, 0, 1, 0], "relation": 0}
    subject = {"ids": [CLS, 10, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 0}

    def at_mask(row: dict[str, Any]) -> Tensor:
        return ask(model, batch([row], 0)).logits[0, row["ids"].index(MASK)]

    assert not torch.allclose(at_mask(one), at_mask(other), atol=1e-4)
    with torch.no_grad():
        adapter.mlp_head[0].weight.zero_()  # all queries have one pooled vector now
    assert torch.equal(at_mask(one), at_mask(other))
    assert not torch.allclose(at_mask(one), at_mask(subject), atol=1e-4)


@given(rows=queries())
@settings(max_examples=10, deadline=None)
def test_experts_answer_by_relation_and_subject_alone(rows: list[dict[str, Any]]) -> None:
    model = MODELS["bert"]
    adapted(model, **EXPERTS)
    bare = []
    for row in rows:
        subject = [i for i, marked in zip(row["ids"], row["subject_mask"]) if marked]
        bare.append(
            {
                "ids": [CLS, MASK, *subject, SEP],
                "subject_mask": [0, 0, *[1] * len(subject), 0],
                **{"relation": row["relation"]},
            }
        )
    there, here = (batch(each, 0) for each in (rows, bare))
    assert torch.equal(
        ask(model, there).logits[there["input_ids"] == MASK], ask(model, here).logits[here["input_ids"] == MASK]
    )
    named = {**there, "relation": [EXPERTS["relations"][i] for i in there["relation"].tolist()]}
    assert torch.equal(ask(model, named).logits, ask(model, there).logits)


def test_a_rewrite_of_the_models_features_starts_from_its_last_hidden_states() -> None:
    model = MODELS["bert"]
    row = {"ids": [CLS, 9, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 0}
    given = batch([row], 0)
    adapter = adapted(model, features="model")
    with torch.no_grad(), adapter.disabled():
        hidden = model.bert(given["input_ids"], given["attention_mask"]).last_hidden_state
        rewritten = adapter.encode(hidden, given["attention_mask"].bool())
        wanted = model(inputs_embeds=rewritten).logits
    torch.testing.assert_close(ask(model, given).logits, wanted)


@pytest.mark.parametrize("config", [CHANGED["prefix"], {"features": "model"}])
def test_a_causal_model_goes_on_from_the_laid_out_query(config: dict[str, Any]) -> None:
    model = MODELS["llama"]
    adapter = adapted(model, **config)
    table = model.get_input_embeddings()
    rows = [[9, 33, 21, 40], [44, 7, 12, 30, 19, 8, 11]]
    padded = torch.tensor([[0] * (7 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in rows])
    made = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, 7:]
    for row, tokens in zip(rows, made.tolist()):
        with torch.no_grad():
            raw = table(torch.tensor([row]))
            if config.get("variant") == "prefix":
                pooled = adapter.lstm_head(raw)[0].amax(1)
                start = torch.cat([adapter.mlp_head(pooled).view(1, adapter.count, -1), raw], 1)
            else:
                with adapter.disabled():
                    hidden = model.model(torch.tensor([row])).last_hidden_state
                start = adapter.encode(hidden, torch.ones(1, len(row), dtype=torch.bool))
            mine: list[int] = []
            with adapter.disabled():
                for _ in range(4):
                    after = table(torch.tensor([mine], dtype=torch.long))
                    mine.append(int(model(inputs_embeds=torch.cat([start, after], 1)).logits[0, -1].argmax()))
        assert tokens == mine


def test_a_prefix_goes_before_the_encoder_of_an_encoder_decoder() -> None:
    family = case("t5")
    model = family.build().requires_grad_(False)
    inputs = family.inputs(model, 2)
    with torch.no_grad():
        before = model(**inputs).logits
        adapted(model, variant="prefix", targets="encoder:text_embedding")
        after = model(**inputs)
    assert after.logits.shape == before.shape
    assert not torch.allclose(after.logits, before, atol=1e-4)
    assert after.encoder_last_hidden_state.shape[1] == inputs["input_ids"].shape[1]


def test_the_relation_is_told_from_the_frozen_models_states() -> None:
    model = MODELS["bert"]
    adapted(model, **EXPERTS)
    generator = torch.Generator().manual_seed(0)
    relations = torch.arange(300) % 3
    ids = torch.randint(6, 60, (300, 6), generator=generator)
    ids[:, 2:4] = 50 + relations[:, None]  # words that tell it, among others
    mask = torch.ones_like(ids)
    features = query_features(model, ids, mask)
    with torch.no_grad(), aa.disabled(model):
        torch.testing.assert_close(features, model.bert(ids, mask).last_hidden_state.mean(1))
    classifier = fit_relations(features[:200], relations[:200], 3)
    assert (classifier(features[200:]).argmax(-1) == relations[200:]).float().mean() > 0.8


# ------------------------------------------------------------------ files and refusals


@pytest.mark.parametrize("variant", CHANGED)
def test_it_is_saved_and_loaded_here_and_as_the_authors_do(variant: str, tmp_path: Path) -> None:
    model, other = (case("bert").build().requires_grad_(False) for _ in range(2))
    other.load_state_dict(model.state_dict())
    adapter = adapted(model, **CHANGED[variant])
    given = batch([{"ids": [CLS, 9, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 1}], 0)
    aa.save_pretrained(model, tmp_path / "ours")
    assert aa.load(other, tmp_path / "ours").config == adapter.config
    assert torch.equal(ask(other, given).logits, ask(model, given).logits)
    aa.detach(other)
    relations = adapter.config.relations or ("",)
    files = {}
    for i, relation in enumerate(relations):
        state = write_official(adapter, relation or None)
        files[relation] = tmp_path / f"{i}.ckpt"
        base = {"mlm_embeddings.weight": model.get_input_embeddings().weight, "transformer.x": torch.zeros(1)}
        torch.save({"embedding": {**state, **base}, "dev_hit@1": 0.5}, files[relation])
    settings = {k: v for k, v in CHANGED[variant].items() if k in ("keep", "mask_token_id", "template")}
    source: Any = files if adapter.config.relations else files[""]
    config, tensors = read_official(source, aa.Host.of(other), allow_pickle=True, **settings)
    assert config == adapter.config
    aa.attach(other, config).load_tensors(tensors)
    assert torch.equal(ask(other, given).logits, ask(model, given).logits)


def test_official_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = MODELS["bert"]
    adapter = adapted(model, **PTUNING)
    host, state = aa.Host.of(model), write_official(adapter)
    table = torch.randn_like(model.get_input_embeddings().weight)
    with pytest.raises(aa.ArtefactError, match="another base"):
        read_official({**state, "mlm_embeddings.weight": table}, host, mask_token_id=MASK)
    with pytest.raises(aa.ConfigError, match="mask_token_id"):
        read_official(state, host)
    with pytest.raises(aa.ArtefactError, match=r"mlp_head\.2\.weight is .*expected"):
        read_official(state, host, mask_token_id=MASK, template=(3, 3, 3))
    torch.save({"embedding": state, "args": Opaque()}, tmp_path / "theirs.ckpt")
    with pytest.raises(aa.ArtefactError, match=r"(?s)was not loaded.*with omegaconf installed.*plain\.ckpt"):
        read_official(tmp_path / "theirs.ckpt", host, allow_pickle=True, mask_token_id=MASK)
    experts = adapted(model, **EXPERTS)
    with pytest.raises(aa.ArtefactError, match="one expert's"):
        write_official(experts)


class Opaque:
    """Stands for the settings of another package in a pickle."""


def test_queries_that_cannot_be_laid_out_are_errors() -> None:
    model = MODELS["bert"]
    adapted(model, **PTUNING)
    row = {"ids": [CLS, 9, MASK, 8, SEP], "subject_mask": [0, 1, 0, 0, 0], "relation": 0}
    for change, message in (
        ({"ids": [CLS, 9, 10, 8, SEP]}, r"row 1 of the batch has not one mask token \(4\)"),
        ({"ids": [CLS, 9, MASK, MASK, SEP]}, "row 1 of the batch has not one mask token"),
        ({"subject_mask": [0] * 5}, "row 1 of the batch has no token at which subject_mask is true"),
    ):
        with pytest.raises(aa.SignalError, match=message):
            ask(model, batch([row, {**row, **change}], 0))
    adapted(model, **EXPERTS)
    for relation, message in (
        (["capitol"], "Did you mean 'capital'"),
        (torch.tensor([3]), "one of 3"),
        (torch.tensor([0, 1]), "each of 1"),
    ):
        with pytest.raises(aa.SignalError, match=message):
            ask(model, {**batch([row], 0), "relation": relation})
    adapted(model, **CHANGED["prefix"])
    with pytest.raises(aa.ConfigError, match="has no scale"):
        aa.adapters(model)["default"].scale = 0.5


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("variant", {"variant": "suffix"}),
        ("keep", {"variant": "ptuning", "mask_token_id": 4}),
        ("keep", {"variant": "prefix", "keep": ("subject",)}),
        ("alpha", {"variant": "prefix", "alpha": 0.5}),
        ("features", {"features": "tokens"}),
        ("features", {"variant": "prefix", "features": "model"}),
        ("prompts", {"variant": "prefix", "prompts": 0}),
        ("template", {**PTUNING, "template": (3, 3, 0)}),
        ("relations", {**EXPERTS, "relations": ()}),
        ("relations", {**EXPERTS, "relations": ("a", "a")}),
        ("relations", {"relations": ("a",)}),
        ("ensemble", {**PTUNING, "ensemble": 3}),
        ("official", {"official": True}),
        ("mask_token_id", {**PTUNING, "mask_token_id": None}),
    ],
)
def test_settings_that_do_not_go_together_are_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(aa.ConfigError, match=rf"PAdapterConfig\.{name} is"):
        aa.PAdapterConfig(**config)
