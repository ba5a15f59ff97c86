"""The real clients, unmodified, against the real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import anthropic
import langchain_openai
import openai
import pydantic
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from serving import DEMO, Json, Server

from glm4 import LLM, SamplingParams

BEIJING = "请介绍一下北京"
WEATHER = {"北京": '{"city": "北京", "weather": "晴", "temperature": 0}',
           "上海": '{"city": "上海", "weather": "多云", "temperature": 7}'}  # fmt: skip
BOTH = "北京今天晴，气温0度；上海今天多云，气温7度。"


@pytest.fixture(scope="module")
def said(offline: LLM) -> str:
    [output] = offline.chat([{"role": "user", "content": BEIJING}], SamplingParams(do_sample=False))
    return output.text


class City(pydantic.BaseModel):
    size: Literal["small", "large"]
    capital: bool


class TestOpenAI:
    @pytest.fixture
    def client(self, server: Server) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def test_chat(self, client: openai.OpenAI, said: str) -> None:
        model = client.models.list().data[0].id
        messages: Any = [{"role": "user", "content": BEIJING}]
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
        assert answer.choices[0].message.content == said
        with client.chat.completions.stream(model=model, messages=messages, temperature=0) as stream:
            assert "".join(event.delta for event in stream if event.type == "content.delta") == said

    def test_tools(self, client: openai.OpenAI, tools: dict[str, Json]) -> None:
        messages: Any = [{"role": "user", "content": "北京和上海今天天气怎么样"}]
        asked: Any = {"model": "glm4-demo", "temperature": 0, "tools": [tools["get_weather"]]}
        with client.chat.completions.stream(messages=messages, **asked) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.tool_calls is not None
        calls = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        for call in message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": WEATHER[city]})
        answer = client.chat.completions.create(messages=messages, **asked)
        assert answer.choices[0].message.content == BOTH

    def test_parse(self, client: openai.OpenAI) -> None:
        parsed = client.chat.completions.parse(
            model="glm4-demo", messages=[{"role": "user", "content": BEIJING}], response_format=City
        )
        assert isinstance(parsed.choices[0].message.parsed, City)
        assert isinstance(
            client.responses.parse(model="glm4-demo", input=BEIJING, text_format=City).output_parsed, City
        )

    def test_responses(self, client: openai.OpenAI, said: str, tools: dict[str, Json]) -> None:
        assert client.responses.create(model="glm4-demo", input=BEIJING, temperature=0).output_text == said
        function: Any = {"type": "function", "strict": False, **tools["get_weather"]["function"]}
        with client.responses.stream(
            model="glm4-demo", input="北京今天天气怎么样", temperature=0, tools=[function]
        ) as stream:
            types = {event.type for event in stream}
            [call] = stream.get_final_response().output
        assert {"response.created", "response.function_call_arguments.delta", "response.completed"} <= types
        assert call.type == "function_call"
        assert json.loads(call.arguments) == {"city": "北京"}

    def test_the_rest(self, client: openai.OpenAI, offline: LLM) -> None:
        assert client.completions.create(model="glm4-demo", prompt="北京", max_tokens=2, temperature=0).choices[0].text
        [vector] = client.embeddings.create(model="glm4-demo", input=["北京"]).data  # asks for base64
        assert vector.embedding == pytest.approx(offline.embed("北京")[0], abs=1e-5)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")
        with pytest.raises(openai.BadRequestError, match="frequency_penalty") as caught:
            client.chat.completions.create(
                model="glm4-demo", messages=[{"role": "user", "content": "hi"}], frequency_penalty=9
            )
        assert caught.value.param == "frequency_penalty"

    def test_thoughts(self, z1_server: Server) -> None:
        client = openai.OpenAI(base_url=f"{z1_server.url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model="glm4-z1-demo", messages=[{"role": "user", "content": "三加五等于几？"}], temperature=0
        )
        assert answer.choices[0].message.content == "三加五等于八。"
        assert answer.choices[0].message.reasoning_content  # type: ignore[attr-defined]


class TestAnthropic:
    @pytest.fixture
    def client(self, server: Server) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)

    def test_messages(self, client: anthropic.Anthropic, said: str) -> None:
        asked: Any = {"model": "glm4-demo", "max_tokens": 200, "extra_body": {"temperature": 0}}
        messages: Any = [{"role": "user", "content": BEIJING}]
        answer = client.messages.create(messages=messages, **asked)
        assert [block.text for block in answer.content if block.type == "text"] == [said]
        with client.messages.stream(messages=messages, **asked) as stream:
            assert "".join(stream.text_stream) == said
        count = client.messages.count_tokens(model="glm4-demo", messages=messages)
        assert count.input_tokens == answer.usage.input_tokens

    def test_tools(self, client: anthropic.Anthropic, tools: dict[str, Json]) -> None:
        function = tools["get_weather"]["function"]
        asked: Any = {
            "model": "glm4-demo", "max_tokens": 200, "extra_body": {"temperature": 0},
            "tools": [{"name": function["name"], "description": function["description"],
                       "input_schema": function["parameters"]}],
        }  # fmt: skip
        messages: Any = [{"role": "user", "content": "北京和上海今天天气怎么样"}]
        with client.messages.stream(messages=messages, **asked) as stream:
            called = stream.get_final_message()
        assert called.stop_reason == "tool_use"
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": WEATHER[block.input["city"]]}  # type: ignore[index]
            for block in called.content
            if block.type == "tool_use"
        ]
        messages += [{"role": "assistant", "content": called.content}, {"role": "user", "content": results}]
        answer = client.messages.create(messages=messages, **asked)
        assert [block.text for block in answer.content if block.type == "text"] == [BOTH]

    def test_thoughts(self, z1_server: Server) -> None:
        client = anthropic.Anthropic(base_url=z1_server.url, api_key="none")
        with client.messages.stream(
            model="glm4-z1-demo", max_tokens=200, messages=[{"role": "user", "content": "三加五等于几？"}],
            thinking={"type": "enabled", "budget_tokens": 1024}, extra_body={"temperature": 0},
        ) as stream:  # fmt: skip
            message = stream.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "text"]


def test_langchain_agent(server: Server, tools: dict[str, Json]) -> None:
    """The loop of an agent: ask, call, tell the results, until there is an answer."""
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=pydantic.SecretStr("none"), model="glm4-demo", temperature=0
    )
    agent = chat.bind_tools([tools["get_weather"]])
    messages: list[Any] = [HumanMessage("北京和上海今天天气怎么样")]
    while (answer := agent.invoke(messages)).tool_calls:
        messages.append(answer)
        messages += [ToolMessage(WEATHER[call["args"]["city"]], tool_call_id=call["id"]) for call in answer.tool_calls]
    assert answer.content == BOTH
    assert len(messages) == 4
    assert "".join(str(chunk.content) for chunk in chat.stream(BEIJING)) == chat.invoke(BEIJING).content
    assert isinstance(chat.with_structured_output(City).invoke(BEIJING), City)


@pytest.fixture(scope="module")
def clients_python() -> str:
    """A Python with litellm and lm-eval, whose requirements contradict ours."""
    python = os.environ.get("GLM4_CLIENTS_PYTHON", "")
    if not python:
        pytest.skip("GLM4_CLIENTS_PYTHON names no Python with litellm and lm-eval (see docs/server.md)")
    return python


def run_client(python: str, code: str, *args: str) -> str:
    environment = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run([python, "-c", code, *args], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LITELLM = """
import sys, litellm
base, question = sys.argv[1:]
messages = [{"role": "user", "content": question}]
ask = dict(model="openai/glm4-demo", api_base=base + "/v1", temperature=0, messages=messages)
print(litellm.completion(**ask).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **ask)))
"""


def test_litellm(server: Server, clients_python: str, said: str) -> None:
    assert run_client(clients_python, LITELLM, server.url, BEIJING).splitlines()[-2:] == [said, said]


LM_EVAL = """
import sys, lm_eval
from lm_eval.tasks import TaskManager
url, tokenizer, tasks = sys.argv[1:]
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=f"model=glm4-demo,base_url={url}/v1/completions,tokenizer={tokenizer},tokenizer_backend=huggingface",
    tasks=["choose", "say"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
)["results"]
print(results["choose"]["acc,none"], results["say"]["exact_match,none"])
"""
ITEMS = [
    {"question": "北京是中国的", "choices": ["首都", "香蕉"], "gold": 0},
    {"question": "上海是中国的", "choices": ["三加五", "首都"], "gold": 0},
]
HEAD = """
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
doc_to_text: '{{question}}'
target_delimiter: ''
"""
CHOOSE = f"""task: choose{HEAD}
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: '{{{{choices}}}}'
metric_list: [{{metric: acc}}]
"""
SAY = f"""task: say{HEAD}
output_type: generate_until
doc_to_target: '{{{{choices[0]}}}}'
generation_kwargs: {{until: ['，', '。'], max_gen_toks: 8, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def test_lm_eval(server: Server, clients_python: str, tmp_path: Path, offline: LLM) -> None:
    """Choices are scored by the log-probabilities of an echo; the other task reads what is said."""
    lines = [json.dumps(item, ensure_ascii=False) for item in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, task in (("choose", CHOOSE), ("say", SAY)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    accuracy, matches = (
        run_client(clients_python, LM_EVAL, server.url, str(DEMO), str(tmp_path)).splitlines()[-1].split()
    )
    assert float(accuracy) == _accuracy(offline)
    sampling = SamplingParams(do_sample=False, max_new_tokens=8, stop=("，", "。"))
    said = offline.generate([str(item["question"]) for item in ITEMS], sampling)
    exact = [output.text == item["choices"][0] for output, item in zip(said, ITEMS, strict=True)]  # type: ignore[index]
    assert float(matches) == sum(exact) / len(exact)


def _accuracy(offline: LLM) -> float:
    """How often the right choice is the likelier continuation, by the model's own log-probabilities."""
    right = 0
    for item in ITEMS:
        scores = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            num_given = len(offline.tokenizer.encode(str(item["question"])))
            sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
            [output] = offline.generate(str(item["question"]) + choice, sampling)
            scores.append(sum(entry.logprob for entry in output.prompt_logprobs[num_given - 1 :]))
        right += scores.index(max(scores)) == item["gold"]
    return right / len(ITEMS)
