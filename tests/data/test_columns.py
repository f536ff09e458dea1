"""What of a record would get lost without a word."""

import pytest

from flex_jax.data.sources import load_data
from flex_jax.errors import InputError


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """Python would take the last one."""
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": "b", "instruction": "c"}\n'
    )
    with pytest.raises(InputError, match=r"a\.jsonl:2: the key 'instruction' is there twice"):
        load_data(file)


def test_a_column_of_clients_cannot_have_the_name_of_another_part(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"q": "a", "response": "b", "passage": "c", "context": "hospital"}\n')
    with pytest.raises(InputError, match="data.column=context: has the name of a part of the prompt"):
        load_data(file, fields="instruction=q,context=passage", column="context")
