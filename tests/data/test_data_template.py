import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data.rows import fill_template, parse_template, template_fields
from softprompt.errors import ConfigError, DataError
from softprompt.settings import typed_text

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: "{" not in name and "}" not in name)


@given(st.lists(st.tuples(st.text(max_size=10), NAMES, st.text(max_size=10)), max_size=5))
def test_every_literal_and_every_value_arrives_as_it_is(parts):
    fields = {name: value for _, name, value in parts}
    escaped = [(text.replace("{", "{{").replace("}", "}}"), name) for text, name, _ in parts]
    template = "".join(f"{text}{{{name}}}" for text, name in escaped)
    assert fill_template(template, fields) == "".join(f"{text}{fields[name]}" for text, name, _ in parts)
    assert template_fields(template) == tuple(fields)


def test_nothing_is_looked_up_inside_a_value():
    with pytest.raises(DataError, match=r"asks for 'text\.__class__'; the columns are 'text'|did you mean 'text'"):
        fill_template("{text.__class__}", {"text": "x"})
    assert fill_template("{a.b} {c[0]} {d!r} {e:>9}", {"a.b": "1", "c[0]": "2", "d!r": "3", "e:>9": "4"}) == "1 2 3 4"
    assert fill_template("{text}", {"text": "{text} {{}}"}) == "{text} {{}}"


@pytest.mark.parametrize(
    ("template", "brace"), [("{text", "'{'"), ("text}", "'}'"), ("{}", "'{'"), ("a {b{c}}", "'{'")]
)
def test_a_single_brace_is_refused_with_its_place(template, brace):
    with pytest.raises(ConfigError, match=f"has a single {brace} at character"):
        parse_template(template)


def test_an_unknown_field_names_the_nearest_column():
    with pytest.raises(DataError) as caught:
        fill_template("{Txt}", {"text": "", "label": ""})
    assert str(caught.value) == (
        "template '{Txt}' asks for 'Txt'; did you mean 'text'? the columns are 'text', 'label'"
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"a\nb", "a\nb"), (r"a\tb", "a\tb"), (r"a\\nb", r"a\nb"), ("a\nb", "a\nb"), (r"\alpha \\", r"\alpha \\")],
)
def test_a_typed_backslash_n_is_a_newline(typed, meant):
    assert typed_text(typed) == meant
