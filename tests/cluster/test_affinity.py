"""Who gets a request, by what must hold of any such choice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glm4.cluster.affinity import Affinity

SYSTEM = list(range(64))


def test_a_conversation_stays_where_it_began() -> None:
    affinity: Affinity[str] = Affinity(block_size=16)
    first = affinity.rank(SYSTEM, "ab")[0]
    affinity.begin(1, SYSTEM, first, 8)
    affinity.end(1)
    other = "b" if first == "a" else "a"
    assert affinity.rank([*SYSTEM, 99], "ab") == [first, other]
    assert affinity.rank([7] * 64, "ab") == [other, first]  # nobody has it, and the other has been sent less
    affinity.forget(first)
    assert affinity.rank([*SYSTEM, 99], (first, other))[0] == first  # equal again: nobody holds anything


def test_waiting_longer_than_computing_again_sends_it_elsewhere() -> None:
    affinity: Affinity[str] = Affinity(block_size=16)
    affinity.begin(0, SYSTEM, "a", 8)
    affinity.end(0)
    affinity.begin(1, [*SYSTEM, 1], "a", 40)  # 1 token and 40 are fewer than the 64 that "b" would compute
    assert affinity.rank([*SYSTEM, 2], "ab")[0] == "a"
    affinity.begin(2, [*SYSTEM, 2], "a", 40)
    assert affinity.rank([*SYSTEM, 3], "ab")[0] == "b"
    affinity.end(1)
    assert affinity.rank([*SYSTEM, 3], "ab")[0] == "a"


def test_a_part_of_a_block_is_not_held_and_the_oldest_are_forgotten() -> None:
    affinity: Affinity[str] = Affinity(block_size=16, max_blocks=4)
    affinity.begin(0, SYSTEM[:15], "a", 1)
    affinity.end(0)
    affinity.begin(1, [5] * 16, "b", 1)
    affinity.end(1)
    assert affinity.rank([*SYSTEM[:15], 3, 3], "ba")[0] == "a"  # held by nobody: "a" has been sent less
    affinity.begin(2, SYSTEM, "a", 1)
    affinity.end(2)
    assert affinity.rank([5] * 20, "ab")[0] == "b"
    affinity.begin(3, [9] * 64, "b", 1)
    affinity.end(3)
    assert affinity.rank([5] * 20, "ab")[0] == "a"  # "b" keeps four blocks, and this is its fifth


prompts = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=12)


@given(prompts, st.integers(1, 4))
def test_the_first_has_the_least_to_compute(sent: list[list[int]], block_size: int) -> None:
    affinity: Affinity[int] = Affinity(block_size)
    held: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}
    load = dict.fromkeys(held, 0)

    def missing(prompt: list[int], replica: int) -> int:
        known = 0
        while known + block_size <= len(prompt) and tuple(prompt[: known + block_size]) in held[replica]:
            known += block_size
        return len(prompt) - known

    for ticket, prompt in enumerate(sent):
        ranked = affinity.rank(prompt, held.keys())
        costs = [load[replica] + missing(prompt, replica) for replica in ranked]
        assert sorted(ranked) == [0, 1, 2]
        assert costs == sorted(costs)
        load[ranked[0]] += missing(prompt, ranked[0]) + 3
        held[ranked[0]] |= {tuple(prompt[:end]) for end in range(block_size, len(prompt) + 1, block_size)}
        affinity.begin(ticket, prompt, ranked[0], 3)
        assert all(affinity.load(replica) == load[replica] for replica in held)
    for ticket in range(len(sent)):
        affinity.end(ticket)
    assert all(affinity.load(replica) == 0 for replica in held)
