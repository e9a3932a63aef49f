"""Narrowed schemas: what they accept, the given ones accept."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from worker.constraints.limits import MAX_SCHEMA_DEPTH
from worker.constraints.schema import SchemaError, check_depth, narrow

names = st.sampled_from(["a", "b", "c"])
documents = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
plain: st.SearchStrategy[Any] = st.sampled_from(
    [{}, True, False, {"type": "string"}, {"type": "object"}, {"type": "array"}, {"const": 1}, {"$ref": "#/$defs/x"}]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array"]),
            "uniqueItems": st.booleans(),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 3),
            "items": inner,
            "properties": st.dictionaries(names, inner, max_size=2),
            "additionalProperties": inner,
            "required": st.lists(names, unique=True, max_size=2),
            "propertyNames": st.sampled_from([{"pattern": "^[ab]$"}, {"enum": ["a", "c"]}, True, {"maxLength": 1}]),
            "dependentRequired": st.dictionaries(names, st.lists(names, unique=True, max_size=2), max_size=2),
            "dependentSchemas": st.dictionaries(names, inner, max_size=2),
            "if": inner,
            "then": inner,
            "else": inner,
            "not": inner,
            "format": st.sampled_from(["regex", "uuid"]),
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
        },
    )


schemas = st.recursive(plain, objects, max_leaves=6)


def accepts(schema: Any, document: Any) -> bool:
    try:
        return bool(jsonschema.Draft202012Validator(schema).is_valid(document))
    except BaseException as error:
        # A schema that refers to itself for ever. Where the stack ends within the library's Rust, that is a panic.
        if isinstance(error, RecursionError) or type(error).__name__ == "PanicException":
            assume(False)
        raise


@settings(max_examples=200, deadline=None)
@given(schema=schemas, target=schemas, tried=st.lists(documents, min_size=8, max_size=8))
def test_narrowed_schemas_accept_less(schema: Any, target: Any, tried: list[Any]) -> None:
    whole = {**schema, "$defs": {"x": target}} if isinstance(schema, dict) else schema
    before = json.dumps(whole)
    narrowed = narrow(whole)
    assert json.dumps(whole) == before
    for document in tried:
        if accepts(narrowed, document):
            assert accepts(whole, document)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"uniqueItems": True, "maxItems": 9}, {"maxItems": 1}),
        ({"uniqueItems": True, "minItems": 2}, {"uniqueItems": True, "minItems": 2}),
        ({"if": {"type": "string"}, "then": {"const": 1}}, {"allOf": [{"const": 1}]}),
        ({"dependencies": {"a": ["b"]}}, {"allOf": [{"required": ["b"]}]}),
        (
            {"propertyNames": {"pattern": "x"}, "additionalProperties": {"type": "null"}},
            {"patternProperties": {"x": {"type": "null"}}, "additionalProperties": False},
        ),
        ({"format": "regex", "type": "string"}, {"type": "string"}),
        (
            {"oneOf": [{"uniqueItems": True}, {"type": "array"}]},
            {"oneOf": [{"uniqueItems": True}, {"type": "array"}]},
        ),
        (
            {"oneOf": [{"type": "array", "uniqueItems": True}, {"enum": ["a", None]}, {"type": "integer"}]},
            {"anyOf": [{"type": "array", "maxItems": 1}, {"enum": ["a", None]}, {"type": "integer"}]},
        ),
        (
            {"not": {"$ref": "#/$defs/x"}, "$defs": {"x": {"uniqueItems": True}}},
            {"not": {"$ref": "#/$defs/x"}, "$defs": {"x": {"uniqueItems": True}}},
        ),
        ({"enum": [{"uniqueItems": True}]}, {"enum": [{"uniqueItems": True}]}),
    ],
)
def test_rewrites(schema: Any, expected: Any) -> None:
    assert narrow(schema) == expected


def test_depth() -> None:
    schema: Any = {}
    for _ in range(MAX_SCHEMA_DEPTH - 1):
        schema = {"a": schema}
    check_depth(schema)
    with pytest.raises(SchemaError, match=str(MAX_SCHEMA_DEPTH)):
        check_depth([schema])
