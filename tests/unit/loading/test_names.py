"""Names and shapes of a transformer's weights; tests/parity/test_weights.py has the converter."""

import torch
from diffusers import Flux2Transformer2DModel

from train.loading import names
from train.loading.shapes import SHAPES


def test_shapes_follow_every_setting():
    config = {
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 5,
        "num_layers": 1,
        "num_single_layers": 3,
        "attention_head_dim": 24,
        "num_attention_heads": 3,
        "joint_attention_dim": 40,
        "mlp_ratio": 2.5,
        "timestep_guidance_channels": 16,
        "guidance_embeds": False,
    }
    assert config.keys() == names.DEFAULTS.keys()
    with torch.device("meta"):
        weights = Flux2Transformer2DModel(**config, axes_dims_rope=(6,) * 4).state_dict()  # pyright: ignore[reportArgumentType]
    assert names.shapes(config) == {key: tuple(weight.shape) for key, weight in weights.items()}


def test_every_row_of_a_bfl_file_is_one_weights():
    """Fused rows lie below each other without gap."""
    config = names.DEFAULTS | SHAPES["klein-4b"].config()
    shapes, homes = names.shapes(config), names.bfl_homes(config)
    assert shapes.keys() == homes.keys()
    fused = {}
    for name, home in homes.items():
        if home.rows:
            assert home.rows[1] - home.rows[0] == shapes[name][0]
            fused.setdefault(home.key, []).append(home.rows)
    assert len(fused) == 2 * 5
    for rows in fused.values():
        assert sorted(rows) == [(0, 3072), (3072, 6144), (6144, 9216)]
    whole = [home.key for home in homes.values() if not home.rows]
    assert len(set(whole)) == len(whole)
    assert not fused.keys() & set(whole)
