"""The metadata of a published file: what the exported one says, and what its publisher adds.

Owns the fields. ModelSpec's `prediction_type` and `timestep_range` are left out: the first has no
agreed word for FLUX.2's velocity, the second is for models of some of the noise levels only.
"""

import json
from collections import Counter
from pathlib import Path

from train.adapters.intent import PEFT_METADATA
from train.publishing import pictures
from train.publishing.facts import Exported, Publication, scrubbed


def of(publication: Publication, exported: Exported) -> dict[str, str]:
    """Of one file; peft's settings and the hashes are the exported one's, as its tensors are."""
    kept = {
        key: value if key == PEFT_METADATA else scrubbed(value, publication.run)
        for key, value in exported.metadata.items()
    }
    best = pictures.best(publication.shown.samples, next(iter(publication.triggers), None))
    licence = publication.licence
    counts = publication.pictures
    added = {
        "modelspec.title": publication.title,
        "modelspec.author": publication.author,
        "modelspec.description": publication.description,
        "modelspec.tags": ",".join(publication.wishes.tags) or None,
        "modelspec.thumbnail": pictures.thumbnail(best.path) if best else None,
        "modelspec.license": kept.get("modelspec.license", licence.name if licence else None),
        "ss_sd_model_name": publication.base,
        "ss_training_comment": publication.description,
        "ss_num_train_images": str(sum(counts)) if counts else None,
        "ss_tag_frequency": _tag_frequency(publication) if _wanted(publication) else None,
        "kindling.base": publication.base,
    }
    return kept | {key: value for key, value in added.items() if value is not None}


def _wanted(publication: Publication) -> bool:
    return publication.wishes.tag_frequency and bool(publication.captions)


def _tag_frequency(publication: Publication) -> str:
    """kohya's table: name of a data folder -> part of a caption between commas -> how often.

    Where captions are sentences, it holds them whole.
    """
    table: dict[str, Counter[str]] = {}
    for key, caption in publication.captions.items():
        number = int(key.partition(":")[0])
        folder = Path(publication.config.sets[number - 1].path).name
        parts = (part.strip() for part in caption.split(","))
        table.setdefault(folder, Counter()).update(part for part in parts if part)
    return json.dumps(table, ensure_ascii=False)
