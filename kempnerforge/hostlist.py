"""Expand SLURM's compact host lists, such as ``gpu[07-09,12],login1``."""

from __future__ import annotations

import re

_PART = re.compile(r"([^,\[\]]*)\[([^\[\]]*)\]|([^,\[\]]+)")
_WORD = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(nodelist: str) -> list[str]:
    """Return the hosts of a list in order: ``a[1-2]b[08,10]`` -> a1b08, a1b10, a2b08, a2b10.

    Raises:
        ValueError: ``nodelist`` is not a host list.
    """
    words = _WORD.findall(nodelist)
    if ",".join(words) != nodelist:
        raise _unreadable(nodelist)
    return [host for word in words for host in _expand_word(word, nodelist)]


def _expand_word(word: str, nodelist: str) -> list[str]:
    hosts, end = [""], 0
    for match in _PART.finditer(word):
        prefix, ranges, plain = match.groups()
        tails = [plain] if plain is not None else [prefix + number for number in _numbers(ranges, nodelist)]
        hosts = [host + tail for host in hosts for tail in tails]
        end = match.end()
    if end != len(word):
        raise _unreadable(nodelist)
    return hosts


def _numbers(ranges: str, nodelist: str) -> list[str]:
    numbers = []
    for item in ranges.split(","):
        match = _RANGE.fullmatch(item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _unreadable(nodelist)
        width = len(match[1])
        numbers += [f"{number:0{width}}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _unreadable(nodelist: str) -> ValueError:
    return ValueError(f'node list "{nodelist}" cannot be read; expected a form like gpu[07-09,12],login1')
