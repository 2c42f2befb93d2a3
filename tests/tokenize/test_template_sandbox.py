"""A stranger's template writes what Jinja would, and is stopped where it would compute without end or fill the memory."""

from __future__ import annotations

import jinja2
import pytest
from anarcho_tokenize import template_sandbox
from anarcho_tokenize.template_sandbox import TemplateSandbox
from jinja2.sandbox import ImmutableSandboxedEnvironment

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def written(text: str) -> str:
    sandbox = TemplateSandbox(begin="<", end=">")
    return sandbox.write(sandbox.from_string(text), messages=MESSAGES)


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] ~ 3 ~ nothing ~ none }}{{ loop.index }}\n{% endfor %}",
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m.role + '!' %}{% endfor %}{{ ns.x }}",
        "{{ 7 * 3 + 2 ** 10 % 7 }}{{ '%s-%s' % ('a', 'b') }}{{ 'ab' * 2 }}{{ [1] + [2] * 2 }}{{ 'x'.ljust(5) }}",
        "{% set x %}a{% endset %}{{ (x ~ 'b') | upper | center(9) }}{{ messages | map(attribute='role') | join(', ') }}",
        "{% for m in messages recursive %}{{ m.role }}{% if m.more %}{{ loop(m.more) }}{% endif %}{% else %}none{% endfor %}",
    ],
)
def test_what_is_within_the_limits_is_written_as_jinja_writes_it(text: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert written(text) == plain.from_string(text).render(messages=MESSAGES)


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_endless_computing_is_stopped_after_so_many_passes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_PASSES", 5000)
    with pytest.raises(jinja2.TemplateError, match="loops more than 5,000 times"):
        written(text)


@pytest.mark.parametrize(
    "text",
    [
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 12 * [1] }}",
        "{{ 'x'.ljust(10 ** 6) }}",
        "{{ '%01000000d' % 3 }}",
        "{{ 'x' | center(10 ** 6) }}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_a_text_that_would_fill_the_memory_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 2**16)
    with pytest.raises(jinja2.TemplateError, match="more than 65,536 characters"):
        written(text)


def test_a_number_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="4096 bits"):
        written("{{ 10 ** (10 ** 10) }}")
