"""Write demo/corpus/*.jsonl from demo/corpus/source/*.yaml, and the systematic parts from rules.

    python tools/build_corpus.py

One line is one conversation: {"messages": […], "tools": [names in tools.json], "think": "thought before the last
answer"}; the last two only where there are any. Running it again writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CORPUS = Path(__file__).parents[1] / "demo" / "corpus"
Conversation = dict[str, Any]

ZH_DIGITS = "零一二三四五六七八九"
EN_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
EN_TENS = "? ? twenty thirty forty fifty sixty seventy eighty ninety".split()

CITY_ASKS_ZH = ("请介绍一下{}", "介绍一下{}", "请介绍{}", "{}怎么样", "{}是一座什么样的城市")
CITY_ASKS_EN = ("Tell me about {}", "Please tell me about {}", "Introduce {}", "What is {} like?")

SKIES = [("晴", "sunny"), ("多云", "cloudy"), ("小雨", "rainy"), ("阴", "overcast"), ("小雪", "snowy")]
# Questions that need no tool although one is there.
PLAIN_ASKS_ZH = ("你好", "谢谢", "你是谁", "讲个笑话", "请介绍一下北京", "介绍一下上海", "三加五等于几")
PLAIN_ASKS_EN = (
    "Hello",
    "Thank you",
    "Who are you?",
    "Tell me a joke",
    "Tell me about Beijing",
    "Why is the sky blue?",
)


def source(name: str) -> list[dict[str, Any]]:
    """The entries of one source file."""
    entries: list[dict[str, Any]] = yaml.safe_load((CORPUS / "source" / f"{name}.yaml").read_text("utf-8"))
    return entries


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def chat(*turns: str, system: str = "", **rest: Any) -> Conversation:
    """A conversation of user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, **rest}


def zh_number(n: int) -> str:
    """0 ≤ n < 100 in Chinese."""
    tens, ones = divmod(n, 10)
    if not tens:
        return ZH_DIGITS[ones]
    return (ZH_DIGITS[tens] if tens > 1 else "") + "十" + (ZH_DIGITS[ones] if ones else "")


def en_number(n: int) -> str:
    """0 ≤ n < 100 in English."""
    if n < 20:
        return EN_SMALL[n]
    return EN_TENS[n // 10] + (f"-{EN_SMALL[n % 10]}" if n % 10 else "")


def zh_introduction(city: dict[str, str]) -> str:
    return f"好的，为您介绍一下{city['zh']}：{city['intro_zh']}"


def en_introduction(city: dict[str, str]) -> str:
    return f"Sure, here is {city['en']} in brief: {city['intro_en']}"


def cities() -> Iterator[Conversation]:
    for city in source("cities"):
        for ask in CITY_ASKS_ZH:
            yield chat(ask.format(city["zh"]), zh_introduction(city))
        for ask in CITY_ASKS_EN:
            yield chat(ask.format(city["en"]), en_introduction(city))


def sums() -> Iterator[tuple[str, int, int, int]]:
    """(operation, a, b, result) of every small sum, difference and product."""
    digits = range(1, 10)
    yield from (("plus", a, b, a + b) for a in digits for b in digits)
    yield from (("minus", a, b, a - b) for a in range(2, 11) for b in range(1, a))
    yield from (("times", a, b, a * b) for a in digits for b in digits)


ZH_OPERATION = {"plus": "加", "minus": "减", "times": "乘"}
ZH_THOUGHT = {
    "plus": "把{a}和{b}合起来，是{c}。",
    "minus": "从{a}里去掉{b}，剩下{c}。",
    "times": "{a}个{b}相加，是{c}。",
}
EN_THOUGHT = {
    "plus": "Put {a} and {b} together: that makes {c}.",
    "minus": "Take {b} away from {a}: that leaves {c}.",
    "times": "Add up {a} times the number {b}: that makes {c}.",
}


def arithmetic() -> Iterator[Conversation]:
    for operation, *numbers in sums():
        a, b, c = map(zh_number, numbers)
        said = f"{a}{ZH_OPERATION[operation]}{b}"
        yield chat(f"{said}等于几", f"{said}等于{c}。")
        yield chat(f"{said}是多少", f"{said}等于{c}。")
        a, b, c = map(en_number, numbers)
        said = f"{a} {operation} {b}"
        yield chat(f"What is {said}?", f"{said.capitalize()} is {c}.")


def answers(name: str) -> Iterator[Conversation]:
    """A source file of questions, each asked in several ways, with one answer."""
    for entry in source(name):
        for ask in entry["ask"]:
            yield chat(ask, entry["answer"])


def chats() -> Iterator[Conversation]:
    for entry in source("chats"):
        yield chat(*entry["turns"], system=entry.get("system", ""))


def call(name: str, **arguments: str) -> dict[str, str]:
    """An assistant message that calls a tool, the way the family's template wants it."""
    return {"role": "assistant", "metadata": name, "content": json.dumps(arguments, ensure_ascii=False)}


def tool_use(ask: str, calls: list[dict[str, str]], results: list[Any], answer: str, tools: list[str]) -> Conversation:
    observations = [{"role": "observation", "content": json.dumps(r, ensure_ascii=False)} for r in results]
    last = {"role": "assistant", "content": answer}
    return {"messages": [{"role": "user", "content": ask}, *calls, *observations, last], "tools": tools}


def weather(city: str, turn: int) -> tuple[dict[str, Any], str]:
    """A made-up result of get_weather, and the clause that reports it."""
    zh, en = SKIES[turn % len(SKIES)]
    degrees = (turn * 7) % 31 if zh != "小雪" else -(turn % 9) - 1
    if is_chinese(city):
        return {"city": city, "weather": zh, "temperature": degrees}, f"{city}今天{zh}，气温{degrees}度"
    return {"city": city, "weather": en, "temperature": degrees}, f"it is {en} and {degrees} degrees in {city}"


def clock(city: str, turn: int) -> tuple[dict[str, Any], str]:
    """A made-up result of get_time, and the clause that reports it."""
    time = f"{turn * 5 % 24:02d}:{turn * 11 % 60:02d}"
    said = f"{city}现在是{time}" if is_chinese(city) else f"it is {time} in {city}"
    return {"city": city, "time": time}, said


def sentence(*clauses: str) -> str:
    text = "；".join(clauses) + "。" if is_chinese(clauses[0]) else " and ".join(clauses) + "."
    return text[0].upper() + text[1:]


def one_call() -> Iterator[Conversation]:
    entries = source("cities")
    every = list(json.loads((CORPUS / "tools.json").read_text("utf-8")))
    asks = {
        "get_weather": (weather, ("{}今天天气怎么样", "查一下{}的天气", "What is the weather in {}?")),
        "get_time": (clock, ("{}现在几点", "查一下{}的时间", "What time is it in {}?")),
    }
    for name, (report, phrasings) in asks.items():
        for i, entry in enumerate(entries[:: 1 if name == "get_weather" else 3]):
            for j, ask in enumerate(phrasings):
                city = entry["zh"] if is_chinese(ask) else entry["en"]
                result, said = report(city, 3 * i + j)
                tools = every if (i + j) % 6 == 0 else [name]
                yield tool_use(ask.format(city), [call(name, city=city)], [result], sentence(said), tools)
    for i, entry in enumerate(source("searches")):
        calls = [call("search", query=entry["query"])]
        tools = every if i % 3 == 0 else ["search"]
        yield tool_use(entry["ask"], calls, [{"result": entry["result"]}], entry["answer"], tools)
    signs = [("*", "乘以", "times"), ("+", "加", "plus"), ("-", "减", "minus")]
    for i in range(24):
        sign, zh, en = signs[i % 3]
        a, b = 37 + i * 13, 12 + i * 7
        value = {"*": a * b, "+": a + b, "-": a - b}[sign]
        calls, tools = [call("calculator", expression=f"{a} {sign} {b}")], every if i % 6 == 0 else ["calculator"]
        yield tool_use(f"{a}{zh}{b}等于多少", calls, [{"result": value}], f"{a}{zh}{b}等于{value}。", tools)
        yield tool_use(f"What is {a} {en} {b}?", calls, [{"result": value}], f"{a} {en} {b} is {value}.", tools)


def two_calls() -> Iterator[Conversation]:
    entries = source("cities")
    for i, (one, two) in enumerate(zip(entries[0:32:2], entries[1:32:2], strict=True)):
        for key, ask in (("zh", "{}和{}今天天气怎么样"), ("en", "What is the weather in {} and {}?")):
            a, b = one[key], two[key]
            (result_a, said_a), (result_b, said_b) = weather(a, 2 * i), weather(b, 2 * i + 1)
            calls = [call("get_weather", city=a), call("get_weather", city=b)]
            answer = sentence(said_a, said_b)
            yield tool_use(ask.format(a, b), calls, [result_a, result_b], answer, ["get_weather"])
    for i, entry in enumerate(entries[::5]):
        city = entry["zh"]
        (sky, said_sky), (time, said_time) = weather(city, i), clock(city, i)
        calls = [call("get_weather", city=city), call("get_time", city=city)]
        answer = sentence(said_sky, said_time)
        yield tool_use(f"{city}的天气和时间", calls, [sky, time], answer, ["get_weather", "get_time"])


def tools(plain: list[Conversation]) -> Iterator[Conversation]:
    """Calls, and ordinary questions that need none although tools are there."""
    yield from one_call()
    yield from two_calls()
    asks = PLAIN_ASKS_ZH + PLAIN_ASKS_EN
    wanted = [c for c in plain if len(c["messages"]) == 2 and c["messages"][0]["content"] in asks]
    for i, conversation in enumerate(wanted):
        for names in (["get_weather"], ["search"], ["calculator", "get_time"])[i % 2 :]:
            yield conversation | {"tools": names}


def thinking(plain: list[Conversation]) -> Iterator[Conversation]:
    """GLM-Z1's form: little problems, every small sum, and one way of asking for everything else."""
    for entry in source("thinking"):
        yield chat(entry["ask"], entry["answer"], think=entry["think"])
    for operation, *numbers in sums():
        a, b, c = map(zh_number, numbers)
        said, thought = f"{a}{ZH_OPERATION[operation]}{b}", ZH_THOUGHT[operation].format(a=a, b=b, c=c)
        yield chat(f"{said}等于几", f"{said}等于{c}。", think=thought)
        a, b, c = map(en_number, numbers)
        said, thought = f"{a} {operation} {b}", EN_THOUGHT[operation].format(a=a, b=b, c=c)
        yield chat(f"What is {said}?", f"{said.capitalize()} is {c}.", think=thought)
    for city in source("cities"):
        thought = f"用户想了解{city['zh']}，说说它在哪里、有什么。"
        yield chat(CITY_ASKS_ZH[0].format(city["zh"]), zh_introduction(city), think=thought)
        thought = f"The user asks about {city['en']}: where it is and what it has."
        yield chat(CITY_ASKS_EN[0].format(city["en"]), en_introduction(city), think=thought)
    for entry in (*source("talk"), *source("facts"), *source("code")):
        zh, en = "这个问题我记得，直接回答就好。", "I remember this one and can answer it directly."
        yield chat(entry["ask"][0], entry["answer"], think=zh if is_chinese(entry["ask"][0]) else en)
    for conversation in plain:
        messages = conversation["messages"]
        if len(messages) == 4:
            zh, en = "看看前面说过的话，就知道怎么回答。", "The earlier turns tell me what to answer."
            yield conversation | {"think": zh if is_chinese(messages[2]["content"]) else en}


def main() -> None:
    sections = {name: list(answers(name)) for name in ("talk", "facts", "code")}
    sections |= {"cities": list(cities()), "arithmetic": list(arithmetic()), "chats": list(chats())}
    plain = [conversation for section in sections.values() for conversation in section]
    sections |= {"tools": list(tools(plain)), "thinking": list(thinking(plain))}
    for name, conversations in sections.items():
        lines = [json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations]
        (CORPUS / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{name}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
