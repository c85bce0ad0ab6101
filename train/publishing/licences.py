"""The bases' licences, and what each asks of somebody who publishes an adapter.

Owns names, duties and notices. No legal advice: the licence text in the base's own repository
binds, these are short words for its points.

Read for it: FLUX [dev] Non-Commercial License v2.0, whole, in github.com/black-forest-labs/flux2
(model_licenses/LICENSE-FLUX-DEV, of November 2025). Of its successor FLUX Non-Commercial License
v2.1, which klein 9B has and by others' account the hub's FLUX.2-dev too, only what others quote:
the notice and points 2.b, d, e, 3.a and 4, which differ from v2.0 in the model's name alone. That
3.c is the same in v2.1 is assumed. That klein 4B is Apache-2.0 is its model card's word.
"""

import re
from dataclasses import dataclass

from train.loading.base import NAMED_BASES

COMPANY = "Black Forest Labs Inc."


@dataclass(frozen=True)
class Duty:
    """One point of a licence, in short words."""

    section: str
    en: str
    zh: str


@dataclass(frozen=True)
class Licence:
    """Of a base's weights; an adapter trained on them is bound by it."""

    name: str
    hub: str
    """The hub's identifier, for a model card's `license`."""
    hub_name: str | None
    """For `license_name`, where the identifier is "other"."""
    commercial: bool
    """Whether the adapter may be used and passed on for money."""
    notice: str | None
    """To be shown beside the adapter, word by word; None asks for none."""
    duties: tuple[Duty, ...]


_NO_LIABILITY = (
    "IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, "
    "WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION "
    "WITH USE OF THIS MODEL."
)

NON_COMMERCIAL = Licence(
    name="FLUX Non-Commercial License",
    hub="other",
    hub_name="flux-non-commercial-license",
    commercial=False,
    notice=(
        "This FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial "
        f"License. Copyright Black Forest Labs Inc.\n{_NO_LIABILITY}"
    ),
    duties=(
        Duty(
            "1.c, 2.b",
            "The adapter may be used and passed on for non-commercial purposes only: no payment, "
            "no production use, no paid generation service. Anything else needs a licence from "
            "Black Forest Labs (bfl.ai).",
            "本适配器仅可用于非商业目的，也仅可为非商业目的分发：不得收费，不得用于生产环境，"
            "不得用于付费生图服务。其他用途须向 Black Forest Labs（bfl.ai）另行取得许可。",
        ),
        Duty(
            "3.a",
            "A copy of the licence goes along, with the words that rights are granted directly by "
            "Black Forest Labs to whoever receives the adapter.",
            "须随附许可协议全文，并注明：接收者的使用权由 Black Forest Labs 直接授予。",
        ),
        Duty(
            "3.b",
            "The Attribution Notice is displayed prominently beside the adapter.",
            "须在适配器旁的显著位置展示署名声明（Attribution Notice）。",
        ),
        Duty(
            "3.c",
            "The notice says that the model was modified; terms of your own may not conflict with "
            "the licence and must disclaim warranties and liability as it does; nothing may "
            "suggest that Black Forest Labs made or endorsed the adapter.",
            "声明中须注明模型已被修改；自行附加的条款不得与该协议冲突，且须包含不低于该协议的"
            "免责与责任限制条款；不得暗示本适配器由 Black Forest Labs 出品或认可。",
        ),
        Duty(
            "2.e",
            "Who draws with it filters content, or reviews pictures before they are shown, against "
            "what is unlawful or infringing, and discloses that they are AI-made where the law "
            "asks for it.",
            "使用者须设置内容过滤，或在公开前审核图片，以防违法或侵权内容；"
            "法律要求时，须标明图片由人工智能生成。",
        ),
        Duty(
            "2.d",
            "Pictures may be used for any purpose, commercial ones included, unless the licence "
            "forbids it; not to train a model that competes with FLUX.",
            "生成的图片可用于任何目的（包括商业目的），协议明文禁止的除外；"
            "不得用于训练与 FLUX 竞争的模型。",
        ),
        Duty(
            "4",
            "The licence's restrictions hold for the adapter too: among others no military use, "
            "surveillance or biometric processing, no unlawful content, nobody's rights infringed.",
            "协议的限制同样适用于本适配器：包括不得用于军事、监控或生物特征识别，"
            "不得生成违法内容，不得侵犯他人权利。",
        ),
    ),
)

APACHE = Licence(
    name="Apache License 2.0",
    hub="apache-2.0",
    hub_name=None,
    commercial=True,
    notice=None,
    duties=(
        Duty("4.a", "A copy of the licence goes along.", "须随附许可协议全文。"),
        Duty(
            "4.b, c",
            "Changed files say that they were changed; notices of copyright and attribution stay.",
            "被修改的文件须注明已被修改；原有的版权与署名声明须予保留。",
        ),
        Duty(
            "6",
            "No trademark rights: the base's name may describe the origin, no more.",
            "不授予商标权：基础模型的名称仅可用于说明来源。",
        ),
    ),
)

_OF_NAME = {
    "dev": NON_COMMERCIAL,
    "klein-4b": APACHE,
    "klein-9b": NON_COMMERCIAL,
    "toy": APACHE,
}

DISTILLED = {
    "black-forest-labs/FLUX.2-klein-4B": "klein-4b",
    "black-forest-labs/FLUX.2-klein-9B": "klein-9b",
}
"""The step-distilled checkpoints, which have their base's licence."""


def of(base: str, released: str | None) -> Licence | None:
    """The licence of a base, by its name or repository, else by its shape; None if unknown.

    released: the released base of that shape. What has it descends from it or is it.
    """
    names = {NAMED_BASES[name]: name for name in NAMED_BASES}
    names |= DISTILLED
    return _OF_NAME.get(names.get(base, base)) or _OF_NAME.get(released or "")


def of_hub(identifier: str, name: str | None) -> Licence | None:
    """The licence that a model card names."""
    known = (NON_COMMERCIAL, APACHE)
    return next((one for one in known if (one.hub, one.hub_name) == (identifier, name)), None)


def title(licence: Licence, text: str | None) -> str:
    """Its name, with the version where the text is at hand: FLUX's begin with it."""
    first = (text or "").strip().partition("\n")[0].strip("#* ").replace("\\", "")
    return first if licence is NON_COMMERCIAL and "License" in first else licence.name


def notice(licence: Licence, text: str | None) -> str | None:
    """The Attribution Notice: as the licence's own text has it, if that is at hand."""
    if licence.notice is None:
        return None
    found = re.search(r"[“\"]((?:The|This) FLUX[^”\"]+licensed by[^”\"]+)[”\"]", text or "")
    if found is None:
        return licence.notice
    return "\n".join(" ".join(line.split()) for line in found[1].splitlines() if line.strip())


def statement(licence: Licence, *, title: str, base: str, text: str | None) -> str:
    """What goes along as a NOTICE file."""
    if licence.notice is None:
        return (
            f'"{title}" is a LoRA adapter, made by training on {base}, which is licensed under '
            f"the {licence.name} (LICENSE.md). It holds none of that model's files.\n"
        )
    return (
        f"{notice(licence, text)}\n\n"
        f'"{title}" is a modified version of this model: a LoRA adapter, made by training on '
        f"{base}. Any rights to use the model and this adapter are granted directly by {COMPANY} "
        "under the licence that goes along with it. This adapter is no official product of "
        f"{COMPANY} and has not been endorsed, approved or validated by it. It is provided as it "
        "is, without warranty of any kind, and neither its maker nor "
        f"{COMPANY} is liable for any damage that arises from its use.\n"
    )
