"""The report: which base, which numbers, what merging loses; the command and its page."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import kindling
from tests import tiny
from tests.unit.adapters.state import save
from train.adapters import examine, rounding
from train.adapters.source import BASES, Source
from train.errors import CheckpointError, ConfigError
from train.loading import frozen
from train.loading.names import diffusers_places


def real(base: str, path: Path, *, part: str = "", scale: float = 1.0) -> Path:
    """Rank 1 on a released base's Linears, in their real shapes."""
    state = {}
    for module, place in diffusers_places(BASES[base]).items():
        if part in module:
            state[f"transformer.{module}.lora_A.weight"] = torch.full((1, place.columns), 0.01)
            up = torch.full((place.stop - place.start, 1), 0.01 * scale)
            state[f"transformer.{module}.lora_B.weight"] = up
    return save({k: t.bfloat16() for k, t in state.items()}, path)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", ["", "attn.to_q", "single_transformer_blocks.0.", "ff.linear_out"])
def test_the_base_is_seen_by_the_shapes(base: str, part: str, tmp_path: Path) -> None:
    assert Source(real(base, tmp_path / "a.safetensors", part=part)).base == base


@pytest.mark.parametrize("base", BASES)
def test_a_whole_adapter_of_a_released_base(base: str, tmp_path: Path) -> None:
    report = examine.examine(real(base, tmp_path / "a.safetensors"))
    assert report["passed"]
    assert (report["base"]["name"], report["base"]["given"]) == (base, False)
    places = diffusers_places(BASES[base])
    assert report["adapter"]["linears"] == len(places)
    assert sum(report["adapter"]["targets"].values()) == len(places)
    expected = {
        f"transformer.{m}": 1e-4 * ((p.stop - p.start) * p.columns) ** 0.5
        for m, p in places.items()
    }
    assert report["numbers"]["norms"] == pytest.approx(expected, rel=1e-2)


def test_the_wrong_base_is_told(tmp_path: Path) -> None:
    path = real("klein-4b", tmp_path / "a.safetensors", part="attn.to_q")
    report = examine.examine(path, base="klein-9b")
    assert not report["passed"]
    assert "its shape is (3072, 3072), the weight's (4096, 4096)" in str(report["misfits"])
    assert "size mismatch" in str(report["diffusers"]["reasons"])
    assert not report["comfyui"]["loads"]


def test_an_unknown_width_asks_for_the_base(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{name}.lora_A.weight": torch.ones(2, 40), f"{name}.lora_B.weight": torch.ones(40, 2)}
    path = save(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"40 wide.*Give its folder as --base"):
        examine.examine(path)
    with pytest.raises(ConfigError, match="isn't one of dev, klein-4b, klein-9b"):
        examine.examine(path, base=str(tmp_path))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.transformer(guidance=True).bfloat16().save_pretrained(folder / "transformer")
    return folder


def tiny_state(base: Path, *, size: float) -> dict[str, torch.Tensor]:
    draw, state = torch.Generator().manual_seed(4), {}
    folder = base / "transformer"
    for key, weight in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        if weight.ndim == 2 and ".attn.to_" in key:
            stem = f"transformer.{key.removesuffix('.weight')}"
            state[f"{stem}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=draw)
            state[f"{stem}.lora_B.weight"] = size * torch.randn(len(weight), 2, generator=draw)
    return state


def test_numbers_that_spoil_pictures_are_faults(base: Path, tmp_path: Path) -> None:
    state = tiny_state(base, size=1.0)
    names = [key for key in state if "lora_B" in key]
    state[names[0]][1, 1] = torch.nan
    state[names[1]].zero_()
    report = examine.examine(save(state, tmp_path / "a.safetensors"), base=str(base))
    json.dumps(report, allow_nan=False)
    unit = names[0].removesuffix(".lora_B.weight")
    assert report["numbers"]["faults"] == [f"{unit}: 1 numbers aren't finite"]
    assert report["numbers"]["zero"] == [names[1].removesuffix(".lora_B.weight")]
    assert not report["passed"]


def test_an_update_too_large_for_a_number_is_a_fault(base: Path, tmp_path: Path) -> None:
    state = {key: 1e25 * tensor for key, tensor in tiny_state(base, size=1.0).items()}
    report = examine.examine(save(state, tmp_path / "a.safetensors"), base=str(base))
    json.dumps(report, allow_nan=False)
    assert len(report["numbers"]["faults"]) == len(state) // 2
    assert report["numbers"]["faults"][0].endswith("its update is too large for fp32")
    assert not report["passed"]


def test_an_alpha_below_zero_is_no_endless_loop(tmp_path: Path) -> None:
    """diffusers' own loader would halve for ever."""
    name, state = "lora_unet_double_blocks_0_img_attn_proj", {}
    state[f"{name}.lora_down.weight"] = torch.ones(2, 3072)
    state[f"{name}.lora_up.weight"] = torch.ones(3072, 2)
    state[f"{name}.alpha"] = torch.tensor(-1.0)
    report = examine.examine(save(state, tmp_path / "a.safetensors"))
    assert report["diffusers"]["reasons"] == ["its loader never ends on an alpha below zero"]
    assert not report["diffusers"]["loads"]
    assert report["comfyui"]["exact"]
    assert report["remedy"] == examine.REMEDY


def test_an_adapter_of_zeros_is_a_fault(base: Path, tmp_path: Path) -> None:
    path = save(tiny_state(base, size=0.0), tmp_path / "a.safetensors")
    report = examine.examine(path, base=str(base))
    assert report["numbers"]["faults"] == ["every update is zero: the adapter changes nothing"]


def test_what_merging_loses(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition over all rows; a small adapter loses more."""
    monkeypatch.setattr(rounding, "ROWS", 10**6)
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    found = {}
    for size in (0.03, 0.3):
        state = tiny_state(base, size=size)
        path = save(state, tmp_path / "a.safetensors")
        found[size] = examine.examine(path, base=str(base))["rounding"]
        lost = norm = 0.0
        for key in [key for key in state if "lora_A" in key]:
            module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            delta = state[key.replace("lora_A", "lora_B")] @ state[key]
            weight = weights[f"{module}.weight"].float()
            packed = [frozen.quantize(w, "fp8") for w in (weight + delta, weight)]
            one, two = (frozen.dequantize(p, "fp8", shape=weight.shape) for p in packed)
            lost += (one - two - delta).square().sum().item()
            norm += delta.square().sum().item()
        assert found[size]["fp8"] == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
        assert found[size]["bf16"] < found[size]["fp8"] < found[size]["nf4"]
    assert all(found[0.03][kind] > 2 * found[0.3][kind] for kind in rounding.FORMATS)


def test_without_weights_nothing_is_said_of_rounding(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "base" / "transformer"
    config.mkdir(parents=True)
    (config / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes())
    path = save(tiny_state(base, size=1.0), tmp_path / "a.safetensors")
    assert examine.examine(path, base=str(config.parent))["rounding"] == {}


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tiny_state(base, size=1.0)
    modules = [k.removeprefix("transformer.").removesuffix(".lora_A.weight") for k in state]
    settings = {"r": 2, "lora_alpha": 1, "target_modules": modules[::2]}
    text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    path = save(state, tmp_path / "<mika>.safetensors", {"lora_adapter_metadata": text})
    arguments = ["certify", str(path), "--base", str(base)]
    arguments += ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert kindling.main(arguments) == 1
    output = capsys.readouterr().out
    assert "diffusers:  yes, every key, at strength 1\n" in output
    assert "ComfyUI:    yes, but at strength 2 of what was trained\n" in output
    assert "set its strength to 0.5 to get the strength it was trained at" in output
    assert "scale 0.5 (from metadata)" in output
    assert f"remedy:     {examine.REMEDY}\n" in output
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report == examine.examine(path, base=str(base))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<mika>" not in page
    assert "&lt;mika&gt;" in page
    assert all(key in page for key in report["comfyui"]["keys"])
    assert "http" not in page
