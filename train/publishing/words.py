"""The sheets' longer texts, in English and Chinese.

Owns the words; what they are put into is `sheets`'.
"""

from html import escape

from train.publishing import licences
from train.publishing.card import measured
from train.publishing.facts import Publication


def descriptions(publication: Publication) -> tuple[str, str]:
    """English, Chinese; the publisher's own words first, as they are."""
    return _english(publication), _chinese(publication)


def _english(publication: Publication) -> str:
    base = publication.repository or publication.base
    lora, counts = publication.certificate["adapter"], publication.pictures
    triggers = ", ".join(publication.triggers)
    resolutions = ", ".join(map(str, publication.config.data.resolutions))
    lines = [
        publication.description,
        f"LoRA for {base}, strength 1, rank {lora['rank']}.",
        f"Trigger: {triggers}" if triggers else None,
        f"Trained for {publication.step} steps"
        + (f" on {sum(counts)} pictures" if counts else "")
        + f" at {resolutions} px with Kindling.",
        *measured(publication),
        "Loads in diffusers and ComfyUI; a certificate of every key is with the file.",
        _notice(publication, 0),
    ]
    return "\n".join(line for line in lines if line)


def _chinese(publication: Publication) -> str:
    base = publication.repository or publication.base
    lora, counts, check = (
        publication.certificate["adapter"],
        publication.pictures,
        publication.check,
    )
    triggers = "、".join(publication.triggers)
    resolutions = "、".join(map(str, publication.config.data.resolutions))
    loss = drift = None
    if check is not None:
        kind = "未参与训练的图片" if check["held_out"] else "训练图片（固定噪声）"
        loss = f"{kind}上的损失：{check['loss']:.4f} ± {check['error']:.4f}"
        if check["to_base"] is not None:
            change = f"{check['to_base']:+.4f} ± {check['to_base_error']:.4f}"
            loss += f"，较基础模型 {change}"
        loss += "。"
        if check["drift"] is not None:
            drift = f"对不含触发词的提示词的影响（drift）：{check['drift']:.1%}。"
    lines = [
        publication.description,
        f"适用于 {base} 的 LoRA，推荐权重 1，秩（rank）{lora['rank']}。",
        f"触发词：{triggers}" if triggers else None,
        "使用 Kindling 训练"
        + (f"，共 {sum(counts)} 张图片" if counts else "")
        + f"，分辨率 {resolutions} 像素，{publication.step} 步。",
        loss,
        drift,
        "可在 diffusers 与 ComfyUI 中加载，并附有逐键验证的证书。",
        _notice(publication, 1),
    ]
    return "\n".join(line for line in lines if line)


def _notice(publication: Publication, language: int) -> str:
    """The notice that a base's licence wants shown beside the adapter, and its main point."""
    licence = publication.licence
    if licence is None:
        return ("Licence: that of the base.", "许可：遵循基础模型的许可协议。")[language]
    name = licences.title(licence, publication.terms)
    head = (f"Licence: {name}.", f"许可协议：{name}。")[language]
    notice = licences.notice(licence, publication.terms)
    if notice is None:
        return head
    changed = ("The model was modified: this is an adapter trained on it.",
               "本模型为在原模型基础上训练得到的适配器，已作修改。")[language]  # fmt: skip
    points = [duty.en if language == 0 else duty.zh for duty in licence.duties[:1]]
    return "\n".join([head, *points, notice, changed])


def html(text: str) -> str:
    """Civitai takes HTML, of which p and br do here."""
    return "<p>" + "<br>".join(escape(line, quote=False) for line in text.splitlines()) + "</p>"
