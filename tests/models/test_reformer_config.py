"""The Reformer's configuration: checks and defaults."""

import pytest
from helpers.tiny_reformer import config

CONFIGS = {
    "no layers": ({"layers": ()}, ValueError, r"layers is \(\)"),
    "a layer": ({"layers": ("lsh", "full")}, ValueError, "layers is"),
    "positions": ({"positions": "sine"}, ValueError, "positions is 'sine'"),
    "activation": ({"activation": "tanh"}, ValueError, "activation is 'tanh'"),
    "heads": (
        {"heads": 5},
        ValueError,
        "width is 24; without head_dim it must be a multiple of heads, 5",
    ),
    "chunk": ({"local_chunk": 17}, ValueError, "local_chunk is 17; it must be a multiple of 16"),
    "axial shape": (
        {"axial_shape": (4, 4)},
        ValueError,
        r"axial_shape is \(4, 4\); it must hold max_length, 256",
    ),
    "axial widths": (
        {"axial_widths": (4, 4)},
        ValueError,
        r"axial_widths is \(4, 4\); it must add up to width, 24",
    ),
    "rotary": (
        {"positions": "rotary", "head_dim": 9},
        ValueError,
        "head_dim is 9; with rotary positions",
    ),
    "dropout": ({"lsh_dropout": 1.0}, ValueError, "lsh_dropout is 1.0"),
    "hashes": ({"n_hashes": 0}, ValueError, "n_hashes is 0"),
    "buckets": ({"n_buckets": 7}, ValueError, "n_buckets is 7"),
    "preset": ({"preset": "best"}, ValueError, "preset is 'best'"),
    "exact": ({"exact": "always"}, ValueError, "exact is 'always'"),
    "length": ({"max_length": 0}, ValueError, "max_length is 0"),
    "tied": ({"tied": 1}, TypeError, "tied must be a bool"),
    "head bias": ({"head_bias": True}, ValueError, "head_bias is True; with tied it must be False"),
    "fraction": (
        {"fraction_bits": 24},
        ValueError,
        "fraction_bits is 24; with exact='auto' it must be at most 23",
    ),
    "narrow": (
        {"width": 1, "heads": 1},
        ValueError,
        "width is 1; with axial positions it must be at least 2",
    ),
    "one axis": (
        {"axial_shape": 16},
        ValueError,
        "axial_shape is 16; it must be two positive integers",
    ),
    "seed": (
        {"hash_seed": 2**64},
        ValueError,
        "hash_seed is 18446744073709551616; it must be None or",
    ),
    "eps": (
        {"norm_eps": float("nan")},
        ValueError,
        "norm_eps is nan; it must be a finite number, 0 or more",
    ),
    "std": ({"init_std": True}, ValueError, "init_std is True"),
    "padding": ({"pad_id": 50}, ValueError, "pad_id is 50; it must be an id, 0 to 49"),
    "end": (
        {"end_id": ()},
        ValueError,
        r"end_id is \(\); it must be None, an id, 0 to 49, or several",
    ),
    "feed-forward": ({"feed_forward_chunk": 0}, ValueError, "feed_forward_chunk is 0"),
}


@pytest.mark.parametrize("options, error, message", CONFIGS.values(), ids=CONFIGS)
def test_configs(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


def test_a_config_is_a_key():
    assert {config(n_buckets=[4, 8], end_id=[1, 2]): 3}[
        config(n_buckets=(4, 8), end_id=(1, 2))
    ] == 3
    assert (
        config(end_id=7).end_ids == (7,) and config(end_id=7).end_id == 7 and config().end_ids == ()
    )


@pytest.mark.parametrize("width", [2, 3, 8])
def test_narrow_models_have_axial_positions(width):
    rows, columns = config(width=width, heads=1).axial_widths
    assert rows == max(1, width // 4) and columns == width - rows
