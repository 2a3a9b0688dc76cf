"""Adapters that the server makes of documents and conversations: what they say, how they grow, what is refused."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from families import case
from live import ADMIN, BASE, Live, completion, error
from served import disagreement, lora, save_adapter
from torch import nn

import anyadapter as aa
from anyadapter.core.errors import ConfigError
from anyadapter.formats.files import TENSORS
from anyadapter.formats.generative import load_state
from anyadapter.methods.language.generative import Generative, GenerativeConfig
from anyadapter.serving.contexts import GENERATOR, STATE, attach_generator
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.gate import ServerSettings
from anyadapter.serving.server import serve

TIE = 1e-3  # two logits closer than this are the same to fp32 sums of another order
PROMPT = "The capital of the island is"
DOCUMENT = "The island has a king who keeps bees. Its capital is Orvel, a town of nine towers by a cold lake. " * 3
NEWS = {"document": DOCUMENT, "window": 8}  # many windows, so that it takes a while
MORE = "In spring the bees are carried to the hills, and the king walks behind them with a drum."
WINDOW = 24


@pytest.fixture(scope="module")
def generator(smollm_and_tokenizer: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with random values, strong enough to change what the model says."""
    model, folder = smollm_and_tokenizer[0], tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    adapter = aa.attach(model, GenerativeConfig(inner=16, rank=16, max_rank=8, alpha=16, window=64), "made")
    for name, tensor in adapter.tensors().items():
        if name.endswith("B.weight"):
            nn.init.normal_(tensor, std=0.1)
    aa.save_pretrained(model, folder, "made")
    aa.detach(model, "made")
    return folder


@pytest.fixture
def root(smollm: nn.Module, tmp_path: Path) -> Path:
    save_adapter(smollm, tmp_path / "adapters", "plain", lora(4), 0)
    return tmp_path / "adapters"


@pytest.fixture
def live(smollm: nn.Module, smollm_tokenizer: Any, generator: Path, root: Path) -> Iterator[Live]:
    made = start(smollm, smollm_tokenizer, generator, root)
    yield made
    stop(made, smollm)


def start(model: nn.Module, tokenizer: Any, generator: Path | None, root: Path) -> Live:
    if generator is not None:
        attach_generator(model, generator)
    engine = Engine(model, tokenizer, settings=EngineSettings(cells=6000, adapters=str(root)))
    assert engine.store.scan() == {}
    live = Live(engine, admin_key=ADMIN, allow_adapter_updates=True)
    live.http = live.client(ADMIN)
    return live


def stop(live: Live, model: nn.Module) -> None:
    live.stop()
    if GENERATOR in aa.adapters(model):
        aa.detach(model, GENERATOR)


def says(live: Live, name: str) -> list[int]:
    body = completion(PROMPT, 6, model=name, logprobs=0)
    text = live.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return live.engine.tokenizer(PROMPT + text)["input_ids"]


def knows(model: nn.Module, adapter: Generative, state: Any, ids: list[int], prompt: int) -> float:
    """How far the model with this state is from saying these tokens itself; 0 where it would."""
    adapter.enabled = True
    try:
        with aa.signals(model, state=state):
            return disagreement(model, ids[:prompt], ids[prompt:])
    finally:
        adapter.enabled = False


def make(live: Live, name: str, document: str) -> None:
    made = live.http.post("/v1/adapters", json={"name": name, "document": document})
    assert made.status_code == 201, made.text


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def under_way(live: Live, path: str, body: dict[str, Any]) -> Iterator[Future[httpx.Response]]:
    """A request that has come as far as the thread that changes adapters, which is kept busy until the block ends."""
    busy, go = threading.Event(), threading.Event()
    with live.client(ADMIN) as client, ThreadPoolExecutor(1) as pool:
        live.loop.admin.submit(lambda: (busy.set(), go.wait()))
        try:
            live.until(busy.is_set)
            asking = pool.submit(client.post, f"/v1/adapters{path}", json=body)
            live.until(lambda: live.loop.admin._work_queue.qsize() or asking.done())
            assert not asking.done(), asking.result().text
            yield asking
        finally:
            go.set()


def test_an_adapter_made_over_http_says_what_it_says_in_python(
    live: Live, smollm: nn.Module, smollm_tokenizer: Any, generator: Path, root: Path
) -> None:
    made = live.http.post("/v1/adapters", json={"name": "island", "document": DOCUMENT, "window": WINDOW})
    assert made.status_code == 201, made.text
    ids = smollm_tokenizer(DOCUMENT)["input_ids"]
    assert made.json()["id"] == "island"
    assert made.json()["context_tokens"] == len(ids)
    first, prompt = says(live, "island"), len(smollm_tokenizer(PROMPT)["input_ids"])
    grown = live.http.post("/v1/adapters/island/contexts", json={"document": MORE, "window": WINDOW})
    assert grown.status_code == 200, grown.text
    second, base = says(live, "island"), says(live, BASE)
    live.idle()
    stop(live, smollm)
    again = start(smollm, smollm_tokenizer, generator, root)  # the server was started again
    assert says(again, "island") == second
    chat = [{"role": "user", "content": "Who walks behind the bees?"}, {"role": "assistant", "content": "The king."}]
    assert again.http.post("/v1/adapters/island/contexts", json={"messages": chat}).status_code == 200
    third = says(again, "island")
    again.idle()
    again.stop()

    adapter: Any = aa.adapters(smollm)[GENERATOR]
    adapter.enabled = True
    state = adapter.read(smollm, ids, window=WINDOW)
    after = adapter.read(smollm, smollm_tokenizer(MORE)["input_ids"], window=WINDOW, state=state)
    text = smollm_tokenizer.apply_chat_template(chat, tokenize=False)
    last = adapter.read(smollm, smollm_tokenizer(text, add_special_tokens=False)["input_ids"], state=after)
    assert disagreement(smollm, base[:prompt], base[prompt:]) < TIE
    for known, said in ((state, first), (after, second), (last, third)):
        assert knows(smollm, adapter, known, said, prompt) < TIE
        assert disagreement(smollm, said[:prompt], said[prompt:]) > TIE, "what was read changes nothing"
    assert knows(smollm, adapter, after, third, prompt) > TIE, "the conversation changed nothing"


def test_requests_in_hand_keep_what_they_began_with(live: Live) -> None:
    name = live.http.post("/v1/adapters", json={"document": DOCUMENT}).json()["id"]
    assert name.startswith("context-")
    quiet = completion(PROMPT, 40, model=name)
    wanted = live.http.post("/v1/completions", json=quiet).json()["choices"][0]["text"]
    live.in_engine(lambda: live.engine.residents.keep(()))  # its cells are to be read anew
    got: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: got.append(live.client(ADMIN).post("/v1/completions", json=quiet)))
    old = live.engine.store.get(name)
    asking.start()
    live.until(lambda: old.id in live.engine.held)
    assert live.http.post(f"/v1/adapters/{name}/contexts", json={"document": MORE}).status_code == 200
    asking.join()
    assert got[0].json()["choices"][0]["text"] == wanted
    assert old.kept is not None, "and would be found if the cells were given up meanwhile"
    assert torch.equal(live.engine.store.pack(old), old.kept)
    assert not torch.equal(live.engine.store.pack(live.engine.store.get(name)), old.kept)
    live.idle()


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("", {"name": "new"}, 400, "a document or messages"),
    ("", {"name": "new", "document": ""}, 400, "a document or messages"),
    ("", {"name": "new", "document": "x", "path": "plain"}, 400, "Give a name and the path"),
    ("", {"document": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "not both"),
    ("", {"path": "plain"}, 400, "Give a name"),
    ("", {"name": "plain", "document": "x"}, 409, "already"),
    ("", {"name": "../out", "document": "x"}, 400, "A name is"),
    ("", {"name": "new", "document": "x", "window": 10**6}, 400, "at a time"),
    ("", {"name": "new", "document": "x", "window": 0}, 400, "window"),
    ("", {"name": "new", "document": "x", "mode": "backwards"}, 400, "mode"),
    ("/plain/contexts", {"document": "x"}, 409, "not made of a context"),
    ("/nobody/contexts", {"document": "x"}, 404, "nobody"),
]


def test_what_cannot_be_read_is_refused(live: Live, root: Path) -> None:
    before = files(root)
    for path, body, status, message in REFUSED:
        got = live.http.post(f"/v1/adapters{path}", json=body)
        assert (got.status_code, message in error(got)["message"]) == (status, True), (path, body, got.text)
    assert files(root) == before


def test_a_name_that_is_a_folder_already(live: Live, root: Path) -> None:
    (root / "notes").mkdir()
    got = live.http.post("/v1/adapters", json={"name": "notes", "document": "x"})
    assert (got.status_code, "holds" in error(got)["message"]) == (409, True)


def test_two_at_once_under_one_name(live: Live) -> None:
    """One is made; the other is refused, and does not replace it."""
    body = {"name": "island", "document": DOCUMENT}
    with ThreadPoolExecutor(2) as pool:
        clients = live.client(ADMIN), live.client(ADMIN)
        got = list(pool.map(lambda client: client.post("/v1/adapters", json=body).status_code, clients))
    assert sorted(got) == [201, 409]


def test_a_name_that_is_being_made(live: Live) -> None:
    """It is there for nobody else, whichever way it is made."""
    bodies: list[dict[str, Any]] = [{"path": "plain"}, {"document": MORE}]
    for number, (first, second) in enumerate(product(bodies, bodies)):
        name = f"island-{number}"
        with under_way(live, "", {"name": name, **first}) as asking:
            got = live.http.post("/v1/adapters", json={"name": name, **second})
            assert (got.status_code, "Another request" in error(got)["message"]) == (409, True)
            assert live.http.put(f"/v1/adapters/{name}", json={"path": "plain"}).status_code == 404
            assert live.http.delete(f"/v1/adapters/{name}").status_code == 404
        assert asking.result().status_code == 201
        assert live.http.get(f"/v1/models/{name}").json()["root"] == first.get("path", name)


def test_an_adapter_removed_while_it_grows_stays_removed(live: Live, root: Path) -> None:
    make(live, "island", DOCUMENT)
    before = files(root)
    with under_way(live, "/island/contexts", NEWS) as growing:
        assert live.http.delete("/v1/adapters/island").status_code == 200
    got = growing.result()
    assert (got.status_code, "removed while" in error(got)["message"]) == (409, True)
    assert live.http.get("/v1/models/island").status_code == 404
    assert files(root) == before
    assert live.http.post("/v1/adapters", json={"name": "island", "path": "island"}).status_code == 201


def test_an_adapter_replaced_while_it_grows_stays_replaced(live: Live, root: Path) -> None:
    make(live, "island", DOCUMENT)
    before = files(root)
    with ThreadPoolExecutor(1) as pool, under_way(live, "/island/contexts", NEWS) as growing:
        putting = pool.submit(live.http.put, "/v1/adapters/island", json={"path": "plain"})
        live.until(lambda: live.loop.admin._work_queue.qsize() == 2)
    assert putting.result().status_code == 200
    got = growing.result()
    assert (got.status_code, "replaced" in error(got)["message"]) == (409, True)
    assert live.http.get("/v1/models/island").json()["root"] == "plain"
    assert files(root) == before
    live.http.post("/v1/adapters", json={"name": "other", "path": "plain"})
    assert says(live, "island") == says(live, "other")


def test_two_at_once_that_grow_one_adapter(live: Live, smollm: nn.Module, root: Path) -> None:
    """Both texts are read, one after the other."""
    make(live, "island", DOCUMENT)
    with ThreadPoolExecutor(1) as pool, under_way(live, "/island/contexts", NEWS) as first:
        second = pool.submit(live.http.post, "/v1/adapters/island/contexts", json={"document": MORE})
    assert [first.result().status_code, second.result().status_code] == [200, 200]
    state = load_state(root / "island" / STATE, smollm, GENERATOR)
    sizes = [len(live.engine.tokenizer(text)["input_ids"]) for text in (DOCUMENT, DOCUMENT, MORE)]
    assert [read["tokens"] for read in state.reads] == sizes


def test_an_adapter_grows_only_in_the_folder_of_its_name(live: Live, root: Path) -> None:
    """Under another name, it would change what that folder's own adapter knows; after a PUT, it would undo it."""
    make(live, "island", DOCUMENT)
    make(live, "lake", MORE)
    assert live.http.post("/v1/adapters", json={"name": "bob", "path": "island"}).status_code == 201
    assert live.http.put("/v1/adapters/lake", json={"path": "island"}).status_code == 200
    before, said = files(root), says(live, "island")
    for name in ("bob", "lake"):
        got = live.http.post(f"/v1/adapters/{name}/contexts", json={"document": MORE})
        assert (got.status_code, "'island'" in error(got)["message"]) == (409, True)
        assert says(live, name) == said
    assert files(root) == before
    assert live.http.put("/v1/adapters/lake", json={"path": "lake"}).status_code == 200
    assert live.http.post("/v1/adapters/lake/contexts", json={"document": DOCUMENT}).status_code == 200


def test_another_name_of_a_folder_stays_as_it_was_when_it_grows(live: Live) -> None:
    make(live, "island", DOCUMENT)
    assert live.http.post("/v1/adapters", json={"name": "bob", "path": "island"}).status_code == 201
    said = says(live, "bob")
    assert live.http.post("/v1/adapters/island/contexts", json={"document": MORE}).status_code == 200
    live.in_engine(lambda: live.engine.residents.keep(()))  # its cells are to be read anew
    assert says(live, "bob") == said != says(live, "island")
    assert live.http.put("/v1/adapters/bob", json={"path": "island"}).status_code == 200
    assert says(live, "bob") == says(live, "island")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can have more bytes than these."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("lost", [STATE, TENSORS])
def test_a_full_disk_changes_nothing(
    live: Live, smollm: nn.Module, smollm_tokenizer: Any, generator: Path, root: Path, lost: str
) -> None:
    """Neither what is served nor what is found after a restart: the LoRA and what was read stay of one kind."""
    body = {"name": "island", "document": DOCUMENT, "window": 512}
    made = live.http.post("/v1/adapters", json=body)
    assert made.status_code == 201, made.text
    sizes = {name: (root / "island" / name).stat().st_size for name in (STATE, TENSORS)}
    assert sizes[STATE] < sizes[TENSORS]
    before, said = files(root), says(live, "island")
    with full_disk(sizes[lost] - 1000):
        for path, what in (("/island/contexts", {"document": MORE}), ("", {**body, "name": "other"})):
            got = live.http.post(f"/v1/adapters{path}", json=what)
            assert (got.status_code, "Could not write" in error(got)["message"]) == (400, True)
    assert files(root) == before
    assert sorted(path.name for path in root.iterdir()) == ["island", "plain"]
    assert says(live, "island") == said
    stop(live, smollm)
    again = start(smollm, smollm_tokenizer, generator, root)
    assert says(again, "island") == said
    assert again.http.post("/v1/adapters/island/contexts", json={"document": MORE}).status_code == 200
    again.stop()


def test_a_damaged_state_is_refused_and_the_adapter_goes_on(live: Live, root: Path) -> None:
    assert live.http.post("/v1/adapters", json={"name": "island", "document": DOCUMENT}).status_code == 201
    before = says(live, "island")
    file = root / "island" / "context.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    got = live.http.post("/v1/adapters/island/contexts", json={"document": MORE})
    assert 400 <= got.status_code < 500, got.text
    assert says(live, "island") == before


def test_what_cannot_be_served_leaves_no_folder(
    smollm: nn.Module, smollm_tokenizer: Any, generator: Path, root: Path
) -> None:
    attach_generator(smollm, generator)
    limits = EngineSettings(cells=6000, adapters=str(root), max_rank=4)  # the generator's adapters have rank 8
    live = Live(Engine(smollm, smollm_tokenizer, settings=limits), admin_key=ADMIN, allow_adapter_updates=True)
    for _ in range(2):
        got = live.client(ADMIN).post("/v1/adapters", json={"name": "island", "document": DOCUMENT})
        assert (got.status_code, "rank 8" in error(got)["message"]) == (400, True)
        assert not (root / "island").exists()
    stop(live, smollm)


def test_a_server_without_a_generator_makes_nothing(smollm: nn.Module, smollm_tokenizer: Any, root: Path) -> None:
    live = start(smollm, smollm_tokenizer, None, root)
    got = live.http.post("/v1/adapters", json={"document": DOCUMENT})
    assert (got.status_code, "without a generator" in error(got)["message"]) == (403, True)
    stop(live, smollm)


def test_a_generator_needs_a_place_for_what_it_makes(tmp_path: Path) -> None:
    settings = ServerSettings(model_name=BASE, admin_key=ADMIN)
    with pytest.raises(ConfigError, match="--allow-adapter-updates"):
        serve("no-such-base", EngineSettings(adapters=str(tmp_path)), settings, generator="anything")


@pytest.mark.parametrize(("window", "max_context"), [(33, None), (24, 20)])
def test_a_generator_that_reads_more_than_the_model_can(window: int, max_context: int | None, tmp_path: Path) -> None:
    """A position that was not learned has no embedding: it would end in an error in the middle of a document."""
    model = case("gpt2").build()
    assert model.config.max_position_embeddings == 32
    config = GenerativeConfig(inner=4, rank=4, max_rank=2, window=window)
    aa.attach(model, config, "made")
    aa.save_pretrained(model, tmp_path, "made")
    aa.detach(model, "made")
    with pytest.raises(ConfigError, match=f"reads {window} tokens at a time; here {max_context or 32} are allowed"):
        attach_generator(model, tmp_path, max_context)
    assert not aa.adapters(model)
    if window <= 32:
        assert attach_generator(model, tmp_path).config.window == window


def test_another_adapter_is_no_generator(smollm: nn.Module, root: Path) -> None:
    with pytest.raises(ConfigError, match="LoRA"):
        attach_generator(smollm, root / "plain")
    assert not aa.adapters(smollm)
    shutil.rmtree(root)
