"""The settings that a recipe may hold. A recipe may come from an untrusted source."""

import re
from typing import Any

# Sizes, rates and kinds of layers are allowed. Other arguments of constructors could make them read a file.
_LONGEST, _LARGEST = 200, 65536  # largest length of a list, and largest number
_LARGEST_SIDE = 4096  # largest side of images, because the time of some networks grows with the square of the sides
_OPTIONS = """
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
    """  # arguments of models of timm and torchvision
_CONFIGURATIONS = """
    add_fpn apply_layernorm aspp_dropout_prob aspp_out_channels atrous_rates attention_drop_rate
    attention_probs_dropout_prob attention_ratio attn_dropout auxiliary_channels auxiliary_concat_input
    auxiliary_loss_weight auxiliary_num_convs base_attn_unit_dims batch_norm_eps batch_norm_momentum
    classifier_dropout_prob cls_token conv_kernel_size decoder_depth decoder_hidden_size decoder_num_heads
    depth_coefficient depth_divisible_by depth_divisor depth_multiplier depthwise_padding down_ops down_pad
    down_patch_size down_stride downsample_in_bottleneck downsample_in_first_stage downsamples drop_connect_rate
    drop_conv_encoder_rate drop_mlp_rate dropout_rate embed_dim_multiplier embedding_dynamic_padding embedding_size
    encoder_stride expand_ratios ffn_dropout ffn_multiplier finegrained_output first_layer_is_expansion focal_levels
    focal_windows global_padding groups_width hidden_act hidden_dropout_prob hidden_size hidden_sizes in_channels
    initializer_range intermediate_size kernel_qkv kernel_sizes key_dim layer_norm_eps layer_norm_init layer_type
    layerscale_value linear_attention mask_ratio masked_unit_attention masked_unit_size min_depth n_attn_blocks
    neck_hidden_sizes normalize_modulator normalize_pixel_loss num_attention_heads num_block_repeats num_channels
    num_encoder_blocks num_groups num_hidden_layers num_labels num_query_pool num_register_tokens num_stages
    out_channels out_indices padding padding_kv padding_q patch_padding patch_sizes patch_stride pool_scales
    pool_size pooler_act pooler_output_size pooling_type pretrained_window_sizes qkv_projection_method query_stride
    reshape_hidden_states reshape_last_stage semantic_loss_ignore_index sequence_reduction_ratios
    squeeze_expansion_ratio sr_ratios stage_downsample stage_downsample_strides stage_in_channels stage_kernel_size
    stage_light_block stage_mid_channels stage_num_blocks stage_numb_of_layers stage_out_channels stem_strides
    stride stride_kv stride_q strides tf_padding use_absolute_embeddings use_absolute_position_embeddings
    use_auxiliary_head use_conv_embed use_layer_scale use_layerscale use_learnable_affine_block use_mask_token
    use_mean_pooling use_post_layernorm use_post_layernorm_in_modulation use_relative_position_bias
    use_shared_relative_position_bias use_swiglu_ffn width_coefficient width_factor width_multiplier
    """  # settings in configurations of transformers
OPTIONS = frozenset(_OPTIONS.split())
CONFIGURATIONS = OPTIONS | frozenset(_CONFIGURATIONS.split())


def may_be_set(name: str, value: object, known: frozenset[str] = OPTIONS) -> bool:
    """Whether a saved recipe may contain this setting.

    The name must be on the list, and the value a short word, a small number, None, or a short list of these.
    """
    plain = name in known and is_plain(value)
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
    return value is None or abs(value) <= largest  # False for NaN


def is_plain(value: object) -> bool:
    """Whether a value is a number, a string, None, or a list of such values."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
