"""What isn't plain LoRA inside the blocks: DoRA, LoKr, Linears outside the blocks, partial Linears.

Against diffusers' real loader and our reading of ComfyUI, each with the change of real weights.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop import common
from train.adapters import comfyui, examine, files
from train.adapters.convert import convert
from train.adapters.resize import resize
from train.adapters.source import Source
from train.adapters.updates import Kronecker
from train.adapters.write import LAYOUTS
from train.errors import CheckpointError
from train.loading.names import Shape, diffusers_places
from train.lora import Adapter

QUERY = "transformer_blocks.0.attn.to_q"
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


@pytest.fixture
def dev() -> Any:
    return common.pipeline("dev")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    common.pipeline("dev").transformer.save_config(folder / "transformer")
    return str(folder)


def merged(pipeline: Any, path: Path) -> dict[str, Tensor]:
    """All weights of the transformer after diffusers loaded and merged a file."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return {n.replace(".base_layer", ""): w for n, w in pipeline.transformer.state_dict().items()}


def magnitudes(adapter: Adapter, transformer: torch.nn.Module) -> dict[str, Tensor]:
    """One a row, near the norms of the base's rows."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for module in adapter.down:
        norms = transformer.get_parameter(f"{module}.weight").norm(dim=1)
        found[module] = (norms * (1 + 0.2 * torch.randn(len(norms), generator=draw))).detach()
    return found


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's definition: the changed weight with rows of these norms. (Liu et al. 2024, eq. 5)"""
    changed = weight + delta
    return magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)


def dora_file(kind: str, adapter: Adapter, size: dict[str, Tensor], shape: Shape, at: Path) -> Path:
    if kind == "peft":
        state = common.peft_layout(adapter)
        state |= {f"transformer.{m}.lora_magnitude_vector": v for m, v in size.items()}
        return common.save(state, at)
    state = common.bfl_layout(
        adapter, shape, kohya=True, down="lora_down", up="lora_up", alpha=True
    )
    rows: dict[str, list[Tensor]] = {}
    for module, place in diffusers_places(shape).items():
        rows.setdefault(place.weight.removesuffix(".weight"), []).append(size[module])
    names = {weight: f"lora_unet_{weight.replace('.', '_')}" for weight in rows}
    state |= {f"{names[w]}.dora_scale": torch.cat(parts)[:, None] for w, parts in rows.items()}
    return common.save(state, at)


@pytest.mark.parametrize("kind", ["peft", "kohya"])
@pytest.mark.parametrize("to", LAYOUTS)
def test_dora_keeps_its_magnitudes(kind: str, to: str, dev: Any, base: str, tmp_path: Path) -> None:
    adapter, shape = common.random_adapter(dev.transformer), Shape.of(dev.transformer)
    size = magnitudes(adapter, dev.transformer)
    weights = {m: dev.transformer.get_parameter(f"{m}.weight").clone() for m in adapter.down}
    path = dora_file(kind, adapter, size, shape, tmp_path / "a.safetensors")
    output = tmp_path / "converted.safetensors"
    convert(path, output, to=to)
    found = {m: u for _, group in Source(output).walk() for m, u in group.items()}
    for module, update in found.items():
        up, down = update.factors()  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close((up @ down).float(), adapter.delta(module), atol=1e-6, rtol=1e-5)
        assert torch.equal(update.magnitude, size[module])  # pyright: ignore
    report = examine.examine(output, base=base)
    assert report["adapter"]["kind"] == "DoRA"
    keys = files.File(output).tensors
    if to == "diffusers":
        assert not any(key.endswith("dora_scale") for key in keys)
        assert "magnitudes are ignored" in report["comfyui"]["reasons"][0]
        after = merged(dev, output)
        for module, weight in weights.items():
            expected = dora(weight, adapter.delta(module), size[module])
            torch.testing.assert_close(after[f"{module}.weight"], expected, atol=1e-5, rtol=1e-4)
        assert report["diffusers"]["strength"] == 1.0
        assert report["diffusers"]["exact"]
    else:
        assert "magnitudes are dropped" in report["diffusers"]["reasons"][0]
        scales = [key for key in keys if key.endswith("dora_scale")]
        assert report["comfyui"]["counts"]["used, not compared"] == len(scales) > 0
        assert "norms of the base's rows" in report["comfyui"]["reasons"][0]


def test_peft_dora_alone_is_plain_lora_in_comfyui(dev: Any, base: str, tmp_path: Path) -> None:
    adapter = common.random_adapter(dev.transformer)
    size = magnitudes(adapter, dev.transformer)
    path = dora_file("peft", adapter, size, Shape.of(dev.transformer), tmp_path / "a.safetensors")
    report = examine.examine(path, base=base)
    assert "magnitudes are ignored" in report["comfyui"]["reasons"][0]
    assert report["passed"] is False


def test_dora_can_not_be_cut(dev: Any, tmp_path: Path) -> None:
    adapter = common.random_adapter(dev.transformer)
    size = magnitudes(adapter, dev.transformer)
    path = dora_file("peft", adapter, size, Shape.of(dev.transformer), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="this is DoRA"):
        resize(path, tmp_path / "b.safetensors", rank=1)


def lokr_state(names: dict[str, tuple[int, int]], *, whole: bool, alpha: float) -> common.State:
    """name -> size of its weight; factors as LyCORIS makes them with factor 4."""
    draw, state = torch.Generator().manual_seed(5), {}
    for name, (rows, columns) in names.items():
        state[f"{name}.lokr_w1"] = torch.randn(4, 4, generator=draw)
        if whole:
            state[f"{name}.lokr_w2"] = 0.1 * torch.randn(rows // 4, columns // 4, generator=draw)
        else:
            state[f"{name}.lokr_w2_a"] = 0.3 * torch.randn(rows // 4, 2, generator=draw)
            state[f"{name}.lokr_w2_b"] = 0.3 * torch.randn(2, columns // 4, generator=draw)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def lokr_deltas(state: common.State) -> dict[str, Tensor]:
    """LyCORIS' definition: kron(w1, w2), scaled by alpha / rank where a factor is low-rank."""
    deltas = {}
    for key in [key for key in state if key.endswith(".lokr_w1")]:
        name = key.removesuffix(".lokr_w1")
        right, scale = state.get(f"{name}.lokr_w2"), 1.0
        if right is None:
            right = state[f"{name}.lokr_w2_a"] @ state[f"{name}.lokr_w2_b"]
            scale = state[f"{name}.alpha"].item() / 2
        deltas[name] = scale * torch.kron(state[key], right)
    return deltas


def sizes(transformer: Any) -> dict[str, tuple[int, int]]:
    places = diffusers_places(Shape.of(transformer))
    return {module: (place.stop - place.start, place.columns) for module, place in places.items()}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("prefix", ["lycoris_", "transformer.", ""])
def test_lokr_of_diffusers_names(
    prefix: str, whole: bool, dev: Any, base: str, tmp_path: Path
) -> None:
    names = {
        prefix + (module.replace(".", "_") if prefix == "lycoris_" else module): size
        for module, size in sizes(dev.transformer).items()
    }
    state = lokr_state(names, whole=whole, alpha=1.0)
    deltas = dict(zip(sizes(dev.transformer), lokr_deltas(state).values(), strict=True))
    path = common.save(state, tmp_path / "a.safetensors")
    before = {m: dev.transformer.get_parameter(f"{m}.weight").clone() for m in deltas}
    output = tmp_path / "converted.safetensors"
    convert(path, output, to="diffusers")
    for module, update in ((m, u) for _, g in Source(output).walk() for m, u in g.items()):
        assert isinstance(update, Kronecker)
        torch.testing.assert_close(
            update.scale * torch.kron(update.left, update.right), deltas[module]
        )
    reading = comfyui.read(files.load(output)[0], Shape.of(dev.transformer))
    assert (reading.ignored, reading.failed, len(reading.patches)) == ([], [], len(deltas))
    report = examine.examine(path, base=base)
    assert report["comfyui"]["strength"] == pytest.approx(1.0)
    report = examine.examine(output, base=base)
    for loader in ("diffusers", "comfyui"):
        assert (report[loader]["strength"], report[loader]["exact"]) == (1.0, True)
        assert report[loader]["counts"] == {"used": len(files.File(output).tensors)}
    after = merged(dev, output)
    for module, delta in deltas.items():
        torch.testing.assert_close(
            after[f"{module}.weight"] - before[module], delta, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_lokr_over_q_k_and_v_stays_one(to: str, dev: Any, base: str, tmp_path: Path) -> None:
    weights = {w.removesuffix(".weight"): s for w, s in Shape.of(dev.transformer).weights().items()}
    state = lokr_state(
        {f"diffusion_model.{w}": s for w, s in weights.items()}, whole=False, alpha=3.0
    )
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    common.save(state, path)
    report = examine.examine(path, base=base)
    assert report["adapter"]["kind"] == "LoKr"
    assert (report["diffusers"]["loads"], report["comfyui"]["exact"]) == (True, True)
    # 4 does not divide by 3, so the factors can't be cut at q's border
    with pytest.raises(CheckpointError, match="its factors don't divide"):
        convert(path, output, to=to)
    outcome, kept = convert(path, output, to=to, rank=8)
    assert min(kept.values()) > 1 - 1e-9  # 4 x 2 ranks: all of them
    reading = comfyui.read(files.load(output)[0], Shape.of(dev.transformer))
    for name, delta in lokr_deltas(state).items():
        weight = name.removeprefix("diffusion_model.") + ".weight"
        found = reading.delta(weight, Shape.of(dev.transformer)).float()
        torch.testing.assert_close(found, delta, atol=1e-5, rtol=1e-4)
    assert outcome.error < 1e-6


def test_lokr_that_divides_at_q_k_and_v_splits_and_fuses(tmp_path: Path) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    state = {f"{name}.lokr_w1": torch.randn(3, 4), f"{name}.lokr_w2": torch.randn(32, 8)}
    path = common.save(state, tmp_path / "a.safetensors")
    split, fused = tmp_path / "split.safetensors", tmp_path / "fused.safetensors"
    convert(path, split, to="diffusers")
    whole = torch.kron(state[f"{name}.lokr_w1"], state[f"{name}.lokr_w2"])
    (group,) = (group for _, group in Source(split).walk())
    for i, part in enumerate(QKV):
        update = group[f"transformer_blocks.0.{part}"]
        assert isinstance(update, Kronecker)
        assert torch.equal(torch.kron(update.left, update.right), whole[32 * i : 32 * (i + 1)])
    convert(path, fused, to="comfyui")
    assert {k: v.tolist() for k, v in files.load(fused)[0].items()} == {
        k: v.tolist() for k, v in state.items()
    }
    with pytest.raises(CheckpointError, match="LoKr of q, k and v with factors of their own"):
        convert(split, tmp_path / "c.safetensors", to="comfyui")
    convert(split, tmp_path / "c.safetensors", to="kohya")
    names = {key.partition(".")[0] for key in files.File(tmp_path / "c.safetensors").tensors}
    assert names == {f"lycoris_transformer_blocks_0_attn_to_{part}" for part in "qkv"}


OUTSIDE = ("x_embedder", "proj_out", "norm_out.linear", "double_stream_modulation_img.linear")


@pytest.mark.parametrize("module", OUTSIDE)
@pytest.mark.parametrize("to", LAYOUTS)
def test_outside_the_blocks(module: str, to: str, dev: Any, base: str, tmp_path: Path) -> None:
    """Converted right, loaded by who knows it; diffusers forgets to swap the final modulation."""
    rows, columns = dev.transformer.get_parameter(f"{module}.weight").shape
    up, down = torch.randn(rows, 2), torch.randn(2, columns)
    state = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    inside = f"transformer.{QUERY}"
    state |= {
        f"{inside}.lora_A.weight": torch.ones(2, 32),
        f"{inside}.lora_B.weight": torch.ones(32, 2),
    }
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert(common.save(state, path), output, to=to)
    group = dict(item for _, g in Source(output).walk() for item in g.items())
    torch.testing.assert_close(group[module].up @ group[module].down, up @ down)  # pyright: ignore
    report = examine.examine(output, base=base)
    swapped, modulation = module == "norm_out.linear", "modulation" in module
    if to == "diffusers":
        assert report["diffusers"]["exact"]
        assert report["comfyui"]["exact"] is not modulation
    else:
        assert report["comfyui"]["exact"]
        wrong = (swapped or modulation) if to == "kohya" else swapped
        assert report["diffusers"]["exact"] is not wrong
    if swapped and to == "comfyui":
        assert "gives another update" in report["diffusers"]["reasons"][0]


def test_the_first_rows_of_linear1_alone(tmp_path: Path) -> None:
    """linear1_qkv is a name that ComfyUI knows: q, k and v of a single block."""
    name = "diffusion_model.single_blocks.1.linear1_qkv"
    up, down = torch.randn(96, 2), torch.randn(2, 32)
    state = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    state |= {f"diffusion_model.double_blocks.1.img_attn.proj.lora_{h}.weight": torch.ones(s)
              for h, s in (("up", (32, 2)), ("down", (2, 32)))}  # fmt: skip
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert(common.save(state, path), output, to="diffusers")
    tensors, _ = files.load(output)
    stem = "transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj"
    delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(delta[:96], up @ down)
    assert (delta.shape, delta[96:].abs().max()) == ((288, 32), 0)
