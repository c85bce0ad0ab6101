"""The workflow against a record of ComfyUI's own nodes, and the script's text."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.adapters import usage, workflow
from train.adapters.usage import Usage

RECORD = json.loads(Path(__file__).with_name("comfyui_nodes.json").read_text(encoding="utf-8"))
NODES: dict[str, Any] = RECORD["nodes"]

DEV = Usage(
    file="mika v3.safetensors",
    pipeline="Flux2Pipeline",
    base="dev",
    released="dev",
    distilled=False,
    prompt='mikachan 角色, "waving"',
    side=768,
    revision="abc123",
)
KLEIN = replace(
    DEV, pipeline="Flux2KleinPipeline", base="klein-9b", released="klein-9b", revision=None
)
GRAPHS = {
    "dev": usage.comfyui_workflows(DEV)[".comfyui.json"],
    "klein": usage.comfyui_workflows(KLEIN)[".comfyui.json"],
    "klein in 4 steps": usage.comfyui_workflows(KLEIN)[".comfyui-4steps.json"],
    "klein-4b": usage.comfyui_workflows(replace(KLEIN, released="klein-4b"))[".comfyui.json"],
}


def parts(kind: str) -> tuple[list[tuple[str, str]], list[list[Any]]]:
    """A recorded node's sockets, and what its widgets take, in the order of their values."""
    inputs = NODES[kind]["inputs"]
    sockets = [(name, value) for name, value in inputs.items() if isinstance(value, str)]
    return sockets, [value for value in inputs.values() if not isinstance(value, str)]


def takes(widget: list[Any], value: Any) -> bool:
    kind, *limits = widget
    if isinstance(kind, list):
        return value in kind
    if kind in ("*", "STRING"):
        return isinstance(value, str) and (kind == "STRING" or value.endswith(".safetensors"))
    allowed = (int, float) if kind == "FLOAT" else (int,)
    return isinstance(value, allowed) and limits[0] <= value <= limits[1]


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_are_comfyuis(name: str) -> None:
    for node in GRAPHS[name]["nodes"]:
        sockets, widgets = parts(node["type"])
        assert [(i["name"], i["type"]) for i in node["inputs"]] == sockets
        assert [[o["name"], o["type"]] for o in node["outputs"]] == NODES[node["type"]]["outputs"]
        values = node["widgets_values"]
        assert len(values) == len(widgets), node["type"]
        assert all(map(takes, widgets, values)), (node["type"], values)
        assert node["properties"]["Node name for S&R"] == node["type"]


@pytest.mark.parametrize("name", GRAPHS)
def test_links_agree_with_both_ends(name: str) -> None:
    graph = GRAPHS[name]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == graph["last_node_id"]
    found = {}
    for number, source, output, target, slot, kind in graph["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert (out["type"], into["type"]) == (kind, kind)
        assert number in out["links"]
        assert into["link"] == number
        assert nodes[source]["order"] < nodes[target]["order"]
        found[number] = target
    assert sorted(found) == list(range(1, graph["last_link_id"] + 1))
    sockets = [i["link"] for node in graph["nodes"] for i in node["inputs"]]
    assert sorted(sockets) == sorted(found)  # none is open, none is named twice
    outgoing = [link for node in graph["nodes"] for o in node["outputs"] for link in o["links"]]
    assert sorted(outgoing) == sorted(found)
    ends = [n["type"] for n in graph["nodes"] if not any(o["links"] for o in n["outputs"])]
    assert sorted(ends) == ["MarkdownNote", "SaveImage"]


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_lie_beside_each_other(name: str) -> None:
    boxes = [(*node["pos"], *node["size"]) for node in GRAPHS[name]["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def values(name: str, kind: str) -> list[list[Any]]:
    return [node["widgets_values"] for node in GRAPHS[name]["nodes"] if node["type"] == kind]


@pytest.mark.parametrize(
    ("name", "model", "encoder", "steps", "guider", "guidance"),
    [
        (
            *("dev", "flux2_dev_fp8mixed", "mistral_3_small_flux2_bf16"),
            *(50, "FluxGuidance", 4.0),
        ),
        ("klein", "flux-2-klein-base-9b-fp8", "qwen_3_8b_fp8mixed", 50, "CFGGuider", 4.0),
        ("klein in 4 steps", "flux-2-klein-9b-fp8", "qwen_3_8b_fp8mixed", 4, "CFGGuider", 1.0),
        ("klein-4b", "flux-2-klein-base-4b", "qwen_3_4b", 50, "CFGGuider", 4.0),
    ],
)
def test_each_base_has_its_files_and_settings(
    name: str, model: str, encoder: str, steps: int, guider: str, guidance: float
) -> None:
    assert values(name, "UNETLoader") == [[f"{model}.safetensors", "default"]]
    assert values(name, "CLIPLoader") == [[f"{encoder}.safetensors", "flux2", "default"]]
    assert values(name, "VAELoader") == [["flux2-vae.safetensors"]]
    assert values(name, "LoraLoaderModelOnly") == [["mika v3.safetensors", 1.0]]
    assert values(name, "CLIPTextEncode")[0] == ['mikachan 角色, "waving"']
    assert values(name, "Flux2Scheduler") == [[steps, 768, 768]]
    assert values(name, "EmptyFlux2LatentImage") == [[768, 768, 1]]
    assert values(name, guider) == [[guidance]]
    known = [n["properties"]["models"][0] for n in GRAPHS[name]["nodes"] if "Loader" in n["type"]
             and n["type"] != "LoraLoaderModelOnly"]  # fmt: skip
    assert all(model["url"].endswith(f"/{model['name']}") for model in known)
    assert sorted(model["directory"] for model in known) == [
        *("diffusion_models", "text_encoders", "vae"),
    ]


def test_the_note_names_other_weights_that_were_trained_on() -> None:
    ours = usage.comfyui_workflows(replace(DEV, weights="/models/fine.safetensors"))
    assert "trained on fine.safetensors" in json.dumps(ours)
    assert "trained on" not in json.dumps(GRAPHS["dev"])


def test_a_base_that_comfyui_doesnt_know_has_no_workflow() -> None:
    assert usage.comfyui_workflows(replace(DEV, base="toy", released=None)) == {}
    assert usage.released_as(6144, 8, 48) == "dev"
    assert usage.released_as(3072, 5, 20) == "klein-4b"
    assert usage.released_as(96, 2, 4) is None


def test_an_adapter_of_a_distilled_checkpoint_is_used_on_that() -> None:
    one = replace(KLEIN, base="black-forest-labs/FLUX.2-klein-9B", distilled=True)
    (graph,) = usage.comfyui_workflows(one).values()
    assert "flux-2-klein-9b-fp8.safetensors" in json.dumps(graph)
    text = usage.diffusers_snippet(one)
    assert 'from_pretrained("black-forest-labs/FLUX.2-klein-9B"' in text
    assert "num_inference_steps=4, guidance_scale=1" in text


def calls(text: str) -> dict[str, dict[str, Any]]:
    """The literal keyword arguments of a script's calls, by the called name."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            pairs = {k.arg: k.value.value for k in node.keywords
                     if k.arg and isinstance(k.value, ast.Constant)}  # fmt: skip
            found[name] = pairs
    return found


def test_script() -> None:
    text = usage.diffusers_snippet(DEV)
    found = calls(text)
    assert found["pipe"] == {
        "prompt": 'mikachan 角色, "waving"',
        "width": 768,
        "height": 768,
        "num_inference_steps": 50,
        "guidance_scale": 4,
    }
    assert found["pipe.load_lora_weights"] == {"weight_name": "mika v3.safetensors"}
    assert found["Flux2Pipeline.from_pretrained"] == {"revision": "abc123"}
    assert '"black-forest-labs/FLUX.2-dev"' in text
    assert "4 steps" not in text
    assert 'in 4 steps: "black-forest-labs/FLUX.2-klein-9B"' in usage.diffusers_snippet(KLEIN)
    card = usage.diffusers_snippet(DEV, repository="studio/mika")
    assert 'load_lora_weights("studio/mika", ' in card


def test_prompt_has_the_trigger() -> None:
    examples = ("a mikachan1 toy", "a cat", "mikachan, waving")
    assert usage.prompt_for("mikachan", examples) == "mikachan, waving"
    assert usage.prompt_for("zib", examples) == "zib"
    assert usage.prompt_for(None, examples) == "a mikachan1 toy"
    assert usage.prompt_for(None, ("", "a cat")) == "a cat"
    assert usage.prompt_for(None, ())


def certificate(*, diffusers: bool = True, comfyui: bool = True) -> dict[str, Any]:
    return {
        "diffusers": {"reasons": [] if diffusers else ["ignores"]},
        "comfyui": {"reasons": [] if comfyui else ["ignores"]},
    }


def test_nothing_is_left_for_a_loader_that_loads_it_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mika.safetensors"
    both = usage.write(KLEIN, path, certificate())
    assert [p.name for p in both] == [
        *("mika.diffusers.py", "mika.comfyui.json", "mika.comfyui-4steps.json"),
    ]
    assert json.loads(both[1].read_text(encoding="utf-8")) == GRAPHS["klein"]
    only = usage.write(KLEIN, path, certificate(comfyui=False))
    assert [p.name for p in only] == ["mika.diffusers.py"]
    assert usage.write(DEV, path, certificate(diffusers=False)) == [tmp_path / "mika.comfyui.json"]
    assert {p.name for p in tmp_path.iterdir()} == {"mika.comfyui.json"}


def test_every_node_that_the_builder_knows_is_recorded() -> None:
    assert workflow.NODES.keys() == NODES.keys()
