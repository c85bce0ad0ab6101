"""The kinds of settings a config is made of, and what each allows in plain words.

Owns types, `Section`, and `allowed`. The settings themselves are `config`'s.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

PIXEL_MULTIPLE = 16
"""Sides of pictures are multiples of this: the VAE's 8 times the patch's 2 (FLUX.2)."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Pixels = Annotated[int, Field(ge=64, le=2048, multiple_of=PIXEL_MULTIPLE)]
# Editors, and our own messages, show patternErrorMessage where the pattern doesn't match.
Text = Annotated[
    str, Field(pattern=r"\S", json_schema_extra={"patternErrorMessage": "text, not empty"})
]
Home = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path in which ~ may stand for the user's home."""
FileName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        json_schema_extra={
            "patternErrorMessage": "up to 100 letters, digits, '.', '_' and '-', "
            "of which the first is a letter or digit"
        },
    ),
]


def conflict(problems: Mapping[str, str]) -> ValidationError:
    """For validators: what is wrong with each key, dotted as seen from what is validated."""
    errors: list[InitErrorDetails] = [
        {
            "type": PydanticCustomError("conflict", "{text}", {"text": text}),
            "loc": tuple(filter(None, key.split("."))),
            "input": key,
        }
        for key, text in problems.items()
    ]
    return ValidationError.from_exception_data("conflict", errors)


class Section(BaseModel):
    """Unknown keys and loose types are errors; a loaded config never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def _changed(self) -> list[str]:
        """Keys whose value isn't the default; a written-out default is as good as none."""
        fields = type(self).model_fields
        return [key for key, field in fields.items() if getattr(self, key) != field.default]


def allowed(schema: Mapping[str, Any]) -> str:
    """What a setting must be, in plain words, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(allowed(branch) for branch in schema["anyOf"])
    if "enum" in schema:
        return either([f"'{word}'" for word in schema["enum"]])
    return _ALLOWED[schema["type"]](schema)


def either(words: Sequence[str]) -> str:
    """a, b or c."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _number(schema: Mapping[str, Any]) -> str:
    words = "a whole number" if schema["type"] == "integer" else "a number"
    match schema:
        case {"minimum": low, "maximum": high}:
            words += f" from {low:g} to {high:g}"
        case {"minimum": low, "exclusiveMaximum": high}:
            words += f" from {low:g} to below {high:g}"
        case {"minimum": low}:
            words += f", at least {low:g}"
        case {"exclusiveMinimum": low}:
            words += f" above {low:g}"
    return words + (f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else "")


def _list(schema: Mapping[str, Any]) -> str:
    count, item = schema.get("minItems"), schema.get("items") or schema["prefixItems"][0]
    if "$ref" in item:
        return "a list of sections"
    return f"a list of {count}, each {allowed(item)}" if count else f"a list of {allowed(item)}"


_ALLOWED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "null": lambda schema: "null",
    "boolean": lambda schema: "true or false",
    "integer": _number,
    "number": _number,
    "string": lambda schema: schema.get("patternErrorMessage", "text"),
    "array": _list,
    "object": lambda schema: " with ".join(["a section", *schema.get("required", ())]),
}
