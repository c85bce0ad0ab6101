"""From a captioner's words to a caption, or why they are none.

Owns tidying and judgement. Pure functions; a picture is never looked at, so a caption that is
well-formed and wrong passes.
"""

import re

from data_tools import captions, folder

_THOUGHTS = re.compile(r"<think>.*?</think>|^.*?</think>", re.DOTALL)
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|here is|here['’]s)\b|好的)[^:：\n]{0,80}[:：]\s*",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^[\s*_#]*(?:caption|instruction|description|说明文字|说明|指令|描述)[\s*_]*[:：][\s*_]*",
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("“", "”"), ("'", "'"), ("「", "」"), ("**", "**"), ("`", "`"))
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]?m|i am) (?:really |very |so )?(?:sorry|unable|not able)"
    r"|(?:sorry|unfortunately|apologies)\b.{0,40}\b(?:can|unable|able|not)"
    r"|i (?:can['’]?t|cannot|can not|won['’]?t|will not|am not able|do not|don['’]?t) "
    r"(?:\w+ ){0,2}?(?:help|assist|describe|see|view|provide|process|identify|caption|access|"
    r"comply|continue|feel|generate|create|write|have)"
    r"|as an? (?:ai|language model|artificial)"
    r"|(?:please )?(?:provide|upload|share) (?:the|an|a|your) (?:image|picture|photo)"
    r"|(?:there is )?no (?:image|picture) (?:was |is |has been )?(?:attached|provided|visible)"
    r"|(?:很|非常|十分)?(?:抱歉|对不起|不好意思)|我(?:无法|不能|没办法|没有办法|看不到)"
    r"|作为(?:一个|一名)?(?:ai|人工智能|语言模型)|请(?:提供|上传))",
    re.IGNORECASE,
)
_LOOP = re.compile(r"(.{12,200}?)\1{2,}|(.{4,11}?)\2{5,}|(.{1,3}?)\3{15,}", re.DOTALL)
_SENTENCE = re.compile(r"[.!?。！？]+\s*")
_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")

MAX_CHARACTERS = 5000
"""FLUX.2 reads 512 tokens, some 2,000 characters; more than twice that is no caption."""
SHOWN = 60
"""Characters of a refused answer that are shown."""


def tidy(text: str) -> str:
    """One line without thoughts, labels such as `Caption:` and enclosing quotes."""
    text = captions.clean(_THOUGHTS.sub("", text))
    while True:
        before = text
        text = _LABEL.sub("", _PREAMBLE.sub("", text))
        for left, right in _QUOTES:
            inner = text[len(left) : -len(right)]
            enclosed = text.startswith(left) and text.endswith(right)
            if enclosed and left not in inner and right not in inner:
                text = inner.strip()
        if text == before:
            return text


def fault(text: str, *, language: str) -> str:
    """Why a tidied answer can't be a caption; empty if it can."""
    if not text or not _LETTER.search(text):
        return "an empty answer" if not text else f"no words in the answer ({text[:SHOWN]!r})"
    if not folder.is_text(text):
        return "the answer holds half a character (a lone \\ud800 to \\udfff)"
    if _REFUSAL.match(text):
        return f"refused: {text[:SHOWN]!r}"
    if len(text) > MAX_CHARACTERS:
        return f"{len(text)} characters are no caption: {text[:SHOWN]!r}"
    looped = _loop(text)
    if looped:
        return f"repeats itself: {looped[:SHOWN]!r}"
    letters = len(_LETTER.findall(text))
    chinese = len(_CJK.findall(text)) / letters
    if (language == "zh" and chinese < 0.2) or (language == "en" and chinese > 0.5):
        return f"not in the language asked for: {text[:SHOWN]!r}"
    return ""


def _loop(text: str) -> str:
    """What `text` says over and over: a phrase in a row, or one sentence three times."""
    found = _LOOP.search(text)
    if found:
        return next(group for group in found.groups() if group).strip()
    sentences = [part.strip() for part in _SENTENCE.split(text) if len(part.strip()) > 12]
    return next((part for part in sentences if sentences.count(part) > 2), "")


def with_trigger(text: str, *, trigger: str) -> tuple[str, bool]:
    """The caption with the trigger in it, in its own letters; and whether it had to be put first.

    A captioner writes `Zibby` where a sentence begins, but `zibby` is other tokens.
    """
    if not trigger or captions.has_trigger(text, trigger=trigger):
        return text, False
    word = rf"(?<![A-Za-z0-9_]){re.escape(trigger)}(?![A-Za-z0-9_])"
    text = re.sub(word, lambda _: trigger, text, flags=re.IGNORECASE)
    if captions.has_trigger(text, trigger=trigger):
        return text, False
    return f"{trigger}, {text}", True
