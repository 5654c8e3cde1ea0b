"""The Jinja2 environment of chat templates: what transformers gives them, in a sandbox.

Templates come with models of strangers, so they are not trusted. Import this module only where a
template is rendered, because it imports Jinja2.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What ``strftime_now`` formats: the date that Llama 3 templates write where they have no clock. With
today's date, the same records would be other data tomorrow, and a run could not resume."""


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. Raises :class:`jinja2.TemplateSyntaxError`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=TEMPLATE_DATE.strftime,
        dict=_new_dict,
        namespace=_SafeNamespace,
    )
    return environment.from_string(source)


def render_spans(template: jinja2.Template, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Render ``template``. Return the text and where its ``{% generation %}`` blocks are: [start, end).

    Raises ValueError if a block is inside a macro or a variable, so that its place is unknown.
    """
    generation = template.environment.extensions[_Generation.identifier]
    assert isinstance(generation, _Generation)
    written: list[str] = []
    blocks: list[tuple[int, str]] = []
    generation.on_block = lambda body: blocks.append((sum(map(len, written)), body))
    for part in template.generate(**variables):
        written.append(part)  # before the next block is rendered
    text = "".join(written)
    if any(not text.startswith(body, start) for start, body in blocks):
        raise ValueError("a {% generation %} block is in a macro or a variable, so its place is unknown")
    return text, [(start, start + len(body)) for start, body in blocks]


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` around what the assistant says. It changes no text."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja2)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.on_block: Any = None

    def parse(self, parser: Parser) -> nodes.Node:
        """Make a call of :meth:`_note` of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Macro) -> str:
        body = caller()
        if self.on_block is not None:
            self.on_block(body)
        return body


class _SafeNamespace(Namespace):
    """``namespace`` without names that begin with an underscore, which could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Namespace: a template may pass ``self=``
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _check_name(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore first: {name!r}")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Jinja2's own, but without escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
