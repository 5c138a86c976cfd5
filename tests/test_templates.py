"""Chat templates and tokenizers from a stranger: no code of theirs runs, and what takes too much is ended."""

import json
import os
import resource
import threading
import time

import pytest
from builders import save_tokenizer
from test_markers import PLAIN, make_tokenizer

from streammerge import markers
from streammerge.errors import InputError
from streammerge.layout import layouter
from streammerge.markers import find_markers, load_tokenizer, render_prompt
from streammerge.recipe import Thinking
from streammerge.records import Record

CANARY = "canary"
ESCAPES = {  # each would create the file `canary` if the sandbox let it
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['open']('canary', 'w') }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
    "{{ c.__init__.__globals__.get('os', c).system('touch canary') }}{% endfor %}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch canary').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch canary') }}",
    "namespace": "{{ namespace.__init__.__globals__['jinja2'].loaders.os.system('touch canary') }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}{{ (messages|attr('__init__')).__globals__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{a.__globals__[os]}'.format_map({'a': raise_exception}) }}",
    "indirect format": "{% set f = 'x{0.__init__.__globals__}'.format %}{{ [messages]|map('string')|map(f)|list }}"
    "{{ f(raise_exception) }}",
    "the module": "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}{{ messages.clear() }}",
    "do": "{% do messages.append(open('canary', 'w')) %}",
}


@pytest.mark.parametrize("case", ESCAPES)
def test_the_sandbox_holds(case, tmp_path, monkeypatch):
    """An error, or harmless text; never the file, never a look at the interpreter's globals."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(PLAIN + ESCAPES[case], ["<think>", "</think>"])
    try:
        find_markers(tokenizer, Thinking(), tmp_path)
        shown = render_prompt(tokenizer, "hi")
    except InputError as error:
        shown = str(error)
    assert not (tmp_path / CANARY).exists(), "code of the template ran"
    assert "root:" not in shown and "__builtins__" not in shown and "<module" not in shown


@pytest.mark.parametrize("case", ["cycler", "lipsum"])
def test_the_escapes_are_real(case, tmp_path, monkeypatch):
    """Without the sandbox they do run code: the test above can fail."""
    from jinja2 import Environment

    monkeypatch.chdir(tmp_path)
    Environment().from_string(ESCAPES[case]).render()
    assert (tmp_path / CANARY).exists()


HUNGRY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a constant of 4 GB": "{{ ('a' * 4000000000)|length }}",
    "padding": "{{ 'a'|center(4000000000) }}",
    "format width": "{{ '%4000000000d' % 1 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "a power in a loop": "{% set n = namespace(x=9) %}{% for i in range(9) %}{% set n.x = n.x ** n.x %}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "long source": "{# " + "x" * (1 << 20) + " #}",
    "long output": "{{ 'a' * 3000000 }}",
    "range": "{{ range(999999999)|list }}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('no') }}",
    "no text": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("case", HUNGRY)
def test_hungry_templates_are_ended(case, tmp_path, monkeypatch):
    monkeypatch.setattr(markers, "RENDER_SECONDS", 1)
    limit, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    with pytest.raises(InputError) as caught:
        find_markers(make_tokenizer(PLAIN + HUNGRY[case], ["<think>", "</think>"]), Thinking(), tmp_path)
        pytest.fail("nothing was refused")
    assert "chat template" in str(caught.value) and len(str(caught.value)) < 1000
    assert time.monotonic() - began < 8
    assert resource.getrlimit(resource.RLIMIT_AS) == limit, "the memory limit outlives the rendering"


def test_the_timer_raises_nothing_later(monkeypatch):
    monkeypatch.setattr(markers, "RENDER_SECONDS", 0.05)
    before = threading.active_count()
    for _ in range(30):
        render_prompt(make_tokenizer(), "hi")
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pass
    assert threading.active_count() <= before + 1


def test_a_template_that_fails_on_one_sample_names_the_sample(tmp_path):
    """Only "Hello" is rendered before the samples are: this was a traceback of jinja's."""
    template = "{% if 'three' in messages[0]['content'] %}{{ raise_exception('not three') }}{% endif %}" + PLAIN
    tokenizer = make_tokenizer(template, ["<think>", "</think>"])
    lay = layouter(tokenizer, find_markers(tokenizer, Thinking(), tmp_path))
    assert lay(Record(0, "a", "set.json, sample a (item 1)", "two", "t", "r"))
    with pytest.raises(InputError, match=r"set.json, sample b \(item 2\): .*not three"):
        lay(Record(1, "b", "set.json, sample b (item 2)", "three", "t", "r"))


def test_a_tokenizer_that_panics_or_is_a_link_is_an_input_error(tmp_path):
    class PanicException(BaseException):
        """What pyo3 raises for a Rust panic; it is no Exception."""

    with pytest.raises(InputError, match="here.*PanicException: index out of bounds"):
        with markers.answered("here", "do that"):
            raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), markers.answered("here", "do that"):
        raise KeyboardInterrupt
    save_tokenizer(tmp_path / "model")
    (tmp_path / "private.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(InputError, match="tokenizer.json: is a link that leaves"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_tokenizer_never_runs(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w').close()\nclass Evil: pass\n")
    file = tmp_path / where
    config = json.loads(file.read_text()) if file.exists() else {"model_type": "llama"}
    maps = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    file.write_text(json.dumps(config | {"auto_map": maps, "tokenizer_class": "Evil", "trust_remote_code": True}))
    try:
        load_tokenizer(tmp_path)
    except InputError as error:
        assert str(tmp_path) in str(error)
    assert not (tmp_path / CANARY).exists() and "evil" not in os.sys.modules
