"""What GLM-4 models write when they have tools, or when they nearly get it right, and what it is to be taken for.

Expected results are made beside the outputs, from their pieces, never by the parser.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES = (
    "get_weather",
    "get_time",
    "search",
    "calculator",
    "查天气",
    "run-code",
    "a",
    "get_weather_forecast",
    "发送邮件",
)
Call = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """One output, its prose and its calls."""

    output: str
    prose: str
    calls: list[Call]


def _written(call: Call) -> str:
    return f"{call[0]}\n{call[1]}"


CALLS: list[Call] = [
    ("get_weather", '{"city": "北京"}'),
    ("get_weather", '{"city": "Beijing", "unit": "celsius"}'),
    ("get_time", "{}"),
    ("get_time", "{ }"),
    ("get_time", "{\n}"),
    ("查天气", '{"城市": "上海"}'),
    ("发送邮件", '{"收件人": ["小明", "小红"], "正文": "你好！\\n明天见。"}'),
    ("search", '{"query": "braces { in } strings ]["}'),
    ("search", '{"query": "a \\"quoted } brace\\" and a \\\\"}'),
    ("search", '{"query": "{\\"name\\": \\"search\\", \\"arguments\\": {}}"}'),
    ("search", '{"query": "get_weather\\n{\\"city\\": 1}"}'),
    ("search", '{"query": "", "filters": {"site": {"include": ["a", "b"], "exclude": []}}, "limit": 10}'),
    ("search", '{\n  "query": "北京",\n  "pages": [\n    1,\n    2\n  ]\n}'),
    ("search", '{"query": "emoji 😀 \\ud83d\\ude00 🇨🇳"}'),
    ("search", '{"query": "a <b> tag, <|user|> in letters and <| too"}'),
    ("search", '{"query": "the letters <|assistant|> in a string"}'),
    ("calculator", '{"expression": "2 * (3 + 4) - 5 / 6"}'),
    ("calculator", '{"x": -1.5e-3, "exact": true, "base": null, "matrix": [[1, 2], [3, 4]]}'),
    ("run-code", '{"code": "def f():\\n    return {\\"a\\": [1, 2]}\\n\\nprint(f())\\n", "language": "python"}'),
    ("run-code", '{"code": "```\\nget_time\\n{}\\n```"}'),
    ("a", '{"a":{"a":{"a":{"a":{"a":{}}}}}}'),
    ("get_weather_forecast", '{"city":"Paris","days":3}'),
]

PROSE = [
    "我来查一下。",
    "Let me check that for you.",
    "First, the plan:\n\n1. look\n2. tell",
    "看 `code` 和 {braces}。",
]


def _well_formed() -> list[Sample]:
    samples = []
    for at, call in enumerate(CALLS):
        prose, other = PROSE[at % len(PROSE)], CALLS[(at + 5) % len(CALLS)]
        written = _written(call)
        samples += [
            Sample(written, "", [call]),
            Sample(f"{prose}\n{written}", prose, [call]),
            Sample(f"{prose}<|assistant|>{written}", prose, [call]),
            Sample(f"{written}<|assistant|>{_written(other)}", "", [call, other]),
            Sample(f"{written}\n{_written(other)}\n", "", [call, other]),
            Sample(f"{written}\n\n{prose}", prose, [call]),
        ]
    three = CALLS[:3]
    samples += [
        Sample("<|assistant|>".join(map(_written, three)), "", three),
        Sample("\n".join(map(_written, CALLS)), "", CALLS),
        Sample("<|assistant|>".join(map(_written, CALLS)), "", CALLS),
        Sample(f"A。<|assistant|>{_written(CALLS[0])}<|assistant|>\nB。", "A。\nB。", [CALLS[0]]),
        Sample(f"A。\n{_written(CALLS[0])}\nB。\n{_written(CALLS[2])}\nC。", "A。\nB。\nC。", [CALLS[0], CALLS[2]]),
    ]
    return samples


BEIJING = ("get_weather", '{"city": "北京"}')

SPACED = [
    Sample('\nget_weather\n{"city": "北京"}', "", [BEIJING]),
    Sample('get_weather\n\n{"city": "北京"}\n\n', "", [BEIJING]),
    Sample('get_weather \n {"city": "北京"} ', "", [BEIJING]),
    Sample('  get_weather\r\n{"city": "北京"}\r\n', "", [BEIJING]),
    Sample('好的。\n\n\nget_weather\n{"city": "北京"}', "好的。", [BEIJING]),
    Sample('get_weather\n{"city": "北京"}<|assistant|>\n', "", [BEIJING]),
    Sample('get_weather\n{"city": "北京"} <|assistant|> get_time\n{}', "", [BEIJING, ("get_time", "{}")]),
    Sample('get_weather\n{"city": "北京"}get_time\n{}', "", [BEIJING, ("get_time", "{}")]),
    Sample('get_weather\n{"city": "北京"}好了', "好了", [BEIJING]),
    Sample('<|assistant|>get_weather\n{"city": "北京"}', "", [BEIJING]),
    Sample('<|assistant|><|assistant|>get_weather\n{"city": "北京"}', "", [BEIJING]),
]

PLAIN = [
    "",
    "\n",
    " ",
    "你好！",
    "Hello!\n",
    "  indented\n\n\ttext \n",
    "get_weather",
    "get_weather\n",
    "get_weather\n\n",
    "get_weather\n{",
    "get_weather\n{ ",
    "get_",
    "get_weather is a tool\n{}",
    "get_weather: \n{}",
    "get_weather {}",
    'get_weather{"city": "北京"}',
    "get_weather\n北京",
    "get_weather\n[1, 2]",
    'get_weather\n"北京"',
    "get_weather\n{city: 北京}",
    "get_weather\n{'city': '北京'}",
    "get_weather\n{1: 2}",
    "get_weather\n{{}}",
    'get_wether\n{"city": "北京"}',
    'Get_Weather\n{"city": "北京"}',
    'get_weather_\n{"city": "北京"}',
    'weather\n{"city": "北京"}',
    'unknown_tool\n{"x": 1}',
    'json\n{"x": 1}',
    '{"city": "北京"}',
    '{"name": "get_weather", "arguments": {"city": "北京"}}',
    'use get_weather\n{"city": "北京"}',
    '```\nget_weather\n{"city": "北京"}\n```',
    '```json\nget_weather\n{"city": "北京"}\n```\ndone',
    "```python\nprint('get_time')\n```\n",
    "  ```\nget_time\n{}\n  ```",
    "\n```\nget_time\n{}\n```",
    'get_weather(city="北京")',
    "<tool_call>get_weather",
    '<tool_call>get_weather\n{"city": "北京"}</tool_call>',
    "a < b and <| c",
    "<|assist",
    "x <|assist",
    "get_weather\n<|assist",
    "天气：{\n",
    "{" * 50,
    "}" * 50,
    "``",
    "`get_time`\n{}",
    "get_time,\n{}",
    "- get_time\n{}",
    "\ufeffget_time\n{}",
    "get\u200b_time\n{}",
]

CUT = [
    Sample('get_weather\n{"', "", [("get_weather", '{"')]),
    Sample('get_weather\n{"city": "北', "", [("get_weather", '{"city": "北')]),
    Sample('get_weather\n{"city": "北京"', "", [("get_weather", '{"city": "北京"')]),
    Sample('get_weather\n{"city": "北京\\', "", [("get_weather", '{"city": "北京\\')]),
    Sample('get_weather\n{"city": "北京"}<|assistant|>', "", [BEIJING]),
    Sample('get_weather\n{"city": "北京"}<|assistant|>get_w', "get_w", [BEIJING]),
    Sample('get_weather\n{"city": "北京"}<|assistant|>get_time\n', "get_time\n", [BEIJING]),
    Sample(
        'get_weather\n{"city": "北京"}<|assistant|>search\n{"query": [1,', "", [BEIJING, ("search", '{"query": [1,')]
    ),
    Sample('好的。\nget_weather\n{"city": {"a": [', "好的。", [("get_weather", '{"city": {"a": [')]),
    Sample('get_weather\n{"city": "x"<|ass', "", [("get_weather", '{"city": "x"<|ass')]),
]

WRONG_INSIDE = [
    Sample('get_weather\n{"city": 北京}', "", [("get_weather", '{"city": 北京}')]),
    Sample('get_weather\n{"city": "北京",}', "", [("get_weather", '{"city": "北京",}')]),
    Sample('get_weather\n{"city" "北京"}', "", [("get_weather", '{"city" "北京"}')]),
    Sample('run-code\n{"code": "line\nline {"}', "", [("run-code", '{"code": "line\nline {"}')]),
    Sample('calculator\n{"x": True, "y": None}', "", [("calculator", '{"x": True, "y": None}')]),
    Sample('get_weather\n{"city": "北京"]', "", [("get_weather", '{"city": "北京"]')]),
    Sample(
        'get_weather\n{"city": "北京"<|assistant|>get_time\n{}',
        "",
        [("get_weather", '{"city": "北京"'), ("get_time", "{}")],
    ),
    Sample('get_weather\n{"city": "北京"}}', "}", [BEIJING]),
    Sample('get_weather\n{"a": 1 < 2}', "", [("get_weather", '{"a": 1 < 2}')]),
    Sample('get_weather\n{"city": "北京"}{"city": "上海"}', '{"city": "上海"}', [BEIJING]),
    Sample('get_weather\n{"city": "北京"}\n{"city": "上海"}', '{"city": "上海"}', [BEIJING]),
]

FENCED_THEN_CALLED = [
    Sample("```\nget_time\n{}\n```\nget_time\n{}", "```\nget_time\n{}\n```", [("get_time", "{}")]),
    Sample("```\nopen fence<|assistant|>get_time\n{}", "```\nopen fence", [("get_time", "{}")]),
    Sample("```a```\nget_time\n{}", "```a```\nget_time\n{}", []),
]

NAMED = [
    *_well_formed(),
    *SPACED,
    *(Sample(text, text, []) for text in PLAIN),
    *CUT,
    *WRONG_INSIDE,
    *FENCED_THEN_CALLED,
]

SEARCH = ("search", '{"query": "GLM-4 architecture"}')
RUMINATION = [
    Sample('{"name": "search", "arguments": {"query": "GLM-4 architecture"}}', "", [SEARCH]),
    Sample('\n\n{"name": "search", "arguments": {"query": "GLM-4 architecture"}}\n', "", [SEARCH]),
    Sample('{"arguments": {"query": "GLM-4 architecture"}, "name": "search"}', "", [SEARCH]),
    Sample('{\n "name": "click",\n "arguments": {"link_id": 3}\n}', "", [("click", '{"link_id": 3}')]),
    Sample('{"name": "finish", "arguments": {}}', "", [("finish", "{}")]),
    Sample(
        '{"name": "open", "arguments": {"url": "https://a.cn/{x}?q=\\"}\\""}}',
        "",
        [("open", '{"url": "https://a.cn/{x}?q=\\"}\\""}')],
    ),
    Sample('I will look.\n{"name": "search", "arguments": {"query": "GLM-4 architecture"}}', "I will look.", [SEARCH]),
    Sample(
        '{"name": "click", "arguments": {"link_id": 1}}<|assistant|>{"name": "click", "arguments": {"link_id": 2}}',
        "",
        [("click", '{"link_id": 1}'), ("click", '{"link_id": 2}')],
    ),
    *(
        Sample(text, text, [])
        for text in (
            '{"name": "finish"}',
            '{"name": "finish", "arguments": "{}"}',
            '{"name": "finish", "arguments": {}, "id": 1}',
            '{"name": "", "arguments": {}}',
            '{"name": 1, "arguments": {}}',
            '{"name": "finish", "arguments": {}',
            "{'name': 'finish', 'arguments': {}}",
            '["name", "finish"]',
            '{"a": 1}\n# Report\n\nIt is so.\n',
            '# Report\n\n```json\n{"name": "finish", "arguments": {}}\n```\n',
            "{ not closed\n# Report",
            'text {"name": "finish", "arguments": {}}',
        )
    ),
]
