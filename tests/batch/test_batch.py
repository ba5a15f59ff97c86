"""Lines of JSON become the answers that transformers gives, in OpenAI's shapes or ours; bad lines harm no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Reference, write_tiny_chat

from glm4.batch.files import Line
from glm4.batch.run import Batch
from glm4.engine.llm import LLM
from glm4.engine.step import StepPlan, StepResult
from glm4.errors import EngineError
from glm4.options import SamplingParams

Json = dict[str, Any]

USER, END = "[gMASK]<sop><|user|>\n", "<|assistant|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("tiny")).path


@pytest.fixture(scope="module")
def thinker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same weights with a template in GLM-Z1's form."""
    other = tmp_path_factory.mktemp("z1")
    for file in folder.iterdir():
        (other / file.name).symlink_to(file)
    template = (folder / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").unlink()
    (other / "chat_template.jinja").write_text(template + "\n<think>")
    return LLM(other)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def lines(*requests: Json | bytes) -> list[Line]:
    return [
        Line(number, request if isinstance(request, bytes) else json.dumps(request).encode())
        for number, request in enumerate(requests, 1)
    ]


def chat(custom_id: Any = "a", **body: Any) -> Json:
    whole = {"model": "glm-4", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": whole}


def completion(custom_id: str = "a", **body: Any) -> Json:
    whole = {"model": "glm-4", "prompt": "Once", "max_tokens": 6} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": whole}


def answer(llm: LLM, *requests: Json | bytes, **settings: Any) -> list[Json]:
    """Records in the order of their lines."""
    found = dict(Batch(llm, "00000000", **settings).run(lines(*requests)))
    assert sorted(found) == list(range(1, len(requests) + 1))
    assert not llm.engine.has_work
    return [found[number] for number in sorted(found)]


def test_plain_prompts(llm: LLM, reference: Reference) -> None:
    [bare, named, talk] = answer(
        llm,
        {"prompt": "hi", "max_new_tokens": 9},
        {"prompt": "ho", "max_new_tokens": 4, "custom_id": "second"},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            "max_new_tokens": 5,
        },
    )
    prompt = f"{USER}hi{END}"
    assert bare["text"] == reference.answer(prompt, 9)
    assert (bare["line"], bare["finish_reason"], bare["error"]) == (1, "length", None)
    count = reference.count(prompt)
    assert bare["usage"] == {"prompt_tokens": count, "completion_tokens": 9, "total_tokens": count + 9}
    assert "custom_id" not in bare
    assert (named["custom_id"], named["text"]) == ("second", reference.answer(f"{USER}ho{END}", 4))
    assert talk["text"] == reference.answer(f"[gMASK]<sop><|system|>\nBe brief.<|user|>\nhi{END}", 5)
    assert len({record["id"] for record in (bare, named, talk)}) == 3


def test_raw_prompts(llm: LLM, reference: Reference) -> None:
    [record] = answer(llm, {"prompt": "Once upon", "max_new_tokens": 7}, raw=True)
    assert record["text"] == reference.answer("Once upon", 7)


def test_defaults_of_the_run_give_way_to_the_line(llm: LLM) -> None:
    defaults = SamplingParams(max_new_tokens=3)
    records = answer(llm, {"prompt": "hi"}, {"prompt": "hi", "max_new_tokens": 5}, defaults=defaults)
    assert [record["usage"]["completion_tokens"] for record in records] == [3, 5]


def test_several_answers_to_a_plain_prompt(llm: LLM) -> None:
    request = {"prompt": "hi", "max_new_tokens": 8, "n": 3, "temperature": 5.0, "seed": 1}
    [record] = answer(llm, request)
    texts = [choice["text"] for choice in record["choices"]]
    assert len(set(texts)) == 3
    assert "text" not in record
    assert record["usage"]["completion_tokens"] == 24
    assert answer(llm, request) == [record]


def test_chat_completion_field_by_field(llm: LLM, reference: Reference) -> None:
    [record] = answer(llm, chat("my id", logprobs=True, top_logprobs=2, user="somebody", stream=False))
    prompt = f"{USER}hi{END}"
    assert record.keys() == {"id", "custom_id", "response", "error"}
    assert (record["custom_id"], record["error"]) == ("my id", None)
    assert record["response"].keys() == {"status_code", "request_id", "body"}
    assert record["response"]["status_code"] == 200
    body = record["response"]["body"]
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("chat.completion", "glm-4")
    assert body["id"].startswith("chatcmpl-")
    assert isinstance(body["created"], int)
    [choice] = body["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    text = reference.answer(prompt, 6)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert body["usage"]["prompt_tokens"] == reference.count(prompt)
    check_logprobs(choice["logprobs"]["content"], reference, prompt)


def check_logprobs(content: list[Json], reference: Reference, prompt: str) -> None:
    """Against one pass of transformers over prompt and answer; the answer's bytes are the tokens' bytes."""
    ids = reference.tokenizer.encode(prompt).ids
    for place, entry in enumerate(content):
        with torch.no_grad():
            logits = reference.model(torch.tensor([ids])).logits[0, -1]
        logits[reference.tokenizer.get_vocab_size() :] = -torch.inf
        best = logits.log_softmax(-1).topk(2)
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] == pytest.approx(float(best.values[0]), abs=1e-4), place
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert entry["token"] == reference.tokenizer.decode([int(best.indices[0])], skip_special_tokens=False)
        ids.append(int(best.indices[0]))


def test_text_completion_field_by_field(llm: LLM, reference: Reference) -> None:
    ids = reference.tokenizer.encode("twice").ids
    [record] = answer(llm, completion(prompt=["Once", ids], n=2, logprobs=1, max_tokens=4))
    body = record["response"]["body"]
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    texts = [reference.answer("Once", 4), reference.answer("twice", 4)]
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate([texts[0]] * 2 + [texts[1]] * 2))
    prompt_tokens = reference.count("Once") + len(ids)
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 16,
        "total_tokens": prompt_tokens + 16,
    }
    for choice in body["choices"]:
        found = choice["logprobs"]
        assert found.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert [len(each) for each in found.values()] == [4, 4, 4, 4]
        assert found["text_offset"][0] == 0
        assert [{token: logprob} for token, logprob in zip(found["tokens"], found["token_logprobs"], strict=True)] == (
            found["top_logprobs"]
        )


def test_several_choices_of_a_chat_completion(llm: LLM) -> None:
    [record] = answer(llm, chat(n=3, temperature=5.0, seed=3, max_tokens=8))
    choices = record["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) == 3


def test_thoughts_stand_apart(thinker: LLM, reference: Reference) -> None:
    record, openai, raw = answer(
        thinker,
        {"prompt": "hi"},
        chat("b"),
        completion("c"),
        defaults=SamplingParams(do_sample=False, max_new_tokens=6),
    )
    assert (record["text"], record["finish_reason"]) == ("", "length")
    message = openai["response"]["body"]["choices"][0]["message"]
    assert record["reasoning"] == message["reasoning_content"] != ""
    assert message["content"] == ""
    assert raw["response"]["body"]["choices"][0]["text"] == reference.answer("Once", 6)  # no template, no thought


def test_a_seed_of_the_engine_makes_a_file_reproducible_whatever_the_order(folder: Path) -> None:
    requests: list[Json | bytes] = [{"prompt": f"hi {i}", "max_new_tokens": 6, "temperature": 4.0} for i in range(6)]
    llm = LLM(folder, seed=5)
    whole = answer(llm, *requests)
    rest = dict(Batch(llm, "00000000", limit=1).run(lines(*requests), done={1, 2, 5}))
    assert rest == {number: whole[number - 1] for number in (3, 4, 6)}
    assert len({record["text"] for record in whole}) == 6


BAD: list[tuple[Json | bytes, str]] = [
    (b"nonsense", "the request is not valid JSON: Expecting value at line 1, column 1"),
    (b'{"prompt": "hi"', "the request is not valid JSON: Expecting ',' delimiter at line 1, column 16"),
    (b'{"prompt": "a", "prompt": "b"}', "the request is not valid JSON: the key 'prompt' stands twice"),
    (b'{"prompt": "\xff"}', "the request is not UTF-8 text: byte 12 is 0xff"),
    (b"[1]", "the request holds a list, not a JSON object {…}"),
    (b"[" * 100_000, "the request is not valid JSON: it is nested too deeply"),
    (b'{"prompt": "\\ud800"}', "the text is not valid Unicode: character 21 is the lone surrogate U+D800"),
    ({}, "give either prompt, a text, or messages, a list"),
    ({"prompt": "hi", "messages": []}, "give either prompt, a text, or messages, a list"),
    ({"prompt": "hi", "max_new_tokns": 5}, "unknown key 'max_new_tokns'; did you mean 'max_new_tokens'?"),
    ({"prompt": "hi", "max_tokens": 5}, "unknown key 'max_tokens'; did you mean 'max_new_tokens'?"),
    ({"prompt": "hi", "temperature": "0.7"}, "temperature: '0.7' is not a number"),
    ({"prompt": "hi", "temperature": -1}, "temperature: -1 is out of range (at least 0, at most 100)"),
    (b'{"prompt": "hi", "temperature": NaN}', "temperature: nan is out of range (at least 0, at most 100)"),
    ({"prompt": "hi", "max_new_tokens": True}, "max_new_tokens: True is not a whole number"),
    ({"prompt": "hi", "stop_token_ids": 5}, "stop_token_ids: 5 is not a list"),
    ({"prompt": "hi", "stop": 5}, "stop: 5 is not a list"),
    ({"prompt": "hi", "best_of": 2}, "best_of: a batch keeps every answer it draws"),
    ({"prompt": 5}, "prompt: 5 is not a text"),
    ({"prompt": " "}, "prompt: it is empty; give some text"),
    ({"prompt": "x" * 600}, "the prompt has 605 tokens and prompt plus answer may have 512"),
    ({"prompt": "hi", "custom_id": 5}, "custom_id: 5 is not a text"),
    ({"messages": []}, "messages: the list is empty; give at least one message"),
    ({"messages": [{"role": "usr", "content": "hi"}]}, "messages[0]: unknown role 'usr'; did you mean 'user'?"),
    (chat(None), "custom_id is missing: give each request a text of its own"),
    (chat("b") | {"method": "GET"}, "method: 'GET' is not 'POST'"),
    (chat("b") | {"url": "/v1/embeddings"}, "url: '/v1/embeddings' is none of /v1/chat/completions, /v1/completions"),
    (chat("b") | {"body": "hi"}, "body: an object with the request is missing"),
    (chat("b") | {"bdy": 1}, "unknown key 'bdy'; did you mean 'body'?"),
    (chat("b", temprature=1), "unknown key 'temprature'; did you mean 'temperature'?"),
    (chat("b", messages=None), "messages: it is missing"),
    (chat("b", model=5), "model: 5 is not a text"),
    (chat("b", stream=True), "stream true is not supported: leave it at false"),
    (chat("b", tool_choice="required"), "tool_choice: there are no tools to choose from; give some in tools"),
    (chat("b", tool_choice="some"), "tool_choice: "),
    (chat("b", max_completion_tokens=6), "max_completion_tokens: the limit is said twice"),
    (chat("b", logprobs=3), "logprobs: expected `bool | null`, got `int`"),
    (chat("b", top_logprobs=3), "top_logprobs needs logprobs: true"),
    (chat("b", n=0), "n: 0 is out of range"),
    (chat("b", prompt="hi"), "unknown key 'prompt'"),
    (completion("b", prompt=None), "prompt: it is missing"),
    (completion("b", prompt=[]), "prompt: the list is empty; give at least one"),
    (completion("b", prompt=["a", 5]), "prompt: give a text, a list of token ids, or a list of either"),
    (completion("b", prompt=""), "the prompt is empty: give some text"),
    (completion("b", prompt=["a", [10**6]]), "the prompt holds a token id outside 0 …"),
    (completion("b", stream=True), "stream true is not supported: leave it at false"),
]


@pytest.mark.parametrize(("request_", "message"), BAD, ids=lambda value: value[:60] if isinstance(value, str) else "")
def test_a_bad_line_is_an_error_record(llm: LLM, request_: Json | bytes, message: str) -> None:
    bad, good = answer(llm, request_, {"prompt": "hi", "max_new_tokens": 2})
    assert bad["error"]["message"].startswith(message)
    assert bad["error"].keys() == {"code", "message"}
    assert good["error"] is None
    if isinstance(request_, dict) and "url" in request_:
        assert (bad["custom_id"], bad["response"]) == (request_["custom_id"], None)
    else:
        assert bad["line"] == 1


def test_a_custom_id_may_stand_once_also_in_a_run_that_goes_on(llm: LLM) -> None:
    requests = [chat("a"), chat("b"), chat("a", max_tokens=2)]
    records = answer(llm, *requests)
    assert [record["error"] is None for record in records] == [True, True, False]
    assert records[2]["error"]["message"].startswith("custom_id 'a' stands on an earlier line too")
    [(number, last)] = Batch(llm, "00000000").run(lines(*requests), done={1, 2})
    assert (number, last) == (3, records[2])
    assert [number for number, _ in Batch(llm, "00000000").run(lines(*requests), done={2, 3})] == [1]


def test_a_base_model_takes_raw_prompts_only(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    llm = LLM(tmp_path)
    [refused, taken] = answer(llm, {"prompt": "hi"}, completion())
    assert "run the batch with --raw" in refused["error"]["message"]
    assert taken["error"] is None
    [record] = answer(llm, {"prompt": "hi", "max_new_tokens": 2}, raw=True)
    assert record["error"] is None


def test_no_more_lines_are_read_than_are_in_flight(llm: LLM) -> None:
    read = 0

    def endless() -> Iterator[Line]:
        nonlocal read
        while True:
            read += 1
            yield Line(read, json.dumps({"prompt": "hi", "max_new_tokens": 1 + read % 3}).encode())

    records = Batch(llm, "00000000", limit=5).run(endless())
    for finished in range(1, 40):
        next(records)
        assert read <= finished + 5
    records.close()
    assert not llm.engine.has_work


class Poison:
    """A runner that fails on every step in which a prompt with this token takes part."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        self.execute, self.token = llm.engine.runner.execute, llm.tokenizer.encode(word)[0]
        monkeypatch.setattr(llm.engine.runner, "execute", self)

    def __call__(self, plan: StepPlan) -> StepResult:
        if any(self.token in step.token_ids for step in plan.requests):
            raise RuntimeError("poisoned")
        return self.execute(plan)


def test_a_request_on_which_the_model_fails_harms_no_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Json | bytes] = [
        {"prompt": prompt, "max_new_tokens": 4} for prompt in ("a", "b", "Q", "c", "d", "e")
    ]
    clean = answer(llm, *requests)
    Poison(llm, monkeypatch, "Q")
    records = answer(llm, *requests)
    assert records[2]["error"]["code"] == "engine_error"
    assert records[2]["error"]["message"].startswith("the step failed: RuntimeError: poisoned")
    assert records[:2] + records[3:] == clean[:2] + clean[3:]


def test_an_engine_that_always_fails_ends_the_run_without_records(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(llm, monkeypatch, "<|user|>")
    with pytest.raises(EngineError, match="poisoned"):
        list(Batch(llm, "00000000").run(lines(*[{"prompt": "hi"}] * 9)))
    assert not llm.engine.has_work
