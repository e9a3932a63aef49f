"""JSON schemas as the grammar library can follow them: keywords that it lacks become narrower ones that it has.

Every document that a narrowed schema accepts, the given one accepts too. Nothing is narrowed where that would not hold:
below `not`, and below a `oneOf` whose schemas are told apart by more than their types. What is left there the
library refuses by name.
"""

from __future__ import annotations

from typing import Any

from worker.constraints.limits import MAX_SCHEMA_DEPTH

KNOWN_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Those that the library writes; all formats are annotations, so others may be left out."""

_ONE = ("additionalProperties", "items", "additionalItems", "contains", "unevaluatedItems", "unevaluatedProperties")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "prefixItems", "items")
_ANNOTATIONS = frozenset({"type", "title", "description", "$comment"})


_TYPES = frozenset({"object", "array", "string", "number", "boolean", "null"})
_REFERENCES_FOLLOWED = 8


class SchemaError(ValueError):
    """A schema that can't be used; the text is for whoever sent it."""


def check_depth(schema: Any) -> None:
    """Raises SchemaError for a value nested too deep to be walked."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise SchemaError(f"is nested more than {MAX_SCHEMA_DEPTH} deep")


def narrow(schema: Any) -> Any:
    """The schema as the library can follow it. Its depth is checked."""
    return _Narrowing(schema).schema(schema)


class _Narrowing:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._exact: set[int] = set()
        """Objects and lists that stay as they are, by identity."""
        self._pin_below_exclusions(root)

    def schema(self, given: Any) -> Any:
        if not isinstance(given, dict) or id(given) in self._exact:
            return given
        found: dict[str, Any] = dict(given)
        for name in _ONE:
            if isinstance(found.get(name), dict):
                found[name] = self.schema(found[name])
        for name in _MAPS:
            if isinstance(found.get(name), dict):
                found[name] = {key: self.schema(value) for key, value in found[name].items()}
        for name in _LISTS:
            if isinstance(found.get(name), list):
                found[name] = [self.schema(value) for value in found[name]]
        if (branches := self._told_apart_by_type(given)) is not None:
            del found["oneOf"]
            narrowed = [self.schema(branch) for branch in branches]
            if "anyOf" in found:
                found["allOf"] = [*found.get("allOf", ()), {"anyOf": narrowed}]
            else:
                found["anyOf"] = narrowed
        _narrow_arrays(found)
        _narrow_names(found)
        if isinstance(found.get("format"), str) and found["format"] not in KNOWN_FORMATS:
            del found["format"]
        more = [self.schema(value) for value in _implied(found)]
        if more:
            all_of = found.get("allOf")
            found["allOf"] = [*(all_of if isinstance(all_of, list) else ()), *more]
        return found

    def _told_apart_by_type(self, schema: dict[str, Any]) -> list[Any] | None:
        """The schemas of its `oneOf`, if no type is accepted by two of them: then at most one accepts a document."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list) or not isinstance(schema.get("allOf", []), list):
            return None
        types = [self._types(branch, _REFERENCES_FOLLOWED) for branch in branches]
        return branches if sum(map(len, types)) == len(frozenset().union(*types)) else None

    def _types(self, schema: Any, references: int) -> frozenset[str]:
        """Types of all documents that a schema accepts, and perhaps of others."""
        if schema is False:
            return frozenset()
        if not isinstance(schema, dict):
            return _TYPES
        if isinstance(schema.get("$ref"), str):  # older drafts ignore what is beside it
            target = self._resolve(schema["$ref"])
            return self._types(target, references - 1) if references and target is not self._root else _TYPES
        found = _TYPES
        given = schema.get("type")
        if isinstance(given, str | list):
            named = [given] if isinstance(given, str) else given
            found &= {"number" if name == "integer" else name for name in named if isinstance(name, str)}
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list):
                found &= frozenset().union(*(self._types(branch, references) for branch in schema[name]))
        if isinstance(schema.get("enum"), list):
            found &= {_type(value) for value in schema["enum"]}
        if "const" in schema:
            found &= {_type(schema["const"])}
        return found

    def _pin_below_exclusions(self, value: Any) -> None:
        """Finds what `not` and `oneOf` hold, wherever they are; a property of such a name is pinned needlessly."""
        if isinstance(value, dict):
            for name, below in value.items():
                if name == "not" or (name == "oneOf" and self._told_apart_by_type(value) is None):
                    self._pin(below)
                self._pin_below_exclusions(below)
        elif isinstance(value, list):
            for below in value:
                self._pin_below_exclusions(below)

    def _pin(self, value: Any) -> None:
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if not isinstance(value, dict | list) or id(value) in self._exact:
                continue
            self._exact.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
            reference = value.get("$ref") if isinstance(value, dict) else None
            if isinstance(reference, str):
                waiting.append(self._resolve(reference))

    def _resolve(self, reference: str) -> Any:
        """What a reference points to; the whole schema where that is not plain to see."""
        if not reference.startswith("#/"):
            return self._root
        found = self._root
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                return self._root
            found = found[name]
        return found


def _type(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
        case _:
            return "null"


def _narrow_arrays(found: dict[str, Any]) -> None:
    """uniqueItems: an array of one item is unique."""
    least, most = found.get("minItems", 0), found.get("maxItems", 1)
    if found.get("uniqueItems") is False:
        del found["uniqueItems"]
    elif found.get("uniqueItems") is True and isinstance(least, int) and isinstance(most, int) and least <= 1:
        del found["uniqueItems"]
        found["maxItems"] = min(most, 1)


def _narrow_names(found: dict[str, Any]) -> None:
    """propertyNames, where no properties are named besides: each name or pattern becomes a property."""
    names = found.get("propertyNames")
    if names is True or names == {}:
        del found["propertyNames"]
        return
    if not isinstance(names, dict) or "properties" in found or "patternProperties" in found:
        return
    asked = names.keys() - _ANNOTATIONS
    value = found.get("additionalProperties", True)
    if names.get("type", "string") != "string":
        return
    if asked == {"pattern"} and isinstance(names["pattern"], str):
        found["patternProperties"] = {names["pattern"]: value}
    elif asked == {"enum"} and isinstance(names["enum"], list):
        found["properties"] = {name: value for name in names["enum"] if isinstance(name, str)}
    else:
        return
    del found["propertyNames"]
    found["additionalProperties"] = False


def _implied(found: dict[str, Any]) -> list[Any]:
    """Takes out what holds under conditions, and returns all of it: it is harmless where the condition fails."""
    implied: list[Any] = []
    condition = found.pop("if", None)
    branches = [found.pop(name) for name in ("then", "else") if name in found]
    if condition is not None:
        implied += branches
    for name in ("dependencies", "dependentRequired", "dependentSchemas"):
        if isinstance(found.get(name), dict):
            for value in found.pop(name).values():
                implied.append({"required": value} if isinstance(value, list) else value)
    return [value for value in implied if value is not True and value != {}]
