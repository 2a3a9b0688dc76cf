"""The server over the real model: OpenAI's own client, every kind of answer, and adapters that change under traffic."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from live import BASE, Live, completion
from prometheus_client.parser import text_string_to_metric_families
from served import lora, save_adapter
from torch import nn

import anyadapter as aa
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.request import Output
from anyadapter.serving.text import TextStream

PROMPT = "The capital of France is"
ADMIN = "admin-key"


@pytest.fixture(scope="module")
def adapters(
    smollm_and_tokenizer: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A folder of adapters, and what the model itself answers to PROMPT with each of them, attached as usual."""
    model, tokenizer = smollm_and_tokenizer
    root, says = tmp_path_factory.mktemp("adapters"), {}
    ids = tokenizer(PROMPT, return_tensors="pt")

    def answer() -> str:
        out = model.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])

    says[BASE] = answer()
    for seed, name in enumerate(["paris", "paris-2", "rome"]):
        save_adapter(model, root, name, lora(4), seed, strength=2)
        aa.load(model, root / name, "now")
        says[name] = answer()
        aa.detach(model, "now")
    assert len(set(says.values())) == 4, "the adapters change nothing"
    (root / "bad-json").mkdir()
    (root / "bad-json" / "adapter_config.json").write_text("{")
    (root / "bad-values").mkdir()
    for file in (root / "rome").iterdir():
        data = file.read_bytes()
        (root / "bad-values" / file.name).write_bytes(data[:-40] if file.suffix == ".safetensors" else data)
    return root, says


@pytest.fixture(scope="module")
def live(smollm_and_tokenizer: tuple[nn.Module, Any], adapters: tuple[Path, dict[str, str]]) -> Iterator[Live]:
    engine = Engine(*smollm_and_tokenizer, settings=EngineSettings(cells=3000, adapters=str(adapters[0])))
    for name in ("paris", "rome"):
        engine.store.register(name)
    live = Live(engine, admin_key=ADMIN, allow_adapter_updates=True)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def says(adapters: tuple[Path, dict[str, str]]) -> dict[str, str]:
    return adapters[1]


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def admin(live: Live) -> Iterator[httpx.Client]:
    with live.client(ADMIN) as client:
        yield client


GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


# ---------------------------------------------------------------------- the openai client


@pytest.mark.parametrize("model", [BASE, "paris", "rome"])
def test_a_completion_is_what_the_model_itself_says(client: openai.OpenAI, says: dict[str, str], model: str) -> None:
    got = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, **GREEDY)
    assert got.choices[0].text == says[model]
    assert (got.model, got.choices[0].finish_reason) == (model, "length")
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (5, 6, 11)


def test_a_streamed_completion_is_the_same_in_pieces(client: openai.OpenAI, says: dict[str, str]) -> None:
    pieces = list(
        client.completions.create(
            model="rome", prompt=PROMPT, max_tokens=6, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *texts, last = pieces
    assert "".join(piece.choices[0].text for piece in texts) == says["rome"]
    assert [piece.choices[0].finish_reason for piece in texts][-1] == "length"
    assert all(piece.usage is None for piece in texts)
    assert (last.choices, last.usage.completion_tokens) == ([], 6)


def test_a_chat_whole_and_streamed(client: openai.OpenAI, smollm_tokenizer: Any) -> None:
    parts: Any = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    whole = client.chat.completions.create(
        model=BASE, messages=messages, max_completion_tokens=6, logprobs=True, top_logprobs=2, **GREEDY
    )
    choice = whole.choices[0]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
    prompt = smollm_tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert whole.usage.prompt_tokens == len(smollm_tokenizer(prompt)["input_ids"])
    same = client.completions.create(model=BASE, prompt=prompt, max_tokens=6, **GREEDY)
    assert choice.message.content == same.choices[0].text
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(entry.top_logprobs[0].token == entry.token for entry in choice.logprobs.content)
    assert bytes(choice.logprobs.content[0].bytes).decode() == choice.logprobs.content[0].token

    chunks = list(client.chat.completions.create(model=BASE, messages=messages, max_tokens=6, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) > 3, "nothing was streamed"


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'paris'") as unknown:
        client.completions.create(model="pariss", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="at most 16") as limit:
        client.completions.create(model=BASE, prompt=PROMPT, n=17)
    assert (limit.value.param, limit.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="Did you mean 'temperature'"):
        client.completions.create(model=BASE, prompt=PROMPT, extra_body={"temprature": 1})


def test_models_show_where_they_come_from(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {BASE, "paris", "rome"}
    assert (models["rome"]["parent"], models["rome"]["root"]) == (BASE, "rome")
    assert (models[BASE]["parent"], models[BASE]["root"]) == (None, BASE)
    assert client.models.retrieve("rome").model_dump() == models["rome"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("romee")


# ---------------------------------------------------------------------- what can be asked


def post(live: Live, **body: Any) -> dict[str, Any]:
    response = live.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_prompts_as_texts_and_tokens(live: Live, smollm_tokenizer: Any) -> None:
    texts = [PROMPT, "One two three"]
    ids = [smollm_tokenizer(text)["input_ids"] for text in texts]
    by_text = post(live, **completion(texts))
    by_ids = post(live, **completion(ids))
    assert by_text["choices"] == by_ids["choices"]
    assert [choice["index"] for choice in by_text["choices"]] == [0, 1]
    single = [post(live, **completion(text))["choices"][0]["text"] for text in (texts[0], ids[1])]
    assert single == [choice["text"] for choice in by_text["choices"]]
    for token in (10**6, 2**40):
        refused = live.http.post("/v1/completions", json=completion([token], echo=True))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_choices_have_seeds_of_their_own(live: Live) -> None:
    hot = {"temperature": 2.0, "top_p": 0.95, "seed": 11}
    both = [choice["text"] for choice in post(live, **{**completion(PROMPT), **hot, "n": 2})["choices"]]
    assert both[0] != both[1]
    alone = [post(live, **{**completion(PROMPT), **hot, "seed": seed})["choices"][0]["text"] for seed in (11, 12)]
    assert alone == both


def test_log_probabilities_echo_and_stop(live: Live, says: dict[str, str]) -> None:
    text = says[BASE]
    got = post(live, **completion(PROMPT, 6, logprobs=2))["choices"][0]
    shown = got["logprobs"]
    assert "".join(shown["tokens"]) == got["text"] == text
    assert all(
        len(top) == 2 and max(top.values()) == own for top, own in zip(shown["top_logprobs"], shown["token_logprobs"])
    )
    assert [text[o : o + len(t)] for o, t in zip(shown["text_offset"], shown["tokens"])] == shown["tokens"]
    assert post(live, **completion(PROMPT, 6, echo=True))["choices"][0]["text"] == PROMPT + text
    cut = post(live, **completion(PROMPT, 6, stop=[text[4:8], "never"]))["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[:4], "stop")


def test_each_way_of_choosing_does_what_it_says(live: Live, smollm_tokenizer: Any) -> None:
    def tokens(prompt: str = PROMPT, **how: Any) -> list[str]:
        return post(live, **completion(prompt, 8, logprobs=0, **how))["choices"][0]["logprobs"]["tokens"]

    def most(said: list[str]) -> int:
        return max(map(said.count, said))

    plain, hot = tokens(), {"temperature": 2.0, "seed": 3}
    assert tokens(**hot, top_k=1) == plain
    assert plain != tokens(**hot) == tokens(**hot, top_k=-1)
    third = smollm_tokenizer.convert_tokens_to_ids(smollm_tokenizer.tokenize(plain[2]))
    cut = post(live, **completion(PROMPT, 8, stop_token_ids=third))["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == ("".join(plain[:2]), "stop")
    prompt = smollm_tokenizer.batch_decode([[id] for id in smollm_tokenizer(PROMPT)["input_ids"]])
    assert most(plain) > 1
    assert set(plain) & set(prompt)
    assert most(tokens(presence_penalty=2.0)) == 1
    unlike = tokens(repetition_penalty=10.0)
    assert most(unlike) == 1
    assert not set(unlike) & set(prompt), "it counts those of the prompt"
    often = "one one one one one"
    assert most(tokens(often, presence_penalty=2.0)) == most(tokens(often)) == 4, "once or often is the same to it"
    assert most(tokens(often, frequency_penalty=2.0)) == 2


def test_several_adapters_with_weights(live: Live, says: dict[str, str]) -> None:
    def text(**body: Any) -> str:
        return post(live, **completion(PROMPT, 6, **body))["choices"][0]["text"]

    assert text(adapters={"rome": 1.0}) == says["rome"]
    assert text(adapters={"rome": 0.0}) == says[BASE]
    mixed = text(adapters={"rome": 0.6, "paris": 0.7})
    assert mixed == text(adapters={"paris": 0.7, "rome": 0.6})
    refused = live.http.post("/v1/completions", json={**completion(), "model": "rome", "adapters": {"paris": 1.0}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    unknown = live.http.post("/v1/completions", json=completion(adapters={"rom": 1.0}))
    assert unknown.status_code == 404


def numbers(live: Live) -> dict[str, float]:
    """The metrics, once nothing runs."""
    live.idle()
    live.until(lambda: live.loop.stats["running"] == 0)
    families = text_string_to_metric_families(live.http.get("/metrics").text)
    return {f"{sample.name}{sorted(sample.labels.values())}": sample.value for f in families for sample in f.samples}


def test_metrics_count_what_happened(live: Live) -> None:
    before = numbers(live)
    post(live, **{**completion(PROMPT, 3, n=2), "model": "rome"})
    after = numbers(live)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("anyadapter_requests_total['length', 'rome']") == 2
    assert grown("anyadapter_output_tokens_total['rome']") == 6
    assert grown("anyadapter_prompt_tokens_total['rome']") == 10
    assert grown("anyadapter_first_token_seconds_count['rome']") == 2
    assert grown("anyadapter_http_responses_total['/v1/completions', '200']") == 1
    assert after["anyadapter_cells[]"] == 3000
    assert after["anyadapter_cells_free[]"] + after["anyadapter_cells_adapters[]"] == 3000
    assert after["anyadapter_running[]"] == 0
    assert 0 < after["anyadapter_adapter_hit_rate[]"] <= 1


def test_adapters_that_made_room_are_counted(live: Live, admin: httpx.Client) -> None:
    """One more than the pool has room for; the first one is then brought in anew."""
    names = [f"rome-{n}" for n in range(3000 // live.engine.store.get("rome").cells + 1)]
    before = numbers(live)
    for name in names:
        assert admin.post("/v1/adapters", json={"name": name, "path": "rome"}).status_code == 201
        post(live, **{**completion(PROMPT, 1), "model": name})
    after = numbers(live)
    assert 1 <= after["anyadapter_adapter_evictions_total[]"] - before["anyadapter_adapter_evictions_total[]"] <= 4
    assert after["anyadapter_adapters_resident[]"] < len(names)
    post(live, **{**completion(PROMPT, 1), "model": names[0]})
    last = numbers(live)
    assert last["anyadapter_adapter_misses_total[]"] == after["anyadapter_adapter_misses_total[]"] + 1
    for name in names:
        assert admin.delete(f"/v1/adapters/{name}").status_code == 200


# ---------------------------------------------------------------------- adapters that change under traffic


def test_replacing_and_unloading_under_traffic_never_mixes_versions(
    live: Live, admin: httpx.Client, says: dict[str, str]
) -> None:
    """Every answer is exactly one version's, and none comes from the base."""
    assert admin.post("/v1/adapters", json={"name": "city", "path": "paris"}).status_code == 201
    assert admin.post("/v1/adapters", json={"name": "city", "path": "paris"}).status_code == 409
    versions = {says["paris"], says["paris-2"]}

    def ask(_: int) -> str:
        return post(live, **{**completion(PROMPT, 6), "model": "city"})["choices"][0]["text"]

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, n) for n in range(4)]
        for path in ("paris-2", "paris", "paris-2"):
            assert admin.put("/v1/adapters/city", json={"path": path}).status_code == 200
            assert ask(0) == says[path], "a new request got an old version"
            answers += [pool.submit(ask, n) for n in range(2)]
        texts = {answer.result() for answer in answers}
    assert texts <= versions
    held = [stream_of(live, {**completion(PROMPT, 6), "model": "city", "stream": True}) for _ in range(1)]
    first = next(held[0])
    assert admin.delete("/v1/adapters/city").json()["deleted"] is True
    assert admin.delete("/v1/adapters/city").status_code == 404
    assert live.http.post("/v1/completions", json={**completion(), "model": "city"}).status_code == 404
    assert first + "".join(held[0]) == says["paris-2"], "a request in hand lost its adapter"
    live.idle()


def stream_of(live: Live, body: dict[str, Any]) -> Iterator[str]:
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]


def test_fifty_bad_loads_do_not_touch_good_traffic(live: Live, admin: httpx.Client, says: dict[str, str]) -> None:
    def ask(model: str) -> bool:
        return post(live, **{**completion(PROMPT, 6), "model": model})["choices"][0]["text"] == says[model]

    def load(n: int) -> int:
        path = ("bad-json", "bad-values", "nowhere")[n % 3]
        return admin.post("/v1/adapters", json={"name": f"bad-{n}", "path": path}).status_code

    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(ask, model) for model in ("rome", "paris", BASE)]
        bad = [pool.submit(load, n) for n in range(50)]
        good += [pool.submit(ask, model) for model in ("rome", "paris", BASE)]
        assert {f.result() for f in bad} == {400, 404}
        assert all(f.result() for f in good)
    assert {m["id"] for m in live.http.get("/v1/models").json()["data"]} == {BASE, "paris", "rome"}
    assert admin.post("/v1/adapters", json={"name": "fine", "path": "paris-2"}).status_code == 201
    says["fine"] = says["paris-2"]
    assert ask("fine")
    assert admin.delete("/v1/adapters/fine").status_code == 200
    live.idle()


# ---------------------------------------------------------------------- the schema


def test_no_request_fails_inside_whether_it_fits_the_schema_or_not(live: Live) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.label for operation in operations} >= {"POST /v1/completions", "PUT /v1/adapters/{name}"}
    cheap = {"max_tokens": 1, "n": 1}
    fitting = [operation.as_strategy() for operation in operations]
    taking = [operation for operation in operations if operation.body or operation.path_parameters]
    others = [operation.as_strategy(schemathesis.GenerationMode.NEGATIVE) for operation in taking]
    statuses = Counter[int]()

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(st.one_of(fitting), st.one_of(others)), known=st.booleans())
    def run(case: Any, known: bool) -> None:
        if known and isinstance(case.body, dict) and "model" in case.body:
            case.body |= {**cheap, "model": BASE}
            for name in ("max_completion_tokens", "first_token_seconds"):  # the second is rightly answered with 503
                case.body.pop(name, None)
        response = case.call(headers={"authorization": f"Bearer {ADMIN}"})
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text

    run()
    assert {200, 400, 404} <= set(statuses)
    live.idle()


# ---------------------------------------------------------------------- the process


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server in a process of its own."""
    words = ["--base", "smollm2", "--dtype", "float32", "--port", "0", "--pool-tokens", "2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "anyadapter.cli", "serve", *words, "--adapters", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ANYADAPTER_DRAIN_SECONDS": "20"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        seen, port = "", 0
        for line in process.stderr or ():
            seen += line
            if found := re.search(r'"listening".*"port": (\d+)', line):
                port = int(found[1])
            if '"loaded"' in line:
                break
        assert '"adapter refused", "adapter": "bad-json"' in seen
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield process, http
    finally:
        process.kill()


def test_after_a_kill_no_answer_looks_whole_and_the_next_server_serves_the_same_until_sigterm_lets_it_finish(
    says: dict[str, str], adapters: tuple[Path, Any]
) -> None:
    files = {path: path.read_bytes() for path in adapters[0].rglob("*") if path.is_file()}
    with serving(adapters[0]) as (process, http), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(http.post, "/v1/completions", json={**completion(PROMPT, 200), "model": "rome"})
        with http.stream("POST", "/v1/completions", json=completion(PROMPT, 200, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            process.kill()
            rest: list[str] = []
            with pytest.raises(httpx.RemoteProtocolError):
                rest.extend(lines)
            assert "data: [DONE]" not in rest
        with pytest.raises(httpx.TransportError):
            whole.result()
    assert {path: path.read_bytes() for path in adapters[0].rglob("*") if path.is_file()} == files
    with serving(adapters[0]) as (process, http), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(http.post, "/v1/completions", json={**completion(PROMPT, 12), "model": "rome"})
        with http.stream("POST", "/v1/completions", json=completion(PROMPT, 12, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while http.get("/ready").status_code == 200:
                pass
            refused = http.post("/v1/completions", json=completion())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert http.get("/health").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 12, "the stream was cut"
        done = whole.result()
        assert (done.status_code, done.json()["usage"]["completion_tokens"]) == (200, 12)
        assert done.json()["choices"][0]["text"].startswith(says["rome"])
        assert process.wait(20) == 0


def test_the_command_explains_its_options() -> None:
    from typer.testing import CliRunner

    from anyadapter.cli import app

    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "ANYADAPTER_API_KEY": "secret-key"})
    assert result.exit_code == 0
    for text in ("ANYADAPTER_BASE", "ANYADAPTER_DRAIN_SECONDS", "127.0.0.1", "8000", "GiB", "Example"):
        assert text in result.stdout
    assert "secret-key" not in result.stdout
    refused = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"])
    assert refused.exit_code == 1
    assert "--api-key" in refused.stderr


def test_a_slow_readers_outputs_are_joined(smollm_tokenizer: Any) -> None:
    from anyadapter.serving.loop import join

    ids = smollm_tokenizer("Grüße 😀 and more")["input_ids"]
    stream, outputs = TextStream(smollm_tokenizer), []
    for n, token in enumerate(ids):
        text = stream.push([token])[0]
        outputs.append(Output("r", (token,), text, (((token, -0.5),),), "stop" if n == len(ids) - 1 else None))
    joined = outputs[0]
    for output in outputs[1:]:
        joined = join(joined, output)
    assert joined.tokens == tuple(ids)
    assert joined.text == "Grüße 😀 and more"
    assert joined.logprobs is not None
    assert (len(joined.logprobs), joined.finish) == (len(ids), "stop")
    assert torch.is_inference_mode_enabled() is False
