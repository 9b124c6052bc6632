"""Configuration of DeiT-Ti."""

from transformers import PretrainedConfig


CLASS_TOKEN = "class"
DISTILLATION_TOKEN = "distillation"
TOKENS = (CLASS_TOKEN, DISTILLATION_TOKEN)
READOUTS = (*TOKENS, "both")


class DeiTTiConfig(PretrainedConfig):
    r"""
    Configuration of a [`DeiTTiModel`], the smallest network of "Training data-efficient image transformers &
    distillation through attention" (Touvron et al., 2021, table 1). The defaults are the paper's DeiT-Ti without
    distillation. `DistillMode.network` in `modeling_deit_ti.distillation` has the `distill_mode`, `tokens` and
    `readout` of each mode.

    Args:
        hidden_size (`int`, *optional*, defaults to 192): Width of the tokens.
        num_hidden_layers (`int`, *optional*, defaults to 12): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 3): Number of attention heads in each block.
        intermediate_size (`int`, *optional*, defaults to 768): Width of the MLP's hidden layer.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the MLP.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the embeddings, the attention and the MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout of the attention probabilities.
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Stochastic depth: probability of dropping a residual branch in the last block. It increases linearly from
            0 in the first.
        patch_drop_rate (`float`, *optional*, defaults to 0.0):
            PatchDropout (Liu et al., 2023): share of an image's patches that training leaves out.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that initialises tokens, positions and weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the layer norms.
        image_size (`int`, *optional*, defaults to 224): Height and width of the input images, in pixels.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch, in pixels. Must divide `image_size`.
        num_channels (`int`, *optional*, defaults to 3): Number of channels of the input images.
        qkv_bias (`bool`, *optional*, defaults to `True`): Whether queries, keys and values have a bias.
        tokens (`list[str]`, *optional*, defaults to `["class"]`):
            The learned tokens, each with its own head: `"class"`, `"distillation"` or both, in this order.
        readout (`str`, *optional*, defaults to `"class"`):
            What `logits` contains: those of the `"class"` or the `"distillation"` head, or the mean of `"both"`.
        distill_mode (`str`, *optional*, defaults to `"none"`):
            The mode that the model was trained in. Only a record: `tokens` and `readout` define the network.

    Raises:
        ValueError: if `patch_size` does not divide `image_size`, `num_attention_heads` does not divide `hidden_size`,
            `tokens` or `readout` is not one of the values above, or `readout` needs a token that is not in `tokens`.
    """

    model_type = "deit_ti"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    def __init__(
        self,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.1,
        patch_drop_rate=0.0,
        initializer_range=0.02,
        layer_norm_eps=1e-6,
        image_size=224,
        patch_size=16,
        num_channels=3,
        qkv_bias=True,
        tokens=(CLASS_TOKEN,),
        readout=CLASS_TOKEN,
        distill_mode="none",
        **kwargs,
    ):
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}.")
        if hidden_size % num_attention_heads:
            raise ValueError(f"num_attention_heads {num_attention_heads} does not divide hidden_size {hidden_size}.")
        tokens = list(tokens)
        if not tokens or tokens != [token for token in TOKENS if token in tokens]:
            raise ValueError(f"tokens must be one or both of {list(TOKENS)}, in this order, not {tokens}.")
        needed = TOKENS if readout == "both" else (readout,)
        if readout not in READOUTS or any(token not in tokens for token in needed):
            raise ValueError(
                f"readout {readout!r} does not fit tokens {tokens}: it must be one of them, or 'both' with both."
            )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.patch_drop_rate = patch_drop_rate
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.qkv_bias = qkv_bias
        self.tokens = tokens
        self.readout = readout
        self.distill_mode = distill_mode
        super().__init__(**kwargs)


__all__ = ["DeiTTiConfig"]
