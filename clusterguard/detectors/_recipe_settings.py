"""What a recipe may set in a model that is built from it. A recipe may come from a stranger."""

import re
from typing import Any

_LONGEST, _LARGEST, _LARGEST_SIDE = 200, 65536, 4096  # some networks take time in the square of an image's sides
_SETTINGS = """
    act_layer aa_layer alpha always_partition attention_dropout attn_drop_rate aux_logits avg_down base_width
    block_channels block_config block_layers block_reduce_first bn_size cardinality channels class_token conv_mlp depth
    depths dilated dims distilled down_kernel_size drop_block_rate drop_path_rate drop_rate dropout dropout_aux
    dynamic_img_pad dynamic_img_size embed_dim embed_dims expand_ratio expansion_ratio fc_norm final_norm fix_init
    fix_stem global_pool groups growth_rate head_dim head_hidden_size head_init_scale head_norm_first hidden_dim
    image_size img_size in_chans init_values init_weights input_size kernel_size last_channel layer_scale
    layer_scale_init_value layers ls_init_value memory_efficient mlp_dim mlp_dropout mlp_ratio mlp_ratios
    no_embed_class norm_eps norm_layer num_classes num_features num_heads num_init_features num_layers output_stride
    pad_type partition_size patch_drop_rate patch_size pos_drop_rate pos_embed pre_norm proj_drop_rate qk_norm qkv_bias
    reduced_tail reg_tokens replace_stem_pool replace_stride_with_dilation representation_size round_nearest
    squeeze_ratio stem_channels stem_chs stem_size stem_type stem_width stochastic_depth_prob strict_img_size
    transform_input use_grn use_pos_embed version weight_init width width_mult width_per_group widths window_size
    zero_init_last zero_init_residual
    """
"""What a recipe may set: sizes, rates and kinds of layers. Other things that constructors take might read a file."""


def may_be_set(name: str, value: object) -> bool:
    """Whether a recipe may hold a setting: numbers and short words, few of them, under names that are known."""
    plain = name in _SETTINGS.split() and is_plain(value)
    values = _flat(value) if plain else []
    largest = _LARGEST_SIDE if name.endswith("_size") else _LARGEST
    return plain and len(values) <= _LONGEST and all(_is_small(item, largest) for item in values)


def _flat(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value]
    return [leaf for part in value for leaf in (_flat(part) or [None])]


def _is_small(value: str | float | None, largest: int) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[\w.-]{0,40}", value) is not None
    return value is None or abs(value) <= largest  # no NaN either


def is_plain(value: object) -> bool:
    """Whether a value is a number, a string, None, or a list of such values."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
