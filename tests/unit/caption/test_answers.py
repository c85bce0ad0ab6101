"""What counts as a caption."""

import time

import pytest

from data_tools.caption import answers

LONG = "A fox sits in the snow beside a red barn, looking to the left, seen from below."


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("  A fox.\n\nIt sits.  ", "A fox. It sits."),
        ('"A fox in the snow."', "A fox in the snow."),
        ("“A fox.”", "A fox."),
        ('Caption: "A fox."', "A fox."),
        ("**Caption:** A fox.", "A fox."),
        ("**A fox.**", "A fox."),
        ("Sure! Here's a caption for it:\n\nA fox.", "A fox."),
        ("Here is the caption:\n**A fox.**", "A fox."),
        ("<think>Is it a dog?</think>\n\nA fox.", "A fox."),
        ("it may be a dog...</think>A fox.", "A fox."),
        ("说明：一只狐狸。", "一只狐狸。"),
        ("好的，以下是说明：\n一只狐狸。", "一只狐狸。"),
        # these are captions as they are
        ('"STOP" is on a sign beside "GO"', '"STOP" is on a sign beside "GO"'),
        ("A sign: no entry", "A sign: no entry"),
        ("Zibby's hat and Zibby's scarf", "Zibby's hat and Zibby's scarf"),
    ],
)
def test_tidy(text: str, tidied: str) -> None:
    assert answers.tidy(text) == tidied


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with identifying people in images.",
        "I can’t help with that request.",
        "I'm sorry, but I cannot describe this image.",
        "Sorry, I can't assist with that.",
        "Unfortunately, I am unable to view the picture.",
        "I am not able to see any image.",
        "I don't see an image in your message.",
        "As an AI language model, I do not see pictures.",
        "Please upload the image you would like me to caption.",
        "No image was provided.",
        "抱歉，我无法描述这张图片。",
        "很抱歉，我不能提供帮助。",
        "我无法查看图片。",
        "作为一个人工智能，我看不到图片。",
    ],
)
def test_refusals(text: str) -> None:
    language = "zh" if text > "z" else "en"
    assert answers.fault(text, language=language).startswith("refused: ")


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("", "en", "an empty answer"),
        ("...", "en", "no words"),
        ("12 34", "en", "no words"),
        ("a \ud800 fox", "en", "half a character"),
        ("A fox. " + "a red red barn and " * 9, "en", "repeats itself: 'a red red barn and'"),
        (f"{LONG} Blue sky. {LONG} Green grass. {LONG}", "en", "repeats itself"),
        ("a fox " + "very " * 30, "en", "repeats itself"),
        ("一只狐狸，" + "红色的，" * 20, "zh", "repeats itself"),
        ("ha" * 40, "en", "repeats itself"),
        ("A fox in the snow.", "zh", "not in the language asked for"),
        ("一只狐狸坐在雪地里。", "en", "not in the language asked for"),
    ],
)
def test_faults(text: str, language: str, reason: str) -> None:
    assert reason in answers.fault(text, language=language)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (LONG, "en"),
        ("A sorry-looking clown who can't help but smile holds a sign.", "en"),
        ('A neon sign reads "拉面" above a door.', "en"),
        ("一只狐狸坐在雪地里，身后的牌子写着“Winter Sale 2024”。", "zh"),
        (
            "A man, a woman, a dog, a cat, a horse, a cow and a pig in a row, all of them white.",
            "en",
        ),
        ("Three red apples, three red pears and three red plums on a table.", "en"),
        ("A picture of a picture within a picture within a picture on a wall.", "en"),
        ("I", ""),
    ],
)
def test_captions_pass(text: str, language: str) -> None:
    assert answers.fault(text, language=language) == ""


def test_a_long_answer_is_none_and_is_judged_at_once() -> None:
    """The loop pattern backtracks; a lying server must not make that minutes."""
    words = " ".join(f"word{number}" for number in range(100_000))
    started = time.process_time()
    assert "are no caption" in answers.fault(words, language="en")
    assert answers.fault(words[: answers.MAX_CHARACTERS], language="en") == ""
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "caption", "prefixed"),
    [
        ("zibby waves", "zibby waves", False),
        ("Zibby waves at Zibby.", "zibby waves at zibby.", False),
        ("A fox waves", "zibby, A fox waves", True),
        ("A zibbyish fox", "zibby, A zibbyish fox", True),
        ("一只Zibby在跑", "一只zibby在跑", False),
    ],
)
def test_trigger(text: str, caption: str, prefixed: bool) -> None:
    assert answers.with_trigger(text, trigger="zibby") == (caption, prefixed)


def test_no_trigger() -> None:
    assert answers.with_trigger("A fox", trigger="") == ("A fox", False)
