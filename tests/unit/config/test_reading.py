"""Reading configs: every message to the letter, YAML 1.2, overrides, dump, digest, recipes."""

# ruff: noqa: E501 (messages stay in one piece, as the user sees them)

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.config.reading import digest, dump, load
from train.config.wording import SYNONYMS
from train.errors import ConfigError

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = "name: x\ndata: {path: p}\ntrain: {steps: 9}\n"
SECTIONS = "base, data, more_data, encode, lora, flow, optim, train, memory, speed, preview, validation, track, export"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes) -> Path:
    path = Path("x.yaml")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def message(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(text), overrides)
    return str(caught.value)


# What is appended to MINIMAL (3 lines) -> the message, after "x.yaml:".
SETTINGS = [
    ("lora: {rnk: 3}", "4: lora.rnk: unknown key; did you mean 'rank'?"),
    ("rank: 3", "4: rank: unknown key; did you mean 'lora.rank'?"),
    ("lora: {steps: 3}", "4: lora.steps: unknown key; did you mean 'train.steps' or 'preview.steps'?"),
    ("lora: {Rank: 3}", "4: lora.Rank: unknown key; did you mean 'rank'?"),
    ("optim: {LR: 3}", "4: optim.LR: unknown key; did you mean 'lr'?"),
    ("lora.rank: 3", "4: lora.rank: unknown key; in a file, write 'rank' below 'lora:'"),
    ("lorra: {rank: 3}", "4: lorra: unknown key; did you mean 'lora'?"),
    ("learning_rate: 3", "4: learning_rate: unknown key; did you mean 'optim.lr'?"),
    ("lora: {qqq: 3}", "4: lora.qqq: unknown key; allowed here: kind, targets, rank, factor, alpha, rslora, dropout, init, compute"),
    ("zzz: 3", f"4: zzz: unknown key; allowed here: name, output, cache, seed, {SECTIONS}"),
    ("1: 3", f"4: 1: unknown key; allowed here: name, output, cache, seed, {SECTIONS}"),
    ("? [a]\n: 3", f"4: ['a']: unknown key; allowed here: name, output, cache, seed, {SECTIONS}"),
    ("<<: {a: 3}", f"4: <<: unknown key; allowed here: name, output, cache, seed, {SECTIONS}"),
    ("lora:\n  rank: many", "5: lora.rank: must be a whole number from 1 to 1024; got 'many'"),
    ("lora: {rank: 1e3}", "4: lora.rank: must be a whole number from 1 to 1024; got 1000.0"),
    ("lora: {rank: 0}", "4: lora.rank: must be a whole number from 1 to 1024; got 0"),
    ("lora: {rank: true}", "4: lora.rank: must be a whole number from 1 to 1024; got true"),
    ("lora: {rank: '8'}", "4: lora.rank: must be a whole number from 1 to 1024; got '8'"),
    ("lora: {rank: [8]}", "4: lora.rank: must be a whole number from 1 to 1024; got [8]"),
    ("lora: {rank: }", "4: lora.rank: must be a whole number from 1 to 1024; got null"),
    ("seed: -1", "4: seed: must be a whole number, at least 0; got -1"),
    ("optim: {lr: 0}", "4: optim.lr: must be a number above 0; got 0"),
    ("optim: {lr: .inf}", "4: optim.lr: must be a number above 0; got inf"),
    ("optim: {lr: .nan}", "4: optim.lr: must be a number above 0; got nan"),
    ("optim: {lr: 1e999}", "4: optim.lr: must be a number above 0; got inf"),
    ("lora: {alpha: big}", "4: lora.alpha: must be a number above 0, or null; got 'big'"),
    ("lora: {dropout: 1}", "4: lora.dropout: must be a number from 0 to below 1; got 1"),
    ("base: {dtype: BF16}", "4: base.dtype: must be 'bf16' or 'fp32'; got 'BF16'; did you mean 'bf16'?"),
    ("base: {dtype: int4}", "4: base.dtype: must be 'bf16' or 'fp32'; got 'int4'"),
    ("base: {dtype: 16}", "4: base.dtype: must be 'bf16' or 'fp32'; got 16"),
    ("base: {allow_distilled: yes}", "4: base.allow_distilled: must be true or false; got 'yes'"),
    ("base: {model: ''}", "4: base.model: must be text, not empty; got ''"),
    ("base: {model: 3}", "4: base.model: must be text, not empty; got 3; put it in quotes"),
    ("export: {title: {a: 1}}", "4: export.title: must be text, or null; got a mapping; put it in quotes"),
    ("preview:\n  prompts:\n    - a\n    - b: c", "7: preview.prompts, item 2: must be text; got a mapping; put it in quotes"),
    ("preview: {prompts: a}", "4: preview.prompts: must be a list of text; got 'a'"),
    ("preview: {prompts: [a], width: 100}", "4: preview.width: must be a whole number from 64 to 2048, a multiple of 16, or null; got 100"),
    ("optim: {betas: [0.9]}", "4: optim.betas: must be a list of 2, each a number from 0 to below 1; got [0.9]"),
    ("optim: {betas: [0.9, 0.9, 1]}", "4: optim.betas: must be a list of 2, each a number from 0 to below 1; got [0.9, 0.9, 1]"),
    ("optim: {betas: [0.9, 1]}", "4: optim.betas, item 2: must be a number from 0 to below 1; got 1"),
    ("lora: {targets: block}", "4: lora.targets: must be 'attention', 'blocks' or 'diffusers', or a list of text; got 'block'; did you mean 'blocks'?"),
    ("lora: {targets: [3]}", "4: lora.targets: must be 'attention', 'blocks' or 'diffusers', or a list of text; got [3]"),
    ("lora: {targets: []}", "4: lora.targets: the list of patterns is empty"),
    ("lora: {targets: ['(']}", "4: lora.targets: '(' isn't a regular expression: missing ), unterminated subpattern at position 0"),
    ("flow: {shift: -1}", "4: flow.shift: must be 'tokens' or 'none', or a number above 0; got -1"),
    ("lora: 3", "4: lora: must be a section; got 3"),
    ("flow:\n  sampling: uniform\n  std: 2", "6: flow.std: has no effect with sampling: uniform; remove it"),
    ("more_data: [{path: q, pth: r}]", "4: more_data, item 1.pth: unknown key; did you mean 'data.path' or 'validation.path'?"),
    ("more_data: [{resolution: 64}]", "4: more_data, item 1.path: missing; it must be text, not empty"),
    ("more_data: {path: q}", "4: more_data: must be a list of sections; got a mapping"),
    ("more_data: [{path: q, share: 1}]", "2: data: share must be set in data and in all of more_data, or in none"),
    ("more_data: [{path: q, mask_floor: 0.5}]", "4: more_data, item 1.mask_floor: has no effect with mask: none; remove it"),
    ("optim:\n  warmup: 9", "5: optim.warmup: is 9 but train.steps is 9: the learning rate would never reach its peak"),
    ("seed: 1\nseed: 2", "5: seed: is set in line 4 too; remove one"),
    ("lora:\n  rank: 1\n  rank: 1", "6: lora.rank: is set in line 5 too; remove one"),
    ("seed: " + 70 * "9" + "x", f"4: seed: must be a whole number, at least 0; got '{58 * '9'}…"),
]  # fmt: skip

# Whole files -> the message, after "x.yaml".
REFERENCE = "starts an anchor, alias or tag; write the value out, or put the text in quotes"
TAB = "a tab where YAML wants spaces; replace the tab"
BRACKET = "a bracket opens here and never closes, or lacks a comma"
ASKEW = "text after a closing quote or bracket, or indented askew"
COLON = "a second ': '; put text in quotes, or mend the indentation"
ESCAPE = "'\\' in double quotes has a meaning of its own; use single quotes"
FILES = [
    ("", ": is empty; start from one of the recipes in configs/"),
    ("# nothing\n", ": is empty; start from one of the recipes in configs/"),
    ("# c\n- a\n", ":2: must be lines of key: value; got ['a']"),
    ("name:x", ":1: must be lines of key: value; got 'name:x'"),
    ("name: x\ndata:\n\tpath: p", f":3: {TAB}"),
    ("name: a: b", f":1: {COLON}"),
    ("name: 1\n  seed: 2", f":2: {COLON}"),
    ("# c\nname: 'x\nseed: 3\n\n", ":2: a quote opens here and never closes"),
    ("a: 1\nb: [1, 2\nc: 3", f":2: {BRACKET}"),
    ("a:\n  b: 1\n c: 2", f":3: {ASKEW}"),
    ("a: 'it's'", f":1: {ASKEW}"),
    ("a: 1\nfoo\nb: 2", ":2: a line without ': '; write key: value"),
    ("a: @x", ":1: text can't start with '@'; put it in quotes"),
    ('a: "C:\\data"', f":1: {ESCAPE}"),
    ('a: "C:\\Users"', f":1: {ESCAPE}"),
    ("a: &x 1\nb: *x", f":1: '&' {REFERENCE}"),
    ("a: 1\nb: *x", f":2: '*' {REFERENCE}"),
    ("a: !!str 1", f":1: '!' {REFERENCE}"),
    ("a: 1\n---\nb: 2", ":2: a second document begins here; a config is one document"),
    ("a: 1\nb: \x07", ":2: control character U+0007; remove it"),
    ("a: ]", ":1: not valid YAML: expected the node content, but found ']'"),
    (b"a: 1\nb: caf\xe9\n", ":2: byte 0xe9 isn't UTF-8; save as UTF-8"),
    ("a: 1\n".encode("utf-16"), ":1: byte 0xff isn't UTF-8; save as UTF-8"),
    ("name: x\ntrain: {steps: 1}", ": data: missing; it must be a section with path"),
    ("name: x\ndata:\n  # path: p\ntrain: {steps: 1}", ":2: data.path: missing; it must be text, not empty"),
    ("name: x\ndata: {path: p}\ntrain:\n  stps: 1", ":4: train.stps: unknown key; did you mean 'steps'?"),
    ("name: a b\ndata: {path: p}\ntrain: {steps: 1}", ":1: name: must be up to 100 letters, digits, '.', '_' and '-', of which the first is a letter or digit; got 'a b'"),
]  # fmt: skip

# Overrides of MINIMAL -> the whole message.
OVERRIDES = [
    (["lora.rnk=3"], "override lora.rnk=3: unknown key; did you mean 'rank'?"),
    (["rank=3"], "override rank=3: unknown key; did you mean 'lora.rank'?"),
    (["train.steps=many"], "override train.steps=many: must be a whole number, at least 1; got 'many'"),
    (["train.steps=null"], "override train.steps=null: must be a whole number, at least 1; got null"),
    (["train.steps"], "override train.steps: must be key=value: lora.rank=32"),
    (["train.steps.x=1"], "override train.steps.x=1: 'steps' isn't a section"),
    (["a.b.c=1"], f"override a.b.c=1: a: unknown key; allowed here: name, output, cache, seed, {SECTIONS}"),
    (["lora={rank: 3}"], "override lora={rank: 3}: YAML reads the value as a mapping; put it in quotes, or set one key at a time"),
    (["lora.targets=[a"], f"override lora.targets=[a: {BRACKET}"),
    (["data.trigger=#a"], "override data.trigger=#a: '#' starts a comment; put the value in quotes"),
    (["data.path=*a"], f"override data.path=*a: '*' {REFERENCE}"),
    (["seed=1", "seed=2"], "override seed=2: another override sets this too; leave one out"),
    (["lora.rank=1", "lora=null"], "override lora=null: another override sets this too; leave one out"),
    (["data=null"], "override data=null: data.path: missing; it must be text, not empty"),
    (["optim.betas=[1, 2]"], "override optim.betas=[1, 2]: optim.betas, item 1: must be a number from 0 to below 1; got 1\n"
     "override optim.betas=[1, 2]: optim.betas, item 2: must be a number from 0 to below 1; got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), SETTINGS)
def test_message_of_a_setting(text: str, expected: str) -> None:
    assert message(MINIMAL + text) == f"x.yaml:{expected}"


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_message_of_a_file(text: str | bytes, expected: str) -> None:
    assert message(text) == f"x.yaml{expected}"


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES)
def test_message_of_an_override(overrides: list[str], expected: str) -> None:
    assert message(MINIMAL, *overrides) == expected


def test_all_faults_at_once_in_order() -> None:
    text = "name: x\ntrain: {steps: 0}\nlora:\n  rnk: 3\n  rank: 1\n  rank: 2\nseed: a\n"
    assert message(text, "optim.lr=-1", "flow.std").splitlines() == [
        "x.yaml: data: missing; it must be a section with path",
        "x.yaml:2: train.steps: must be a whole number, at least 1; got 0",
        "x.yaml:4: lora.rnk: unknown key; did you mean 'rank'?",
        "x.yaml:6: lora.rank: is set in line 5 too; remove one",
        "x.yaml:7: seed: must be a whole number, at least 0; got 'a'",
        "override flow.std: must be key=value: lora.rank=32",
        "override optim.lr=-1: must be a number above 0; got -1",
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/demi.yaml", "no such file; did you mean configs/demo.yaml?"),
        ("configs/demo", "no such file; did you mean configs/demo.yaml?"),
        ("configs/q.yml", "no such file; configs in configs: demo.yaml"),
        ("nowhere/q.yaml", "no such file; configs in nowhere: none"),
        ("configs", "is a folder; configs in configs: demo.yaml"),
    ],
)
def test_message_of_a_path(path: str, expected: str) -> None:
    Path("configs").mkdir()
    Path("configs/demo.yaml").write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(Path(path))
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("no", "no"), ("off", "off"), ("2024-01-01", "2024-01-01"), ("12:30", "12:30"),
        ("1_0", "1_0"), ("'1'", "1"), ('"null"', "null"), ("=", "="), ("null", None), ("", None),
    ],
)  # fmt: skip
def test_yaml_1_2_text(written: str, meant: str | None) -> None:
    assert load(write(f"{MINIMAL}export:\n  title: {written}\n")).export.title == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-4", 1e-4), ("3", 3.0), ("+.5", 0.5), ("1.", 1.0), ("010", 10.0), ("0x10", 16.0)],
)
def test_yaml_1_2_numbers(written: str, meant: float) -> None:
    lr = load(write(f"{MINIMAL}optim: {{lr: {written}}}")).optim.lr
    assert (lr, type(lr)) == (meant, float)


def test_byte_order_mark_crlf_and_any_language() -> None:
    text = MINIMAL.replace("\n", "\r\n") + "export: {title: 'Zibby — 子猫'}\r\n"
    assert load(write(b"\xef\xbb\xbf" + text.encode())).export.title == "Zibby — 子猫"


def test_an_empty_section_is_its_defaults() -> None:
    assert load(write(f"{MINIMAL}lora:\n  # rank: 3\n")).lora.rank == 16


def test_overrides_win() -> None:
    text = MINIMAL + "lora: {alpha: 3}\npreview:\n  prompts: [a]\n"
    config = load(
        write(text),
        ["lora.targets=[a.*, b]", "lora.alpha=null", "preview.prompts=['x: y']", "optim.lr=1e-3",
         "data.path=C:\\a=b", "export.title=", "export.author=no"],
    )  # fmt: skip
    assert config.lora.targets == ("a.*", "b")
    assert config.lora.alpha is None
    assert config.preview.prompts == ("x: y",)
    assert (config.optim.lr, config.data.path) == (1e-3, "C:\\a=b")
    assert (config.export.title, config.export.author) == (None, "no")


def test_paths_stay_as_typed() -> None:
    Path("deep").mkdir()
    path = write(MINIMAL).rename("deep/x.yaml")
    assert load(path, ["data.path=../p"]).data.path == "../p"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_load_and_say_where_the_schema_is(recipe: Path) -> None:
    assert load(recipe).train.steps
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")


def test_there_is_a_recipe_for_each_real_job() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert names >= {"demo", "dev-character", "dev-style", "klein-character"}


NASTY = ["no", "1e-4", "0o17", "1_000", "null", "~", "2024-01-01", "a: b", "- a", "#x", " a ", "'", '"',
         "a\nb\n", "\ttab", "é\u2028", "🔥", "x" * 300 + " y", "{a}", "=", "<<", "&a", "!b", ".inf"]  # fmt: skip


def test_dump_loads_back_equal() -> None:
    config = load(RECIPES[0], ["flow.sampling=uniform", "flow.shift=2.5", "optim.eps=1e-30"])
    preview = config.preview.model_copy(update={"prompts": tuple(NASTY)})
    config = config.model_copy(update={"preview": preview})
    again = load(write(dump(config)))
    assert again == config
    assert (digest(again), dump(again)) == (digest(config), dump(config))


def test_dump_without_previews_loads_back_equal() -> None:
    config = load(write(MINIMAL))
    assert load(write(dump(config))) == config


def test_digest_is_of_the_values_not_of_the_text() -> None:
    config = load(write(MINIMAL))
    assert digest(config) == digest(load(write(MINIMAL + "lora: {rank: 16}\noptim: {lr: 1.0e-4}")))
    assert digest(config) != digest(load(write(MINIMAL + "seed: 1")))
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    assert digest(config) == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("name", sorted(set(SYNONYMS.values())))
def test_a_synonym_is_of_a_setting(name: str) -> None:
    *sections, key = name.split(".")
    value = load(write(MINIMAL)).model_dump()
    for section in sections:
        value = value[section]
    assert key in value
    assert not isinstance(value[key], dict), "a section is no setting"


def test_schema_file_is_up_to_date() -> None:
    command = [sys.executable, "-m", "train.config.reading", "--schema"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "configs/schema.json").read_text(encoding="utf-8") == made, (
        "run: python -m train.config.reading --schema > configs/schema.json"
    )


def test_torch_is_not_imported() -> None:
    code = "import sys, train.config.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
