"""The schema itself: defaults, immutability, ranges and what must fit together."""

import pytest
from pydantic import ValidationError

from train.config import Config, LoraConfig
from train.config.schema import allowed

MINIMAL = {"name": "x", "data": {"path": "pictures"}, "train": {"steps": 10}}


def problems(**sections: object) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(MINIMAL | sections)
    return {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}


def test_three_settings_are_enough() -> None:
    config = Config.model_validate(MINIMAL)
    assert (config.base.model, config.lora.rank, config.optim.lr) == ("dev", 16, 1e-4)


def test_a_config_never_changes() -> None:
    config = Config.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 4


@pytest.mark.parametrize(
    ("value", "message"),
    [((), "the list of sizes is empty"), ((512, 768, 512), "names one size twice")],
)
def test_resolutions_are_some_and_differ(value: tuple[int, ...], message: str) -> None:
    found = problems(data={"path": "p", "resolution": value})
    assert found["data.resolution"] == message


def test_a_share_needs_another_set() -> None:
    assert problems(data={"path": "p", "share": 2.0}) == {
        "data.share": "has no effect without more_data; remove it"
    }


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = {"output": "~/runs", "cache": "~/cache", "base": {"model": "~/flux"}}
    config = Config.model_validate(MINIMAL | paths | {"data": {"path": "~/pictures"}})
    found = [config.output, config.cache, config.base.model, config.data.path]
    assert found == ["/home/me/runs", "/home/me/cache", "/home/me/flux", "/home/me/pictures"]


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8, 0.5), (32, 2.0)])
def test_scale_is_alpha_over_rank(alpha: float | None, scale: float) -> None:
    assert LoraConfig(rank=16, alpha=alpha).scale == scale


def test_scale_of_rslora_is_alpha_over_the_root_of_the_rank() -> None:
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale == 2.0
    assert problems(lora={"rslora": True}) == {
        "lora.rslora": "needs lora.alpha: the strength is alpha / sqrt(rank)"
    }


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        (
            {"lora": {"kind": "dora", "factor": 4, "dropout": 0.1, "init": "pissa"}},
            {
                "lora.factor": "has no effect with kind: dora; remove it",
                "lora.init": "pissa takes its start off the output, dora scales whole weights",
                "lora.dropout": "dora has no input of its own to drop; remove it",
            },
        ),
        (
            {"lora": {"kind": "lokr", "rslora": True, "alpha": 2.0, "init": "eva"}},
            {
                "lora.init": "eva starts a down matrix, which lokr doesn't have",
                "lora.rslora": "is a strength for low-rank products, which lokr isn't; set alpha",
            },
        ),
        (
            {"lora": {"kind": "dora"}, "base": {"quantize": "fp8"}, "optim": {"name": "muon"}},
            {
                "lora.kind": "dora trains the lengths of the base's rows, and those of "
                "base.quantize: fp8 aren't those of the weights that the file is used with; use "
                "lora or lokr, or remove base.quantize",
                "optim.name": "muon is for matrices, but dora's magnitudes are vectors",
            },
        ),
        (
            {
                "lora": {"kind": "lokr"},
                "base": {"quantize": "nf4"},
                "optim": {"lora_plus": 4.0},
            },
            {
                "lora.kind": "lokr can't be loaded onto base.quantize: nf4, since peft asks the "
                "weights for their shape, which nf4 packs; use fp8 or int8, or lora",
                "optim.lora_plus": "is for up matrices, which lora.kind: lokr doesn't have",
            },
        ),
    ],
)
def test_a_kind_of_adapter_takes_what_it_is_given_or_says_so(
    sections: dict[str, object], messages: dict[str, str]
) -> None:
    assert problems(**sections) == messages


@pytest.mark.parametrize(
    ("optim", "messages"),
    [
        (
            {"name": "adafactor", "betas": (0.9, 0.95), "eps": 1e-6},
            {
                "betas": "has no effect with name: adafactor; remove it",
                "eps": "has no effect with name: adafactor; remove it",
            },
        ),
        (
            {"name": "muon", "betas": (0.9, 0.95)},
            {"betas": "has no effect with name: muon; remove it"},
        ),
        (
            {"name": "lion8bit", "eps": 1e-6},
            {"eps": "has no effect with name: lion8bit; remove it"},
        ),
        ({"restarts": 2}, {"restarts": "has no effect with schedule: constant; remove it"}),
        (
            {"restarts": 2, "schedule": "linear"},
            {"restarts": "has no effect with schedule: linear; remove it"},
        ),
        ({"floor": 0.1}, {"floor": "has no effect with schedule: constant; remove it"}),
        (
            {"name": "prodigy", "lora_plus": 16.0},
            {
                "lr": "is 0.0001, but prodigy finds the rate itself and takes this as a factor on "
                "it; set 1.0",
                "lora_plus": "prodigy has one rate for all weights; remove it",
            },
        ),
        (
            {"name": "schedulefree", "schedule": "cosine", "betas": (0.0, 0.9)},
            {
                "schedule": "is cosine, but schedulefree needs constant",
                "betas": "the first can't be 0 with schedulefree, which averages by it",
            },
        ),
    ],
)
def test_an_optimizer_takes_what_it_is_given_or_says_so(
    optim: dict[str, object], messages: dict[str, str]
) -> None:
    assert problems(optim=optim) == {f"optim.{key}": text for key, text in messages.items()}


def test_prodigy_takes_a_factor_around_1() -> None:
    assert Config.model_validate(MINIMAL | {"optim": {"name": "prodigy", "lr": 0.5}})


def test_averages_are_shown_only_where_there_are_any() -> None:
    assert problems(export={"weights": "last"}) == {
        "export.weights": "has no effect without train.ema; remove it"
    }
    free = {"name": "schedulefree"}
    train = {"steps": 10, "ema": 0.9}
    assert problems(optim=free, train=train, export={"weights": "last"}) == {
        "train.ema": "isn't needed with optim.name: schedulefree, an average itself",
        "export.weights": "must be average with optim.name: schedulefree: where it takes its "
        "gradients is no place for pictures",
    }
    assert Config.model_validate(MINIMAL | {"train": train, "export": {"weights": "last"}})


def test_a_budget_is_for_auto_settings() -> None:
    fault = "has no effect unless gradient_checkpointing or resident_blocks is auto; set one of "
    fault += "them to auto, or remove it"
    assert problems(memory={"budget_gb": 20.0}) == {"memory.budget_gb": fault}
    both = {"budget_gb": 20.0, "gradient_checkpointing": "none", "offload_activations": True}
    assert problems(memory=both).keys() == {"memory.budget_gb", "memory.offload_activations"}
    for key in ("gradient_checkpointing", "resident_blocks"):
        Config.model_validate(MINIMAL | {"memory": {"budget_gb": 20.0, key: "auto"}})


def test_pissa_needs_the_bases_own_weights() -> None:
    assert problems(lora={"init": "pissa"}, base={"quantize": "nf4"}) == {
        "lora.init": "pissa needs the base's own weights, not base.quantize: nf4; "
        "remove one of the two"
    }


def test_settings_without_effect_are_refused_where_they_are() -> None:
    assert problems(flow={"sampling": "uniform", "mean": 1.0, "std": 2}) == {
        "flow.mean": "has no effect with sampling: uniform; remove it",
        "flow.std": "has no effect with sampling: uniform; remove it",
    }
    assert problems(preview={"every": 5, "width": 64}) == {
        "preview.every": "has no effect without preview.prompts or edits; remove it or add some",
        "preview.width": "has no effect without preview.prompts or edits; remove it or add some",
    }


def test_a_default_written_out_is_as_good_as_none() -> None:
    spelled = {"flow": {"sampling": "uniform", "mean": 0.0}, "preview": {"every": 250}}
    assert Config.model_validate(MINIMAL | spelled).flow.mean == 0.0


def test_trigger_is_needed_by_the_settings_that_use_it() -> None:
    data = {"path": "p", "trigger_mode": "prepend", "missing_captions": "trigger"}
    assert problems(data=data) == {
        "data.trigger_mode": "is 'prepend' but data.trigger is not set",
        "data.missing_captions": "is 'trigger' but data.trigger is not set",
    }
    assert Config.model_validate(MINIMAL | {"data": {**data, "trigger": "zibby"}})


def test_warmup_ends_before_training_does() -> None:
    assert list(problems(optim={"warmup": 10})) == ["optim.warmup"]
    assert Config.model_validate(MINIMAL | {"optim": {"warmup": 9}})


@pytest.mark.parametrize("name", ["../x", ".x", "a b", "", "x" * 101, "a/b", "x\n"])
def test_a_name_is_a_safe_file_name(name: str) -> None:
    assert "name" in problems(name=name)


def test_beta_of_one_is_refused() -> None:
    assert "optim.betas.1" in problems(optim={"betas": (0.9, 1.0)})


def test_every_setting_has_a_description_and_words() -> None:
    schema = Config.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        for key, field in section["properties"].items():
            assert field["description"], key
            if "$ref" not in field:
                assert allowed(field), key


def test_nothing_is_checked_with_settings_that_would_be_ignored() -> None:
    unused = "has no effect with pictures: off; remove it"
    assert problems(validation={"pictures": "off", "every": 10, "sigmas": 4}) == {
        "validation.every": unused,
        "validation.sigmas": unused,
    }
    assert problems(validation={"pictures": "training", "path": "x", "fraction": 0.2}) == {
        "validation.path": "has no effect with pictures: training; remove one of them",
        "validation.fraction": "has no effect where none of data are held out; remove it",
    }


@pytest.mark.parametrize("pictures", ["training", "off"])
def test_the_best_needs_held_out_pictures(pictures: str) -> None:
    found = problems(validation={"pictures": pictures}, export={"checkpoint": "best"})
    assert found == {
        "export.checkpoint": f"needs held-out pictures; validation.pictures is '{pictures}'"
    }


def test_neutral_prompts_have_no_trigger() -> None:
    """As a whole word; of the default ones, those that have it are left out instead."""
    data = {"path": "p", "trigger": "rain"}
    own = {"neutral_prompts": ("a train", "no rain today")}
    assert problems(data=data, validation=own) == {
        "validation.neutral_prompts": "has the trigger 'rain'"
    }
    assert Config.model_validate(MINIMAL | {"data": data}).validation.neutral_prompts


def test_a_project_needs_a_tracker_that_has_them() -> None:
    for track in ({}, {"tensorboard": True}):
        assert problems(track={"project": "mine", **track}) == {
            "track.project": "has no effect without wandb or trackio; remove it"
        }
    for track in ({"wandb": "offline"}, {"trackio": True}):
        assert Config.model_validate(MINIMAL | {"track": {"project": "mine", **track}})
