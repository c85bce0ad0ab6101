"""What Civitai and LiblibAI ask of who uploads an adapter, filled in: JSON, and text in English and
Chinese to copy from.

Sources. Civitai: the fields are those of its open code (github.com/civitai/civitai at 00b3101:
model.schema.ts, model-version.schema.ts), the names of the base models those of its list there.
LiblibAI publishes no such thing that could be found; the fields are those that a third party's
account of March 2026 lists (type, file, name, description, tags, base model, trigger words, sample
pictures, licence type; real-name verification), so the words on its form, its choices and whether
it has FLUX.2's bases at all are NOT verified. Both sheets say so.

A sheet stays with the publisher: it isn't uploaded.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.publishing.facts import Publication
from train.publishing.words import descriptions, html

CIVITAI_BASES = {
    "dev": "Flux.2 D",
    "klein-4b": "Flux.2 Klein 4B-base",
    "klein-9b": "Flux.2 Klein 9B-base",
}
"""Civitai's names."""

OFFICIAL = {"dev": "FLUX.2 [dev]", "klein-4b": "FLUX.2 [klein] 4B", "klein-9b": "FLUX.2 [klein] 9B"}


@dataclass(frozen=True)
class Field:
    """One thing that a site asks."""

    key: str
    """Civitai's name in its code; for LiblibAI a name of ours."""
    label: tuple[str, str]
    """English, Chinese."""
    value: Any
    """None where only the publisher can know; else a value, or (English, Chinese)."""
    note: tuple[str, str] | None = None

    def said(self, language: int) -> str:
        """The value as text; 0 English, 1 Chinese."""
        value = self.value[language] if isinstance(self.value, tuple) else self.value
        if value is None:
            return ("(yours to say)", "（请自行填写）")[language]
        if isinstance(value, bool):
            return (("no", "yes"), ("否", "是"))[language][value]
        if isinstance(value, list):
            return ", ".join(map(str, value)) or ("(none)", "（无）")[language]
        return str(value)


@dataclass(frozen=True)
class Sheet:
    """A site's form, filled in."""

    site: str
    address: str
    checked: tuple[str, str]
    """What of it is verified."""
    fields: tuple[Field, ...]

    def as_json(self) -> str:
        """Both languages."""
        tree = {
            "site": self.site,
            "address": self.address,
            "verified": _both(self.checked),
            "fields": [
                {
                    "key": field.key,
                    "label": _both(field.label),
                    "value": _both(field.value),
                    "note": _both(field.note),
                }
                for field in self.fields
            ],
        }
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    def as_text(self, language: int) -> str:
        """To copy from; 0 English, 1 Chinese."""
        lines = [f"{self.site}  {self.address}", self.checked[language], ""]
        for field in self.fields:
            said = field.said(language)
            colon = (":", "：")[language]
            lines.append(f"{field.label[language]}{colon}")
            lines += [f"    {line}".rstrip() for line in said.splitlines()]
            if field.note:
                lines.append(
                    f"    ({field.note[language]})" if not language else f"    （{field.note[1]}）"
                )
            lines.append("")
        return "\n".join(lines)


def _both(value: Any) -> Any:
    """A pair of texts by language; anything else as it is."""
    return dict(zip(("en", "zh"), value, strict=True)) if isinstance(value, tuple) else value


def civitai(publication: Publication, *, samples: list[str]) -> Sheet:
    """Of Civitai's two forms: the model's and its version's."""
    base = CIVITAI_BASES.get(publication.released or "")
    fields = (
        Field("name", ("Name", "模型名称"), publication.title),
        Field("type", ("Type", "模型类型"), "LORA"),
        Field("category", ("Category", "分类"), None, _CATEGORY),
        Field("tagsOnModels", ("Tags", "标签"), ["flux2", *publication.wishes.tags]),
        Field(
            "description",
            ("Description (HTML)", "简介（HTML）"),
            tuple(html(text) for text in descriptions(publication)),
        ),
        *_permissions(publication),
        Field("version.name", ("Version", "版本名称"), f"step {publication.step}"),
        Field("version.baseModel", ("Base model", "基础模型"), base, None if base else _NO_BASE),
        Field("version.trainedWords", ("Trigger words", "触发词"), list(publication.triggers)),
        Field(
            "version.settings.strength",
            ("Recommended strength", "推荐权重"),
            1.0,
            (
                "As it was trained. The range (minStrength, maxStrength) wasn't measured; "
                "`kindling compare RUN --strengths 0.6,0.8,1` shows it.",
                "即训练时的权重。推荐范围（minStrength、maxStrength）未经测量，"
                "可运行 `kindling compare RUN --strengths 0.6,0.8,1` 查看效果。",
            ),
        ),
        Field("version.steps", ("Steps", "训练步数"), publication.step),
        Field("files", ("File", "模型文件"), [publication.exported[0].path.name]),
        Field(
            "images",
            ("Example pictures", "示例图片"),
            samples,
            ("Civitai wants 1 to 20.", "Civitai 要求 1 至 20 张。"),
        ),
    )
    return Sheet("Civitai", "https://civitai.com/models/create", _CIVITAI_CHECKED, fields)


def liblib(publication: Publication, *, samples: list[str]) -> Sheet:
    """Of LiblibAI's form, as far as it is known."""
    official = OFFICIAL.get(publication.released or "")
    commercial = publication.licence is not None and publication.licence.commercial
    fields = (
        Field("name", ("Name", "模型名称"), publication.title),
        Field("type", ("Type", "模型类型"), "LoRA"),
        Field(
            "base",
            ("Base model", "基础算法"),
            official,
            _NO_BASE
            if official is None
            else (
                "Choose what the site's list calls it; if it isn't there, it can't be uploaded "
                "as that.",
                "以平台下拉列表中的实际名称为准；如列表中没有，请勿选择其他基础算法代替。",
            ),
        ),
        Field("version", ("Version", "版本名称"), f"step {publication.step}"),
        Field("triggers", ("Trigger words", "触发词"), list(publication.triggers)),
        Field(
            "strength",
            ("Recommended strength", "推荐权重"),
            1.0,
            (
                "As it was trained; other strengths weren't measured.",
                "即训练时的权重；其他权重未经测量。",
            ),
        ),
        Field("tags", ("Tags", "标签"), list(publication.wishes.tags)),
        Field("description", ("Description", "模型介绍"), descriptions(publication)),
        Field("origin", ("Original or reposted", "原创或转载"), ("original", "原创")),
        Field(
            "licence", ("Permissions", "授权范围"), *_liblib_permissions(commercial, publication)
        ),
        Field("file", ("File", "模型文件"), [publication.exported[0].path.name]),
        Field(
            "samples",
            ("Example pictures", "示例图片"),
            samples,
            (
                "By the same account, pictures are reviewed and uploading needs real-name "
                "verification.",
                "据同一来源，示例图片须经审核，上传模型须完成实名认证。",
            ),
        ),
    )
    return Sheet("LiblibAI", "https://www.liblib.art", _LIBLIB_CHECKED, fields)


_CIVITAI_CHECKED = (
    "Fields and base model names: from Civitai's open code (civitai/civitai at 00b3101). The form "
    "itself may differ.",
    "字段与基础模型名称取自 Civitai 开源代码（civitai/civitai，00b3101），实际表单可能略有不同。",
)
_LIBLIB_CHECKED = (
    "NOT verified: LiblibAI's form isn't public; the fields follow a third party's account of "
    "March 2026.",
    "未经核实：LiblibAI 的上传表单未公开，以下字段依据第三方 2026 年 3 月的说明整理，"
    "请以平台实际页面为准。",
)
_CATEGORY = (
    "Character, style, object, ...: chosen from the site's list.",
    "角色、风格、物品等，请在网站列表中选择。",
)
_NO_BASE = (
    "The base is none that was released; choose Other, or don't upload it there.",
    "该基础模型不是已发布的 FLUX.2 模型，请选择“其他”，或不要上传。",
)


def _permissions(publication: Publication) -> tuple[Field, ...]:
    """Civitai's permissions: the most that the base's licence allows; fewer are the publisher's."""
    licence = publication.licence
    if licence is None:
        note = ("The base's licence isn't known here.", "基础模型的许可协议未知。")
        keys = ("allowCommercialUse", "allowDerivatives", "allowDifferentLicense", "allowNoCredit")
        return tuple(Field(key, (key, key), None, note) for key in keys)
    uses = ["Image", "RentCivit", "Rent", "Sell"] if licence.commercial else ["Image"]
    most = (
        f"The most that the {licence.name} allows; you may allow less.",
        f"为 {licence.name} 所允许的上限，可自行收紧。",
    )
    bound = (
        "Selling pictures is allowed by the base's licence (2.d); renting out or selling the "
        "adapter isn't (2.b).",
        "依基础模型协议，可出售生成的图片（2.d），但不得出租或出售适配器本身（2.b）。",
    )
    return (
        Field(
            "allowCommercialUse",
            ("Commercial use", "商业用途"),
            uses,
            most if licence.commercial else bound,
        ),
        Field("allowDerivatives", ("Merges may be shared", "允许分享融合模型"), True, most),
        Field(
            "allowDifferentLicense",
            ("Other permissions on merges", "融合模型可使用不同许可"),
            licence.commercial,
            most,
        ),
        Field(
            "allowNoCredit",
            ("Use without crediting you", "允许不署名使用"),
            False,
            ("Yours to choose; the base's own notice stays in any case.",
             "可自行选择；基础模型的署名声明无论如何都须保留。"),
        ),
    )  # fmt: skip


def _liblib_permissions(
    commercial: bool, publication: Publication
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Value and note."""
    licence = publication.licence
    if licence is None:
        note = ("The base's licence isn't known here.", "基础模型的许可协议未知。")
        return ("(yours to say)", "（请自行填写）"), note
    if commercial:
        return (
            ("commercial use allowed by the base's licence", "基础模型协议允许商用"),
            (f"{licence.name}; you may allow less.", f"{licence.name}；可自行收紧授权。"),
        )
    return (
        (
            "non-commercial: no selling, no paid exclusives, no commercial online generation",
            "非商用：不得出售，不得设为付费或会员专属，不得用于商业性在线生图",
        ),
        (
            f"{licence.name}: pictures may be used commercially (2.d), the adapter may not (2.b).",
            f"{licence.name}：生成的图片可商用（2.d），适配器本身不可商用（2.b）。",
        ),
    )


SHEETS: dict[str, Callable[..., Sheet]] = {"civitai": civitai, "liblib": liblib}
