"""The schema of a curation recipe: what is left out, cropped, balanced and held out, and how.

Owns what a valid recipe is, and reading one. Doesn't look at pictures.

A pattern is a shell's (`fnmatch`) on a picture's name relative to the source, with forward slashes
and in its own case; `*` matches slashes, too.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from train.config.schema import Count, FileName, Natural, Positive, Section, Text, conflict

Aspect = Annotated[
    str,
    Field(
        pattern=r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$",
        json_schema_extra={"patternErrorMessage": "width:height in whole numbers, like '4:3'"},
    ),
]
Pattern = Text


class Exclude(Section):
    """Pictures that stay out. Each is listed with all reasons that hold for it."""

    names: tuple[Text, ...] = ()
    """Single pictures; one that isn't there is an error."""
    match: tuple[Pattern, ...] = ()
    """Pictures whose name matches."""
    captions: tuple[Text, ...] = ()
    """Regular expressions; pictures in whose caption one is found."""
    min_side: Natural = 0
    """Pixels that the shorter side has at least."""
    min_sharpness: Annotated[float, Field(ge=0.0)] = 0.0
    """Variance of the Laplacian that a picture has at least, measured at 1024 pixels; a dry run
    lists all values. It depends on the motif, too: choose it for your own set."""
    near_duplicates: bool = False
    """Of each group of near-duplicates, keep the one with the most pixels, then the sharpest."""
    bad_pictures: bool = False
    """Leave out what can't be read; otherwise that is an error."""

    @field_validator("captions")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise conflict({"": f"{pattern!r} isn't a regular expression: {error}"}) from None
        return value


class Concept(Section):
    """Pictures that are learned as one thing. A picture is of the first concept that it matches."""

    name: FileName
    """For tables and the split."""
    match: Pattern
    """Pictures whose name matches."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """Multiplies how often an epoch shows these pictures. Not together with balance."""
    weight: Positive = 1.0
    """With balance: its showings against those of the other concepts."""


class Crop(Section):
    """How some pictures are cropped. A picture takes the first crop that it matches."""

    match: Pattern
    """Pictures whose name matches."""
    to: Literal["centre", "subject", "box"]
    """centre: the middle. subject: where it is most salient. box: the box given."""
    aspect: Aspect | None = None
    """For centre and subject: the shape, as large as the picture allows."""
    box: tuple[Natural, Natural, Count, Count] | None = None
    """For box: left, top, right, bottom, in pixels of the picture as it is seen (upright)."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        needed, other = ("box", "aspect") if self.to == "box" else ("aspect", "box")
        if getattr(self, needed) is None:
            raise conflict({needed: f"missing; a crop to '{self.to}' needs it"})
        if getattr(self, other) is not None:
            raise conflict({other: f"has no effect with to: {self.to}; remove it"})
        if self.box and (self.box[0] >= self.box[2] or self.box[1] >= self.box[3]):
            raise conflict({"box": "is empty; write left, top, right, bottom"})
        return self


class Validation(Section):
    """The held-out set."""

    fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Of each concept, so much is held out and never trained. Near-duplicates stay together."""


class Recipe(Section):
    """From a folder of pictures to a data set, the same each time."""

    source: Text
    """Folder of pictures, of any convention that training reads. A relative path starts at the
    current directory."""
    output: Text
    """Folder that gets a new folder for each version of the data set."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=16)] = 6
    """Two pictures are near-duplicates if their perceptual hashes differ in at most so many of 64
    bits."""
    exclude: Exclude = Exclude()
    """What stays out."""
    crop: tuple[Crop, ...] = ()
    """What is cropped, and to what."""
    concepts: tuple[Concept, ...] = ()
    """What the pictures are of."""
    balance: bool = False
    """Choose whole repeats so that all concepts are shown equally often, or by their weights."""
    validation: Validation = Validation()
    """The held-out set."""

    @model_validator(mode="after")
    def _concepts_agree(self) -> Self:
        names = [concept.name for concept in self.concepts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise conflict({"concepts": f"{twice[0]!r} is the name of two"})
        if self.balance and len(names) < 2:
            raise conflict({"balance": "needs at least two concepts"})
        key, fields = ("repeats", "with") if self.balance else ("weight", "without")
        if any(getattr(concept, key) != 1 for concept in self.concepts):
            raise conflict({"concepts": f"{key} has no effect {fields} balance; remove it"})
        return self


def load(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises ConfigError, with one line for each fault."""
    from train.config import reading

    return reading.load_as(Recipe, path=path)
